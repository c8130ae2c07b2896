"""Records as the API shows them: protobuf messages of executions, tasks, jobs and log lines.

Nothing here changes a record, but for the cache of what was rendered of it.
"""

from __future__ import annotations

import uuid
from typing import Any, Final
from urllib.parse import quote

from dispatcher.emulators.cloud_run.journal import JournalEntry
from dispatcher.emulators.cloud_run.messages import (
    Condition,
    Execution,
    LogEntry,
    Operation,
    Task,
    set_seconds,
    stamp,
)
from dispatcher.emulators.cloud_run.records import (
    AttemptResult,
    ExecutionRecord,
    Snapshot,
    TaskRecord,
    TaskState,
)
from dispatcher.emulators.cloud_run.refusal import Code

__all__ = ["execution_message", "log_message", "operation_message", "set_condition", "task_message"]

CREATOR: Final = "emulator@example.com"

TASK_CONDITIONS: Final = {
    TaskState.WAITING: Condition.CONDITION_PENDING,
    TaskState.RUNNING: Condition.CONDITION_RECONCILING,
    TaskState.SUCCEEDED: Condition.CONDITION_SUCCEEDED,
    TaskState.FAILED: Condition.CONDITION_FAILED,
    TaskState.CANCELLED: Condition.CONDITION_FAILED,
}


def set_condition(
    condition: Any,
    type_: str,
    state: int,
    *,
    message: str = "",
    at: float | None = None,
    skew: float = 0.0,
) -> None:
    """Fill a condition; its reason is the caller's."""
    condition.type_ = type_
    condition.state = state
    condition.message = message
    stamp(condition.last_transition_time, at, skew)


def execution_message(
    execution: ExecutionRecord, snapshot: Snapshot | None = None, skew: float = 0.0
) -> Any:
    """Show an execution, as it is or as it was. Not to be changed: it is kept for the next time."""
    shown = snapshot or execution.snapshot()
    key = (shown.version, skew)
    message = execution.rendered.get(key)
    if message is None:
        message = _execution_message(execution, shown, skew)
        execution.rendered[key] = message
    return message


def _execution_message(execution: ExecutionRecord, shown: Snapshot, skew: float) -> Any:
    message = Execution(
        name=execution.name,
        uid=execution.uid,
        creator=CREATOR,
        generation=1,
        labels=execution.labels,
        annotations=execution.annotations,
        job=execution.job,
        parallelism=execution.parallelism,
        task_count=execution.task_count,
        template=execution.template,  # guess: overrides_in_lists
        reconciling=shown.completed_at is None,
        observed_generation=1,
        running_count=shown.running,
        succeeded_count=shown.succeeded,
        failed_count=shown.failed,
        cancelled_count=shown.cancelled,
        retried_count=shown.retried,
        log_uri=_log_uri(execution),
        etag=f'"{execution.uid[:8]}-{shown.version}"',
    )
    stamp(message.create_time, execution.created_at, skew)
    stamp(message.start_time, shown.started_at, skew)
    stamp(message.completion_time, shown.completed_at, skew)
    changed = shown.completed_at or shown.started_at or execution.created_at
    stamp(message.update_time, changed, skew)
    started = shown.started_at is not None
    ready = Condition.CONDITION_SUCCEEDED if started else Condition.CONDITION_PENDING
    for type_ in ("ResourcesAvailable", "Started"):
        set_condition(message.conditions.add(), type_, ready, at=shown.started_at, skew=skew)
    _complete_condition(message.conditions.add(), execution, shown, skew)
    return message


def _complete_condition(
    condition: Any, execution: ExecutionRecord, shown: Snapshot, skew: float
) -> None:
    state = Condition.CONDITION_RECONCILING if shown.started_at else Condition.CONDITION_PENDING
    text = ""
    if shown.completed_at is None:
        if shown.cancelling:
            state = Condition.CONDITION_RECONCILING
            condition.execution_reason = Condition.CANCELLING
    elif shown.succeeded == execution.task_count:
        state = Condition.CONDITION_SUCCEEDED
        text = "Execution completed successfully."
    else:
        state = Condition.CONDITION_FAILED
        text = execution.failure
        if execution.missing_image:
            condition.reason = Condition.CONTAINER_MISSING
        elif shown.cancelled:
            condition.execution_reason = Condition.CANCELLED
            text = "The execution was cancelled."
        else:
            condition.execution_reason = Condition.NON_ZERO_EXIT_CODE
    at = shown.completed_at or shown.started_at or execution.created_at
    set_condition(condition, "Completed", state, message=text, at=at, skew=skew)


def _log_uri(execution: ExecutionRecord, task: TaskRecord | None = None) -> str:
    project = execution.name.split("/")[1]
    query = (
        'resource.type="cloud_run_job" '
        f'resource.labels.job_name="{execution.job_id}" '
        f'labels."run.googleapis.com/execution_name"="{execution.id}"'
    )
    if task is not None:
        query += f' labels."run.googleapis.com/task_index"="{task.index}"'
    return (
        f"https://console.cloud.google.com/logs/viewer?project={project}"
        f"&advancedFilter={quote(query)}"
    )


def task_message(
    execution: ExecutionRecord, task: TaskRecord, skew: float = 0.0, as_of: float | None = None
) -> Any:
    """Show a task, as it is or as it was at a moment."""
    state, result, attempt = task.state, task.result, task.attempt
    started, ended = task.started_at, task.ended_at
    if as_of is not None:
        if ended is not None and ended > as_of:
            ended, state, result = None, TaskState.RUNNING, None
        if started is not None and started > as_of:
            started, state, attempt = None, TaskState.WAITING, -1
    terminal = state in (TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED)
    template = execution.template
    message = Task(
        name=f"{execution.name}/tasks/{execution.id}-task{task.index}",
        uid=str(uuid.uuid5(uuid.UUID(execution.uid), str(task.index))),
        generation=1,
        labels=execution.labels,
        annotations=execution.annotations,
        job=execution.job,
        execution=execution.name,
        containers=template.containers,
        volumes=template.volumes,
        max_retries=execution.max_retries,
        service_account=template.service_account,
        reconciling=not terminal,
        observed_generation=1,
        index=task.index,
        retried=max(attempt, 0),
        log_uri=_log_uri(execution, task),
        etag=f'"{execution.uid[:8]}-{task.index}-{attempt}-{state.value}"',
    )
    set_seconds(message.timeout, execution.timeout)
    stamp(message.create_time, execution.created_at, skew)
    stamp(message.scheduled_time, execution.created_at, skew)
    stamp(message.start_time, started, skew)
    stamp(message.completion_time, ended if terminal else None, skew)
    stamp(message.update_time, ended or started or execution.created_at, skew)
    condition = message.conditions.add()
    text = ""
    if state is TaskState.CANCELLED:
        condition.execution_reason = Condition.CANCELLED
        text = "The task was cancelled."
    elif state is TaskState.FAILED:
        # Without a result it was never started: there was no image.
        if result is None or result.missing_image:
            condition.reason = Condition.CONTAINER_MISSING
        else:
            condition.execution_reason = Condition.NON_ZERO_EXIT_CODE
        text = result.message if result else execution.failure
    set_condition(
        condition,
        "Completed",
        TASK_CONDITIONS[state],
        message=text,
        at=ended or started or execution.created_at,
        skew=skew,
    )
    if result is not None:
        _set_result(message.last_attempt_result, result)
    elif state is TaskState.FAILED:
        _set_result(message.last_attempt_result, AttemptResult(Code.INTERNAL, execution.failure))
    return message


def _set_result(message: Any, result: AttemptResult) -> None:
    message.status.code = result.code
    message.status.message = result.message
    # A message without a field in it would not be sent at all.
    message.SetInParent()
    message.status.SetInParent()
    if result.exit_code is not None:
        message.exit_code = result.exit_code
    if result.term_signal is not None:
        message.term_signal = result.term_signal


def operation_message(execution: ExecutionRecord, skew: float = 0.0) -> Any:
    """Show the operation that RunJob returned for an execution (guess: operation_error)."""
    shown = execution_message(execution, skew=skew)
    operation = Operation(name=execution.operation, done=execution.done)
    operation.metadata.Pack(shown)
    if execution.done:
        if execution.succeeded == execution.task_count:
            operation.response.Pack(shown)
        else:
            operation.error.code = Code.ABORTED
            operation.error.message = shown.conditions[-1].message
    return operation


def log_message(entry: JournalEntry, skew: float = 0.0) -> Any:
    """Show a line as Cloud Logging does."""
    message = LogEntry(
        log_name=entry.log_name,
        insert_id=f"{entry.order:012x}",
        text_payload=entry.line.text,
        labels=entry.labels,
    )
    message.resource.type = "cloud_run_job"
    message.resource.labels.update(entry.resource_labels)
    stamp(message.timestamp, entry.at, skew)
    stamp(message.receive_timestamp, entry.at, skew)
    return message
