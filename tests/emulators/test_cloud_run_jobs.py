"""Jobs and executions as the real client sees them, over gRPC and REST."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from emulators.cloud import JOB, Cloud, Overrides, eventually
from google.api_core import exceptions
from google.cloud import run_v2

from dispatcher.emulators.cloud_run import EmulatorOptions, TaskEnd, TaskStart

Open = Callable[..., Cloud]
PARENT = "projects/p/locations/r"
Reason = run_v2.Condition.ExecutionReason
State = run_v2.Condition.State


def completed(execution: run_v2.Execution) -> run_v2.Condition:
    (condition,) = [one for one in execution.conditions if one.type_ == "Completed"]
    return condition


def template(**container: Any) -> run_v2.ExecutionTemplate:
    container.setdefault("image", "image")
    return run_v2.ExecutionTemplate(
        template=run_v2.TaskTemplate(containers=[run_v2.Container(**container)])
    )


# --- running --------------------------------------------------------------------------------------


def test_the_reply_of_a_run_already_names_the_execution(opened: Open) -> None:
    cloud = opened(script=lambda _: math.inf)
    execution = cloud.run(task_count=3)
    assert execution.name.startswith(f"{JOB}/executions/job-")
    assert len(execution.name.rpartition("-")[2]) == 5
    assert execution.task_count == 3
    assert not execution.completion_time
    running = eventually(
        lambda: cloud.executions.get_execution(name=execution.name),
        lambda now: now.running_count == 3,
    )
    assert running.start_time
    assert completed(running).state == State.CONDITION_RECONCILING


def test_counts_results_and_condition_tell_how_each_task_ended(opened: Open) -> None:
    def script(start: TaskStart) -> TaskEnd:
        return {
            1: TaskEnd(exit_code=7),
            2: TaskEnd(out_of_memory=True),
            3: TaskEnd(seconds=math.inf),
            4: TaskEnd(term_signal=11),
        }.get(start.index, TaskEnd())

    cloud = opened(script=script, job={"timeout": 1, "limits": {"memory": "1Gi"}})
    execution = cloud.run(task_count=5)
    eventually(lambda: len(cloud.emulator.world.starts) == 5)
    cloud.emulator.world.advance(2)
    execution = cloud.finished(execution)
    assert (execution.succeeded_count, execution.failed_count, execution.cancelled_count) == (
        1,
        4,
        0,
    )
    assert completed(execution).state == State.CONDITION_FAILED
    assert completed(execution).execution_reason == Reason.NON_ZERO_EXIT_CODE
    assert "failed with message: " in completed(execution).message
    results = [task.last_attempt_result for task in cloud.results(execution)]
    assert [(one.status.code, one.exit_code, one.term_signal) for one in results] == [
        (0, 0, 0),
        (10, 7, 0),
        (8, 0, 9),
        (4, 0, 15),
        (10, 0, 11),
    ]
    assert results[3].status.message == "The configured timeout was reached."
    assert "Memory limit of 1Gi exceeded" in results[2].status.message


def test_the_operation_of_a_run_is_done_when_the_execution_is(opened: Open) -> None:
    cloud = opened(script=lambda start: TaskEnd(seconds=0.05, exit_code=start.index))
    operation = cloud.jobs.run_job(name=JOB)
    assert operation.result(timeout=60).succeeded_count == 1
    failing = cloud.jobs.run_job(run_v2.RunJobRequest(name=JOB, overrides=Overrides(task_count=2)))
    with pytest.raises(exceptions.Aborted, match="The container exited with an error"):
        failing.result(timeout=60)


def test_overrides_replace_args_merge_env_and_leave_the_job_as_it_was(opened: Open) -> None:
    cloud = opened(
        job={
            "container": "main",
            "command": ["run"],
            "args": ["a"],
            "env": {"A": "1", "B": "2"},
            "timeout": 60,
        }
    )
    cloud.run()
    cloud.run(name="main", args=["x", "y"], env={"B": "3", "C": "4"}, task_count=2)
    cloud.run(clear_args=True, args=[])
    changed = cloud.run(timeout={"seconds": 7})
    starts = eventually(lambda: cloud.emulator.world.starts, lambda seen: len(seen) == 5)
    by_execution = {start.execution: start for start in starts}
    plain, other, cleared, _ = by_execution.values()
    assert (plain.command, plain.args, plain.env) == (("run",), ("a",), {"A": "1", "B": "2"})
    assert (other.args, other.env) == (("x", "y"), {"A": "1", "B": "3", "C": "4"})
    assert (cleared.args, cleared.count) == ((), 1)
    assert changed.template.timeout.total_seconds() == 7
    assert cloud.jobs.get_job(name=JOB).template.template.timeout.total_seconds() == 60
    assert other.environment["CLOUD_RUN_TASK_COUNT"] == "2"
    assert other.environment["CLOUD_RUN_EXECUTION"] == other.execution_id


def test_a_failed_task_is_tried_again_as_often_as_the_job_says(opened: Open) -> None:
    cloud = opened(
        script=lambda start: TaskEnd(exit_code=0 if start.attempt == 2 else 1),
        job={"max_retries": 2},
    )
    execution = cloud.finished(cloud.run(task_count=2))
    assert (execution.succeeded_count, execution.retried_count) == (2, 4)
    assert [task.retried for task in cloud.results(execution)] == [2, 2]


def test_tasks_never_run_more_at_once_than_the_job_allows(opened: Open) -> None:
    cloud = opened(script=lambda _: 10, job={"parallelism": 2})
    execution = cloud.run(task_count=7)
    assert execution.parallelism == 2
    eventually(lambda: len(cloud.emulator.world.starts) >= 2)
    cloud.emulator.world.advance(1000)
    execution = cloud.finished(execution)
    assert cloud.emulator.world.most_busy == 2
    # In pairs of ten seconds, whenever the emulator got round to it.
    taken = execution.completion_time - execution.start_time
    assert taken.total_seconds() == pytest.approx(40)


def test_the_capacity_of_a_region_is_shared_by_its_executions(opened: Open) -> None:
    cloud = opened(script=lambda _: 0.01, options=EmulatorOptions(max_parallel_tasks=3))
    runs = [cloud.run(task_count=5) for _ in range(3)]
    assert [cloud.finished(one).succeeded_count for one in runs] == [5, 5, 5]
    assert cloud.emulator.world.most_busy == 3


# --- cancel and delete ----------------------------------------------------------------------------


def test_a_cancel_stops_what_runs_and_what_waits(opened: Open) -> None:
    cloud = opened(script=lambda start: 0 if start.index == 0 else math.inf, job={"parallelism": 2})
    execution = cloud.run(task_count=5)
    eventually(
        lambda: cloud.executions.get_execution(name=execution.name),
        lambda now: (now.succeeded_count, now.running_count) == (1, 2),
    )
    cloud.executions.cancel_execution(name=execution.name)
    ended = cloud.finished(execution)
    assert (ended.succeeded_count, ended.failed_count, ended.cancelled_count) == (1, 0, 4)
    assert completed(ended).execution_reason == Reason.CANCELLED
    assert completed(ended).state == State.CONDITION_FAILED
    results = [task.last_attempt_result.status.code for task in cloud.results(ended)]
    assert results == [0, 1, 1, 0, 0]
    with pytest.raises(exceptions.BadRequest, match="has completed and cannot be cancelled"):
        cloud.executions.cancel_execution(name=execution.name)


def test_a_deleted_execution_is_gone_and_its_tasks_have_stopped(opened: Open) -> None:
    cloud = opened(script=lambda _: math.inf)
    execution = cloud.run()
    eventually(lambda: cloud.emulator.world.busy == 1)
    cloud.executions.delete_execution(name=execution.name)
    with pytest.raises(exceptions.NotFound):
        cloud.executions.get_execution(name=execution.name)
    eventually(lambda: cloud.emulator.world.busy == 0)
    cloud.jobs.delete_job(name=JOB)
    with pytest.raises(exceptions.NotFound):
        cloud.jobs.get_job(name=JOB)


def test_only_the_newest_completed_executions_of_a_job_are_kept(opened: Open) -> None:
    cloud = opened(options=EmulatorOptions(retention=2))
    runs = [cloud.finished(cloud.run()) for _ in range(4)]
    kept = [one.name for one in cloud.executions.list_executions(parent=JOB)]
    assert kept == [runs[3].name, runs[2].name]
    assert len(cloud.emulator.world.executed) == 4


# --- lists ----------------------------------------------------------------------------------------


def test_lists_are_newest_first_paged_and_may_span_all_jobs(opened: Open) -> None:
    cloud = opened(options=EmulatorOptions(page_size=3))
    other = cloud.emulator.world.define("p", "r", "other")
    cloud.emulator.world.define("p", "elsewhere", "job")
    names = [cloud.run(name).name for name in (JOB, other, JOB, JOB, other)]
    cloud.run("projects/p/locations/elsewhere/jobs/job")
    every = cloud.executions.list_executions({"parent": f"{PARENT}/jobs/-", "page_size": 1000})
    assert [one.name for one in every] == names[::-1]
    assert cloud.emulator.pages["Executions.ListExecutions"] == 1
    assert cloud.emulator.calls["Executions.ListExecutions"] == 2
    page = next(cloud.executions.list_executions({"parent": JOB, "page_size": 2}).pages)
    assert len(page.executions) == 2
    assert [job.name.rpartition("/")[2] for job in cloud.jobs.list_jobs(parent=PARENT)] == [
        "other",
        "job",
    ]
    with pytest.raises(exceptions.BadRequest, match="page_token"):
        list(cloud.executions.list_executions({"parent": JOB, "page_token": "nonsense"}))


def test_a_new_execution_does_not_shift_the_next_page(opened: Open) -> None:
    cloud = opened()
    first, second = cloud.run().name, cloud.run().name
    pages = cloud.executions.list_executions({"parent": JOB, "page_size": 1}).pages
    assert [one.name for one in next(pages).executions] == [second]
    cloud.run()
    assert [one.name for one in next(pages).executions] == [first]


def test_a_task_can_be_looked_up_by_its_name(opened: Open) -> None:
    cloud = opened()
    execution = cloud.finished(cloud.run(task_count=3))
    last = cloud.results(execution)[2]
    found = cloud.tasks.get_task(name=last.name)
    assert (found.index, found.uid) == (2, last.uid)
    with pytest.raises(exceptions.NotFound):
        cloud.tasks.get_task(name=f"{execution.name}/tasks/task9")


# --- definitions ----------------------------------------------------------------------------------


def test_a_job_is_created_updated_and_refused_a_second_time(opened: Open) -> None:
    cloud = opened()
    job = run_v2.Job(template=template(env=[{"name": "A", "value": "1"}]), labels={"team": "x"})
    made = cloud.jobs.create_job(parent=PARENT, job=job, job_id="made").result(timeout=60)
    assert made.template.template.max_retries == 3
    assert made.template.template.timeout.total_seconds() == 600
    assert (made.template.task_count, made.generation) == (1, 1)
    with pytest.raises(exceptions.Conflict):
        cloud.jobs.create_job(parent=PARENT, job=job, job_id="made")
    made.template.parallelism = 4
    newer = cloud.jobs.update_job(job=made).result(timeout=60)
    assert (newer.template.parallelism, newer.generation) == (4, 2)
    # `made` has the etag of the first version.
    with pytest.raises(exceptions.Conflict):
        cloud.jobs.update_job(job=made)


def test_an_update_of_a_job_that_is_missing_creates_it_only_if_asked_to(opened: Open) -> None:
    cloud = opened()
    job = run_v2.Job(name=f"{PARENT}/jobs/new", template=template())
    with pytest.raises(exceptions.NotFound):
        cloud.jobs.update_job(job=job)
    cloud.jobs.update_job({"job": job, "allow_missing": True})
    assert cloud.jobs.get_job(name=job.name).uid


def test_a_start_token_names_the_execution_and_starts_it_once(opened: Open) -> None:
    cloud = opened()
    job = run_v2.Job(template=template(), start_execution_token="a1")  # noqa: S106 - a name
    made = cloud.jobs.create_job(parent=PARENT, job=job, job_id="strict").result(timeout=60)
    latest = cloud.jobs.get_job(name=made.name).latest_created_execution
    assert latest.name == f"{PARENT}/jobs/strict/executions/strict-a1"
    made.etag = ""
    cloud.jobs.update_job(job=made)
    assert len(cloud.emulator.world.executed) == 1
    made.start_execution_token = "a2"  # noqa: S105 - a name
    cloud.jobs.update_job(job=made)
    assert [one.id for one in cloud.emulator.world.executed] == ["strict-a1", "strict-a2"]


def test_a_dry_run_checks_and_starts_nothing(opened: Open) -> None:
    cloud = opened()
    cloud.jobs.run_job(run_v2.RunJobRequest(name=JOB, validate_only=True))
    with pytest.raises(exceptions.BadRequest):
        cloud.jobs.run_job(
            run_v2.RunJobRequest(
                name=JOB, validate_only=True, overrides=Overrides(task_count=10_001)
            )
        )
    cloud.jobs.create_job(
        {
            "parent": PARENT,
            "job": run_v2.Job(template=template()),
            "job_id": "no",
            "validate_only": True,
        }
    )
    assert not cloud.emulator.world.executed
    assert cloud.jobs.get_job(name=JOB).execution_count == 0
    with pytest.raises(exceptions.NotFound):
        cloud.jobs.get_job(name=f"{PARENT}/jobs/no")
