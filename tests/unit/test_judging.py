"""What an ending means, given that we may have asked for it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dispatcher.backends.base import TaskReport
from dispatcher.judging import ASKED, CLOCKS_APART, Policy, Standing, beyond, judge, verdict
from dispatcher.states import BatchState, CancelKind, Outcome

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def report(outcome: Outcome = Outcome.SUCCEEDED, **fields: Any) -> TaskReport:
    return TaskReport(0, outcome, **fields)


def test_every_kind_of_cancel_has_its_outcome() -> None:
    assert set(ASKED) == set(CancelKind)


@pytest.mark.parametrize("outcome", Outcome)
def test_the_providers_word_stands_where_we_asked_for_nothing(outcome: Outcome) -> None:
    assert judge(report(outcome, reason="so"), None, None) == (outcome, "so")


@pytest.mark.parametrize("kind", CancelKind)
def test_a_cancel_that_was_not_sent_has_ended_nothing(kind: CancelKind) -> None:
    assert judge(report(Outcome.FAILED, reason="so"), kind, None) == (Outcome.FAILED, "so")


@pytest.mark.parametrize("kind", CancelKind)
@pytest.mark.parametrize("ended", [NOON - CLOCKS_APART, NOON, NOON + SECOND, None])
def test_our_reason_beats_the_providers_word(kind: CancelKind, ended: datetime | None) -> None:
    """A container that is stopped for its time may well exit with 0."""
    outcome, why = judge(report(ended_at=ended), kind, NOON)
    assert outcome is ASKED[kind][0]
    assert why == f"{ASKED[kind][1]} (the provider says: succeeded)"


@pytest.mark.parametrize("kind", CancelKind)
@pytest.mark.parametrize("outcome", [Outcome.SUCCEEDED, Outcome.FAILED])
def test_what_provably_ended_before_our_call_keeps_the_providers_word(
    kind: CancelKind, outcome: Outcome
) -> None:
    early = report(outcome, reason="so", ended_at=NOON - CLOCKS_APART - SECOND)
    assert judge(early, kind, NOON) == (outcome, "so")


def test_where_both_agree_the_providers_reason_is_kept() -> None:
    told = report(Outcome.CANCELLED, reason="stopped")
    assert judge(told, CancelKind.OPERATOR, NOON) == (Outcome.CANCELLED, "stopped")
    silent = report(Outcome.CANCELLED)
    assert judge(silent, CancelKind.OPERATOR, NOON) == (
        Outcome.CANCELLED,
        "cancelled by an operator",
    )


@pytest.mark.parametrize(
    ("ends", "allowed", "kind", "state", "reason"),
    [
        ((5, 0, 0), 0, None, BatchState.SUCCEEDED, None),
        ((4, 1, 0), 0, None, BatchState.FAILED, "1 of 5 chunks failed: disk full"),
        ((4, 1, 0), 1, None, BatchState.SUCCEEDED, "1 of 5 chunks failed, allowed"),
        ((3, 2, 0), 1, None, BatchState.FAILED, "2 of 5 chunks failed, 1 allowed: disk full"),
        ((3, 0, 2), 0, CancelKind.OPERATOR, BatchState.CANCELLED, "not wanted"),
        ((3, 1, 1), 9, CancelKind.OPERATOR, BatchState.CANCELLED, "not wanted"),
        # It came too late to stop anything.
        ((5, 0, 0), 0, CancelKind.OPERATOR, BatchState.SUCCEEDED, None),
        ((4, 1, 0), 0, CancelKind.OPERATOR, BatchState.FAILED, "1 of 5 chunks failed: disk full"),
        ((3, 2, 0), 9, CancelKind.BATCH_DEADLINE, BatchState.FAILED, "not wanted"),
        ((5, 0, 0), 0, CancelKind.BATCH_DEADLINE, BatchState.SUCCEEDED, None),
        ((0, 5, 0), 9, CancelKind.INVALID, BatchState.FAILED, "not wanted"),
    ],
)
def test_a_verdict_counts_the_chunks_and_names_one(
    ends: tuple[int, int, int],
    allowed: int,
    kind: CancelKind | None,
    state: BatchState,
    reason: str | None,
) -> None:
    succeeded, failed, cancelled = ends
    row = standing(
        Policy(allowed, None, None),
        succeeded=succeeded,
        failed=failed,
        cancelled=cancelled,
        cancel_kind=kind,
        cancel_reason="not wanted" if kind else None,
        example="disk full" if failed else None,
    )
    assert verdict(row) == (state, reason)


def standing(policy: Policy, **fields: Any) -> Standing:
    values: dict[str, Any] = {
        "cancel_kind": None,
        "cancel_reason": None,
        "succeeded": 0,
        "failed": 0,
        "cancelled": 0,
        "items": 0,
        "items_failed": 0,
        "example": None,
    }
    return Standing(id="b", policy=policy, **{**values, **fields})


@pytest.mark.parametrize(
    ("policy", "items_failed", "why"),
    [
        (Policy(None, 3, None), 3, None),
        (Policy(None, 3, None), 4, "4 of 100 items failed, 3 allowed: disk full"),
        (Policy(None, None, 0.95), 5, None),
        (
            Policy(None, None, 0.95),
            6,
            "6 of 100 items failed, and 95 must succeed (min_ratio 0.95): disk full",
        ),
        (
            Policy(None, None, 1.0),
            1,
            "1 of 100 items failed, and 100 must succeed (min_ratio 1): disk full",
        ),
        (Policy(None, None, 0.0), 100, None),
        (Policy(None, None, None), 1, "1 of 5 chunks failed: disk full"),
    ],
)
def test_a_policy_may_count_items(policy: Policy, items_failed: int, why: str | None) -> None:
    row = standing(
        policy, succeeded=4, failed=1, items=100, items_failed=items_failed, example="disk full"
    )
    assert beyond(row) == why
    state = BatchState.FAILED if why else BatchState.SUCCEEDED
    assert verdict(row)[0] is state


def test_what_can_no_longer_succeed_fails_for_that_reason() -> None:
    row = standing(
        Policy(None, 0, None),
        succeeded=1,
        failed=4,
        items=5,
        items_failed=4,
        cancel_kind=CancelKind.SUCCESS_POLICY,
        cancel_reason="1 of 5 items failed, 0 allowed",
    )
    assert verdict(row) == (BatchState.FAILED, "1 of 5 items failed, 0 allowed")


def test_that_it_was_cancelled_is_our_doing_whatever_the_providers_clock_says() -> None:
    early = report(Outcome.CANCELLED, reason="stopped", ended_at=NOON - SECOND)
    assert judge(early, CancelKind.TIMEOUT, NOON)[0] is Outcome.TIMED_OUT
