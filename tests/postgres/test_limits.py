"""How much runs at once, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from waiting import until
from workbench import HERE, Bench, job

from dispatcher import budget
from dispatcher.engine import launcher
from dispatcher.states import Outcome
from dispatcher.storage import Storage
from dispatcher.testing import Ending, Fault

MakeBench = Callable[..., Bench]


def shares(bench: Bench) -> dict[str, int]:
    """The slots that batches hold."""
    return dict(
        bench.sql(
            "SELECT batch_id, sum(least(open_tasks, parallelism))::int FROM dispatcher.execution "
            "WHERE state <> 'ended' GROUP BY 1"
        )
    )


def test_a_target_never_holds_more_slots_than_max_running(make_bench: MakeBench) -> None:
    bench = make_bench(limits={"max_running": 3})
    bench.script(seconds=10)
    batch = bench.enqueue(range(10))
    bench.turn()
    assert shares(bench) == {batch.id: 3}
    assert bench.finish(batch).state == "succeeded"
    assert bench.world.peak_running() == 3


def test_a_target_never_holds_more_executions_than_max_executions(make_bench: MakeBench) -> None:
    bench = make_bench(
        job(options={"max_tasks": 4, "parallelism": 4}), limits={"max_executions": 2}
    )
    bench.script(seconds=10)
    batch = bench.enqueue(range(20))
    bench.turn()
    assert bench.executions() == ["launched"] * 2
    assert bench.finish(batch).state == "succeeded"
    assert bench.world.peak_running() == 8
    assert bench.world.calls["launch"] == 5


def test_a_pack_whose_document_is_too_large_exceeds_no_limit(
    make_bench: MakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "DOCUMENT_BYTES", 2000)
    wrapped = job(
        args=["{items:json}", "{items:json}"],
        options={"max_tasks": 8, "parallelism": 2, "wrapped": True},
    )
    bench = make_bench(
        wrapped,
        settings={"per_task_env": False},
        limits={"max_running": 2, "max_executions": 1, "launches_per_minute": 60.0},
        storage=Storage(f"file://{tmp_path}/store"),
    )
    bench.script(Ending(Outcome.LOST, reason="preempted"), seconds=10)
    batch = bench.enqueue(["x" * 200] * 8)
    bench.plan()
    bench.launch()
    assert bench.sql("SELECT tasks FROM dispatcher.execution") == [2]
    assert bench.sql("SELECT tokens FROM dispatcher.bucket WHERE kind = 'launch'") == [9]
    assert bench.states(batch) == [*["running"] * 2, *["pending"] * 6]
    assert bench.sql("SELECT attempts FROM dispatcher.chunk ORDER BY index") == [1, 1, *[0] * 6]
    assert bench.finish(batch, step=5).state == "succeeded"
    assert [bench.outcomes(batch, index) for index in range(8)] == [["lost", "succeeded"]] * 8
    assert bench.world.peak_running() == 2


def test_a_chunk_that_is_given_back_is_as_it_was(bench: Bench) -> None:
    bench.script(Ending(Outcome.LOST, reason="preempted"))
    batch = bench.enqueue(range(2))
    bench.turn()
    bench.turn(1)
    look = "SELECT index, state, attempts, reason, due_at FROM dispatcher.chunk ORDER BY index"
    before = bench.sql(look)
    assert before[0][1:3] == ("pending", 1)
    assert "preempted" in before[0][3]
    bench.advance(60)
    with bench.store.transaction() as tx:
        claimed = bench.store.claim(tx, batch.id, 2)
        assert [one.number for one in claimed] == [2, 2]
        bench.store.give_back(tx, batch.id, claimed)
    assert bench.sql(look) == before
    assert bench.finish(batch).state == "succeeded"


def test_launches_that_are_called_again_take_tokens_too(make_bench: MakeBench) -> None:
    bench = make_bench(limits={"launches_per_minute": 24.0})
    bench.script(seconds=1000)
    bench.enqueue(range(20))
    bench.plan()
    assert len(bench.intend()) == 4, "and this launcher dies"
    bench.advance(26)
    bench.follow()
    bench.follow()
    bench.launch()
    assert bench.world.calls["launch"] == 4, "what ten seconds give, in all"
    for _ in range(30):
        bench.turn(2)
    assert bench.executions() == ["launched"] * 20


def test_an_unknown_launch_holds_its_slot(make_bench: MakeBench) -> None:
    bench = make_bench(limits={"max_running": 1})
    bench.script(seconds=10)
    bench.world.fail_next("launch", Fault.REPLY_LOST)
    bench.enqueue(range(3))
    bench.plan()
    bench.launch()
    bench.advance(60)
    bench.launch()
    assert bench.executions() == ["unknown"]


def test_a_jobs_limit_counts_over_all_its_batches(make_bench: MakeBench) -> None:
    bench = make_bench(job(limits={"running": 4}), job("other"))
    bench.script(seconds=10)
    batches = [bench.enqueue(range(5)) for _ in range(2)]
    other = bench.enqueue(range(6), "other")
    bench.turn()
    held = shares(bench)
    assert [held.get(b.id, 0) for b in batches] == [2, 2]
    assert held[other.id] == 6, "the limit of one job holds up no other"
    for batch in batches:
        bench.finish(batch)
    assert max(bench.world.runs.values()) == 1


def test_a_batchs_limit_counts_for_itself(make_bench: MakeBench) -> None:
    bench = make_bench(job(limits={"per_batch": 2}))
    bench.script(seconds=10)
    batches = [bench.enqueue(range(5)) for _ in range(2)]
    bench.turn()
    assert shares(bench) == {b.id: 2 for b in batches}
    bench.turn(5)
    assert shares(bench) == {b.id: 2 for b in batches}


def test_a_pack_holds_as_many_slots_as_the_provider_lets_run_at_once(make_bench: MakeBench) -> None:
    bench = make_bench(job(options={"max_tasks": 10, "parallelism": 3}), limits={"max_running": 7})
    bench.script(seconds=10)
    batch = bench.enqueue(range(40))
    bench.turn()
    # Two full packs of ten at three slots each, and one task in the slot that is left.
    assert bench.sql("SELECT tasks, parallelism FROM dispatcher.execution ORDER BY 1") == [
        (1, 1),
        (10, 3),
        (10, 3),
    ]
    assert shares(bench) == {batch.id: 7}
    assert bench.finish(batch, step=5).state == "succeeded"
    assert bench.world.peak_running() == 7


def test_launches_per_minute_are_a_bucket_that_fills_with_time(make_bench: MakeBench) -> None:
    bench = make_bench(limits={"launches_per_minute": 12.0})
    bench.enqueue(range(30))
    bench.turn()
    assert bench.world.calls["launch"] == 2, "ten seconds' worth at first"
    bench.turn()
    assert bench.world.calls["launch"] == 2
    bench.turn(4.9)
    assert bench.world.calls["launch"] == 2
    bench.turn(0.1)
    assert bench.world.calls["launch"] == 3, "one in five seconds"
    bench.turn(600)
    assert bench.world.calls["launch"] == 5, "what was not used does not pile up"
    for _ in range(60):
        bench.turn(1)
    assert bench.world.calls["launch"] == 17


def test_two_workers_share_one_bucket(make_bench: MakeBench) -> None:
    bench = make_bench(limits={"launches_per_minute": 60.0})
    other = bench.worker("worker-2")
    bench.enqueue(range(30))
    bench.plan()
    calls = [bench.engine.launch(HERE).calls, other.launch(HERE).calls]
    assert calls == [10, 0]


def pace(bench: Bench) -> float:
    with bench.store.transaction() as tx:
        return budget.pace(bench.store.bucket(tx, HERE, "launch"))


def test_a_throttling_halves_the_pace_and_time_lets_it_grow(make_bench: MakeBench) -> None:
    bench = make_bench(limits={"launches_per_minute": 60.0})
    bench.world.fail_next("launch", Fault.THROTTLED)
    bench.enqueue(range(200))
    bench.plan()
    bench.engine.launch(HERE)
    assert pace(bench) == 0.5
    for _ in range(31):
        bench.turn(2)
    assert pace(bench) == 1.0


def test_the_higher_priority_goes_first_and_takes_all_that_it_can_use(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(limits={"max_running": 4})
    bench.script(seconds=10)
    low = bench.enqueue(range(5))
    high = bench.enqueue(range(3), priority=10)
    bench.turn()
    assert shares(bench) == {high.id: 3, low.id: 1}


def test_a_small_batch_starts_at_once_beside_a_large_one(make_bench: MakeBench) -> None:
    bench = make_bench(limits={"max_running": 10})
    bench.world.script = lambda _batch, chunk, _attempt: Ending(seconds=5 + chunk % 7)
    large = bench.enqueue(range(300))
    bench.turn()
    assert shares(bench) == {large.id: 10}
    small = bench.enqueue(range(4))
    bench.until(lambda: small.refresh().finished, "the small one ended", step=1, turns=60)
    assert large.refresh().progress < 0.5
    assert small.refresh().state == "succeeded"


def test_equal_batches_share_the_slots_evenly(make_bench: MakeBench) -> None:
    bench = make_bench(limits={"max_running": 9})
    bench.script(seconds=100)
    batches = [bench.enqueue(range(50)) for _ in range(3)]
    bench.turn()
    assert shares(bench) == {b.id: 3 for b in batches}


def test_two_workers_that_launch_at_once_overshoot_no_limit(make_bench: MakeBench) -> None:
    bench = make_bench(
        job(limits={"running": 5}), job("other", limits={"per_batch": 3}), limits={"max_running": 7}
    )
    bench.script(seconds=3)
    batches: list[Any] = [bench.enqueue(range(25)) for _ in range(2)]
    batches += [bench.enqueue(range(10), "other")]
    bench.plan()
    engines = [bench.engine, bench.worker("worker-2"), bench.worker("worker-3")]
    peaks = []
    for _ in range(60):
        threads = [Thread(target=engine.launch, args=(HERE,)) for engine in engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        held = shares(bench)
        peaks.append(
            (
                sum(held.values()),
                sum(held.get(b.id, 0) for b in batches[:2]),
                held.get(batches[2].id, 0),
            )
        )
        bench.advance(2)
        bench.follow()
        if all(b.refresh().finished for b in batches):
            break
    assert all(b.refresh().state == "succeeded" for b in batches)
    most = [max(column) for column in zip(*peaks, strict=True)]
    assert most[:2] == [7, 5]
    assert 2 <= most[2] <= 3
    assert bench.world.peak_running() <= 7
    assert bench.world.doubles() == []


def test_a_launch_that_waits_for_the_target_makes_no_deadlock_with_a_settle(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(job(limits={"running": 8}), limits={"max_running": 12})
    bench.script(seconds=1)
    batches = [bench.enqueue(range(40)) for _ in range(3)]
    bench.plan()
    other = bench.worker("worker-2")
    stop: list[bool] = []
    errors: list[BaseException] = []

    def launch_and_advance() -> None:
        """Time goes on as fast as this launches, so that a call comes in time on any machine."""
        bench.engine.launch(HERE)
        bench.advance(1)

    def keep(step: Callable[[], object]) -> None:
        while not stop:
            try:
                step()
            except BaseException as error:  # noqa: BLE001 - shown by the main thread
                errors.append(error)
                return

    threads = [
        Thread(target=keep, args=(step,))
        for step in (
            launch_and_advance,
            lambda: other.launch(HERE),
            lambda: bench.engine.follow(HERE),
            lambda: other.follow(HERE),
        )
    ]
    for thread in threads:
        thread.start()

    def all_ended() -> bool:
        return bool(errors) or all(b.refresh().finished for b in batches)

    try:
        until(all_ended, "all batches ended")
    finally:
        stop.append(True)
        for thread in threads:
            thread.join(60)
    assert errors == []
    assert [b.refresh().state for b in batches] == ["succeeded"] * 3
