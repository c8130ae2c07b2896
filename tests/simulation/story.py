"""A story: processes that take steps on one database and one provider, at a time that it tells.

Everything is real but the provider and the time: the store on Postgres, the engine, the client. One
thread runs at a time, so a story told twice ends the same. A process can die at any point of a
step, and a step can freeze between any two of its transactions and calls and go on much later; a
point is: a transaction begins, is about to commit, has committed; a call is about to be made, has
been answered.

What must hold after each step is in `truths.py`. `test_simulation.py` lets Hypothesis write
stories; `test_regressions.py` keeps those that once went wrong.
"""

from __future__ import annotations

import itertools
import math
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Final, Literal
from unittest import mock

import psycopg
import sqlalchemy as sa
from pydantic import BaseModel

from dispatcher import schema
from dispatcher.backends.base import (
    Backend,
    BackendLimits,
    Definition,
    Handle,
    Launched,
    LaunchRequest,
    Remark,
    Report,
)
from dispatcher.client import Dispatcher
from dispatcher.config import Config, Target
from dispatcher.engine import Engine
from dispatcher.errors import DispatcherError, IdempotencyConflict, NotAllowed
from dispatcher.explaining import explain
from dispatcher.job import Job
from dispatcher.settings import Settings
from dispatcher.states import Outcome
from dispatcher.store import Store
from dispatcher.testing import Ending, Fault, NullBackend, NullSettings, NullWorld

__all__ = [
    "Advance",
    "At",
    "Cancel",
    "ConsoleCancel",
    "Continue",
    "Database",
    "Enqueue",
    "Explain",
    "Fails",
    "Follow",
    "Launch",
    "Plan",
    "Provider",
    "Retry",
    "Step",
    "Story",
    "Strays",
    "Sweep",
    "TaskEnds",
    "Turn",
    "Vanish",
    "tell",
]

HERE: Final = "sim"
NOW: Final = "(SELECT at FROM sim.clock)"
CALL_TIMEOUT: Final = 10.0
WINDOW: Final = timedelta(seconds=15)
WORKERS: Final = 2

JOBS: Final = {
    one.name: one
    for one in (
        Job.model_validate({"target": HERE, "command": ["x"], **fields})
        for fields in (
            {
                "name": "single",
                "timeout": "60s",
                "start_timeout": "30s",
                "deadline": "10m",
                "retry": {"attempts": 2, "infrastructure_attempts": 2, "initial": "5s"},
            },
            {
                "name": "packed",
                "timeout": "60s",
                "start_timeout": "30s",
                "deadline": "10m",
                "retry": {"attempts": 3, "initial": "5s", "pack_wait": "10s"},
                "success": {"max_failed_chunks": 1},
                "options": {"max_tasks": 3, "parallelism": 2},
                "chunk": {"size": 1},
            },
            {
                "name": "limited",
                "timeout": "60s",
                "start_timeout": "30s",
                "deadline": "5m",
                "priority": 1,
                "retry": {"attempts": 1, "initial": "5s", "exit_codes": {}},
                "limits": {"running": 2, "per_batch": 1},
                "options": {"max_tasks": 2, "parallelism": 2},
            },
            {
                "name": "halved",
                "timeout": "60s",
                "start_timeout": "30s",
                "deadline": "10m",
                "retry": {"attempts": 2, "initial": "5s", "on_failure": "split"},
                "success": {"max_failed_items": 1},
                "options": {"max_tasks": 2, "parallelism": 2},
                "chunk": {"size": 3},
            },
        )
    )
}


# --- the words of a story -------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    """What the provider and the target are like in a story."""

    safe: bool = True
    """A second launch with a key starts nothing."""

    lag: float = 0.0
    """Seconds that a launch stays unseen by `find` and `strays`; within the grace."""

    max_running: int | None = None
    max_executions: int | None = None
    launches_per_minute: float | None = None
    page_size: int = 100
    obeys_timeout: bool = True
    """The provider stops a task at its timeout; if not, we must."""

    absent_grace: float = 2.0
    second_never_starts: bool = False
    """The first attempt at each second chunk hangs before it starts."""

    concurrency: int = 3


@dataclass(frozen=True)
class Step:
    """Something that happens. Numbers choose among what is there, counted round."""


@dataclass(frozen=True)
class At:
    """A point of a step: the so-and-so-many-th of a kind, such as "after a commit"."""

    where: str
    time: int = 1


@dataclass(frozen=True)
class Work(Step):
    """A worker's step, that may die or freeze at a point; not where it does not come by there."""

    worker: int = 0
    die: At | None = None
    freeze: At | None = None


@dataclass(frozen=True)
class Plan(Work):
    """A tap to plan a batch, needed or not."""

    batch: int = 0


@dataclass(frozen=True)
class Launch(Work):
    """A tap to launch."""


@dataclass(frozen=True)
class Follow(Work):
    """A turn of a leaseholder, or of one that takes itself for it."""


@dataclass(frozen=True)
class Sweep(Work):
    """A sweep over all batches; what it finds unplanned is planned."""


@dataclass(frozen=True)
class Strays(Work):
    """A look for what runs and nobody owns."""


@dataclass(frozen=True)
class Turn(Work):
    """Sweep, launch and follow."""


@dataclass(frozen=True)
class Continue(Step):
    """A frozen step goes on."""

    which: int = 0


@dataclass(frozen=True)
class Advance(Step):
    """Time passes, everywhere alike."""

    seconds: float = 1.0


@dataclass(frozen=True)
class Enqueue(Step):
    """An application asks for a batch."""

    job: str = "single"
    items: int = 1
    key: str | None = None
    die: At | None = None


@dataclass(frozen=True)
class Cancel(Step):
    """An operator cancels a batch."""

    batch: int = 0
    die: At | None = None


@dataclass(frozen=True)
class Retry(Step):
    """An operator retries a batch."""

    batch: int = 0
    everything: bool = False
    die: At | None = None


@dataclass(frozen=True)
class Explain(Step):
    """Somebody asks why a batch, and each chunk of it, is where it is."""

    batch: int = 0


@dataclass(frozen=True)
class Fails(Step):
    """The next calls of a verb go wrong."""

    verb: str = "launch"
    fault: Fault = Fault.UNAVAILABLE
    times: int = 1
    retry_after: float | None = None


@dataclass(frozen=True)
class TaskEnds(Step):
    """A task ends at the provider."""

    which: int = 0
    outcome: Outcome = Outcome.SUCCEEDED


@dataclass(frozen=True)
class Vanish(Step):
    """The provider loses an execution and all that it knows of it."""

    which: int = 0


@dataclass(frozen=True)
class ConsoleCancel(Step):
    """Somebody cancels an execution in the provider's console."""

    which: int = 0


# --- processes ------------------------------------------------------------------------------------


class Died(BaseException):
    """The process is gone; nothing of it may run any more. No `except Exception` catches it."""


@dataclass(eq=False)
class Process:
    """A process of a story. The dead are replaced, never revived."""

    name: str
    dead: bool = False
    engine: Engine | None = None
    dispatcher: Dispatcher | None = None


@dataclass(eq=False)
class Run:
    """One step of one process, on its way."""

    process: Process
    what: Callable[[], object]
    die: At | None = None
    freeze: At | None = None
    points: Counter[str] = field(default_factory=Counter)
    in_transaction: bool = False
    finished: bool = False
    error: BaseException | None = None
    at: str = "its beginning"
    may_go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    has_stopped: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def body(self) -> None:
        """Run the step; how it ended is kept for whoever let it go."""
        try:
            self.what()
        except (Died, DispatcherError):
            pass  # dead; or a turn that failed, which a worker logs and takes again
        except BaseException as error:  # noqa: BLE001 - raised again where the story is told
            self.error = error
        self.finished = True

    def in_a_thread(self) -> None:
        """Run the step whenever it is let go."""
        self.may_go.acquire()
        self.body()
        self.has_stopped.release()


class Inline(Executor):
    """Does at once what it is given; the calls of a round come one after the other."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - as an executor does; a death goes through
            done.set_exception(error)
        return done

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """There is nothing to wait for."""


class SimulatedStore(Store):
    """A store of a process that may die or freeze around each transaction."""

    def __init__(self, story: Story, actor: str) -> None:
        super().__init__(story.database.engine, actor=actor, now=NOW)
        self._story = story

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        point = self._story.point
        point("before a transaction")
        run = self._story.running
        run.in_transaction = True
        try:
            with super().transaction() as tx:
                yield tx
                point("before a commit")
        finally:
            run.in_transaction = False
        point("after a commit")


class SimulatedBackend:
    """A null backend under a process that may die or freeze around each call."""

    Options: ClassVar[type[BaseModel]] = NullBackend.Options
    Settings: ClassVar[type[BaseModel]] = NullBackend.Settings
    DEFAULTS: ClassVar[Mapping[str, Any]] = NullBackend.DEFAULTS
    COMMAND: ClassVar[Literal["required", "refused"]] = NullBackend.COMMAND

    def __init__(self, story: Story, settings: NullSettings) -> None:
        self._story = story
        self._real = NullBackend(HERE, settings)

    @property
    def limits(self) -> BackendLimits:
        return self._real.limits

    def _call(self, verb: str, *args: Any) -> Any:
        self._story.point(f"before {verb}")
        try:
            answer = getattr(self._real, verb)(*args)
            return list(answer) if verb == "logs" else answer
        finally:
            self._story.point(f"after {verb}")

    def home(self) -> None:
        return

    def definition(self, options: BaseModel) -> Definition:
        return self._real.definition(options)

    def winner(self, handle: Handle, name: str) -> Handle:
        return self._real.winner(handle, name)

    def check(self, job: Job, options: BaseModel) -> Sequence[Remark]:
        return self._real.check(job, options)

    def launch(self, request: LaunchRequest) -> Launched:
        story = self._story
        began = story.now
        story.point("before launch")
        if (story.now - began).total_seconds() > CALL_TIMEOUT:
            # The process stood still inside the call for longer than any call takes: nobody can
            # prevent that one, and a provider without tokens starts it.
            story.late.add(request.key)
        try:
            story.calls.append(request.key)
            return self._real.launch(request)
        finally:
            story.point("after launch")

    def find(self, request: LaunchRequest) -> Launched | None:
        found: Launched | None = self._call("find", request)
        return found

    def poll(self, handles: Sequence[Handle]) -> Mapping[Handle, Report]:
        reports: Mapping[Handle, Report] = self._call("poll", handles)
        return reports

    def cancel(self, handle: Handle) -> None:
        self._call("cancel", handle)

    def strays(self, instance: str, since: datetime) -> Iterable[Launched]:
        found: Iterable[Launched] = self._call("strays", instance, since)
        return found

    def logs(self, handle: Handle, task_index: int, tail: int) -> Iterator[str]:
        yield from self._call("logs", handle, task_index, tail)

    def clean(self, _now: datetime) -> int:
        return 0


# --- the database ---------------------------------------------------------------------------------


class Database:
    """The tables of one story after the other, and their clock."""

    BEGINNING: ClassVar[datetime] = datetime(2100, 1, 1, tzinfo=UTC)

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = schema.create_engine(url, pool_size=4)
        self.raw = psycopg.connect(
            url.replace("postgresql+psycopg:", "postgresql:", 1), autocommit=True
        )
        self.raw.execute("SET timezone = 'UTC'")
        self.raw.execute("CREATE SCHEMA sim")
        self.raw.execute("CREATE TABLE sim.clock (at timestamptz NOT NULL)")
        self.raw.execute("INSERT INTO sim.clock VALUES (%s)", [self.BEGINNING])
        self.raw.execute("ALTER TABLE dispatcher.event DISABLE TRIGGER event_no_truncate")

    def close(self) -> None:
        self.raw.close()
        self.engine.dispose()

    def reset(self) -> None:
        """Make the tables as new: this is a superuser's, and no worker can do it."""
        self.raw.execute(
            "TRUNCATE dispatcher.event, dispatcher.item_result, dispatcher.attempt,"
            " dispatcher.execution, dispatcher.chunk_items, dispatcher.chunk, dispatcher.item_page,"
            " dispatcher.batch, dispatcher.bucket, dispatcher.target, dispatcher.worker"
            " RESTART IDENTITY"
        )
        self.set_clock(self.BEGINNING)

    def set_clock(self, at: datetime) -> None:
        self.raw.execute("UPDATE sim.clock SET at = %s", [at])


# --- the story ------------------------------------------------------------------------------------


class Story:
    """Processes, a provider and a time; `take` makes something happen."""

    def __init__(self, database: Database, place: Provider) -> None:
        self.database = database
        self.place = place
        self.now = Database.BEGINNING
        self.late: set[str] = set()
        """Keys of calls that stood still for longer than a call can take, see `launch` above."""

        self.calls: list[str] = []
        """The key of each launch call that reached the provider, or was to."""

        self.batches: list[str] = []
        self.keys: dict[str, tuple[str, int, str]] = {}
        self.frozen: list[Run] = []
        self.running: Run = Run(Process("nobody"), lambda: None)
        self.is_calm = False
        database.reset()
        NullWorld.forget(HERE)
        self.world = NullWorld.named(HERE)
        self.world.clock = lambda: self.now
        self.world.script = self._script
        self.world.find_lag = timedelta(seconds=place.lag)
        self.world.enforces_timeout = place.obeys_timeout
        self.settings = NullSettings(
            relaunch_safe=place.safe,
            find_grace=timedelta(seconds=5),
            absent_grace=timedelta(seconds=place.absent_grace),
            page_size=place.page_size,
        )
        target = Target(
            name=HERE,
            backend="null",
            max_running=place.max_running,
            max_executions=place.max_executions,
            launches_per_minute=place.launches_per_minute,
            settings=self.settings,
        )
        self.config = Config({HERE: target}, JOBS, "the story")
        self._names = itertools.count(1)
        self._numbers = itertools.count(1)
        self.app = self._new_app()
        self.workers = [self._new_worker() for _ in range(WORKERS)]
        store = self._engine(0).store
        self._act(
            Run(
                self.workers[0],
                lambda: store.lease(
                    HERE, backend="null", limits={}, home=None, lease=timedelta(days=1)
                ),
            )
        )

    def _script(self, _batch: str, chunk: int, attempt: int) -> Ending:
        if self.is_calm:
            return Ending(seconds=3.0)
        if self.place.second_never_starts and chunk == 1 and attempt == 1:
            return Ending(seconds=math.inf, start_seconds=math.inf)
        return Ending(seconds=math.inf)

    def _monotonic(self) -> float:
        return 1000.0 + (self.now - Database.BEGINNING).total_seconds()

    def _new_worker(self) -> Process:
        process = Process(f"worker-{next(self._names)}")
        backend: Backend = SimulatedBackend(self, self.settings)
        process.engine = Engine(
            SimulatedStore(self, process.name),
            self.config,
            launch_concurrency=self.place.concurrency,
            call_window=WINDOW,
            monotonic=self._monotonic,
            roll=lambda: 0.5,
            backends={HERE: backend},
        )
        for place in process.engine.places.values():
            place.callers = place.readers = Inline()  # type: ignore[assignment]  # enough of one
        return process

    def _new_app(self) -> Process:
        process = Process(f"app-{next(self._names)}")
        settings = Settings(database_url=self.database.url, actor=process.name)
        process.dispatcher = Dispatcher(settings, config=self.config)
        process.dispatcher._engine.dispose()
        process.dispatcher._engine = self.database.engine
        process.dispatcher._store = SimulatedStore(self, process.name)
        process.dispatcher._checked = True
        return process

    def _engine(self, worker: int) -> Engine:
        engine = self.workers[worker].engine
        assert engine is not None
        return engine

    @contextmanager
    def names(self) -> Iterator[None]:
        """Let ids and keys be the same each time that the story is told."""
        with (
            mock.patch("uuid.uuid4", side_effect=lambda: uuid.UUID(int=next(self._numbers))),
            mock.patch(
                "dispatcher.engine.launcher.new_key",
                lambda batch: f"d-{batch}-{next(self._numbers)}",
            ),
        ):
            yield

    # --- how a process runs -----------------------------------------------------------------------

    def point(self, where: str) -> None:
        """Die here, or freeze here, if the step was told to."""
        run = self.running
        if run.process.dead:
            raise Died
        run.points[where] += 1
        here = At(where, run.points[where])
        if here == run.die:
            run.process.dead = True
            raise Died
        if here == run.freeze:
            assert not run.in_transaction, "what it holds would hold up the one thread there is"
            run.freeze = None
            run.at = where
            run.has_stopped.release()
            run.may_go.acquire()
            if run.process.dead:
                raise Died

    def _act(self, run: Run) -> None:
        """Run a step until it ends, dies or freezes."""
        if run.freeze is None:
            self.running = run
            run.body()
        else:
            threading.Thread(target=run.in_a_thread, daemon=True).start()
            self._let_go(run)
        self._after(run)

    def _let_go(self, run: Run) -> None:
        self.running = run
        run.may_go.release()
        assert run.has_stopped.acquire(timeout=60), f"a step hangs at {run.at}"

    def _after(self, run: Run) -> None:
        if run.process.dead:
            self._bury(run.process)
        elif not run.finished and run not in self.frozen:
            self.frozen.append(run)
        if run.error is not None:
            raise run.error

    def _bury(self, process: Process) -> None:
        """End the frozen steps of a dead process, and start another in its place."""
        process.dead = True
        for run in [run for run in self.frozen if run.process is process]:
            self.frozen.remove(run)
            self._let_go(run)
            assert run.finished, "the dead do nothing more"
        if process is self.app:
            self.app = self._new_app()
        self.workers = [self._new_worker() if one is process else one for one in self.workers]

    def close(self) -> None:
        """End every thread of the story."""
        for run in self.frozen:
            run.process.dead = True
            self._let_go(run)
        self.frozen.clear()
        NullWorld.forget(HERE)

    # --- what happens -----------------------------------------------------------------------------

    def take(self, step: Step) -> None:
        """Let a step happen."""
        with self.names():
            match step:
                case Work():
                    self._work(step)
                case Continue(which):
                    if self.frozen:
                        run = self.frozen.pop(which % len(self.frozen))
                        self._let_go(run)
                        self._after(run)
                case Advance(seconds):
                    self.now += timedelta(seconds=seconds)
                    self.database.set_clock(self.now)
                case Enqueue():
                    self._ask(step.die, lambda: self._enqueue(step))
                case Cancel(batch, die):
                    self._ask(die, lambda: self._client().cancel(self._batch(batch)))
                case Retry(batch, everything, die):
                    self._ask(die, lambda: self._retry(batch, everything=everything))
                case Explain(batch):
                    self._act(Run(self.app, lambda: self._explain(batch)))
                case Fails(verb, fault, times, after):
                    wait = None if after is None else timedelta(seconds=after)
                    self.world.fail_next(verb, fault, times=times, retry_after=wait)
                case _:
                    self._at_the_provider(step)

    def _work(self, step: Work) -> None:
        process = self.workers[step.worker % WORKERS]
        engine = process.engine
        assert engine is not None

        def sweep() -> None:
            for batch_id in engine.sweep():
                engine.plan(batch_id)

        def turn() -> None:
            sweep()
            engine.launch(HERE)
            engine.follow(HERE)

        what: dict[type[Work], Callable[[], object]] = {
            Plan: lambda: engine.plan(self._batch(getattr(step, "batch", 0))),
            Launch: lambda: engine.launch(HERE),
            Follow: lambda: engine.follow(HERE),
            Sweep: sweep,
            Strays: lambda: engine.sweep_strays(HERE),
            Turn: turn,
        }
        self._act(Run(process, what[type(step)], step.die, step.freeze))

    def _ask(self, die: At | None, what: Callable[[], object]) -> None:
        self._act(Run(self.app, what, die))
        known = self.database.raw.execute(
            "SELECT batch_id FROM dispatcher.event"
            " WHERE kind = 'batch' AND old IS NULL AND new IS NOT NULL ORDER BY id"
        )
        self.batches = [row[0] for row in known]

    def _client(self) -> Dispatcher:
        dispatcher = self.app.dispatcher
        assert dispatcher is not None
        return dispatcher

    def _batch(self, number: int) -> str:
        return self.batches[number % len(self.batches)] if self.batches else "none"

    def _enqueue(self, step: Enqueue) -> None:
        """Ask for a batch, and see that its key is worth something."""
        asked = (step.job, step.items)
        known = self.keys.get(step.key or "")
        try:
            batch = self._client().enqueue(step.job, range(step.items), key=step.key)
        except IdempotencyConflict:
            assert known is None or known[:2] != asked, "the same request is no other request"
            return
        if step.key is not None:
            assert known is None or known == (*asked, batch.id), "a key has one batch"
            self.keys[step.key] = (*asked, batch.id)

    def _retry(self, number: int, *, everything: bool) -> None:
        try:
            self._client().retry(self._batch(number), failed_only=not everything)
        except NotAllowed:
            return

    def _explain(self, number: int) -> None:
        """See that there is an answer for everything, and that it leaves nothing out."""
        if not self.batches:
            return
        batch_id, store = self._batch(number), self._client()._store
        chunks = list(self._client().chunks(batch_id))
        for chunk in (None, *(one.index for one in chunks)):
            answer = explain(store, batch_id, chunk)
            assert answer.text, f"no answer for {batch_id}/{chunk}"
            assert "moved on at this very moment" not in answer.text, answer.text

    def _at_the_provider(self, step: Step) -> None:
        world, now = self.world, self.now.timestamp()
        live = [e for e in world._executions.values() if any(run.end > now for run in e.runs)]
        match step:
            case TaskEnds(which, outcome):
                runs = [
                    (e.handle, r.task.index) for e in live for r in e.runs if r.start <= now < r.end
                ]
                if runs:
                    handle, index = runs[which % len(runs)]
                    world.kill(handle, index, outcome)
            case Vanish(which):
                if live:
                    world.vanish(live[which % len(live)].handle)
            case ConsoleCancel(which):
                if live:
                    handle = live[which % len(live)].handle
                    for task in world._executions[handle].request.tasks:
                        world.kill(handle, task.index, Outcome.CANCELLED)
            case _:
                raise AssertionError(step)

    # --- how it ends ------------------------------------------------------------------------------

    def calm_down(self) -> None:
        """Let nothing go wrong any more: what is launched from now on ends well, and soon.

        Workers that sleep in the middle of a step sleep on, and healthy ones stand beside them.
        """
        asleep = [run.process for run in self.frozen]
        self.workers = [
            self._new_worker() if worker in asleep else worker for worker in self.workers
        ]
        self.is_calm = True
        self.world._faults.clear()

    def is_over(self) -> bool:
        """Say if every batch is final and nothing is left to be followed."""
        row = self.database.raw.execute(
            "SELECT NOT EXISTS (SELECT 1 FROM dispatcher.batch WHERE state IN"
            " ('planning', 'running')) AND NOT EXISTS"
            " (SELECT 1 FROM dispatcher.execution WHERE state <> 'ended')"
        ).fetchone()
        assert row is not None
        return bool(row[0])


def tell(database: Database, place: Provider, steps: Iterable[Step]) -> Story:
    """Tell a story to its end, looking after each step if all that must hold holds."""
    from simulation.truths import Truths  # noqa: PLC0415 - it knows this module

    told: list[Step] = []
    story = Story(database, place)
    truths = Truths(story)
    try:
        for step in steps:
            told.append(step)
            story.take(step)
            truths.check()
        truths.comes_to_an_end()
    except BaseException as error:
        error.add_note(
            f"the story so far:\n{place},\n[\n    " + ",\n    ".join(map(repr, told)) + "\n]"
        )
        raise
    finally:
        story.close()
    return story
