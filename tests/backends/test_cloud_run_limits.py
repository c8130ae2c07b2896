"""Where Cloud Run says no: its limits, its refusals, and what others pay for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

import pytest
from backends.test_cloud_run_emulated import FOLLOWING, ON_JOB, PROJECT, REGION, request
from backends.test_cloud_run_emulated import Cloud as CloudOfABackend
from backends.test_cloud_run_engine import (
    Cloud,
    MakeCloud,
    attempts_of,
    chunk_of,
    figures,
    make_cloud,
    standing_clock,
)
from google.auth import exceptions as auth
from pydantic import ValidationError

from dispatcher import budget
from dispatcher.backends.base import Handle, Rejected, Unavailable
from dispatcher.backends.cloud_run import CloudRunOptions, failures
from dispatcher.backends.cloud_run.options import reserved
from dispatcher.emulators.cloud_run import (
    CloudRunEmulator,
    EmulatorOptions,
    ScriptRunner,
    TaskEnd,
    TaskStart,
    World,
)
from dispatcher.emulators.cloud_run.faults import Reply, lose_reply, refuse
from dispatcher.emulators.cloud_run.refusal import Code, Refused
from dispatcher.engine.metering import TargetMeter
from dispatcher.explaining import explain
from dispatcher.job import Job
from dispatcher.overriding import overridden

__all__ = ["make_cloud", "standing_clock"]

PLACE: Final = f"projects/{PROJECT}/locations/{REGION}"
ETL: Final = CloudRunOptions(job="etl")


@pytest.fixture
def cloud() -> Iterator[CloudOfABackend]:
    made = CloudOfABackend()
    with made.emulator as emulator:
        emulator.world.define(PROJECT, REGION, "etl", container="main", args=["--all"])
        yield made


# --- words and names ------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_a_refusal_is_told_in_the_providers_words_alone(
    cloud: CloudOfABackend, transport: str
) -> None:
    with pytest.raises(Rejected) as caught:
        cloud.backend(transport=transport).launch(request(options={"job": "other"}))
    said = str(caught.value)
    assert ": 404 Resource 'other' of kind 'JOB' in region 'europe-west1'" in said
    assert "http" not in said


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("PORT", True),
        ("K_SERVICE", True),
        ("K_REVISION", True),
        ("K_CONFIGURATION", True),
        ("CLOUD_RUN_JOB", True),
        ("X_GOOGLE_A", True),
        ("K_FACTOR", False),
        ("K_", False),
        ("PORTS", False),
    ],
)
def test_the_variables_that_are_refused_are_those_that_the_emulator_refuses(
    name: str, *, theirs: bool
) -> None:
    assert reserved(name) is theirs
    emulator = CloudRunEmulator(runner=ScriptRunner())
    if theirs:
        with pytest.raises(Refused, match=f"the name {name} is reserved"):
            emulator.world.define(PROJECT, REGION, "etl", env={name: "1"})
    else:
        assert emulator.world.define(PROJECT, REGION, "etl", env={name: "1"})


# --- credentials ----------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_credentials_that_are_refused_in_a_call_are_a_clear_refusal(
    cloud: CloudOfABackend, transport: str
) -> None:
    """Over REST the client tries to renew its token, and tells of that in place of the 401."""
    cloud.emulator.world.authenticated = False
    backend = cloud.backend(transport=transport)
    with pytest.raises(Rejected, match=r"401 .*give the workers credentials"):
        backend.definition(ETL)
    with pytest.raises(Rejected, match="give the workers credentials"):
        backend.launch(request())
    (remark,) = backend.check(Job(name="etl", target="cloud"), ETL)
    assert remark.level == "fail"
    assert "401 " in remark.text


def test_a_metadata_server_that_cannot_be_reached_refuses_nothing() -> None:
    unreachable = auth.TransportError("no route")  # type: ignore[no-untyped-call]  # half typed
    error = auth.RefreshError(unreachable)  # type: ignore[no-untyped-call]
    error.__cause__ = unreachable  # as google.auth.compute_engine raises it
    told = failures.at_launch(error, "no token")
    assert isinstance(told, Unavailable)
    assert told.not_started
    assert isinstance(failures.at_launch(auth.RefreshError("gone"), "no token"), Rejected)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("missing", ["run.jobs.get", "run.tasks.list"])
def test_a_permission_that_is_missing_is_told_with_one_hint(
    cloud: CloudOfABackend, missing: str
) -> None:
    cloud.emulator.world.permissions = frozenset((ON_JOB | FOLLOWING) - {missing})
    *_, remark = cloud.backend().check(Job(name="etl", target="cloud"), ETL)
    assert remark.level == "fail"
    assert "403 " in remark.text
    assert f"{remark.text}; {remark.todo}".count("roles/run.viewer") == 1


# --- args -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shared", "strict"])
@pytest.mark.parametrize(
    ("overrides", "args"), [({}, ("--all",)), ({"args": []}, ()), ({"args": ["-x"]}, ("-x",))]
)
def test_a_batch_that_overrides_args_by_none_runs_without_the_definitions(
    cloud: CloudOfABackend, mode: str, overrides: dict[str, Any], args: tuple[str, ...]
) -> None:
    job = Job(name="etl", target="cloud", overrides={"args": True})
    job, _ = overridden(job, overrides)
    stored = Job.model_validate_json(job.model_dump_json(exclude_defaults=True))
    made = request(options={"mode": mode}, clear_args=stored.clear_args)
    cloud.backend().launch(replace(made, tasks=(replace(made.tasks[0], args=stored.args),)))
    (execution,) = cloud.emulator.world.executed
    assert execution.args == args


def test_with_the_wrapper_the_definitions_args_are_its_command_and_stay(
    cloud: CloudOfABackend,
) -> None:
    cloud.backend().launch(request(wrapped=True, clear_args=True))
    (execution,) = cloud.emulator.world.executed
    assert execution.args == ("--all",)


def test_a_job_has_args_or_takes_them_away() -> None:
    with pytest.raises(ValidationError, match="must be left out where there are `args`"):
        Job(name="etl", target="cloud", args=("-x",), clear_args=True)


# --- refusals of a whole job ----------------------------------------------------------------------


def forbid(world: World) -> None:
    world.permissions = frozenset({"run.jobs.get", "run.jobs.run", "run.executions.list"})


def forbid_all(world: World) -> None:
    world.permissions = frozenset()


@pytest.mark.parametrize(
    ("spoil", "job", "told"),
    [
        (lambda _: None, "no-such-job", "404 "),
        (forbid, "etl", "403 Permission"),
        (forbid_all, "etl", "403 Permission"),
    ],
    ids=["job missing", "no permission to launch", "no permission at all"],
)
def test_what_is_refused_of_a_job_is_not_asked_again_for_each_of_its_chunks(
    make_cloud: MakeCloud, spoil: Callable[[World], object], job: str, told: str
) -> None:
    """Also where no read is left, so that nothing is known of the job before the launch."""
    cloud = make_cloud(
        jobs={"etl": {"options": {"job": job}}}, launches_per_minute=100_000, reads_per_minute=6
    )
    spoil(cloud.world)
    batch = cloud.dispatcher.enqueue("etl", range(300))
    cloud.finish(batch)
    assert cloud.outcomes(batch) == [["rejected"]] * 300
    assert {told in (chunk.attempts[0].reason or "") for chunk in cloud.chunks(batch)} == {True}
    assert cloud.emulator.calls.total() <= 6, dict(cloud.emulator.calls)
    assert cloud.launches <= 2


def test_a_permission_that_was_mended_is_seen_within_seconds_by_one_launch_that_asks(
    cloud: CloudOfABackend,
) -> None:
    cloud.clock.stop()
    backend, world = cloud.backend(), cloud.emulator.world
    forbid(world)
    for _ in range(3):
        with pytest.raises(Rejected, match="403 Permission"):
            backend.launch(request())
    assert cloud.calls["Jobs.RunJob"] == 1
    cloud.clock.ahead += 11
    for _ in range(3):
        with pytest.raises(Rejected, match="403 Permission"):
            backend.launch(request())
    assert cloud.calls["Jobs.RunJob"] == 2
    world.permissions = None
    cloud.clock.ahead += 11
    for _ in range(3):
        assert backend.launch(request()).handle
    assert cloud.calls["Jobs.RunJob"] == 5


def test_launches_that_come_together_let_one_ask_ahead() -> None:
    made = CloudOfABackend(EmulatorOptions(latency=0.2))
    made.clock.stop()
    with made.emulator as emulator:
        emulator.world.define(PROJECT, REGION, "etl")
        forbid(emulator.world)
        backend = made.backend()

        def launch(_: int) -> str:
            with pytest.raises(Rejected) as caught:
                backend.launch(request())
            return str(caught.value)

        with ThreadPoolExecutor(8) as pool:
            (said,) = set(pool.map(launch, range(8)))
        assert "403 Permission" in said
        assert made.calls["Jobs.RunJob"] == 1


def test_one_chunk_that_is_refused_refuses_no_other(cloud: CloudOfABackend) -> None:
    backend, made = cloud.backend(), request()
    wrong = refuse("Jobs.RunJob", code="INVALID_ARGUMENT")
    with cloud.emulator.faults.during(wrong), pytest.raises(Rejected, match="400 "):
        backend.launch(made)
    assert backend.launch(request()).handle


# --- fewer tasks than a fixed parallelism ---------------------------------------------------------


def test_a_retry_of_fewer_tasks_than_the_parallelism_gets_a_job_of_its_own(
    make_cloud: MakeCloud,
) -> None:
    """Two hundred chunks on a job whose parallelism is fixed at 2, and one of them fails once."""

    def script(start: TaskStart) -> TaskEnd:
        return TaskEnd(seconds=6, exit_code=int(chunk_of(start) == (100, 1)))

    options = {"job": "etl", "max_tasks": 200, "mode": "mixed"}
    etl = {"options": options, "limits": {"running": 2}}
    cloud = make_cloud(script, jobs={"etl": etl}, definition={"parallelism": 2})
    batch = cloud.dispatcher.enqueue("etl", range(200))
    assert cloud.finish(batch, step=5, within=1800).state == "succeeded"
    again = {chunk.index: attempts_of(chunk) for chunk in cloud.chunks(batch)}
    assert again.pop(100) == ["failed", "succeeded"]
    assert {tuple(one) for one in again.values()} == {("succeeded",)}
    assert [execution.task_count for execution in cloud.world.executed] == [200, 1]
    assert cloud.world.most_busy == 2
    assert (cloud.launches, cloud.emulator.calls["Jobs.CreateJob"]) == (1, 1)


def test_in_mode_shared_nothing_is_registered_at_a_launch_and_such_a_retry_is_rejected(
    make_cloud: MakeCloud,
) -> None:
    def script(start: TaskStart) -> TaskEnd:
        return TaskEnd(seconds=6, exit_code=int(chunk_of(start) == (3, 1)))

    etl = {"options": {"job": "etl", "max_tasks": 10}, "limits": {"running": 2}}
    cloud = make_cloud(script, jobs={"etl": etl}, definition={"parallelism": 2})
    batch = cloud.dispatcher.enqueue("etl", range(10))
    assert cloud.finish(batch, step=5, within=600).state == "failed"
    chunk = next(chunk for chunk in cloud.chunks(batch) if chunk.index == 3)
    assert attempts_of(chunk) == ["failed", "rejected"]
    assert "has parallelism 2 and this execution has 1 task" in (chunk.reason or "")
    assert "Set options.mode to mixed" in (chunk.reason or "")
    assert (cloud.launches, cloud.emulator.calls["Jobs.CreateJob"]) == (1, 0)


def test_where_no_job_may_be_made_a_retry_says_what_is_missing(cloud: CloudOfABackend) -> None:
    cloud.emulator.world.define(PROJECT, REGION, "etl", parallelism=2, task_count=2)
    cloud.emulator.world.permissions = frozenset(
        {"run.jobs.get", "run.jobs.run", "run.jobs.runWithOverrides", "run.executions.list"}
    )
    backend, retry = cloud.backend(), request(options={"mode": "mixed"})
    with pytest.raises(Rejected) as caught:
        backend.launch(retry)
    said = str(caught.value)
    assert "has parallelism 2 and this execution has 1 task" in said
    assert "cannot be created: 403 " in said
    assert "run.jobs.create" in said
    assert "jobsExecutorWithOverrides" not in said
    two = request(2, options={"mode": "mixed"})
    assert backend.launch(two).handle, "others are not refused for it"
    assert backend.find(retry) is None


@pytest.mark.parametrize("reply", [Reply.UNAVAILABLE, Reply.DROP])
def test_a_retrys_own_job_is_found_by_its_key_after_a_lost_reply(
    cloud: CloudOfABackend, reply: Reply
) -> None:
    cloud.emulator.world.define(PROJECT, REGION, "etl", parallelism=2, task_count=2)
    retry = request(options={"mode": "mixed"})
    cloud.emulator.faults.add(lose_reply("Jobs.CreateJob", reply))
    with pytest.raises(Unavailable) as caught:
        cloud.backend().launch(retry)
    assert not caught.value.not_started
    found = cloud.backend().find(retry)
    assert found is not None
    assert found.handle == cloud.emulator.world.executed[0].name
    assert cloud.backend().launch(retry).handle == found.handle
    assert len(cloud.emulator.world.executed) == 1


def test_in_mode_mixed_nothing_is_started_while_the_job_cannot_be_looked_at(
    cloud: CloudOfABackend,
) -> None:
    cloud.emulator.world.define(PROJECT, REGION, "etl", parallelism=2, task_count=2)
    few = request(options={"mode": "mixed"})
    away = refuse("Jobs.GetJob")
    with cloud.emulator.faults.during(away), pytest.raises(Unavailable) as caught:
        cloud.backend().launch(few)
    assert caught.value.not_started
    assert cloud.emulator.world.executed == []
    assert cloud.backend().launch(few).handle


def test_a_job_that_was_mended_is_launched_without_waiting_for_what_was_known_of_it(
    cloud: CloudOfABackend,
) -> None:
    cloud.emulator.world.define(PROJECT, REGION, "etl", parallelism=10, task_count=10)
    backend = cloud.backend()
    with pytest.raises(Rejected, match="has parallelism 10 and this execution has 1 task"):
        backend.launch(request())
    cloud.emulator.world.define(PROJECT, REGION, "etl", parallelism=0, task_count=1)
    cloud.clock.ahead += 11
    assert backend.launch(request()).handle


# --- room for jobs --------------------------------------------------------------------------------


STRICT: Final = {"etl": {"options": {"job": "etl", "mode": "strict"}}}


def make_room(cloud: Cloud) -> None:
    """What the clock of a worker does every two seconds."""
    for engine in cloud.engines:
        engine.make_room("cloud")


def test_launches_that_make_a_job_each_never_need_more_jobs_than_a_region_holds(
    make_cloud: MakeCloud,
) -> None:
    """At the default budgets, of which those of writes are half of those of launches."""
    cloud = make_cloud(
        lambda _: 5.0, jobs=STRICT, max_jobs=40, options=EmulatorOptions(seed=1, max_jobs=40)
    )
    batch, most = cloud.dispatcher.enqueue("etl", range(120)), 0
    began = cloud.monotonic()
    while not batch.refresh().finished:
        cloud.turn(10)
        make_room(cloud)
        most = max(most, sum(1 for _ in cloud.world.list_jobs(PLACE)))
        assert cloud.monotonic() - began < 900, "not within 15 minutes"
    assert batch.refresh().counts == {"succeeded": 120}
    assert most <= 40
    assert not cloud.emulator.refused
    assert cloud.emulator.calls["Jobs.CreateJob"] == 120
    figures(took=cloud.monotonic() - began, most=most, calls=dict(cloud.emulator.calls))
    for _ in range(30):
        cloud.turn(10)
        make_room(cloud)
    left = sum(1 for _ in cloud.world.list_jobs(PLACE))
    assert 1 < left <= 21, "the others are kept, for people to look at"


def test_removing_jobs_leaves_writes_for_a_cancel(make_cloud: MakeCloud) -> None:
    cloud = make_cloud(
        lambda _: 1.0, jobs=STRICT, max_jobs=10, options=EmulatorOptions(seed=1, max_jobs=10)
    )
    cloud.dispatcher.enqueue("etl", range(9))
    cloud.turn()
    cloud.turn(20)
    before = cloud.emulator.calls["Jobs.DeleteJob"]
    make_room(cloud)
    assert 1 <= cloud.emulator.calls["Jobs.DeleteJob"] - before <= 3
    meter = TargetMeter(cloud.store, cloud.config.targets["cloud"])
    meter.take("write", 2)


def test_a_job_stays_while_its_end_is_not_recorded_or_a_second_call_may_be_on_its_way(
    make_cloud: MakeCloud,
) -> None:
    cloud = make_cloud(
        lambda _: 1.0, jobs=STRICT, max_jobs=2, options=EmulatorOptions(seed=1, max_jobs=10)
    )
    cloud.dispatcher.enqueue("etl", [1])
    cloud.turn()
    cloud.advance(20)
    make_room(cloud)
    assert cloud.emulator.calls["Jobs.DeleteJob"] == 0, "nobody has read how it ended"
    cloud.turn()
    cloud.sql("UPDATE dispatcher.execution SET calls = 2")
    cloud.turn(70)
    make_room(cloud)
    assert cloud.emulator.calls["Jobs.DeleteJob"] == 0
    cloud.sql("UPDATE dispatcher.execution SET calls = 1")
    make_room(cloud)
    assert cloud.emulator.calls["Jobs.DeleteJob"] == 1
    before = cloud.emulator.calls.copy()
    cloud.advance(70)
    make_room(cloud)
    cloud.advance(70)
    make_room(cloud)
    assert (cloud.emulator.calls - before).total() <= 1, "where there are none, nothing is asked"


def test_a_worker_that_has_not_counted_the_jobs_holds_no_launch_back(
    cloud: CloudOfABackend,
) -> None:
    """It makes none of the room itself: that is done by the one that leads the target."""
    backend = cloud.backend(max_jobs=2)
    for _ in range(4):
        assert backend.launch(request(options={"mode": "strict"})).handle
    assert backend.make_room(datetime.now(UTC), lambda _: {}) == 0
    with pytest.raises(Unavailable, match="holds 5 Cloud Run jobs and may hold 2") as caught:
        backend.launch(request(options={"mode": "strict"}))
    assert caught.value.not_started
    cloud.clock.ahead += 200
    assert backend.launch(request(options={"mode": "strict"})).handle


def test_a_job_too_many_is_refused_by_the_emulator_for_now() -> None:
    emulator = CloudRunEmulator(runner=ScriptRunner(), options=EmulatorOptions(max_jobs=1))
    emulator.world.define(PROJECT, REGION, "etl")
    emulator.world.define(PROJECT, REGION, "etl", parallelism=2)
    with pytest.raises(Refused, match="at most 1 may be") as caught:
        emulator.world.define(PROJECT, REGION, "other")
    assert caught.value.code is Code.RESOURCE_EXHAUSTED


# --- several large packs --------------------------------------------------------------------------


class Budget:
    """The buckets of a target on a clock that a test moves on."""

    def __init__(self, clock: Callable[[], float], **rates: float) -> None:
        self.clock, self.rates = clock, rates
        self.left = {kind: budget.burst(rate) for kind, rate in rates.items()}
        self.at = dict.fromkeys(rates, clock())

    def take(self, kind: str, calls: int = 1, *, gentle: bool = False) -> None:
        if kind not in self.rates:
            return
        rate, now = self.rates[kind], self.clock()
        full = budget.burst(rate)
        self.left[kind] = min(full, self.left[kind] + (now - self.at[kind]) * rate / 60)
        self.at[kind] = now
        if self.left[kind] < calls + (full / 2 if gentle else 0):
            raise Unavailable("the budget is used up", not_started=True)
        self.left[kind] -= calls

    def throttled(self, _kind: str) -> None:
        pass


@pytest.mark.usefixtures("standing_clock")
def test_the_tasks_of_several_large_packs_are_listed_in_turn() -> None:
    """A hundred pages each, as 10,000 tasks are, at the default of 300 reads a minute."""
    made = CloudOfABackend()
    made.clock.stop()
    seconds = 240.0

    def length(index: int) -> float:
        return seconds * ((index * 617) % 1000) / 1000

    with CloudRunEmulator(
        runner=ScriptRunner(lambda start: length(start.index)),
        options=EmulatorOptions(page_size=10, seed=1),
    ) as emulator:
        made.emulator = emulator
        emulator.world.define(PROJECT, REGION, "etl")
        backend = made.backend(Budget(made.clock, read=300))
        began = made.clock()
        packs = [request(1000, input_uri="file:///in") for _ in range(4)]
        handles = [backend.launch(pack).handle for pack in packs]
        settled: dict[Handle, dict[int, float]] = {handle: {} for handle in handles}
        while made.clock() - began < seconds + 200:
            made.clock.ahead += 5
            emulator.world.advance(5)
            emulator.world.timetable.run_due()
            with suppress(Unavailable):
                for handle, report in backend.poll(handles).items():
                    for task in report.tasks:
                        settled[handle].setdefault(task.index, made.clock() - began)
    lags = {
        handle: [at - length(index) for index, at in known.items()]
        for handle, known in settled.items()
    }
    means = [sum(each) / len(each) for each in lags.values()]
    figures(means=[round(mean) for mean in means], most=max(map(max, lags.values())))
    assert all(len(known) == 1000 for known in settled.values())
    assert max(means) < 3 * min(means), "none starves"
    assert max(map(max, lags.values())) < 150


# --- the cancel of many executions ----------------------------------------------------------------


def test_a_cancel_of_many_executions_keeps_to_the_writes_and_explain_counts_what_is_to_come(
    make_cloud: MakeCloud,
) -> None:
    cloud = make_cloud(lambda _: math.inf, launches_per_minute=100_000, writes_per_minute=60)
    batch = cloud.dispatcher.enqueue("etl", range(100))
    cloud.until(lambda: len(cloud.world.running) == 100, "all of them run")
    batch.cancel("not wanted")
    cloud.turn()
    sent = cloud.emulator.calls["Executions.CancelExecution"]
    said = explain(cloud.store, batch.id)
    assert f"the cancels of {100 - sent} are still to be sent" in said.text
    assert said.facts["reasons"][-1]["unsent"] == 100 - sent
    took = cloud.until(lambda: batch.refresh().finished, "the cancel was confirmed", step=5)
    figures(took=took, calls=dict(cloud.emulator.calls))
    assert cloud.emulator.calls["Executions.CancelExecution"] == 100
    assert 80 <= took <= 130
    assert batch.refresh().counts == {"cancelled": 100}
