"""A worker's clock over a database that makes trouble: it goes on, or its process ends.

Here the time is the real one, as the clock's own is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from waiting import until
from workbench import job

from dispatcher.client import Batch, Dispatcher
from dispatcher.config import Config, Settings, Target
from dispatcher.engine import Engine
from dispatcher.errors import DispatcherError, Unreachable
from dispatcher.schedule import Schedule
from dispatcher.schema import create_engine
from dispatcher.storage import Storage, StorageRefused
from dispatcher.store import Store
from dispatcher.store.base import Conflict
from dispatcher.testing import NullSettings, NullWorld
from dispatcher.wake import PLAN, Waker
from workers import clock as clock_module
from workers import steps
from workers.clock import CRASHED, LOOKS, Clock
from workers.runtime import Runtime
from workers.storage_watch import StorageWatch

TARGETS = ("here", "there")


class Taps(Waker):
    """Keeps the taps instead of sending them."""

    def __init__(self) -> None:
        super().__init__(None)
        self.kept: list[tuple[str, dict[str, str]]] = []

    def tap(self, name: str, **kwargs: str) -> None:
        self.kept.append((name, kwargs))


class SlowEngine(Engine):
    """Plans some batches only when the test lets it, as if their item sources took their time."""

    slow: frozenset[str] = frozenset()

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.go_on = threading.Event()
        self.began: list[str] = []

    def plan(self, batch_id: str) -> str | None:
        self.began.append(batch_id)
        if batch_id in self.slow:
            assert self.go_on.wait(60)
        return super().plan(batch_id)


class Works:
    """A worker's parts without Celery, and an application beside it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.database = create_engine(url)
        self.schedules: dict[str, Schedule] = {}
        targets = {
            name: Target(name=name, backend="null", settings=NullSettings())
            for name in (*TARGETS, "unserved")
        }
        jobs = {
            one.name: one
            for one in (
                job(),
                job("listed", items={"source": "nowhere:rows"}),
                job("foreign", target="unserved"),
            )
        }
        self.known = Config(targets, jobs, "test")
        self.served = Config(
            {name: targets[name] for name in TARGETS}, jobs, "test", self.schedules
        )
        self.app = Dispatcher(database_url=url, config=self.known, actor="app")
        self.store = Store(create_engine(url, worker=True), actor="worker")
        self.engine = SlowEngine(self.store, self.served)
        self.taps = Taps()
        self.run = Runtime(
            Settings(
                database_url=url,
                heartbeat=timedelta(seconds=0.3),
                lease=timedelta(seconds=5),
                sweep_interval=timedelta(seconds=0.1),
            ),
            self.served,
            self.store,
            self.engine,
            self.taps,
        )
        self.clocks: list[Clock] = []
        self.ends: list[int] = []

    def clock(self, **more: Any) -> Clock:
        clock = Clock(self.run, end=self.ends.append, **more)
        self.clocks.append(clock)
        clock.start()
        return clock

    def close(self) -> None:
        self.engine.go_on.set()
        for clock in self.clocks:
            clock.stop(60)
            clock._pool.shutdown(wait=True)
        self.engine.close()
        self.app.close()
        self.store.engine.dispose()
        self.database.dispose()
        for name in TARGETS:
            NullWorld.forget(name)

    def sql(self, statement: str, **values: Any) -> list[Any]:
        with self.database.begin() as tx:
            rows = tx.execute(sa.text(statement), values)
            return list(rows) if rows.returns_rows else []

    def leased(self, name: str) -> bool:
        return bool(
            self.sql(
                "SELECT 1 FROM dispatcher.target"
                " WHERE name = :name AND lease_owner = 'worker' AND lease_until > now()",
                name=name,
            )
        )

    def beats(self) -> bool:
        """Wait for another heartbeat; whether one comes."""
        (last,) = self.sql("SELECT max(heartbeat_at) FROM dispatcher.worker")[0]
        until(
            lambda: bool(
                self.sql(
                    "SELECT 1 FROM dispatcher.worker"
                    " WHERE CAST(:last AS timestamptz) IS NULL OR heartbeat_at > :last",
                    last=last,
                )
            ),
            "another heartbeat",
        )
        return True

    def waits_for_a_lock(self) -> bool:
        return bool(
            self.sql(
                "SELECT 1 FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
        )

    def wait_for_the_end_of(self, pid: int) -> None:
        until(
            lambda: not self.sql("SELECT 1 FROM pg_stat_activity WHERE pid = :pid", pid=pid),
            "the server to end the connection",
        )

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Another session keeps a target's row, as a process does that was stopped in a launch."""
        self.sql(
            "INSERT INTO dispatcher.target (name, backend, limits) VALUES (:name, 'null', '{}')"
            " ON CONFLICT DO NOTHING",
            name=name,
        )
        with self.database.begin() as tx:
            tx.execute(
                sa.text("SELECT 1 FROM dispatcher.target WHERE name = :name FOR UPDATE"),
                {"name": name},
            )
            yield

    def refuse(self, table: str, event: str, batch: Batch) -> None:
        """Let the database raise whenever a batch's rows are touched, as nobody expects."""
        key = "id" if table == "batch" else "batch_id"
        self.sql(
            "CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql"
            " AS 'BEGIN RAISE EXCEPTION ''broken row''; END'"
        )
        self.sql(
            f"CREATE TRIGGER refuse BEFORE {event} ON dispatcher.{table} FOR EACH ROW"
            f" WHEN (NEW.{key} = '{batch.id}') EXECUTE FUNCTION public.refuse()"
        )


@pytest.fixture
def works(database_url: str) -> Iterator[Works]:
    made = Works(database_url)
    yield made
    made.close()


def states(batches: Iterable[Batch]) -> list[str]:
    return [batch.refresh().state.value for batch in batches]


# --- a row that another process keeps -------------------------------------------------------------


def test_a_row_that_a_stopped_process_keeps_stops_neither_other_leases_nor_the_heartbeat(
    works: Works,
) -> None:
    with works.holding("here"):
        works.clock()
        until(lambda: works.leased("there"), "the lease of the other target")
        assert works.beats()
        assert not works.leased("here")
    until(lambda: works.leased("here"), "the lease of the target that was let go")
    assert works.ends == []


def test_a_worker_that_is_stopped_in_a_slow_beat_ends_in_order(works: Works) -> None:
    clock = works.clock()
    until(lambda: all(map(works.leased, TARGETS)), "both leases")
    with works.holding("here"):
        until(works.waits_for_a_lock, "the beat to wait for the row")
        clock.stop(timeout=0)
        clock._thread.join(60)
    assert not clock._thread.is_alive()
    assert works.ends == []
    assert not works.leased("there"), "given back"


def test_a_loop_that_stands_still_ends_the_process(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(works.store, "beat", lambda **_: go_on.wait(60))
    works.clock(stuck_after=0.5)
    try:
        until(lambda: works.ends == [CRASHED], "the end of the process")
    finally:
        go_on.set()


def test_a_loop_ticks_also_while_a_row_is_kept_from_it(works: Works) -> None:
    with works.holding("here"):
        clock = works.clock()
        for _ in range(4):
            seen = clock._ticks
            assert works.beats()
            until(lambda seen=seen: clock._ticks > seen, "a tick")
    assert works.ends == []


class Looks(threading.Event):
    """Has the watchdog look without waiting, and its loop tick between some of the looks."""

    def __init__(self, clock: Clock, every: int, looks: int) -> None:
        super().__init__()
        self.clock, self.every, self.looks = clock, every, looks
        self.made = 0

    def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002 - nobody waits
        if self.made == self.looks:
            return True
        self.made += 1
        if self.made % self.every == 0:
            self.clock._ticks += 1
        return False


@pytest.mark.parametrize(
    ("every", "made", "ends"), [(LOOKS, 10 * LOOKS, []), (10 * LOOKS, LOOKS, [CRASHED])]
)
def test_only_a_loop_that_has_not_ticked_for_so_many_looks_is_ended(
    works: Works, every: int, made: int, ends: list[int]
) -> None:
    clock = Clock(works.run, end=works.ends.append)
    clock._stopping = looks = Looks(clock, every, 10 * LOOKS)
    clock._watch()
    assert (looks.made, works.ends) == (made, ends)


def test_workers_give_up_a_lock_and_an_idle_transaction_and_applications_keep_theirs(
    works: Works,
) -> None:
    asked = (
        "SELECT current_setting('lock_timeout'),"
        " current_setting('idle_in_transaction_session_timeout')"
    )
    with works.store.transaction() as tx:
        assert tuple(works.store.run(tx, asked).one()) == ("10s", "20s")
    with works.app.store.transaction() as tx:
        assert tuple(works.app.store.run(tx, asked).one()) == ("0", "10min")
        raw = tx.connection.driver_connection
        assert raw is not None
        given = raw.info.get_parameters()
    assert {k: v for k, v in given.items() if k.startswith(("keepalives_", "tcp_"))} == {
        "keepalives_idle": "10",
        "keepalives_interval": "5",
        "keepalives_count": "3",
        "tcp_user_timeout": "20000",
    }


# --- a server that goes away ----------------------------------------------------------------------


def pid(store: Store) -> int:
    with store.transaction() as tx:
        return int(store.run(tx, "SELECT pg_backend_pid()").scalar_one())


def test_a_server_that_became_read_only_is_unreachable_and_its_connections_are_left(
    works: Works,
) -> None:
    def write() -> None:
        with works.store.transaction() as tx:
            works.store.run(tx, "SET TRANSACTION READ ONLY")
            works.store.run(tx, "UPDATE dispatcher.target SET down_calls = 0")

    before = pid(works.store)
    with pytest.raises(Unreachable, match="read-only"):
        write()
    assert pid(works.store) != before


@pytest.mark.parametrize("how", ["an idle transaction is ended", "a connection is ended"])
def test_a_transaction_that_the_server_ends_is_unreachable_and_the_next_one_works(
    works: Works, how: str
) -> None:
    met: list[int] = []

    def work() -> None:
        with works.store.transaction() as tx:
            met.append(works.store.run(tx, "SELECT pg_backend_pid()").scalar_one())
            if how == "an idle transaction is ended":
                works.store.run(tx, "SET LOCAL idle_in_transaction_session_timeout = '50ms'")
            else:
                works.sql("SELECT pg_terminate_backend(:pid)", pid=met[0])
            works.wait_for_the_end_of(met[0])
            works.store.run(tx, "SELECT 1")

    with pytest.raises(Unreachable):
        work()
    assert pid(works.store) != met[0]


def test_a_connection_that_is_ended_before_a_copy_is_unreachable(works: Works) -> None:
    batch = works.app.enqueue("work", [1])

    def plan() -> None:
        with works.store.planning(batch.id) as planning:
            assert planning is not None
            mine = works.store.run(planning._tx, "SELECT pg_backend_pid()").scalar_one()
            planning._store = Quiet()  # type: ignore[assignment]  # so that only COPY can meet it
            works.sql("SELECT pg_terminate_backend(:pid)", pid=mine)
            works.wait_for_the_end_of(mine)
            planning.write([(0, 1, None, "[1]")])

    with pytest.raises(Unreachable):
        plan()
    assert works.engine.plan(batch.id) == "here", "and the pool is sound"


class Quiet:
    """Answers what time it is without asking the database."""

    def run(self, *_: object) -> Quiet:
        return self

    def scalar_one(self) -> str:
        return "2026-01-01T00:00:00Z"


def test_a_clock_outlives_a_failover(works: Works) -> None:
    works.clock()
    assert works.beats()
    name = works.database.url.database
    works.sql(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    # One that was begun before and is listed only now can still write.
    until(lambda: cut(works) and refuses_writes(works.store), "the new connections to be read-only")
    with works.database.begin() as tx:
        tx.execute(sa.text("SET TRANSACTION READ WRITE"))
        tx.execute(sa.text(f'ALTER DATABASE "{name}" RESET default_transaction_read_only'))
    assert works.beats()
    assert works.ends == []


def cut(works: Works) -> bool:
    """End all connections but the one that does it."""
    works.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    return True


def refuses_writes(store: Store) -> bool:
    """Whether a server refuses a heartbeat; a connection that was ended refuses nothing."""
    try:
        store.beat(host="h", pid=1, version="1", problems={})
    except Unreachable as error:
        return "read-only" in str(error)
    return False


# --- one thing that fails or takes long keeps nothing else ----------------------------------------


def every_minute(name: str, **more: Any) -> Schedule:
    return Schedule(name=name, cron="* * * * *", job="listed", **more)


def missed(works: Works, *names: str) -> None:
    """Schedules that have fired an hour ago and not since."""
    for name in names:
        works.sql(
            "INSERT INTO dispatcher.schedule_firing (schedule, due_at, fired_at, actor)"
            " VALUES (:name, now() - interval '1 hour', now(), 'w')",
            name=name,
        )


def test_item_sources_that_take_minutes_hold_up_neither_schedules_nor_deadlines(
    works: Works,
) -> None:
    slow = [works.app.enqueue("work", [1]) for _ in range(2)]
    works.engine.slow = frozenset(batch.id for batch in slow)
    works.clock()
    until(lambda: works.engine.slow <= set(works.engine.began), "both plans to begin")
    missed(works, "nightly")
    works.schedules["nightly"] = every_minute("nightly")
    late = works.app.enqueue("work", [1])
    works.sql("UPDATE dispatcher.batch SET deadline = now() WHERE id = :id", id=late.id)
    until(
        lambda: bool(
            works.sql("SELECT 1 FROM dispatcher.schedule_firing WHERE batch_id IS NOT NULL")
        ),
        "the schedule to fire",
    )
    until(lambda: late.refresh().finished, "the deadline to be kept")
    assert sorted(works.engine.began) == sorted(works.engine.slow), "each is planned by one thread"
    works.engine.go_on.set()
    until(lambda: set(states(slow)) == {"succeeded"}, "the slow ones to go on")


def test_while_one_item_source_takes_minutes_other_batches_are_planned(works: Works) -> None:
    slow = works.app.enqueue("work", [1])
    works.engine.slow = frozenset([slow.id])
    quick = [works.app.enqueue("work", [1]) for _ in range(3)]
    works.clock()
    until(lambda: set(states(quick)) == {"succeeded"}, "the quick ones to end")
    assert states([slow]) == ["planning"]


def test_batches_of_targets_that_are_not_served_here_do_not_hide_ours(works: Works) -> None:
    for _ in range(25):
        works.app.enqueue("foreign", [1])
    ours = works.app.enqueue("work", [1])
    assert works.engine.sweep() == [ours.id]
    steps.plan_waiting(works.run)
    assert states([ours]) == ["running"]


def test_a_plan_that_meets_a_fault_steps_back_and_says_why(works: Works) -> None:
    broken, sound = (works.app.enqueue("work", [1]) for _ in range(2))
    works.refuse("chunk", "INSERT", broken)
    steps.plan_waiting(works.run)
    assert states([broken, sound]) == ["planning", "running"]
    reason = broken.refresh().reason
    assert reason is not None
    assert reason.startswith("planning failed: ")
    assert "broken row" in reason
    assert works.engine.sweep() == [], "not before a minute has passed"


def test_a_batch_that_cannot_be_ended_keeps_no_other_from_its_deadline(works: Works) -> None:
    batches = sorted((works.app.enqueue("work", [1]) for _ in range(2)), key=lambda b: b.id)
    works.sql("UPDATE dispatcher.batch SET deadline = now()")
    works.refuse("batch", "UPDATE", batches[0])
    works.engine.sweep()
    assert states(batches) == ["planning", "failed"]


def test_a_batch_that_cannot_be_ended_keeps_no_other_from_its_end(works: Works) -> None:
    batches = sorted((works.app.enqueue("work", [1]) for _ in range(2)), key=lambda b: b.id)
    for batch in batches:
        works.engine.plan(batch.id)
    works.sql("UPDATE dispatcher.chunk SET state = 'cancelled', finished_at = now()")
    works.refuse("batch", "UPDATE", batches[0])
    works.engine.sweep()
    assert batches[0].refresh().finished is False
    assert batches[1].refresh().finished is True


def test_a_schedule_that_cannot_be_fired_keeps_no_other_from_it(works: Works) -> None:
    works.schedules["bad"] = Schedule.model_construct(name="bad", cron="nonsense", job="listed")
    works.schedules["good"] = every_minute("good")
    missed(works, "bad", "good")
    assert len(works.engine.fire()) == 1


def test_beats_sweep_asks_for_plans_and_makes_none(works: Works) -> None:
    works.schedules["nightly"] = every_minute("nightly")
    missed(works, "nightly")
    waiting = works.app.enqueue("work", [1])
    steps.sweep(works.run)
    assert works.engine.began == []
    asked = [kwargs["batch_id"] for name, kwargs in works.taps.kept if name == PLAN]
    assert waiting.id in asked
    assert len(asked) == len(set(asked)) == 2


def test_errors_of_the_database_are_ours_and_others_stay_what_they_are(works: Works) -> None:
    assert issubclass(Conflict, DispatcherError)
    with pytest.raises(sa.exc.DataError), works.store.transaction() as tx:
        works.store.run(tx, "SELECT 1 / 0")


class Held(Storage):
    """A storage of which nothing comes back until the test lets it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.go_on = threading.Event()
        self.looks = 0

    def check(self) -> None:
        self.looks += 1
        assert self.go_on.wait(60)
        super().check()


@pytest.fixture
def stored(
    works: Works, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Works, Held, Path]]:
    """Works whose storage is a file, where a directory should be; looked at every moment."""
    monkeypatch.setattr(clock_module, "MENDING_EVERY", 0.1)
    monkeypatch.setattr(clock_module, "STORAGE_EVERY", 0.1)
    place = tmp_path / "store"
    place.write_text("")
    storage = Held(place.as_uri())
    for one in works.engine.places.values():
        one.storage = storage
    yield works, storage, place
    storage.go_on.set()


def told(works: Works, name: str) -> str | None:
    rows = works.sql(
        "SELECT limits ->> 'storage_problem' FROM dispatcher.target WHERE name = :name", name=name
    )
    return rows[0][0] if rows else None


def test_a_storage_that_hangs_holds_up_neither_leases_nor_the_heartbeat(
    stored: tuple[Works, Held, Path],
) -> None:
    works, storage, _ = stored
    works.clock()
    until(lambda: storage.looks > 0, "a look at the storage")
    assert works.beats()
    until(lambda: all(map(works.leased, TARGETS)), "both leases")
    batch = works.app.enqueue("work", [1])
    assert batch.wait(timeout=60).state == "succeeded"
    assert (storage.looks, told(works, TARGETS[0])) == (1, None)


def test_a_leader_tells_what_has_to_be_mended_at_the_storage_until_it_works(
    stored: tuple[Works, Held, Path],
) -> None:
    works, storage, place = stored
    storage.go_on.set()
    works.clock()
    for name in TARGETS:
        until(lambda name=name: told(works, name) is not None, "the leader's word")
    assert f"cannot read {place.as_uri()}/checks/" in (told(works, TARGETS[0]) or "")
    place.unlink()
    until(lambda: told(works, TARGETS[0]) is None, "the leader takes it back")


def test_a_storage_that_does_not_answer_takes_nothing_back_and_is_no_problem_to_mend(
    stored: tuple[Works, Held, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    works, storage, _ = stored
    watch = StorageWatch(storage, signs=False)
    answers: list[Exception | None] = [Unreachable("timed out"), StorageRefused("no bucket")]
    answers += [Unreachable("timed out"), None]

    def answer() -> None:
        error = answers.pop(0)
        if error is not None:
            raise error

    monkeypatch.setattr(storage, "check", answer)
    place = works.engine.places[TARGETS[0]]
    seen = [(watch.look(), watch.told(place).storage_problem) for _ in range(4)]
    assert seen == [(False, None), (True, "no bucket"), (False, "no bucket"), (True, None)]


def test_a_storage_that_stays_as_wrong_as_it_was_is_told_once(
    stored: tuple[Works, Held, Path],
) -> None:
    _, storage, _ = stored
    storage.go_on.set()
    watch = StorageWatch(storage, signs=False)
    assert [watch.look(), watch.look()] == [True, False]


def test_where_a_job_signs_urls_the_signing_is_looked_at_too(
    stored: tuple[Works, Held, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    works, storage, _ = stored

    def refuse() -> None:
        raise StorageRefused("403: Request is not valid yet")

    monkeypatch.setattr(storage, "check", lambda: None)
    monkeypatch.setattr(storage, "check_signing", refuse)
    place = works.engine.places[TARGETS[0]]
    for signs, problem in ((False, None), (True, "403: Request is not valid yet")):
        watch = StorageWatch(storage, signs=signs)
        assert watch.look() is signs
        assert watch.told(place)[2:] == (None, problem)


def test_room_is_made_on_each_target_that_a_worker_leads(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(works.engine, "make_room", made.append)
    works.clock()
    until(lambda: set(made) == set(TARGETS), "room was made on both")
