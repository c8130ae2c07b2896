"""Counts as a sentence has them."""

from __future__ import annotations

__all__ = ["counted"]


def counted(count: int, noun: str) -> str:
    """Word a number of things, as in "1 chunk" and "12,000 chunks".

    `noun` is one whose plural ends with s.
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
