"""What the world knows of an execution and its tasks. Data only: `executing.py` changes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple

from dispatcher.emulators.cloud_run.refusal import Code
from dispatcher.emulators.cloud_run.tasks import Handle, TaskEnd

__all__ = ["AttemptResult", "ExecutionRecord", "Snapshot", "Stop", "TaskRecord", "TaskState"]


class TaskState(Enum):
    """Where a task is."""

    WAITING = auto()
    RUNNING = auto()
    SUCCEEDED = auto()
    FAILED = auto()
    CANCELLED = auto()


class Stop(Enum):
    """Why an attempt is being stopped."""

    TIMEOUT = auto()
    CANCEL = auto()
    KILL = auto()


class AttemptResult(NamedTuple):
    """How an attempt ended, as the API shows it."""

    code: Code
    message: str = ""
    exit_code: int | None = None
    term_signal: int | None = None
    missing_image: bool = False


@dataclass(slots=True)
class TaskRecord:
    """One task; most of it is about the latest attempt."""

    index: int
    state: TaskState = TaskState.WAITING
    attempt: int = -1
    """The latest attempt, from 0; it also tells entries of the timetable that came too late."""

    started_at: float | None = None
    """When the first attempt started."""

    ended_at: float | None = None
    result: AttemptResult | None = None
    """Of the last attempt that ended."""

    end: TaskEnd | None = None
    """How the attempt that runs will end, if a script has said so."""

    handle: Handle | None = None
    stop: Stop | None = None


class Snapshot(NamedTuple):
    """What lists show of an execution at one moment."""

    version: int
    started_at: float | None
    completed_at: float | None
    running: int
    succeeded: int
    failed: int
    cancelled: int
    retried: int
    cancelling: bool


@dataclass(slots=True, eq=False)
class ExecutionRecord:
    """One execution."""

    name: str
    uid: str
    order: int
    """Executions are listed by it, newest first."""

    job: str
    """The full name of its job."""

    template: Any
    """The task template with the overrides merged in."""

    command: tuple[str, ...]
    """The command and arguments of the container that is run."""

    args: tuple[str, ...]
    env: Mapping[str, str]
    """The variables of the container that is run, secrets filled in."""

    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    task_count: int
    parallelism: int
    """Tasks at once, at most; at least 1."""

    max_retries: int
    timeout: float
    """Seconds for each attempt."""

    created_at: float
    operation: str
    """The name of the operation that RunJob returned."""

    tasks: list[TaskRecord]
    next_index: int = 0
    """The first task that has never been started."""

    again: deque[int] = field(default_factory=deque)
    """Tasks whose attempt failed and which go first now."""

    version: int = 1
    started_at: float | None = None
    completed_at: float | None = None
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    cancelling: bool = False
    """A cancel was asked for, whether it has taken effect or not."""

    stopping: bool = False
    """The cancel has taken effect: no task starts any more."""

    missing_image: bool = False
    """Its image was gone when it, or one of its tasks, should have started."""

    failure: str = ""
    """What its Completed condition says if it did not succeed."""

    deleted: bool = False
    """Its record is gone, by a delete, by retention or by `World.forget`."""

    history: deque[tuple[float, Snapshot]] = field(default_factory=deque)
    """Earlier states, kept only while lists lag."""

    rendered: dict[tuple[int, float], Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The last part of its name."""
        return self.name.rpartition("/")[2]

    @property
    def job_id(self) -> str:
        """The last part of its job's name."""
        return self.job.rpartition("/")[2]

    @property
    def location(self) -> str:
        """`projects/…/locations/…`."""
        return self.job.rpartition("/jobs/")[0]

    @property
    def ended(self) -> int:
        """Tasks that have ended for good."""
        return self.succeeded + self.failed + self.cancelled

    @property
    def done(self) -> bool:
        """Whether it has completed."""
        return self.completed_at is not None

    def snapshot(self) -> Snapshot:
        """Its state now."""
        return Snapshot(
            self.version,
            self.started_at,
            self.completed_at,
            self.running,
            self.succeeded,
            self.failed,
            self.cancelled,
            self.retried,
            self.cancelling,
        )
