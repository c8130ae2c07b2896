"""What the emulator refuses because Cloud Run does: content, permissions, quotas."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from emulators.cloud import JOB, Cloud, eventually
from google.api_core import exceptions
from google.auth.exceptions import GoogleAuthError
from google.cloud import run_v2

import dispatcher.emulators.cloud_run
from dispatcher.emulators.cloud_run import GUESSES, EmulatorOptions, Refused, ScriptRunner
from dispatcher.emulators.cloud_run.faults import refuse

Open = Callable[..., Cloud]
PARENT = "projects/p/locations/r"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"name": "mian", "env": {"A": "1"}}, "no container named 'mian'; it has 'main'"),
        ({"env": {"A": "x" * 32_769}}, "value of A has 32769 bytes; at most 32768"),
        ({"env": {"A": "ü" * 16_385}}, "value of A has 32770 bytes"),
        ({"env": {f"V{n}": "" for n in range(1_001)}}, "1001 variables; at most 1000"),
        ({"env": {f"V{n}": "" for n in range(1_000)}}, "1001 variables together with"),
        ({"args": ["a"] * 1_001}, "1001 arguments; at most 1000"),
        ({"args": ["a"], "clear_args": True}, "clear_args and args cannot both be set"),
        ({"env": {"CLOUD_RUN_TASK_INDEX": "1"}}, "CLOUD_RUN_TASK_INDEX is reserved"),
        ({"env": {"PORT": "80"}}, "PORT is reserved"),
        ({"env": {"A=B": "1"}}, "'A=B' is invalid"),
        ({"env": {"": "1"}}, "'' is invalid"),
        ({"task_count": 10_001}, "10001 must be between 1 and 10000"),
        ({"task_count": -1}, "-1 must be between 1 and 10000"),
        ({"timeout": {"seconds": 168 * 3600 + 1}}, "604801s must be between 1s and 604800s"),
    ],
)
def test_overrides_that_cloud_run_refuses_start_nothing(
    opened: Open, overrides: dict[str, Any], said: str
) -> None:
    cloud = opened(job={"container": "main", "env": {"OWN": "1"}})
    with pytest.raises(exceptions.BadRequest, match=said):
        cloud.run(**overrides)
    assert not cloud.emulator.world.executed


def test_what_is_just_within_the_limits_is_taken(opened: Open) -> None:
    cloud = opened(script=lambda _: math.inf)
    cloud.run(
        env={"A": "x" * 32_768, **{f"V{n}": "" for n in range(999)}},
        args=["a"] * 1_000,
        task_count=10_000,
        timeout={"seconds": 168 * 3600},
    )


def job_of(**changes: Any) -> run_v2.Job:
    """A job that is right but for the changes."""
    container = {"image": "image", **changes.pop("container", {})}
    task = {"containers": [container], **changes.pop("task", {})}
    labels = changes.pop("labels", {})
    return run_v2.Job(labels=labels, template={"template": task, **changes})


@pytest.mark.parametrize(
    ("job_id", "job", "said"),
    [
        ("Upper", job_of(), "'Upper' is invalid"),
        ("a" * 64, job_of(), "less than 64 characters"),
        ("ends-", job_of(), "not ending with '-'"),
        ("j", job_of(task={"max_retries": 11}), "11 must be between 0 and 10"),
        ("j", job_of(task={"timeout": {"seconds": 700_000}}), "700000s must be between"),
        ("j", job_of(task_count=10_001), "10001 must be between"),
        ("j", job_of(parallelism=-1), "-1 must not be negative"),
        ("j", job_of(container={"image": ""}), "image: required"),
        ("j", job_of(container={"env": [{"name": "K_SERVICE"}]}), "K_SERVICE is reserved"),
        ("j", job_of(container={"resources": {"limits": {"cpu": "3"}}}), "must be one of 1, 2"),
        ("j", job_of(container={"resources": {"limits": {"memory": "lots"}}}), "is no amount such"),
        ("j", job_of(task={"containers": []}), "at least one container"),
        ("j", job_of(labels={"run.googleapis.com/x": "y"}), "reserved namespace"),
    ],
)
def test_jobs_that_cloud_run_refuses_are_not_created(
    opened: Open, job_id: str, job: run_v2.Job, said: str
) -> None:
    cloud = opened()
    with pytest.raises(exceptions.BadRequest, match=said):
        cloud.jobs.create_job(parent=PARENT, job=job, job_id=job_id)
    assert len(list(cloud.jobs.list_jobs(parent=PARENT))) == 1


def test_a_token_that_makes_the_name_too_long_is_refused(opened: Open) -> None:
    cloud = opened()
    job = job_of()
    job.start_execution_token = "t" * 32
    with pytest.raises(exceptions.BadRequest, match="63 characters together; fewer than 63"):
        cloud.jobs.create_job(parent=PARENT, job=job, job_id="j" * 31)


def test_a_job_that_is_missing_in_the_region_is_not_found(opened: Open) -> None:
    cloud = opened()
    with pytest.raises(exceptions.NotFound, match="in region 'elsewhere' in project 'p' does not"):
        cloud.run("projects/p/locations/elsewhere/jobs/job")


def test_a_job_whose_image_is_missing_is_not_ready_and_cannot_be_run(opened: Open) -> None:
    cloud = opened(runner=ScriptRunner(images=["known"]), job={"image": "known"})
    name = cloud.emulator.world.define("p", "r", "other", image="unknown")
    ready = cloud.jobs.get_job(name=name).terminal_condition
    assert ready.state == run_v2.Condition.State.CONDITION_FAILED
    assert ready.reason == run_v2.Condition.CommonReason.CONTAINER_MISSING
    with pytest.raises(exceptions.BadRequest, match="Image 'unknown' not found") as refused:
        cloud.run(name)
    assert refused.value.reason == "CONTAINER_MISSING"
    cloud.finished(cloud.run())


def test_a_secret_that_is_missing_keeps_a_job_from_being_ready(opened: Open) -> None:
    cloud = opened(options=EmulatorOptions(secrets={"there": "value"}))
    for secret in ("there", "gone"):
        source = {"secret_key_ref": {"secret": secret, "version": "latest"}}
        job = job_of(container={"env": [{"name": "PASSWORD", "value_source": source}]})
        cloud.jobs.create_job(parent=PARENT, job=job, job_id=secret)
    cloud.run(f"{PARENT}/jobs/there")
    (start,) = eventually(lambda: cloud.emulator.world.starts)
    assert start.env == {"PASSWORD": "value"}
    with pytest.raises(exceptions.BadRequest, match="Secret gone was not found"):
        cloud.run(f"{PARENT}/jobs/gone")


def test_an_etag_that_has_changed_is_refused(opened: Open) -> None:
    cloud = opened()
    old = cloud.jobs.get_job(name=JOB).etag
    cloud.emulator.world.define("p", "r", "job", task_count=2)
    with pytest.raises(exceptions.Conflict):
        cloud.jobs.run_job(run_v2.RunJobRequest(name=JOB, etag=old))
    assert cloud.jobs.get_job(name=JOB).etag != old


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"memory": "640Gi", "cpu": "8"}, "'640Gi' is more than 32Gi, the most there is"),
        ({"memory": "5Gi"}, "'5Gi' is more than 4Gi, the most for 1 cpu"),
        ({"memory": "9Gi", "cpu": "2000m"}, "'9Gi' is more than 8Gi, the most for 2000m cpu"),
    ],
)
def test_more_memory_than_the_documents_allow_is_refused(
    opened: Open, limits: dict[str, str], said: str
) -> None:
    cloud = opened()
    with pytest.raises(Refused, match=said) as refused:
        cloud.emulator.world.define("p", "r", "large", limits=limits)
    assert "configuring/jobs/memory-limits" in str(refused.value)
    cloud.emulator.world.define("p", "r", "large", limits={"memory": "32Gi", "cpu": "8"})


# --- who may --------------------------------------------------------------------------------------


def test_a_permission_that_the_caller_lacks_is_named(opened: Open) -> None:
    cloud = opened()
    cloud.emulator.world.permissions = frozenset({"run.jobs.run", "run.jobs.get"})
    execution = cloud.run()
    with pytest.raises(exceptions.Forbidden, match=r"'run\.jobs\.runWithOverrides' denied"):
        cloud.run(task_count=2)
    for call, permission in (
        (lambda: cloud.executions.list_executions(parent=JOB), "run.executions.list"),
        (lambda: cloud.executions.get_execution(name=execution.name), "run.executions.get"),
        (lambda: cloud.tasks.list_tasks(parent=execution.name), "run.tasks.list"),
    ):
        with pytest.raises(exceptions.Forbidden) as refused:
            call()
        assert refused.value.reason == "IAM_PERMISSION_DENIED"
        assert refused.value.metadata["permission"] == permission
    asked = ["run.jobs.run", "run.jobs.runWithOverrides"]
    answer = cloud.jobs.test_iam_permissions({"resource": JOB, "permissions": asked})
    assert list(answer.permissions) == ["run.jobs.run"]


def test_wrong_credentials_are_refused(opened: Open) -> None:
    cloud = opened()
    cloud.emulator.world.authenticated = False
    # Over REST a 401 makes the library renew the credentials first, which these cannot.
    with pytest.raises((exceptions.Unauthorized, GoogleAuthError)):
        cloud.run()
    assert cloud.emulator.refused["Jobs.RunJob", "UNAUTHENTICATED"] == 1


# --- quotas ---------------------------------------------------------------------------------------


def test_a_quota_refuses_with_429_until_its_minute_is_over(opened: Open) -> None:
    cloud = opened(options=EmulatorOptions(run_per_minute=2, read_per_minute=3))
    cloud.run()
    cloud.run()
    with pytest.raises(exceptions.TooManyRequests, match="Job run requests") as refused:
        cloud.run()
    assert refused.value.reason == "RATE_LIMIT_EXCEEDED"
    assert len(cloud.emulator.world.executed) == 2
    for _ in range(3):
        cloud.jobs.get_job(name=JOB)
    with pytest.raises(exceptions.TooManyRequests, match="Read requests"):
        list(cloud.executions.list_executions(parent=JOB))
    cloud.emulator.world.advance(61)
    cloud.run()
    cloud.jobs.get_job(name=JOB)
    assert cloud.emulator.calls["Jobs.RunJob"] == 4


def test_a_burst_of_429_can_be_had_by_a_fault(opened: Open) -> None:
    cloud = opened(faults=(refuse("Jobs.RunJob", code="RESOURCE_EXHAUSTED", times=1),))
    with pytest.raises(exceptions.TooManyRequests) as refused:
        cloud.run()
    assert refused.value.reason == "RATE_LIMIT_EXCEEDED"


def test_no_more_executions_run_than_the_region_allows(opened: Open) -> None:
    cloud = opened(script=lambda _: 300, options=EmulatorOptions(max_running=2))
    runs = [cloud.run(), cloud.run()]
    with pytest.raises(exceptions.TooManyRequests, match="2 executions are running"):
        cloud.run()
    eventually(lambda: cloud.emulator.world.busy == 2)
    cloud.emulator.world.advance(301)
    for one in runs:
        cloud.finished(one)
    cloud.run()


def test_every_guess_is_a_sentence() -> None:
    for name, text in GUESSES.items():
        assert text.endswith("."), name
        assert len(text) > 20


# --- what each follows ----------------------------------------------------------------------------

MODULES = Path(dispatcher.emulators.cloud_run.__file__).parent
SOURCE = re.compile(
    r"clouds\.md §\d|vendor: \w|guess: \w|google(?:apis)?/[\w./#-]+|RFC \d+|cloud\.google\.com/\w"
)
GUESSED = re.compile(r"guess: (\w+(?:, \w+)*)")
REFUSING = {"Refused", "_wrong"}
"""What makes a refusal: the class, and a shorthand for it."""


class Refusing(NamedTuple):
    where: str
    text: str


def refusing() -> list[Refusing]:
    """Every function of the emulator that refuses something, with its comments."""
    found = []
    for path in sorted(MODULES.glob("*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            called = {ast.unparse(one.func) for one in ast.walk(node) if isinstance(one, ast.Call)}
            if called & REFUSING and node.name not in REFUSING:
                body = ast.get_source_segment(text, node) or ""
                found.append(Refusing(f"{path.name}: {node.name}", body))
    return found


def test_whatever_refuses_names_the_document_that_it_follows_or_its_guess() -> None:
    every = refusing()
    assert len(every) > 20
    assert [one.where for one in every if not SOURCE.search(one.text)] == []


def test_each_guess_is_named_beside_the_code_that_makes_it() -> None:
    """So that a guess that nobody makes any more, or that is not in the table, is found."""
    named = {
        key
        for path in MODULES.glob("*.py")
        for keys in GUESSED.findall(path.read_text())
        for key in keys.split(", ")
    }
    assert named == set(GUESSES)
