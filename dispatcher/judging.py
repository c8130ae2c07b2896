"""What an ending means: of an attempt that we had asked to end, and of a batch. Pure.

A reason of ours that was written before the cancel call beats the provider's word: a container that
is stopped for its time may well exit with 0.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from dispatcher.backends.base import TaskReport
from dispatcher.states import BatchState, CancelKind, Outcome

__all__ = ["judge", "verdict"]

ASKED: Final = {
    CancelKind.OPERATOR: (Outcome.CANCELLED, "cancelled by an operator"),
    CancelKind.BATCH_DEADLINE: (Outcome.CANCELLED, "the batch's deadline passed"),
    CancelKind.TIMEOUT: (Outcome.TIMED_OUT, "the execution ran past its deadline"),
    CancelKind.START_TIMEOUT: (Outcome.START_FAILED, "no task started within start_timeout"),
    CancelKind.INVALID: (Outcome.CANCELLED, "the job cannot be run here"),
    CancelKind.STRAY: (Outcome.CANCELLED, "no open attempt belongs to it"),
}


def judge(
    report: TaskReport, cancel_kind: str | None, cancel_sent_at: datetime | None
) -> tuple[Outcome, str | None]:
    """Say how a task ended, given that we may have asked for its end.

    What ended before our call was sent keeps the provider's word; so does a success whose time
    proves that it came first.
    """
    if cancel_kind is None or cancel_sent_at is None:
        return report.outcome, report.reason
    if report.ended_at is not None and report.ended_at < cancel_sent_at:
        return report.outcome, report.reason
    outcome, why = ASKED[CancelKind(cancel_kind)]
    if outcome is report.outcome:
        return outcome, report.reason or why
    return outcome, f"{why} (the provider says: {report.outcome.replace('_', ' ')})"


def verdict(
    *,
    succeeded: int,
    failed: int,
    cancelled: int,
    max_failed_chunks: int,
    cancel_kind: str | None,
    cancel_reason: str | None,
    example: str | None,
) -> tuple[BatchState, str | None]:
    """Say how a batch ended whose chunks are all final, and why.

    A cancel that came too late to stop anything does not make a finished batch cancelled.
    """
    total = succeeded + failed + cancelled
    if cancel_kind == CancelKind.OPERATOR and cancelled:
        return BatchState.CANCELLED, cancel_reason
    if cancel_kind in (CancelKind.BATCH_DEADLINE, CancelKind.INVALID) and failed + cancelled:
        return BatchState.FAILED, cancel_reason
    bad = failed + cancelled
    if bad > max_failed_chunks:
        allowed = f", {max_failed_chunks} allowed" if max_failed_chunks else ""
        first = f": {example}" if example else ""
        return BatchState.FAILED, f"{bad} of {total} chunks failed{allowed}{first}"
    return BatchState.SUCCEEDED, f"{bad} of {total} chunks failed, allowed" if bad else None
