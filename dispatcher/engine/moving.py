"""Where the chunk of a closed attempt goes. Pure: rows are read and written by `settler.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dispatcher.job import RetryPolicy
from dispatcher.requests import Plan
from dispatcher.retrying import decide
from dispatcher.states import CancelKind, ChunkState, Cut, Outcome
from dispatcher.store.rows import Closing, MovedChunk

__all__ = ["Splits", "move"]

FREE_SPLITS: Final = 20
"""Chunks of a batch that are split before any has succeeded."""

SPLITS_PER_SUCCESS: Final = 4
"""Chunks of a batch that are split for each that succeeds. Where few items are bad each split gives
one part that succeeds, so any number above one lets the search go on to its end."""

SCARCE: Final = FREE_SPLITS // 2
"""With fewer splits to spend, the first item goes alone: a single item that succeeds shows soonest
that the image is not broken, however many items are bad."""


@dataclass(slots=True)
class Splits:
    """How many more chunks of a batch may be split now: what succeeds pays for it.

    Of a broken image every part would fail, down to each item alone. What may not be split yet
    waits: for successes, or until nothing else of its batch is open, when it fails as it is.
    """

    split: int
    succeeded: int

    @property
    def room(self) -> int:
        """How many more."""
        return max(0, FREE_SPLITS + SPLITS_PER_SUCCESS * self.succeeded - self.split)

    def take(self, cut: Cut) -> Cut | None:
        """Take one, if there is one: how to cut, which is `cut` where splits are not scarce."""
        if not self.room:
            return None
        scarce = self.room < SCARCE
        self.split += 1
        return Cut.FIRST if scarce else cut


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
        return to(_cancelled(cancel, outcome), closing.reason)
    policy = _policy(plan.job.retry, outcome, part=attempt.depth > 0 and left > 1)
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
    if policy.on_failure != "split" or left == 1 or not _hides_the_fault(closing):
        return to(ChunkState.FAILED, reason)
    # Who reports item by item does them in their order: the first that was not reported is the
    # one that was at work. If that was wrong, halves come next.
    alone = closing.receipt is not None and attempt.depth % 2 == 0
    wanted = Cut.FIRST if alone else Cut.HALVES
    cut = splits.take(wanted)
    state = ChunkState.PENDING if cut is None else ChunkState.SPLIT
    return to(state, reason)._replace(cut=cut or wanted)


def _cancelled(cancel: str | None, outcome: Outcome) -> ChunkState:
    """Say how a chunk ends that is not tried again, whatever its policy says."""
    if cancel is None:
        return ChunkState.FAILED  # its job can no longer be read
    kind = CancelKind(cancel)
    if kind is CancelKind.SUCCESS_POLICY and outcome is not Outcome.CANCELLED:
        return ChunkState.FAILED  # one of those that spoilt the batch
    return kind.ends_chunks_as


def _policy(policy: RetryPolicy, outcome: Outcome, *, part: bool) -> RetryPolicy:
    """Give a part of a split chunk one try: its parent had them all, and it only seeks the fault.

    An item that stands alone has them all again. What the infrastructure did to a part says nothing
    of its items; that a receipt is missing does, though it counts as its fault elsewhere.
    """
    if not part:
        return policy
    changes = {"attempts": 1}
    if outcome is Outcome.SUSPECT:
        changes["infrastructure_attempts"] = 1
    return policy.model_copy(update=changes)


def _hides_the_fault(closing: Closing) -> bool:
    """Say if smaller chunks would tell more: the items that failed are not known by name."""
    if closing.outcome in (Outcome.CANCELLED, Outcome.REJECTED, Outcome.START_FAILED):
        return False  # no item of it was looked at
    return closing.receipt != "complete"
