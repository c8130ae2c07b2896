"""What an ending means: of an attempt that we had asked to end, and of a batch. Pure.

A reason of ours that was written before the cancel call beats the provider's word: a container that
is stopped for its time may well exit with 0.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from math import ceil
from typing import Final, NamedTuple

from dispatcher.backends.base import TaskReport
from dispatcher.counting import counted
from dispatcher.states import BatchState, CancelKind, Outcome

__all__ = ["ASKED", "CLOCKS_APART", "Policy", "Standing", "beyond", "judge", "verdict"]

ASKED: Final = {
    CancelKind.OPERATOR: (Outcome.CANCELLED, "cancelled by an operator"),
    CancelKind.BATCH_DEADLINE: (Outcome.CANCELLED, "the batch's deadline passed"),
    CancelKind.TIMEOUT: (Outcome.TIMED_OUT, "the execution ran past its deadline"),
    CancelKind.START_TIMEOUT: (Outcome.START_FAILED, "no task started within start_timeout"),
    CancelKind.INVALID: (Outcome.CANCELLED, "the job cannot be run here"),
    CancelKind.SUCCESS_POLICY: (Outcome.CANCELLED, "the batch can no longer succeed"),
    CancelKind.STRAY: (Outcome.CANCELLED, "no open attempt belongs to it"),
}


CLOCKS_APART: Final = timedelta(seconds=5)
"""How far a provider's clock may be behind the database's, as our call is timed by the one and the
end of a task by the other. Servers that keep time by NTP are apart by much less; what is stopped by
our call and exits with 0 must not look like a success that came first."""


class Policy(NamedTuple):
    """When a batch has succeeded; at most one bound is given."""

    max_failed_chunks: int | None
    max_failed_items: int | None
    min_ratio: float | None


class Standing(NamedTuple):
    """What a batch has come to: counts of its final chunks, and all of its items."""

    id: str
    policy: Policy
    cancel_kind: str | None
    cancel_reason: str | None
    succeeded: int
    failed: int
    cancelled: int
    items: int
    items_failed: int
    """Items of failed and cancelled chunks that have not succeeded."""

    example: str | None


def judge(
    report: TaskReport, cancel_kind: str | None, cancel_sent_at: datetime | None
) -> tuple[Outcome, str | None]:
    """Say how a task ended, given that we may have asked for its end.

    What ended before our call was sent keeps the provider's word, where the times prove it whatever
    `CLOCKS_APART` the clocks are.
    """
    if cancel_kind is None or cancel_sent_at is None:
        return report.outcome, report.reason
    was_before = report.ended_at is not None and report.ended_at < cancel_sent_at - CLOCKS_APART
    # That it was cancelled is our doing, whatever the provider's clock says.
    if was_before and report.outcome is not Outcome.CANCELLED:
        return report.outcome, report.reason
    outcome, why = ASKED[CancelKind(cancel_kind)]
    if outcome is report.outcome:
        return outcome, report.reason or why
    return outcome, f"{why} (the provider says: {report.outcome.replace('_', ' ')})"


def verdict(row: Standing) -> tuple[BatchState, str | None]:
    """Say how a batch ended whose chunks are all final, and why.

    A cancel that came too late to stop anything does not make a finished batch cancelled.
    """
    bad = row.failed + row.cancelled
    if row.cancel_kind == CancelKind.OPERATOR and row.cancelled:
        return BatchState.CANCELLED, row.cancel_reason
    if row.cancel_kind not in (None, CancelKind.OPERATOR) and bad:
        return BatchState.FAILED, row.cancel_reason
    broken = beyond(row)
    if broken is not None:
        return BatchState.FAILED, broken
    return BatchState.SUCCEEDED, f"{_bad_of(row)}, allowed" if bad else None


def beyond(row: Standing) -> str | None:
    """Say why a batch can succeed no more, whatever becomes of what is open; None if it can."""
    broken = _broken(row)
    if broken is None or not row.example:
        return broken
    return f"{broken}: {row.example}"


def _broken(row: Standing) -> str | None:
    policy = row.policy
    if policy.min_ratio is not None:
        # A count, so that 0.95 of 100 is 95 whatever floating point makes of it.
        needed = ceil(policy.min_ratio * row.items - 1e-9)
        if row.items - row.items_failed < needed:
            return f"{_items_of(row)}, and {needed:,} must succeed (min_ratio {policy.min_ratio:g})"
        return None
    if policy.max_failed_items is not None:
        if row.items_failed > policy.max_failed_items:
            return f"{_items_of(row)}, {policy.max_failed_items} allowed"
        return None
    most = policy.max_failed_chunks or 0
    bad = row.failed + row.cancelled
    if bad > most:
        return f"{_chunks_of(row)}, {most} allowed" if most else _chunks_of(row)
    return None


def _bad_of(row: Standing) -> str:
    by_items = row.policy.min_ratio is not None or row.policy.max_failed_items is not None
    return _items_of(row) if by_items else _chunks_of(row)


def _items_of(row: Standing) -> str:
    return f"{row.items_failed:,} of {counted(row.items, 'item')} failed"


def _chunks_of(row: Standing) -> str:
    bad = row.failed + row.cancelled
    return f"{bad:,} of {counted(row.succeeded + bad, 'chunk')} failed"
