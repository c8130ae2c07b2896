"""Words of others as Postgres can keep them."""

from __future__ import annotations

__all__ = ["plain"]


def plain(words: str) -> str:
    """Write what a provider or a program says in characters that Postgres can keep."""
    words = words.replace("\0", "\N{REPLACEMENT CHARACTER}")
    return words.encode(errors="replace").decode()
