"""Should a chunk be tried again? And when? Pure: no I/O, chance is an argument.

Budgets are apart by class. What the application did wrong counts against `attempts`; what the
infrastructure did counts against `infrastructure_attempts`; a lack of capacity costs only time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from dispatcher.durations import format_duration
from dispatcher.job import RetryPolicy
from dispatcher.states import Outcome

__all__ = ["APPLICATION", "CAPACITY", "INFRASTRUCTURE", "Decision", "backoff", "decide"]

APPLICATION: Final = frozenset({Outcome.FAILED, Outcome.TIMED_OUT, Outcome.OUT_OF_MEMORY})
INFRASTRUCTURE: Final = frozenset(
    {Outcome.PREEMPTED, Outcome.LOST, Outcome.START_FAILED, Outcome.SUSPECT}
)
CAPACITY: Final = frozenset({Outcome.NO_CAPACITY})


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a chunk after an attempt that did not succeed."""

    retry: bool
    delay: timedelta
    reason: str
    """For people, and for `explain`: which budget, how much of it is used, when the next try is."""


def backoff(policy: RetryPolicy, failures: int, roll: float) -> timedelta:
    """Say how long to wait after this many failures of a class.

    Exponential, capped, with full jitter: uniform between nothing and the capped delay, `roll`
    being a number from 0 to 1. So a thousand chunks that failed together do not return together.
    """
    ceiling = policy.max.total_seconds()
    try:
        seconds = policy.initial.total_seconds() * policy.factor ** (failures - 1)
    except OverflowError:
        seconds = ceiling
    seconds = min(seconds, ceiling)
    return timedelta(seconds=seconds * roll if policy.jitter else seconds)


def decide(
    policy: RetryPolicy,
    outcome: Outcome,
    exit_code: int | None,
    tally: Mapping[str, int],
    roll: float,
) -> Decision:
    """Decide on the next try of a chunk.

    Args:
        policy: The job's.
        outcome: How the attempt ended; not succeeded.
        exit_code: Of the command, if it ran to an end.
        tally: How often the chunk's attempts ended in each outcome since the last operator's
            retry, this one included.
        roll: A number from 0 to 1 that spreads retries.
    """
    ended = outcome.replace("_", " ") + (f" with exit code {exit_code}" if exit_code else "")

    def final(why: str) -> Decision:
        return Decision(retry=False, delay=timedelta(0), reason=f"{ended}; {why}")

    if outcome is Outcome.CANCELLED:
        return final("not retried")
    if outcome is Outcome.REJECTED:
        return final("the provider would refuse it again")
    if outcome in CAPACITY:
        used, budget, word = _used(tally, CAPACITY), None, "capacity"
    elif outcome in INFRASTRUCTURE:
        used, budget = _used(tally, INFRASTRUCTURE), policy.infrastructure_attempts
        word = "infrastructure attempts"
    else:
        if outcome is Outcome.FAILED and policy.exit_codes.get(exit_code or 0) == "fail":
            return final(f"the job says not to retry exit code {exit_code}")
        used, budget, word = _used(tally, APPLICATION), policy.attempts, "attempts"
    if budget is not None and used >= budget:
        return final(f"{used} of {budget} {word} used")
    delay = backoff(policy, used, roll)
    left = "costs no attempt" if budget is None else f"{used} of {budget} {word} used"
    return Decision(retry=True, delay=delay, reason=f"{ended}; retry in {_told(delay)}, {left}")


def _told(delay: timedelta) -> str:
    """Write a delay for people: to a tenth of a second below a minute, else to the second."""
    seconds = delay.total_seconds()
    return format_duration(timedelta(seconds=round(seconds, 1 if seconds < 60 else 0)))  # noqa: PLR2004 - a minute


def _used(tally: Mapping[str, int], outcomes: frozenset[Outcome]) -> int:
    return sum(tally.get(outcome, 0) for outcome in outcomes)
