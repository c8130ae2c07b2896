"""What one process remembers of executions that it has seen. Nothing here is needed to be right.

Any process can begin with an empty memory: it asks once more, and goes on. The memory is bounded,
in executions and in the tasks whose ends it holds; what was not touched for longest is dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from threading import Lock
from typing import Final

from dispatcher.backends.base import Handle, Launched, Report, TaskReport

__all__ = ["Known", "Memory"]

MOST_EXECUTIONS: Final = 20_000
MOST_TASKS: Final = 200_000
"""Ends of tasks that are held: 40 MB, about."""

KEPT: Final = 900.0
"""Seconds that an execution is remembered after it was last asked for."""


@dataclass(slots=True)
class Known:
    """One execution, as it was last seen. Times in seconds are of the process's monotonic clock."""

    handle: Handle
    key: str = ""
    instance: str = ""
    created: datetime | None = None
    """By the provider's clock."""

    seen: float | None = None
    """When it was last seen, in a list or by name."""

    live: bool = True
    """Whether it had not completed then."""

    listed: bool = False
    """Whether a list has ever shown it."""

    missed: float | None = None
    """Since when a list that ought to show it does not."""

    looked_up: float = 0.0
    """When it was last asked for by name."""

    done: float | None = None
    """Since when it is known to have completed."""

    tasks_listed: float | None = None
    """When the last listing of its tasks that was read to the end was begun."""

    listing: float | None = None
    """When the one was begun that was broken off, as the budget of reads was used up."""

    page_token: str = ""
    """Where that is to be gone on with."""

    ends: dict[int, TaskReport] = field(default_factory=dict)
    report: Report | None = None
    """The last one, once it has ended."""

    touched: float = 0.0
    held: int = 0
    """How many ends the memory has counted for it."""


class Memory:
    """Executions by handle, and launches by key. Each method may be called by any thread."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._lock = Lock()
        self._executions: OrderedDict[Handle, Known] = OrderedDict()
        self._launches: OrderedDict[str, tuple[Launched, datetime | None]] = OrderedDict()
        self._tasks = 0

    def of(self, handle: Handle) -> Known:
        """Give what is known of an execution; a blank if nothing is."""
        with self._lock:
            return self._touched(handle)

    def ours(self, handle: Handle) -> Known | None:
        """Give what is known of an execution whose key is."""
        with self._lock:
            known = self._executions.get(handle)
            return known if known is not None and known.key else None

    def note_launch(self, launched: Launched, created: datetime | None, instance: str) -> None:
        """Remember that a key's execution exists."""
        with self._lock:
            before = self._launches.get(launched.key)
            # Of two with one key the older one is its own; the other is a stray.
            if before is None or created is None or before[1] is None or created <= before[1]:
                self._launches[launched.key] = (launched, created)
            self._launches.move_to_end(launched.key)
            while len(self._launches) > MOST_EXECUTIONS:
                self._launches.popitem(last=False)
            known = self._touched(launched.handle)
            known.key, known.instance = launched.key, instance
            known.created = created if known.created is None else known.created

    def launched(self, key: str) -> Launched | None:
        """Give the execution of a key, if one was ever seen."""
        with self._lock:
            found = self._launches.get(key)
            return None if found is None else found[0]

    def live(self, instance: str, since: datetime, seen_after: float) -> list[Known]:
        """List what was seen running of an installation, and lately enough to be told of."""
        with self._lock:
            return [
                known
                for known in self._executions.values()
                if known.live
                and known.instance == instance
                and known.created is not None
                and known.created >= since
                and known.seen is not None
                and known.seen >= seen_after
            ]

    def trim(self) -> None:
        """Drop what is over the bounds, and what nobody asked for in a while."""
        with self._lock:
            long_ago = self._monotonic() - KEPT
            while self._executions:
                oldest = next(iter(self._executions.values()))
                if (
                    len(self._executions) <= MOST_EXECUTIONS
                    and self._tasks <= MOST_TASKS
                    and oldest.touched > long_ago
                ):
                    return
                self._executions.popitem(last=False)
                self._tasks -= oldest.held

    def count(self, known: Known) -> None:
        """Count the ends that an execution holds now."""
        with self._lock:
            if self._executions.get(known.handle) is known:
                self._tasks += len(known.ends) - known.held
                known.held = len(known.ends)

    def _touched(self, handle: Handle) -> Known:
        known = self._executions.get(handle)
        if known is None:
            known = self._executions[handle] = Known(handle)
        self._executions.move_to_end(handle)
        known.touched = self._monotonic()
        return known
