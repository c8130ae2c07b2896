"""Claims and receipts where the provider cannot be relied on: doubles are made, records vanish.

Cloud Run is the emulator. Its tasks take their part with the container's own helper, run in this
process: thousands of them cost no more than their files.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest
from workbench import HERE, Bench, job

from dispatcher import container, schema
from dispatcher.backends.cloud_run import CloudRunBackend
from dispatcher.client import Dispatcher
from dispatcher.config import load_config
from dispatcher.emulators.cloud_run import CloudRunEmulator, EmulatorOptions, TaskEnd, TaskStart
from dispatcher.emulators.cloud_run.faults import (
    lose_reply,
    refuse,
    slow_cancel,
    slow_start,
    stale_lists,
)
from dispatcher.engine import Engine
from dispatcher.storage import Storage
from dispatcher.store import Store
from dispatcher.testing import Fault
from installation import Site, until

JOBS: Final = """
targets:
  cloud:
    backend: cloud_run
    project: project-1
    region: europe-west1
    endpoint: ENDPOINT
    insecure: true
    launches_per_minute: 60000
    reads_per_minute: 60000
    writes_per_minute: 60000
    call_timeout: 1s
    find_grace: 1s
    poll_interval: 0.5s
    tasks_interval: 0.5s
jobs:
  single: &etl
    target: cloud
    options: {job: etl}
    receipt: required
    retry: {attempts: 1, infrastructure_attempts: 1}
  packed:
    <<: *etl
    chunk: {size: 2}
    options: {job: etl, max_tasks: 5}
"""


DOUBLED: Final = 8
"""Keys of which a second execution must have come to be, or it would prove nothing."""


KILLS: Final = 3


class Containers:
    """The image: each task claims, works for a while, then does the effect of each of its items.

    Attributes:
        twice: items whose effect was there already.
        left: executions that left because another one had claimed their work.
    """

    def __init__(self, folder: Path) -> None:
        self.effects = folder / "effects"
        self.effects.mkdir()
        self.twice: list[str] = []
        self.left: set[str] = set()
        self._chance = random.Random(5)  # noqa: S311 - how long a task takes

    def script(self, start: TaskStart) -> TaskEnd:
        try:
            container.claim(start.environment)
        except SystemExit as lost:
            self.left.add(start.execution)
            return TaskEnd(exit_code=int(str(lost.code)))

        def work() -> None:
            task = container.Task(start.environment)
            for item in task.items:
                try:
                    (self.effects / str(item)).touch(exist_ok=False)
                except FileExistsError:
                    self.twice.append(item)
                task.report(item, ok=True)
            task.close()

        return TaskEnd(seconds=self._chance.uniform(0.1, 2.0), effect=work)


def doubled(cloud: CloudRunEmulator) -> set[str]:
    """The keys that more than one execution was started for."""
    started = Counter(one.env["DISPATCH_KEY"] for one in cloud.world.executed)
    return {key for key, times in started.items() if times > 1}


@pytest.mark.long
@pytest.mark.timeout(180)
def test_where_launches_are_doubled_each_items_effect_comes_once(site: Site) -> None:
    containers = Containers(site.folder)
    with CloudRunEmulator(script=containers.script, options=EmulatorOptions(seed=6)) as cloud:
        cloud.world.define("project-1", "europe-west1", "etl")
        site.write_jobs(JOBS.replace("ENDPOINT", cloud.grpc_address))
        # Shorter than in production, so that the test is: what they guard stays the same.
        site.environment |= {
            "DISPATCHER_STORAGE_URL": (site.folder / "storage").as_uri(),
            "DISPATCHER_LEASE": "1.5s",
            "DISPATCHER_HEARTBEAT": "0.5s",
            "DISPATCHER_CALL_WINDOW": "1s",
            "DISPATCHER_SWEEP_INTERVAL": "1s",
            "DISPATCHER_LAUNCH_CONCURRENCY": "64",
        }
        cloud.faults.add(
            refuse("Jobs.RunJob", code="RESOURCE_EXHAUSTED", skip=20, times=3),
            refuse("Jobs.RunJob", share=0.1),
            lose_reply("Jobs.RunJob", share=0.15),
            lose_reply("Jobs.RunJob", "drop", share=0.15),
            stale_lists(20.0),  # ten times as long as a launch is looked for
            slow_start(2.0, share=0.3),
            slow_cancel(2.0),
        )
        workers = [site.worker(), site.worker()]
        chance = random.Random(7)  # noqa: S311 - picks victims
        began = time.monotonic()
        try:
            with site.dispatcher() as dispatcher:
                batches = [
                    dispatcher.enqueue("single", [f"single-{n}" for n in range(50)]),
                    dispatcher.enqueue("packed", [f"packed-{n}" for n in range(100)]),
                ]
                for number in range(KILLS):
                    # The one place where a test may wait for a time: a kill every two seconds.
                    threading.Event().wait(max(0.0, began + 2 * (number + 1) - time.monotonic()))
                    victim = chance.randrange(2)
                    workers[victim].kill()
                    workers[victim].wait()
                    workers[victim] = site.start("worker")
                until(lambda: len(doubled(cloud)) >= DOUBLED, "launches were doubled", 60)
                cloud.faults.clear()
                ended = [dispatcher.wait(batch.id, 60) for batch in batches]
                took = time.monotonic() - began
                attempts = [
                    attempt
                    for batch in ended
                    for chunk in dispatcher.chunks(batch.id)
                    for attempt in chunk.attempts
                ]
            until(lambda: not cloud.world.running, "no double runs on", 90)
        except BaseException:
            print(site.logs())  # noqa: T201 - shown by pytest where it failed
            raise
        rows = site.sql("SELECT key, handle FROM dispatcher.execution WHERE NOT stray")
        followed = {str(key): str(handle) for key, handle in rows}
        names = {one.name: one.env["DISPATCH_KEY"] for one in cloud.world.executed}

    assert [batch.state for batch in ended] == ["succeeded"] * 2
    assert containers.twice == []
    done = {f"single-{n}" for n in range(50)} | {f"packed-{n}" for n in range(100)}
    assert {path.name for path in containers.effects.iterdir()} == done
    assert Counter(attempt.outcome for attempt in attempts) == {"succeeded": 100}
    assert containers.left
    for key in doubled(cloud):
        claimed = (site.folder / "storage" / "claims" / key).read_text()
        assert followed[key].endswith(f"/{claimed}"), "who holds the claim is followed"
        assert names[followed[key]] == key
    print(  # noqa: T201 - the figures of the proof
        f"{took:.1f} s, {KILLS} kills, {len(names)} executions of 60, {len(doubled(cloud))} keys "
        f"doubled, {len(containers.left)} left, {dict(cloud.faults.struck)}"
    )


# --- what is stopped as a double ------------------------------------------------------------------


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage((tmp_path / "storage").as_uri())


@pytest.fixture
def bench(database_url: str, storage: Storage) -> Iterator[Bench]:
    made = Bench(
        database_url,
        [job(retry={"attempts": 1})],
        settings={"relaunch_safe": False, "find_grace": "5s"},
        storage=storage,
    )
    yield made
    made.close()


def test_a_double_that_is_being_stopped_can_win_no_more(bench: Bench, storage: Storage) -> None:
    """Neither has claimed when the sweep finds them; a cancel takes its time; then both begin."""
    bench.script(seconds=100)
    batch = bench.enqueue([1])
    bench.plan()
    bench.world.fail_next("launch", Fault.REPLY_LOST)
    bench.world.find_lag = timedelta(hours=1)
    bench.launch()
    bench.until(lambda: len(bench.world.requests()) == 2, "it was launched twice", step=5)
    bench.world.find_lag = timedelta(0)
    key = bench.world.requests()[0].key
    first, second = f"{key}.1", f"{key}.2"
    assert bench.sql("SELECT handle FROM dispatcher.execution") == [second]

    bench.engine.sweep_strays(HERE)
    assert bench.sql("SELECT handle FROM dispatcher.execution WHERE stray") == [first]
    given = {"DISPATCH_CLAIM_URI": storage.uri(f"claims/{key}")}
    with pytest.raises(SystemExit) as left:
        container.claim({**given, "CLOUD_RUN_EXECUTION": first})
    assert left.value.code == container.EXIT_CLAIMED_BY_ANOTHER
    container.claim({**given, "CLOUD_RUN_EXECUTION": second})
    assert bench.finish(batch, step=20).state == "succeeded"
    (chunk,) = bench.dispatcher.chunks(batch.id)
    assert [attempt.outcome for attempt in chunk.attempts] == ["succeeded"]


# --- results after retention ----------------------------------------------------------------------


class Late:
    """A worker's engine that comes back when Cloud Run has forgotten what it had launched."""

    def __init__(self, folder: Path, database_url: str, cloud: CloudRunEmulator) -> None:
        jobs = folder / "jobs.yaml"
        jobs.write_text(JOBS.replace("ENDPOINT", cloud.grpc_address))
        config = load_config(str(jobs))
        self.ahead = 0.0
        self._closing = ExitStack()
        database = schema.create_engine(database_url, pool_size=4)
        self._closing.callback(database.dispose)
        store = Store(database, actor="worker")
        target = config.targets["cloud"]
        self._engine = Engine(
            store,
            config,
            monotonic=self.monotonic,
            backends={"cloud": CloudRunBackend("cloud", target.settings, monotonic=self.monotonic)},
            storage=Storage((folder / "storage").as_uri()),
        )
        self._closing.callback(self._engine.close)
        store.lease(
            "cloud",
            backend="cloud_run",
            limits={"results": True},
            home=None,
            lease=timedelta(hours=1),
        )
        self.dispatcher = self._closing.enter_context(
            Dispatcher(database_url=database_url, config=config)
        )

    def close(self) -> None:
        self._closing.close()

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def turn(self) -> None:
        for batch_id in self._engine.sweep():
            self._engine.plan(batch_id)
        while self._engine.launch("cloud").more:
            pass
        self._engine.follow("cloud")


def test_when_the_provider_has_forgotten_an_execution_its_receipt_decides(
    tmp_path: Path, database_url: str
) -> None:
    def script(start: TaskStart) -> TaskEnd:
        container.claim(start.environment)
        task = container.Task(start.environment)
        task._start_writer = lambda: None  # type: ignore[method-assign]  # written here
        what = task.items[0].partition(" ")[0]
        if what == "whole":
            for item in task.items:
                task.report(item, ok=True, output=item)
            task.close()
        elif what == "failed":
            task.report(task.items[0], ok=False, error="no such table")
            task.report(task.items[1], ok=True)
            task.close()
        elif what == "half":
            task.report(task.items[1], ok=True)
            task.flush()
        return TaskEnd()

    items = [f"{what} {n}" for what in ("whole", "failed", "half", "none") for n in range(2)]
    with CloudRunEmulator(script=script, options=EmulatorOptions(seed=1)) as cloud:
        cloud.world.define("project-1", "europe-west1", "etl")
        late = Late(tmp_path, database_url, cloud)
        try:
            batch = late.dispatcher.enqueue("single", items, chunk_size=2)
            until(lambda: late.turn() or len(cloud.world.executed) == 4, "its launches")  # type: ignore[func-returns-value]
            until(lambda: not cloud.world.running, "they ended")
            for execution in cloud.world.executed:
                cloud.world.forget(execution.name)

            def finished() -> bool:
                late.ahead += 10
                late.turn()
                return batch.refresh().finished

            until(finished, "the batch ended")
            outcomes = [
                [attempt.outcome for attempt in chunk.attempts]
                for chunk in late.dispatcher.chunks(batch.id)
            ]
            found = {one.item: str(one.state) for one in late.dispatcher.items(batch.id)}
            (whole, *_) = late.dispatcher.chunks(batch.id)
        finally:
            late.close()
    assert outcomes == [["succeeded"], ["lost"], ["lost"], ["lost"]]
    assert whole.attempts[0].reason == (
        "its receipt is complete; else: the provider no longer knows it"
    )
    assert [item for item, state in found.items() if state == "succeeded"] == [
        "whole 0",
        "whole 1",
        "failed 1",
        "half 1",
    ]
    assert len(cloud.world.executed) == 4
