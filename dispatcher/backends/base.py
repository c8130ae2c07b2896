"""The door between the engine and a kind of place where executions happen.

A backend starts, finds, polls and cancels executions, and that is all. It holds no loop, no sleep,
no thread, no retry, no database and no environment: the engine decides, the caller owns the handle.
What its calls cost is asked for at a `Meter`, which all workers share. `BackendContract` in
`dispatcher.testing` is the suite that every backend passes.

Only two exceptions may come out of a backend, `Unavailable` and `Rejected`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Final,
    Literal,
    NamedTuple,
    Protocol,
    TypeAlias,
    runtime_checkable,
)

from pydantic import BaseModel

from dispatcher.states import Outcome

if TYPE_CHECKING:
    from dispatcher.job import Job

__all__ = [
    "CLAIM_LOST",
    "UNMETERED",
    "Backend",
    "BackendError",
    "BackendLimits",
    "Change",
    "Crowded",
    "Definable",
    "Definition",
    "Handle",
    "KeepsResults",
    "LaunchRequest",
    "Launched",
    "Meter",
    "Phase",
    "Recorded",
    "Rejected",
    "Remark",
    "Report",
    "TaskInput",
    "TaskReport",
    "Unavailable",
]

Handle: TypeAlias = str
"""The backend's own name of an execution; one can paste it into the provider's console."""


class BackendError(Exception):
    """The root of the two errors that a backend may raise; the text is the provider's words."""


class Unavailable(BackendError):
    """The call did not work and the same call may work later: throttled, network, provider fault.

    From `launch` it leaves open whether something was started, unless `not_started` says that the
    provider clearly refused for now: then the execution keeps its key and its attempts and is
    called again later at no cost. From `poll` it is never an outcome.
    """

    def __init__(
        self, message: str, *, not_started: bool = False, retry_after: timedelta | None = None
    ) -> None:
        super().__init__(message)
        self.not_started = not_started
        self.retry_after = retry_after


class Rejected(BackendError):
    """The provider refuses this request and always will; from `launch`, nothing was started."""


@dataclass(frozen=True, slots=True)
class BackendLimits:
    """What a kind of backend can do, in numbers that the planner and the engine rely on."""

    max_tasks: int
    """Chunks that one execution can hold at most."""

    max_payload_bytes: int
    """Bytes of items, as JSON, that one task can be given at most."""

    inline_bytes: int
    """Bytes of input that a launch call itself can carry; what is larger goes by reference."""

    max_text_bytes: int
    """Bytes of one argument, or of one variable's value, at most."""

    call_timeout: timedelta
    """No call of this backend takes longer: each sets this as its own timeout."""

    find_grace: timedelta
    """How long after a launch call ended `find` may still miss what the call started."""

    absent_grace: timedelta
    """How long an execution must stay absent before it is given up as lost."""

    page_size: int
    """Handles that one `poll` call answers for."""

    poll_interval: timedelta
    """Between two looks at an execution, at least: what the provider's quota of reads can bear."""

    relaunch_safe: bool
    """A second `launch` with the same key cannot start a second execution."""

    own_results: bool
    """Its tasks can leave their results with it also where no storage is configured."""

    per_task_env: bool
    """Each task of an execution can have args and env of its own."""


class Meter(Protocol):
    """Counts a target's calls against its budgets, over all workers; one budget a kind of call.

    Launch calls are counted by the engine, and not here.
    """

    def take(
        self, kind: Literal["read", "write", "logs"], calls: int = 1, *, gentle: bool = False
    ) -> None:
        """Take calls from a budget just before they are made.

        `gentle` takes them only if half of a full budget is left for calls that matter more.

        Raises:
            Unavailable: the budget is used up for now; nothing was called.
        """
        ...

    def throttled(self, kind: Literal["read", "write", "logs"]) -> None:
        """Tell that the provider refused a call of this kind for being one too many."""
        ...


class _Unmetered:
    """A budget without end."""

    def take(
        self, kind: Literal["read", "write", "logs"], calls: int = 1, *, gentle: bool = False
    ) -> None:
        """Let every call go."""

    def throttled(self, kind: Literal["read", "write", "logs"]) -> None:
        """Go on as before."""


CLAIM_LOST: Final = 94
"""The exit code of a task whose key another execution has claimed: see `dispatcher.container`."""

UNMETERED: Final[Meter] = _Unmetered()
"""For tests and checks: every call may be made."""


@dataclass(frozen=True, slots=True)
class Definition:
    """What the provider's own definition fixes for every execution of a job."""

    parallelism: int | None = None
    """Tasks of one execution that the provider runs at once, at most; None: as many as it can."""

    max_timeout: timedelta | None = None
    """The longest time that a task may be given; None: no bound is known."""


@dataclass(frozen=True, slots=True)
class Remark:
    """Something about a job that `dispatcher check` tells."""

    level: Literal["ok", "warn", "fail"]
    text: str
    todo: str | None = None
    """What to do about it."""


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between a definition as it is at the provider and as it is wanted."""

    path: str
    """Where, such as `containers.main.image`."""

    old: Any
    new: Any


@dataclass(frozen=True, slots=True)
class TaskInput:
    """One task of an execution: the place of one chunk in it."""

    index: int
    """The task index, from 0."""

    chunk_index: int
    attempt: int
    """The attempt's number, from 1."""

    items: str
    """The chunk's items: one JSON array, as text."""

    args: tuple[str, ...] = ()
    """`args` of the job with its templates filled for this chunk."""

    env: Mapping[str, str] = field(default_factory=dict)
    """`env` of the job with its templates filled. The backend adds the `DISPATCH_*` variables."""

    result_uri: str | None = field(default=None, repr=False)
    """A signed URL, and a secret: where this task alone may write its receipt. None where the
    execution has a prefix for all of them."""

    progress_uri: str | None = field(default=None, repr=False)
    """The same for what is done so far."""


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """All that a backend needs to start one execution.

    The same rows give the same request, to the byte: a launch may be repeated, and may be made by
    another worker than the one that meant it.
    """

    key: str
    """Names the execution for ever: lower-case letters, digits and '-', a letter first, ≤ 50."""

    instance: str
    """Names the installation, so that two of them can share a place: [a-z0-9], ≤ 20."""

    batch_id: str
    job: str
    command: tuple[str, ...]
    tasks: tuple[TaskInput, ...]
    options: BaseModel
    """The job's `options`, as an instance of the backend's `Options`."""

    timeout: timedelta
    """A task that runs longer is to be stopped and reported as timed_out."""

    parallelism: int
    """Tasks that may run at once, at most."""

    intended_at: datetime | None = None
    """When it was meant, by the database's clock: nothing of it is older at the provider."""

    input_uri: str | None = None
    """Where the input document lies, if there is one: one JSON line a task, in their order."""

    result_uri: str | None = None
    """The prefix, ending in "/", under which each task may write `<task index>.json`; None where no
    storage is configured, or where each task has a URL of its own."""

    claim_uri: str | None = None
    """What the first task to start creates, so that a double of this execution does nothing; None
    where a key cannot be launched twice, no storage is configured, or the tasks have signed URLs:
    with those a claim cannot be written *and* read."""

    wrapped: bool = False
    """The image's entry wrapper takes each task's args and env from the input document."""

    clear_args: bool = False
    """The tasks, which have no args, run without those of the target's own definition too."""

    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Launched:
    """An execution that exists at the provider."""

    handle: Handle
    key: str
    console_url: str | None = None
    logs_url: str | None = None


class Phase(StrEnum):
    """What the provider says of an execution as a whole."""

    PENDING = "pending"
    """Accepted; no task has started."""

    RUNNING = "running"
    """At least one task has started and not every task has ended."""

    ENDED = "ended"
    """Every task has ended and is in the report: nothing of it runs any more."""

    ABSENT = "absent"
    """A look-up by name says that there is no such thing; never because a list lagged."""


@dataclass(frozen=True, slots=True)
class TaskReport:
    """How one task ended."""

    index: int
    outcome: Outcome
    exit_code: int | None = None
    reason: str | None = None
    """One sentence for people, in the provider's words where it has any."""

    started_at: datetime | None = None
    ended_at: datetime | None = None
    result_uri: str | None = None
    """Where its result lies, if it wrote one to DISPATCH_RESULT_URI."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the backend says of an execution now."""

    phase: Phase
    started_at: datetime | None = None
    """When its first task started; None while none has, or where the provider does not say."""

    tasks: tuple[TaskReport, ...] = ()
    """Every task that has ended so far, the ones reported before included."""

    more_in: timedelta | None = None
    """Where more tasks are known to have ended than are told of here: when a look can tell more."""


class Backend(Protocol):
    """One configured place: a target. Made by `Backend(name, settings, meter)`; cheap to make.

    A backend may keep a client open, but nothing that matters: any process can make another one and
    go on with the same handles.
    """

    Options: ClassVar[type[BaseModel]]
    """What a job may set in `options` for this backend; unknown keys are refused at load."""

    Settings: ClassVar[type[BaseModel]]
    """What a target of this backend may set in the configuration file."""

    DEFAULTS: ClassVar[Mapping[str, Any]]
    """Limits of a target where its configuration says nothing, such as `launches_per_minute`."""

    COMMAND: ClassVar[Literal["required", "refused"]]
    """Whether a job must say which program runs, or must not: where the definition says it."""

    @property
    def limits(self) -> BackendLimits:
        """The numbers that the planner and the engine rely on."""
        ...

    def home(self) -> Mapping[str, str] | None:
        """Name the only machine from which this target can be reached, or None if any will do.

        A worker serves a target with a home only if its own is the same.
        """
        ...

    def definition(self, options: BaseModel) -> Definition:
        """Read what the provider's own definition fixes; asked anew every few minutes.

        Raises:
            Rejected: there is no such definition, or it may not be read.
            Unavailable: ask again later.
        """
        ...

    def check(self, job: Job, options: BaseModel) -> Sequence[Remark]:
        """Say what would keep a job from running here, and what else its owner should know.

        Nothing is started by it, and nothing is changed.

        Raises:
            Unavailable: it cannot be said now.
        """
        ...

    def launch(self, request: LaunchRequest) -> Launched:
        """Start the execution, or adopt the one that has this key already.

        Raises:
            Rejected: nothing was started and never will be by this request.
            Unavailable: see there.
        """
        ...

    def find(self, request: LaunchRequest) -> Launched | None:
        """Look the execution up by its key; None if there is none now.

        Raises:
            Unavailable: it cannot be said now.
        """
        ...

    def poll(self, handles: Sequence[Handle]) -> Mapping[Handle, Report]:
        """Report on a page of executions. One that is left out cannot be told of (yet).

        Raises:
            Unavailable: nothing can be said now. Never an outcome.
        """
        ...

    def winner(self, handle: Handle, name: str) -> Handle:
        """Give the handle of the execution that a claim names, beside that of its double.

        The name is what `dispatcher.container` writes: the platform's own for the execution.
        """
        ...

    def cancel(self, handle: Handle) -> None:
        """Ask for the end of an execution. May be repeated, may be late, may be for one unknown.

        Raises:
            Unavailable: ask again later.
        """
        ...

    def strays(self, instance: str, since: datetime) -> Iterable[Launched]:
        """List what runs there now for an installation and was started since then."""
        ...

    def logs(self, handle: Handle, task_index: int, tail: int) -> Iterator[str]:
        """Yield the last `tail` lines that a task wrote, oldest first, without line ends."""
        ...

    def clean(self, now: datetime) -> int:
        """Remove what finished executions have left there and nobody needs any more.

        Returns how many were removed; 0 where the provider does that by itself.

        Raises:
            Unavailable: ask again later.
        """
        ...


class Recorded(NamedTuple):
    """What is recorded of a key."""

    ended: bool
    """How it ended is written down, so that nobody will ask for it again."""

    calls: int
    """Launch calls; with a second one the first might still be on its way."""


@runtime_checkable
class Crowded(Protocol):
    """A backend whose executions leave something there that has few places."""

    def make_room(
        self, now: datetime, recorded: Callable[[Sequence[str]], Mapping[str, Recorded]]
    ) -> int:
        """Remove what finished executions have left, the sooner the fewer places there are.

        Called every few seconds, so it makes no call where there is nothing to remove. `recorded`
        tells what is recorded of keys, those that it knows: what a live one has left is still to
        be read, also after an outage of all workers.

        Returns how many were removed.

        Raises:
            Unavailable: ask again later.
        """
        ...


@runtime_checkable
class Definable(Protocol):
    """A backend that can also write the definition which a job names: `dispatcher apply`."""

    def wanted(self, options: BaseModel) -> tuple[str, BaseModel] | None:
        """Name the definition at the provider, and what the job wants it to be; None if nothing.

        Nobody is asked. Jobs that share a name must want the same.
        """
        ...

    def changes(self, job: Job, options: BaseModel) -> Sequence[Change] | None:
        """Compare the job's `definition` with what is there; None if the job has none.

        A definition that does not exist yet is compared with nothing.

        Raises:
            Rejected: it may not be read, or is refused.
            Unavailable: ask again later.
        """
        ...

    def apply(self, job: Job, options: BaseModel) -> str:
        """Create or update the definition; returns its name at the provider.

        Raises:
            Rejected: the provider refuses it.
            Unavailable: ask again later.
        """
        ...


@runtime_checkable
class KeepsResults(Protocol):
    """A backend with which tasks leave their results: where `limits.own_results` says so."""

    def result_uri(self, handle: Handle, task_index: int) -> str:
        """Name where a task is told to write its result; nobody looks if it has.

        Beside it is what it says while it runs.
        """
        ...
