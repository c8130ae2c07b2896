"""Pages of a list: a token names the last record shown, so that new ones do not shift it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable
from typing import Any

from dispatcher.emulators.cloud_run.refusal import Code, Refused

__all__ = ["Place", "page"]

Place = tuple[int, Callable[[], Any]]
"""A record's place in the order of its list, and what makes its message."""


def page(
    places: Iterable[Place], *, size: int, token: str, limit: int, newest_first: bool = True
) -> tuple[list[Any], str]:
    """Return the records of one page, and the token of the next one; empty if there is none.

    Google's rules for pages are google/aip/158; how many there are is a guess: page_size.

    Raises:
        Refused: the size is negative, or the token is none of ours.
    """
    if size < 0:
        raise Refused(Code.INVALID_ARGUMENT, f"page_size: {size} must not be negative.")
    size = min(size or limit, limit)
    after = _read(token) if token else None
    records: list[Any] = []
    last = 0
    for order, make in places:
        if after is not None and (order >= after if newest_first else order <= after):
            continue
        if len(records) == size:
            return records, _write(last)
        records.append(make())
        last = order
    return records, ""


def _write(order: int) -> str:
    return base64.urlsafe_b64encode(f"after {order}".encode()).decode()


def _read(token: str) -> int:
    """Read a token; one that is not ours is refused (google/aip/158)."""
    try:
        word, _, order = base64.urlsafe_b64decode(token.encode()).decode().partition(" ")
        if word == "after":
            return int(order)
    except (binascii.Error, ValueError):
        pass  # refused below, as any other token that is not ours
    raise Refused(Code.INVALID_ARGUMENT, f"page_token: {token!r} is invalid.")
