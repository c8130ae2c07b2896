"""Hides secrets in what is stored for audit or shown to people: env values and passwords in URLs.

It errs on the side of hiding. The values that run are never touched, only their copies. A text may
be of any size and come from anywhere: the work grows with its length and no faster.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["MASK", "excerpt", "is_secret_name", "mask_url", "redact", "redact_env"]

MASK: Final = "***"

LONGEST_EXCERPT: Final = 2000
"""Characters of one value that an excerpt shows at most."""

_SECRET_NAME: Final = re.compile(
    r"PASSWORD|PASSWD|PASSPHRASE|SECRET|TOKEN|API_?KEY|PRIVATE_?KEY|CREDENTIAL|(ACCOUNT|ACCESS)_?KEY$",
    re.IGNORECASE,
)

_WORD: Final = re.compile(r"\S+")
_USER: Final = re.compile(r"//[^/@\s:]*:")

# key=value of a query, of a libpq connection string or of an Azure one.
_PAIR: Final = re.compile(
    r"(?P<before>(?:^|[?&;\s])(?P<name>[\w.-]+)=)(?P<value>'[^']*'|[^&;\s#]+)"
)

# name='value of a text that was cut before the second quote.
_OPEN_PAIR: Final = re.compile(r"(?P<before>(?:^|[?&;\s])(?P<name>[\w.-]+)=)'[^']*\Z")

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
    return _PAIR.sub(_masked_pair, _WORD.sub(_masked_word, text))


def excerpt(text: str) -> str:
    """Copy a text of any size for the audit: its first 2,000 characters, masked as by `mask_url`.

    What is left out is said by "… (N characters in all)". A secret that the cut goes through is
    hidden as if it were whole.
    """
    if len(text) <= LONGEST_EXCERPT:
        return mask_url(text)
    head = text[:LONGEST_EXCERPT]
    is_in_a_word = not (head[-1].isspace() or text[LONGEST_EXCERPT].isspace())
    # A "@" further on may be the end of a password that begins here.
    if is_in_a_word and text.find("@", LONGEST_EXCERPT) != -1:
        user = _USER.search(head, len(head) - len(head.rsplit(maxsplit=1)[-1]))
        if user is not None:
            head = head[: user.end()] + MASK
    head = _OPEN_PAIR.sub(_masked_pair, head)
    return f"{mask_url(head)}… ({len(text)} characters in all)"


def redact_env(env: Mapping[str, str]) -> dict[str, str]:
    """Copy an environment for the audit without its secrets.

    Hidden are values of secret names, and passwords in URLs; the rest is cut as by `excerpt`.
    """
    return {
        name: MASK if value and is_secret_name(name) else excerpt(value)
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


def _masked_word(word: re.Match[str]) -> str:
    """Hide `user:PASSWORD@` in a word, up to its last "@".

    A password with a raw "/" or "@" in it makes a bad URL, which is just what an error message
    would show. The last "@" is looked for first: from every "//host:" to the end would be
    quadratic.
    """
    text = word.group()
    end = text.rfind("@")
    user = _USER.search(text, 0, end) if end > 0 else None
    return text if user is None else f"{text[: user.end()]}{MASK}{text[end:]}"


def _masked_pair(pair: re.Match[str]) -> str:
    name = pair["name"]
    if is_secret_name(name) or _SIGNATURE.match(name):
        return f"{pair['before']}{MASK}"
    return pair.group()
