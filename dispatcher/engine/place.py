"""A target as one process serves it, and what passes between the steps."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import structlog

from dispatcher.backends.base import (
    Backend,
    LaunchRequest,
    TaskReport,
    Unavailable,
)
from dispatcher.config import Target
from dispatcher.pausing import Pause
from dispatcher.requests import Plan
from dispatcher.states import Outcome
from dispatcher.storage import Storage
from dispatcher.store import Store
from dispatcher.store.plain import plain
from dispatcher.store.rows import ExecutionRow
from dispatcher.watching import Watch

if TYPE_CHECKING:
    from dispatcher.engine.definitions import Definitions

__all__ = [
    "Call",
    "Ending",
    "Place",
    "Round",
    "is_throttled",
    "plain",
    "report_breach",
]

log = structlog.get_logger(__name__)


READERS: Final = 8
"""Threads that poll, cancel and look keys up, for each target."""

LONGEST_PAUSE: Final = 30.0
"""Seconds between two tries to look keys up while nobody answers, at most."""


@dataclass(slots=True)
class Place:
    """A target as this process serves it."""

    store: Store
    target: Target
    backend: Backend
    home: Mapping[str, str] | None
    callers: ThreadPoolExecutor
    readers: ThreadPoolExecutor
    definitions: Definitions
    watch: Watch
    storage: Storage | None = None
    """Where input documents and results lie; None where none is configured."""

    told: Mapping[str, Any] | None = None
    """The target's limits, as its leader told when it was last locked: see `storing`."""

    launching: Lock = field(default_factory=Lock)
    """Held by the one round of launches that this process makes at a time."""

    following: Lock = field(default_factory=Lock)
    poll_failures: int = 0
    looks: Pause = field(default_factory=lambda: Pause(LONGEST_PAUSE))
    """Keys cannot be looked up now, so that nobody tries until it is over."""

    down: bool = True
    """Whether the row may say that it is down: at first it may, from a worker before this one."""

    launches_fail: bool = True
    """The same of an outage that launches told of, which only a launch can end."""

    @property
    def claims(self) -> Storage | None:
        """Where claims lie; None where the provider itself keeps a key to one execution."""
        return None if self.backend.limits.relaunch_safe else self.storage

    def went_down(self, reason: str, *, resume_in: float | None = None) -> None:
        """Record that the target does not answer; hold its launches for a while if asked to."""
        self.down = True
        self.launches_fail = self.launches_fail or resume_in is not None
        self.store.target_down(self.target.name, plain(reason), resume_in=resume_in)

    def came_up(self, *, launches: bool = False) -> None:
        """Record that the target answers again: launches, or only the reading of states."""
        if self.down or (launches and self.launches_fail):
            self.down = False
            if launches:
                self.launches_fail = False
            self.store.target_up(self.target.name, launches=launches)


@dataclass(frozen=True, slots=True)
class Call:
    """A launch that is committed and about to be made."""

    execution_id: int
    request: LaunchRequest
    plan: Plan
    number: int = 1
    """Which of the execution's calls it is: an answer to an earlier one changes nothing."""


@dataclass(frozen=True, slots=True)
class Round:
    """What a round of launches did."""

    calls: int
    more: bool
    """Whether there may be more to launch at once."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What is known to have ended of one execution."""

    execution_id: int
    tasks: tuple[TaskReport, ...] = ()
    final: bool = False
    """Nothing of it runs any more; its open attempts are closed too."""

    rest: tuple[Outcome, str] = (
        Outcome.LOST,
        "the provider says that it ended, but not how this task did",
    )
    """What open attempts are closed with that no task report tells of."""

    elsewhere: frozenset[int] = frozenset()
    """Tasks that another piece of the same news tells of: how they ended is not `rest`."""

    reason: str | None = None
    call: int | None = None
    """The number of the launch call that it is about; None where it is about what runs."""

    handle: str | None = None
    """The handle that it is about, where it is about what runs."""

    absent: bool = False
    """Whether it is told only because the provider no longer knows it."""

    def holds(self, row: ExecutionRow) -> bool:
        """Say if it still tells of this row.

        What is known of a launch call is no news of the execution once another call was begun, or
        once somebody has found what the call started. What is known of one handle is no news once
        another one, which has the claim, is followed. That it is absent is none once somebody has
        seen it again.
        """
        if self.absent and row.absent_for is None:
            return False
        if self.call is not None:
            return self.call == row.calls and row.handle is None
        return self.handle is None or self.handle == row.handle


def is_throttled(error: BaseException | None) -> bool:
    """Say if a call was refused for now: then the provider does answer."""
    return isinstance(error, Unavailable) and error.not_started


def report_breach(error: BaseException, *allowed: type[BaseException]) -> None:
    """Log what a backend may not raise; it is taken for an answer that says nothing."""
    if not isinstance(error, (Unavailable, *allowed)):
        log.error("a backend broke its contract", exc_info=error)
