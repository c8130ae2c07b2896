"""The engine on Cloud Run: the real client, the emulator, a real database, and time that is moved.

The database's clock, the provider's, the engine's and the backend's all show the machine's time
plus what the test has added, so that hours pass in seconds and every figure is of one clock.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import grpc
import pytest
import sqlalchemy as sa
from google.cloud import run_v2
from google.cloud.run_v2.services.executions.transports import ExecutionsGrpcTransport
from google.cloud.run_v2.services.jobs.transports import JobsGrpcTransport
from typer.testing import CliRunner

from dispatcher import schema
from dispatcher.backends.base import Unavailable
from dispatcher.backends.cloud_run import CloudRunBackend
from dispatcher.cli import app
from dispatcher.client import Batch, Dispatcher
from dispatcher.config import load_config
from dispatcher.emulators.cloud_run import CloudRunEmulator, Code, EmulatorOptions
from dispatcher.emulators.cloud_run import ScriptRunner, TaskEnd, TaskStart
from dispatcher.emulators.cloud_run.faults import outage, refuse, slow_cancel
from dispatcher.engine import Engine
from dispatcher.engine.metering import TargetMeter
from dispatcher.explaining import explain
from dispatcher.queries import Chunk
from dispatcher.storage import Storage
from dispatcher.store import Store
from lifecycle import assert_invariants

JOB: Final = "projects/project-1/locations/europe-west1/jobs/etl"
NOW: Final = "public.site_now()"
READS: Final = {"Executions.GetExecution", "Executions.ListExecutions"}

CLOCK: Final = (
    "CREATE TABLE public.site_clock (ahead interval NOT NULL)",
    "INSERT INTO public.site_clock VALUES ('0')",
    """
    CREATE FUNCTION public.site_now() RETURNS timestamptz LANGUAGE sql STABLE
    AS 'SELECT now() + ahead FROM public.site_clock'
    """,
)


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
        self.storage = Storage(f"file://{folder}/store")
        self.ahead = 0.0
        self._closing = ExitStack()
        self.database = self._connect()
        with self.database.begin() as tx:
            for statement in CLOCK:
                tx.execute(sa.text(statement))
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
        return time.monotonic() + self.ahead

    def advance(self, seconds: float) -> None:
        """Let time pass everywhere, and what falls due at the provider happen."""
        self.ahead += seconds
        self.sql(
            "UPDATE public.site_clock SET ahead = make_interval(secs => :secs)", secs=self.ahead
        )
        self.emulator.world.advance(seconds)
        self.emulator.world.timetable.run_due()

    def turn(self, seconds: float = 0.0) -> None:
        """One turn of each worker's clock, after some time."""
        if seconds:
            self.advance(seconds)
        for engine in self.engines:
            for batch_id in engine.sweep():
                engine.plan(batch_id)
            while engine.launch("cloud").more:
                pass
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

    @property
    def launches(self) -> int:
        return self.emulator.calls["Jobs.RunJob"]

    def reads(self) -> list[float]:
        """When executions were read: their lists' pages and single ones."""
        return [call.at for call in self.emulator.history if call.method in READS]


def attempts_of(chunk: Chunk) -> list[str | None]:
    return [attempt.outcome for attempt in chunk.attempts]


def chunk_of(start: TaskStart) -> tuple[int, int]:
    """Which chunk a task works on, and the number of the attempt, by what its container is told."""
    if "DISPATCH_CHUNK_INDEX" in start.env:
        return int(start.env["DISPATCH_CHUNK_INDEX"]), int(start.env["DISPATCH_ATTEMPT"])
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


MakeCloud: TypeAlias = Callable[..., Cloud]


@pytest.fixture
def make_cloud(tmp_path: Path, database_url: str) -> Iterator[MakeCloud]:
    """Make the installation of this test: a script, jobs, options of the emulator, the target."""
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


def test_ten_thousand_chunks_are_one_launch_and_their_failures_one_more(
    make_cloud: MakeCloud,
) -> None:
    def script(start: TaskStart) -> TaskEnd:
        chunk, attempt = chunk_of(start)
        return TaskEnd(seconds=60 + chunk % 50, exit_code=int(chunk % 100 == 7 and attempt == 1))

    cloud = make_cloud(script, jobs={"etl": PACKED}, max_running=10_000)
    batch = cloud.dispatcher.enqueue("etl", range(10_000))
    cloud.turn()
    assert cloud.launches == 1, "ten thousand chunks, one call"
    began = cloud.monotonic()
    ended = cloud.finish(batch, step=2.5, within=900)
    took = cloud.monotonic() - began
    print("took", took, "calls", dict(cloud.emulator.calls), len(cloud.reads()))
    print(cloud.sql("select tasks, intent_at from dispatcher.execution order by id"))
    assert (ended.state, ended.counts) == ("succeeded", {"succeeded": 10_000})
    assert cloud.launches <= 3


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
        lambda: batch.refresh().counts.get("succeeded") == 9_999,
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
    assert most_within(reads, 4.9) == 1
    print(f"{late=:.1f} {took=:.0f} {passed=:.0f} reads={len(reads)} {pages=}")


def test_three_hundred_executions_are_followed_with_three_reads_in_five_seconds(
    make_cloud: MakeCloud,
) -> None:
    cloud = make_cloud(lambda _: 120.0, launches_per_minute=100_000)
    batch = cloud.dispatcher.enqueue("etl", range(300))
    cloud.turn()
    assert cloud.launches == 300
    began = cloud.monotonic()
    assert cloud.finish(batch, step=0.5).state == "succeeded"
    passed, reads = cloud.monotonic() - began, cloud.reads()
    print(f"{passed=:.0f} reads={len(reads)} most={most_within(reads, 4.9)}", cloud.emulator.calls)
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
    told = explain(cloud.store, batch.id)
    print(told.text)
    assert cloud.finish(batch, step=5, within=900).state == "succeeded"
    assert cloud.world.most_busy == 2
    assert cloud.launches == 1
    assert {tuple(one) for one in cloud.outcomes(batch)} == {("succeeded",)}


# --- cancelled, late and stray --------------------------------------------------------------------


def test_cancelled_in_the_console_and_late_by_our_deadline_are_two_things(
    make_cloud: MakeCloud,
) -> None:
    """The late one runs past its timeout: Cloud Run asks for its end, and it takes its time."""

    def script(_: TaskStart) -> TaskEnd:
        return TaskEnd(seconds=math.inf, stop_seconds=600)

    etl = {"timeout": "2m", "start_timeout": "1m", "retry": {"attempts": 2, "initial": "5s"}}
    cloud = make_cloud(script, jobs={"etl": etl})
    batch = cloud.dispatcher.enqueue("etl", range(2))
    cloud.turn()
    console, late = (one.name for one in cloud.world.executed)
    cloud.client().executions.cancel_execution(name=console)
    cloud.until(lambda: len(cloud.world.executed) == 3, "the retry", step=5, within=1200)
    print(
        cloud.outcomes(batch),
        [attempts.reason for c in cloud.chunks(batch) for attempts in c.attempts],
    )
