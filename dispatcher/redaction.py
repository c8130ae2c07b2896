"""Hides secrets in what is stored for audit or shown to people: env values and passwords in URLs.

It errs on the side of hiding. The values that run are never touched, only their copies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["MASK", "is_secret_name", "mask_url", "redact", "redact_env"]

MASK: Final = "***"

_SECRET_NAME: Final = re.compile(
    r"PASSWORD|PASSWD|PASSPHRASE|SECRET|TOKEN|API_?KEY|PRIVATE_?KEY|CREDENTIAL|(ACCOUNT|ACCESS)_?KEY$",
    re.IGNORECASE,
)

# Up to the last "@" before a blank: a password with a raw "/" or "@" in it makes a bad URL, which
# is just what an error message would show.
_USER_INFO: Final = re.compile(r"(?P<before>//[^/@\s:]*:)[^\s]*(?P<after>@)")

# key=value of a query, of a libpq connection string or of an Azure one.
_PAIR: Final = re.compile(
    r"(?P<before>(?:^|[?&;\s])(?P<name>[\w.-]+)=)(?P<value>'[^']*'|[^&;\s#]+)"
)

_SIGNATURE: Final = re.compile(
    r"^(sig|signature|x-(amz|goog)-signature|x-amz-security-token)$", re.IGNORECASE
)


def is_secret_name(name: str) -> bool:
    """Whether a variable or key of this name looks as if it held a secret."""
    return _SECRET_NAME.search(name) is not None


def mask_url(text: str) -> str:
    """Hide the passwords in a text that is, or has in it, a URL or a connection string.

    Hidden are `user:PASSWORD@host`, and the value of each `name=value` whose name looks secret.
    Any other text comes back as it was.
    """
    return _PAIR.sub(_masked_pair, _USER_INFO.sub(rf"\g<before>{MASK}\g<after>", text))


def redact_env(env: Mapping[str, str]) -> dict[str, str]:
    """Copy an environment without its secrets: values of secret names, and passwords in URLs."""
    return {
        name: MASK if value and is_secret_name(name) else mask_url(value)
        for name, value in env.items()
    }


def redact(value: Any) -> Any:
    """Copy any JSON value without its secrets, by the rules of `redact_env`, at each depth."""
    if isinstance(value, Mapping):
        return {
            key: MASK
            if inner and is_secret_name(str(key)) and not isinstance(inner, Mapping)
            else redact(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    return mask_url(value) if isinstance(value, str) else value


def _masked_pair(pair: re.Match[str]) -> str:
    name = pair["name"]
    if is_secret_name(name) or _SIGNATURE.match(name):
        return f"{pair['before']}{MASK}"
    return pair.group()
