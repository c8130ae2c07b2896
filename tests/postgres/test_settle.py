"""What becomes of a chunk, and of its batch, when an attempt has ended."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from threading import Barrier, Thread
from typing import Any

import pytest
from workbench import HERE, Bench, job

from dispatcher.backends.base import Phase, Report, TaskReport
from dispatcher.engine.place import Ending as Given
from dispatcher.states import Outcome
from dispatcher.testing import Ending, Fault

MakeBench = Callable[..., Bench]
BAD = [Outcome.FAILED, Outcome.TIMED_OUT, Outcome.OUT_OF_MEMORY]
UNLUCKY = [Outcome.PREEMPTED, Outcome.LOST, Outcome.START_FAILED]


def endless(outcome: Outcome, **fields: Any) -> Callable[[str, int, int], Ending]:
    return lambda _batch, _chunk, _attempt: Ending(outcome, **fields)


@pytest.mark.parametrize("outcome", BAD)
def test_what_the_application_did_wrong_costs_its_attempts(
    make_bench: MakeBench, outcome: Outcome
) -> None:
    bench = make_bench(job(retry={"attempts": 2, "infrastructure_attempts": 4}))
    bench.world.script = endless(outcome)
    batch = bench.finish(bench.enqueue([1]))
    assert (batch.state, bench.outcomes(batch)) == ("failed", [outcome] * 2)
    assert "2 of 2 attempts used" in (batch.reason or "")


@pytest.mark.parametrize("outcome", UNLUCKY)
def test_what_the_infrastructure_did_has_a_budget_of_its_own(
    make_bench: MakeBench, outcome: Outcome
) -> None:
    bench = make_bench(job(retry={"attempts": 1, "infrastructure_attempts": 3}))
    bench.world.script = endless(outcome)
    batch = bench.finish(bench.enqueue([1]))
    assert (batch.state, bench.outcomes(batch)) == ("failed", [outcome] * 3)
    assert "3 of 3 infrastructure attempts used" in (batch.reason or "")


def test_no_capacity_costs_only_time(make_bench: MakeBench) -> None:
    bench = make_bench(job(retry={"attempts": 1, "infrastructure_attempts": 1}))
    bench.script(*[Ending(Outcome.NO_CAPACITY)] * 6)
    batch = bench.finish(bench.enqueue([1]), step=60)
    assert batch.state == "succeeded"
    assert bench.outcomes(batch) == ["no_capacity"] * 6 + ["succeeded"]


def test_the_classes_do_not_eat_each_others_budgets(make_bench: MakeBench) -> None:
    bench = make_bench(job(retry={"attempts": 2, "infrastructure_attempts": 2}))
    bench.script(Ending(Outcome.PREEMPTED), Ending(Outcome.FAILED), Ending(Outcome.NO_CAPACITY))
    batch = bench.finish(bench.enqueue([1]), step=10)
    assert batch.state == "succeeded"
    assert bench.outcomes(batch) == ["preempted", "failed", "no_capacity", "succeeded"]


@pytest.mark.parametrize(("code", "tries"), [(65, 1), (75, 3), (1, 3)])
def test_exit_codes_say_whether_to_retry(make_bench: MakeBench, code: int, tries: int) -> None:
    bench = make_bench(job(retry={"exit_codes": {65: "fail", 75: "retry"}}))
    bench.world.script = endless(Outcome.FAILED, exit_code=code)
    batch = bench.finish(bench.enqueue([1]))
    assert (batch.state, len(bench.outcomes(batch))) == ("failed", tries)
    (found,) = set(bench.sql("SELECT exit_code FROM dispatcher.attempt"))
    assert found == code


def test_a_retry_waits_as_its_policy_says(bench: Bench) -> None:
    bench.script(Ending(Outcome.FAILED), Ending(Outcome.FAILED))
    batch = bench.enqueue([1])
    due = "SELECT extract(epoch FROM due_at - bench_now())::int FROM dispatcher.chunk"
    bench.until(lambda: bench.states(batch) == ["pending"], "the first attempt ended", step=1)
    assert bench.sql(due) == [10]
    bench.turn(9)
    assert bench.states(batch) == ["pending"]
    bench.turn(1)
    assert bench.states(batch) == ["running"]
    bench.turn(2)
    assert (bench.states(batch), bench.sql(due)) == (["pending"], [20])
    (reason,) = bench.sql("SELECT reason FROM dispatcher.chunk")
    assert reason == "failed with exit code 1; retry in 20s, 2 of 3 attempts used"


def test_jitter_spreads_retries_by_chance_and_a_pack_stays_together(make_bench: MakeBench) -> None:
    bench = make_bench(
        job(retry={"jitter": True, "initial": "100s"}, options={"max_tasks": 2, "parallelism": 2})
    )
    bench.world.script = endless(Outcome.FAILED)
    rolls = iter([0.25, 0.75])
    bench.enqueue(range(4))
    bench.plan()
    bench.launch()
    bench.advance(2)
    bench.engine._settler._roll = lambda: next(rolls)
    bench.follow()
    due = bench.sql(
        "SELECT extract(epoch FROM due_at - bench_now())::int FROM dispatcher.chunk ORDER BY index"
    )
    assert due == [25, 25, 75, 75]


def test_the_reason_and_the_exit_code_are_kept_with_the_attempt(bench: Bench) -> None:
    bench.script(Ending(Outcome.FAILED, exit_code=3, reason="disk full"))
    batch = bench.finish(bench.enqueue([1]))
    (first, second) = next(iter(bench.dispatcher.chunks(batch.id))).attempts
    assert (first.outcome, first.exit_code, first.reason) == (Outcome.FAILED, 3, "disk full")
    assert (second.outcome, second.exit_code) == (Outcome.SUCCEEDED, 0)
    assert first.started_at is not None
    assert first.ended_at is not None
    assert first.settled_at == first.ended_at + timedelta(seconds=2)
    reasons = [e.reason for e in bench.dispatcher.events(batch.id) if e.new == "pending" and e.old]
    assert reasons == [
        "failed with exit code 3; retry in 10s, 1 of 3 attempts used: disk full",
    ]


def test_the_last_lines_of_what_failed_are_kept(bench: Bench) -> None:
    lines = tuple(f"line {n}" for n in range(50))
    bench.script(Ending(Outcome.FAILED, output=lines))
    batch = bench.finish(bench.enqueue([1]))
    tails = bench.sql("SELECT log_tail FROM dispatcher.attempt ORDER BY number")
    assert tails == ["\n".join(lines[-20:]), None]
    assert bench.states(batch) == ["succeeded"]


def test_an_outcome_stands_without_its_log(bench: Bench) -> None:
    bench.script(Ending(Outcome.FAILED, output=("a line",)))
    bench.world.fail_next("logs", Fault.UNAVAILABLE)
    batch = bench.finish(bench.enqueue([1]))
    assert bench.outcomes(batch) == ["failed", "succeeded"]
    assert bench.sql("SELECT log_tail FROM dispatcher.attempt") == [None, None]


def test_a_result_is_found_where_the_task_left_it(bench: Bench) -> None:
    bench.world.script = lambda _batch, chunk, _attempt: Ending(result_uri=f"s3://out/{chunk}")
    batch = bench.finish(bench.enqueue([1, 2]))
    outputs = [(o.chunk_index, o.attempt, o.uri) for o in bench.dispatcher.outputs(batch.id)]
    assert outputs == [(0, 1, "s3://out/0"), (1, 1, "s3://out/1")]


# --- packs ----------------------------------------------------------------------------------------


def packed(make_bench: MakeBench, tasks: int, **fields: Any) -> Bench:
    return make_bench(job(options={"max_tasks": tasks, "parallelism": tasks}, **fields))


def test_99_results_do_not_wait_for_one_straggler(make_bench: MakeBench) -> None:
    bench = packed(make_bench, 100)
    bench.world.script = lambda _batch, chunk, _attempt: Ending(seconds=300 if chunk == 7 else 1)
    batch = bench.enqueue(range(100))
    bench.turn()
    bench.turn(2)
    assert batch.refresh().counts == {"succeeded": 99, "running": 1}
    assert bench.sql("SELECT state, tasks, open_tasks FROM dispatcher.execution") == [
        ("launched", 100, 1)
    ]
    assert bench.finish(batch, step=10).state == "succeeded"
    assert bench.world.calls["launch"] == 1


def fail_early(bench: Bench, bad: int, straggler: float = 300) -> None:
    """The first attempts of some chunks fail at once; the others run on."""

    def script(_batch: str, chunk: int, attempt: int) -> Ending:
        if attempt > 1:
            return Ending()
        return Ending(Outcome.FAILED, seconds=1) if chunk < bad else Ending(seconds=straggler)

    bench.world.script = script


def test_retries_of_a_pack_wait_for_company_and_go_when_they_fill_one(
    make_bench: MakeBench,
) -> None:
    bench = packed(make_bench, 3, retry={"pack_wait": "10m", "initial": "1s"})
    fail_early(bench, bad=2)
    bench.enqueue(range(6))  # two executions, 0 1 2 and 3 4 5
    bench.turn()
    bench.turn(2)
    bench.turn(5)
    holds = (
        "SELECT count(*) FROM dispatcher.chunk WHERE state = 'pending' AND hold_until IS NOT NULL"
    )
    assert bench.sql(holds) == [2]
    assert bench.world.calls["launch"] == 2, "they are due and wait for company"
    (later,) = bench.sql("SELECT execution_id FROM dispatcher.attempt WHERE chunk_index = 3")
    (handle,) = bench.sql("SELECT handle FROM dispatcher.execution WHERE id = :id", id=later)
    bench.world.kill(handle, 0)
    bench.until(lambda: bench.world.calls["launch"] == 3, "the pack went out", step=2, turns=10)
    assert len(bench.world.requests()[2].tasks) == 3


def test_retries_of_a_pack_do_not_wait_longer_than_pack_wait(make_bench: MakeBench) -> None:
    bench = packed(make_bench, 3, retry={"pack_wait": "60s", "initial": "1s"})
    fail_early(bench, bad=1)
    bench.enqueue(range(3))
    bench.turn()
    bench.turn(2)
    bench.turn(59)
    assert bench.world.calls["launch"] == 1
    bench.turn(1)
    assert bench.world.calls["launch"] == 2


def test_retries_of_a_pack_go_when_their_source_has_ended(make_bench: MakeBench) -> None:
    bench = packed(make_bench, 3, retry={"pack_wait": "60s", "initial": "1s"})
    fail_early(bench, bad=1, straggler=20)
    batch = bench.enqueue(range(3))
    bench.turn()
    bench.turn(2)
    bench.turn(17)
    assert bench.world.calls["launch"] == 1
    bench.turn(4)
    bench.turn()
    assert bench.world.calls["launch"] == 2
    assert bench.finish(batch).state == "succeeded"


def test_a_task_that_the_last_report_misses_is_lost(make_bench: MakeBench) -> None:
    bench = packed(make_bench, 2)
    bench.script(seconds=100)
    batch = bench.enqueue(range(2))
    bench.turn()
    place = bench.engine.places[HERE]
    report = Report(Phase.ENDED, tasks=(TaskReport(0, Outcome.SUCCEEDED),))
    place.backend.poll = lambda handles: dict.fromkeys(handles, report)  # type: ignore[method-assign]  # a provider that forgets
    bench.turn(2)
    assert bench.states(batch) == ["succeeded", "pending"]
    assert bench.outcomes(batch, 1) == ["lost"]
    assert bench.executions() == ["ended"]


# --- news that come twice, late, or at once -------------------------------------------------------


def snapshot(bench: Bench) -> list[Any]:
    return [
        bench.sql(f"SELECT t::text FROM dispatcher.{table} t ORDER BY 1")  # noqa: S608 - constants
        for table in ("batch", "chunk", "execution", "attempt", "event")
    ]


def test_doubled_and_late_reports_change_nothing(make_bench: MakeBench) -> None:
    bench = packed(make_bench, 2)
    bench.world.script = lambda _batch, chunk, _attempt: Ending(seconds=1 if chunk else 5)
    batch = bench.enqueue(range(2))
    bench.turn()
    place, settler = bench.engine.places[HERE], bench.engine._settler
    (execution,) = bench.sql("SELECT id FROM dispatcher.execution")
    part = Given(execution, (TaskReport(1, Outcome.SUCCEEDED),))
    settler.settle(place, [part])
    before = snapshot(bench)
    settler.settle(place, [part, part, Given(execution, (TaskReport(1, Outcome.FAILED),))])
    assert snapshot(bench) == before
    assert bench.finish(batch).state == "succeeded"
    before = snapshot(bench)
    settler.settle(place, [Given(execution, (TaskReport(0, Outcome.FAILED),), final=True), part])
    bench.turn(60)
    assert snapshot(bench) == before


def test_a_report_of_tasks_that_are_not_ours_changes_nothing(bench: Bench) -> None:
    bench.script(seconds=100)
    batch = bench.enqueue([1])
    bench.turn()
    (execution,) = bench.sql("SELECT id FROM dispatcher.execution")
    bench.engine._settler.settle(
        bench.engine.places[HERE],
        [Given(execution, (TaskReport(5, Outcome.FAILED),)), Given(10**12, final=True)],
    )
    assert (bench.states(batch), bench.executions()) == (["running"], ["launched"])


@pytest.mark.parametrize("attempt", range(5))
def test_two_settles_of_the_last_two_chunks_end_the_batch_once(bench: Bench, attempt: int) -> None:
    bench.script(seconds=100 + attempt)
    batch = bench.enqueue([1, 2])
    bench.turn()
    ids = bench.sql("SELECT id FROM dispatcher.execution ORDER BY id")
    engines = [bench.engine, bench.worker("worker-2")]
    barrier = Barrier(2)
    errors: list[BaseException] = []

    def settle(place: int) -> None:
        try:
            engine = engines[place]
            ending = Given(ids[place], (TaskReport(0, Outcome.SUCCEEDED),), final=True)
            barrier.wait(60)
            engine._settler.settle(engine.places[HERE], [ending])
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            errors.append(error)

    threads = [Thread(target=settle, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert batch.refresh().state == "succeeded"
    ends = [
        e for e in bench.dispatcher.events(batch.id) if e.kind == "batch" and e.new == "succeeded"
    ]
    assert len(ends) == 1


def test_two_workers_that_poll_the_same_settle_each_attempt_once(bench: Bench) -> None:
    bench.script(seconds=5)
    batch = bench.enqueue(range(20))
    bench.turn()
    engines = [bench.engine, bench.worker("worker-2")]
    bench.advance(6)
    threads = [Thread(target=engine.follow, args=(HERE,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    bench.turn()
    assert batch.refresh().state == "succeeded"
    succeeded = [
        e for e in bench.dispatcher.events(batch.id) if (e.kind, e.new) == ("chunk", "succeeded")
    ]
    assert len(succeeded) == 20


# --- the batch ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("allowed", "state"), [(0, "failed"), (1, "failed"), (2, "succeeded")])
def test_a_batch_succeeds_as_far_as_its_success_policy_allows(
    make_bench: MakeBench, allowed: int, state: str
) -> None:
    bench = make_bench(job(success={"max_failed_chunks": allowed}, retry={"attempts": 1}))
    bench.world.script = lambda _batch, chunk, _attempt: Ending(
        Outcome.FAILED if chunk in (3, 5) else Outcome.SUCCEEDED, reason=f"chunk {chunk}"
    )
    batch = bench.finish(bench.enqueue(range(8)))
    assert batch.state == state
    assert batch.counts == {"succeeded": 6, "failed": 2}
    assert (batch.reason or "").startswith("2 of 8 chunks failed")
    if state == "failed":
        assert "chunk 3" in (batch.reason or ""), "the first one as an example"


def test_a_batch_without_items_has_succeeded_at_once(bench: Bench) -> None:
    batch = bench.enqueue([])
    bench.turn()
    batch = batch.refresh()
    assert (batch.state, batch.reason, batch.chunk_count) == ("succeeded", "no items", 0)
    assert batch.progress == 1.0


def test_a_batch_that_a_crash_left_without_an_open_chunk_is_ended_by_the_sweep(
    bench: Bench,
) -> None:
    batch = bench.finish(bench.enqueue([1]))
    bench.sql(
        "UPDATE dispatcher.batch SET state = 'running', finished_at = NULL WHERE id = :id",
        id=batch.id,
    )
    bench.sql(
        "INSERT INTO dispatcher.event (at, actor, kind, batch_id, old, new) "
        "VALUES (now(), 'test', 'batch', :id, 'succeeded', 'running')",
        id=batch.id,
    )
    bench.plan()
    assert batch.refresh().state == "succeeded"
