"""The clock by which a process measures how long something took."""

from __future__ import annotations

import time

__all__ = ["boottime"]


def boottime() -> float:
    """Read seconds of a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
