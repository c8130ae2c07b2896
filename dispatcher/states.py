"""The states of a batch, a chunk and an execution, the outcomes of an attempt, and who moves what.

This module is the glossary of the lifecycle and holds no behaviour: `store.py` moves rows along the
edges below, `engine.py` says when, the database's CHECK constraints are made from these names, and
the diagram in `docs/lifecycle.md` is generated from `EDGES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Generic, TypeVar

__all__ = [
    "BATCH_EDGES",
    "CHUNK_EDGES",
    "EXECUTION_EDGES",
    "FINAL_BATCH",
    "FINAL_CHUNK",
    "LIVE_EXECUTION",
    "BatchState",
    "CancelKind",
    "ChunkState",
    "Cut",
    "Edge",
    "ExecutionState",
    "Outcome",
]


class BatchState(StrEnum):
    """Where a batch stands. Only an operator's `retry` leaves a final state."""

    PLANNING = "planning"
    """Written by `enqueue`; its chunks do not exist yet. The planner moves it on. After a crash the
    planner's transaction is gone with all it wrote, and the next sweep plans it again."""

    RUNNING = "running"
    """Its chunks exist and at least one is not final. `settle` moves it on with the last chunk; the
    sweep does so if a crash came between."""

    SUCCEEDED = "succeeded"
    """Every chunk is final and the job's success policy is met. Final."""

    FAILED = "failed"
    """It could not be planned, or every chunk is final and the success policy is not met. Final."""

    CANCELLED = "cancelled"
    """A cancel was asked for and nothing of it runs any more: said only when it is true. Final."""


class ChunkState(StrEnum):
    """Where a chunk stands. One attempt at most is open, exactly in `launching` and `running`."""

    PENDING = "pending"
    """Waiting for `due_at` and for room within the limits. `launch` moves it on. One that waits to
    be split is not tried again as it is: a later settle of its batch splits it, or ends it."""

    LAUNCHING = "launching"
    """Its attempt and the execution's intent are committed; the provider's answer is not recorded.
    Recording the handle moves it on. After a crash the sweep looks the key up at the provider."""

    RUNNING = "running"
    """The provider has accepted the execution and we hold its handle. `settle` moves it on. A dead
    worker changes nothing: the next leaseholder of the target goes on polling."""

    SUCCEEDED = "succeeded"
    """Its last attempt succeeded. Final."""

    FAILED = "failed"
    """Its last attempt ended badly and the retry policy allows no other. Final but for `retry`."""

    CANCELLED = "cancelled"
    """Ended by a cancel, with nothing of it running. Final but for `retry`."""

    SPLIT = "split"
    """It used up its attempts and its items went on in smaller chunks, which name it as their
    parent. Final; it counts no more, as each of its items is in one of them."""


class Cut(StrEnum):
    """How a chunk is split whose failure does not say which of its items are bad."""

    HALVES = "halves"
    """In two of nearly equal size."""

    FIRST = "first"
    """Its first open item alone, and the rest."""


class ExecutionState(StrEnum):
    """What we know of one remote run."""

    INTENDED = "intended"
    """The intent is committed and the call is being made, or waits for `next_call_at` after a
    throttled one. The launcher moves it on until `call_by`; then the sweep makes it unknown."""

    UNKNOWN = "unknown"
    """The call may or may not have started something: timeout, 5xx, a dropped connection, our own
    death. The sweep looks the key up: found → launched; not found after the grace → called again
    with the same key, or ended if a cancel was asked for."""

    LAUNCHED = "launched"
    """We hold its handle. Poll and settle move it on when its last task has ended."""

    ENDED = "ended"
    """Nothing of it runs any more, or it was refused, or it is lost. Final, but for a stray that
    the provider shows again."""


class Outcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    """The provider says so, and so does the exit code."""

    FAILED = "failed"
    """The command ran and ended with another exit code than 0."""

    TIMED_OUT = "timed_out"
    """It ran longer than the job's `timeout`."""

    OUT_OF_MEMORY = "out_of_memory"
    """The provider says that it was killed for its memory. Never concluded from exit code 137."""

    PREEMPTED = "preempted"
    """The provider took the machine away."""

    NO_CAPACITY = "no_capacity"
    """The provider had no room. Costs no attempt."""

    START_FAILED = "start_failed"
    """It was accepted but its command never ran: image pull, node, start deadline."""

    REJECTED = "rejected"
    """The provider refused the request and would refuse it again. Never retried."""

    LOST = "lost"
    """The provider no longer knows it, or its supervisor vanished, and no result tells how it
    ended."""

    SUSPECT = "suspect"
    """It ended with exit code 0, but its receipt is missing, not complete or not to be used."""

    CANCELLED = "cancelled"
    """Stopped by a cancel: ours, or one made in the provider's console."""


class CancelKind(StrEnum):
    """What asked for the end of an execution; written before the call, it beats the provider."""

    OPERATOR = "operator"
    """Somebody cancelled the batch."""

    BATCH_DEADLINE = "batch_deadline"
    """The batch's `deadline` passed."""

    TIMEOUT = "timeout"
    """The execution ran past its deadline, which the provider should have enforced."""

    START_TIMEOUT = "start_timeout"
    """No task of it started within the job's `start_timeout`."""

    INVALID = "invalid"
    """The job that the batch keeps cannot be run with this code and configuration."""

    SUCCESS_POLICY = "success_policy"
    """So much has failed that the job's success policy can no longer be met."""

    STRAY = "stray"
    """It runs and no open attempt belongs to it."""

    @property
    def ends_chunks_as(self) -> ChunkState:
        """What becomes of a batch's chunks that it ends.

        Nothing is wrong with those of a batch that somebody cancelled, or that others have spoilt.
        """
        unspoilt = self in (CancelKind.OPERATOR, CancelKind.SUCCESS_POLICY)
        return ChunkState.CANCELLED if unspoilt else ChunkState.FAILED


FINAL_BATCH: Final = frozenset({BatchState.SUCCEEDED, BatchState.FAILED, BatchState.CANCELLED})
FINAL_CHUNK: Final = frozenset(
    {ChunkState.SUCCEEDED, ChunkState.FAILED, ChunkState.CANCELLED, ChunkState.SPLIT}
)
LIVE_EXECUTION: Final = frozenset(
    {ExecutionState.INTENDED, ExecutionState.UNKNOWN, ExecutionState.LAUNCHED}
)


S = TypeVar("S", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Edge(Generic[S]):
    """One allowed move. `old` None means that the row is written in this state."""

    old: S | None
    new: S
    verb: str
    """Who moves it: the function of `store.py` that does, as people say it."""


BATCH_EDGES: Final = (
    Edge(None, BatchState.PLANNING, "enqueue"),
    Edge(BatchState.PLANNING, BatchState.RUNNING, "plan"),
    Edge(BatchState.PLANNING, BatchState.SUCCEEDED, "plan: no items"),
    Edge(BatchState.PLANNING, BatchState.FAILED, "plan: cannot be planned"),
    Edge(BatchState.PLANNING, BatchState.CANCELLED, "cancel"),
    Edge(BatchState.RUNNING, BatchState.SUCCEEDED, "settle the last chunk"),
    Edge(BatchState.RUNNING, BatchState.FAILED, "settle the last chunk"),
    Edge(BatchState.RUNNING, BatchState.CANCELLED, "settle the last chunk"),
    Edge(BatchState.FAILED, BatchState.RUNNING, "retry (operator)"),
    Edge(BatchState.SUCCEEDED, BatchState.RUNNING, "retry (operator)"),
    Edge(BatchState.CANCELLED, BatchState.RUNNING, "retry (operator)"),
    Edge(BatchState.FAILED, BatchState.PLANNING, "retry (operator, never planned)"),
    Edge(BatchState.CANCELLED, BatchState.PLANNING, "retry (operator, never planned)"),
)

CHUNK_EDGES: Final = (
    Edge(None, ChunkState.PENDING, "plan, or split: items that are still to do"),
    Edge(None, ChunkState.SUCCEEDED, "split: items that had succeeded"),
    Edge(ChunkState.PENDING, ChunkState.LAUNCHING, "launch"),
    Edge(ChunkState.PENDING, ChunkState.CANCELLED, "cancel"),
    Edge(ChunkState.PENDING, ChunkState.FAILED, "batch deadline; settle: not worth a split"),
    Edge(ChunkState.PENDING, ChunkState.SPLIT, "settle: others succeed, so its split is worth it"),
    Edge(ChunkState.LAUNCHING, ChunkState.RUNNING, "record the handle"),
    Edge(ChunkState.LAUNCHING, ChunkState.PENDING, "settle: retry"),
    Edge(ChunkState.LAUNCHING, ChunkState.FAILED, "settle: rejected"),
    Edge(ChunkState.LAUNCHING, ChunkState.CANCELLED, "settle: cancelled before a start"),
    Edge(ChunkState.RUNNING, ChunkState.PENDING, "settle: retry"),
    Edge(ChunkState.RUNNING, ChunkState.SUCCEEDED, "settle"),
    Edge(ChunkState.RUNNING, ChunkState.FAILED, "settle: no retry left"),
    Edge(ChunkState.RUNNING, ChunkState.CANCELLED, "settle: cancelled"),
    Edge(ChunkState.RUNNING, ChunkState.SPLIT, "settle: no retry left, on_failure is split"),
    Edge(ChunkState.LAUNCHING, ChunkState.SPLIT, "settle: the same, never seen running"),
    Edge(ChunkState.FAILED, ChunkState.PENDING, "retry (operator)"),
    Edge(ChunkState.SUCCEEDED, ChunkState.PENDING, "retry (operator, all chunks)"),
    Edge(ChunkState.CANCELLED, ChunkState.PENDING, "retry (operator)"),
)

EXECUTION_EDGES: Final = (
    Edge(None, ExecutionState.INTENDED, "launch: the intent"),
    Edge(None, ExecutionState.LAUNCHED, "a stray is found"),
    Edge(ExecutionState.INTENDED, ExecutionState.LAUNCHED, "record the handle"),
    Edge(ExecutionState.INTENDED, ExecutionState.UNKNOWN, "ambiguous answer, or call_by passed"),
    Edge(ExecutionState.INTENDED, ExecutionState.ENDED, "settle: refused, or cancelled uncalled"),
    Edge(ExecutionState.UNKNOWN, ExecutionState.LAUNCHED, "adopt: found by its key"),
    Edge(ExecutionState.UNKNOWN, ExecutionState.INTENDED, "call again with the same key"),
    Edge(ExecutionState.UNKNOWN, ExecutionState.ENDED, "settle: not found and cancelled"),
    Edge(ExecutionState.LAUNCHED, ExecutionState.ENDED, "settle its last task"),
    Edge(ExecutionState.ENDED, ExecutionState.LAUNCHED, "a stray is seen again"),
)
