"""Where Cloud Run says no: its limits, its refusals, and what others pay for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from backends.test_cloud_run_emulated import PROJECT, REGION, Cloud, request
from google.auth import exceptions as auth
from pydantic import ValidationError

from dispatcher.backends.base import Rejected, Unavailable
from dispatcher.backends.cloud_run import CloudRunOptions, failures
from dispatcher.backends.cloud_run.options import reserved
from dispatcher.emulators.cloud_run import CloudRunEmulator, ScriptRunner
from dispatcher.emulators.cloud_run.refusal import Refused
from dispatcher.job import Job
from dispatcher.overriding import overridden

ETL = CloudRunOptions(job="etl")


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    made = Cloud()
    with made.emulator as emulator:
        emulator.world.define(PROJECT, REGION, "etl", container="main", args=["--all"])
        yield made


# --- words and names ------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_a_refusal_is_told_in_the_providers_words_alone(cloud: Cloud, transport: str) -> None:
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
    cloud: Cloud, transport: str
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
    cloud: Cloud, mode: str, overrides: dict[str, Any], args: tuple[str, ...]
) -> None:
    job = Job(name="etl", target="cloud", overrides={"args": True})
    job, _ = overridden(job, overrides)
    stored = Job.model_validate_json(job.model_dump_json(exclude_defaults=True))
    made = request(options={"mode": mode}, clear_args=stored.clear_args)
    cloud.backend().launch(replace(made, tasks=(replace(made.tasks[0], args=stored.args),)))
    (execution,) = cloud.emulator.world.executed
    assert execution.args == args


def test_with_the_wrapper_the_definitions_args_are_its_command_and_stay(cloud: Cloud) -> None:
    cloud.backend().launch(request(wrapped=True, clear_args=True))
    (execution,) = cloud.emulator.world.executed
    assert execution.args == ("--all",)


def test_a_job_has_args_or_takes_them_away() -> None:
    with pytest.raises(ValidationError, match="must be left out where there are `args`"):
        Job(name="etl", target="cloud", args=("-x",), clear_args=True)
