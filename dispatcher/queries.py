"""What people and applications read: batches, chunks, attempts, events. Nothing moves here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from dispatcher.errors import UnknownBatch
from dispatcher.states import BatchState, ChunkState, Outcome
from dispatcher.store import Store

__all__ = [
    "Attempt",
    "BatchView",
    "Chunk",
    "Event",
    "Output",
    "batches",
    "chunks",
    "events",
    "find_batch",
    "get_batch",
    "get_state",
    "outputs",
    "read_batch",
]

PAGE: Final = 1000
"""Rows read at once where a list may be long."""


@dataclass(frozen=True, slots=True)
class BatchView:
    """A batch as it was when it was read."""

    id: str
    key: str | None
    job: str
    target: str
    state: BatchState
    reason: str | None
    """Why it ended as it did, or why it waits to be planned."""

    params: dict[str, Any]
    labels: dict[str, str]
    priority: int
    actor: str
    created_at: datetime
    planned_at: datetime | None
    deadline: datetime
    finished_at: datetime | None
    item_count: int | None
    """None until it is planned."""

    chunk_count: int | None
    """None until it is planned."""

    cancel_requested_at: datetime | None
    counts: dict[ChunkState, int] = field(default_factory=dict)
    """Chunks by state; states without a chunk are left out."""

    @property
    def progress(self) -> float:
        """The part of its chunks that are final, from 0.0 to 1.0."""
        if self.state is BatchState.PLANNING:
            return 0.0
        if not self.chunk_count:
            return 1.0
        final = sum(self.counts.get(s, 0) for s in (*_FINAL,))
        return final / self.chunk_count

    @property
    def finished(self) -> bool:
        """Whether it is in a final state."""
        return self.finished_at is not None


_FINAL: Final = (ChunkState.SUCCEEDED, ChunkState.FAILED, ChunkState.CANCELLED)

_BATCH: Final = """
    b.id, b.key, b.job_name, b.target, b.state, b.reason, b.params, b.labels, b.priority, b.actor,
    b.created_at, b.planned_at, b.deadline, b.finished_at, b.item_count, b.chunk_count,
    b.cancel_requested_at
"""


def _batch(row: Sequence[Any]) -> BatchView:
    values = list(row)
    values[4] = BatchState(values[4])
    return BatchView(*values)


def _attempt(row: Sequence[Any]) -> Attempt:
    values = list(row)
    values[2] = None if values[2] is None else Outcome(values[2])
    return Attempt(*values)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a chunk."""

    chunk_index: int
    number: int
    outcome: Outcome | None
    """None while it is open."""

    exit_code: int | None
    reason: str | None
    log_tail: str | None
    result_uri: str | None
    opened_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    settled_at: datetime | None
    execution_id: int
    execution_key: str
    handle: str | None
    """The provider's name of the execution; None until the launch is recorded."""

    task_index: int
    console_url: str | None
    logs_url: str | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A slice of a batch's items."""

    index: int
    state: ChunkState
    size: int
    """Items in it."""

    weight: float | None
    due_at: datetime
    outcome: Outcome | None
    """Of its last ended attempt."""

    reason: str | None
    finished_at: datetime | None
    attempts: tuple[Attempt, ...] = ()
    items: str | None = None
    """Its items as one JSON array, where they were asked for."""


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the audit."""

    id: int
    at: datetime
    actor: str
    kind: str
    batch_id: str | None
    chunk_index: int | None
    attempt: int | None
    execution_id: int | None
    old: str | None
    new: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Output:
    """Where a chunk that succeeded left its result."""

    chunk_index: int
    attempt: int
    uri: str


def find_batch(store: Store, prefix: str) -> str:
    """Complete a shortened batch id.

    Raises:
        UnknownBatch: none or more than one begins with it.
    """
    with store.transaction() as tx:
        rows = store.run(
            tx,
            """
            SELECT id FROM dispatcher.batch
            WHERE id >= :prefix AND left(id, length(:prefix)) = :prefix
            ORDER BY id COLLATE "C" LIMIT 6
            """,
            prefix=prefix.strip(),
        )
        found = [row[0] for row in rows]
    if not found or not prefix.strip():
        raise UnknownBatch(f'no batch "{prefix}"; `dispatcher batches` lists them')
    if prefix in found or len(found) == 1:
        return prefix if prefix in found else found[0]
    shown = ", ".join(found[:5]) + (", …" if len(found) > 5 else "")  # noqa: PLR2004 - a sample
    raise UnknownBatch(f'more than one batch begins with "{prefix}": {shown}; give more of the id')


def get_state(store: Store, batch_id: str) -> BatchState:
    """Read only the state of a batch.

    Raises:
        UnknownBatch: there is none.
    """
    with store.transaction() as tx:
        state = store.run(
            tx, "SELECT state FROM dispatcher.batch WHERE id = :id", id=batch_id
        ).scalar_one_or_none()
    if state is None:
        raise UnknownBatch(f'no batch "{batch_id}"; `dispatcher batches` lists them')
    return BatchState(state)


def get_batch(store: Store, batch_id: str) -> BatchView:
    """Read a batch with the counts of its chunks.

    Raises:
        UnknownBatch: there is none.
    """
    with store.transaction() as tx:
        return read_batch(store, tx, batch_id)


def read_batch(store: Store, tx: sa.Connection, batch_id: str) -> BatchView:
    """Read a batch inside a transaction, which may be the one that writes it.

    Raises:
        UnknownBatch: there is none.
    """
    found = _with_counts(store, tx, "WHERE b.id = :id", id=batch_id)
    if not found:
        raise UnknownBatch(f'no batch "{batch_id}"; `dispatcher batches` lists them')
    return found[0]


def batches(
    store: Store,
    *,
    job: str | None = None,
    state: BatchState | None = None,
    since: datetime | None = None,
    label: tuple[str, str] | None = None,
    limit: int = 20,
) -> list[BatchView]:
    """List batches, newest first."""
    with store.transaction() as tx:
        return _with_counts(
            store,
            tx,
            """
            WHERE (CAST(:job AS text) IS NULL OR b.job_name = :job)
                AND (CAST(:state AS text) IS NULL OR b.state = :state)
                AND (CAST(:since AS timestamptz) IS NULL OR b.created_at >= :since)
                AND (CAST(:name AS text) IS NULL OR b.labels ->> :name = :value)
            ORDER BY b.created_at DESC, b.id LIMIT :limit
            """,
            job=job,
            state=state,
            since=since,
            name=label and label[0],
            value=label and label[1],
            limit=limit,
        )


def _with_counts(store: Store, tx: sa.Connection, where: str, **params: Any) -> list[BatchView]:
    rows = store.run(
        tx,
        f"""
        SELECT p.*, (
            SELECT json_object_agg(c.state, c.n) FROM (
                SELECT state, count(*) AS n FROM dispatcher.chunk
                WHERE batch_id = p.id GROUP BY state
            ) c
        )
        FROM (SELECT {_BATCH} FROM dispatcher.batch b {where}) p
        """,  # noqa: S608 - constants of this module
        **params,
    )
    return [
        _batch([*row[:-1], {ChunkState(s): n for s, n in (row[-1] or {}).items()}]) for row in rows
    ]


def chunks(
    store: Store,
    batch_id: str,
    *,
    index: int | None = None,
    states: Sequence[ChunkState] | None = None,
    items: bool = False,
) -> Iterator[Chunk]:
    """Read chunks with their attempts, by index, a page at a time."""
    after = -1
    while True:
        with store.transaction() as tx:
            rows = list(
                store.run(
                    tx,
                    f"""
                    SELECT c.index, c.state, c.size, c.weight, c.due_at, c.outcome, c.reason,
                        c.finished_at, {"i.items::text" if items else "NULL"}
                    FROM dispatcher.chunk c
                    LEFT JOIN dispatcher.chunk_items i
                        ON i.batch_id = c.batch_id AND i.chunk_index = c.index
                    WHERE c.batch_id = :id AND c.index > :after
                        AND (CAST(:index AS int) IS NULL OR c.index = :index)
                        AND (CAST(:states AS text[]) IS NULL OR c.state = ANY(:states))
                    ORDER BY c.index LIMIT :page
                    """,  # noqa: S608 - constants of this module
                    id=batch_id,
                    after=after,
                    index=index,
                    states=None if states is None else [str(s) for s in states],
                    page=PAGE,
                )
            )
            tries: dict[int, list[Attempt]] = {}
            for try_ in store.run(
                tx,
                """
                SELECT a.chunk_index, a.number, a.outcome, a.exit_code, a.reason, a.log_tail,
                    a.result_uri, a.opened_at, a.started_at, a.ended_at, a.settled_at,
                    a.execution_id, e.key, e.handle, a.task_index, e.console_url, e.logs_url
                FROM dispatcher.attempt a JOIN dispatcher.execution e ON e.id = a.execution_id
                WHERE a.batch_id = :id AND a.chunk_index = ANY(:indexes)
                ORDER BY a.chunk_index, a.number
                """,
                id=batch_id,
                indexes=[row[0] for row in rows],
            ):
                tries.setdefault(try_[0], []).append(_attempt(try_))
        for row in rows:
            yield Chunk(
                row[0],
                ChunkState(row[1]),
                row[2],
                row[3],
                row[4],
                None if row[5] is None else Outcome(row[5]),
                row[6],
                row[7],
                tuple(tries.get(row[0], ())),
                row[8],
            )
        if len(rows) < PAGE:
            return
        after = rows[-1][0]


def events(
    store: Store,
    *,
    batch_id: str | None = None,
    chunk_index: int | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Iterator[Event]:
    """Read the audit in the order in which it was written, a page at a time."""
    after = 0
    while True:
        with store.transaction() as tx:
            rows = list(
                store.run(
                    tx,
                    """
                    SELECT id, at, actor, kind, batch_id, chunk_index, attempt, execution_id, old,
                        new, reason
                    FROM dispatcher.event
                    WHERE id > :after
                        AND (CAST(:batch_id AS text) IS NULL OR batch_id = :batch_id)
                        AND (CAST(:chunk_index AS int) IS NULL OR chunk_index = :chunk_index)
                        AND (CAST(:since AS timestamptz) IS NULL OR at >= :since)
                        AND (CAST(:until AS timestamptz) IS NULL OR at < :until)
                    ORDER BY id LIMIT :page
                    """,
                    after=after,
                    batch_id=batch_id,
                    chunk_index=chunk_index,
                    since=since,
                    until=until,
                    page=PAGE,
                )
            )
        for row in rows:
            yield Event(*row)
        if len(rows) < PAGE:
            return
        after = rows[-1][0]


def outputs(store: Store, batch_id: str) -> Iterator[Output]:
    """Read where the chunks that succeeded left their results, by chunk."""
    for chunk in chunks(store, batch_id, states=[ChunkState.SUCCEEDED]):
        last = chunk.attempts[-1] if chunk.attempts else None
        if last is not None and last.result_uri is not None:
            yield Output(chunk.index, last.number, last.result_uri)
