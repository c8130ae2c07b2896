"""What the statements read and write, as values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

from dispatcher.receipts import ItemResult
from dispatcher.states import ChunkState, Cut, Outcome

__all__ = [
    "Claimed",
    "Closing",
    "ExecutionRow",
    "Held",
    "Intent",
    "MovedChunk",
    "NewBatch",
    "OpenAttempt",
    "OpenTask",
    "Part",
    "TargetRow",
    "ToSplit",
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
    max_failed_chunks: int | None
    max_failed_items: int | None
    min_ratio: float | None
    stop_early: bool


class TargetRow(NamedTuple):
    """A target, locked, as launch reads it."""

    home: dict[str, str] | None
    down_calls: int
    down: bool
    resumes_in: float | None
    instance: str
    now: datetime
    """The database's time, which is that of everything written in this transaction."""

    told: dict[str, Any] | None
    """Its limits, as who leads it now has written them; None if nobody does."""


class Held(NamedTuple):
    """What a target holds now, counted from the rows: nothing can leak."""

    slots: int
    executions: int
    first: int
    """Executions that are called again before any other is asked for."""

    waiting_jobs: list[str]
    """Jobs of which executions wait for another call, as the provider refused them for now."""


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
    positions: list[int] | None = None
    """The items that it is given; None: all of them."""

    reason: str | None = None
    """Why it was pending, for the case that it is given back."""

    @property
    def task(self) -> tuple[int, int, list[int] | None]:
        """What a request is written from."""
        return self.chunk_index, self.number, self.positions


@dataclass(frozen=True, slots=True)
class Intent:
    """An execution that is about to be asked for."""

    key: str
    batch_id: str
    job_name: str
    parallelism: int
    request: str
    chunks: tuple[Claimed, ...]
    """By task index."""


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
    size: int
    """Items of its chunk."""

    items_ok: int
    """Those of them that had succeeded before."""

    depth: int
    positions: list[int] | None

    @property
    def given(self) -> list[int]:
        """The items of its chunk that it was given."""
        return list(range(self.size)) if self.positions is None else self.positions


class OpenTask(NamedTuple):
    """A task that has not been settled, as its receipt is looked for."""

    execution_id: int
    task_index: int
    key: str
    batch_id: str
    number: int
    items: int
    """How many it was given."""

    handle: str | None


class ToSplit(NamedTuple):
    """A chunk that goes on in smaller ones."""

    batch_id: str
    chunk_index: int
    size: int
    depth: int
    cut: Cut


class Part(NamedTuple):
    """A chunk that another one is split into."""

    positions: list[int]
    """Its items, as places in the chunk that is split."""

    items: str
    """The same as a JSON array."""

    done: bool
    """Whether they had all succeeded."""


class Closing(NamedTuple):
    """How an attempt ended, as it is written."""

    attempt: OpenAttempt
    outcome: Outcome
    exit_code: int | None
    reason: str | None
    started_at: datetime | None
    ended_at: datetime | None
    result_uri: str | None = None
    results: tuple[ItemResult, ...] = ()
    """Of items, as its receipt says; places among the items that the attempt was given."""

    receipt: Literal["complete", "partial"] | None = None
    """What kind of receipt it wrote; None if none that can be used."""


class MovedChunk(NamedTuple):
    """Where a chunk goes when its attempt is closed."""

    closing: Closing
    state: ChunkState
    reason: str | None
    delay: float
    """Seconds until it is due, for a chunk that returns to pending."""
    hold: float | None
    """Seconds that it waits for company in a pack, counted from now."""

    items_ok: int = 0
    """Items of it that have succeeded now."""

    cut: Cut | None = None
    """How it is split; in `pending`, how it will be once successes of its batch pay for it."""
