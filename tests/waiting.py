"""How a test waits for what another process or thread does: for a condition, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import pytest

_T = TypeVar("_T")


def until(probe: Callable[[], _T], what: str = "the condition", seconds: float = 60.0) -> _T:
    """Wait until the probe says something true, and say what did not happen if it never does.

    A wait costs nothing where it succeeds: let `seconds` be far more than a busy machine needs.
    """
    end = time.monotonic() + seconds
    pause = 0.005
    while True:
        # Before the look: there is one more after the time, also where this process stood still.
        is_late = time.monotonic() > end
        if found := probe():
            return found
        if is_late:
            pytest.fail(f"not within {seconds:g} s: {what}")
        time.sleep(pause)
        pause = min(0.05, pause * 1.3)
