"""The provider in memory does what its script says, and nothing else."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dispatcher.backends.base import (
    Definition,
    LaunchRequest,
    Phase,
    Rejected,
    TaskInput,
    Unavailable,
)
from dispatcher.job import Job
from dispatcher.states import Outcome
from dispatcher.testing import (
    BackendContract,
    Ending,
    Fault,
    NullBackend,
    NullOptions,
    NullSettings,
    NullWorld,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = NOON
        self.slept: list[float] = []

    def __call__(self) -> datetime:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def go(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def world(request: Any, clock: Clock) -> Iterator[NullWorld]:
    world = NullWorld.named(request.node.name)
    world.clock = clock
    world.sleep = clock.sleep
    yield world
    NullWorld.forget(request.node.name)


@pytest.fixture
def backend(request: Any, world: NullWorld) -> NullBackend:
    backend = make(request.node.name)
    assert backend.world is world
    return backend


def make(name: str, **settings: Any) -> NullBackend:
    return NullBackend(name, NullSettings(**settings))


def ask(key: str = "k", tasks: int = 1, parallelism: int = 1, timeout: float = 60) -> LaunchRequest:
    return LaunchRequest(
        key=key,
        instance="test",
        batch_id="b",
        job="job",
        command=(),
        tasks=tuple(TaskInput(index, index, 1, "[]") for index in range(tasks)),
        options=NullOptions(),
        timeout=timedelta(seconds=timeout),
        parallelism=parallelism,
    )


def test_an_unscripted_task_succeeds_at_the_next_poll(backend: NullBackend) -> None:
    handle = backend.launch(ask()).handle
    report = backend.poll([handle])[handle]
    (task,) = report.tasks
    assert (report.phase, task.outcome, task.exit_code) == (Phase.ENDED, Outcome.SUCCEEDED, 0)
    assert (task.started_at, task.ended_at) == (NOON, NOON)


def test_a_task_starts_and_ends_when_its_script_says(
    backend: NullBackend, world: NullWorld, clock: Clock
) -> None:
    world.script = lambda batch, chunk, attempt: Ending(
        Outcome.FAILED,
        exit_code=7,
        seconds=10,
        start_seconds=5,
        reason=f"{batch}/{chunk}/{attempt}",
    )
    handle = backend.launch(ask()).handle
    phases = []
    for _ in range(4):
        report = backend.poll([handle])[handle]
        phases.append((report.phase, report.started_at))
        clock.go(5)
    start = NOON + timedelta(seconds=5)
    assert phases == [
        (Phase.PENDING, None),
        (Phase.RUNNING, start),
        (Phase.RUNNING, start),
        (Phase.ENDED, start),
    ]
    (task,) = backend.poll([handle])[handle].tasks
    assert (task.outcome, task.exit_code, task.reason) == (Outcome.FAILED, 7, "b/0/1")
    assert task.ended_at == NOON + timedelta(seconds=15)


def test_tasks_run_at_most_so_many_at_once(
    backend: NullBackend, world: NullWorld, clock: Clock
) -> None:
    world.script = lambda _batch, _chunk, _attempt: Ending(seconds=10)
    handle = backend.launch(ask(tasks=5, parallelism=2)).handle
    ended = []
    for _ in range(4):
        ended.append((len(backend.poll([handle])[handle].tasks), world.running()))
        clock.go(10)
    assert ended == [(0, 2), (2, 2), (4, 1), (5, 0)]
    assert world.peak_running() == 2


def test_a_task_that_outlasts_its_timeout_is_stopped_there(
    backend: NullBackend, world: NullWorld, clock: Clock
) -> None:
    world.script = lambda _batch, _chunk, _attempt: Ending(seconds=math.inf)
    handle = backend.launch(ask(timeout=60)).handle
    clock.go(60)
    (task,) = backend.poll([handle])[handle].tasks
    assert (task.outcome, task.exit_code) == (Outcome.TIMED_OUT, None)
    assert task.reason == "ran longer than its timeout of 60 s"


def test_a_provider_may_leave_timeouts_to_others(
    backend: NullBackend, world: NullWorld, clock: Clock
) -> None:
    world.enforces_timeout = False
    world.script = lambda _batch, _chunk, _attempt: Ending(seconds=math.inf)
    handle = backend.launch(ask(timeout=60)).handle
    clock.go(1e6)
    assert backend.poll([handle])[handle].phase is Phase.RUNNING
    backend.cancel(handle)
    (task,) = backend.poll([handle])[handle].tasks
    assert task.outcome is Outcome.CANCELLED


def test_a_cancel_spares_what_has_ended_and_what_never_started_has_no_start(
    backend: NullBackend, world: NullWorld, clock: Clock
) -> None:
    world.script = lambda _batch, _chunk, _attempt: Ending(seconds=10)
    handle = backend.launch(ask(tasks=3)).handle
    clock.go(15)
    backend.cancel(handle)
    clock.go(15)
    tasks = backend.poll([handle])[handle].tasks
    assert [task.outcome for task in tasks] == [Outcome.SUCCEEDED] + [Outcome.CANCELLED] * 2
    assert [task.started_at for task in tasks] == [NOON, NOON + timedelta(seconds=10), None]


class TestFaults:
    def test_a_call_that_does_not_arrive_starts_nothing(
        self, backend: NullBackend, world: NullWorld
    ) -> None:
        world.fail_next("launch", Fault.UNAVAILABLE, times=2)
        for _ in range(2):
            with pytest.raises(
                Unavailable, match="scripted fault of launch: unavailable"
            ) as caught:
                backend.launch(ask())
            assert not caught.value.not_started
        assert backend.find(ask()) is None
        backend.launch(ask())
        assert world.runs == {("b", 0, 1): 1}
        assert world.calls == {"launch": 3, "find": 1}

    def test_a_lost_reply_leaves_the_execution_to_be_found(
        self, backend: NullBackend, world: NullWorld
    ) -> None:
        world.fail_next("launch", Fault.REPLY_LOST)
        with pytest.raises(Unavailable):
            backend.launch(ask())
        found = backend.find(ask())
        assert found is not None
        assert found == backend.launch(ask())
        assert world.doubles() == []

    def test_a_throttled_call_says_that_nothing_was_started(
        self, backend: NullBackend, world: NullWorld
    ) -> None:
        world.fail_next("launch", Fault.THROTTLED, retry_after=timedelta(seconds=3))
        with pytest.raises(Unavailable) as caught:
            backend.launch(ask())
        assert (caught.value.not_started, caught.value.retry_after) == (True, timedelta(seconds=3))
        assert world.handles() == []

    def test_faults_of_a_verb_come_in_order_and_touch_no_other(
        self, backend: NullBackend, world: NullWorld
    ) -> None:
        world.fail_next("launch", Fault.REJECTED)
        world.fail_next("poll", Fault.UNAVAILABLE)
        with pytest.raises(Rejected):
            backend.launch(ask())
        handle = backend.launch(ask()).handle
        with pytest.raises(Unavailable):
            backend.poll([handle])
        assert backend.poll([handle])[handle].phase is Phase.ENDED

    @pytest.mark.parametrize("verb", ["find", "poll", "cancel", "strays", "logs"])
    def test_every_verb_can_fail(self, backend: NullBackend, world: NullWorld, verb: str) -> None:
        world.fail_next(verb, Fault.UNAVAILABLE)
        calls = {
            "find": lambda: backend.find(ask()),
            "poll": lambda: backend.poll([]),
            "cancel": lambda: backend.cancel("h"),
            "strays": lambda: backend.strays("test", NOON),
            "logs": lambda: list(backend.logs("h", 0, 1)),
        }
        with pytest.raises(Unavailable):
            calls[verb]()
        calls[verb]()

    def test_a_vanished_execution_is_absent(
        self, backend: NullBackend, world: NullWorld, clock: Clock
    ) -> None:
        world.script = lambda _batch, _chunk, _attempt: Ending(seconds=10)
        handle = backend.launch(ask()).handle
        clock.go(1)
        world.vanish(handle)
        assert backend.poll([handle])[handle].phase is Phase.ABSENT
        assert backend.find(ask()) is None
        assert world.running() == 0
        assert world.handles() == [handle]

    def test_one_task_can_be_killed(
        self, backend: NullBackend, world: NullWorld, clock: Clock
    ) -> None:
        world.script = lambda _batch, _chunk, _attempt: Ending(seconds=10)
        handle = backend.launch(ask(tasks=2, parallelism=2)).handle
        clock.go(1)
        world.kill(handle, 1, Outcome.OUT_OF_MEMORY, "too big")
        (task,) = backend.poll([handle])[handle].tasks
        assert (task.index, task.outcome, task.reason) == (1, Outcome.OUT_OF_MEMORY, "too big")

    def test_a_list_can_lag(self, backend: NullBackend, world: NullWorld, clock: Clock) -> None:
        world.find_lag = timedelta(seconds=5)
        world.script = lambda _batch, _chunk, _attempt: Ending(seconds=60)
        handle = backend.launch(ask()).handle
        assert backend.find(ask()) is None
        assert list(backend.strays("test", NOON)) == []
        clock.go(5)
        found = backend.find(ask())
        assert found is not None
        assert found.handle == handle
        assert [stray.handle for stray in backend.strays("test", NOON)] == [handle]

    def test_a_provider_that_forgets_keys_starts_twice_and_it_shows(
        self, request: pytest.FixtureRequest, world: NullWorld
    ) -> None:
        backend = make(request.node.name, relaunch_safe=False)
        first, second = (backend.launch(ask()).handle for _ in range(2))
        assert first != second
        assert world.handles("k") == [first, second]
        assert world.doubles() == [("b", 0, 1)]
        assert world.requests() == [ask(), ask()]


class TestSettings:
    def test_targets_of_one_name_share_a_world_and_others_do_not(self) -> None:
        one, same, other = make("one"), make("one"), make("other")
        handle = one.launch(ask()).handle
        assert same.poll([handle])[handle].phase is Phase.ENDED
        assert other.poll([handle])[handle].phase is Phase.ABSENT
        for name in ("one", "other"):
            NullWorld.forget(name)
        assert make("one").world is not one.world
        NullWorld.forget("one")

    def test_a_call_takes_its_time(
        self, request: pytest.FixtureRequest, world: NullWorld, clock: Clock
    ) -> None:
        assert world.calls == {}
        make(request.node.name, call_seconds=0.05).launch(ask())
        assert clock.slept == [0.05]

    def test_a_task_takes_a_time_drawn_from_its_key(
        self, request: pytest.FixtureRequest, world: NullWorld, clock: Clock
    ) -> None:
        backend = make(request.node.name, task_seconds=(1, 9))
        handles = [backend.launch(ask(f"k{i}")).handle for i in range(20)]
        clock.go(10)
        ends = [report.tasks[0].ended_at for report in backend.poll(handles).values()]
        assert all(end is not None and 1 <= (end - NOON).total_seconds() <= 9 for end in ends)
        assert len(set(ends)) == 20
        assert world.peak_running() == 20
        twin = make("twin", task_seconds=(1, 9))
        twin.world.clock = lambda: NOON
        handle = twin.launch(ask("k0")).handle
        twin.world.clock = clock
        assert twin.poll([handle])[handle].tasks[0].ended_at == ends[0]
        NullWorld.forget("twin")

    def test_limits_follow_the_settings(self) -> None:
        limits = make("one", max_tasks=7, page_size=3, find_grace="2s").limits
        assert (limits.max_tasks, limits.page_size, limits.find_grace) == (
            7,
            3,
            timedelta(seconds=2),
        )
        NullWorld.forget("one")

    def test_it_runs_anything_anywhere(self, backend: NullBackend) -> None:
        job = Job(name="sample", target="one", command=("no-such-program",))
        assert backend.check(job, NullOptions()) == ()
        assert backend.definition(NullOptions()) == Definition()
        assert backend.home() is None

    def test_it_takes_only_its_own_settings(self) -> None:
        with pytest.raises(TypeError, match="not NullSettings"):
            NullBackend("one", NullOptions())


def test_the_contract_says_what_is_left_to_write() -> None:
    with pytest.raises(NotImplementedError, match=r"Half\.request says how tasks are asked for"):
        type("Half", (BackendContract,), {})().request("k", [])
    assert BackendContract().runs("k") is None


def test_the_kit_is_imported_without_pytest() -> None:
    script = "import sys, dispatcher.testing; sys.exit('pytest' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
