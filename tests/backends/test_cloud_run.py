"""Cloud Run without a server: options, what a launch asks for, words to outcomes, definitions."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from string import ascii_lowercase, digits
from typing import Any

import pytest
import requests
from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.cloud import run_v2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dispatcher.backends.base import (
    Launched,
    LaunchRequest,
    Rejected,
    TaskInput,
    TaskReport,
    Unavailable,
)
from dispatcher.backends.cloud_run import (
    CloudRunBackend,
    CloudRunOptions,
    CloudRunSettings,
    definitions,
    failures,
    launching,
    memory,
    names,
    outcomes,
)
from dispatcher.backends.cloud_run.checking import on_paper
from dispatcher.backends.cloud_run.reading import launched_as
from dispatcher.job import Chunking, Job
from dispatcher.states import Outcome

Condition = run_v2.Condition
PLACE = {"project": "project-1", "region": "europe-west1"}
LIMITS = CloudRunBackend("t", CloudRunSettings(**PLACE)).limits
NOW = datetime(2026, 11, 20, 6, 0, tzinfo=UTC)


def settings(**given: Any) -> CloudRunSettings:
    return CloudRunSettings.model_validate({**PLACE, **given})


def refusal(given: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        settings(**given)
    return str(caught.value)


# --- settings and options -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"project": "My Project"}, "must be a project's id"),
        ({"region": "europe"}, "must be a region"),
        ({"call_timeout": "500ms"}, "must be a duration"),
        ({"call_timeout": "0.5s"}, "must be 1s or longer, not 0.5s"),
        ({"find_grace": 0.1}, "must be 1s or longer"),
        ({"keep": "10m"}, "must be 1h or longer"),
        ({"endpoint": "http://127.0.0.1:1"}, "must set `insecure` too"),
        ({"endpoint": "10.0.0.1:80", "insecure": True}, "must have an endpoint on this machine"),
        ({"insecure": True}, "must name an `endpoint`"),
        ({"endpoint": "a b"}, "must be host[:port]"),
        ({"impersonate": "somebody"}, "must be a service account's email"),
        ({"transport": "soap"}, "'grpc' or 'rest'"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_what_is_allowed(
    given: dict[str, Any], said: str
) -> None:
    assert said in refusal(given)


def test_plain_text_goes_to_loopback_only_unless_said() -> None:
    for endpoint in ("127.0.0.1:8", "localhost:8", "http://[::1]:8", "http://127.0.0.1:8/"):
        assert settings(endpoint=endpoint, insecure=True).insecure is True
    assert settings(endpoint="emulator:8", insecure="anywhere").address("run") == "emulator:8"


def test_addresses_are_googles_unless_an_endpoint_is_given() -> None:
    assert settings().address("run") == "run.googleapis.com:443"
    own = settings(endpoint="https://run.private.example/")
    assert own.address("run") == "run.private.example:443"
    assert own.address("logging") == "logging.googleapis.com:443"
    emulated = settings(endpoint="127.0.0.1:8", insecure=True)
    assert emulated.address("logging") == "127.0.0.1:8"


@pytest.mark.parametrize("field", [*CloudRunSettings.model_fields, *CloudRunOptions.model_fields])
def test_each_setting_and_option_says_what_it_is(field: str) -> None:
    fields = {**CloudRunSettings.model_fields, **CloudRunOptions.model_fields}
    assert fields[field].description


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "Field required"),
        ({"job": "projects/p/locations/r/jobs/j"}, "the name of a Cloud Run job alone"),
        ({"job": "j-"}, "no '-' at the end"),
        ({"job": "j", "max_tasks": 10_001}, "less than or equal to 10000"),
        ({"job": "j", "max_tasks": 0}, "greater than or equal to 1"),
        ({"job": "j", "definition": {}}, "Field required"),
        ({"job": "j", "definition": {"image": "i", "cpu": 3}}, "'1', '2', '4' or '8'"),
        ({"job": "j", "definition": {"image": "i", "memory": "2 GB"}}, "such as 512Mi"),
        ({"job": "j", "definition": {"image": "i", "cpu": 4}}, "2Gi or more with 4 cpu"),
        ({"job": "j", "definition": {"image": "i", "cpu": 8, "memory": "3000Mi"}}, "4Gi or more"),
        ({"job": "j", "definition": {"image": "i", "memory": "5Gi"}}, "4Gi at most with the defau"),
        ({"job": "j", "definition": {"image": "i", "cpu": 4, "memory": "17Gi"}}, "16Gi at most"),
        ({"job": "j", "definition": {"image": "i", "cpu": 8, "memory": "640Gi"}}, "32Gi at most"),
        ({"job": "j", "definition": {"image": "i", "env": {"PORT": "1"}}}, "must not be PORT"),
        ({"job": "j", "definition": {"image": "i", "secrets": {"A": "b c"}}}, "never the secret"),
        ({"job": "j", "definition": {"image": "i", "vpc": {}}}, "either a connector"),
        (
            {"job": "j", "definition": {"image": "i", "env": {"A": ""}, "secrets": {"A": "b"}}},
            "not both",
        ),
        ({"job": "j", "definition": {"image": "i", "timeout": "169h"}}, "168h at most"),
        ({"job": "j", "definition": {"image": "i", "labels": {"A": "b"}}}, "lower-case"),
        ({"job": "j", "parallelism": 3, "definition": {"image": "i", "parallelism": 4}}, "one par"),
    ],
)
def test_an_option_that_cannot_work_is_refused_with_what_is_allowed(
    given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        CloudRunOptions.model_validate(given)
    assert said in str(caught.value)


# --- names ----------------------------------------------------------------------------------------


HANDLE = "projects/project-1/locations/europe-west1/jobs/etl/executions/etl-abcde"


def test_a_handle_is_the_full_name_and_leads_to_the_console() -> None:
    name = names.read_handle(HANDLE)
    assert name is not None
    assert name.handle == HANDLE
    assert name.parent == "projects/project-1/locations/europe-west1/jobs/etl"
    assert name.console_url == (
        "https://console.cloud.google.com/run/jobs/executions/details/europe-west1/etl-abcde/tasks"
        "?project=project-1"
    )
    assert "etl-abcde" in name.logs_url
    assert "\n" not in name.logs_url


def test_only_what_runs_at_google_is_linked_to_its_console() -> None:
    name = names.read_handle(HANDLE)
    assert name is not None
    there = launched_as(CloudRunSettings.model_validate(PLACE), name, "k")
    assert (there.console_url, there.logs_url) == (name.console_url, name.logs_url)
    emulator = {**PLACE, "endpoint": "localhost:8080", "insecure": True}
    assert launched_as(CloudRunSettings.model_validate(emulator), name, "k", "https://x") == (
        Launched(HANDLE, "k")
    )


@given(st.text())
def test_what_is_no_name_of_an_execution_is_none(text: str) -> None:
    assert names.read_handle(text) is None


@pytest.mark.parametrize("text", [HANDLE + "/tasks/1", HANDLE + "\n", HANDLE.replace("etl/", "-/")])
def test_a_name_with_more_or_less_is_none(text: str) -> None:
    assert names.read_handle(text) is None


def test_an_answer_by_project_number_is_the_same_handle() -> None:
    told = HANDLE.replace("project-1", "123456789012")
    name = names.same_place(told, "projects/project-1/locations/europe-west1/jobs/-")
    assert name is not None
    assert name.handle == HANDLE


# --- what a launch asks for -----------------------------------------------------------------------


def task(index: int, items: str = "[1]", **given: Any) -> TaskInput:
    return TaskInput(index, index + 10, 2, items, **given)


def request(*tasks: TaskInput, **given: Any) -> LaunchRequest:
    made: dict[str, Any] = {
        "key": "d-b1-abcdefgh",
        "instance": "inst1",
        "batch_id": "b1",
        "job": "etl",
        "command": (),
        "tasks": tasks or (task(0),),
        "options": CloudRunOptions(job="etl"),
        "timeout": timedelta(minutes=5),
        "parallelism": 1,
        **given,
    }
    return LaunchRequest(**made)


def test_one_small_task_gets_its_items_in_a_variable() -> None:
    env = launching.env_of(request(task(0, env={"IDS": "1"}), result_uri="gs://b/r/"), LIMITS)
    assert env == {
        "IDS": "1",
        "DISPATCH_KEY": "d-b1-abcdefgh",
        "DISPATCH_INSTANCE": "inst1",
        "DISPATCH_BATCH_ID": "b1",
        "DISPATCH_JOB": "etl",
        "DISPATCH_TASK_COUNT": "1",
        "DISPATCH_ATTEMPT": "2",
        "DISPATCH_CHUNK": "10",
        "DISPATCH_RESULT_URI": "gs://b/r/",
        "DISPATCH_ITEMS": "[1]",
    }


def test_several_tasks_get_the_document_itself_if_it_is_small() -> None:
    env = launching.env_of(request(task(0), task(1, "[2]")), LIMITS)
    assert env["DISPATCH_INPUT"] == (
        '{"chunk":10,"attempt":2,"items":[1]}\n{"chunk":11,"attempt":2,"items":[2]}\n'
    )
    assert "DISPATCH_ITEMS" not in env
    assert "DISPATCH_ATTEMPT" not in env


def test_a_document_that_was_written_is_given_by_its_address() -> None:
    env = launching.env_of(request(task(0), task(1), input_uri="gs://b/i.jsonl"), LIMITS)
    assert env["DISPATCH_INPUT_URI"] == "gs://b/i.jsonl"
    assert "DISPATCH_INPUT" not in env


def test_input_that_is_too_large_without_storage_is_rejected_by_name() -> None:
    with pytest.raises(Rejected, match="DISPATCHER_STORAGE_URL"):
        launching.env_of(request(task(0, '["' + "x" * 30_000 + '"]')), LIMITS)


def test_the_entry_wrapper_gets_args_and_variables_from_the_document_alone() -> None:
    wrapped = request(task(0, args=("a",), env={"IDS": "1"}), wrapped=True)
    env = launching.env_of(wrapped, LIMITS)
    assert "IDS" not in env
    assert '"args":["a"],"env":{"IDS":"1"}' in env["DISPATCH_INPUT"]
    asked = launching.run_request("j", wrapped, env, "main")
    assert list(asked.overrides.container_overrides[0].args) == []


def test_overrides_carry_args_variables_tasks_and_whole_seconds() -> None:
    made = request(task(0, args=("a", "b")), timeout=timedelta(seconds=1.2))
    asked = launching.run_request("projects/…", made, {"A": "1"}, "main")
    override = asked.overrides.container_overrides[0]
    assert (override.name, list(override.args), override.clear_args) == ("main", ["a", "b"], False)
    assert [(variable.name, variable.value) for variable in override.env] == [("A", "1")]
    assert asked.overrides.task_count == 1
    assert run_v2.RunJobRequest.pb(asked).overrides.timeout.ToTimedelta() == timedelta(seconds=2)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (request(command=("sh", "-c")), "cannot override an entrypoint"),
        (request(task(0, args=("a",)), task(1, args=("b",))), "differ from chunk to chunk"),
        (request(task(0, env={"A": "1"}), task(1, env={"A": "2"})), "differ from chunk to chunk"),
        (request(timeout=timedelta(hours=169)), "Cloud Run allows 7d"),
        (request(task(0, env={"PORT": "1"})), "PORT is Cloud Run's own"),
        (request(task(0, env={"K_SERVICE": "1"})), "K_SERVICE is Cloud Run's own"),
        (request(task(0, env={"IDS": "ä" * 16_385})), "IDS is 32,770 bytes"),
        (request(task(0, env={f"A{i}": "" for i in range(1000)})), "Cloud Run allows 1,000"),
        (request(task(0, args=("a",) * 1001)), "1,001 args"),
    ],
)
def test_what_cloud_run_would_refuse_is_refused_before(made: LaunchRequest, said: str) -> None:
    problems = launching.misfits(made, launching.env_of(made, LIMITS))
    assert any(said in problem for problem in problems)


def live(parallelism: int = 0, *containers: str, **task_template: Any) -> run_v2.Job:
    return run_v2.Job(
        name="projects/project-1/locations/europe-west1/jobs/etl",
        template=run_v2.ExecutionTemplate(
            parallelism=parallelism,
            template=run_v2.TaskTemplate(
                containers=[
                    run_v2.Container(name=n, image="i", env=[run_v2.EnvVar(name="A", value="0")])
                    for n in containers or ("main",)
                ],
                **task_template,
            ),
        ),
    )


def test_fewer_tasks_than_the_parallelism_are_refused_with_a_way_out() -> None:
    own = CloudRunOptions(job="etl")
    (problem,) = launching.check_live(own, live(5), 3)
    assert "parallelism 5 and this execution has 3 tasks" in problem
    assert "limits.running" in problem
    assert list(launching.check_live(own, live(5), 5)) == []
    assert list(launching.check_live(own, live(0), 1)) == []
    assert list(launching.check_live(own, live(5), 3, strict=True)) == []


def test_a_parallelism_that_the_job_has_not_is_refused() -> None:
    own = CloudRunOptions(job="etl", parallelism=2)
    assert "none (as many as it can)" in next(iter(launching.check_live(own, live(0), 9)))
    assert "has 3" in next(iter(launching.check_live(own, live(3), 9)))
    assert list(launching.check_live(own, live(2), 9)) == []


def test_the_container_is_the_only_one_or_the_one_that_is_named() -> None:
    own = CloudRunOptions(job="etl")
    assert launching.container_of(own, live()) == "main"
    assert launching.container_of(own, None) == ""
    with pytest.raises(Rejected, match="several containers, 'a', 'b'"):
        launching.container_of(own, live(0, "a", "b"))
    named = CloudRunOptions(job="etl", container="b")
    assert launching.container_of(named, live(0, "a", "b")) == "b"
    with pytest.raises(Rejected, match="has 'main'"):
        launching.container_of(named, live())


@given(
    st.builds(
        str.__add__,
        st.sampled_from(ascii_lowercase),
        st.text(f"{ascii_lowercase}{digits}-", max_size=49),
    )
)
def test_a_job_of_its_own_has_a_legal_name_that_follows_from_the_key(key: str) -> None:
    name = launching.strict_id(key)
    assert name == launching.strict_id(key)
    assert CloudRunOptions(job=name).job == name
    assert len(name) + len(launching.TOKEN) < 63


def test_a_job_of_its_own_is_the_shared_one_with_the_overrides_in_it() -> None:
    made = request(task(0, args=("x",)), task(1, args=("x",)), parallelism=2)
    job = launching.strict_job(made, {"A": "1", "B": "2"}, "main", live(9, max_retries=3))
    container = job.template.template.containers[0]
    assert {v.name: v.value for v in container.env} == {"A": "1", "B": "2"}
    assert (list(container.args), container.image) == (["x"], "i")
    assert (job.template.task_count, job.template.parallelism) == (2, 2)
    assert run_v2.TaskTemplate.pb(job.template.template).HasField("max_retries")
    assert job.template.template.max_retries == 0
    assert job.labels == {
        "dispatcher-instance": "inst1",
        "dispatcher-key": "d-b1-abcdefgh",
    }
    assert job.start_execution_token == "a1"  # noqa: S105 -- a name


# --- outcomes -------------------------------------------------------------------------------------


def ended(
    state: Any = Condition.State.CONDITION_FAILED,
    *,
    code: int = 0,
    message: str = "",
    exit_code: int = 0,
    signal: int = 0,
    **condition: Any,
) -> Any:
    conditions = [] if state is None else [Condition(type_="Completed", state=state, **condition)]
    return run_v2.Task.pb(
        run_v2.Task(
            index=4,
            start_time=NOW,
            completion_time=NOW + timedelta(seconds=9),
            conditions=conditions,
            last_attempt_result=run_v2.TaskAttemptResult(
                status=status_pb2.Status(code=code, message=message),
                exit_code=exit_code,
                term_signal=signal,
            ),
        )
    )


REASON = Condition.CommonReason
EXECUTION = Condition.ExecutionReason


@pytest.mark.parametrize(
    ("told", "cancelled", "outcome", "code"),
    [
        (ended(Condition.State.CONDITION_SUCCEEDED), False, Outcome.SUCCEEDED, 0),
        (ended(Condition.State.CONDITION_SUCCEEDED), True, Outcome.SUCCEEDED, 0),
        (ended(exit_code=3, code=2), False, Outcome.FAILED, 3),
        (ended(exit_code=3, code=10), True, Outcome.FAILED, 3),
        (ended(signal=9), False, Outcome.FAILED, 137),
        (ended(exit_code=137), False, Outcome.FAILED, 137),
        (ended(signal=15), True, Outcome.CANCELLED, 143),
        (ended(), True, Outcome.CANCELLED, None),
        (ended(execution_reason=EXECUTION.CANCELLED, exit_code=1), False, Outcome.CANCELLED, 1),
        (ended(code=1), False, Outcome.CANCELLED, None),
        (ended(code=4, signal=9), False, Outcome.TIMED_OUT, 137),
        (ended(message="The configured timeout was reached."), False, Outcome.TIMED_OUT, None),
        (ended(message="Memory limit of 512 MiB exceeded", signal=9), False, "oom", 137),
        (ended(reason=REASON.CONTAINER_MISSING), False, Outcome.REJECTED, None),
        (ended(reason=REASON.SECRETS_ACCESS_CHECK_FAILED), True, Outcome.REJECTED, None),
        (ended(reason=REASON.PROGRESS_DEADLINE_EXCEEDED), False, Outcome.START_FAILED, None),
        (ended(reason=REASON.INTERNAL), False, Outcome.LOST, None),
        (ended(), False, Outcome.LOST, None),
        (ended(None), False, Outcome.SUCCEEDED, 0),
        (ended(None, code=13), False, Outcome.LOST, None),
    ],
)
def test_the_words_of_a_task_are_its_outcome(
    told: Any, cancelled: bool, outcome: Outcome | str, code: int | None
) -> None:
    wanted = Outcome.OUT_OF_MEMORY if outcome == "oom" else outcome
    report = outcomes.task_report(told, cancelled=cancelled)
    assert report is not None
    assert (report.index, report.outcome, report.exit_code) == (4, wanted, code)
    assert (report.started_at, report.ended_at) == (NOW, NOW + timedelta(seconds=9))
    assert (report.reason is None) == (wanted is Outcome.SUCCEEDED)


def test_a_reason_that_only_a_newer_api_knows_is_told_by_its_number() -> None:
    told = ended()
    told.conditions[0].reason = 99
    report = outcomes.task_report(told, cancelled=False)
    assert report is not None
    assert report.reason == "reason 99"


def test_a_task_that_cloud_run_tries_again_has_not_ended() -> None:
    again = run_v2.Task.pb(
        run_v2.Task(
            retried=1,
            conditions=[Condition(type_="Completed", state=Condition.State.CONDITION_RECONCILING)],
            last_attempt_result=run_v2.TaskAttemptResult(exit_code=1),
        )
    )
    assert outcomes.task_report(again, cancelled=False) is None


def execution(tasks: int, *counts: int, done: bool = True, **condition: Any) -> Any:
    succeeded, failed, cancelled = (*counts, 0, 0, 0)[:3]
    return run_v2.Execution.pb(
        run_v2.Execution(
            task_count=tasks,
            succeeded_count=succeeded,
            failed_count=failed,
            cancelled_count=cancelled,
            completion_time=NOW if done else None,
            conditions=[Condition(type_="Completed", **condition)],
        )
    )


def rest(told: Any, *known: TaskReport, waited: bool = False) -> list[Outcome] | None:
    found = outcomes.rest_of(
        told, outcomes.tally(told), {report.index: report for report in known}, waited=waited
    )
    return None if found is None else [report.outcome for report in found]


GOOD = TaskReport(0, Outcome.SUCCEEDED)


def test_what_the_counts_call_cancelled_is_cancelled_at_once() -> None:
    assert rest(execution(3, 1, 0, 2), GOOD) == [Outcome.CANCELLED] * 2


def test_a_failure_is_waited_for_as_its_exit_code_counts() -> None:
    told = execution(3, 1, 2, 0, message="Task failed")
    assert rest(told, GOOD) is None
    assert rest(told, GOOD, waited=True) == [Outcome.FAILED] * 2


def test_a_success_is_never_concluded_while_the_counts_do_not_say_it() -> None:
    assert rest(execution(2, 1), GOOD) is None
    assert rest(execution(2, 1), GOOD, waited=True) == [Outcome.LOST]
    assert rest(execution(2, 2), GOOD, waited=True) == [Outcome.SUCCEEDED]


def test_the_executions_own_condition_tells_of_tasks_that_never_were() -> None:
    missing = execution(2, reason=REASON.CONTAINER_MISSING, message="no such image")
    assert rest(missing, waited=True) == [Outcome.REJECTED] * 2
    stopped = execution(2, execution_reason=EXECUTION.CANCELLED)
    assert rest(stopped, waited=True) == [Outcome.CANCELLED] * 2
    late = execution(2, reason=REASON.PROGRESS_DEADLINE_EXCEEDED)
    assert rest(late, waited=True) == [Outcome.START_FAILED] * 2


def test_of_one_task_that_succeeded_the_execution_tells_all() -> None:
    one = execution(1, 1)
    told = outcomes.sole_success(one, outcomes.tally(one))
    assert told == TaskReport(0, Outcome.SUCCEEDED, 0, ended_at=NOW)
    for other in (
        execution(1, 0, 1),
        execution(2, 1),
        execution(1, 1, done=False),
        execution(1, 1, execution_reason=EXECUTION.CANCELLED),
    ):
        assert outcomes.sole_success(other, outcomes.tally(other)) is None


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind", "clear"),
    [
        (api.ResourceExhausted("quota"), Unavailable, True),
        (api.TooManyRequests("quota"), Unavailable, True),
        (api.InvalidArgument("bad"), Rejected, None),
        (api.FailedPrecondition("not ready"), Rejected, None),
        (api.BadRequest("bad"), Rejected, None),
        (api.NotFound("no job"), Rejected, None),
        (api.PermissionDenied("no"), Rejected, None),
        (api.Unauthenticated("who"), Rejected, None),
        (api.MethodNotImplemented("no"), Rejected, None),
        (api.from_http_status(413, "too large"), Rejected, None),
        (auth.DefaultCredentialsError("none"), Rejected, None),
        (auth.RefreshError("invalid_grant"), Rejected, None),
        (auth.RefreshError("later", retryable=True), Unavailable, True),
        (auth.TransportError("no network"), Unavailable, True),
        (api.ServiceUnavailable("503"), Unavailable, False),
        (api.DeadlineExceeded("504"), Unavailable, False),
        (api.InternalServerError("500"), Unavailable, False),
        (api.Aborted("409"), Unavailable, False),
        (api.Cancelled("499"), Unavailable, False),
        (api.Unknown("?"), Unavailable, False),
        (requests.ConnectionError("dropped"), Unavailable, False),
        (requests.ReadTimeout("late"), Unavailable, False),
    ],
)
def test_what_the_client_raises_at_a_launch_is_a_refusal_a_not_now_or_open(
    error: Exception, kind: type[Exception], clear: bool | None
) -> None:
    told = failures.at_launch(error, "cannot run it")
    assert type(told) is kind
    assert getattr(told, "not_started", None) == clear
    assert str(told).startswith("cannot run it: ")


def test_what_is_to_be_done_follows_what_the_provider_said_without_its_stop() -> None:
    told = str(failures.at_launch(api.NotFound("Job x does not exist."), "cannot run it"))
    assert "Job x does not exist; " in told


def test_old_front_ends_say_forbidden_for_a_rate() -> None:
    info = error_details_pb2.ErrorInfo(reason="RATE_LIMIT_EXCEEDED")
    told = failures.at_launch(api.Forbidden("slow down", error_info=info), "x")
    assert isinstance(told, Unavailable)
    assert told.not_started


def test_the_wait_that_the_provider_asks_for_is_taken_over() -> None:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromTimedelta(timedelta(seconds=7))
    told = failures.at_launch(api.ResourceExhausted("quota", details=[retry]), "x")
    assert isinstance(told, Unavailable)
    assert told.retry_after == timedelta(seconds=7)
    response = requests.Response()
    response.headers["Retry-After"] = "11"
    told = failures.at_launch(api.TooManyRequests("quota", response=response), "x")
    assert isinstance(told, Unavailable)
    assert told.retry_after == timedelta(seconds=11)


def test_the_providers_words_come_through_short_and_with_what_to_do() -> None:
    told = str(failures.at_launch(api.PermissionDenied("run.jobs.run  denied\n" + "x" * 5000), "y"))
    assert "403 run.jobs.run denied x" in told
    assert "roles/run.jobsExecutorWithOverrides" in told
    assert len(told) < 1300


# --- definitions ----------------------------------------------------------------------------------


DEFINED = CloudRunOptions.model_validate(
    {
        "job": "etl",
        "definition": {
            "image": "img:2",
            "cpu": 2,
            "memory": "2Gi",
            "parallelism": 5,
            "timeout": "1h",
            "service_account": "etl@project-1.iam.gserviceaccount.com",
            "vpc": {"network": "n", "subnetwork": "s", "egress": "all-traffic"},
            "env": {"MODE": "fast", "API_KEY": "x"},
            "secrets": {"DB": "db-password:3"},
            "labels": {"team": "data"},
        },
    }
)


def changes(own: CloudRunOptions, job: run_v2.Job | None) -> dict[str, tuple[Any, Any]]:
    return {c.path: (c.old, c.new) for c in definitions.differences(own, job)}


def test_a_new_definition_differs_in_all_that_it_sets() -> None:
    assert changes(DEFINED, None) == {
        "labels.team": (None, "data"),
        "parallelism": (None, 5),
        "max_retries": (None, 0),
        "timeout": (None, "1h"),
        "service_account": (None, "etl@project-1.iam.gserviceaccount.com"),
        "vpc.egress": (None, "all-traffic"),
        "vpc.network": (None, "n"),
        "vpc.subnetwork": (None, "s"),
        "containers.0.image": (None, "img:2"),
        "containers.0.cpu": (None, "2"),
        "containers.0.memory": (None, "2Gi"),
        "containers.0.env.MODE": (None, "fast"),
        "containers.0.env.API_KEY": (None, "***"),
        "containers.0.env.DB": (None, "secret db-password:3"),
    }


def test_what_was_written_differs_in_nothing() -> None:
    assert changes(DEFINED, definitions.written(DEFINED, None)) == {}


def test_only_what_the_block_sets_is_compared_and_written() -> None:
    own = CloudRunOptions.model_validate({"job": "etl", "definition": {"image": "img:2"}})
    job = live(3, max_retries=3, service_account="other@x.iam.gserviceaccount.com")
    job.labels["team"] = "web"
    assert changes(own, job) == {
        "max_retries": (3, 0),
        "containers.main.image": ("i", "img:2"),
    }
    after = definitions.written(own, job)
    assert after.template.parallelism == 3
    assert after.labels == {"team": "web"}
    container = after.template.template.containers[0]
    assert [(v.name, v.value) for v in container.env] == [("A", "0")]
    assert container.image == "img:2"
    assert job.template.template.containers[0].image == "i", "the live one is not touched"


def test_retries_that_nobody_set_are_three_and_are_set_to_none() -> None:
    own = CloudRunOptions.model_validate({"job": "etl", "definition": {"image": "i"}})
    assert changes(own, live())["max_retries"] == (None, 0)
    assert changes(own, live(max_retries=0)) == {}


def test_a_parallelism_brings_as_many_tasks_in_the_definition() -> None:
    assert definitions.written(DEFINED, None).template.task_count == 5


# --- on paper -------------------------------------------------------------------------------------


def job(**given: Any) -> Job:
    made = {"name": "etl", "target": "cloud", "chunk": Chunking(size=1), **given}
    return Job.model_validate(made)


def said(given: Job, **options: Any) -> list[tuple[str, str]]:
    own = CloudRunOptions.model_validate({"job": "etl", **options})
    return [(remark.level, remark.text) for remark in on_paper(given, own)]


def test_a_command_is_told_of_as_cloud_run_cannot_override_it() -> None:
    ((level, text),) = said(job(command=("sh", "-c", "x")))
    assert level == "fail"
    assert "cannot override the entrypoint" in text


def test_reserved_names_and_long_timeouts_are_told_of() -> None:
    texts = said(job(env={"PORT": "1", "CLOUD_RUN_X": "2"}, timeout="200h"))
    assert [level for level, _ in texts] == ["fail"] * 3
    assert "PORT" in texts[0][1]
    assert "7d" in texts[2][1]


def test_templates_for_each_chunk_in_packs_without_the_wrapper_are_warned_of() -> None:
    given = job(env={"IDS": "{items:csv}"})
    assert ("warn", True) in [
        (level, "one task" in text) for level, text in said(given, max_tasks=10)
    ]
    assert "warn" not in [level for level, _ in said(given, max_tasks=10, wrapped=True)]


# --- memory ---------------------------------------------------------------------------------------


def test_the_memory_is_bounded_and_forgets_what_nobody_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    kept = memory.Memory(lambda: now)
    for number in range(50):
        known = kept.of(f"h{number}")
        known.ends = dict.fromkeys(range(10), GOOD)
        kept.count(known)
    monkeypatch.setattr(memory, "MOST_TASKS", 100)
    kept.trim()
    assert len(kept.of("h49").ends) == 10
    assert kept.of("h0").ends == {}
    now = 1000.0
    kept.of("h48")
    kept.trim()
    assert kept.of("h49").ends == {}
    assert len(kept.of("h48").ends) == 10


def test_of_two_executions_with_one_key_the_older_is_its_own() -> None:
    kept = memory.Memory(lambda: 0.0)
    kept.note_launch(Launched("young", "k"), NOW, "i")
    kept.note_launch(Launched("old", "k"), NOW - timedelta(minutes=1), "i")
    kept.note_launch(Launched("between", "k"), NOW - timedelta(seconds=1), "i")
    found = kept.launched("k")
    assert found is not None
    assert found.handle == "old"


def test_a_backend_refuses_what_is_not_its_own() -> None:
    with pytest.raises(TypeError, match="CloudRunSettings"):
        CloudRunBackend("t", CloudRunOptions(job="j"))
    backend = CloudRunBackend("t", settings())
    with pytest.raises(TypeError, match="CloudRunOptions"):
        backend.launch(replace(request(), options=settings()))
    assert backend.home() is None
