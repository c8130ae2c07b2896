"""Where Cloud Run says no: its limits, its refusals, and what others pay for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from backends.test_cloud_run_emulated import PROJECT, REGION, request
from backends.test_cloud_run_emulated import Cloud as CloudOfABackend
from backends.test_cloud_run_engine import MakeCloud, attempts_of, chunk_of, make_cloud
from google.auth import exceptions as auth
from pydantic import ValidationError

from dispatcher.backends.base import Rejected, Unavailable
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
from dispatcher.emulators.cloud_run.refusal import Refused
from dispatcher.job import Job
from dispatcher.overriding import overridden

__all__ = ["make_cloud"]

ETL = CloudRunOptions(job="etl")


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

    etl = {"options": {"job": "etl", "max_tasks": 200}, "limits": {"running": 2}}
    cloud = make_cloud(script, jobs={"etl": etl}, definition={"parallelism": 2})
    batch = cloud.dispatcher.enqueue("etl", range(200))
    assert cloud.finish(batch, step=5, within=1800).state == "succeeded"
    again = {chunk.index: attempts_of(chunk) for chunk in cloud.chunks(batch)}
    assert again.pop(100) == ["failed", "succeeded"]
    assert {tuple(one) for one in again.values()} == {("succeeded",)}
    assert [execution.task_count for execution in cloud.world.executed] == [200, 1]
    assert cloud.world.most_busy == 2
    assert (cloud.launches, cloud.emulator.calls["Jobs.CreateJob"]) == (1, 1)


def test_where_no_job_may_be_made_a_retry_says_what_is_missing(cloud: CloudOfABackend) -> None:
    cloud.emulator.world.define(PROJECT, REGION, "etl", parallelism=2, task_count=2)
    cloud.emulator.world.permissions = frozenset(
        {"run.jobs.get", "run.jobs.run", "run.jobs.runWithOverrides", "run.executions.list"}
    )
    backend, made = cloud.backend(), request()
    retry = replace(made, tasks=(replace(made.tasks[0], attempt=2),))
    with pytest.raises(Rejected) as caught:
        backend.launch(retry)
    said = str(caught.value)
    assert "has parallelism 2 and this execution has 1 task" in said
    assert "cannot be created: 403 " in said
    assert "run.jobs.create" in said
    assert "jobsExecutorWithOverrides" not in said
    assert backend.launch(request(2)).handle, "others are not refused for it"
    assert backend.find(retry) is None


@pytest.mark.parametrize("reply", [Reply.UNAVAILABLE, Reply.DROP])
def test_a_retrys_own_job_is_found_by_its_key_after_a_lost_reply(
    cloud: CloudOfABackend, reply: Reply
) -> None:
    cloud.emulator.world.define(PROJECT, REGION, "etl", parallelism=2, task_count=2)
    made = request()
    retry = replace(made, tasks=(replace(made.tasks[0], attempt=2),))
    cloud.emulator.faults.add(lose_reply("Jobs.CreateJob", reply))
    with pytest.raises(Unavailable) as caught:
        cloud.backend().launch(retry)
    assert not caught.value.not_started
    found = cloud.backend().find(retry)
    assert found is not None
    assert found.handle == cloud.emulator.world.executed[0].name
    assert cloud.backend().launch(retry).handle == found.handle
    assert len(cloud.emulator.world.executed) == 1
