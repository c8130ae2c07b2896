"""What the leaseholder of a target remembers between two looks: when to look at what again.

Nothing here is needed for correctness. A new leaseholder starts with an empty memory, looks at
everything once, and goes on.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from dispatcher.polling import LONGEST, SHORTEST, History, interval
from dispatcher.store.rows import ExecutionRow

__all__ = ["Watch", "Watched"]

FRESH: Final = 10.0
"""Seconds for which a look counts as one of this moment."""


@dataclass(slots=True)
class Watched:
    """A launched execution, as it is remembered. Times are of the engine's monotonic clock."""

    id: int
    handle: str
    job: str | None
    tasks: int
    launched: float
    next_look: float
    started: bool
    absent: float | None
    calls: int = 1
    """Launch calls that were made for it: with more than one there may be a double."""

    looked: float | None = None
    """When it was last seen alive."""

    settled: set[int] = field(default_factory=set)
    """Task indexes that are settled; stays empty where there is one task."""


class Watch:
    """The launched executions of one target.

    Args:
        least: Seconds between two looks at an execution, at least.
    """

    def __init__(self, least: float = SHORTEST) -> None:
        self._least = max(SHORTEST, least)
        self._known: dict[int, Watched] = {}
        self._history: defaultdict[str | None, History] = defaultdict(History)
        self._not_before = 0.0
        self._put_off: dict[int, float] = {}
        self._other_handle: set[str] = set()

    def __len__(self) -> int:
        return len(self._known)

    def keep(self, ids: Iterable[int]) -> list[int]:
        """Forget what is no longer launched; return what is new."""
        live = set(ids)
        while self._other_handle:
            handle = self._other_handle.pop()
            for one in [one for one in self._known.values() if one.handle == handle]:
                self.forget(one.id)
        for gone in self._known.keys() - live:
            self.forget(gone)
        return sorted(live - self._known.keys())

    def add(self, rows: Iterable[ExecutionRow], settled: dict[int, set[int]], now: float) -> None:
        """Remember executions, to be looked at as their age says."""
        for row in rows:
            if row.handle is None or row.state != "launched":
                continue
            age = row.launched_age or 0.0
            job = row.job_name
            first = interval(age, self._history[job].shortest(), self._least)
            due = now + (0.0 if age > self._least else first)
            due = max(due, self._put_off.pop(row.id, due))
            self._known[row.id] = Watched(
                row.id,
                row.handle,
                job,
                row.tasks,
                now - age,
                due,
                row.started,
                None if row.absent_for is None else now - row.absent_for,
                calls=row.calls,
                settled=settled.get(row.id, set()),
            )

    def put_off(self, ids: Iterable[int], until: float) -> None:
        """Forget all that is remembered of some, and look at them anew then."""
        for execution_id in ids:
            self.forget(execution_id)
            self._put_off[execution_id] = until

    def forget_handle(self, handle: str) -> None:
        """Have the execution forgotten that is watched under this handle: it has another now.

        At the next round, as this may be called from another thread.
        """
        self._other_handle.add(handle)

    def forget(self, execution_id: int) -> None:
        """Drop an execution that has ended."""
        self._known.pop(execution_id, None)

    def ended(self, one: Watched, seconds: float | None) -> None:
        """Learn from an execution that has ended, and drop it.

        `seconds` is how long it ran, as the provider says. Where it does not, the age at the last
        look counts, at which it still ran: too short a time costs a look, too long a one a delay.
        """
        if seconds is None and one.looked is not None:
            seconds = one.looked - one.launched
        if seconds is not None:
            self._history[one.job].add(seconds)
        self.forget(one.id)

    def hurry(self, ids: Iterable[int], now: float) -> None:
        """Look soon at executions whose end was asked for."""
        for one in map(self._known.get, ids):
            if one is not None:
                one.next_look = min(one.next_look, now + self._least)

    def fresh(self, ids: Iterable[int], now: float) -> list[int]:
        """Name those that were looked at a moment ago; have the others looked at now.

        A deadline is held against an execution only by what the provider says of it: while nobody
        could look, it may well have started, or ended, in time.
        """
        found = []
        for one in map(self._known.get, ids):
            if one is not None and one.looked is not None and now - one.looked <= FRESH:
                found.append(one.id)
            elif one is not None:
                one.next_look = now
        return found

    def due(self, now: float, page_size: int) -> list[list[Watched]]:
        """Name the executions to look at now, in pages; the last page is filled with the next ones.

        A call costs the same for one as for a page, so the rest of a page is free.
        """
        if now < self._not_before:
            return []
        due = [one for one in self._known.values() if one.next_look <= now]
        if not due:
            return []
        room = -len(due) % page_size
        if room and len(due) < len(self._known):
            waiting = (one for one in self._known.values() if one.next_look > now)
            due += heapq.nsmallest(room, waiting, key=lambda one: one.next_look)
        due.sort(key=lambda one: one.id)
        return [due[at : at + page_size] for at in range(0, len(due), page_size)]

    def seen(self, one: Watched, now: float, soon: float | None = None) -> None:
        """Set the next look at an execution that still runs.

        `soon` is in how many seconds there is more to be read of it, if that is known.
        """
        wait = interval(now - one.launched, self._shortest(one), self._least)
        if soon is not None:
            wait = min(wait, max(self._least, soon))
        one.looked, one.next_look = now, now + wait

    def untold(self, one: Watched, now: float) -> None:
        """Set the next look at an execution that nothing could be said of."""
        one.next_look = now + interval(now - one.launched, self._shortest(one), self._least)

    def failed(self, page: Sequence[Watched], now: float, failures: int) -> None:
        """Set the next look at a page that could not be read."""
        wait = min(LONGEST, self._least * 2 ** min(failures, 10))
        for one in page:
            one.next_look = now + wait

    def pause(self, until: float) -> None:
        """Make no round before then: the budget of calls is used up."""
        self._not_before = until

    def _shortest(self, one: Watched) -> float | None:
        return self._history[one.job].shortest()
