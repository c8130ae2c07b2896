"""What the world hands to a runner and gets back: one attempt of one task.

A runner makes an attempt happen. `scripted.py` has one that only pretends, `processes.py` one that
starts a local process, `containers.py` one that starts a container. The world decides everything
else: timeouts, retries, cancellation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dispatcher.emulators.cloud_run.quantities import DEFAULT_CPU, DEFAULT_MEMORY

__all__ = ["Handle", "Line", "Runner", "TaskEnd", "TaskStart"]


@dataclass(frozen=True, slots=True)
class TaskStart:
    """One attempt of one task, as it starts."""

    execution: str
    """The execution's full name."""

    job: str
    """The job's id."""

    index: int
    """The task index, from 0."""

    count: int
    """Tasks in the execution."""

    attempt: int
    """Cloud Run's own attempt, from 0: more than 0 if `max_retries` lets it retry."""

    image: str
    command: tuple[str, ...]
    args: tuple[str, ...]

    env: Mapping[str, str]
    """The container's variables, overrides merged; shared by all tasks of the execution."""

    at: float
    """When it started, in seconds since 1970."""

    working_dir: str = ""
    """Where the container's program starts; the image's own place if it is not said."""

    memory: str = DEFAULT_MEMORY
    """The container's limits, as the job writes them: see `quantities.py`."""

    cpu: str = DEFAULT_CPU

    @property
    def execution_id(self) -> str:
        """The last part of the execution's name."""
        return self.execution.rpartition("/")[2]

    @property
    def environment(self) -> dict[str, str]:
        """`env` with the variables that Cloud Run adds for a task (clouds.md §3)."""
        return {
            **self.env,
            "CLOUD_RUN_JOB": self.job,
            "CLOUD_RUN_EXECUTION": self.execution_id,
            "CLOUD_RUN_TASK_INDEX": str(self.index),
            "CLOUD_RUN_TASK_COUNT": str(self.count),
            "CLOUD_RUN_TASK_ATTEMPT": str(self.attempt),
        }


@dataclass(frozen=True, slots=True)
class Line:
    """A line that a task wrote."""

    text: str
    error: bool = False
    """Whether it went to standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEnd:
    """How an attempt ends by itself, if nothing stops it before."""

    seconds: float = 0.0
    """How long it takes; `math.inf` for ever. Only a script says so: a process just takes long."""

    exit_code: int = 0
    term_signal: int | None = None
    """Set when a signal ended it; the exit code counts for nothing then."""

    out_of_memory: bool = False
    problem: str = ""
    """Why it could not be started at all; nothing else counts then."""

    missing_image: bool = False
    """Whether that was its image: then the other tasks of the execution do not start either."""

    lines: tuple[str | Line, ...] = ()
    """What it writes. A script's lines are written at its end."""

    stop_seconds: float = 0.0
    """How long it takes to end once it is asked to (SIGTERM)."""

    effect: Callable[[], None] | None = field(default=None, compare=False)
    """Called as it ends by itself, and not if it is stopped before: the work that it does."""


class Handle(Protocol):
    """An attempt that runs elsewhere."""

    def stop(self) -> None:
        """Ask for its end: SIGTERM, and SIGKILL after a grace. Does not wait."""
        ...

    def kill(self) -> None:
        """End it with SIGKILL. Does not wait."""
        ...


class Runner(Protocol):
    """Makes attempts happen."""

    @property
    def limit(self) -> int | None:
        """Attempts that it can run at once; None for any number."""
        ...

    def has_image(self, image: str) -> bool:
        """Whether it can run that image."""
        ...

    def start(
        self,
        start: TaskStart,
        wrote: Callable[[Line], None],
        ended: Callable[[TaskEnd], None],
    ) -> TaskEnd | Handle:
        """Start an attempt.

        Returns its end, if that is known already, or a handle to what runs; then `ended` must be
        called once, from any thread, and `wrote` for each line before.
        """
        ...

    def close(self) -> None:
        """End what still runs, and wait for it."""
        ...
