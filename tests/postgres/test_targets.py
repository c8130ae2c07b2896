"""Who leads a target, where it can be served, and what is known of a provider that is down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from threading import Barrier, Thread
from typing import Any

import pytest
import sqlalchemy as sa
from workbench import HERE, Bench, job

from dispatcher import budget, queries
from dispatcher.backends.base import Unavailable
from dispatcher.engine.metering import TargetMeter
from dispatcher.store import Store
from dispatcher.store.base import Conflict
from dispatcher.testing import Ending, Fault
from workers.clock import STUCK_AFTER

MakeBench = Callable[..., Bench]
LEASE = timedelta(seconds=15)


def lease(store: Store, home: Mapping[str, str] | None = None, name: str = "there") -> str | None:
    return store.lease(name, backend="null", limits={"max_running": 3}, home=home, lease=LEASE)


def row(bench: Bench, columns: str, name: str = "there") -> Any:
    (found,) = bench.sql(
        f"SELECT {columns} FROM dispatcher.target WHERE name = :name",  # noqa: S608 - a constant
        name=name,
    )
    return found


def test_a_lease_is_taken_kept_and_refused_to_others_until_it_ends(bench: Bench) -> None:
    mine, theirs = bench.store, bench.worker("worker-2").store
    assert lease(mine) is None
    assert row(bench, "lease_owner, lease_token") == ("worker-1", 1)
    assert lease(theirs) == "target there is led by worker-1"
    bench.advance(10)
    assert lease(mine) is None
    bench.advance(14)
    assert lease(theirs) == "target there is led by worker-1", "it was renewed"
    assert row(bench, "lease_token") == 1
    bench.advance(1)
    assert lease(theirs) is None
    assert row(bench, "lease_owner, lease_token") == ("worker-2", 2)
    assert lease(mine) == "target there is led by worker-2"


def test_a_lease_that_is_given_back_is_free_at_once(bench: Bench) -> None:
    mine, theirs = bench.store, bench.worker("worker-2").store
    lease(mine)
    lease(theirs, name="elsewhere")
    mine.beat(host="h", pid=1, version="1", problems={})
    mine.release()
    assert lease(theirs) is None
    assert row(bench, "lease_owner", "elsewhere") == "worker-2"
    (worker,) = queries.workers(bench.store)
    assert not worker.alive


def test_of_two_workers_that_ask_at_once_one_leads(bench: Bench) -> None:
    stores = [bench.store, bench.worker("worker-2").store]
    barrier = Barrier(2)
    answers: list[str | None] = []

    def ask(store: Store) -> None:
        barrier.wait(60)
        answers.append(lease(store))

    threads = [Thread(target=ask, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(answer is None for answer in answers) == [False, True]


def test_a_target_with_a_home_is_served_only_there(bench: Bench) -> None:
    home = {"host": "a", "boot": "1"}
    mine, theirs = bench.store, bench.worker("worker-2").store
    assert lease(mine, home) is None
    bench.advance(600)
    for other in ({"host": "b", "boot": "1"}, None):
        assert lease(theirs, other) == "target there can be served only on host a"
    assert row(bench, "home") == home


def test_a_host_that_was_rebooted_takes_over_when_its_old_lease_has_ended(bench: Bench) -> None:
    mine, theirs = bench.store, bench.worker("worker-2").store
    lease(mine, {"host": "a", "boot": "1"})
    rebooted = {"host": "a", "boot": "2"}
    assert lease(theirs, rebooted) == "target there is led by worker-1"
    assert row(bench, "home") == {"host": "a", "boot": "1"}
    bench.advance(15)
    assert lease(theirs, rebooted) is None
    assert row(bench, "home") == rebooted


def test_a_worker_that_is_not_at_home_launches_nothing(bench: Bench) -> None:
    batch = bench.enqueue([1])
    bench.sql("""UPDATE dispatcher.target SET home = '{"host": "elsewhere"}'""")
    bench.plan()
    assert bench.launch() == 0
    assert bench.states(batch) == ["pending"]


def test_a_target_that_nobody_has_led_yet_launches_nothing(bench: Bench) -> None:
    batch = bench.enqueue([1])
    bench.plan()
    bench.sql("DELETE FROM dispatcher.target")
    assert bench.launch() == 0
    assert bench.states(batch) == ["pending"]


def test_a_heartbeat_says_who_lives_and_old_ones_are_forgotten(bench: Bench) -> None:
    bench.store.beat(host="h", pid=7, version="1.0", problems={"x": "led by another"})
    (worker,) = queries.workers(bench.store)
    assert (worker.id, worker.pid, worker.alive) == ("worker-1", 7, True)
    assert worker.problems == {"x": "led by another"}
    bench.advance(61)
    assert [w.alive for w in queries.workers(bench.store)] == [False]
    bench.store.beat(host="h", pid=7, version="1.0", problems={})
    assert [w.alive for w in queries.workers(bench.store)] == [True]
    bench.advance(3600)
    bench.store.forget_workers(timedelta(hours=2))
    assert len(queries.workers(bench.store)) == 1
    bench.store.forget_workers(timedelta(minutes=59))
    assert queries.workers(bench.store) == []


# --- outages --------------------------------------------------------------------------------------


def outage(bench: Bench) -> list[tuple[str, str, str]]:
    return bench.sql(
        "SELECT old, new, reason FROM dispatcher.event WHERE kind = 'target' ORDER BY id"
    )


def test_an_outage_is_told_once_when_it_begins_and_once_when_it_ends(bench: Bench) -> None:
    bench.script(Ending(seconds=1000))
    bench.enqueue([1])
    bench.turn()
    bench.world.fail_next("poll", Fault.UNAVAILABLE, times=3)
    for _ in range(4):
        bench.turn(60)
    assert outage(bench) == [
        ("up", "down", "here: scripted fault of poll: unavailable"),
        ("down", "up", "here"),
    ]
    assert row(bench, "down_since, down_reason, down_calls, resume_at", HERE) == (
        None,
        None,
        0,
        None,
    )


def test_a_provider_that_does_not_answer_is_not_called_again_at_once_and_then_by_one_probe(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(concurrency=1)
    bench.world.fail_next("launch", Fault.UNAVAILABLE, times=2)
    batch = bench.enqueue(range(8))
    bench.plan()
    assert bench.engine.launch(HERE).calls == 1
    assert bench.engine.launch(HERE).calls == 0, "its launches rest"
    bench.advance(1.4)  # 1 s, and half a second by the roll of a half
    assert bench.engine.launch(HERE).calls == 0
    bench.advance(0.1)
    assert bench.engine.launch(HERE).calls == 1, "one probe, and it fails"
    assert row(bench, "down_calls", HERE) == 2
    bench.advance(2.9)
    assert bench.engine.launch(HERE).calls == 0, "twice as long after the second in a row"
    bench.advance(0.1)
    assert bench.engine.launch(HERE).calls == 1
    assert row(bench, "down_since", HERE) is None
    assert bench.finish(batch).state == "succeeded"


def test_while_it_is_down_only_one_launch_probes(bench: Bench) -> None:
    bench.store.target_down(HERE, "it hangs", resume_in=0.0)
    bench.enqueue(range(8))
    bench.plan()
    assert bench.engine.launch(HERE).calls == 1
    assert bench.engine.launch(HERE).calls == 7, "it answered"


def test_an_outage_that_another_worker_has_told_ends_with_the_first_answer(bench: Bench) -> None:
    """The worker that wrote it may be gone: whoever gets an answer takes it back."""
    bench.script(seconds=10)
    bench.enqueue(range(3))
    bench.turn()
    bench.worker("worker-2").store.target_down(HERE, "no route", resume_in=None)
    bench.worker("worker-3").follow(HERE)
    bench.turn(2)
    bench.worker("worker-3").follow(HERE)
    assert row(bench, "down_since", HERE) is None
    # And while both live: a launch reads it in the row.
    bench.worker("worker-2").store.target_down(HERE, "no route", resume_in=None)
    bench.enqueue(range(3))
    bench.turn()
    assert row(bench, "down_since", HERE) is None
    assert [moved[:2] for moved in outage(bench)] == [("up", "down"), ("down", "up")] * 2


def pace_of(bench: Bench, kind: str = "launch") -> float:
    with bench.store.transaction() as tx:
        return budget.pace(bench.store.bucket(tx, HERE, kind))


def test_each_throttling_halves_the_pace_down_to_a_twentieth(bench: Bench) -> None:
    seen = []
    for _ in range(6):
        bench.store.slow_down(HERE, "launch")
        seen.append(pace_of(bench))
        bench.advance(1.1)
    assert seen[0] == 0.5
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == pytest.approx(0.05)
    assert pace_of(bench, "read") == 1.0, "the other budgets are not slowed"


def test_calls_that_are_refused_together_halve_the_pace_once(bench: Bench) -> None:
    for _ in range(16):
        bench.store.slow_down(HERE, "read")
    assert pace_of(bench, "read") == 0.5


def test_a_slowed_pace_doubles_with_each_minute_up_to_the_full_rate(bench: Bench) -> None:
    for _ in range(2):
        bench.store.slow_down(HERE, "launch")
        bench.advance(2)
    bench.advance(58)
    assert pace_of(bench) == pytest.approx(0.51, abs=0.02)
    bench.advance(600)
    assert pace_of(bench) == 1.0


def test_a_budget_of_reads_is_shared_by_all_workers(make_bench: MakeBench) -> None:
    bench = make_bench(limits={"reads_per_minute": 20.0})
    target = bench.config.targets[HERE]
    meters = [TargetMeter(store, target) for store in (bench.store, bench.worker("b").store)]
    for meter in (meters[0], meters[1], meters[0]):
        meter.take("read")
    for meter in meters:
        with pytest.raises(Unavailable, match=r"budget of 20 read calls a minute") as told:
            meter.take("read")
        assert told.value.not_started
        assert told.value.retry_after == timedelta(seconds=2)
    bench.advance(3.1)
    meters[1].take("read")
    with pytest.raises(Unavailable):
        meters[0].take("read")
    meters[0].take("write", 50)  # a kind without a rate of its own is free


def test_a_round_of_reads_stays_within_its_budget(make_bench: MakeBench) -> None:
    bench = make_bench(job(), limits={"reads_per_minute": 6.0}, settings={"page_size": 2})
    bench.script(seconds=500)
    bench.enqueue(range(8))
    bench.turn()
    for _ in range(120):
        bench.turn(1)
    assert 8 <= bench.world.calls["poll"] <= 16, "four pages, six calls a minute, two minutes"


def test_what_is_not_served_here_is_left_alone(bench: Bench) -> None:
    assert bench.engine.launch("elsewhere").calls == 0
    assert not bench.engine.launch("elsewhere").more
    assert bench.engine.clean(HERE) == 0


def test_a_poll_that_works_ends_no_outage_of_launches(make_bench: MakeBench) -> None:
    bench = make_bench(concurrency=4)
    bench.script(seconds=100)
    bench.enqueue(range(1))
    bench.turn()
    bench.world.fail_next("launch", Fault.UNAVAILABLE, times=50)
    bench.enqueue(range(40))
    before = bench.world.calls["launch"]
    for _ in range(60):
        bench.turn()
        bench.advance(1)
    assert row(bench, "down_since", HERE) is not None
    assert bench.world.calls["launch"] - before < 20, "held, and then tried one by one"


def test_a_throttled_target_is_called_less_and_less(make_bench: MakeBench) -> None:
    bench = make_bench(concurrency=16)
    bench.world.fail_next("launch", Fault.THROTTLED, times=10_000)
    bench.enqueue(range(500))
    for _ in range(60):
        bench.turn()
        bench.advance(1)
    assert bench.world.calls["launch"] <= 16 * 5
    assert len(bench.executions()) == 16, "no others are asked for before these"


def test_a_target_that_throttles_each_of_its_jobs_is_called_less_and_less(
    make_bench: MakeBench,
) -> None:
    names = "abcdef"
    bench = make_bench(*(job(name) for name in names), concurrency=4)
    bench.world.fail_next("launch", Fault.THROTTLED, times=10_000)
    for name in names:
        bench.enqueue(range(50), name)
    for _ in range(60):
        bench.turn()
        bench.advance(1)
    assert bench.world.calls["launch"] <= 4 * 5
    assert len(bench.executions()) <= len(names), "the second round asks for one, as a probe"


def test_many_batches_of_a_job_at_its_limit_hide_no_other_job(make_bench: MakeBench) -> None:
    bench = make_bench(job("full", limits={"running": 1}), job("other"))
    bench.script(seconds=1000)
    with bench.dispatcher.store.transaction():
        for _ in range(210):
            bench.dispatcher.enqueue("full", [1])
    late = bench.dispatcher.enqueue("other", [1])
    for batch in bench.store.unplanned(1000):
        bench.engine.plan(batch)
    bench.engine.launch(HERE)
    assert late.refresh().counts == {"running": 1}


def test_jobs_at_their_limits_hide_no_other_job_whatever_their_priority(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dispatcher.store.launching.MOST_WAITING", 6)
    bench = make_bench(*(job(name, limits={"running": 1}) for name in "abc"), job("other"))
    bench.script(seconds=1000)
    for name in "abc" * 3:
        bench.enqueue([1], name, priority=5)
    late = bench.enqueue([1], "other")
    bench.plan()
    bench.launch()
    assert late.refresh().counts == {"running": 1}
    assert len(bench.executions()) == 4


# --- rows that are held, machines, other backends -------------------------------------------------


@contextmanager
def holding(bench: Bench, name: str) -> Iterator[None]:
    """Another session keeps a target's row, as a process does that was stopped in a launch."""
    with bench.database.begin() as tx:
        tx.execute(
            sa.text("SELECT 1 FROM dispatcher.target WHERE name = :name FOR UPDATE"), {"name": name}
        )
        yield


def test_a_lease_does_not_wait_for_a_row_that_another_session_keeps(bench: Bench) -> None:
    lease(bench.store)
    began = time.monotonic()
    with holding(bench, "there"), pytest.raises(Conflict, match="lock timeout"):
        lease(bench.store)
    assert time.monotonic() - began < STUCK_AFTER / 2
    assert lease(bench.store) is None


def test_one_row_that_is_kept_does_not_keep_the_other_leases_from_being_given_back(
    bench: Bench,
) -> None:
    for name in ("before", "kept", "then"):
        assert lease(bench.store, name=name) is None
    bench.store.beat(host="h", pid=1, version="1", problems={})
    with holding(bench, "kept"), pytest.raises(Conflict):
        bench.store.release()
    theirs = bench.worker("worker-2").store
    assert [lease(theirs, name=name) for name in ("before", "kept", "then")] == [
        None,
        "target kept is led by worker-1",
        None,
    ]
    assert not queries.workers(bench.store)[0].alive


def test_a_machine_is_known_by_its_id_and_not_by_its_name(bench: Bench) -> None:
    mine, theirs = bench.store, bench.worker("worker-2").store
    assert lease(mine, {"host": "a", "machine": "1"}) is None
    bench.advance(600)
    assert lease(theirs, {"host": "a", "machine": "2"}) == (
        "target there can be served only on host a of machine 1, and this is 2"
    )
    assert lease(theirs, {"host": "b", "machine": "2"}) == (
        "target there can be served only on host a"
    )
    assert lease(theirs, {"host": "renamed", "machine": "1"}) is None
    bench.advance(600)
    assert lease(mine, {"host": "renamed"}) is None, "without an id the name must do"


def test_a_target_that_is_given_another_backend_leaves_its_home_when_nothing_runs_there(
    bench: Bench,
) -> None:
    bench.script(Ending(seconds=100))
    batch = bench.enqueue([1, 2])
    bench.turn()
    theirs = bench.worker("worker-2").store
    bench.sql(
        """UPDATE dispatcher.target SET home = '{"host": "a"}', backend = 'local',
        lease_until = NULL, lease_owner = NULL"""
    )
    assert bench.lease(theirs) == (
        "target here still has 2 executions of backend local on host a: "
        "serve it there with that backend until they end"
    )
    bench.sql("UPDATE dispatcher.target SET home = NULL, backend = 'null'")
    assert bench.lease(bench.store, LEASE) is None
    bench.finish(batch)
    bench.sql(
        """UPDATE dispatcher.target SET home = '{"host": "a"}', backend = 'local',
        lease_until = NULL, lease_owner = NULL"""
    )
    assert bench.lease(theirs) is None
    assert row(bench, "backend, home", HERE) == ("null", None)
