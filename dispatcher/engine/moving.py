"""Where the chunk of a closed attempt goes. Pure: rows are read and written by `settler.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dispatcher.job import RetryPolicy
from dispatcher.requests import Plan
from dispatcher.retrying import decide
from dispatcher.states import CancelKind, ChunkState, Outcome
from dispatcher.store.rows import Closing, MovedChunk

__all__ = ["Splits", "move"]

FREE_SPLITS: Final = 20
"""Chunks of a batch that are split whatever comes of it; further ones need successes."""


@dataclass(slots=True)
class Splits:
    """Whether more chunks of a batch may be split: while nothing succeeds, parts tell nothing.

    A broken image would else be tried once for each item, and twice for each part.
    """

    split: int
    succeeded: int

    def allowed(self) -> bool:
        """Say if one more may be split."""
        return self.split < FREE_SPLITS or self.succeeded >= self.split


def move(
    closing: Closing,
    plan: Plan | None,
    *,
    cancel: str | None,
    tally: Mapping[str, int],
    roll: float,
    goes_on: bool,
    splits: Splits,
) -> MovedChunk:
    """Say where the chunk of an attempt goes.

    Args:
        closing: how the attempt ended.
        plan: of its batch; None if the batch's job can no longer be read.
        cancel: why its batch was cancelled, a `CancelKind`; None if it was not.
        tally: how often the chunk's earlier attempts ended in each outcome, since the last
            operator's retry.
        roll: a number from 0 to 1 that spreads retries.
        goes_on: whether other tasks of its execution still run.
        splits: of its batch; counts this one if it is split.
    """
    attempt, outcome = closing.attempt, closing.outcome
    items_ok = attempt.items_ok + sum(result.ok for result in closing.results)
    left = attempt.size - items_ok

    def to(state: ChunkState, reason: str | None) -> MovedChunk:
        return MovedChunk(closing, state, reason, 0.0, None, items_ok=items_ok)

    if outcome is Outcome.SUCCEEDED:
        return to(ChunkState.SUCCEEDED, None)._replace(items_ok=attempt.size)
    if left == 0:
        return to(
            ChunkState.SUCCEEDED,
            f"each of its items has succeeded; the last attempt: {closing.reason}",
        )
    if cancel is not None or plan is None:
        operator = cancel == CancelKind.OPERATOR
        return to(ChunkState.CANCELLED if operator else ChunkState.FAILED, closing.reason)
    policy = _policy(plan.job.retry, part=attempt.depth > 0 and left > 1)
    counted = Counter(tally)
    counted[outcome] += 1
    decision = decide(policy, outcome, closing.exit_code, counted, roll)
    reason = f"{decision.reason}: {closing.reason}" if closing.reason else decision.reason
    if decision.retry:
        waits = plan.max_tasks > 1 and goes_on
        return to(ChunkState.PENDING, reason)._replace(
            delay=decision.delay.total_seconds(),
            hold=plan.job.retry.pack_wait.total_seconds() if waits else None,
        )
    if policy.on_failure == "split" and left > 1 and _hides_the_fault(closing) and splits.allowed():
        splits.split += 1
        # Who reports item by item does them in their order: the first that was not reported is the
        # one that was at work. If that was wrong, halves come next.
        alone = closing.receipt is not None and attempt.depth % 2 == 0
        return to(ChunkState.SPLIT, reason)._replace(first_alone=alone)
    return to(ChunkState.FAILED, reason)


def _policy(policy: RetryPolicy, *, part: bool) -> RetryPolicy:
    """Give a part of a split chunk one try: its parent had them all, and it only seeks the fault.

    An item that stands alone has them all again.
    """
    return policy.model_copy(update={"attempts": 1}) if part else policy


def _hides_the_fault(closing: Closing) -> bool:
    """Say if smaller chunks would tell more: the items that failed are not known by name."""
    if closing.outcome in (Outcome.CANCELLED, Outcome.REJECTED):
        return False
    return closing.receipt != "complete"
