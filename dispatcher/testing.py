"""What one needs to test against backends: a provider in memory, and the suite all backends pass.

`NullBackend` launches nothing: a `NullWorld` remembers what it was asked for, and each task ends as
a script says, when the clock says. It serves simulations, benches, and tests of one's own jobs.
`BackendContract` is a class of pytest tests to derive from, with a fixture and one hook. Nothing
here imports pytest before a test runs.
"""
# The tests of the contract speak by assert, and their names are their sentences:
# ruff: noqa: S101, D102

from __future__ import annotations

import heapq
import math
import random
import threading
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, ClassVar, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from dispatcher.backends.base import (
    UNMETERED,
    Backend,
    BackendLimits,
    Definition,
    Handle,
    Launched,
    LaunchRequest,
    Meter,
    Phase,
    Rejected,
    Remark,
    Report,
    TaskInput,
    TaskReport,
    Unavailable,
)
from dispatcher.durations import Duration
from dispatcher.job import Job
from dispatcher.states import Outcome

__all__ = [
    "BackendContract",
    "Behaviour",
    "Ending",
    "Fault",
    "NullBackend",
    "NullOptions",
    "NullSettings",
    "NullWorld",
    "Script",
]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a scripted task goes, and how it ends."""

    outcome: Outcome = Outcome.SUCCEEDED
    exit_code: int | None = None
    """None: 0 if it succeeded, 1 if it failed, else nothing."""

    seconds: float = 0.0
    """How long it runs; `math.inf` is allowed."""

    start_seconds: float = 0.0
    """How long the provider takes before it starts it."""

    reason: str | None = None
    result_uri: str | None = None
    output: tuple[str, ...] = ()
    """The lines that `logs` gives."""


Script: TypeAlias = Callable[[str, int, int], Ending]
"""Says how a task goes, from its batch's id, its chunk's index and its attempt's number."""


class Fault(StrEnum):
    """What can go wrong with one call."""

    UNAVAILABLE = "unavailable"
    """The call does not reach the provider."""

    REPLY_LOST = "reply_lost"
    """The provider does what was asked, and the caller is told `Unavailable`."""

    THROTTLED = "throttled"
    """The provider clearly refuses for now: `Unavailable` with `not_started`."""

    REJECTED = "rejected"
    """The provider refuses for ever."""


class NullSettings(BaseModel):
    """What a target with `backend: "null"` may set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tasks: int = Field(default=10_000, ge=1, description="chunks that one execution can hold")
    page_size: int = Field(default=100, ge=1, description="executions that one poll answers for")
    call_seconds: float = Field(default=0.0, ge=0, description="seconds that each call takes")
    task_seconds: tuple[float, float] = Field(
        default=(0.0, 0.0),
        description="least and most seconds of a task that no script speaks of; drawn from its key",
    )
    relaunch_safe: bool = Field(
        default=True, description="false: a second launch with a key starts a second execution"
    )
    per_task_env: bool = Field(
        default=True, description="false: the tasks of an execution cannot differ in args and env"
    )
    find_grace: Duration = Field(
        default=timedelta(0), description="how long `find` may miss what a launch has started"
    )
    absent_grace: Duration = Field(
        default=timedelta(0), description="how long an execution is absent before it is lost"
    )
    inline_bytes: int = Field(
        default=64 * 1024 * 1024, ge=1, description="bytes of input that a launch call can carry"
    )
    parallelism: int | None = Field(
        default=None, ge=1, description="tasks that run at once, as a remote definition would fix"
    )


class NullOptions(BaseModel):
    """What a job may set in `options` for a null target."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tasks: int = Field(default=1, ge=1, description="chunks packed in one execution")
    parallelism: int = Field(default=1, ge=1, description="tasks of an execution that run at once")
    wrapped: bool = Field(
        default=False, description="an entry wrapper takes args and env from the input document"
    )
    signed_urls: bool = Field(
        default=False, description="the input document is given as a signed URL"
    )


@dataclass(slots=True)
class _Run:
    """One task in the world; times are seconds since 1970, and infinite while it has no end."""

    task: TaskInput
    ending: Ending
    start: float
    end: float

    def report(self) -> TaskReport:
        """Say how it ended."""
        ending = self.ending
        code = ending.exit_code
        if code is None:
            code = {Outcome.SUCCEEDED: 0, Outcome.FAILED: 1}.get(ending.outcome)
        has_started = self.start < self.end or ending.outcome in (Outcome.SUCCEEDED, Outcome.FAILED)
        return TaskReport(
            self.task.index,
            ending.outcome,
            exit_code=code,
            reason=ending.reason,
            started_at=_moment(self.start) if has_started else None,
            ended_at=_moment(self.end),
            result_uri=ending.result_uri,
        )


class _Execution:
    """One execution in the world, with a report that is made again only when something is due."""

    __slots__ = ("_due", "_report", "handle", "launched", "request", "runs")

    def __init__(
        self, handle: Handle, request: LaunchRequest, launched: float, runs: list[_Run]
    ) -> None:
        self.handle = handle
        self.request = request
        self.launched = launched
        self.runs = runs
        self._report = Report(Phase.PENDING)
        self._due = -math.inf

    def report(self, now: float) -> Report:
        if now >= self._due:
            self._renew(now)
        return self._report

    def stop(self, now: float, chosen: Callable[[_Run], bool], ending: Ending) -> None:
        """End the chosen tasks that have not ended yet."""
        for run in self.runs:
            if run.end > now and chosen(run):
                run.start = min(run.start, now)
                run.end = now
                run.ending = ending
        self._due = -math.inf

    def _renew(self, now: float) -> None:
        ended = tuple(run.report() for run in self.runs if run.end <= now)
        start = min(run.start for run in self.runs)
        if len(ended) == len(self.runs):
            phase = Phase.ENDED
        else:
            phase = Phase.RUNNING if start <= now else Phase.PENDING
        self._report = Report(phase, _moment(start) if start <= now else None, ended)
        moments = (moment for run in self.runs for moment in (run.start, run.end) if moment > now)
        self._due = min(moments, default=math.inf)


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class NullWorld:
    """The provider behind null targets of one name: scripted, counting, safe among threads.

    All engines and workers of a process that use a target of this name see the same world. Set the
    public attributes at any time.
    """

    _worlds: ClassVar[dict[str, NullWorld]] = {}
    _worlds_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self,
        *,
        clock: Callable[[], datetime] = _utc_now,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.clock = clock
        self.sleep = sleep
        self.script: Script | None = None
        self.enforces_timeout = True
        """False: a task runs past its timeout, as where a provider does not stop it."""

        self.find_lag = timedelta(0)
        """How long after its launch `find` and `strays` do not see an execution yet."""

        self.calls: Counter[str] = Counter()
        """Calls so far, by verb."""

        self.runs: Counter[tuple[str, int, int]] = Counter()
        """How often (batch id, chunk index, attempt) was started. More than 1 is one too many."""

        self._lock = threading.Lock()
        self._faults: defaultdict[str, deque[tuple[Fault, timedelta | None]]] = defaultdict(deque)
        self._executions: dict[Handle, _Execution] = {}
        self._by_key: defaultdict[str, list[_Execution]] = defaultdict(list)

    @classmethod
    def named(cls, name: str) -> NullWorld:
        """Return the world of the null targets of this name, made when first asked for."""
        with cls._worlds_lock:
            return cls._worlds.setdefault(name, cls())

    @classmethod
    def forget(cls, name: str) -> None:
        """Make the next `named` begin anew; for between tests."""
        with cls._worlds_lock:
            cls._worlds.pop(name, None)

    # --- for those who script it -----------------------------------------------------------------

    def fail_next(
        self, verb: str, fault: Fault, *, times: int = 1, retry_after: timedelta | None = None
    ) -> None:
        """Let the next calls of a verb go wrong; faults of one verb come in the order given."""
        with self._lock:
            self._faults[verb].extend([(fault, retry_after)] * times)

    def vanish(self, handle: Handle) -> None:
        """Forget an execution with all that runs of it, as if someone had deleted it."""
        with self._lock:
            execution = self._executions.pop(handle)
            execution.stop(self._now(), _any_run, Ending(Outcome.LOST))

    def kill(
        self,
        handle: Handle,
        index: int,
        outcome: Outcome = Outcome.PREEMPTED,
        reason: str | None = None,
    ) -> None:
        """End one task now, if it has not ended by itself."""
        with self._lock:
            self._executions[handle].stop(
                self._now(), lambda run: run.task.index == index, Ending(outcome, reason=reason)
            )

    def handles(self, key: str | None = None) -> list[Handle]:
        """List the executions that ever were, in the order of their launch; or those of a key."""
        with self._lock:
            if key is not None:
                return [execution.handle for execution in self._by_key.get(key, ())]
            return [e.handle for executions in self._by_key.values() for e in executions]

    def requests(self) -> list[LaunchRequest]:
        """List what was launched, in order."""
        with self._lock:
            return [e.request for executions in self._by_key.values() for e in executions]

    def doubles(self) -> list[tuple[str, int, int]]:
        """List each (batch id, chunk index, attempt) that was started more than once."""
        with self._lock:
            return [run for run, times in self.runs.items() if times > 1]

    def running(self) -> int:
        """Count the tasks that run now."""
        with self._lock:
            now = self._now()
            return sum(run.start <= now < run.end for run in self._all_runs())

    def peak_running(self) -> int:
        """Say how many tasks ran at one time, at most, so far."""
        with self._lock:
            now = self._now()
            moves = sorted(
                (moment, step)
                for run in self._all_runs()
                for moment, step in ((run.start, 1), (run.end, -1))
                if moment <= now and run.start < run.end
            )
        peak = count = 0
        for _, step in moves:
            count += step
            peak = max(peak, count)
        return peak

    # --- for the backend --------------------------------------------------------------------------

    def launch(self, request: LaunchRequest, settings: NullSettings) -> Handle:
        """Start an execution, or adopt the one of this key where the settings allow that."""
        with self._call("launch", settings):
            known = self._by_key[request.key]
            live = [execution for execution in known if execution.handle in self._executions]
            if live and settings.relaunch_safe:
                return live[0].handle
            handle = f"{request.key}.{len(known) + 1}"
            now = self._now()
            execution = _Execution(handle, request, now, self._plan(request, settings, now))
            known.append(execution)
            self._executions[handle] = execution
            self.runs.update(
                (request.batch_id, task.chunk_index, task.attempt) for task in request.tasks
            )
            return handle

    def find(self, key: str, settings: NullSettings) -> Handle | None:
        """Look for the first execution of a key."""
        with self._call("find", settings):
            visible = self._now() - self.find_lag.total_seconds()
            for execution in self._by_key.get(key, ()):
                if execution.handle in self._executions and execution.launched <= visible:
                    return execution.handle
            return None

    def poll(self, handles: Sequence[Handle], settings: NullSettings) -> dict[Handle, Report]:
        """Report on executions."""
        with self._call("poll", settings):
            now = self._now()
            known = self._executions
            return {
                handle: known[handle].report(now) if handle in known else _ABSENT
                for handle in handles
            }

    def cancel(self, handle: Handle, settings: NullSettings) -> None:
        """End what has not ended of an execution."""
        with self._call("cancel", settings):
            execution = self._executions.get(handle)
            if execution is not None:
                ending = Ending(Outcome.CANCELLED, reason="cancelled")
                execution.stop(self._now(), _any_run, ending)

    def strays(
        self, instance: str, since: datetime, settings: NullSettings
    ) -> list[tuple[Handle, str]]:
        """List handle and key of what has not ended and was launched since then."""
        with self._call("strays", settings):
            now = self._now()
            visible = now - self.find_lag.total_seconds()
            return [
                (execution.handle, execution.request.key)
                for execution in self._executions.values()
                if execution.request.instance == instance
                and since.timestamp() <= execution.launched <= visible
                and execution.report(now).phase is not Phase.ENDED
            ]

    def logs(
        self, handle: Handle, task_index: int, tail: int, settings: NullSettings
    ) -> Sequence[str]:
        """Return the last lines that the script gives a task."""
        with self._call("logs", settings):
            execution = self._executions.get(handle)
            for run in execution.runs if execution is not None and tail > 0 else ():
                if run.task.index == task_index and run.start <= self._now():
                    return run.ending.output[-tail:]
            return ()

    def _call(self, verb: str, settings: NullSettings) -> _Call:
        if settings.call_seconds:
            self.sleep(settings.call_seconds)
        return _Call(self, verb)

    def _now(self) -> float:
        return self.clock().timestamp()

    def _all_runs(self) -> Iterator[_Run]:
        for executions in self._by_key.values():
            for execution in executions:
                yield from execution.runs

    def _plan(self, request: LaunchRequest, settings: NullSettings, now: float) -> list[_Run]:
        """Lay the tasks out in time, at most `parallelism` at once."""
        slots = [now] * min(request.parallelism, len(request.tasks))
        runs = []
        for task in request.tasks:
            if self.script is not None:
                ending = self.script(request.batch_id, task.chunk_index, task.attempt)
            else:
                ending = Ending(seconds=_drawn(request.key, task.index, settings.task_seconds))
            start = heapq.heappop(slots) + ending.start_seconds
            end = start + ending.seconds
            limit = request.timeout.total_seconds()
            if self.enforces_timeout and ending.seconds > limit:
                end = start + limit
                reason = f"ran longer than its timeout of {limit:g} s"
                ending = replace(ending, outcome=Outcome.TIMED_OUT, exit_code=None, reason=reason)
            heapq.heappush(slots, end)
            runs.append(_Run(task, ending, start, end))
        return runs


class _Call:
    """One call into a world: counts it, holds the world's lock, and lets it go wrong if told to."""

    __slots__ = ("_fault", "_verb", "_world")

    def __init__(self, world: NullWorld, verb: str) -> None:
        self._world = world
        self._verb = verb
        self._fault: tuple[Fault, timedelta | None] | None = None

    def __enter__(self) -> None:
        world = self._world
        world._lock.acquire()  # noqa: SLF001 -- a part of the world, apart only in form
        world.calls[self._verb] += 1
        faults = world._faults.get(self._verb)  # noqa: SLF001 -- as above
        self._fault = faults.popleft() if faults else None
        if self._fault is not None and self._fault[0] is not Fault.REPLY_LOST:
            world._lock.release()  # noqa: SLF001 -- as above
            self._raise(*self._fault)

    def __exit__(self, *exc: object) -> None:
        self._world._lock.release()  # noqa: SLF001 -- as above
        if self._fault is not None and exc[0] is None:
            self._raise(*self._fault)

    def _raise(self, fault: Fault, retry_after: timedelta | None) -> None:
        text = f"scripted fault of {self._verb}: {fault}"
        if fault is Fault.REJECTED:
            raise Rejected(text)
        is_throttled = fault is Fault.THROTTLED
        raise Unavailable(text, not_started=is_throttled, retry_after=retry_after)


_ABSENT: Final = Report(Phase.ABSENT)


def _any_run(_run: _Run) -> bool:
    return True


def _drawn(key: str, index: int, bounds: tuple[float, float]) -> float:
    least, most = bounds
    if least == most:
        return least
    return random.Random(f"{key}/{index}").uniform(least, most)  # noqa: S311 -- no secret


class NullBackend:
    """A backend that runs nothing: see `NullWorld`, which is found by the target's name."""

    Options: ClassVar[type[BaseModel]] = NullOptions
    Settings: ClassVar[type[BaseModel]] = NullSettings
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    COMMAND: ClassVar[Literal["required", "refused"]] = "required"

    def __init__(self, name: str, settings: BaseModel, _meter: Meter = UNMETERED) -> None:
        if not isinstance(settings, NullSettings):
            raise TypeError(f"target {name!r}: settings are {settings!r}, not NullSettings")
        self.name = name
        self.settings = settings
        self.world = NullWorld.named(name)
        self._limits = BackendLimits(
            max_tasks=settings.max_tasks,
            max_payload_bytes=64 * 1024 * 1024,
            inline_bytes=settings.inline_bytes,
            max_text_bytes=64 * 1024 * 1024,
            call_timeout=timedelta(seconds=10),
            find_grace=settings.find_grace,
            absent_grace=settings.absent_grace,
            page_size=settings.page_size,
            poll_interval=timedelta(0),
            relaunch_safe=settings.relaunch_safe,
            own_results=False,
            per_task_env=settings.per_task_env,
        )

    @property
    def limits(self) -> BackendLimits:
        """The numbers that the planner and the engine rely on."""
        return self._limits

    def home(self) -> None:
        """Any worker of the process will do."""
        return

    def definition(self, _options: BaseModel) -> Definition:
        """Fix what the target's settings say."""
        return Definition(parallelism=self.settings.parallelism)

    def check(self, _job: Job, _options: BaseModel) -> Sequence[Remark]:
        """Find nothing wrong: nothing is run."""
        return ()

    def launch(self, request: LaunchRequest) -> Launched:
        """Start the scripted execution.

        Raises:
            Rejected: a fault says so.
            Unavailable: a fault says so.
        """
        return Launched(handle=self.world.launch(request, self.settings), key=request.key)

    def find(self, request: LaunchRequest) -> Launched | None:
        """Look for the first execution of the key.

        Raises:
            Unavailable: a fault says so.
        """
        handle = self.world.find(request.key, self.settings)
        return None if handle is None else Launched(handle=handle, key=request.key)

    def poll(self, handles: Sequence[Handle]) -> Mapping[Handle, Report]:
        """Report on a page of executions.

        Raises:
            Unavailable: a fault says so.
        """
        return self.world.poll(handles, self.settings)

    def winner(self, _handle: Handle, name: str) -> Handle:
        """Give the handle that a claim of the tests names."""
        return name

    def cancel(self, handle: Handle) -> None:
        """End what has not ended.

        Raises:
            Unavailable: a fault says so.
        """
        self.world.cancel(handle, self.settings)

    def strays(self, instance: str, since: datetime) -> Iterable[Launched]:
        """List what has not ended of an installation and was launched since then.

        Raises:
            Unavailable: a fault says so.
        """
        found = self.world.strays(instance, since, self.settings)
        return [Launched(handle=handle, key=key) for handle, key in found]

    def logs(self, handle: Handle, task_index: int, tail: int) -> Iterator[str]:
        """Yield the last lines that the script gives the task.

        Raises:
            Unavailable: a fault says so.
        """
        yield from self.world.logs(handle, task_index, tail, self.settings)

    def clean(self, _now: datetime) -> int:
        """Keep everything: memory ends with the process."""
        return 0


# --- the contract ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a task of the contract does: print the lines, wait, exit."""

    exit_code: int = 0
    seconds: float = 0.0
    lines: tuple[str, ...] = ()


class BackendContract:
    """What every backend does, as tests. Derive from it, give a `backend` fixture and `request`.

        class TestMine(BackendContract):
            @pytest.fixture
            def backend(self): return MyBackend("mine", MySettings(...))

            def request(self, key, tasks, timeout=timedelta(minutes=5)): return LaunchRequest(...)

    A real provider is slow: raise `patience`, and let `step` wait for longer.
    """

    patience: ClassVar[timedelta] = timedelta(seconds=60)
    """How long a test waits for what must come."""

    LONG: ClassVar[float] = 600.0
    """Seconds of a task that is still running when the test is over with it."""

    def request(
        self,
        key: str,
        tasks: Sequence[Behaviour],
        timeout: timedelta = timedelta(minutes=5),
    ) -> LaunchRequest:
        """Ask for tasks that behave like this, all at once, in one execution."""
        raise NotImplementedError(f"{type(self).__name__}.request says how tasks are asked for")

    def runs(self, _key: str) -> int | None:
        """Say how often the first task of this key was really started; None: cannot be told."""
        return None

    def step(self) -> None:
        """Let a little time pass."""
        time.sleep(0.02)

    def unknown(self, handle: Handle) -> Handle:
        """Make a handle of this form that names nothing; a handle need not hold its key."""
        return handle.replace("contract-", "contract-no", 1)

    # --- what the tests are made of ---------------------------------------------------------------

    def new_key(self) -> str:
        """Make a key that no other test uses."""
        return f"contract-{uuid.uuid4().hex[:20]}"

    def until(self, probe: Callable[[], Any], what: str) -> Any:
        """Wait until the probe gives something true, and return that."""
        end = time.monotonic() + self.patience.total_seconds()
        while True:
            value = probe()
            if value:
                return value
            assert time.monotonic() < end, f"not within {self.patience}: {what}"
            self.step()

    def ended(self, backend: Backend, handle: Handle) -> Report:
        """Wait for the end of an execution, and check that the report is whole."""

        def probe() -> Report | None:
            report = backend.poll([handle]).get(handle)
            return report if report is not None and report.phase is Phase.ENDED else None

        report: Report = self.until(probe, f"{handle} ended")
        return report

    def started(self, backend: Backend, handle: Handle, ends: int = 0) -> Report:
        """Wait until an execution runs and so many of its tasks have ended."""

        def probe() -> Report | None:
            report = backend.poll([handle]).get(handle)
            assert report is None or report.phase is not Phase.ENDED, f"ended early: {report}"
            is_there = report and report.phase is Phase.RUNNING and len(report.tasks) >= ends
            return report if is_there else None

        report: Report = self.until(probe, f"{handle} runs, {ends} of its tasks ended")
        return report

    # --- the tests --------------------------------------------------------------------------------

    def test_a_launched_execution_ends_with_its_outcome(self, backend: Backend) -> None:
        key = self.new_key()
        launched = backend.launch(self.request(key, [Behaviour()]))
        assert launched.key == key
        report = self.ended(backend, launched.handle)
        (task,) = report.tasks
        assert (task.index, task.outcome, task.exit_code) == (0, Outcome.SUCCEEDED, 0)
        for moment in (report.started_at, task.started_at, task.ended_at):
            assert moment is None or moment.tzinfo is not None, "times carry their zone"

    def test_an_exit_code_is_reported(self, backend: Backend) -> None:
        launched = backend.launch(self.request(self.new_key(), [Behaviour(exit_code=65)]))
        (task,) = self.ended(backend, launched.handle).tasks
        assert (task.outcome, task.exit_code) == (Outcome.FAILED, 65)

    def test_an_end_is_reported_again_and_again(self, backend: Backend) -> None:
        launched = backend.launch(self.request(self.new_key(), [Behaviour()]))
        report = self.ended(backend, launched.handle)
        assert backend.poll([launched.handle])[launched.handle] == report

    def test_the_same_key_is_launched_once(self, backend: Backend) -> None:
        if not backend.limits.relaunch_safe:
            import pytest  # noqa: PLC0415 -- nobody needs pytest to import this module

            pytest.skip("this backend cannot tell a key that it has seen")
        key = self.new_key()
        request = self.request(key, [Behaviour(seconds=0.2)])
        first = backend.launch(request)
        assert backend.launch(request).handle == first.handle
        self.ended(backend, first.handle)
        assert backend.launch(request).handle == first.handle, "nor again after its end"
        assert self.runs(key) in (1, None)

    def test_an_execution_is_found_by_its_key(self, backend: Backend) -> None:
        request = self.request(self.new_key(), [Behaviour()])
        assert backend.find(request) is None
        launched = backend.launch(request)
        found = self.until(lambda: backend.find(request), "found by its key")
        assert (found.handle, found.key) == (launched.handle, request.key)
        self.ended(backend, launched.handle)
        assert backend.find(request) is not None, "also after its end"

    def test_tasks_are_reported_as_each_ends(self, backend: Backend) -> None:
        if backend.limits.max_tasks < 3:  # noqa: PLR2004 -- the three below
            import pytest  # noqa: PLC0415 -- as above

            pytest.skip("this backend runs one task per execution")
        behaviours = [Behaviour(), Behaviour(exit_code=3), Behaviour(seconds=self.LONG)]
        launched = backend.launch(self.request(self.new_key(), behaviours))
        early = self.started(backend, launched.handle, ends=2)
        assert {(t.index, t.outcome, t.exit_code) for t in early.tasks} == {
            (0, Outcome.SUCCEEDED, 0),
            (1, Outcome.FAILED, 3),
        }
        backend.cancel(launched.handle)
        outcomes = {t.index: t.outcome for t in self.ended(backend, launched.handle).tasks}
        assert outcomes == {0: Outcome.SUCCEEDED, 1: Outcome.FAILED, 2: Outcome.CANCELLED}

    def test_what_is_cancelled_ends_as_cancelled(self, backend: Backend) -> None:
        launched = backend.launch(self.request(self.new_key(), [Behaviour(seconds=self.LONG)]))
        self.started(backend, launched.handle)
        backend.cancel(launched.handle)
        backend.cancel(launched.handle)
        (task,) = self.ended(backend, launched.handle).tasks
        assert task.outcome is Outcome.CANCELLED

    def test_a_cancel_right_after_the_launch_counts(self, backend: Backend) -> None:
        launched = backend.launch(self.request(self.new_key(), [Behaviour(seconds=self.LONG)]))
        backend.cancel(launched.handle)
        (task,) = self.ended(backend, launched.handle).tasks
        assert task.outcome is Outcome.CANCELLED

    def test_a_late_cancel_changes_nothing(self, backend: Backend) -> None:
        launched = backend.launch(self.request(self.new_key(), [Behaviour()]))
        report = self.ended(backend, launched.handle)
        backend.cancel(launched.handle)
        assert backend.poll([launched.handle])[launched.handle] == report

    def test_the_unknown_is_absent_and_harmless(self, backend: Backend) -> None:
        launched = backend.launch(self.request(self.new_key(), [Behaviour()]))
        self.ended(backend, launched.handle)
        unknown = self.unknown(launched.handle)
        assert unknown != launched.handle, "else it is known"
        for handle in (unknown, "", "../../..", "a\0b", "Ä" * 5000):
            backend.cancel(handle)
            report = backend.poll([handle]).get(handle)
            assert report is None or report.phase is Phase.ABSENT, handle
            assert list(backend.logs(handle, 0, 10)) == []

    def test_one_poll_answers_for_a_page(self, backend: Backend) -> None:
        ended = backend.launch(self.request(self.new_key(), [Behaviour()])).handle
        running = backend.launch(self.request(self.new_key(), [Behaviour(seconds=self.LONG)]))
        self.ended(backend, ended)
        self.started(backend, running.handle)
        unknown = self.new_key()
        reports = backend.poll([unknown, running.handle, ended])
        assert reports[ended].phase is Phase.ENDED
        assert reports[running.handle].phase is Phase.RUNNING
        assert unknown not in reports or reports[unknown].phase is Phase.ABSENT
        assert not backend.poll([])
        backend.cancel(running.handle)
        self.ended(backend, running.handle)

    def test_a_task_that_runs_too_long_times_out(self, backend: Backend) -> None:
        request = self.request(
            self.new_key(), [Behaviour(seconds=self.LONG)], timeout=timedelta(seconds=1)
        )
        launched = backend.launch(request)
        (task,) = self.ended(backend, launched.handle).tasks
        assert task.outcome is Outcome.TIMED_OUT

    def test_the_last_lines_are_shown(self, backend: Backend) -> None:
        lines = tuple(f"line {number}" for number in range(20))
        launched = backend.launch(self.request(self.new_key(), [Behaviour(lines=lines)]))
        self.ended(backend, launched.handle)
        self.until(lambda: list(backend.logs(launched.handle, 0, 3)), "there is output")
        assert tuple(backend.logs(launched.handle, 0, 3)) == lines[-3:]
        assert tuple(backend.logs(launched.handle, 0, 500)) == lines
        assert list(backend.logs(launched.handle, 0, 0)) == []

    def test_what_runs_is_among_the_strays(self, backend: Backend) -> None:
        hour = timedelta(hours=1)
        request = self.request(self.new_key(), [Behaviour(seconds=self.LONG)])
        launched = backend.launch(request)
        running = self.started(backend, launched.handle)
        since = (running.started_at or _utc_now()) - hour

        def strays(instance: str, since: datetime) -> set[Handle]:
            return {stray.handle for stray in backend.strays(instance, since)}

        self.until(lambda: launched.handle in strays(request.instance, since), "it is listed")
        assert launched.handle not in strays(request.instance, since + 2 * hour), "it is older"
        assert launched.handle not in strays("another", since), "it is not theirs"
        backend.cancel(launched.handle)
        self.ended(backend, launched.handle)
        self.until(lambda: launched.handle not in strays(request.instance, since), "it is gone")

    def test_another_instance_goes_on_with_the_same_handles(self, backend: Backend) -> None:
        launched = backend.launch(self.request(self.new_key(), [Behaviour(seconds=self.LONG)]))
        other = self.twin(backend)
        self.started(other, launched.handle)
        other.cancel(launched.handle)
        # Nothing more of how it ended: who looks later may be told more.
        for each in (backend, other):
            (task,) = self.ended(each, launched.handle).tasks
            assert task.outcome is Outcome.CANCELLED

    def twin(self, backend: Backend) -> Backend:
        """Make a second backend of the same target, as another worker would."""
        made: Any = type(backend)
        known: Any = backend
        twin: Backend = made(known.name, known.settings)
        return twin
