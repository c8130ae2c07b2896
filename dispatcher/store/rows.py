"""What the statements read and write, as values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from dispatcher.states import ChunkState, Outcome

__all__ = [
    "BatchVerdictRow",
    "Claimed",
    "Closing",
    "ExecutionRow",
    "Intent",
    "MovedChunk",
    "NewBatch",
    "OpenAttempt",
    "TargetRow",
    "WaitingBatch",
]


@dataclass(frozen=True, slots=True)
class NewBatch:
    """A batch as `enqueue` writes it; `job`, `request`, `params` and `labels` are JSON texts."""

    id: str
    key: str | None
    request: str
    job_name: str
    job: str
    target: str
    params: str
    labels: str
    priority: int
    items_from: str
    actor: str
    deadline: timedelta
    max_failed_chunks: int


class TargetRow(NamedTuple):
    """A target, locked, as launch reads it."""

    home: dict[str, str] | None
    down_calls: int
    down: bool
    resumes_in: float | None
    instance: str
    now: datetime
    """The database's time, which is that of everything written in this transaction."""


class WaitingBatch(NamedTuple):
    """A batch with chunks that may be launched now."""

    batch_id: str
    priority: int
    job_name: str
    held: int
    due: int
    largest_chunk: int | None
    """Bytes of the items of its largest chunk."""


class Claimed(NamedTuple):
    """A chunk that this launcher has taken: the number is of its new attempt."""

    chunk_index: int
    number: int


@dataclass(frozen=True, slots=True)
class Intent:
    """An execution that is about to be asked for."""

    key: str
    batch_id: str
    job_name: str
    parallelism: int
    request: str
    chunks: tuple[tuple[int, int], ...]
    """Chunk index and attempt number, by task index."""


class ExecutionRow(NamedTuple):
    """A live execution as the engine reads it."""

    id: int
    key: str
    batch_id: str | None
    job_name: str | None
    state: str
    stray: bool
    tasks: int
    open_tasks: int
    parallelism: int
    handle: str | None
    calls: int
    looks: int
    cancel_kind: str | None
    cancel_sent_at: datetime | None
    cancel_calls: int
    launched_age: float | None
    started: bool
    absent_for: float | None
    past_call_by: float | None
    intent_at: datetime


class OpenAttempt(NamedTuple):
    """An attempt whose outcome is not known yet, locked through its execution."""

    batch_id: str
    chunk_index: int
    number: int
    execution_id: int
    task_index: int
    budget_from: int


class Closing(NamedTuple):
    """How an attempt ended, as it is written."""

    attempt: OpenAttempt
    outcome: Outcome
    exit_code: int | None
    reason: str | None
    started_at: datetime | None
    ended_at: datetime | None
    result_uri: str | None = None


class MovedChunk(NamedTuple):
    """Where a chunk goes when its attempt is closed."""

    closing: Closing
    state: ChunkState
    reason: str | None
    delay: float
    """Seconds until it is due, for a chunk that returns to pending."""
    hold: float | None
    """Seconds that it waits for company in a pack, counted from now."""


class BatchVerdictRow(NamedTuple):
    """A batch whose last chunk is final."""

    id: str
    max_failed_chunks: int
    cancel_kind: str | None
    cancel_reason: str | None
    succeeded: int
    failed: int
    cancelled: int
    example: str | None
