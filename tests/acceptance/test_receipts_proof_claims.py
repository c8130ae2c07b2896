"""Claims and receipts where the provider cannot be relied on: doubles are made, records vanish.

Cloud Run is the emulator. Its tasks take their part with the container's own helper, run in this
process: thousands of them cost no more than their files.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest
import sqlalchemy as sa
from launch_once import (
    LATEST,
    LAUNCHES,
    LONGEST,
    SEED,
    assert_all_struck,
    hurry,
    kill_every_second,
    misbehave,
    staff,
)
from waiting import until
from workbench import HERE, Bench, job

from dispatcher import container, schema
from dispatcher.backends.cloud_run import CloudRunBackend
from dispatcher.client import Dispatcher
from dispatcher.config import load_config
from dispatcher.emulators.cloud_run import CloudRunEmulator, EmulatorOptions, TaskEnd, TaskStart
from dispatcher.emulators.cloud_run.faults import slow_cancel, slow_start
from dispatcher.engine import Engine
from dispatcher.storage import Storage
from dispatcher.store import Store
from dispatcher.testing import Fault
from installation import Nursery, Site

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
    call_timeout: 2s
    find_grace: 1s
    poll_interval: 0.5s
    tasks_interval: 0.5s
jobs:
  single: &etl
    target: cloud
    options: {job: etl}
    receipt: required
    retry: {attempts: 1, infrastructure_attempts: 3, initial: 1s}
  packed:
    <<: *etl
    chunk: {size: 2}
    options: {job: etl, max_tasks: 5}
"""


PACKS: Final = 50
"""Launches of five chunks, which have two items each; the others are of one item."""

DOUBLED: Final = 5
"""Keys of which a second execution must have come to be, or it would prove nothing."""


FIRST: Final = '["single-0"]'
"""The items of the chunk that works for the longest time."""


class Containers:
    """The image: each task claims, works for a while, then does the effect of each of its items.

    Attributes:
        did: the executions that did the effect of each item.
        left: how executions ended that left because another one had claimed their work.
    """

    def __init__(self) -> None:
        self.did: dict[str, list[str]] = {}
        self.left: dict[str, int] = {}
        self._chance = random.Random(5)  # noqa: S311 - how long a task takes

    def script(self, start: TaskStart) -> TaskEnd:
        try:
            container.claim(start.environment)
        except SystemExit as lost:
            code = self.left[start.execution] = int(str(lost.code))
            return TaskEnd(exit_code=code)

        def work() -> None:
            task = container.Task(start.environment)
            for item in task.items:
                self.did.setdefault(item, []).append(start.execution)
                task.report(item, ok=True)
            task.close()

        seconds = LONGEST if start.env.get("DISPATCH_ITEMS") == FIRST else self._seconds()
        return TaskEnd(seconds=seconds, effect=work)

    def _seconds(self) -> float:
        return self._chance.uniform(0.5, 2.5)


def assert_losers_did_nothing(
    containers: Containers,
    doubled: Mapping[str, set[str]],
    followed: Mapping[str, str],
    claims: Path,
) -> None:
    """Look whether whoever came second left at once, and whoever came first was followed."""
    worked = {name for names in containers.did.values() for name in names}
    assert containers.left
    assert set(containers.left.values()) == {94}
    assert not worked & set(containers.left)
    for key, names in doubled.items():
        claimed = (claims / key).read_text()
        if claimed == "nobody":  # it was given up before one of them began
            assert not names & worked
            continue
        (worker,) = names & worked
        assert worker.endswith(f"/{claimed}")
        assert followed[key] == worker, "who holds the claim is followed"


@pytest.mark.long
@pytest.mark.timeout(700)
def test_where_launches_are_doubled_each_items_effect_comes_once(site: Site) -> None:
    containers = Containers()
    with CloudRunEmulator(script=containers.script, options=EmulatorOptions(seed=SEED)) as cloud:
        cloud.world.define("project-1", "europe-west1", "etl")
        site.write_jobs(JOBS.replace("ENDPOINT", cloud.grpc_address))
        site.environment["DISPATCHER_STORAGE_URL"] = (site.folder / "storage").as_uri()
        hurry(site)
        misbehave(cloud, list_lag=9.0)  # longer than a launch is looked for before it is repeated
        cloud.faults.add(slow_start(2.0, share=0.3), slow_cancel(2.0))
        singles = [f"single-{n}" for n in range(LAUNCHES - PACKS)]
        packed = [f"packed-{n}" for n in range(PACKS * 5 * 2)]
        nursery = Nursery(site)
        try:
            workers = staff(nursery)
            with site.dispatcher() as dispatcher:
                batches = [
                    dispatcher.enqueue("single", singles),
                    dispatcher.enqueue("packed", packed),
                ]
                toll = kill_every_second(site, nursery, workers, cloud, *batches)
                ended = [dispatcher.wait(batch.id, LATEST) for batch in batches]
                attempts = [
                    attempt
                    for batch in ended
                    for chunk in dispatcher.chunks(batch.id)
                    for attempt in chunk.attempts
                ]
            until(lambda: not cloud.world.running, "no double runs on")
        except BaseException:
            print(site.logs())  # noqa: T201 - shown by pytest where it failed
            raise
        finally:
            nursery.close()
        figures = assert_all_struck(cloud, toll)
        rows = site.sql("SELECT key, handle FROM dispatcher.execution WHERE NOT stray")
        followed = {str(key): str(handle) for key, handle in rows}
        executions: dict[str, set[str]] = {}
        for one in cloud.world.executed:
            executions.setdefault(one.env["DISPATCH_KEY"], set()).add(one.name)

    doubled = {key: names for key, names in executions.items() if len(names) > 1}
    print(  # noqa: T201 - the figures of the proof
        f"{figures}, {len(cloud.world.executed)} executions, {len(doubled)} keys doubled, "
        f"{len(containers.left)} left"
    )
    assert [batch.state for batch in ended] == ["succeeded"] * 2, figures
    times = {item: len(executions) for item, executions in containers.did.items()}
    assert times == dict.fromkeys([*singles, *packed], 1)
    outcomes = Counter(attempt.outcome for attempt in attempts)
    assert outcomes.pop("succeeded") == len(singles) + PACKS * 5
    # Five calls in a row that came to nothing end an attempt, or a pack of five: hardly ever.
    assert set(outcomes) <= {"start_failed"}
    assert outcomes.total() <= 10, "none of it costs an attempt"
    assert len(doubled) >= DOUBLED, figures
    assert_losers_did_nothing(containers, doubled, followed, site.folder / "storage" / "claims")


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
        once = JOBS.replace("infrastructure_attempts: 3", "infrastructure_attempts: 1")
        jobs.write_text(once.replace("ENDPOINT", cloud.grpc_address))
        config = load_config(str(jobs))
        self.ahead = 0.0
        self._closing = ExitStack()
        database = schema.create_engine(database_url, pool_size=4)
        self._closing.callback(database.dispose)
        self._database = database
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

    def advance(self, seconds: float) -> None:
        """Let time pass, by the clock of the process and by the database's."""
        self.ahead += seconds
        with self._database.begin() as tx:
            tx.execute(
                sa.text(
                    "UPDATE dispatcher.execution"
                    " SET absent_since = absent_since - make_interval(secs => :seconds)"
                ),
                {"seconds": seconds},
            )

    def launch(self) -> None:
        for batch_id in self._engine.sweep():
            self._engine.plan(batch_id)
        while self._engine.launch("cloud").more:
            pass

    def turn(self) -> None:
        self.launch()
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
            # Nobody follows what is launched: it ends, and is forgotten, before anybody looks.
            until(lambda: late.launch() or len(cloud.world.executed) == 4, "its launches")  # type: ignore[func-returns-value]
            until(lambda: not cloud.world.running, "they ended")
            for execution in cloud.world.executed:
                cloud.world.forget(execution.name)

            def finished() -> bool:
                late.advance(10)
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
    assert outcomes == [["succeeded"], ["failed"], ["lost"], ["lost"]]
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
