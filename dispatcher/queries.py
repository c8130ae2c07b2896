"""What people and applications read: batches, chunks, attempts, events. Nothing moves here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from dispatcher.budget import Bucket
from dispatcher.errors import UnknownBatch
from dispatcher.redaction import redact
from dispatcher.states import FINAL_CHUNK, BatchState, ChunkState, Outcome
from dispatcher.store import Store
from dispatcher.store.base import DUE

__all__ = [
    "Attempt",
    "AuditLine",
    "BatchView",
    "Chunk",
    "ChunkStanding",
    "Event",
    "FiringView",
    "Holder",
    "Live",
    "Retry",
    "Standing",
    "TargetView",
    "WorkerView",
    "ahead",
    "audit",
    "batches",
    "cancelled_executions",
    "chunk_standing",
    "chunks",
    "events",
    "find_batch",
    "get_batch",
    "get_state",
    "holders",
    "last_firings",
    "live",
    "next_retry",
    "parts",
    "read_batch",
    "refused_for_now",
    "silent_leader",
    "standing",
    "targets",
    "troubled",
    "workers",
]

PAGE: Final = 1000
"""Rows read at once where a list may be long."""

SILENT: Final = 60
"""Seconds after its last heartbeat in which a worker still counts as alive."""


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
    def done(self) -> int:
        """How many of its chunks are final; of a chunk that was split, its parts count."""
        return sum(self.counts.get(s, 0) for s in FINAL_CHUNK - {ChunkState.SPLIT})

    @property
    def progress(self) -> float:
        """The part of its chunks that are final, from 0.0 to 1.0."""
        if self.state is BatchState.PLANNING:
            return 0.0
        if not self.chunk_count:
            return 1.0
        return self.done / self.chunk_count

    @property
    def finished(self) -> bool:
        """Whether it is in a final state."""
        return self.finished_at is not None


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
    done, total = values[-2:]
    values[-2:] = [None if total is None else (done, total)]
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
    progress: tuple[int, int] | None = None
    """Done and total, as its task last said while it ran, in its own unit."""


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
    items_ok: int = 0
    """Items of it that have succeeded, as far as receipts or its own success tell."""

    parent: int | None = None
    """The chunk that it was split from."""

    depth: int = 0
    """How often that one was split, and its own parent, and so on."""

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
                        c.finished_at, c.items_ok, c.parent, c.depth,
                        {"i.items::text" if items else "NULL"}
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
                    a.execution_id, e.key, e.handle, a.task_index, e.console_url, e.logs_url,
                    a.progress_done, a.progress_total
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
                row[8],
                row[9],
                row[10],
                tuple(tries.get(row[0], ())),
                row[11],
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


# --- what `explain` and `check` read --------------------------------------------------------------


class WorkerView(NamedTuple):
    """A worker, by its last heartbeat."""

    id: str
    host: str
    pid: int
    version: str
    code_version: int
    problems: dict[str, str]
    """Targets that it does not lead, and why."""

    heartbeat_at: datetime
    alive: bool
    """Whether it has said so within the last minute, and has not stopped since."""

    silence: timedelta
    """Since its last heartbeat."""


class TargetView(NamedTuple):
    """A target, as its last leaseholder was configured and as its last calls went."""

    name: str
    backend: str
    limits: dict[str, Any]
    home: dict[str, str] | None
    lease_owner: str | None
    lease_until: datetime | None
    leased: bool
    down_since: datetime | None
    down_reason: str | None
    down_calls: int
    resume_at: datetime | None
    launch_bucket: Bucket


class FiringView(NamedTuple):
    """What became of a due time of a schedule."""

    schedule: str
    due_at: datetime
    batch_id: str | None
    reason: str | None
    """Why there is no batch."""


class Standing(NamedTuple):
    """What is stored of a batch beside its `BatchView`, and the database's time."""

    now: datetime
    job: dict[str, Any]
    code_version: int
    items_from: str
    max_failed_chunks: int
    cancel_kind: str | None
    cancel_reason: str | None
    cancel_actor: str | None
    plan_tries: int
    plan_after: datetime | None
    being_planned: bool
    due: int
    """Pending chunks that could be launched now."""

    later: int
    """Pending chunks that wait for their time."""

    held: int
    """Pending chunks that wait for company in a pack."""

    next_due: datetime | None
    next_due_chunk: int | None
    held_until: datetime | None
    awaiting_split: int
    """Pending chunks that wait to be split until successes of the batch pay for it."""


class Live(NamedTuple):
    """The live executions of a batch that are in one situation, and the oldest of them."""

    what: str
    """calling, throttled, unknown, starting, running, absent, unread or cancelling."""

    executions: int
    tasks: int
    at_once: int
    """Of these tasks, those that their executions can run at the same time."""

    id: int
    key: str
    state: str
    handle: str | None
    worker: str | None
    reason: str | None
    calls: int
    looks: int
    intent_at: datetime
    call_by: datetime | None
    next_call_at: datetime | None
    next_look_at: datetime | None
    launched_at: datetime | None
    start_deadline: datetime | None
    started_at: datetime | None
    deadline: datetime | None
    absent_since: datetime | None
    unread_since: datetime | None
    cancel_requested_at: datetime | None
    cancel_kind: str | None
    cancel_calls: int
    next_cancel_at: datetime | None
    chunk_index: int | None


class Holder(NamedTuple):
    """Who holds slots."""

    batch_id: str | None
    job: str | None
    slots: int
    executions: int


class Retry(NamedTuple):
    """The retry of a batch that is due next."""

    chunk_index: int
    due_at: datetime
    reason: str | None
    """How the last attempt ended, and what was decided then."""

    chunks: int
    """Chunks that wait for their retry, this one included."""


class ChunkStanding(NamedTuple):
    """What is stored of a chunk beside its `Chunk`."""

    hold_until: datetime | None
    awaits_split: str | None
    budget_from: int
    execution_id: int | None
    """Of its open attempt."""


@dataclass(frozen=True, slots=True)
class AuditLine:
    """An event, with what an auditor wants to know of its subject."""

    event: Event
    subject: dict[str, Any] | None
    """Of a batch that was enqueued: job, target, params, labels and key. Of an execution: its key
    and target; what was asked for with its intent; its handle and console link with its launch."""


def workers(store: Store) -> list[WorkerView]:
    """Read the workers, the latest heartbeat first."""
    with store.transaction() as tx:
        rows = store.run(
            tx,
            f"""
            SELECT id, host, pid, version, code_version, problems, heartbeat_at,
                stopped_at IS NULL AND heartbeat_at > now() - interval '{SILENT} seconds',
                now() - heartbeat_at
            FROM dispatcher.worker ORDER BY heartbeat_at DESC, id
            """,  # noqa: S608 - a constant of this module
        )
        return [WorkerView(*row) for row in rows]


def targets(store: Store) -> dict[str, TargetView]:
    """Read the targets that workers have served so far, by name."""
    with store.transaction() as tx:
        rows = store.run(
            tx,
            """
            SELECT t.name, t.backend, t.limits, t.home, t.lease_owner, t.lease_until,
                coalesce(t.lease_owner IS NOT NULL AND t.lease_until > now(), false),
                t.down_since, t.down_reason, t.down_calls, t.resume_at,
                b.tokens, coalesce(extract(epoch FROM now() - b.taken_at), 0)::float8,
                coalesce(b.pace, 1),
                coalesce(extract(epoch FROM now() - b.slowed_at), 0)::float8
            FROM dispatcher.target t
            LEFT JOIN dispatcher.bucket b ON b.target = t.name AND b.kind = 'launch'
            ORDER BY t.name
            """,
        )
        found = {}
        for row in rows:
            view, bucket = tuple(row[:-4]), tuple(row[-4:])
            found[row[0]] = TargetView._make((*view, Bucket(*bucket)))
        return found


def silent_leader(target: TargetView, alive: Iterable[WorkerView]) -> WorkerView | None:
    """Name the worker that led a target until its lease ran out, unheard of since; else None."""
    until = target.lease_until
    if target.leased or until is None:
        return None
    return next(
        (one for one in alive if one.id == target.lease_owner and one.heartbeat_at < until), None
    )


def last_firings(store: Store, schedules: Iterable[str]) -> dict[str, FiringView]:
    """Read the last recorded due time of schedules, by name; without those that have none."""
    with store.transaction() as tx:
        rows = store.run(
            tx,
            """
            SELECT f.schedule, f.due_at, f.batch_id, f.reason
            FROM unnest(CAST(:names AS text[])) n CROSS JOIN LATERAL (
                SELECT * FROM dispatcher.schedule_firing
                WHERE schedule = n ORDER BY due_at DESC LIMIT 1
            ) f
            """,
            names=list(schedules),
        )
        return {row[0]: FiringView(*row) for row in rows}


def standing(store: Store, batch_id: str) -> Standing:
    """Read what explains where a batch is.

    Raises:
        UnknownBatch: there is none.
    """
    with store.transaction() as tx:
        row = store.run(
            tx,
            """
            SELECT now(), b.job, b.code_version, b.items_from, b.max_failed_chunks, b.cancel_kind,
                b.cancel_reason,
                (
                    SELECT v.actor FROM dispatcher.event v
                    WHERE v.batch_id = b.id AND v.kind = 'batch' AND v.old IS NULL
                        AND v.new IS NULL AND v.at = b.cancel_requested_at
                    ORDER BY v.id DESC LIMIT 1
                ),
                b.plan_tries, b.plan_after,
                -- The planner's hold is an advisory lock; see Store.planning.
                b.state = 'planning' AND EXISTS (
                    SELECT 1 FROM pg_locks l
                    WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
                        AND l.database = (SELECT oid FROM pg_database
                            WHERE datname = current_database())
                        AND (l.classid::bigint << 32) | l.objid::bigint
                            = hashtextextended('dispatcher.plan:' || b.id, 0)
                ),
                p.due, p.later, p.held, p.next_due, p.next_due_chunk, p.held_until,
                p.awaiting_split
            FROM dispatcher.batch b CROSS JOIN LATERAL (
                SELECT
                    count(*) FILTER (
                        WHERE due_at <= now() AND (hold_until IS NULL OR hold_until <= now())
                            AND awaits_split IS NULL
                    )::int AS due,
                    count(*) FILTER (WHERE due_at > now())::int AS later,
                    count(*) FILTER (WHERE due_at <= now() AND hold_until > now())::int AS held,
                    count(awaits_split)::int AS awaiting_split,
                    min(due_at) FILTER (WHERE due_at > now()) AS next_due,
                    (array_agg(index ORDER BY due_at, index) FILTER (WHERE due_at > now()))[1]
                        AS next_due_chunk,
                    min(hold_until) FILTER (WHERE due_at <= now() AND hold_until > now())
                        AS held_until
                FROM dispatcher.chunk WHERE batch_id = b.id AND state = 'pending'
            ) p
            WHERE b.id = :id
            """,
            id=batch_id,
        ).first()
    if row is None:
        raise UnknownBatch(f'no batch "{batch_id}"; `dispatcher batches` lists them')
    return Standing(*row)


def live(store: Store, batch_id: str, execution_id: int | None = None) -> dict[str, Live]:
    """Read the live executions of a batch, or one of them, by the situation they are in."""
    with store.transaction() as tx:
        rows = store.run(
            tx,
            """
            SELECT DISTINCT ON (w.what) w.what,
                (count(*) OVER (PARTITION BY w.what))::int,
                (sum(e.open_tasks) OVER (PARTITION BY w.what))::int,
                (sum(least(e.open_tasks, e.parallelism)) OVER (PARTITION BY w.what))::int,
                e.id, e.key, e.state, e.handle, e.worker, e.reason, e.calls, e.looks, e.intent_at,
                e.call_by, e.next_call_at, e.next_look_at, e.launched_at, e.start_deadline,
                e.started_at, e.deadline, e.absent_since, e.unread_since, e.cancel_requested_at,
                e.cancel_kind, e.cancel_calls, e.next_cancel_at,
                (
                    SELECT min(a.chunk_index) FROM dispatcher.attempt a
                    WHERE a.execution_id = e.id AND a.outcome IS NULL
                )
            FROM dispatcher.execution e CROSS JOIN LATERAL (
                SELECT CASE
                    WHEN e.cancel_requested_at IS NOT NULL THEN 'cancelling'
                    WHEN e.state = 'unknown' THEN 'unknown'
                    WHEN e.state = 'intended' AND e.next_call_at IS NOT NULL THEN 'throttled'
                    WHEN e.state = 'intended' THEN 'calling'
                    WHEN e.absent_since IS NOT NULL THEN 'absent'
                    WHEN e.unread_since IS NOT NULL THEN 'unread'
                    WHEN e.started_at IS NULL THEN 'starting'
                    ELSE 'running'
                END AS what
            ) w
            WHERE e.batch_id = :id AND e.state IN ('intended', 'unknown', 'launched')
                AND NOT e.stray AND (CAST(:execution_id AS bigint) IS NULL OR e.id = :execution_id)
            ORDER BY w.what, coalesce(e.started_at, e.launched_at, e.intent_at), e.id
            """,
            id=batch_id,
            execution_id=execution_id,
        )
        return {row[0]: Live(*row) for row in rows}


def cancelled_executions(store: Store, batch_id: str, since: datetime) -> tuple[int, int, int]:
    """Count the executions that ran when a batch's cancel was asked for, and those ended since.

    The third number is of those whose provider was not asked yet.
    """
    with store.transaction() as tx:
        row = store.run(
            tx,
            """
            SELECT count(*)::int, count(*) FILTER (WHERE state = 'ended')::int,
                count(*) FILTER (WHERE state = 'launched' AND cancel_calls = 0)::int
            FROM dispatcher.execution
            WHERE batch_id = :id AND NOT stray AND cancel_requested_at IS NOT NULL
                AND (finished_at IS NULL OR finished_at >= :since)
            """,
            id=batch_id,
            since=since,
        ).one()
        return row[0], row[1], row[2]


def holders(
    store: Store, *, target: str | None = None, job: str | None = None, batch_id: str | None = None
) -> list[Holder]:
    """Read who holds the slots of a target, a job or a batch, the largest holder first."""
    with store.transaction() as tx:
        rows = store.run(
            tx,
            """
            SELECT batch_id, job_name, sum(least(open_tasks, parallelism))::int, count(*)::int
            FROM dispatcher.execution
            WHERE state IN ('intended', 'unknown', 'launched')
                AND (CAST(:target AS text) IS NULL OR target = :target)
                AND (CAST(:job AS text) IS NULL OR job_name = :job)
                AND (CAST(:batch_id AS text) IS NULL OR batch_id = :batch_id)
            GROUP BY batch_id, job_name ORDER BY 3 DESC, 1
            """,
            target=target,
            job=job,
            batch_id=batch_id,
        )
        return [Holder(*row) for row in rows]


def refused_for_now(store: Store, target: str, job: str) -> tuple[int, datetime | None, str | None]:
    """Count a job's executions that wait for another call; when the next is due, and why it waits.

    While there are any, nothing else of the job is launched on the target.
    """
    with store.transaction() as tx:
        row = store.run(
            tx,
            """
            SELECT count(*)::int, min(next_call_at),
                (array_agg(reason ORDER BY next_call_at, id))[1]
            FROM dispatcher.execution
            WHERE target = :target AND job_name = :job AND state = 'intended' AND call_by IS NULL
            """,
            target=target,
            job=job,
        ).one()
        return row[0], row[1], row[2]


def ahead(store: Store, target: str, priority: int) -> list[tuple[str, str, int]]:
    """Find batches of a target that wait too and go first: id, job and priority."""
    with store.transaction() as tx:
        rows = store.run(
            tx,
            f"""
            SELECT b.id, b.job_name, b.priority FROM dispatcher.batch b
            WHERE b.target = :target AND b.state = 'running' AND b.cancel_requested_at IS NULL
                AND b.priority > :priority AND EXISTS (
                    SELECT 1 FROM dispatcher.chunk c
                    WHERE c.batch_id = b.id AND {DUE}
                )
            ORDER BY b.priority DESC, b.created_at LIMIT 5
            """,  # noqa: S608 - a constant of the store
            target=target,
            priority=priority,
        )
        return [(row[0], row[1], row[2]) for row in rows]


def next_retry(store: Store, batch_id: str) -> Retry | None:
    """Read which chunk of a batch is tried again next, and when; None if none waits for that."""
    with store.transaction() as tx:
        row = store.run(
            tx,
            """
            SELECT index, due_at, reason, (count(*) OVER ())::int FROM dispatcher.chunk
            WHERE batch_id = :id AND state = 'pending' AND due_at > now() AND outcome IS NOT NULL
            ORDER BY due_at, index LIMIT 1
            """,
            id=batch_id,
        ).first()
        return None if row is None else Retry(*row)


def chunk_standing(store: Store, batch_id: str, index: int) -> ChunkStanding:
    """Read what explains where a chunk is; empty if there is none."""
    with store.transaction() as tx:
        row = store.run(
            tx,
            """
            SELECT c.hold_until, c.awaits_split, c.budget_from, a.execution_id
            FROM dispatcher.chunk c LEFT JOIN dispatcher.attempt a
                ON a.batch_id = c.batch_id AND a.chunk_index = c.index AND a.outcome IS NULL
            WHERE c.batch_id = :id AND c.index = :index
            """,
            id=batch_id,
            index=index,
        ).first()
        return ChunkStanding(None, None, 0, None) if row is None else ChunkStanding(*row)


def parts(store: Store, batch_id: str, index: int) -> list[int]:
    """Find the chunks that one was split into."""
    with store.transaction() as tx:
        rows = store.run(
            tx,
            """
            SELECT index FROM dispatcher.chunk
            WHERE batch_id = :id AND parent = :index ORDER BY index
            """,
            id=batch_id,
            index=index,
        )
        return list(rows.scalars())


def troubled(store: Store, batch_id: str) -> set[int]:
    """Find the chunks that failed for good, or whose last attempt ended badly."""
    with store.transaction() as tx:
        rows = store.run(
            tx,
            """
            SELECT index FROM dispatcher.chunk
            WHERE batch_id = :id AND state <> 'succeeded'
                AND (state = 'failed' OR outcome NOT IN ('succeeded', 'cancelled'))
            """,
            id=batch_id,
        )
        return {row[0] for row in rows}


def audit(
    store: Store,
    *,
    batch_id: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Iterator[AuditLine]:
    """Read the audit in the order in which it was written, with what it is about."""
    page: list[Event] = []
    for event in events(store, batch_id=batch_id, since=since, until=until):
        page.append(event)
        if len(page) == PAGE:
            yield from _audited(store, page)
            page = []
    yield from _audited(store, page)


def _audited(store: Store, page: Sequence[Event]) -> Iterator[AuditLine]:
    """Add to events what they are about, read once for the page."""
    batches_of = {e.batch_id for e in page if e.kind == "batch" and e.new == BatchState.PLANNING}
    executions_of = {e.execution_id for e in page if e.kind == "execution"}
    with store.transaction() as tx:
        asked = store.run(
            tx,
            """
            SELECT id, job_name, target, params, labels, key FROM dispatcher.batch
            WHERE id = ANY(:ids)
            """,
            ids=[i for i in batches_of if i is not None],
        )
        requests = {
            row[0]: dict(
                zip(
                    ("job", "target", "params", "labels", "key"), redact(list(row[1:])), strict=True
                )
            )
            for row in asked
        }
        called = store.run(
            tx,
            """
            SELECT id, key, target, request, handle, console_url FROM dispatcher.execution
            WHERE id = ANY(:ids)
            """,
            ids=[i for i in executions_of if i is not None],
        )
        runs = {row[0]: row[1:] for row in called}
    for event in page:
        subject: dict[str, Any] | None = None
        if event.kind == "batch" and event.new == BatchState.PLANNING:
            subject = requests.get(event.batch_id or "")
        elif event.kind == "execution" and event.execution_id in runs:
            key, target, request, handle, console_url = runs[event.execution_id]
            subject = {"key": key, "target": target}
            if event.new == "intended" and event.old is None:
                subject["request"] = request
            elif event.new == "launched":
                subject |= {"handle": handle, "console_url": console_url}
        yield AuditLine(event, subject)
