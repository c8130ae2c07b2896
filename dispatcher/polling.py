"""How soon to look at an execution again. Pure: no I/O, ages are arguments.

Looking is cheap per page and dear per call, so: seldom while nothing can have ended, often when the
end is near. Without history the interval is a twentieth of the age, so that an end is seen late by
five per cent of the run time at most; with history, few looks are spent on the time in which no
execution of this job has ended so far.
"""

from __future__ import annotations

from collections import deque
from typing import Final

__all__ = ["LONGEST", "SHORTEST", "History", "interval", "page_interval"]

SHORTEST: Final = 0.5
"""Seconds between two looks, at least."""

LONGEST: Final = 30.0
"""Seconds between two looks, at most: a cancel in the provider's console is seen within it."""

PART_OF_AGE: Final = 0.05
CERTAIN: Final = 0.7
"""The part of the shortest known run time in which an end is not expected."""

SURPRISE: Final = 0.25
"""The part of the shortest known run time by which an unexpected end may be seen late."""


class History:
    """The run times of the last executions of one job, in seconds."""

    def __init__(self, keep: int = 100) -> None:
        self._seconds: deque[float] = deque(maxlen=keep)

    def add(self, seconds: float) -> None:
        """Remember a run time."""
        self._seconds.append(seconds)

    def shortest(self) -> float | None:
        """The shortest that is remembered, or None while fewer than five are."""
        return min(self._seconds) if len(self._seconds) >= 5 else None  # noqa: PLR2004 - a sample


def interval(age: float, shortest: float | None, least: float = SHORTEST) -> float:
    """Say in how many seconds to look again at an execution launched `age` seconds ago.

    `least` is the target's own bound, in seconds.
    """
    if shortest is not None and age < CERTAIN * shortest:
        soon = min(CERTAIN * shortest - age, SURPRISE * shortest)
    else:
        soon = PART_OF_AGE * age
    return min(max(LONGEST, least), max(SHORTEST, least, soon))


def page_interval(pages: int, reads_per_minute: float | None) -> float:
    """Say how far apart two rounds over all pages must be to stay within a budget of calls."""
    if reads_per_minute is None:
        return 0.0
    return pages * 60.0 / reads_per_minute
