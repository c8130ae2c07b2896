"""Launch once: the intent before the call, every ambiguity cleared up, one execution for a key."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from threading import Event, Thread
from typing import Any

import pytest
from workbench import HERE, Bench, job

from dispatcher.backends.base import (
    Backend,
    Definition,
    Handle,
    Launched,
    LaunchRequest,
    Remark,
    Report,
    TaskReport,
    Unavailable,
)
from dispatcher.engine.place import Ending as Given
from dispatcher.states import Outcome
from dispatcher.testing import Ending, Fault

RUNS = Ending(seconds=60)


class Spy:
    """A backend that does something of the test's around each launch."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.Options, self.Settings, self.limits = inner.Options, inner.Settings, inner.limits
        self.DEFAULTS, self.COMMAND = inner.DEFAULTS, inner.COMMAND
        self.before: Callable[[LaunchRequest], None] = lambda _request: None
        self.after: Callable[[LaunchRequest], None] = lambda _request: None

    def launch(self, request: LaunchRequest) -> Launched:
        self.before(request)
        launched = self.inner.launch(request)
        self.after(request)
        return launched

    def home(self) -> Mapping[str, str] | None:
        return None

    def definition(self, options: Any) -> Definition:
        return self.inner.definition(options)

    def check(self, job: Any, options: Any) -> Sequence[Remark]:
        return self.inner.check(job, options)

    def find(self, request: LaunchRequest) -> Launched | None:
        return self.inner.find(request)

    def poll(self, handles: Sequence[Handle]) -> Mapping[Handle, Report]:
        return self.inner.poll(handles)

    def winner(self, handle: Handle, name: str) -> Handle:
        return self.inner.winner(handle, name)

    def cancel(self, handle: Handle) -> None:
        self.inner.cancel(handle)

    def strays(self, instance: str, since: datetime) -> Any:
        return self.inner.strays(instance, since)

    def logs(self, handle: Handle, task_index: int, tail: int) -> Iterator[str]:
        return self.inner.logs(handle, task_index, tail)

    def clean(self, now: datetime) -> int:
        return self.inner.clean(now)


@pytest.fixture
def spied(make_bench: Callable[..., Bench]) -> tuple[Bench, Spy]:
    spies: list[Spy] = []

    def wrap(inner: Backend) -> Any:
        spies.append(Spy(inner))
        return spies[-1]

    bench = make_bench(wrap=wrap)
    return bench, spies[0]


def die_before_the_call(bench: Bench) -> int:
    """Commit an intent as a launcher does, and be gone."""
    (call,) = bench.intend()
    return call.execution_id


def test_the_intent_is_committed_before_the_provider_is_called(spied: tuple[Bench, Spy]) -> None:
    bench, spy = spied
    seen: list[Any] = []
    spy.before = lambda request: seen.extend(
        bench.sql(
            "SELECT e.state, e.request::text, c.state, a.number, a.outcome "
            "FROM dispatcher.execution e JOIN dispatcher.attempt a ON a.execution_id = e.id "
            "JOIN dispatcher.chunk c ON c.index = a.chunk_index WHERE e.key = :key",
            key=request.key,
        )
    )
    bench.enqueue([1])
    bench.turn()
    ((execution, request, chunk, number, outcome),) = seen
    assert (execution, chunk, number, outcome) == ("intended", "launching", 1, None)
    assert json.loads(request)["command"] == ["work"]


def test_no_transaction_is_open_while_the_provider_is_called(spied: tuple[Bench, Spy]) -> None:
    bench, spy = spied
    open_ones: list[Any] = []
    spy.before = lambda _request: open_ones.extend(
        bench.sql(
            "SELECT state, query FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%'"
        )
    )
    bench.enqueue([1])
    bench.turn()
    assert bench.world.calls["launch"] == 1
    assert open_ones == []


def test_a_lost_reply_is_found_by_its_key_and_adopted(bench: Bench) -> None:
    bench.script(RUNS)
    bench.world.fail_next("launch", Fault.REPLY_LOST)
    batch = bench.enqueue([1])
    bench.plan()
    bench.launch()
    assert (bench.executions(), bench.states(batch)) == (["unknown"], ["launching"])
    bench.follow()
    assert (bench.executions(), bench.states(batch)) == (["launched"], ["running"])
    assert bench.finish(batch).state == "succeeded"
    assert bench.world.calls["launch"] == 1
    assert len(bench.world.handles()) == 1
    assert bench.outcomes(batch) == ["succeeded"]


def test_a_refusal_fails_the_chunk_and_is_not_tried_again(bench: Bench) -> None:
    bench.world.fail_next("launch", Fault.REJECTED)
    batch = bench.finish(bench.enqueue([1]))
    assert batch.state == "failed"
    assert bench.outcomes(batch) == ["rejected"]
    assert bench.world.calls["launch"] == 1
    assert "the provider would refuse it again" in (batch.reason or "")
    assert "scripted fault of launch: rejected" in (batch.reason or "")


def test_a_throttled_launch_costs_no_attempt_and_is_called_again_under_the_same_key(
    bench: Bench,
) -> None:
    bench.world.fail_next("launch", Fault.THROTTLED, times=3, retry_after=timedelta(seconds=20))
    batch = bench.enqueue([1])
    bench.turn()
    keys = bench.sql("SELECT key FROM dispatcher.execution")
    assert (bench.executions(), bench.states(batch)) == (["intended"], ["launching"])
    bench.turn(29)
    assert bench.world.calls["launch"] == 1, "20 s and half as much again, as the roll says"
    bench.turn(1)
    assert bench.world.calls["launch"] == 2
    assert bench.finish(batch).state == "succeeded"
    assert bench.world.calls["launch"] == 4
    assert bench.sql("SELECT key FROM dispatcher.execution") == keys
    assert bench.outcomes(batch) == ["succeeded"]


def test_a_launcher_that_died_after_its_commit_is_followed_up_under_the_same_key(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(settings={"find_grace": "20s"})
    batch = bench.enqueue([1])
    bench.plan()
    die_before_the_call(bench)
    bench.turn(14)
    assert bench.executions() == ["intended"], "its window of 15 s is not over"
    bench.turn(2)
    assert bench.executions() == ["unknown"]
    # 15 s of window, 10 s that a call may take, 20 s in which a find may miss it.
    while bench.monotonic() < 1000 + 44:
        assert bench.world.calls["launch"] == 0
        bench.turn(1)
    bench.until(lambda: bench.world.calls["launch"] == 1, "called again", step=1, turns=15)
    assert bench.finish(batch).state == "succeeded"
    assert bench.world.calls["launch"] == 1
    assert bench.sql("SELECT key, calls FROM dispatcher.execution") == [
        (bench.world.requests()[0].key, 2)
    ]
    assert bench.outcomes(batch) == ["succeeded"]


def test_the_repeated_request_is_the_same_to_the_byte(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(
        job(
            args=["{items:json}", "{param:day}"],
            env={"CHUNK": "{chunk.index}/{attempt}"},
            params={"properties": {"day": {}}},
            labels={"team": "a"},
            chunk={"size": 2},
            options={"max_tasks": 3},
        )
    )
    requests: list[LaunchRequest] = []
    bench.enqueue(["ä", {"b": 1.50}, None, 4, 5], params={"day": "2026-01-01"})
    bench.plan()
    (call,) = bench.intend()
    requests.append(call.request)
    other = bench.worker("worker-2")
    bench.advance(60)
    other.follow(HERE)
    other.follow(HERE)
    assert bench.world.requests() == requests


def test_what_cannot_be_launched_twice_safely_is_looked_for_twice(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(settings={"relaunch_safe": False})
    batch = bench.enqueue([1])
    bench.plan()
    die_before_the_call(bench)
    bench.advance(600)
    bench.follow()
    assert (bench.world.calls["find"], bench.world.calls["launch"]) == (1, 0)
    bench.follow()
    assert (bench.world.calls["find"], bench.world.calls["launch"]) == (1, 0), "not at once"
    bench.turn(2)
    assert (bench.world.calls["find"], bench.world.calls["launch"]) == (2, 1)
    assert bench.finish(batch).state == "succeeded"


def test_a_lost_call_is_made_again_though_other_answers_get_lost(
    make_bench: Callable[..., Bench],
) -> None:
    """It had its own wait; only a provider that asks for one may keep it waiting longer."""
    bench = make_bench(settings={"relaunch_safe": False})
    bench.enqueue([1])
    bench.plan()
    die_before_the_call(bench)
    bench.advance(600)
    bench.follow()
    bench.advance(2)
    place = bench.engine.places[HERE]
    bench.store.hold_launches(HERE, 60.0)
    bench.follow()
    assert bench.world.calls["launch"] == 0, "the provider asked all to wait"
    bench.advance(60)
    place.went_down("the answer was lost", resume_in=60.0)
    bench.advance(2)
    bench.follow()
    assert bench.world.calls["launch"] == 1


def test_a_find_that_fails_is_no_look(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(settings={"relaunch_safe": False})
    bench.enqueue([1])
    bench.plan()
    die_before_the_call(bench)
    bench.advance(600)
    bench.world.fail_next("find", Fault.UNAVAILABLE, times=3)
    for _ in range(3):
        bench.follow()
        bench.advance(30)
    assert bench.world.calls["find"] == 3
    bench.follow()
    assert bench.world.calls["launch"] == 0, "the first look that could see anything"
    bench.turn(30)
    assert bench.world.calls["launch"] == 1


def test_a_launcher_that_comes_too_late_does_not_call(bench: Bench) -> None:
    bench.enqueue([1])
    bench.plan()
    place, launcher = bench.engine.places[HERE], bench.engine._launcher
    by = bench.monotonic() + 15
    calls = bench.intend()
    bench.advance(15)
    launcher._call(place, calls, by)
    assert bench.world.calls["launch"] == 0
    assert bench.executions() == ["unknown"]
    assert bench.sql("SELECT down_since FROM dispatcher.target") == [None], "its fault it is not"


def test_a_launcher_that_slept_before_its_call_meets_the_relaunch_and_starts_nothing(
    bench: Bench,
) -> None:
    batch = bench.enqueue([1])
    bench.plan()
    place, launcher = bench.engine.places[HERE], bench.engine._launcher
    by = bench.monotonic() + 15
    calls = bench.intend()
    other = bench.worker("worker-2")
    bench.advance(60)
    other.follow(HERE)
    other.follow(HERE)
    assert bench.executions() == ["launched"]
    launcher._call(place, calls, by)
    assert bench.executions() == ["launched"]
    assert bench.finish(batch).state == "succeeded"
    assert len(bench.world.handles()) == 1


def test_an_execution_given_up_that_turns_up_is_cancelled_until_that_is_confirmed(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(settings={"relaunch_safe": False})
    bench.world.find_lag = timedelta(minutes=5)  # far beyond the grace that the backend claims
    bench.script(Ending(seconds=1000))
    bench.world.fail_next("launch", Fault.REPLY_LOST)
    batch = bench.enqueue([1])
    bench.turn()
    (first,) = bench.world.handles()
    bench.until(lambda: len(bench.world.handles()) == 2, "launched again", step=5)
    assert bench.states(batch) == ["running"]
    bench.advance(300)
    bench.world.fail_next("cancel", Fault.UNAVAILABLE, times=2)
    bench.engine.sweep_strays(HERE)
    stray = "SELECT handle, state, cancel_kind FROM dispatcher.execution WHERE stray"
    assert bench.sql(stray) == [(first, "launched", "stray")]
    assert bench.world.running() == 2
    bench.until(lambda: bench.sql(stray)[0][1] == "ended", "the stray ended", step=5)
    assert bench.world.calls["cancel"] == 3
    assert bench.world.running() == 1
    assert bench.finish(batch, step=30).state == "succeeded"
    assert bench.outcomes(batch) == ["succeeded"]


def test_a_late_answer_is_cancelled_as_a_stray(spied: tuple[Bench, Spy]) -> None:
    bench, spy = spied
    bench.script(Ending(seconds=1000))
    batch = bench.enqueue([1])
    bench.plan()
    called, answered = Event(), Event()

    def hang(_request: LaunchRequest) -> None:
        called.set()
        assert answered.wait(60)

    # The first launcher's call hangs; the batch is cancelled and given up meanwhile.
    spy.before = hang
    launcher = Thread(target=bench.engine.launch, args=(HERE,))
    launcher.start()
    assert called.wait(60)
    batch.cancel()
    other = bench.worker("worker-2")
    bench.until(
        lambda: other.follow(HERE) or batch.refresh().finished, "given up", step=5, turns=20
    )
    assert batch.refresh().state == "cancelled"
    assert bench.world.handles() == []
    bench.world.fail_next("cancel", Fault.UNAVAILABLE, times=2)
    answered.set()
    launcher.join(60)
    stray = "SELECT state, cancel_kind FROM dispatcher.execution WHERE stray"
    assert bench.sql(stray) == [("launched", "stray")]
    assert bench.world.running() == 1
    bench.until(lambda: bench.sql(stray) == [("ended", "stray")], "the stray ended", step=5)
    assert bench.world.calls["cancel"] == 3
    assert bench.world.running() == 0
    assert batch.refresh().state == "cancelled"
    assert bench.outcomes(batch) == ["cancelled"]


def test_what_runs_and_nobody_owns_is_found_and_cancelled(bench: Bench) -> None:
    bench.script(Ending(seconds=1000))
    batch = bench.enqueue([1])
    bench.turn()
    bench.engine.sweep_strays(HERE)
    assert bench.executions() == ["launched"], "what is ours is no stray"
    # Lost by the tables' word, alive by the provider's.
    (execution,) = bench.sql("SELECT id FROM dispatcher.execution")
    bench.engine._settler.settle(bench.engine.places[HERE], [Given(execution, final=True)])
    assert bench.states(batch) == ["pending"]
    bench.engine.sweep_strays(HERE)
    bench.engine.sweep_strays(HERE)
    assert bench.executions() == ["ended", "launched"]
    bench.follow()
    assert bench.world.calls["cancel"] == 1
    bench.until(lambda: bench.executions()[1] == "ended", "the stray ended", step=1)
    assert bench.world.running() == 0
    assert bench.finish(batch).state == "succeeded"


def test_a_stray_that_is_seen_again_is_cancelled_again(bench: Bench) -> None:
    found = Launched(handle="h.1", key="d-nobody-1")
    assert bench.store.record_stray(HERE, found, "it runs")
    assert not bench.store.record_stray(HERE, found, "it runs"), "known already"
    bench.until(lambda: bench.executions() == ["ended"], "gone", step=1)
    assert bench.store.record_stray(HERE, found, "it runs again")
    assert bench.executions() == ["launched"]
    bench.check()


def test_a_cancel_while_the_launch_is_unknown_looks_and_never_calls(bench: Bench) -> None:
    batch = bench.enqueue([1])
    bench.plan()
    die_before_the_call(bench)
    bench.turn(16)
    assert bench.executions() == ["unknown"]
    batch.cancel()
    assert batch.refresh().state == "running", "nobody can say yet that nothing of it runs"
    assert bench.finish(batch).state == "cancelled"
    assert bench.world.calls["launch"] == 0
    assert bench.outcomes(batch) == ["cancelled"]


def test_a_cancel_while_the_launch_is_unknown_ends_what_is_found(bench: Bench) -> None:
    bench.script(Ending(seconds=1000))
    bench.world.fail_next("launch", Fault.REPLY_LOST)
    batch = bench.enqueue([1])
    bench.plan()
    bench.launch()
    batch.cancel()
    assert bench.finish(batch).state == "cancelled"
    assert (bench.world.calls["launch"], bench.world.running()) == (1, 0)


def test_a_cancel_while_the_launch_is_throttled_ends_it_uncalled(bench: Bench) -> None:
    bench.world.fail_next("launch", Fault.THROTTLED)
    batch = bench.enqueue([1])
    bench.turn()
    batch.cancel()
    bench.turn()
    assert batch.refresh().state == "cancelled"
    assert bench.world.calls["launch"] == 1


def test_a_backend_that_breaks_its_contract_is_an_answer_that_says_nothing(
    spied: tuple[Bench, Spy],
) -> None:
    bench, spy = spied
    broken = iter([True])

    def crash(_request: LaunchRequest) -> None:
        if next(broken, False):
            raise ZeroDivisionError("a bug in a backend")

    spy.after = crash
    batch = bench.enqueue([1])
    bench.plan()
    bench.launch()
    assert bench.executions() == ["unknown"]
    assert bench.finish(batch).state == "succeeded"
    assert len(bench.world.handles()) == 1


def test_an_item_with_a_nul_character_can_be_an_argument_as_json(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(job(args=["{items:json}"]), concurrency=1)
    batch = bench.finish(bench.enqueue(["a\0b", "back\\u0000slash"]))
    assert batch.state == "succeeded"
    assert [r.tasks[0].args for r in bench.world.requests()] == [
        ('["a\\u0000b"]',),
        ('["back\\\\u0000slash"]',),
    ]
    requests = bench.sql("SELECT request ->> 'args' FROM dispatcher.execution ORDER BY id")
    assert [json.loads(args) for args in requests] == [
        ['["a\\u0000b"]'],
        ['["back\\\\u0000slash"]'],
    ]


def test_what_a_provider_says_may_hold_any_character(spied: tuple[Bench, Spy]) -> None:
    bench, spy = spied
    broken = iter([True])

    def fail(_request: LaunchRequest) -> None:
        if next(broken, False):
            raise Unavailable("odd \0 words \udc80 here")

    spy.after = fail
    bench.script(Ending(Outcome.FAILED, reason="also \0 and \udc80", output=("log \0 \udc80",)))
    batch = bench.finish(bench.enqueue([1]))
    assert batch.state == "succeeded"
    assert bench.outcomes(batch) == ["failed", "succeeded"]
    (tail,) = bench.sql("SELECT log_tail FROM dispatcher.attempt WHERE number = 1")
    assert tail.startswith("log ")


def test_an_open_call_is_not_made_again_by_anyone(spied: tuple[Bench, Spy]) -> None:
    bench, spy = spied
    called, go_on = Event(), Event()

    def hang(_request: LaunchRequest) -> None:
        called.set()
        assert go_on.wait(60)

    spy.before = hang
    batch = bench.enqueue([1])
    bench.plan()
    launcher = Thread(target=bench.engine.launch, args=(HERE,))
    launcher.start()
    assert called.wait(60)
    other = bench.worker("worker-2")
    assert other.launch(HERE).calls == 0
    other.follow(HERE)
    assert bench.engine.launch(HERE).calls == 0, "one round at a time in a process"
    go_on.set()
    launcher.join(60)
    assert bench.executions() == ["launched"], "the answer is recorded"
    assert bench.world.calls["launch"] == 1
    assert bench.finish(batch).state == "succeeded"


def test_a_late_throttled_answer_does_not_touch_the_next_call(bench: Bench) -> None:
    """Whoever slept between the provider's answer and its record comes too late with it."""
    bench.enqueue([1])
    bench.plan()
    execution = die_before_the_call(bench)
    bench.turn(16)
    bench.advance(60)
    assert bench.store.call_again(
        execution, old="unknown", calls=1, window=timedelta(seconds=15), reason="not found"
    )
    late = bench.sql("SELECT call_by FROM dispatcher.execution")
    bench.store.postpone_calls({execution: (1, 5.0, "throttled")})
    bench.store.record_unknown({execution: (1, "timeout")})
    refused = Given(execution, (TaskReport(0, Outcome.REJECTED),), final=True, call=1)
    bench.engine._settler.settle(bench.engine.places[HERE], [refused])
    assert bench.executions() == ["intended"]
    assert bench.sql("SELECT call_by FROM dispatcher.execution") == late
    bench.store.postpone_calls({execution: (2, 5.0, "throttled")})
    assert bench.sql("SELECT call_by FROM dispatcher.execution") == [None]
