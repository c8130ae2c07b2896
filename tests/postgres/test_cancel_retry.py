"""The end before the end: cancels, deadlines, vanished executions; and the operator's retry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from workbench import HERE, Bench, job

from dispatcher.backends.base import Handle, Phase, Report
from dispatcher.engine import planner
from dispatcher.errors import NotAllowed, UnknownBatch
from dispatcher.states import CancelKind, Outcome
from dispatcher.testing import Ending, Fault

MakeBench = Callable[..., Bench]
LONG = Ending(seconds=10_000)


# --- cancel ---------------------------------------------------------------------------------------


def test_a_cancel_ends_what_waits_at_once_and_says_cancelled_when_nothing_runs(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(limits={"max_running": 2})
    bench.script(LONG)
    batch = bench.enqueue(range(4))
    bench.turn()
    batch = batch.cancel("not wanted")
    assert batch.state == "running"
    assert batch.cancel_requested_at is not None
    assert bench.states(batch) == ["running", "running", "cancelled", "cancelled"]
    batch = bench.finish(batch)
    assert (batch.state, batch.reason) == ("cancelled", "not wanted")
    assert bench.world.running() == 0
    assert bench.outcomes(batch) == ["cancelled"]


def test_a_cancel_is_sent_until_a_report_confirms_it(bench: Bench) -> None:
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.turn()
    batch.cancel()
    bench.world.fail_next("cancel", Fault.UNAVAILABLE, times=3)
    assert bench.finish(batch, step=5).state == "cancelled"
    assert bench.world.calls["cancel"] == 4


def test_a_cancel_before_the_plan_ends_the_batch_at_once(bench: Bench) -> None:
    batch = bench.enqueue([1]).cancel()
    assert (batch.state, batch.chunk_count) == ("cancelled", 0)
    bench.turn()
    assert bench.world.calls["launch"] == 0


def test_a_cancel_between_plan_and_launch_ends_the_batch_at_once(bench: Bench) -> None:
    batch = bench.enqueue([1])
    bench.plan()
    batch = batch.cancel()
    assert batch.state == "cancelled"
    bench.turn()
    assert bench.world.calls["launch"] == 0


def test_a_cancel_may_be_repeated_and_may_come_too_late(bench: Bench) -> None:
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.turn()
    first = batch.cancel("one")
    bench.advance(1)
    assert batch.cancel("two").cancel_requested_at == first.cancel_requested_at
    done = bench.finish(batch)
    assert (done.state, done.reason) == ("cancelled", "one")
    assert batch.cancel("three") == done


def test_a_success_that_came_before_the_cancel_stays_one(bench: Bench) -> None:
    bench.script(seconds=5)
    batch = bench.enqueue([1])
    bench.turn()
    bench.advance(60)  # it has ended, and nobody has looked yet
    batch.cancel()
    batch = bench.finish(batch)
    assert (batch.state, bench.outcomes(batch)) == ("succeeded", ["succeeded"])


def test_what_a_cancel_stops_is_no_success_where_the_providers_clock_is_behind(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server does that exits with 0 when it is asked to end."""
    bench.world.clock = lambda: bench.at - timedelta(seconds=1)
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.turn()
    bench.turn(60)
    (handle,) = bench.world.handles()

    def stop(_handle: Handle) -> None:
        bench.world.kill(handle, 0, Outcome.SUCCEEDED)

    monkeypatch.setattr(bench.engine.places[HERE].backend, "cancel", stop)
    batch.cancel()
    batch = bench.finish(batch)
    assert (batch.state, bench.outcomes(batch)) == ("cancelled", ["cancelled"])


def test_a_cancel_is_sent_to_each_before_it_is_repeated_to_any(bench: Bench) -> None:
    bench.script(LONG)
    batch = bench.enqueue(range(4))
    bench.turn()
    ids = bench.sql("SELECT id FROM dispatcher.execution ORDER BY id")
    batch.cancel()
    bench.store.cancel_sent({ids[0]: 0.0, ids[1]: 0.0})
    bench.store.cancel_sent({ids[0]: 0.0})
    due = [row.id for row in bench.store.due(HERE)["cancel"]]
    assert due == [ids[2], ids[3], ids[1], ids[0]]
    assert bench.finish(batch).state == "cancelled"


def test_what_another_worker_has_seen_start_is_not_ended_for_its_start(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker finds it late, stops for ten minutes, and goes on where it was."""
    bench = make_bench(job(start_timeout="60s", timeout="2h"))
    bench.script(Ending(seconds=3600, start_seconds=65))
    batch = bench.enqueue([1])
    bench.turn()
    bench.advance(61)
    other = bench.worker("worker-2")
    ask = bench.store.cancel_executions

    def sleep(ids: Sequence[int], kind: CancelKind, reason: str) -> None:
        monkeypatch.undo()
        bench.advance(600)
        other.follow(HERE)
        ask(ids, kind, reason)

    monkeypatch.setattr(bench.store, "cancel_executions", sleep)
    bench.follow()
    assert bench.store.cancel_executions == ask, "it was asked"
    assert bench.finish(batch, step=300).state == "succeeded"
    assert bench.outcomes(batch) == ["succeeded"]


@pytest.mark.parametrize("asked_at", [20, 61])
def test_what_another_worker_has_seen_again_is_neither_stopped_nor_lost(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, asked_at: int
) -> None:
    """A worker stops for ten minutes with an answer in hand, as the grace is half or all over."""
    bench = make_bench(job(timeout="2h"), settings={"absent_grace": "60s"})
    bench.script(seconds=3600)
    batch = bench.enqueue([1])
    bench.turn()
    bench.turn(60)
    other = bench.worker("worker-2")
    backend = bench.engine.places[HERE].backend

    def missing(handles: Sequence[Handle]) -> dict[Handle, Report]:
        return {handle: Report(Phase.ABSENT) for handle in handles}

    def sleep(handles: Sequence[Handle]) -> dict[Handle, Report]:
        answer = missing(handles)
        monkeypatch.undo()
        bench.advance(600)
        other.follow(HERE)
        return answer

    monkeypatch.setattr(backend, "poll", missing)
    bench.advance(30)
    bench.follow()
    assert bench.sql("SELECT absent_since IS NOT NULL FROM dispatcher.execution") == [True]
    bench.advance(asked_at)
    monkeypatch.setattr(backend, "poll", sleep)
    bench.follow()
    assert bench.sql("SELECT absent_since FROM dispatcher.execution") == [None]
    assert bench.world.calls["cancel"] == 0
    assert bench.finish(batch, step=300).state == "succeeded"
    assert bench.outcomes(batch) == ["succeeded"]


def test_what_was_never_enqueued_cannot_be_cancelled(bench: Bench) -> None:
    with pytest.raises(UnknownBatch, match=r'^no batch "nobody"; `dispatcher batches` lists them$'):
        bench.dispatcher.cancel("nobody")


def test_a_cancel_in_the_providers_console_fails_the_chunk_unretried(bench: Bench) -> None:
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.turn()
    bench.world.kill(bench.world.handles()[0], 0, Outcome.CANCELLED, "stopped by hand")
    batch = bench.finish(batch)
    assert (batch.state, bench.outcomes(batch)) == ("failed", ["cancelled"])
    assert "cancelled; not retried: stopped by hand" in (batch.reason or "")


def test_a_cancel_takes_a_long_plan_back(bench: Bench) -> None:
    batch = bench.enqueue(range(3000))
    held, go_on = Event(), Event()
    cut = planner.plan_chunks

    def slow(*args: Any, **named: Any) -> Iterator[Any]:
        for number, chunk in enumerate(cut(*args, **named)):
            if number == 1500:
                held.set()
                assert go_on.wait(60)
            yield chunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "plan_chunks", slow)
        thread = Thread(target=bench.engine.plan, args=(batch.id,))
        thread.start()
        try:
            assert held.wait(60)
            other = bench.worker("worker-2")
            assert other.plan(batch.id) is None, "another planner leaves it alone"
            assert batch.cancel().state == "cancelled", "a cancel does not wait for a plan"
        finally:
            go_on.set()
            thread.join(60)
    assert bench.states(batch) == []
    assert batch.refresh().state == "cancelled"
    again = bench.dispatcher.retry(batch.id)
    assert again.state == "planning"
    assert bench.finish(again).chunk_count == 3000


def test_a_planner_that_dies_in_the_middle_leaves_nothing(bench: Bench) -> None:
    batch = bench.enqueue(range(3000))
    cut = planner.plan_chunks

    def deadly(*args: Any, **named: Any) -> Iterator[Any]:
        for number, chunk in enumerate(cut(*args, **named)):
            if number == 1500:
                raise KeyboardInterrupt
            yield chunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "plan_chunks", deadly)
        with pytest.raises(KeyboardInterrupt):
            bench.engine.plan(batch.id)
    assert (batch.refresh().state, bench.states(batch)) == ("planning", [])
    bench.plan()
    assert (batch.refresh().state, len(bench.states(batch))) == ("running", 3000)


# --- deadlines ------------------------------------------------------------------------------------


def test_a_batch_ends_at_its_deadline_whatever_runs(make_bench: MakeBench) -> None:
    bench = make_bench(job(deadline="10m"), limits={"max_running": 1})
    bench.script(LONG)
    batch = bench.enqueue(range(3))
    bench.turn()
    bench.turn(599)
    assert bench.states(batch) == ["running", "pending", "pending"]
    bench.turn(1)
    assert bench.states(batch) == ["running", "failed", "failed"]
    batch = bench.finish(batch)
    assert (batch.state, batch.reason) == ("failed", "the batch's deadline passed")
    assert bench.outcomes(batch) == ["cancelled"]
    assert bench.world.running() == 0


def test_a_batch_that_waits_to_be_planned_ends_at_its_deadline_too(make_bench: MakeBench) -> None:
    bench = make_bench(job(deadline="10m", target="elsewhere"))
    batch = bench.enqueue([1])
    bench.turn()
    assert batch.refresh().state == "planning", "nobody here serves its target"
    bench.turn(600)
    assert batch.refresh().state == "failed"


def test_what_does_not_start_in_time_is_ended_and_tried_again(make_bench: MakeBench) -> None:
    bench = make_bench(job(start_timeout="2m"))
    bench.script(Ending(start_seconds=1000))
    batch = bench.enqueue([1])
    bench.turn()
    bench.turn(119)
    assert bench.world.calls["cancel"] == 0
    bench.turn(1)
    batch = bench.finish(batch)
    assert batch.state == "succeeded"
    assert bench.outcomes(batch) == ["start_failed", "succeeded"]


def test_what_started_while_nobody_looked_is_not_ended_for_its_start(make_bench: MakeBench) -> None:
    bench = make_bench(job(start_timeout="2m"))
    bench.script(seconds=1800)
    batch = bench.enqueue([1])
    bench.turn()
    bench.advance(600)  # all workers were down
    other = bench.worker("worker-2")
    for _ in range(3):
        other.follow(HERE)
    assert bench.world.calls["cancel"] == 0
    assert bench.finish(batch, step=60).state == "succeeded"
    assert bench.outcomes(batch) == ["succeeded"]


def test_what_nobody_can_ask_about_is_not_ended_for_its_start(make_bench: MakeBench) -> None:
    bench = make_bench(job(start_timeout="2m"))
    bench.script(seconds=1800)
    batch = bench.enqueue([1])
    bench.turn()
    bench.world.fail_next("poll", Fault.UNAVAILABLE, times=8)
    for _ in range(8):
        bench.turn(60)
    assert bench.world.calls["cancel"] == 0
    assert bench.finish(batch, step=60).state == "succeeded"


def test_a_provider_that_stops_a_task_for_its_time_is_believed(make_bench: MakeBench) -> None:
    bench = make_bench(job(timeout="5m", retry={"attempts": 1}))
    bench.script(LONG)
    batch = bench.finish(bench.enqueue([1]), step=10)
    assert (batch.state, bench.outcomes(batch)) == ("failed", ["timed_out"])
    assert bench.world.calls["cancel"] == 0


def test_a_provider_that_does_not_stop_it_is_told_to(make_bench: MakeBench) -> None:
    bench = make_bench(job(timeout="5m", start_timeout="1m", retry={"attempts": 1}))
    bench.world.enforces_timeout = False
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.until(lambda: bench.world.calls["cancel"] > 0, "cancelled", step=10)
    assert 60 + 300 <= bench.monotonic() - 1000 <= 60 + 300 + 30 + 20
    batch = bench.finish(batch)
    assert (batch.state, bench.outcomes(batch)) == ("failed", ["timed_out"])


# --- what vanishes --------------------------------------------------------------------------------


def test_what_the_provider_no_longer_knows_is_lost_after_the_grace(make_bench: MakeBench) -> None:
    bench = make_bench(settings={"absent_grace": "60s"})
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.turn()
    bench.world.vanish(bench.world.handles()[0])
    bench.turn(2)
    assert bench.sql("SELECT absent_since IS NOT NULL FROM dispatcher.execution") == [True]
    bench.turn(58)
    assert bench.outcomes(batch) == [None], "not before its grace is over"
    bench.turn(20)
    assert bench.outcomes(batch) == ["lost"], "it is looked at three times in its grace"
    assert bench.world.calls["cancel"] == 1, "a last cancel, in case it lives"
    assert bench.finish(batch).state == "succeeded"


def test_the_grace_survives_a_change_of_workers(make_bench: MakeBench) -> None:
    bench = make_bench(settings={"absent_grace": "60s"})
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.turn()
    bench.world.vanish(bench.world.handles()[0])
    bench.turn(2)
    bench.advance(59)
    bench.worker("worker-2").follow(HERE)
    assert bench.outcomes(batch) == [None]
    bench.advance(1)
    bench.worker("worker-3").follow(HERE)
    assert bench.outcomes(batch) == ["lost"]


def test_what_is_seen_again_was_never_lost(make_bench: MakeBench) -> None:
    bench = make_bench(settings={"absent_grace": "60s"})
    bench.script(seconds=300)
    batch = bench.enqueue([1])
    bench.turn()
    (handle,) = bench.world.handles()
    execution = bench.world._executions.pop(handle)  # the provider's list lags
    bench.turn(2)
    assert bench.sql("SELECT absent_since IS NOT NULL FROM dispatcher.execution") == [True]
    bench.world._executions[handle] = execution
    bench.turn(30)
    assert bench.sql("SELECT absent_since FROM dispatcher.execution") == [None]
    assert bench.finish(batch, step=20).state == "succeeded"
    assert bench.outcomes(batch) == ["succeeded"]


def test_a_poll_that_fails_is_never_an_outcome(bench: Bench) -> None:
    bench.script(seconds=30)
    batch = bench.enqueue([1])
    bench.turn()
    bench.world.fail_next("poll", Fault.UNAVAILABLE, times=20)
    for _ in range(20):
        bench.turn(31)
    assert bench.states(batch) == ["running"]
    assert bench.finish(batch).state == "succeeded"


# --- plans that fail ------------------------------------------------------------------------------


def test_a_batch_that_cannot_be_planned_says_why_and_can_be_planned_again(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    bench = make_bench()
    items = tmp_path / "items.jsonl"
    items.write_text("1\nnot json\n")
    batch = bench.dispatcher.enqueue("work", f"file://{items}")
    bench.turn()
    batch = batch.refresh()
    assert batch.state == "failed"
    assert batch.finished
    assert ":2 is not JSON" in (batch.reason or "")
    items.write_text("1\n2\n")
    again = bench.dispatcher.retry(batch.id)
    assert (again.state, again.reason) == ("planning", None)
    again = bench.finish(again)
    assert (again.state, again.item_count) == ("succeeded", 2)


def test_a_template_that_an_item_does_not_fit_fails_the_plan(make_bench: MakeBench) -> None:
    bench = make_bench(job(args=["{items:csv}"]))
    batch = bench.enqueue(["a", {"b": 1}])
    bench.turn()
    assert batch.refresh().state == "failed"
    assert "{items:csv} takes text, numbers, true and false" in (batch.refresh().reason or "")
    assert bench.states(batch) == []


def test_a_batch_whose_source_fails_in_words_that_no_column_holds_says_why(
    make_bench: MakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop_rows.py").write_text(
        "def rows():\n    raise ValueError('row 7: \\0 \\ud800 in a name')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    bench = make_bench(job(items={"source": "shop_rows:rows"}))
    batch = bench.enqueue(None)
    bench.turn()
    batch = batch.refresh()
    assert batch.state == "failed"
    assert "row 7: \N{REPLACEMENT CHARACTER}" in (batch.reason or "")


def test_a_plan_that_is_put_off_in_words_that_no_column_holds_says_why(bench: Bench) -> None:
    batch = bench.enqueue([1])
    bench.store.postpone_plan(batch.id, timedelta(minutes=3), "no \0 answer")
    assert batch.refresh().reason == "no \N{REPLACEMENT CHARACTER} answer"
    bench.advance(180)
    assert bench.finish(batch).state == "succeeded"


def test_a_plan_whose_source_does_not_answer_is_tried_again_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dispatcher.errors import Unreachable  # noqa: PLC0415 - beside its only use

    answers: list[Exception | None] = [Unreachable("s3 does not answer"), None]

    class Stream:
        def __enter__(self) -> Iterator[str]:
            def texts() -> Iterator[str]:
                yield "1"
                if (error := answers.pop(0)) is not None:
                    raise error

            return texts()

        def __iter__(self) -> Iterator[str]:
            return self.__enter__()

        def __exit__(self, *_: object) -> None:
            return

    monkeypatch.setattr(planner, "read_items", lambda _uri: Stream())
    batch = bench.dispatcher.enqueue("work", "s3://bucket/items.jsonl")
    bench.turn()
    assert (batch.refresh().state, batch.refresh().reason) == ("planning", "s3 does not answer")
    bench.turn(4)
    assert len(answers) == 1
    bench.turn(1)
    assert batch.refresh().state == "running"
    assert bench.states(batch) == ["running"]
    assert batch.refresh().reason is None


# --- the operator's retry -------------------------------------------------------------------------


def test_a_retry_runs_what_failed_again_with_fresh_budgets(make_bench: MakeBench) -> None:
    bench = make_bench(job(retry={"attempts": 2}))
    bench.world.script = lambda _batch, chunk, attempt: Ending(
        Outcome.FAILED if chunk == 1 and attempt <= 3 else Outcome.SUCCEEDED
    )
    batch = bench.finish(bench.enqueue(range(3)))
    assert (batch.state, bench.outcomes(batch, 1)) == ("failed", ["failed"] * 2)
    again = bench.dispatcher.retry(batch.id)
    assert (again.state, again.finished_at, again.reason) == ("running", None, None)
    assert bench.states(again) == ["succeeded", "pending", "succeeded"]
    again = bench.finish(again)
    assert again.state == "succeeded"
    assert bench.outcomes(again, 1) == ["failed", "failed", "failed", "succeeded"]
    assert bench.outcomes(again, 0) == ["succeeded"]


def test_a_retry_can_run_every_chunk_again(bench: Bench) -> None:
    batch = bench.finish(bench.enqueue(range(2)))
    again = bench.finish(bench.dispatcher.retry(batch.id, failed_only=False))
    assert again.state == "succeeded"
    assert [bench.outcomes(again, index) for index in range(2)] == [["succeeded"] * 2] * 2


def test_a_cancelled_batch_can_be_reopened(bench: Bench) -> None:
    bench.script(LONG)
    batch = bench.enqueue(range(2))
    bench.turn()
    batch.cancel()
    batch = bench.finish(batch)
    again = bench.dispatcher.retry(batch.id)
    assert (again.state, again.cancel_requested_at) == ("running", None)
    assert bench.finish(again).state == "succeeded"


def test_a_retry_has_the_whole_deadline_again(make_bench: MakeBench) -> None:
    bench = make_bench(job(deadline="10m"))
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.turn()
    bench.turn(600)
    batch = bench.finish(batch)
    assert batch.state == "failed"
    again = bench.dispatcher.retry(batch.id)
    assert (again.deadline - bench.at).total_seconds() == 600
    assert bench.finish(again).state == "succeeded"


def test_a_retry_needs_a_final_batch_and_something_to_do(bench: Bench) -> None:
    batch = bench.enqueue([1])
    with pytest.raises(NotAllowed, match=f"^batch {batch.id} is planning: failed chunks are"):
        bench.dispatcher.retry(batch.id)
    bench.finish(batch)
    with pytest.raises(NotAllowed, match=f"^batch {batch.id} is succeeded and has no chunk"):
        bench.dispatcher.retry(batch.id)
    with pytest.raises(UnknownBatch):
        bench.dispatcher.retry("nobody")
    empty = bench.enqueue([])
    bench.turn()
    with pytest.raises(NotAllowed, match=r"has no chunk to retry"):
        bench.dispatcher.retry(empty.id, failed_only=False)


# --- jobs that no longer fit ----------------------------------------------------------------------


def change_job(bench: Bench, batch_id: str) -> None:
    """Make the kept job one that the target's backend does not take any more."""
    bench.sql(
        """
        UPDATE dispatcher.batch SET job = jsonb_set(job::jsonb, '{options}', '{"gone": 1}')::json
        WHERE id = :id
        """,
        id=batch_id,
    )


def test_a_job_that_its_target_no_longer_takes_fails_its_batch(bench: Bench) -> None:
    batch = bench.enqueue([1, 2])
    bench.plan()
    change_job(bench, batch.id)
    bench.launch()
    bench.plan()
    batch = batch.refresh()
    assert batch.state == "failed"
    assert "the job cannot be run on target here" in (batch.reason or "")
    assert bench.world.calls["launch"] == 0


def test_an_unknown_launch_of_a_job_that_no_longer_fits_still_comes_to_an_end(
    bench: Bench,
) -> None:
    bench.world.fail_next("launch", Fault.REPLY_LOST)
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.plan()
    bench.launch()
    change_job(bench, batch.id)
    other = bench.worker("worker-2")
    for _ in range(6):
        other.follow(HERE)
        bench.advance(10)
    assert batch.refresh().state == "failed"
    assert bench.world.running() == 1
    # What the lost launch has started is found by its label.
    other.sweep_strays(HERE)
    other.follow(HERE)
    assert bench.world.running() == 0
    bench.advance(2)
    other.follow(HERE)
    assert bench.executions() == ["ended", "ended"]


def test_a_cancel_that_the_provider_refused_for_now_has_ended_nothing(bench: Bench) -> None:
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.turn()
    bench.dispatcher.cancel(batch.id)
    sent = "SELECT cancel_sent_at IS NOT NULL FROM dispatcher.execution"
    bench.world.fail_next("cancel", Fault.THROTTLED)
    bench.turn(1)
    assert (bench.world.calls["cancel"], bench.sql(sent)) == (1, [False])
    bench.turn(3)
    assert (bench.world.calls["cancel"], bench.sql(sent)) == (2, [True])


def test_what_could_not_be_told_of_was_not_looked_at(bench: Bench) -> None:
    bench.script(LONG)
    bench.enqueue([1])
    bench.turn()
    watch = bench.engine.places[HERE].watch
    (one,) = watch._known.values()
    watch.untold(one, bench.monotonic())
    assert one.looked is None
    assert watch.fresh([one.id], bench.monotonic()) == []
