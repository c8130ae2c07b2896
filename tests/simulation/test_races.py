"""Two real connections at once, each held where it matters: what serial steps cannot show.

A side is held by wrapping a method of its store, inside or outside of its transaction; the other
side goes on until it is done, or until Postgres says that it waits for a lock of the first.
`fire ∥ fire` is with the schedules' own tests.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import psycopg
import pytest
import sqlalchemy as sa
from lifecycle import assert_invariants
from waiting import until
from workbench import CLOCK, HERE, NOW, Bench, job, utc

from dispatcher import schema
from dispatcher.backends.local import LocalBackend, LocalSettings
from dispatcher.client import Batch, Dispatcher
from dispatcher.config import Config, Target
from dispatcher.engine import Engine
from dispatcher.errors import NotAllowed
from dispatcher.job import Job
from dispatcher.states import Outcome
from dispatcher.store import Store
from dispatcher.store.base import BaseStore
from dispatcher.testing import Ending, Fault, NullBackend

T = TypeVar("T")
PATIENCE = 60.0
RUNS = Ending(seconds=1e6)


class Hold:
    """Holds whoever comes to a method, before or after it, until `release`; once."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, owner: object, method: str, *, after: bool = False
    ) -> None:
        self._reached, self._go = Event(), Event()
        self.name = f"{'after' if after else 'before'} {method}"
        real = getattr(owner, method)

        def held(*args: Any, **kwargs: Any) -> Any:
            if not after:
                self._stop()
            result = real(*args, **kwargs)
            if after:
                self._stop()
            return result

        monkeypatch.setattr(owner, method, held)

    def _stop(self) -> None:
        if not self._reached.is_set():
            self._reached.set()
            assert self._go.wait(PATIENCE), f"nobody let it go on {self.name}"

    def wait(self) -> None:
        assert self._reached.wait(PATIENCE), f"nobody came {self.name}"

    def release(self) -> None:
        self._go.set()


@pytest.fixture
def side() -> Iterator[Callable[[Callable[[], T]], Future[T]]]:
    """Start something in a thread of its own; what it raises comes out of its result."""
    with ThreadPoolExecutor(8) as pool:
        yield pool.submit


@pytest.fixture
def make(database_url: str) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*jobs: Any, **options: Any) -> Bench:
        made.append(Bench(database_url, jobs or (job(),), **options))
        return made[0]

    yield make
    for bench in made:
        bench.close()


def other(bench: Bench) -> Engine:
    """A second worker on connections of its own."""
    return bench.worker("worker-2")


def another_app(bench: Bench) -> Dispatcher:
    """A second application on connections of its own."""
    app = Dispatcher(database_url=bench.database_url, config=bench.config, actor="app-2")
    app._store = Store(app._engine, actor="app-2", now=bench.store._now)
    bench._closing.append(app.close)
    return app


def ends(bench: Bench, batch: Batch) -> list[tuple[str, str]]:
    """Each move of a batch into a final state, from the audit."""
    return bench.sql(
        "SELECT old, new FROM dispatcher.event WHERE kind = 'batch' AND batch_id = :id"
        " AND new IN ('succeeded', 'failed', 'cancelled') ORDER BY id",
        id=batch.id,
    )


def done(*sides: Future[Any]) -> list[Any]:
    return [one.result(PATIENCE) for one in sides]


def launched(bench: Bench, items: int, name: str = "work") -> Batch:
    """A batch all of whose chunks run."""
    bench.script(RUNS)
    batch = bench.enqueue(range(items), name)
    bench.plan()
    bench.launch()
    assert set(bench.states(batch)) == {"running"}
    return batch


# --- settle, launch -------------------------------------------------------------------------------


def test_two_settles_of_the_last_two_chunks_end_the_batch_once(
    make: Any, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    second = other(bench)
    batch = launched(bench, 2)
    one, two = bench.world.handles()
    bench.world.kill(one, 0, Outcome.SUCCEEDED)
    hold = Hold(monkeypatch, bench.store, "close_attempts", after=True)
    bench.advance(60)
    first = side(lambda: bench.engine.follow(HERE))
    hold.wait()
    bench.world.kill(two, 0, Outcome.SUCCEEDED)
    last = side(lambda: second.follow(HERE))
    until(bench.waiting_for_locks, "the second settle to wait for the batch")
    assert batch.refresh().state == "running"
    hold.release()
    done(first, last)
    assert batch.refresh().state == "succeeded"
    assert ends(bench, batch) == [("running", "succeeded")]


@pytest.mark.parametrize(
    ("name", "limits"), [("work", {"max_running": 3}), ("work", {"max_executions": 3}), ("few", {})]
)
def test_two_launches_never_overshoot_a_limit(
    make: Any, side: Any, monkeypatch: pytest.MonkeyPatch, name: str, limits: dict[str, int]
) -> None:
    bench = make(job(), job("few", limits={"running": 3}), limits=limits)
    second = other(bench)
    bench.script(RUNS)
    batch = bench.enqueue(range(10), name)
    bench.plan()
    hold = Hold(monkeypatch, bench.store, "intend", after=True)
    first = side(lambda: bench.engine.launch(HERE))
    hold.wait()
    late = side(lambda: second.launch(HERE))
    until(bench.waiting_for_locks, "the second launch to wait for the target")
    hold.release()
    rounds = done(first, late)
    assert [each.calls for each in rounds] == [3, 0]
    assert sorted(bench.states(batch)) == ["pending"] * 7 + ["running"] * 3


def test_six_launchers_at_once_never_overshoot_a_limit_and_launch_each_chunk_once(
    make: Any, side: Any
) -> None:
    bench = make(limits={"max_running": 4}, settings={"task_seconds": (1.0, 3.0)})
    engines = [bench.engine, *(bench.worker(f"w{number}") for number in range(5))]
    batch = bench.enqueue(range(60))
    bench.plan()
    for _ in range(200):
        done(*[side(lambda engine=engine: engine.launch(HERE)) for engine in engines])
        assert bench.world.running() <= 4
        bench.advance(1)
        bench.follow()
        if batch.refresh().finished:
            break
    assert batch.refresh().state == "succeeded"
    assert bench.world.peak_running() <= 4
    assert bench.world.doubles() == []
    assert bench.world.calls["launch"] == 60


# --- cancel ---------------------------------------------------------------------------------------


def test_a_cancel_that_meets_a_launch_waits_for_its_claim_and_stops_what_it_starts(
    make: Any, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    bench.script(RUNS)
    batch = bench.enqueue(range(3))
    bench.plan()
    hold = Hold(monkeypatch, bench.store, "intend", after=True)
    launch = side(bench.launch)
    hold.wait()
    cancel = side(batch.cancel)
    until(bench.waiting_for_locks, "the cancel to wait for the batch")
    hold.release()
    done(launch, cancel)
    batch = bench.finish(batch)
    assert batch.state == "cancelled"
    assert bench.world.running() == 0


def test_a_launch_that_meets_a_cancel_starts_nothing(
    make: Any, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    bench.script(RUNS)
    batch = bench.enqueue(range(3))
    bench.plan()
    hold = Hold(monkeypatch, bench.dispatcher.store, "request_cancel", after=True)
    cancel = side(batch.cancel)
    hold.wait()
    launch = side(bench.launch)
    until(bench.waiting_for_locks, "the launch to wait for the batch")
    hold.release()
    done(launch, cancel)
    assert batch.refresh().state == "cancelled"
    assert bench.world.calls["launch"] == 0


@pytest.mark.parametrize("held", ["pending", "launching"])
def test_recording_handles_and_a_cancel_meet_without_a_deadlock(
    make: Any, side: Any, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    bench = make(job(options={"max_tasks": 3, "parallelism": 3}), concurrency=2)
    met: list[BaseException] = []
    raise_as_ours = BaseStore._raise_as_ours

    def note(store: BaseStore, error: Any) -> None:
        met.append(error)
        raise_as_ours(store, error)

    monkeypatch.setattr(BaseStore, "_raise_as_ours", note)
    bench.script(RUNS)
    batch = bench.enqueue(range(12))
    bench.plan()
    hold = Hold(monkeypatch, bench.store, "record_launched")
    launch = side(lambda: bench.engine.launch(HERE))
    hold.wait()
    url = bench.database_url.replace("postgresql+psycopg:", "postgresql:", 1)
    with psycopg.connect(url) as mine:
        # The test's own lock holds the one side in the middle, with its executions locked.
        mine.execute(
            "SELECT 1 FROM dispatcher.chunk WHERE batch_id = %s AND state = %s"
            " ORDER BY index DESC LIMIT 1 FOR UPDATE",
            [batch.id, held],
        )
        cancel = side(batch.cancel) if held == "pending" else None
        if cancel is None:
            hold.release()
        until(bench.waiting_for_locks, "the one side to wait for the test")
        if cancel is None:
            cancel = side(batch.cancel)
        hold.release()
        until(lambda: bench.waiting_for_locks() >= 2, "the other side to wait for the one")
    done(launch, cancel)
    assert met == [], "neither was ended for a deadlock"
    assert bench.finish(batch).state == "cancelled"
    assert bench.world.running() == 0


# --- late replies ---------------------------------------------------------------------------------


class Slow(NullBackend):
    """A null backend whose launches the test can hold, before or after they start something."""

    before: Event | None = None
    after: Event | None = None

    def __init__(self, name: str, settings: Any) -> None:
        super().__init__(name, settings)
        self.called = Event()

    def launch(self, request: Any) -> Any:
        self.called.set()
        if self.before is not None:
            assert self.before.wait(PATIENCE)
        answer = super().launch(request)
        if self.after is not None:
            assert self.after.wait(PATIENCE)
        return answer


def slow(make: Any, *, safe: bool) -> tuple[Bench, list[Slow]]:
    made: list[Slow] = []

    def wrap(inner: Any) -> Slow:
        made.append(Slow(inner.name, inner.settings))
        return made[-1]

    bench = make(wrap=wrap, settings={"relaunch_safe": safe, "find_grace": timedelta(seconds=5)})
    bench.script(RUNS)
    return bench, made


@pytest.mark.parametrize("safe", [True, False])
def test_a_reply_that_comes_after_its_execution_was_found_changes_nothing(
    make: Any, side: Any, safe: bool
) -> None:
    bench, backends = slow(make, safe=safe)
    second = other(bench)
    batch = bench.enqueue([1])
    bench.plan()
    backends[0].after = Event()
    launch = side(bench.launch)
    until(lambda: bool(bench.world.handles()), "the provider to start it")
    bench.advance(20)
    second.follow(HERE)
    assert bench.states(batch) == ["running"]
    backends[0].after.set()
    done(launch)
    assert bench.executions() == ["launched"]
    assert len(bench.world.handles()) == 1


def test_a_call_that_slept_past_every_grace_leaves_one_execution_running(
    make: Any, side: Any
) -> None:
    bench, backends = slow(make, safe=False)
    second = other(bench)
    batch = bench.enqueue([1])
    bench.plan()
    backends[0].before = Event()
    launch = side(bench.launch)
    assert backends[0].called.wait(PATIENCE), "past the last look at the time"
    assert bench.executions() == ["intended"]
    for _ in range(8):
        bench.advance(10)
        second.follow(HERE)
    assert bench.states(batch) == ["running"]
    backends[0].before.set()
    done(launch)
    assert len(bench.world.handles()) == 2, "nobody can call a call back"
    bench.until(lambda: bench.world.running() == 1, "the stray to be stopped")
    for handle in bench.world.handles():
        bench.world.kill(handle, 0, Outcome.SUCCEEDED)
    assert bench.finish(batch).state == "succeeded"
    bench.until(lambda: set(bench.executions()) == {"ended"}, "the stray to be seen to its end")


def test_an_old_look_does_not_repeat_a_call_that_another_worker_has_repeated(
    make: Any, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, _ = slow(make, safe=False)
    second, third = other(bench), bench.worker("worker-3")
    batch = bench.enqueue([1])
    bench.plan()
    bench.world.fail_next("launch", Fault.UNAVAILABLE)
    bench.launch()
    bench.advance(20)
    bench.follow()
    assert bench.sql("SELECT state, looks FROM dispatcher.execution") == [("unknown", 1)]
    bench.advance(20)
    hold = Hold(monkeypatch, bench.engine._launcher, "_repeat")
    stale = side(bench.follow)
    hold.wait()
    # Meanwhile a second worker repeats it, and dies before it can say so.
    monkeypatch.setattr(second.store, "record_launched", lambda *_, **__: set())
    monkeypatch.setattr(second.store, "record_stray", lambda *_, **__: False)
    second.follow(HERE)
    assert len(bench.world.handles()) == 1
    bench.advance(16)
    third.store.expire_calls(HERE)
    assert bench.executions() == ["unknown"]
    hold.release()
    done(stale)
    assert len(bench.world.handles()) == 1, "the old look knew nothing of the second call"
    third.follow(HERE)
    assert bench.states(batch) == ["running"]


def test_a_look_that_found_nothing_does_not_end_what_was_recorded_meanwhile(
    make: Any, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, backends = slow(make, safe=True)
    second = other(bench)
    batch = bench.enqueue([1])
    bench.plan()
    backends[0].before = Event()
    launch = side(bench.launch)
    assert backends[0].called.wait(PATIENCE), "past the last look at the time"
    assert bench.executions() == ["intended"]
    batch.cancel()
    bench.advance(20)
    second.follow(HERE)
    bench.advance(20)
    hold = Hold(monkeypatch, second.store, "lock_batches_of")
    look = side(lambda: second.follow(HERE))
    hold.wait()
    backends[0].before.set()
    done(launch)
    assert bench.executions() == ["launched"]
    hold.release()
    done(look)
    assert batch.refresh().state == "running", "cancelled is said only when it is true"
    assert bench.finish(batch).state == "cancelled"
    assert bench.world.running() == 0


# --- enqueue, plan, retry -------------------------------------------------------------------------


@pytest.mark.parametrize("first_gives_up", [False, True])
def test_two_enqueues_with_one_key_make_one_batch(
    make: Any, side: Any, monkeypatch: pytest.MonkeyPatch, first_gives_up: bool
) -> None:
    bench = make()
    app = another_app(bench)

    hold = Hold(monkeypatch, bench.dispatcher.store, "insert_batch", after=True)

    def enqueue() -> Any:
        if not first_gives_up:
            return bench.dispatcher.enqueue("work", [1, 2], key="k").id
        with bench.database.connect() as connection, connection.begin() as transaction:
            bench.dispatcher.enqueue("work", [1, 2], key="k", connection=connection)
            transaction.rollback()
        return None

    first = side(enqueue)
    hold.wait()
    second = side(lambda: app.enqueue("work", [1, 2], key="k").id)
    until(bench.waiting_for_locks, "the second enqueue to wait for the key")
    hold.release()
    one, two = done(first, second)
    assert bench.sql("SELECT id FROM dispatcher.batch") == [two]
    assert one in (two, None)
    assert bench.sql("SELECT count FROM dispatcher.item_page") == [2]


def test_two_planners_of_a_batch_cut_it_once(
    make: Any, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    second = other(bench)
    batch = bench.enqueue(range(5))
    hold = Hold(monkeypatch, bench.engine._planner, "_plan", after=True)
    plan = side(lambda: bench.engine.plan(batch.id))
    hold.wait()
    assert second.plan(batch.id) is None, "it does not wait for the one who plans"
    assert batch.refresh().state == "planning"
    hold.release()
    assert done(plan) == [HERE]
    assert second.plan(batch.id) is None
    assert bench.states(batch) == ["pending"] * 5


def test_a_cancel_does_not_wait_for_a_plan_and_the_plan_takes_itself_back(
    make: Any, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    batch = bench.enqueue(range(5))
    hold = Hold(monkeypatch, bench.engine._planner, "_items")
    plan = side(lambda: bench.engine.plan(batch.id))
    hold.wait()
    assert batch.cancel().state == "cancelled"
    hold.release()
    assert done(plan) == [None]
    assert batch.refresh().state == "cancelled"
    assert bench.states(batch) == []


def test_a_plan_that_is_about_to_commit_makes_a_cancel_wait_and_is_cancelled_then(
    make: Any, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    batch = bench.enqueue(range(5))
    hold = Hold(monkeypatch, bench.engine._planner, "_plan", after=True)
    plan = side(lambda: bench.engine.plan(batch.id))
    hold.wait()
    cancel = side(batch.cancel)
    until(bench.waiting_for_locks, "the cancel to wait for the plan")
    hold.release()
    done(plan, cancel)
    assert batch.refresh().state == "cancelled"
    assert bench.states(batch) == ["cancelled"] * 5


def test_two_retries_reopen_a_batch_once(
    make: Any, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(job(retry={"attempts": 1}))
    app = another_app(bench)
    bench.script(Ending(Outcome.FAILED), Ending(seconds=1))
    batch = bench.finish(bench.enqueue(range(2)))
    assert batch.state == "failed"
    hold = Hold(monkeypatch, bench.dispatcher.store, "retry", after=True)
    first = side(lambda: bench.dispatcher.retry(batch.id))
    hold.wait()
    second = side(lambda: app.retry(batch.id))
    until(bench.waiting_for_locks, "the second retry to wait for the batch")
    hold.release()
    done(first)
    with pytest.raises(NotAllowed, match="is running"):
        done(second)
    assert bench.sql(
        "SELECT count(*) FROM dispatcher.event WHERE reason = 'retry' AND kind = 'chunk'"
    ) == [2]
    assert bench.finish(batch).state == "succeeded"


# --- a process that is stopped --------------------------------------------------------------------

SLEEPER = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from simulation.test_races import lease, worker

    engine = worker("sleeper", {url!r}, {spool!r})
    store, backend = engine.store, engine.places["here"].backend

    def asleep(real):
        def stopped(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGSTOP)
            return real(*args, **kwargs)
        return stopped

    owner, method = {where}
    setattr(owner, method, asleep(getattr(owner, method)))
    assert lease(engine) is None
    engine.launch("here")
    engine.close()
"""


def worker(actor: str, url: str, spool: str) -> Engine:
    """A worker whose provider is this machine and whose clocks are all the bench's."""
    config = local(spool)
    store = Store(schema.create_engine(url), actor=actor, now=NOW)
    backend = LocalBackend(HERE, config.targets[HERE].settings)
    return Engine(
        store, config, monotonic=lambda: store.now().timestamp(), backends={HERE: backend}
    )


def local(spool: str) -> Config:
    settings = LocalSettings(spool=Path(spool), stop_grace=0.2)
    target = Target(name=HERE, backend="local", settings=settings)
    command = ["sh", "-c", 'echo "$ITEM" >> "$OUT"; until [ -e "$GO_ON" ]; do sleep 0.05; done']
    env = {"ITEM": "{items:csv}", "OUT": f"{spool}/out", "GO_ON": f"{spool}/go-on"}
    once = Job.model_validate({"name": "once", "target": HERE, "command": command, "env": env})
    return Config({HERE: target}, {"once": once}, "test")


def advance(store: Store, seconds: float) -> None:
    with store.engine.begin() as tx:
        by = {"by": timedelta(seconds=seconds)}
        tx.execute(sa.text("UPDATE public.bench_clock SET at = at + :by"), by)


def lease(engine: Engine) -> str | None:
    home = engine.places[HERE].home
    return engine.store.lease(
        HERE, backend="local", limits={}, home=home, lease=timedelta(seconds=15)
    )


def lines(spool: Path) -> list[str]:
    out = spool / "out"
    return out.read_text().split() if out.exists() else []


def is_stopped(process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "it ended, and never came to where it was to stop"
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "where", ['(engine._launcher, "_call")', '(backend, "launch")', '(store, "record_launched")']
)
def test_a_launcher_that_is_stopped_past_lease_and_grace_and_goes_on_runs_nothing_twice(
    database_url: str, tmp_path: Path, where: str
) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    app = Dispatcher(database_url=database_url, config=local(str(spool)), actor="app")
    engine = worker("other", database_url, str(spool))
    store, backend = engine.store, engine.places[HERE].backend
    with store.engine.begin() as tx:
        for statement in CLOCK:
            tx.execute(sa.text(statement))
    script = textwrap.dedent(SLEEPER).format(
        tests=str(Path(__file__).parents[1]), spool=str(spool), url=database_url, where=where
    )
    batch = app.enqueue("once", ["it"])
    engine.plan(batch.id)
    sleeper = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)

    def turn() -> None:
        advance(store, 1)
        engine.sweep()
        engine.launch(HERE)
        engine.follow(HERE)

    def running() -> bool:
        turn()
        return next(app.chunks(batch.id)).state == "running"

    def over() -> bool:
        turn()
        engine.sweep_strays(HERE)
        with store.transaction() as tx:
            left = store.run(
                tx, "SELECT count(*) FROM dispatcher.execution WHERE state <> 'ended'"
            ).scalar_one()
        return batch.refresh().finished and left == 0

    try:
        until(lambda: is_stopped(sleeper), "the launcher to be stopped")
        assert lease(engine) == "target here is led by sleeper"
        advance(store, 60)
        assert lease(engine) is None, "that lease has run out"
        until(running, "the other worker to take the launch over")
        until(lambda: lines(spool) == ["it"], "the command to run")
        sleeper.send_signal(signal.SIGCONT)
        assert sleeper.wait(PATIENCE) == 0
        (spool / "go-on").touch()
        until(over, "the batch to end, and no stray to be left")
        assert batch.refresh().state == "succeeded"
        assert lines(spool) == ["it"], "it ran once"
        assert list(backend.strays(_instance(store), utc(-3600))) == []
        with store.engine.connect() as connection:
            assert_invariants(connection)
    finally:
        (spool / "go-on").touch()
        if sleeper.poll() is None:
            sleeper.send_signal(signal.SIGCONT)
            sleeper.kill()
            sleeper.wait()
        engine.close()
        app.close()
        store.engine.dispose()


def _instance(store: Store) -> str:
    with store.transaction() as tx:
        return store.instance(tx)
