"""What is due when, on one thread: a heap of times, however many things wait in it.

Each entry runs with the lock held, and the lock is let go between entries. Entries are told the
moment for which they were meant, and not the one at which the thread got there, so that the story
stays right under load and when the clock is moved on by hours.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Final

__all__ = ["Clock", "Timetable"]

TICK: Final = 0.002
"""Seconds between two looks at least; what falls due in between is done in one go."""


class Clock:
    """The time of the world: the machine's, and as much later as it was moved on."""

    def __init__(self) -> None:
        # A step of the machine's clock must not reach the tasks.
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        """Return seconds since 1970."""
        return time.monotonic() + self._offset

    def advance(self, seconds: float) -> None:
        """Move the time on."""
        self._offset += seconds


class Timetable:
    """Runs functions at their moments."""

    def __init__(self, lock: threading.RLock, clock: Clock) -> None:
        self._changed = threading.Condition(lock)
        self._clock = clock
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._closed = False
        self._thread: threading.Thread | None = None
        self.failures: list[BaseException] = []
        """What went wrong in an entry: told when the world is closed."""

    def at(self, moment: float, action: Callable[[float], None]) -> None:
        """Have an action called with `moment` once that has come; with the lock held."""
        with self._changed:
            first = not self._heap or moment < self._heap[0][0]
            heapq.heappush(self._heap, (moment, next(self._order), action))
            if first:
                self._changed.notify()

    def wake(self) -> None:
        """Look again: the clock was moved."""
        with self._changed:
            self._changed.notify()

    def run_due(self) -> None:
        """Do what is due now, on the calling thread."""
        while True:
            with self._changed:
                if not self._heap or self._heap[0][0] > self._clock():
                    return
                moment, _, action = heapq.heappop(self._heap)
                try:
                    action(moment)
                except Exception as error:  # noqa: BLE001 - told at the end; others must go on
                    self.failures.append(error)

    def open(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="cloud-run-timetable", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; what is not due yet never happens."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                if self._heap:
                    wait = self._heap[0][0] - self._clock()
                    if wait > 0:
                        self._changed.wait(max(wait, TICK))
                else:
                    self._changed.wait()
                if self._closed:
                    return
            self.run_due()
