"""The engine on Cloud Run: the real client, the emulator, a real database, and time that is moved.

The database, the provider, the engine and the backend all go by one clock, which stands until the
test moves it on: hours pass in seconds, and no figure depends on how fast the machine is.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import grpc
import pytest
import sqlalchemy as sa
from google.cloud import run_v2
from google.cloud.run_v2.services.executions.transports import ExecutionsGrpcTransport
from google.cloud.run_v2.services.jobs.transports import JobsGrpcTransport
from lifecycle import assert_invariants
from typer.testing import CliRunner

from dispatcher import schema
from dispatcher.backends.cloud_run import CloudRunBackend
from dispatcher.cli import app
from dispatcher.client import Batch, Dispatcher
from dispatcher.config import load_config
from dispatcher.emulators.cloud_run import (
    CloudRunEmulator,
    EmulatorOptions,
    ScriptRunner,
    TaskEnd,
    TaskStart,
    World,
)
from dispatcher.emulators.cloud_run.faults import outage, slow_cancel
from dispatcher.emulators.cloud_run.gate import Call
from dispatcher.emulators.cloud_run.timetable import Clock
from dispatcher.engine import Engine
from dispatcher.engine.metering import TargetMeter
from dispatcher.explaining import explain
from dispatcher.queries import Chunk
from dispatcher.states import ChunkState
from dispatcher.storage import Storage
from dispatcher.store import Store
from workers.clock import STRAYS_EVERY

JOB: Final = "projects/project-1/locations/europe-west1/jobs/etl"
NOW: Final = "public.site_now()"
READS: Final = {"Executions.GetExecution", "Executions.ListExecutions"}

CLOCK: Final = (
    "CREATE TABLE public.site_clock (shows timestamptz NOT NULL)",
    "INSERT INTO public.site_clock VALUES (now())",
    """
    CREATE FUNCTION public.site_now() RETURNS timestamptz LANGUAGE sql STABLE
    AS 'SELECT shows FROM public.site_clock'
    """,
)


class StandingClock(Clock):
    """The time of an emulator's world, which only a test moves on."""

    def __init__(self) -> None:
        self._shows = time.time()

    def __call__(self) -> float:
        return self._shows

    def advance(self, seconds: float) -> None:
        self._shows += seconds


class Client(NamedTuple):
    """Google's own clients."""

    jobs: run_v2.JobsClient
    executions: run_v2.ExecutionsClient


class Cloud:
    """An installation with one Cloud Run target, `cloud`, and the emulator that it points at."""

    def __init__(
        self,
        folder: Path,
        database_url: str,
        emulator: CloudRunEmulator,
        jobs: Mapping[str, Mapping[str, Any]],
        *,
        workers: int = 1,
        storage: bool = True,
        **target: Any,
    ) -> None:
        self.emulator = emulator
        self.world = emulator.world
        self.jobs = folder / "jobs.json"
        self.jobs.write_text(
            json.dumps(
                {
                    "targets": {
                        "cloud": {
                            "backend": "cloud_run",
                            "project": "project-1",
                            "region": "europe-west1",
                            "endpoint": emulator.grpc_address,
                            "insecure": True,
                            # Of the machine's time: a call is late only where nobody answers.
                            "call_timeout": "60s",
                            **target,
                        }
                    },
                    "jobs": {
                        name: {"target": "cloud", "options": {"job": "etl"}, **fields}
                        for name, fields in jobs.items()
                    },
                }
            )
        )
        self.config = load_config(str(self.jobs))
        self.database_url = database_url
        self.storage = Storage(f"file://{folder}/store") if storage else None
        self._scanned = -math.inf
        self._of_scans: list[Call] = []
        self._closing = ExitStack()
        self.database = self._connect()
        with self.database.begin() as tx:
            for statement in CLOCK:
                tx.execute(sa.text(statement))
        self._set_database_clock()
        self.dispatcher = self._closing.enter_context(
            Dispatcher(database_url=database_url, config=self.config, actor="app", pool_size=2)
        )
        self.dispatcher._store = Store(self.dispatcher._engine, actor="app", now=NOW)
        self.engines = [self._worker(f"worker-{number}") for number in range(1, workers + 1)]
        self.store = self.engines[0].store
        self.store.lease(
            "cloud", backend="cloud_run", limits={}, home=None, lease=timedelta(days=365)
        )

    def _connect(self) -> sa.Engine:
        engine = schema.create_engine(self.database_url, pool_size=8)
        self._closing.callback(engine.dispose)
        return engine

    def _worker(self, name: str) -> Engine:
        store = Store(self._connect(), actor=name, now=NOW)
        target = self.config.targets["cloud"]
        backend = CloudRunBackend(
            "cloud", target.settings, TargetMeter(store, target), monotonic=self.monotonic
        )
        engine = Engine(
            store,
            self.config,
            monotonic=self.monotonic,
            backends={"cloud": backend},
            storage=self.storage,
        )
        self._closing.callback(engine.close)
        return engine

    def close(self) -> None:
        with self._closing, self.database.connect() as connection:
            assert_invariants(connection)

    # --- time -------------------------------------------------------------------------------------

    def monotonic(self) -> float:
        return self.world.clock()

    def advance(self, seconds: float) -> None:
        """Let time pass everywhere, and what falls due at the provider happen."""
        self.world.advance(seconds)
        self._set_database_clock()
        self.world.timetable.run_due()

    def _set_database_clock(self) -> None:
        self.sql("UPDATE public.site_clock SET shows = to_timestamp(:now)", now=self.monotonic())

    def turn(self, seconds: float = 0.0) -> None:
        """One turn of each worker's clock, after some time; the leader scans for strays."""
        if seconds:
            self.advance(seconds)
        if self.monotonic() - self._scanned >= STRAYS_EVERY:
            self._scanned, before = self.monotonic(), len(self.emulator.history)
            self.engines[0].sweep_strays("cloud")
            self._of_scans += list(self.emulator.history)[before:]
        for engine in self.engines:
            for batch_id in engine.sweep():
                engine.plan(batch_id)
            while engine.launch("cloud").more:
                pass
            self.world.timetable.run_due()  # what is due at once, before anybody looks
            engine.follow("cloud")

    def until(
        self, done: Callable[[], object], what: str, *, step: float = 1.0, within: float = 600.0
    ) -> float:
        """Turn until something is true; how many seconds passed."""
        began = self.monotonic()
        while True:
            self.turn()
            if done():
                return self.monotonic() - began
            assert self.monotonic() - began < within, f"not within {within:g} s: {what}"
            self.advance(step)

    def finish(self, batch: Batch, *, step: float = 1.0, within: float = 600.0) -> Batch:
        self.until(lambda: batch.refresh().finished, f"{batch.id} ended", step=step, within=within)
        return batch.refresh()

    # --- what a test sees -------------------------------------------------------------------------

    def sql(self, statement: str, **values: Any) -> list[Any]:
        with self.database.begin() as tx:
            rows = tx.execute(sa.text(statement), values)
            if not rows.returns_rows:
                return []
            return [row[0] if len(row) == 1 else tuple(row) for row in rows]

    def chunks(self, batch: Batch) -> list[Chunk]:
        return list(self.dispatcher.chunks(batch.id))

    def outcomes(self, batch: Batch) -> list[list[str | None]]:
        """The outcomes of the attempts of each chunk."""
        return [attempts_of(chunk) for chunk in self.chunks(batch)]

    def client(self) -> Client:
        """A client of somebody else, such as the console."""
        channel = self._closing.enter_context(grpc.insecure_channel(self.emulator.grpc_address))
        return Client(
            run_v2.JobsClient(transport=JobsGrpcTransport(channel=channel)),
            run_v2.ExecutionsClient(transport=ExecutionsGrpcTransport(channel=channel)),
        )

    def check(self) -> tuple[int, str]:
        """What `dispatcher check` says of the first job, and its exit code."""
        environment: dict[str, str | None] = {
            **{name: None for name in os.environ if name.startswith("DISPATCHER_")},
            "DISPATCHER_DATABASE_URL": self.database_url,
            "DISPATCHER_JOBS": str(self.jobs),
        }
        if self.storage is not None:
            environment["DISPATCHER_STORAGE_URL"] = self.storage.url
        ran = CliRunner(env=environment).invoke(app, ["check", "--json"])
        assert "Traceback" not in ran.output
        found = [one for one in json.loads(ran.stdout)["checks"] if one["name"].startswith("job ")]
        return ran.exit_code, "\n".join(
            f"{one['level']}: {one['text']}; {one['todo']}" for one in found
        )

    def count_calls(self) -> Counter[str]:
        """Count from now on what the engine asks of its backend."""
        counts: Counter[str] = Counter()
        backend = self.engines[0].places["cloud"].backend

        def counted(name: str) -> Callable[..., Any]:
            verb = getattr(backend, name)

            def call(*given: Any) -> Any:
                counts[name] += 1
                return verb(*given)

            return call

        for name in ("definition", "launch", "find", "poll", "cancel"):
            setattr(backend, name, counted(name))
        return counts

    @property
    def launches(self) -> int:
        return self.emulator.calls["Jobs.RunJob"]

    def reads(self) -> list[float]:
        """When executions were read, but for scans: their lists' pages and single ones."""
        scans = set(map(id, self._of_scans))
        return [
            call.at
            for call in self.emulator.history
            if call.method in READS and id(call) not in scans
        ]

    def scan_reads(self) -> list[float]:
        """When scans for strays read a page."""
        return [call.at for call in self._of_scans if call.method in READS]


def attempts_of(chunk: Chunk) -> list[str | None]:
    return [attempt.outcome for attempt in chunk.attempts]


def chunk_of(start: TaskStart) -> tuple[int, int]:
    """Which chunk a task works on, and the number of the attempt, by what its container is told."""
    if "DISPATCH_CHUNK" in start.env:
        return int(start.env["DISPATCH_CHUNK"]), int(start.env["DISPATCH_ATTEMPT"])
    text = start.env.get("DISPATCH_INPUT") or read_document(start.env["DISPATCH_INPUT_URI"])
    line = lines_of(text)[start.index]
    return line["chunk"], line["attempt"]


@cache
def read_document(uri: str) -> str:
    return Path(uri.removeprefix("file://")).read_text()


@cache
def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def most_within(times: list[float], seconds: float) -> int:
    """How many of some moments fall into the fullest window of so many seconds."""
    return max(
        sum(at <= other < at + seconds for other in times[place:]) for place, at in enumerate(times)
    )


def figures(**measured: Any) -> None:
    """Show what was measured, to who runs these with -s."""
    rounded = {k: round(v, 1) if isinstance(v, float) else v for k, v in measured.items()}
    print(f"\n{rounded}")  # noqa: T201 - see above


MakeCloud: TypeAlias = Callable[..., Cloud]


@pytest.fixture
def standing_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every emulator that is made from now on have a clock that stands."""
    monkeypatch.setattr("dispatcher.emulators.cloud_run.emulator.Clock", StandingClock)


@pytest.fixture
def make_cloud(tmp_path: Path, database_url: str, standing_clock: None) -> Iterator[MakeCloud]:
    """Make the installation of this test: a script, jobs, options of the emulator, the target."""
    del standing_clock
    with ExitStack() as closing:

        def make(
            script: Callable[[TaskStart], TaskEnd | float | None] = lambda _: None,
            *,
            jobs: Mapping[str, Mapping[str, Any]] | None = None,
            options: EmulatorOptions | None = None,
            definition: Mapping[str, Any] | None = None,
            **target: Any,
        ) -> Cloud:
            emulator = closing.enter_context(
                CloudRunEmulator(
                    runner=ScriptRunner(script, images={"image"}),
                    options=options or EmulatorOptions(seed=1),
                )
            )
            emulator.world.define("project-1", "europe-west1", "etl", **(definition or {}))
            made = Cloud(tmp_path, database_url, emulator, jobs or {"etl": {}}, **target)
            closing.callback(made.close)
            return made

        yield make


# --- ten thousand chunks --------------------------------------------------------------------------


PACKED: Final = {"options": {"job": "etl", "max_tasks": 10_000}, "timeout": "2h"}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_ten_thousand_chunks_are_one_launch_and_their_failures_one_more(
    make_cloud: MakeCloud,
) -> None:
    def script(start: TaskStart) -> TaskEnd:
        chunk, attempt = chunk_of(start)
        return TaskEnd(seconds=60, exit_code=int(chunk % 100 == 7 and attempt == 1))

    cloud = make_cloud(script, jobs={"etl": PACKED}, max_running=10_000)
    began = cloud.monotonic()
    batch = cloud.dispatcher.enqueue("etl", range(10_000))
    cloud.turn()
    assert cloud.launches == 1, "ten thousand chunks, one call"
    ended = cloud.finish(batch, step=2.5, within=900)
    passed, reads, scans = cloud.monotonic() - began, cloud.reads(), cloud.scan_reads()
    figures(passed=passed, reads=len(reads), scans=len(scans), calls=dict(cloud.emulator.calls))
    assert (ended.state, ended.counts) == ("succeeded", {"succeeded": 10_000})
    assert Counter(map(len, cloud.outcomes(batch))) == {1: 9_900, 2: 100}
    assert [execution.task_count for execution in cloud.world.executed] == [10_000, 100]
    assert cloud.launches == 2
    assert len(reads) <= passed / 5
    assert most_within(reads, 4.9) == 1
    assert 2 <= len(scans) <= passed / STRAYS_EVERY + 1, "one page each: there are two executions"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_straggler_of_an_hour_holds_up_nobody_and_its_lost_record_costs_one_chunk(
    make_cloud: MakeCloud,
) -> None:
    def script(start: TaskStart) -> float:
        chunk, attempt = chunk_of(start)
        return 3600.0 if (chunk, attempt) == (4242, 1) else 600 + chunk % 50

    cloud = make_cloud(script, jobs={"etl": PACKED}, max_running=10_000)
    began = cloud.monotonic()
    batch = cloud.dispatcher.enqueue("etl", range(10_000))
    took = cloud.until(
        lambda: batch.refresh().counts.get(ChunkState.SUCCEEDED) == 9_999,
        "all but the straggler were settled",
        step=2.5,
        within=900,
    )
    (late,) = cloud.sql(
        "SELECT max(extract(epoch FROM settled_at - ended_at))::float8 FROM dispatcher.attempt"
    )
    assert late <= 60
    assert took < 720
    cloud.until(lambda: cloud.monotonic() - began > 3000, "an hour", step=30, within=3600)
    assert batch.refresh().counts == {"succeeded": 9_999, "running": 1}
    (pack,) = cloud.world.executed
    cloud.world.forget(pack.name)
    assert cloud.finish(batch, step=5, within=900).state == "succeeded"
    again = {chunk.index: o for chunk in cloud.chunks(batch) if len(o := attempts_of(chunk)) > 1}
    assert again == {4242: ["lost", "succeeded"]}
    assert [execution.task_count for execution in cloud.world.executed] == [10_000, 1]
    passed = cloud.monotonic() - began
    reads, pages = cloud.reads(), cloud.emulator.calls["Tasks.ListTasks"]
    scans = cloud.scan_reads()
    assert most_within(reads, 4.9) == 1
    assert 2 <= len(scans) <= passed / STRAYS_EVERY + 1
    figures(late=late, passed=passed, reads=len(reads), scans=len(scans), task_pages=pages)


def test_three_hundred_executions_are_followed_with_three_reads_in_five_seconds(
    make_cloud: MakeCloud,
) -> None:
    cloud = make_cloud(lambda _: 120.0, launches_per_minute=100_000)
    batch = cloud.dispatcher.enqueue("etl", range(300))
    cloud.turn()
    assert cloud.launches == 300
    began = cloud.monotonic()
    assert cloud.finish(batch, step=0.5).state == "succeeded"
    passed, reads, scans = cloud.monotonic() - began, cloud.reads(), cloud.scan_reads()
    figures(
        passed=passed,
        reads=len(reads),
        in_five_seconds=most_within(reads, 4.9),
        scans=len(scans),
    )
    assert 2 <= len(scans) <= 2 * (passed / STRAYS_EVERY + 1), "what is new, and a page more"
    assert len(reads) <= 3 * (passed / 5 + 1)
    assert most_within(reads, 4.9) <= 3
    assert cloud.emulator.calls["Tasks.ListTasks"] == 0, "a single success needs no list of tasks"
    assert passed < 135


# --- parallelism ----------------------------------------------------------------------------------


def test_a_parallelism_of_two_is_kept_and_its_queue_is_no_late_start(make_cloud: MakeCloud) -> None:
    etl = {
        "options": {"job": "etl", "max_tasks": 200},
        "start_timeout": "1m",
        "timeout": "1m",
    }
    cloud = make_cloud(lambda _: 6.0, jobs={"etl": etl}, definition={"parallelism": 2})
    began = cloud.monotonic()
    batch = cloud.dispatcher.enqueue("etl", range(200))
    cloud.until(lambda: cloud.monotonic() - began > 90, "past the start deadline", step=2)
    text = explain(cloud.store, batch.id).text
    assert "At most 2 of them run at the same time" in text
    assert re.search(r"the other [0-9]+ wait there for their turn, and no start deadline", text)
    assert cloud.finish(batch, step=5, within=900).state == "succeeded"
    assert cloud.world.most_busy == 2
    assert cloud.launches == 1
    assert {tuple(one) for one in cloud.outcomes(batch)} == {("succeeded",)}


# --- cancelled, late and stray --------------------------------------------------------------------


def test_cancelled_in_the_console_and_late_by_our_deadline_are_two_things(
    make_cloud: MakeCloud,
) -> None:
    """The late one runs past its timeout, again and again: Cloud Run retries it by itself."""

    def script(start: TaskStart) -> TaskEnd:
        chunk, attempt = chunk_of(start)
        if (chunk, attempt) == (1, 2):
            return TaskEnd(seconds=5)
        return TaskEnd(seconds=math.inf)

    etl = {"timeout": "2m", "start_timeout": "1m", "retry": {"attempts": 2, "initial": "5s"}}
    cloud = make_cloud(script, jobs={"etl": etl}, definition={"max_retries": 5})
    batch = cloud.dispatcher.enqueue("etl", range(2))
    cloud.turn()
    cloud.turn(10)
    (console,) = (e.name for e in cloud.world.executed if e.env["DISPATCH_CHUNK"] == "0")
    cloud.client().executions.cancel_execution(name=console)
    ended = cloud.finish(batch, step=5, within=900)
    assert cloud.outcomes(batch) == [["cancelled"], ["timed_out", "succeeded"]]
    cancelled, late = (chunk.attempts[0] for chunk in cloud.chunks(batch))
    assert cancelled.started_at is not None
    assert cancelled.ended_at is not None
    assert cancelled.ended_at - cancelled.started_at < timedelta(seconds=15)
    assert late.reason == "the execution ran past its deadline (the provider says: cancelled)"
    assert ended.state == "failed"
    assert "cancelled" in (ended.reason or "")


def test_a_stray_that_nobody_owns_is_stopped_and_what_is_not_ours_is_left_alone(
    make_cloud: MakeCloud,
) -> None:
    cloud = make_cloud(lambda _: math.inf)
    batch = cloud.dispatcher.enqueue("etl", [1])
    cloud.turn()
    (own,) = cloud.world.executed
    client = cloud.client()

    def run(**env: str) -> str:
        override = run_v2.RunJobRequest.Overrides.ContainerOverride(
            env=[run_v2.EnvVar(name=name, value=value) for name, value in env.items()]
        )
        overrides = run_v2.RunJobRequest.Overrides(container_overrides=[override])
        request = run_v2.RunJobRequest(name=JOB, overrides=overrides)
        name: str = client.jobs.run_job(request).metadata.name
        return name

    stray = run(DISPATCH_KEY="d-nobody-1", DISPATCH_INSTANCE=own.env["DISPATCH_INSTANCE"])
    twin = run(DISPATCH_KEY=own.env["DISPATCH_KEY"], DISPATCH_INSTANCE=own.env["DISPATCH_INSTANCE"])
    others = run(DISPATCH_KEY="d-other-1", DISPATCH_INSTANCE="another")
    nobodys = run(A="1")
    cloud.engines[0].sweep_strays("cloud")
    cloud.until(lambda: len(cloud.world.running) == 3, "the strays were stopped")
    assert {one.name for one in cloud.world.running} == {own.name, others, nobodys}
    ended = "SELECT handle FROM dispatcher.execution WHERE stray AND state = 'ended'"
    cloud.until(lambda: len(cloud.sql(ended)) == 2, "their end was confirmed")
    assert set(cloud.sql(ended)) == {stray, twin}
    assert batch.refresh().counts == {"running": 1}


# --- outages and cancels --------------------------------------------------------------------------


def test_an_outage_of_a_second_while_polling_changes_nothing(make_cloud: MakeCloud) -> None:
    cloud = make_cloud(lambda _: 20.0, poll_interval="1s")
    batch = cloud.dispatcher.enqueue("etl", range(10))
    cloud.turn()
    cloud.turn(5)
    cloud.emulator.faults.add(outage(1.0, starts=0.5))
    cloud.until(lambda: cloud.emulator.refused, "a poll met the outage", step=0.2, within=2)
    assert cloud.finish(batch, step=0.5).state == "succeeded"
    assert {tuple(one) for one in cloud.outcomes(batch)} == {("succeeded",)}
    assert cloud.launches == 10
    assert set(cloud.emulator.refused) == {("Executions.ListExecutions", "UNAVAILABLE")}


@pytest.mark.parametrize("who", ["the console", "the dispatcher"])
def test_a_cancelled_execution_has_not_succeeded_whatever_of_it_had(
    make_cloud: MakeCloud, who: str
) -> None:
    def script(start: TaskStart) -> TaskEnd:
        return TaskEnd(seconds=1 if chunk_of(start)[0] < 2 else math.inf)

    etl = {"options": {"job": "etl", "max_tasks": 4}}
    cloud = make_cloud(script, jobs={"etl": etl})
    batch = cloud.dispatcher.enqueue("etl", range(4))
    cloud.turn()
    cloud.turn(10)  # the end of two, and the cancel, are further apart than clocks may be
    (execution,) = cloud.world.executed
    if who == "the console":
        cloud.client().executions.cancel_execution(name=execution.name)
    else:
        batch.cancel("not wanted")
    ended = cloud.finish(batch)
    assert cloud.outcomes(batch) == [["succeeded"], ["succeeded"], ["cancelled"], ["cancelled"]]
    assert ended.state == ("failed" if who == "the console" else "cancelled")
    assert cloud.world.busy == 0


def test_a_cancel_of_a_thousand_running_tasks_is_confirmed_and_nothing_runs_after_it(
    make_cloud: MakeCloud,
) -> None:
    etl = {"options": {"job": "etl", "max_tasks": 250}, "retry": {"initial": "1s"}}
    cloud = make_cloud(lambda _: math.inf, jobs={"etl": etl})
    batch = cloud.dispatcher.enqueue("etl", range(1000))
    cloud.until(lambda: cloud.world.busy == 1000, "all of them run")
    cloud.emulator.faults.add(slow_cancel(3.0))
    batch.cancel("not wanted")
    took = cloud.until(lambda: batch.refresh().finished, "the cancel was confirmed")
    assert cloud.world.busy == 0, "confirmed is over"
    started = len(cloud.world.starts)
    for _ in range(20):
        cloud.turn(30)
    assert batch.refresh().counts == {"cancelled": 1000}
    assert len(cloud.world.starts) == started == 1000
    assert (cloud.launches, cloud.world.running) == (4, [])
    assert {tuple(one) for one in cloud.outcomes(batch)} == {("cancelled",)}
    assert took < 30
    figures(took=took, calls=dict(cloud.emulator.calls))


# --- budgets --------------------------------------------------------------------------------------


def test_a_429_slows_the_shared_bucket_and_costs_no_attempt(make_cloud: MakeCloud) -> None:
    """The target is allowed three times what the project's quota bears."""
    cloud = make_cloud(
        options=EmulatorOptions(run_per_minute=30, seed=1), launches_per_minute=90, workers=2
    )
    batch = cloud.dispatcher.enqueue("etl", range(80))
    cloud.until(lambda: cloud.emulator.refused, "the first refusal", step=0.5)
    (pace,) = cloud.sql("SELECT pace FROM dispatcher.bucket WHERE kind = 'launch'")
    assert pace < 1
    took = cloud.until(lambda: batch.refresh().finished, "the batch ended", step=2)
    assert cloud.outcomes(batch) == [["succeeded"]] * 80
    assert len(cloud.world.executed) == 80
    assert cloud.launches <= 80 * 1.2, "a refusal is no invitation"
    figures(took=took, refused=cloud.emulator.refused.total(), launches=cloud.launches)


def test_two_workers_share_one_budget_of_reads(make_cloud: MakeCloud) -> None:
    """Both follow: which a lease that has just moved can make of them."""
    cloud = make_cloud(
        lambda _: 120.0,
        launches_per_minute=100_000,
        reads_per_minute=30,
        poll_interval="1s",
        workers=2,
    )
    batch = cloud.dispatcher.enqueue("etl", range(100))
    cloud.turn()
    began = cloud.monotonic()
    assert cloud.finish(batch).state == "succeeded"
    minutes = (cloud.monotonic() - began) / 60
    reads = sorted(cloud.reads() + cloud.scan_reads())
    assert not cloud.emulator.refused
    most = most_within(reads, 60)
    figures(minutes=minutes, reads=len(reads), in_a_minute=most)
    # A bucket holds the calls of ten seconds.
    assert len(reads) <= 30 * minutes + 5
    assert 25 <= most <= 30 + 5


# --- bad input ------------------------------------------------------------------------------------


class Bad(NamedTuple):
    """What is wrong, and what is said of it."""

    name: str
    checked: str
    """What `dispatcher check` says of it, in a line of `level`."""

    told: str
    """What the outcome says."""

    job: Mapping[str, Any] = {}
    definition: Mapping[str, Any] = {}
    spoil: Callable[[World], object] = lambda _: None
    calls: int = 0
    """RunJob calls for three chunks, and a tried one."""

    item: str = "x"
    storage: bool = True
    level: Literal["warn", "fail"] = "fail"
    """What may work for some inputs is warned of."""


def forbid(world: World) -> None:
    world.permissions = frozenset(
        {"run.jobs.get", "run.jobs.run", "run.executions.list", "run.executions.get"}
    )


def sign_out(world: World) -> None:
    world.authenticated = False


BAD: Final = (
    Bad(
        "job missing",
        "there is no Cloud Run job no-such-job in project-1/europe-west1",
        "404 ",
        {"options": {"job": "no-such-job"}},
    ),
    Bad("no permission", "run.jobs.runWithOverrides", "403 Permission", spoil=forbid, calls=1),
    Bad("image missing", "job etl is not ready", "gone", definition={"image": "gone"}, calls=1),
    Bad(
        "wrong env name",
        "`env` sets CLOUD_RUN_REGION, which is Cloud Run's own",
        "the variable CLOUD_RUN_REGION is Cloud Run's own",
        {"env": {"CLOUD_RUN_REGION": "x"}},
    ),
    Bad(
        "too large",
        "an input of more than 24,576 bytes an execution is rejected, as there is no storage",
        "set DISPATCHER_STORAGE_URL for the workers",
        {"options": {"job": "etl", "max_tasks": 3}},
        item="x" * 20_000,
        storage=False,
        level="warn",
    ),
    Bad(
        "timeout over the limit",
        "`timeout` is 7d1h; Cloud Run allows 7d at most",
        "the timeout is 7d1h and Cloud Run allows 7d",
        {"timeout": "169h"},
    ),
    Bad(
        "tasks under the job's parallelism",
        "the Cloud Run job has parallelism 5: Cloud Run refuses executions of fewer tasks",
        "has parallelism 5 and this execution has 3 tasks",
        {"options": {"job": "etl", "max_tasks": 10}},
        {"parallelism": 5},
    ),
    Bad(
        "packs under the job's parallelism",
        "than that, such as the last one of a batch, or a retry, and options.max_tasks is 3",
        "has parallelism 5 and this execution has 3 tasks",
        {"options": {"job": "etl", "max_tasks": 3}},
        {"parallelism": 5},
    ),
    Bad("wrong credentials", "401 ", "401 ", spoil=sign_out, calls=1),
)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_input_is_told_at_the_check_and_rejected_once_in_the_providers_words(
    make_cloud: MakeCloud, bad: Bad
) -> None:
    cloud = make_cloud(jobs={"etl": bad.job}, definition=bad.definition, storage=bad.storage)
    bad.spoil(cloud.world)
    _, checked = cloud.check()
    (line,) = (one for one in checked.splitlines() if bad.checked in one)
    assert line.startswith(f"{bad.level}: ")
    assert "can run on target cloud" not in checked
    before = cloud.launches
    batch = cloud.dispatcher.enqueue("etl", [f"{bad.item}{number}" for number in range(3)])
    ended = cloud.finish(batch)
    for _ in range(10):
        cloud.turn(60)
    assert ended.state == "failed"
    assert cloud.outcomes(batch) == [["rejected"]] * 3
    assert all(bad.told in (chunk.attempts[0].reason or "") for chunk in cloud.chunks(batch))
    assert cloud.launches - before == bad.calls
    assert cloud.world.executed == []


def test_a_job_that_is_well_has_no_line_of_the_check_against_it(make_cloud: MakeCloud) -> None:
    """So that a line against a bad one is for what is bad, and not for the harness."""
    packed = {"options": {"job": "etl", "max_tasks": 10}}
    cloud = make_cloud(jobs={"etl": packed})
    _, checked = cloud.check()
    assert [one for one in checked.splitlines() if not one.startswith("ok: ")] == []
    assert "ok: can run on target cloud" in checked


def test_an_outage_of_ten_minutes_is_asked_after_seldom_and_costs_nothing(
    make_cloud: MakeCloud,
) -> None:
    cloud = make_cloud(launches_per_minute=1000)
    cloud.finish(cloud.dispatcher.enqueue("etl", [0]))
    with cloud.emulator.faults.during(outage()):
        before = cloud.emulator.calls.copy()
        batch = cloud.dispatcher.enqueue("etl", range(50))
        for _ in range(200):
            cloud.turn(3)
        calls = cloud.emulator.calls - before
        figures(in_ten_minutes=dict(calls))
        assert calls["Jobs.RunJob"] <= 40
        assert calls.total() <= 120
        code, checked = cloud.check()
        assert (code, "503 The service is currently unavailable" in checked) == (4, True)
    assert cloud.finish(batch, step=5).state == "succeeded"
    assert cloud.outcomes(batch) == [["succeeded"]] * 50
    assert len(cloud.world.executed) == 51


def test_an_endpoint_where_nobody_listens_is_told_and_asked_seldom(
    make_cloud: MakeCloud, nobody: str
) -> None:
    cloud = make_cloud(endpoint=nobody)
    code, checked = cloud.check()
    assert code == 4
    assert "target cloud cannot be asked" in checked
    assert "Connection refused" in checked
    asked = cloud.count_calls()
    batch = cloud.dispatcher.enqueue("etl", range(3))
    for _ in range(200):
        cloud.turn(3)
    figures(in_ten_minutes=dict(asked))
    assert 5 <= asked.total() <= 30
    assert batch.refresh().counts == {"pending": 3}
    assert "target cloud does not answer" in explain(cloud.store, batch.id).text


def test_credentials_that_are_not_there_are_told(
    make_cloud: MakeCloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    cloud = make_cloud(insecure=False)
    code, checked = cloud.check()
    assert code == 1
    assert "none.json was not found" in checked
    assert "set `insecure: true`" in checked
    assert "give the workers credentials" in checked
    batch = cloud.dispatcher.enqueue("etl", range(3))
    reason = cloud.finish(batch).reason
    assert reason is not None
    assert "none.json was not found" in reason
    assert cloud.outcomes(batch) == [["rejected"]] * 3
    assert cloud.emulator.calls.total() == 0
