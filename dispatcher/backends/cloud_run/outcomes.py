"""From Cloud Run's words on a task to its outcome. Pure.

Evaluated from the top; the first line that fits says it (facts/clouds.md §10):

    the task's condition, its last attempt's result        outcome
    Completed = SUCCEEDED                                  succeeded
    execution_reason CANCELLED, CANCELLING or DELETED      cancelled
    status code CANCELLED (1)                              cancelled                           [U]
    reason CONTAINER_MISSING, CONTAINER_PERMISSION_DENIED,
      CONTAINER_IMAGE_*, ENCRYPTION_KEY_*,
      SECRETS_ACCESS_CHECK_FAILED, VPC_NETWORK_NOT_FOUND   rejected
    status code DEADLINE_EXCEEDED (4), or the words
      "configured timeout was reached"                     timed_out                           [I]
    the words "memory limit" or "out of memory"            out_of_memory                       [I]
    exit code N, not 0                                     failed, exit code N
    its execution was cancelled                            cancelled
    signal N (9 too: nobody says "memory" here)            failed, exit code 128 + N
    reason PROGRESS_DEADLINE_EXCEEDED                      start_failed                        [U]
    no condition, but a result without any fault           succeeded                           [U]
    anything else: INTERNAL, UNKNOWN, no words at all      lost

A cancelled execution is never succeeded, but a task that succeeded before stays so. A task that
Cloud Run is about to try again by itself has not ended.

An execution has ended when its `completion_time` is set and its counts add up. What its tasks do
not tell then is told by its counts, or by its own condition.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from google.cloud import run_v2

from dispatcher.backends.base import TaskReport
from dispatcher.states import Outcome

__all__ = ["Tally", "completed", "moment", "rest_of", "sole_success", "tally", "task_report"]

_Condition: Final = run_v2.Condition
_SUCCEEDED: Final = int(_Condition.State.CONDITION_SUCCEEDED)
_FAILED: Final = int(_Condition.State.CONDITION_FAILED)

_CANCEL_REASONS: Final = frozenset(
    int(reason)
    for reason in (
        _Condition.ExecutionReason.CANCELLED,
        _Condition.ExecutionReason.CANCELLING,
        _Condition.ExecutionReason.DELETED,
    )
)
_MISCONFIGURED: Final = frozenset(
    int(reason)
    for reason in (
        _Condition.CommonReason.CONTAINER_MISSING,
        _Condition.CommonReason.CONTAINER_PERMISSION_DENIED,
        _Condition.CommonReason.CONTAINER_IMAGE_UNAUTHORIZED,
        _Condition.CommonReason.CONTAINER_IMAGE_AUTHORIZATION_CHECK_FAILED,
        _Condition.CommonReason.ENCRYPTION_KEY_PERMISSION_DENIED,
        _Condition.CommonReason.ENCRYPTION_KEY_CHECK_FAILED,
        _Condition.CommonReason.SECRETS_ACCESS_CHECK_FAILED,
        _Condition.CommonReason.VPC_NETWORK_NOT_FOUND,
    )
)
_LATE: Final = int(_Condition.CommonReason.PROGRESS_DEADLINE_EXCEEDED)

_RPC_CANCELLED: Final = 1
_RPC_DEADLINE: Final = 4

_TIMEOUT_WORDS: Final = re.compile(r"configured timeout was reached", re.IGNORECASE)
_MEMORY_WORDS: Final = re.compile(r"memory limit|out of memory", re.IGNORECASE)

UNTOLD: Final = "Cloud Run says that the execution ended, but not how this task did"


@dataclass(frozen=True, slots=True)
class Tally:
    """What an execution says of its tasks in numbers."""

    tasks: int
    running: int
    succeeded: int
    failed: int
    cancelled: int
    done: bool
    """Whether the execution has its `completion_time`."""

    is_cancelled: bool
    """Whether it was cancelled, or is being so."""

    @property
    def counts(self) -> tuple[int, int, int]:
        """The numbers that change when a task ends."""
        return self.succeeded, self.failed, self.cancelled

    @property
    def ended(self) -> int:
        """How many tasks have ended."""
        return sum(self.counts)


def tally(execution: Any) -> Tally:
    """Read the numbers of an execution."""
    condition = completed(execution.conditions)
    return Tally(
        tasks=execution.task_count,
        running=execution.running_count,
        succeeded=execution.succeeded_count,
        failed=execution.failed_count,
        cancelled=execution.cancelled_count,
        done=execution.HasField("completion_time"),
        is_cancelled=execution.cancelled_count > 0
        or (condition is not None and condition.execution_reason in _CANCEL_REASONS),
    )


def completed(conditions: Iterable[Any]) -> Any | None:
    """Find the condition that tells how it ended."""
    return next((one for one in conditions if one.type_ == "Completed"), None)


def moment(message: Any, field: str) -> datetime | None:
    """Read a time of a message, in UTC; None if it is not set."""
    if not message.HasField(field):
        return None
    read: datetime = getattr(message, field).ToDatetime(tzinfo=UTC)
    return read


def sole_success(execution: Any, told: Tally) -> TaskReport | None:
    """Tell of the one task of an execution that succeeded, without asking for the task.

    Of one task the execution says all there is to say: it is its own.
    """
    if not (told.done and told.tasks == 1 and told.counts == (1, 0, 0)) or told.is_cancelled:
        return None
    return TaskReport(
        0,
        Outcome.SUCCEEDED,
        0,
        started_at=moment(execution, "start_time"),
        ended_at=moment(execution, "completion_time"),
    )


def task_report(task: Any, *, cancelled: bool) -> TaskReport | None:
    """Tell how a task ended; None if it has not.

    Args:
        task: the task, as the API gives it.
        cancelled: whether its execution was cancelled.
    """
    condition = completed(task.conditions)
    state = None if condition is None else condition.state
    if not task.HasField("completion_time") and state not in (_SUCCEEDED, _FAILED):
        return None
    outcome, code = _judge(task, condition, cancelled=cancelled)
    return TaskReport(
        index=task.index,
        outcome=outcome,
        exit_code=code,
        reason=None if outcome is Outcome.SUCCEEDED else _reason(task, condition, outcome),
        started_at=moment(task, "start_time"),
        ended_at=moment(task, "completion_time"),
    )


def _judge(task: Any, condition: Any, *, cancelled: bool) -> tuple[Outcome, int | None]:
    """Go through the table."""
    state = None if condition is None else condition.state
    if state == _SUCCEEDED:
        return Outcome.SUCCEEDED, 0
    result, status = task.last_attempt_result, task.last_attempt_result.status
    code = result.exit_code or (128 + result.term_signal if result.term_signal else None)
    common = 0 if condition is None else condition.reason
    said = _said(task, condition)
    table: Sequence[tuple[bool, Outcome]] = (
        (
            condition is not None and condition.execution_reason in _CANCEL_REASONS,
            Outcome.CANCELLED,
        ),
        (status.code == _RPC_CANCELLED, Outcome.CANCELLED),
        (common in _MISCONFIGURED, Outcome.REJECTED),
        (
            status.code == _RPC_DEADLINE or _TIMEOUT_WORDS.search(said) is not None,
            Outcome.TIMED_OUT,
        ),
        (_MEMORY_WORDS.search(said) is not None, Outcome.OUT_OF_MEMORY),
        (result.exit_code != 0, Outcome.FAILED),
        (cancelled, Outcome.CANCELLED),
        (result.term_signal != 0, Outcome.FAILED),
        (common == _LATE, Outcome.START_FAILED),
        (
            state is None and task.HasField("last_attempt_result") and status.code == 0,
            Outcome.SUCCEEDED,
        ),
    )
    outcome = next((outcome for fits, outcome in table if fits), Outcome.LOST)
    return outcome, 0 if outcome is Outcome.SUCCEEDED else code


def rest_of(
    execution: Any, told: Tally, known: Mapping[int, TaskReport], *, waited: bool
) -> list[TaskReport] | None:
    """Tell of the tasks of a completed execution that its list of tasks does not tell of.

    What the counts leave no doubt about is told at once where it is a cancel, as there is no exit
    code to wait for. Else the list may lag, and only when that was waited for, counts and the
    execution's condition decide.

    Returns None if it cannot be told yet.
    """
    missing = [index for index in range(told.tasks) if index not in known]
    if not missing:
        return [] if waited or told.ended == told.tasks else None
    by = dict.fromkeys((Outcome.SUCCEEDED, Outcome.CANCELLED, Outcome.FAILED), 0)
    for report in known.values():
        by[report.outcome if report.outcome in by else Outcome.FAILED] += 1
    left = len(missing)
    if told.ended == told.tasks and told.cancelled - by[Outcome.CANCELLED] == left:
        return _all(missing, Outcome.CANCELLED, "its execution was cancelled before it ended")
    if not waited:
        return None
    if told.ended == told.tasks and told.failed - by[Outcome.FAILED] == left:
        return _all(missing, *_of_condition(execution, told))
    if told.ended == told.tasks and told.succeeded - by[Outcome.SUCCEEDED] == left:
        return _all(missing, Outcome.SUCCEEDED, None)
    outcome, reason = _of_condition(execution, told)
    return _all(missing, Outcome.LOST if outcome is Outcome.FAILED else outcome, reason)


def _all(indexes: Iterable[int], outcome: Outcome, reason: str | None) -> list[TaskReport]:
    return [TaskReport(index, outcome, reason=reason) for index in indexes]


def _of_condition(execution: Any, told: Tally) -> tuple[Outcome, str]:
    """Say how a task ended of which only its execution tells."""
    condition = completed(execution.conditions)
    said = "" if condition is None else condition.message
    if condition is not None and condition.reason in _MISCONFIGURED:
        return Outcome.REJECTED, said or UNTOLD
    if told.is_cancelled:
        return Outcome.CANCELLED, said or UNTOLD
    if condition is not None and condition.reason == _LATE:
        return Outcome.START_FAILED, said or UNTOLD
    return Outcome.FAILED, said or UNTOLD


def _said(task: Any, condition: Any) -> str:
    words: str = task.last_attempt_result.status.message
    return words if condition is None else f"{words} {condition.message}"


def _reason(task: Any, condition: Any, outcome: Outcome) -> str:
    """Give one sentence for people, in the provider's words where it has any."""
    words = task.last_attempt_result.status.message or (
        "" if condition is None else condition.message
    )
    if not words and condition is not None and condition.reason:
        try:
            words = _Condition.CommonReason(condition.reason).name
        except ValueError:  # of a newer API
            words = f"reason {condition.reason}"
    if not words:
        result = task.last_attempt_result
        if result.term_signal:
            words = f"the container was ended by signal {result.term_signal}"
        elif result.exit_code:
            words = f"the container exited with code {result.exit_code}"
        else:
            words = UNTOLD if outcome is Outcome.LOST else f"Cloud Run: {outcome.replace('_', ' ')}"
    if task.retried:
        words += f" (after {task.retried} retries by Cloud Run itself)"
    return words
