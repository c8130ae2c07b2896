"""The retry policy: a pure function of an outcome, what came before, and chance."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.job import RetryPolicy
from dispatcher.retrying import APPLICATION, CAPACITY, INFRASTRUCTURE, backoff, decide
from dispatcher.states import Outcome


def policy(**fields: Any) -> RetryPolicy:
    return RetryPolicy.model_validate({"initial": "10s", "max": "60s", "jitter": False, **fields})


def test_every_outcome_but_success_has_one_class_or_is_never_retried() -> None:
    classes = [APPLICATION, INFRASTRUCTURE, CAPACITY]
    final = {Outcome.CANCELLED, Outcome.REJECTED, Outcome.SUCCEEDED}
    assert set().union(*classes, final) == set(Outcome)
    assert sum(map(len, classes)) + len(final) == len(Outcome)


@pytest.mark.parametrize(
    ("failures", "seconds"), [(1, 10), (2, 20), (3, 40), (4, 60), (5, 60), (10_000, 60)]
)
def test_waits_grow_up_to_the_ceiling(failures: int, seconds: float) -> None:
    assert backoff(policy(), failures, 1.0) == timedelta(seconds=seconds)


@given(st.integers(1, 10**6), st.floats(0, 1), st.floats(1, 100))
def test_jitter_keeps_a_wait_between_nothing_and_the_full_one(
    failures: int, roll: float, factor: float
) -> None:
    full = backoff(policy(factor=factor), failures, roll)
    spread = backoff(policy(factor=factor, jitter=True), failures, roll)
    assert timedelta(0) <= spread <= full <= timedelta(seconds=60)
    assert abs(spread - full * roll) <= timedelta(microseconds=1)


@pytest.mark.parametrize("outcome", sorted(APPLICATION))
def test_the_applications_failures_share_one_budget(outcome: Outcome) -> None:
    tally = {"failed": 1, "preempted": 7, "no_capacity": 9, outcome: 1}
    used = sum(tally.get(name, 0) for name in APPLICATION)
    assert decide(policy(attempts=used + 1), outcome, 1, tally, 0.5).retry
    assert not decide(policy(attempts=used), outcome, 1, tally, 0.5).retry


@pytest.mark.parametrize("outcome", sorted(INFRASTRUCTURE))
def test_the_infrastructures_failures_have_their_own(outcome: Outcome) -> None:
    tally = {"failed": 50, outcome: 2}
    assert decide(policy(infrastructure_attempts=3), outcome, None, tally, 0.5).retry
    assert not decide(policy(infrastructure_attempts=2), outcome, None, tally, 0.5).retry


def test_no_capacity_is_tried_again_for_ever() -> None:
    decision = decide(
        policy(attempts=1, infrastructure_attempts=1),
        Outcome.NO_CAPACITY,
        None,
        {"no_capacity": 1000},
        0.5,
    )
    assert decision.retry
    assert decision.delay == timedelta(seconds=60)
    assert decision.reason == "no capacity; retry in 1m, costs no attempt"


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (Outcome.CANCELLED, "cancelled; not retried"),
        (Outcome.REJECTED, "rejected; the provider would refuse it again"),
    ],
)
def test_what_is_never_retried(outcome: Outcome, reason: str) -> None:
    decision = decide(policy(attempts=100), outcome, None, {outcome: 1}, 0.5)
    assert (decision.retry, decision.delay, decision.reason) == (False, timedelta(0), reason)


def test_an_exit_code_can_be_final() -> None:
    codes = policy(exit_codes={65: "fail", 75: "retry"})
    final = decide(codes, Outcome.FAILED, 65, {"failed": 1}, 0.5)
    assert not final.retry
    assert final.reason == "failed with exit code 65; the job says not to retry exit code 65"
    assert decide(codes, Outcome.FAILED, 75, {"failed": 1}, 0.5).retry
    assert decide(codes, Outcome.FAILED, 1, {"failed": 1}, 0.5).retry
    assert decide(codes, Outcome.FAILED, None, {"failed": 1}, 0.5).retry
    assert decide(codes, Outcome.TIMED_OUT, 65, {"timed_out": 1}, 0.5).retry, "it did not say it"


@pytest.mark.parametrize(
    ("outcome", "code", "tally", "reason"),
    [
        (
            Outcome.FAILED,
            3,
            {"failed": 2},
            "failed with exit code 3; retry in 20s, 2 of 3 attempts used",
        ),
        (Outcome.FAILED, 3, {"failed": 3}, "failed with exit code 3; 3 of 3 attempts used"),
        (
            Outcome.OUT_OF_MEMORY,
            None,
            {"out_of_memory": 1},
            "out of memory; retry in 10s, 1 of 3 attempts used",
        ),
        (
            Outcome.PREEMPTED,
            None,
            {"preempted": 4, "lost": 1},
            "preempted; 5 of 5 infrastructure attempts used",
        ),
    ],
)
def test_the_reason_says_what_is_used_and_what_comes_next(
    outcome: Outcome, code: int | None, tally: dict[str, int], reason: str
) -> None:
    assert decide(policy(), outcome, code, tally, 0.5).reason == reason


@pytest.mark.parametrize(
    ("roll", "said"), [(0.1908258, "retry in 3.8s, "), (0.00001, "retry in 0s, ")]
)
def test_a_delay_is_told_to_a_tenth_of_a_second(roll: float, said: str) -> None:
    spread = policy(attempts=9, initial="20s", jitter=True)
    assert said in decide(spread, Outcome.FAILED, 1, {"failed": 1}, roll).reason
    long = policy(attempts=9, initial="10m", max="10m", jitter=True)
    assert "retry in 1m54s, " in decide(long, Outcome.FAILED, 1, {"failed": 1}, 0.1908258).reason
