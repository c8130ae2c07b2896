"""What goes wrong with one execution, or once, stays with it: nothing lost, nobody else waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa
from workbench import HERE, Bench, job

from dispatcher import schema
from dispatcher.backends.base import (
    Backend,
    Handle,
    Launched,
    LaunchRequest,
    Phase,
    Report,
    TaskReport,
    Unavailable,
)
from dispatcher.errors import Unreachable
from dispatcher.states import Outcome
from dispatcher.testing import Ending, Fault

MakeBench = Callable[..., Bench]


class Spoiled:
    """A backend of which some answers are changed by the test."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.find_fails = False
        self.not_found_out: str | None = None
        """The job of which nothing can be looked up."""

        self.throttled: str | None = None
        """The job of which each launch is refused for now."""

        self.cancel: Callable[[Handle], None] = inner.cancel
        self.report: Callable[[Report], Report] = lambda report: report

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def find(self, request: LaunchRequest) -> Launched | None:
        if self.find_fails:
            raise ValueError("a bug in the backend")
        if request.job == self.not_found_out:
            raise Unavailable("403: this worker may not list executions of the job")
        return self._inner.find(request)

    def launch(self, request: LaunchRequest) -> Launched:
        if request.job == self.throttled:
            raise Unavailable("429: too many executions of this job", not_started=True)
        return self._inner.launch(request)

    def poll(self, handles: Sequence[Handle]) -> Mapping[Handle, Report]:
        return {handle: self.report(r) for handle, r in self._inner.poll(handles).items()}


def spoiled(make_bench: MakeBench, *jobs: Any, **more: Any) -> tuple[Bench, Spoiled]:
    made: list[Spoiled] = []

    def wrap(inner: Backend) -> Any:
        made.append(Spoiled(inner))
        return made[-1]

    bench = make_bench(*jobs, wrap=wrap, **more)
    bench.turn()
    return bench, made[0]


def test_a_result_that_could_not_be_written_at_once_is_written_later(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(job("packed", options={"max_tasks": 3, "parallelism": 3}))
    bench.world.script = lambda _b, chunk, _a: Ending(seconds=(1, 50, 50)[chunk])
    batch = bench.enqueue(range(3), "packed")
    bench.turn()
    bench.advance(2)
    with monkeypatch.context() as broken:

        def unreachable(_started: Mapping[int, datetime | None]) -> None:
            raise Unreachable("the database is restarting")

        broken.setattr(bench.store, "mark_started", unreachable)
        with pytest.raises(Unreachable):
            bench.engine.follow(HERE)
    assert bench.finish(batch).state == "succeeded"
    assert [bench.outcomes(batch, index) for index in range(3)] == [["succeeded"]] * 3


def test_a_start_that_could_not_be_written_at_once_does_not_look_like_none(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(job(start_timeout="1m", timeout="2h"))
    bench.script(seconds=1800)
    batch = bench.enqueue([1])
    bench.turn()
    bench.advance(2)
    with monkeypatch.context() as broken:

        def unreachable(_started: Mapping[int, datetime | None]) -> None:
            raise Unreachable("the database is restarting")

        broken.setattr(bench.store, "mark_started", unreachable)
        with pytest.raises(Unreachable):
            bench.engine.follow(HERE)
    for _ in range(70):
        bench.turn()
        bench.advance(30)
    assert bench.finish(batch).state == "succeeded"


def test_an_exit_code_that_no_column_holds_ends_its_attempt_and_no_other(
    make_bench: MakeBench,
) -> None:
    bench, backend = spoiled(make_bench, job(retry={"attempts": 1}))

    def windows(report: Report) -> Report:
        if report.phase is not Phase.ENDED:
            return report
        naive = datetime(2026, 11, 21, 1, 2, 3)  # noqa: DTZ001 - that is the point
        ended = [
            TaskReport(t.index, Outcome.FAILED, 3221225477, None, naive, naive)
            for t in report.tasks
        ]
        return Report(report.phase, report.started_at, tuple(ended))

    backend.report = windows
    batch = bench.finish(bench.enqueue(range(3)))
    assert batch.state == "failed"
    (attempt,) = next(iter(bench.dispatcher.chunks(batch.id))).attempts
    assert attempt.outcome == "failed"
    assert attempt.reason == "ended (exit code 3221225477)"


def test_an_execution_that_cannot_be_looked_up_holds_up_no_cancel(make_bench: MakeBench) -> None:
    bench, backend = spoiled(make_bench)
    bench.script(seconds=10_000)
    running = bench.enqueue(range(2))
    bench.turn()
    bench.world.fail_next("launch", Fault.REPLY_LOST)
    backend.find_fails = True
    lost = bench.enqueue([1])
    bench.turn(3)
    bench.dispatcher.cancel(running.id)
    for _ in range(10):
        bench.turn()
        bench.advance(1)
    assert running.refresh().state == "cancelled"
    assert lost.refresh().state == "running"
    backend.find_fails = False
    bench.advance(60)
    bench.turn(3)
    assert lost.refresh().counts == {"running": 1}


def test_an_execution_that_can_never_be_looked_up_holds_up_no_other_look(
    make_bench: MakeBench,
) -> None:
    bench, backend = spoiled(make_bench, job("bad"), job("good"))
    backend.not_found_out = "bad"
    bench.world.fail_next("launch", Fault.REPLY_LOST, times=3)
    bad = bench.enqueue(range(3), "bad")
    bench.turn()
    for _ in range(40):
        bench.turn(2)
    bench.world.fail_next("launch", Fault.REPLY_LOST, times=2)
    good = bench.enqueue(range(2), "good")
    bench.until(lambda: bench.world.calls["launch"] == 5, "the good one was called", turns=40)
    bench.until(lambda: bool(good.refresh().finished), "the good one ended", turns=20)
    assert good.refresh().state == "succeeded"
    assert bad.refresh().state == "running"
    backend.not_found_out = None
    bench.advance(60)
    assert bench.finish(bad).state == "succeeded"


def test_a_job_whose_launches_are_always_refused_for_now_holds_up_no_other_for_long(
    make_bench: MakeBench,
) -> None:
    bench, backend = spoiled(make_bench, job("bad"), job("good"), concurrency=2)
    backend.throttled = "bad"
    bad = bench.enqueue(range(9), "bad", priority=10)
    bench.turn()
    good = bench.enqueue(range(9), "good")
    bench.until(lambda: bool(good.refresh().finished), "the good one ended", step=5, turns=30)
    assert good.refresh().state == "succeeded"
    waits = bench.sql("SELECT count(*) FROM dispatcher.execution WHERE job_name = 'bad'")
    assert waits == [2], "what was asked for before comes first, within the job"
    backend.throttled = None
    assert bench.finish(bad, step=10).state == "succeeded"
    assert bench.outcomes(bad) == ["succeeded"]


def test_a_call_that_meets_a_fault_of_ours_is_put_off_and_takes_no_token_at_each_turn(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(limits={"launches_per_minute": 60.0})
    bench.world.fail_next("launch", Fault.THROTTLED)
    batch = bench.enqueue([1])
    bench.turn()
    bench.advance(10)
    tries: list[int] = []

    def fail(_place: Any, row: Any) -> None:
        tries.append(row.id)
        raise ValueError("a bug in the templates")

    with monkeypatch.context() as broken:
        broken.setattr(bench.engine._launcher, "_call_of", fail)
        for _ in range(10):
            bench.turn(1)
    assert len(tries) == 1
    bench.advance(30)
    assert bench.finish(batch).state == "succeeded"


def test_what_cannot_be_cancelled_now_hides_nothing_that_must_be_looked_up(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dispatcher.store.following.MOST_DUE", 3)
    bench, backend = spoiled(make_bench, job("many"), job("good"))
    bench.script(seconds=10_000)
    many = bench.enqueue(range(5), "many")
    bench.turn()
    bench.world.fail_next("launch", Fault.REPLY_LOST)
    bench.enqueue([1], "good")
    bench.plan()
    bench.launch()
    assert bench.executions() == [*["launched"] * 5, "unknown"]

    def refuse(_handle: Handle) -> None:
        raise Unavailable("the budget of cancels is used up", not_started=True)

    with monkeypatch.context() as full:
        full.setattr(backend, "cancel", refuse)
        bench.dispatcher.cancel(many.id)
        bench.follow()
    assert bench.executions() == ["launched"] * 6
    bench.finish(many)


def test_a_launch_that_never_gets_a_clear_answer_is_given_up(make_bench: MakeBench) -> None:
    bench = make_bench(job(retry={"infrastructure_attempts": 1}))
    bench.world.fail_next("launch", Fault.UNAVAILABLE, times=1000)
    batch = bench.enqueue([1])
    for _ in range(200):
        bench.turn()
        bench.advance(5)
    batch = batch.refresh()
    assert batch.state == "failed"
    assert "5 launch calls got no clear answer and started nothing" in str(batch.reason)
    assert bench.world.calls["launch"] == 5


def written_by(bench: Bench, code_version: int) -> None:
    with bench.database.begin() as tx:
        for table in (schema.batch, schema.execution):
            tx.execute(sa.update(table).values(code_version=code_version))


def test_what_newer_code_wrote_is_left_to_newer_workers(bench: Bench) -> None:
    bench.script(seconds=5)
    batch = bench.enqueue(range(2))
    bench.turn()
    written_by(bench, 99)
    bench.advance(10_000)
    bench.turn(3)
    assert batch.refresh().counts == {"running": 2}, "neither settled nor timed out"
    written_by(bench, 1)
    assert bench.finish(batch).state == "succeeded"


def test_a_round_holds_only_so_many_bytes_of_items(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(job(options={"max_tasks": 10, "parallelism": 10}))
    monkeypatch.setattr("dispatcher.engine.launcher.ROUND_BYTES", 350)
    batch = bench.enqueue(["x" * 98] * 10)  # each chunk is 102 bytes of JSON
    bench.plan()
    bench.engine.launch(HERE)
    assert [len(request.tasks) for request in bench.world.requests()] == [3]
    assert bench.finish(batch).state == "succeeded"
    assert [len(request.tasks) for request in bench.world.requests()] == [3, 3, 3, 1]
