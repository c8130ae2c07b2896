"""Every statement that moves a row, one function a transition.

Each transition names the old state in its WHERE and writes its event in the same transaction; a
function that moved nothing returns an empty result, and that is ordinary: a message was doubled or
came late. What is to be moved is decided in `engine.py`; what people read is in `queries.py`.

Locks are taken in one order everywhere: target, job, batch, execution, chunk, each by id. Time is
the database's `now()`, the start of the transaction.
"""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from dispatcher import schema
from dispatcher.backends.base import Launched
from dispatcher.errors import DispatcherError, Unreachable
from dispatcher.states import BatchState, CancelKind, ChunkState, Outcome

__all__ = [
    "Claimed",
    "Closing",
    "Conflict",
    "ExecutionRow",
    "Intent",
    "MovedChunk",
    "NewBatch",
    "OpenAttempt",
    "Planning",
    "Store",
    "TargetRow",
    "WaitingBatch",
]

LIVE: Final = "('intended', 'unknown', 'launched')"
OPEN: Final = "('pending', 'launching', 'running')"
DEADLOCK_OR_SERIALIZATION: Final = frozenset({"40P01", "40001"})


class Conflict(DispatcherError):
    """Two transactions met in the wrong order; nothing was written and the step may be repeated."""


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
    tokens: float | None
    tokens_age: float | None
    pace: float
    down_calls: int
    resumes_in: float | None
    instance: str


class WaitingBatch(NamedTuple):
    """A batch with chunks that may be launched now."""

    batch_id: str
    priority: int
    job_name: str
    held: int
    due: int


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


EXECUTION_COLUMNS: Final = """
    e.id, e.key, e.batch_id, e.job_name, e.state, e.stray, e.tasks, e.open_tasks, e.parallelism,
    e.handle, e.calls, e.looks, e.cancel_kind, e.cancel_sent_at, e.cancel_calls,
    extract(epoch FROM now() - e.launched_at)::float8, e.started_at IS NOT NULL,
    extract(epoch FROM now() - e.absent_since)::float8,
    extract(epoch FROM now() - e.call_by)::float8
"""


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


class Store:
    """The tables behind one SQLAlchemy engine.

    `now` is the SQL expression of the current time; only tests with a clock of their own give
    another one than the database's `now()`.
    """

    def __init__(self, engine: sa.Engine, *, actor: str, now: str = "now()") -> None:
        self.engine = engine
        self.actor = actor
        self._now = now
        self._instance: str | None = None
        self.sql = functools.cache(self._compile)

    def _compile(self, sql: str) -> sa.TextClause:
        return sa.text(sql.replace("now()", self._now) if self._now != "now()" else sql)

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Open a transaction that commits at the end of the block.

        Raises:
            Unreachable: the database does not answer.
            Conflict: a deadlock or a serialization failure; nothing was written.
        """
        try:
            with self.engine.begin() as tx:
                yield tx
        except sa.exc.OperationalError as error:
            if getattr(error.orig, "sqlstate", None) in DEADLOCK_OR_SERIALIZATION:
                raise Conflict(str(error.orig)) from error
            url = self.engine.url.render_as_string(hide_password=False)
            raise Unreachable(schema.unreachable(url, error)) from error

    def run(
        self, tx: sa.Connection, sql: str, /, **params: Any
    ) -> sa.CursorResult[*tuple[Any, ...]]:
        """Execute one statement of this module or of `queries.py`."""
        return tx.execute(self.sql(sql), params)

    # ---------------------------------------------------------------- enqueue

    def insert_batch(self, tx: sa.Connection, new: NewBatch, count: int, items: str | None) -> bool:
        """Write the batch, its first page of items and its event; False if the key is taken.

        One statement, so that enqueueing a small batch costs one round trip and a commit.
        """
        inserted = self.run(
            tx,
            """
            WITH b AS (
                INSERT INTO dispatcher.batch (
                    id, key, request, job_name, job, code_version, target, params, labels, priority,
                    items_from, state, actor, created_at, deadline, max_failed_chunks
                ) VALUES (
                    :id, :key, CAST(:request AS json), :job_name, CAST(:job AS json), :code_version,
                    :target, CAST(:params AS json), CAST(:labels AS json), :priority, :items_from,
                    'planning', :actor, now(), now() + CAST(:deadline AS interval),
                    :max_failed_chunks
                )
                ON CONFLICT (key) DO NOTHING RETURNING id
            ), p AS (
                INSERT INTO dispatcher.item_page (batch_id, number, count, items)
                SELECT id, 0, :count, CAST(:items AS json) FROM b WHERE :count > 0
            ), e AS (
                INSERT INTO dispatcher.event (at, actor, kind, batch_id, new)
                SELECT now(), :actor, 'batch', id, 'planning' FROM b
            )
            SELECT id FROM b
            """,
            id=new.id,
            key=new.key,
            request=new.request,
            job_name=new.job_name,
            job=new.job,
            code_version=schema.CODE_VERSION,
            target=new.target,
            params=new.params,
            labels=new.labels,
            priority=new.priority,
            items_from=new.items_from,
            actor=new.actor,
            deadline=new.deadline,
            max_failed_chunks=new.max_failed_chunks,
            count=count,
            items=items,
        )
        return inserted.first() is not None

    def insert_page(
        self, tx: sa.Connection, batch_id: str, number: int, count: int, items: str
    ) -> None:
        """Write one more page of items of a batch that this transaction has inserted."""
        self.run(
            tx,
            """
            INSERT INTO dispatcher.item_page (batch_id, number, count, items)
            VALUES (:batch_id, :number, :count, CAST(:items AS json))
            """,
            batch_id=batch_id,
            number=number,
            count=count,
            items=items,
        )

    def set_request(self, tx: sa.Connection, batch_id: str, request: str) -> None:
        """Complete the request of a batch whose items were streamed, in the same transaction."""
        self.run(
            tx,
            "UPDATE dispatcher.batch SET request = CAST(:request AS json) WHERE id = :id",
            id=batch_id,
            request=request,
        )

    def request_of_key(self, tx: sa.Connection, key: str) -> tuple[str, dict[str, Any]] | None:
        """Read which batch has an idempotency key, and what it asked for."""
        row = self.run(
            tx, "SELECT id, request FROM dispatcher.batch WHERE key = :key", key=key
        ).first()
        return None if row is None else (row[0], row[1])

    # ---------------------------------------------------------------- plan

    def unplanned(self, limit: int) -> list[str]:
        """Find batches that wait to be planned, oldest first."""
        with self.transaction() as tx:
            rows = self.run(
                tx,
                """
                SELECT id FROM dispatcher.batch
                WHERE state = 'planning' AND (plan_after IS NULL OR plan_after <= now())
                    AND code_version <= :code_version
                ORDER BY created_at LIMIT :limit
                """,
                limit=limit,
                code_version=schema.CODE_VERSION,
            )
            return [row[0] for row in rows]

    @contextmanager
    def planning(self, batch_id: str) -> Iterator[Planning | None]:
        """Hold a batch while it is planned; None if it is held elsewhere or needs no plan.

        The hold is an advisory lock of the transaction, not the row's: so a cancel does not wait
        for a long plan. Leaving the block commits; an error or a death takes all of it back.
        """
        with self.transaction() as tx:
            row = None
            held = self.run(
                tx,
                "SELECT pg_try_advisory_xact_lock(hashtextextended('dispatcher.plan:' || :id, 0))",
                id=batch_id,
            ).scalar_one()
            if held:
                row = self.run(
                    tx,
                    """
                    SELECT job, params, items_from, plan_tries FROM dispatcher.batch
                    WHERE id = :id AND state = 'planning' AND code_version <= :code_version
                    """,
                    id=batch_id,
                    code_version=schema.CODE_VERSION,
                ).first()
            self.run(tx, "SET LOCAL idle_in_transaction_session_timeout = 0")
            yield None if row is None else Planning(self, tx, batch_id, *row)

    def postpone_plan(self, batch_id: str, delay: timedelta, reason: str) -> None:
        """Try planning again later: something it needs does not answer."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                WITH b AS (
                    UPDATE dispatcher.batch
                    SET plan_tries = plan_tries + 1, plan_after = now() + CAST(:delay AS interval),
                        reason = :reason
                    WHERE id = :id AND state = 'planning' RETURNING id
                )
                INSERT INTO dispatcher.event (at, actor, kind, batch_id, reason)
                SELECT now(), :actor, 'batch', id, :reason FROM b
                """,
                id=batch_id,
                delay=delay,
                reason=reason,
                actor=self.actor,
            )

    def fail_plan(self, batch_id: str, reason: str) -> bool:
        """planning → failed: it cannot be planned."""
        with self.transaction() as tx:
            return self._end_planning(tx, batch_id, BatchState.FAILED, reason)

    def _end_planning(
        self, tx: sa.Connection, batch_id: str, state: BatchState, reason: str | None
    ) -> bool:
        """planning → a final state, its pages of items dropped."""
        moved = self.run(
            tx,
            """
            WITH b AS (
                UPDATE dispatcher.batch
                SET state = :state, reason = :reason, finished_at = now(),
                    item_count = coalesce(item_count, 0), chunk_count = coalesce(chunk_count, 0)
                WHERE id = :id AND state = 'planning' RETURNING id
            ), e AS (
                INSERT INTO dispatcher.event (at, actor, kind, batch_id, old, new, reason)
                SELECT now(), :actor, 'batch', id, 'planning', :state, :reason FROM b
            )
            SELECT id FROM b
            """,
            id=batch_id,
            state=state,
            reason=reason,
            actor=self.actor,
        )
        return moved.first() is not None

    # ---------------------------------------------------------------- launch

    def lock_target(self, tx: sa.Connection, name: str) -> TargetRow | None:
        """Lock the target: whoever counts its slots or takes from its bucket comes one by one."""
        row = self.run(
            tx,
            """
            SELECT t.home, t.tokens, extract(epoch FROM now() - t.tokens_at)::float8, t.pace,
                t.down_calls, extract(epoch FROM t.resume_at - now())::float8, i.instance
            FROM dispatcher.target t CROSS JOIN dispatcher.installation i
            WHERE t.name = :name FOR UPDATE OF t
            """,
            name=name,
        ).first()
        return None if row is None else TargetRow(*row)

    def lock_jobs(self, tx: sa.Connection, names: Iterable[str]) -> None:
        """Lock jobs that have a limit of their own, after the target and by name."""
        for name in sorted(names):
            self.run(
                tx,
                "SELECT pg_advisory_xact_lock(hashtextextended('dispatcher.job:' || :name, 0))",
                name=name,
            )

    def waiting(self, tx: sa.Connection, target: str, most: int) -> list[WaitingBatch]:
        """Find batches of a target with due chunks, with the slots that they hold now."""
        rows = self.run(
            tx,
            f"""
            SELECT b.id, b.priority, b.job_name,
                coalesce((
                    SELECT sum(least(e.open_tasks, e.parallelism)) FROM dispatcher.execution e
                    WHERE e.batch_id = b.id AND e.state IN {LIVE}
                ), 0)::int, d.due
            FROM dispatcher.batch b CROSS JOIN LATERAL (
                SELECT count(*)::int AS due FROM (
                    SELECT 1 FROM dispatcher.chunk c
                    WHERE c.batch_id = b.id AND c.state = 'pending' AND c.due_at <= now()
                        AND (c.hold_until IS NULL OR c.hold_until <= now())
                    LIMIT :most
                ) AS found
            ) d
            WHERE b.target = :target AND b.state = 'running' AND b.cancel_requested_at IS NULL
                AND b.code_version <= :code_version AND d.due > 0
            ORDER BY b.priority DESC, b.created_at, b.id LIMIT 1000
            """,  # noqa: S608 - a constant of this module
            target=target,
            most=most,
            code_version=schema.CODE_VERSION,
        )
        return [WaitingBatch(*row) for row in rows]

    def held_by_target(self, tx: sa.Connection, target: str) -> tuple[int, int]:
        """Count a target's slots and live executions, from the rows: nothing can leak."""
        row = self.run(
            tx,
            f"""
            SELECT coalesce(sum(least(open_tasks, parallelism)), 0)::int, count(*)::int
            FROM dispatcher.execution WHERE target = :target AND state IN {LIVE}
            """,  # noqa: S608 - a constant of this module
            target=target,
        ).one()
        return row[0], row[1]

    def held_by_job(self, tx: sa.Connection, job_name: str) -> int:
        """Count the slots of a job over all its batches."""
        held: int = self.run(
            tx,
            f"""
            SELECT coalesce(sum(least(open_tasks, parallelism)), 0)::int
            FROM dispatcher.execution WHERE job_name = :job_name AND state IN {LIVE}
            """,  # noqa: S608 - a constant of this module
            job_name=job_name,
        ).scalar_one()
        return held

    def instance(self, tx: sa.Connection) -> str:
        """Read the name of this installation, by which providers know what is ours."""
        if self._instance is None:
            self._instance = self.run(
                tx, "SELECT instance FROM dispatcher.installation"
            ).scalar_one()
        return self._instance

    def anything_due(self, target: str) -> bool:
        """Say, without a lock, whether a launch of this target could find a due chunk."""
        with self.transaction() as tx:
            found: bool = self.run(
                tx,
                """
                SELECT EXISTS (
                    SELECT 1 FROM dispatcher.batch b
                    WHERE b.target = :target AND b.state = 'running'
                        AND b.cancel_requested_at IS NULL AND EXISTS (
                            SELECT 1 FROM dispatcher.chunk c
                            WHERE c.batch_id = b.id AND c.state = 'pending' AND c.due_at <= now()
                                AND (c.hold_until IS NULL OR c.hold_until <= now())
                        )
                )
                """,
                target=target,
            ).scalar_one()
            return found

    def jobs(
        self, tx: sa.Connection, batch_ids: Iterable[str]
    ) -> dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]]:
        """Read the jobs, params and labels that batches were enqueued with."""
        rows = self.run(
            tx,
            "SELECT id, job, params, labels FROM dispatcher.batch WHERE id = ANY(:ids)",
            ids=sorted(batch_ids),
        )
        return {row[0]: (row[1], row[2], row[3]) for row in rows}

    def take_tokens(self, tx: sa.Connection, target: str, left: float) -> None:
        """Write what is left in the bucket of launch calls."""
        self.run(
            tx,
            "UPDATE dispatcher.target SET tokens = :left, tokens_at = now() WHERE name = :name",
            name=target,
            left=left,
        )

    def lock_running(self, tx: sa.Connection, batch_ids: Iterable[str]) -> set[str]:
        """Lock batches that still run and are not being cancelled."""
        rows = self.run(
            tx,
            """
            SELECT id FROM dispatcher.batch
            WHERE id = ANY(:ids) AND state = 'running' AND cancel_requested_at IS NULL
            ORDER BY id FOR NO KEY UPDATE
            """,
            ids=sorted(batch_ids),
        )
        return {row[0] for row in rows}

    def claim(self, tx: sa.Connection, batch_id: str, most: int) -> list[Claimed]:
        """pending → launching for due chunks that nobody else is taking; opens a new number."""
        rows = self.run(
            tx,
            """
            WITH picked AS MATERIALIZED (
                SELECT batch_id, index FROM dispatcher.chunk
                WHERE batch_id = :batch_id AND state = 'pending' AND due_at <= now()
                    AND (hold_until IS NULL OR hold_until <= now())
                ORDER BY due_at, index LIMIT :most FOR UPDATE SKIP LOCKED
            )
            UPDATE dispatcher.chunk c
            SET state = 'launching', attempts = c.attempts + 1, hold_until = NULL, reason = NULL
            FROM picked p WHERE c.batch_id = p.batch_id AND c.index = p.index
            RETURNING c.index, c.attempts
            """,
            batch_id=batch_id,
            most=most,
        )
        return sorted(Claimed(*row) for row in rows)

    def items_of(self, tx: sa.Connection, batch_id: str, indexes: Sequence[int]) -> dict[int, str]:
        """Read the items of chunks, as JSON text."""
        rows = self.run(
            tx,
            """
            SELECT chunk_index, items::text FROM dispatcher.chunk_items
            WHERE batch_id = :batch_id AND chunk_index = ANY(:indexes)
            """,
            batch_id=batch_id,
            indexes=list(indexes),
        )
        return {row[0]: row[1] for row in rows}

    def intend(
        self,
        tx: sa.Connection,
        target: str,
        intents: Sequence[Intent],
        *,
        window: timedelta,
    ) -> dict[str, int]:
        """Write executions as intended, with their attempts; the keys' execution ids come back."""
        rows = self.run(
            tx,
            """
            WITH e AS (
                INSERT INTO dispatcher.execution (
                    key, target, batch_id, job_name, state, tasks, open_tasks, parallelism, request,
                    worker, intent_at, calls, call_by
                )
                SELECT n.key, :target, n.batch_id, n.job_name, 'intended', n.tasks, n.tasks,
                    n.parallelism, n.request::json, :actor, now(), 1,
                    now() + CAST(:window AS interval)
                FROM unnest(
                    CAST(:keys AS text[]), CAST(:batches AS text[]), CAST(:jobs AS text[]),
                    CAST(:tasks AS int[]), CAST(:parallelism AS int[]), CAST(:requests AS text[])
                ) AS n (key, batch_id, job_name, tasks, parallelism, request)
                RETURNING id, key, batch_id
            ), v AS (
                INSERT INTO dispatcher.event (at, actor, kind, batch_id, execution_id, new)
                SELECT now(), :actor, 'execution', batch_id, id, 'intended' FROM e
            )
            SELECT key, id FROM e
            """,
            target=target,
            actor=self.actor,
            window=window,
            keys=[i.key for i in intents],
            batches=[i.batch_id for i in intents],
            jobs=[i.job_name for i in intents],
            tasks=[len(i.chunks) for i in intents],
            parallelism=[i.parallelism for i in intents],
            requests=[i.request for i in intents],
        )
        ids: dict[str, int] = {row[0]: row[1] for row in rows}
        opened = [
            (i.batch_id, index, number, ids[i.key], place)
            for i in intents
            for place, (index, number) in enumerate(i.chunks)
        ]
        batches, chunks, numbers, executions, places = zip(*opened, strict=True)
        self.run(
            tx,
            """
            WITH n AS (
                SELECT * FROM unnest(
                    CAST(:batches AS text[]), CAST(:chunks AS int[]), CAST(:numbers AS int[]),
                    CAST(:executions AS bigint[]), CAST(:places AS int[])
                ) AS n (batch_id, chunk_index, number, execution_id, place)
            ), a AS (
                INSERT INTO dispatcher.attempt
                    (batch_id, chunk_index, number, execution_id, task_index, opened_at)
                SELECT batch_id, chunk_index, number, execution_id, place, now() FROM n
            )
            INSERT INTO dispatcher.event
                (at, actor, kind, batch_id, chunk_index, attempt, execution_id, old, new)
            SELECT now(), :actor, 'chunk', batch_id, chunk_index, number, execution_id,
                'pending', 'launching'
            FROM n
            """,
            actor=self.actor,
            batches=list(batches),
            chunks=list(chunks),
            numbers=list(numbers),
            executions=list(executions),
            places=list(places),
        )
        return ids

    def record_launched(
        self,
        launched: Sequence[tuple[int, Launched]],
        *,
        start_timeouts: Mapping[int, tuple[timedelta, timedelta]],
        reason: str | None = None,
    ) -> set[int]:
        """intended or unknown → launched, and its chunks launching → running.

        `start_timeouts` gives, for each execution, the time to its start deadline and from there to
        its deadline. Returns the ids that moved; for one that did not, the engine records a stray
        unless the row has this handle already.
        """
        with self.transaction() as tx:
            rows = self.run(
                tx,
                """
                WITH n AS (
                    SELECT * FROM unnest(
                        CAST(:ids AS bigint[]), CAST(:handles AS text[]),
                        CAST(:consoles AS text[]), CAST(:logs AS text[]),
                        CAST(:starts AS interval[]), CAST(:runs AS interval[])
                    ) AS n (id, handle, console_url, logs_url, start_in, run_in)
                ), l AS MATERIALIZED (
                    SELECT e.id, e.state AS old FROM dispatcher.execution e JOIN n USING (id)
                    WHERE e.state IN ('intended', 'unknown') ORDER BY e.id FOR UPDATE OF e
                ), e AS (
                    UPDATE dispatcher.execution e
                    SET state = 'launched', handle = n.handle, console_url = n.console_url,
                        logs_url = n.logs_url, launched_at = now(), next_call_at = NULL,
                        next_look_at = NULL, start_deadline = now() + n.start_in,
                        deadline = now() + n.start_in + n.run_in, reason = NULL,
                        next_cancel_at = CASE WHEN e.cancel_requested_at IS NULL THEN NULL
                            ELSE now() END
                    FROM n JOIN l USING (id) WHERE e.id = n.id
                    RETURNING e.id, e.batch_id, l.old
                ), c AS (
                    UPDATE dispatcher.chunk c SET state = 'running'
                    FROM dispatcher.attempt a JOIN e ON e.id = a.execution_id
                    WHERE a.outcome IS NULL AND c.batch_id = a.batch_id
                        AND c.index = a.chunk_index AND c.state = 'launching'
                    RETURNING c.batch_id, c.index, a.number, a.execution_id
                ), v AS (
                    INSERT INTO dispatcher.event (
                        at, actor, kind, batch_id, chunk_index, attempt, execution_id, old, new,
                        reason
                    )
                    SELECT now(), :actor, 'execution', batch_id, NULL::int, NULL::int, id, old,
                        'launched', :reason
                    FROM e
                    UNION ALL
                    SELECT now(), :actor, 'chunk', batch_id, index, number, execution_id,
                        'launching', 'running', NULL
                    FROM c
                )
                SELECT id FROM e
                """,
                ids=[i for i, _ in launched],
                handles=[found.handle for _, found in launched],
                consoles=[found.console_url for _, found in launched],
                logs=[found.logs_url for _, found in launched],
                starts=[start_timeouts[i][0] for i, _ in launched],
                runs=[start_timeouts[i][1] for i, _ in launched],
                actor=self.actor,
                reason=reason,
            )
            return {row[0] for row in rows}

    def record_stray(self, target: str, found: Launched, reason: str) -> bool:
        """Write an execution that no open attempt owns, to be cancelled until that is confirmed.

        False if it is known already: the handle belongs to a live row or to a stray of this key.
        """
        with self.transaction() as tx:
            rows = self.run(
                tx,
                f"""
                WITH owner AS (
                    SELECT id, batch_id, job_name FROM dispatcher.execution WHERE key = :key
                ), s AS (
                    INSERT INTO dispatcher.execution (
                        key, target, batch_id, job_name, state, stray, tasks, open_tasks,
                        parallelism, handle, console_url, logs_url, intent_at, launched_at,
                        cancel_requested_at, cancel_kind, next_cancel_at, reason
                    )
                    SELECT :key || '/stray/' || md5(:handle), :target,
                        (SELECT batch_id FROM owner), (SELECT job_name FROM owner), 'launched',
                        true, 1, 1, 1, :handle, :console_url, :logs_url, now(), now(), now(),
                        'stray', now(), :reason
                    WHERE NOT EXISTS (
                        SELECT 1 FROM dispatcher.execution
                        WHERE key = :key AND state IN {LIVE}
                            AND (handle IS NULL OR handle = :handle)
                    )
                    ON CONFLICT (key) DO UPDATE
                    SET state = 'launched', open_tasks = 1, finished_at = NULL, absent_since = NULL,
                        cancel_requested_at = now(), next_cancel_at = now()
                    WHERE dispatcher.execution.state = 'ended'
                    RETURNING id, batch_id
                ), v AS (
                    INSERT INTO dispatcher.event
                        (at, actor, kind, batch_id, execution_id, new, reason)
                    SELECT now(), :actor, 'execution', batch_id, id, 'launched', :reason FROM s
                )
                SELECT id FROM s
                """,  # noqa: S608 - a constant of this module
                key=found.key,
                handle=found.handle,
                console_url=found.console_url,
                logs_url=found.logs_url,
                target=target,
                actor=self.actor,
                reason=reason,
            )
            return rows.first() is not None

    def record_unknown(self, reasons: Mapping[int, str]) -> None:
        """intended → unknown: the answer leaves open whether something was started."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                WITH e AS (
                    UPDATE dispatcher.execution e
                    SET state = 'unknown', looks = 0, next_look_at = now(), reason = n.reason
                    FROM unnest(CAST(:ids AS bigint[]), CAST(:reasons AS text[])) AS n (id, reason)
                    WHERE e.id = n.id AND e.state = 'intended'
                    RETURNING e.id, e.batch_id, n.reason
                )
                INSERT INTO dispatcher.event
                    (at, actor, kind, batch_id, execution_id, old, new, reason)
                SELECT now(), :actor, 'execution', batch_id, id, 'intended', 'unknown', reason
                FROM e
                """,
                ids=list(reasons),
                reasons=list(reasons.values()),
                actor=self.actor,
            )

    def postpone_calls(self, postponed: Mapping[int, tuple[float, str]]) -> None:
        """Keep executions intended and move their next call: the provider clearly refused for now.

        Costs no attempt: the key, the attempts and the chunks stay as they are.
        """
        with self.transaction() as tx:
            self.run(
                tx,
                """
                WITH e AS (
                    UPDATE dispatcher.execution e
                    SET call_by = NULL, next_call_at = now() + n.seconds * interval '1 second',
                        reason = n.reason
                    FROM unnest(
                        CAST(:ids AS bigint[]), CAST(:seconds AS float8[]), CAST(:reasons AS text[])
                    ) AS n (id, seconds, reason)
                    WHERE e.id = n.id AND e.state = 'intended'
                    RETURNING e.id, e.batch_id, n.reason
                )
                INSERT INTO dispatcher.event (at, actor, kind, batch_id, execution_id, reason)
                SELECT now(), :actor, 'execution', batch_id, id, reason FROM e
                """,
                ids=list(postponed),
                seconds=[seconds for seconds, _ in postponed.values()],
                reasons=[reason for _, reason in postponed.values()],
                actor=self.actor,
            )

    def expire_calls(self, target: str) -> int:
        """intended → unknown where `call_by` passed: the launcher died, or sleeps."""
        with self.transaction() as tx:
            moved = self.run(
                tx,
                """
                WITH e AS (
                    UPDATE dispatcher.execution
                    SET state = 'unknown', looks = 0, next_look_at = now(),
                        reason = 'no answer to the launch call was recorded in time'
                    WHERE target = :target AND state = 'intended' AND call_by < now()
                    RETURNING id, batch_id, reason
                )
                INSERT INTO dispatcher.event
                    (at, actor, kind, batch_id, execution_id, old, new, reason)
                SELECT now(), :actor, 'execution', batch_id, id, 'intended', 'unknown', reason
                FROM e
                """,
                target=target,
                actor=self.actor,
            )
            return moved.rowcount

    def call_again(self, execution_id: int, *, old: str, window: timedelta, reason: str) -> bool:
        """intended (throttled) or unknown (not found) → intended, with the same key."""
        with self.transaction() as tx:
            moved = self.run(
                tx,
                """
                WITH e AS (
                    UPDATE dispatcher.execution
                    SET state = 'intended', call_by = now() + CAST(:window AS interval),
                        next_call_at = NULL, next_look_at = NULL, calls = calls + 1,
                        worker = :actor, reason = NULL
                    WHERE id = :id AND state = :old AND cancel_requested_at IS NULL
                        AND (call_by IS NULL OR call_by < now())
                    RETURNING id, batch_id
                ), v AS (
                    INSERT INTO dispatcher.event
                        (at, actor, kind, batch_id, execution_id, old, new, reason)
                    SELECT now(), :actor, 'execution', batch_id, id, :old, 'intended', :reason
                    FROM e
                )
                SELECT id FROM e
                """,
                id=execution_id,
                old=old,
                window=window,
                actor=self.actor,
                reason=reason,
            )
            return moved.first() is not None

    def looked(self, execution_id: int, delay: float) -> None:
        """Count a look that found nothing, and set the next one."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                UPDATE dispatcher.execution
                SET looks = looks + 1, next_look_at = now() + :delay * interval '1 second'
                WHERE id = :id AND state = 'unknown'
                """,
                id=execution_id,
                delay=delay,
            )

    def postpone_look(self, execution_id: int, delay: float) -> None:
        """Look again later: the provider could not say. Not a look that found nothing."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                UPDATE dispatcher.execution
                SET next_look_at = now() + :delay * interval '1 second'
                WHERE id = :id AND state = 'unknown'
                """,
                id=execution_id,
                delay=delay,
            )

    def chunks_of(self, tx: sa.Connection, execution_id: int) -> list[Claimed]:
        """Read the chunks of an execution by task index, to write its request again."""
        rows = self.run(
            tx,
            """
            SELECT chunk_index, number FROM dispatcher.attempt
            WHERE execution_id = :id ORDER BY task_index
            """,
            id=execution_id,
        )
        return [Claimed(*row) for row in rows]

    # ---------------------------------------------------------------- poll

    def live_ids(self, target: str) -> list[int]:
        """Read which executions of a target are launched: one array, cheap at ten thousand."""
        with self.transaction() as tx:
            ids = self.run(
                tx,
                """
                SELECT array_agg(id) FROM dispatcher.execution
                WHERE target = :target AND state = 'launched'
                """,
                target=target,
            ).scalar_one()
            return ids or []

    def executions(self, ids: Sequence[int]) -> list[ExecutionRow]:
        """Read executions."""
        with self.transaction() as tx:
            rows = self.run(
                tx,
                f"SELECT {EXECUTION_COLUMNS} FROM dispatcher.execution e "  # noqa: S608 - constant
                "WHERE e.id = ANY(:ids)",
                ids=list(ids),
            )
            return [ExecutionRow(*row) for row in rows]

    def settled_tasks(self, ids: Sequence[int]) -> dict[int, set[int]]:
        """Read which tasks of packed executions are settled already."""
        with self.transaction() as tx:
            rows = self.run(
                tx,
                """
                SELECT execution_id, array_agg(task_index) FROM dispatcher.attempt
                WHERE execution_id = ANY(:ids) AND outcome IS NOT NULL GROUP BY execution_id
                """,
                ids=list(ids),
            )
            return {row[0]: set(row[1]) for row in rows}

    def mark_started(self, started: Mapping[int, datetime | None]) -> None:
        """Record that executions have started; where the provider says no time, it is now."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                UPDATE dispatcher.execution e SET started_at = coalesce(n.started_at, now())
                FROM unnest(CAST(:ids AS bigint[]), CAST(:times AS timestamptz[]))
                    AS n (id, started_at)
                WHERE e.id = n.id AND e.state = 'launched' AND e.started_at IS NULL
                """,
                ids=list(started),
                times=list(started.values()),
            )

    def mark_absent(self, ids: Sequence[int]) -> None:
        """Record since when the provider does not know executions; the grace counts from there."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                WITH e AS (
                    UPDATE dispatcher.execution SET absent_since = now()
                    WHERE id = ANY(:ids) AND state = 'launched' AND absent_since IS NULL
                    RETURNING id, batch_id
                )
                INSERT INTO dispatcher.event (at, actor, kind, batch_id, execution_id, reason)
                SELECT now(), :actor, 'execution', batch_id, id, 'the provider does not know it'
                FROM e
                """,
                ids=list(ids),
                actor=self.actor,
            )

    def mark_present(self, ids: Sequence[int]) -> None:
        """Take back an absence: it was seen again."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                UPDATE dispatcher.execution SET absent_since = NULL
                WHERE id = ANY(:ids) AND absent_since IS NOT NULL
                """,
                ids=list(ids),
            )

    # ---------------------------------------------------------------- settle

    def lock_batches_of(
        self, tx: sa.Connection, execution_ids: Sequence[int]
    ) -> dict[str, str | None]:
        """Lock the batches of executions: one settle at a time decides on the last chunk.

        Returns for each what asked for its cancel, if anything did.
        """
        rows = self.run(
            tx,
            """
            SELECT id, cancel_kind FROM dispatcher.batch WHERE id IN (
                SELECT batch_id FROM dispatcher.execution WHERE id = ANY(:ids)
            ) ORDER BY id FOR NO KEY UPDATE
            """,
            ids=list(execution_ids),
        )
        return {row[0]: row[1] for row in rows}

    def lock_executions(
        self, tx: sa.Connection, execution_ids: Sequence[int]
    ) -> dict[int, ExecutionRow]:
        """Lock live executions by id, after their batches."""
        rows = self.run(
            tx,
            f"SELECT {EXECUTION_COLUMNS} FROM dispatcher.execution e "  # noqa: S608 - constants
            f"WHERE e.id = ANY(:ids) AND e.state IN {LIVE} ORDER BY e.id FOR UPDATE OF e",
            ids=list(execution_ids),
        )
        return {row[0]: ExecutionRow(*row) for row in rows}

    def open_attempts(
        self, tx: sa.Connection, execution_ids: Sequence[int]
    ) -> dict[tuple[int, int], OpenAttempt]:
        """Read the open attempts of locked executions, by execution and task index."""
        rows = self.run(
            tx,
            """
            SELECT a.batch_id, a.chunk_index, a.number, a.execution_id, a.task_index, c.budget_from
            FROM dispatcher.attempt a
            JOIN dispatcher.chunk c ON c.batch_id = a.batch_id AND c.index = a.chunk_index
            WHERE a.execution_id = ANY(:ids) AND a.outcome IS NULL
            """,
            ids=list(execution_ids),
        )
        return {(row[3], row[4]): OpenAttempt(*row) for row in rows}

    def tallies(
        self, tx: sa.Connection, attempts: Sequence[OpenAttempt]
    ) -> dict[tuple[str, int], dict[str, int]]:
        """Count the outcomes of chunks by kind, since the last operator's retry."""
        rows = self.run(
            tx,
            """
            SELECT a.batch_id, a.chunk_index, a.outcome, count(*)::int
            FROM unnest(CAST(:batches AS text[]), CAST(:chunks AS int[]), CAST(:froms AS int[]))
                AS n (batch_id, chunk_index, budget_from)
            JOIN dispatcher.attempt a ON a.batch_id = n.batch_id
                AND a.chunk_index = n.chunk_index AND a.number > n.budget_from
            WHERE a.outcome IS NOT NULL
            GROUP BY a.batch_id, a.chunk_index, a.outcome
            """,
            batches=[a.batch_id for a in attempts],
            chunks=[a.chunk_index for a in attempts],
            froms=[a.budget_from for a in attempts],
        )
        counted: dict[tuple[str, int], dict[str, int]] = {}
        for batch_id, index, outcome, count in rows:
            counted.setdefault((batch_id, index), {})[outcome] = count
        return counted

    def close_attempts(self, tx: sa.Connection, moved: Sequence[MovedChunk]) -> None:
        """Close attempts and move their chunks; the batches and executions are locked."""
        closings = [m.closing for m in moved]
        attempts = [c.attempt for c in closings]
        self.run(
            tx,
            """
            WITH n AS MATERIALIZED (
                SELECT * FROM unnest(
                    CAST(:batches AS text[]), CAST(:chunks AS int[]), CAST(:numbers AS int[]),
                    CAST(:executions AS bigint[]), CAST(:outcomes AS text[]),
                    CAST(:exit_codes AS int[]), CAST(:attempt_reasons AS text[]),
                    CAST(:started AS timestamptz[]), CAST(:ended AS timestamptz[]),
                    CAST(:results AS text[]), CAST(:states AS text[]), CAST(:reasons AS text[]),
                    CAST(:delays AS float8[]), CAST(:holds AS float8[])
                ) AS n (
                    batch_id, chunk_index, number, execution_id, outcome, exit_code, attempt_reason,
                    started_at, ended_at, result_uri, state, reason, delay, hold
                )
            ), a AS (
                UPDATE dispatcher.attempt a
                SET outcome = n.outcome, exit_code = n.exit_code, reason = n.attempt_reason,
                    started_at = n.started_at, ended_at = n.ended_at, settled_at = now(),
                    result_uri = n.result_uri
                FROM n
                WHERE a.batch_id = n.batch_id AND a.chunk_index = n.chunk_index
                    AND a.number = n.number AND a.outcome IS NULL
            ), old AS MATERIALIZED (
                SELECT c.batch_id, c.index, c.state FROM dispatcher.chunk c
                JOIN n ON c.batch_id = n.batch_id AND c.index = n.chunk_index
                WHERE c.state IN ('launching', 'running')
                ORDER BY c.batch_id, c.index FOR UPDATE OF c
            ), c AS (
                UPDATE dispatcher.chunk c
                SET state = n.state, outcome = n.outcome, reason = n.reason,
                    due_at = CASE WHEN n.state = 'pending'
                        THEN now() + n.delay * interval '1 second' ELSE c.due_at END,
                    hold_until = CASE WHEN n.state = 'pending'
                        THEN now() + n.hold * interval '1 second' END,
                    finished_at = CASE WHEN n.state = 'pending' THEN NULL ELSE now() END
                FROM n JOIN old ON old.batch_id = n.batch_id AND old.index = n.chunk_index
                WHERE c.batch_id = n.batch_id AND c.index = n.chunk_index
                RETURNING c.batch_id, c.index, n.number, n.execution_id, old.state AS old,
                    n.state AS new, n.reason
            )
            INSERT INTO dispatcher.event
                (at, actor, kind, batch_id, chunk_index, attempt, execution_id, old, new, reason)
            SELECT now(), :actor, 'chunk', batch_id, index, number, execution_id, old, new, reason
            FROM c
            """,
            actor=self.actor,
            batches=[a.batch_id for a in attempts],
            chunks=[a.chunk_index for a in attempts],
            numbers=[a.number for a in attempts],
            executions=[a.execution_id for a in attempts],
            outcomes=[str(c.outcome) for c in closings],
            exit_codes=[c.exit_code for c in closings],
            attempt_reasons=[c.reason for c in closings],
            started=[c.started_at for c in closings],
            ended=[c.ended_at for c in closings],
            results=[c.result_uri for c in closings],
            states=[str(m.state) for m in moved],
            reasons=[m.reason for m in moved],
            delays=[m.delay for m in moved],
            holds=[m.hold for m in moved],
        )

    def finish_tasks(
        self,
        tx: sa.Connection,
        closed: Mapping[int, int],
        ended: Mapping[int, str | None],
        started: Mapping[int, datetime | None],
    ) -> None:
        """Give back the slots of closed tasks, and end executions of which nothing runs any more.

        `closed` counts the tasks closed now; `ended` gives the reason, if any, of those that end.
        """
        self.run(
            tx,
            """
            WITH n AS MATERIALIZED (
                SELECT * FROM unnest(
                    CAST(:ids AS bigint[]), CAST(:closed AS int[]), CAST(:ended AS bool[]),
                    CAST(:reasons AS text[]), CAST(:started AS timestamptz[])
                ) AS n (id, closed, ended, reason, started_at)
            ), old AS MATERIALIZED (
                SELECT e.id, e.state FROM dispatcher.execution e JOIN n USING (id)
            ), e AS (
                UPDATE dispatcher.execution e
                SET open_tasks = CASE WHEN n.ended THEN 0 ELSE e.open_tasks - n.closed END,
                    state = CASE WHEN n.ended THEN 'ended' ELSE e.state END,
                    finished_at = CASE WHEN n.ended THEN now() END,
                    next_cancel_at = CASE WHEN n.ended THEN NULL ELSE e.next_cancel_at END,
                    next_call_at = CASE WHEN n.ended THEN NULL ELSE e.next_call_at END,
                    next_look_at = CASE WHEN n.ended THEN NULL ELSE e.next_look_at END,
                    reason = coalesce(n.reason, e.reason),
                    started_at = coalesce(e.started_at, n.started_at)
                FROM n WHERE e.id = n.id
                RETURNING e.id, e.batch_id, n.ended, n.reason
            )
            INSERT INTO dispatcher.event
                (at, actor, kind, batch_id, execution_id, old, new, reason)
            SELECT now(), :actor, 'execution', e.batch_id, e.id, old.state, 'ended', e.reason
            FROM e JOIN old USING (id) WHERE e.ended
            """,
            actor=self.actor,
            ids=list(closed),
            closed=list(closed.values()),
            ended=[i in ended for i in closed],
            reasons=[ended.get(i) for i in closed],
            started=[started.get(i) for i in closed],
        )

    def release_packs(self, tx: sa.Connection, execution_ids: Sequence[int]) -> None:
        """Let retries go that waited for company from executions that have now ended."""
        self.run(
            tx,
            """
            UPDATE dispatcher.chunk c SET hold_until = NULL
            FROM dispatcher.attempt a
            WHERE a.execution_id = ANY(:ids) AND c.batch_id = a.batch_id
                AND c.index = a.chunk_index AND c.state = 'pending' AND c.hold_until IS NOT NULL
                AND c.attempts = a.number
            """,
            ids=list(execution_ids),
        )

    def release_full_pack(self, tx: sa.Connection, batch_id: str, pack: int) -> None:
        """Let retries go that waited for company, once there are enough of them for a pack."""
        self.run(
            tx,
            """
            UPDATE dispatcher.chunk SET hold_until = NULL
            WHERE batch_id = :batch_id AND state = 'pending' AND hold_until IS NOT NULL
                AND (
                    SELECT count(*) FROM dispatcher.chunk
                    WHERE batch_id = :batch_id AND state = 'pending' AND hold_until IS NOT NULL
                ) >= :pack
            """,
            batch_id=batch_id,
            pack=pack,
        )

    def finished_batches(
        self, tx: sa.Connection, batch_ids: Iterable[str]
    ) -> list[BatchVerdictRow]:
        """Find locked running batches with no open chunk, with what their chunks came to."""
        done = self.run(
            tx,
            f"""
            SELECT b.id FROM dispatcher.batch b
            WHERE b.id = ANY(:ids) AND b.state = 'running' AND NOT EXISTS (
                SELECT 1 FROM dispatcher.chunk c WHERE c.batch_id = b.id AND c.state IN {OPEN}
            ) ORDER BY b.id
            """,  # noqa: S608 - a constant of this module
            ids=sorted(set(batch_ids)),
        )
        ids = [row[0] for row in done]
        if not ids:
            return []
        rows = self.run(
            tx,
            """
            SELECT b.id, b.max_failed_chunks, b.cancel_kind, b.cancel_reason,
                count(*) FILTER (WHERE c.state = 'succeeded')::int,
                count(*) FILTER (WHERE c.state = 'failed')::int,
                count(*) FILTER (WHERE c.state = 'cancelled')::int,
                (array_agg(c.reason ORDER BY c.index) FILTER (WHERE c.state = 'failed'))[1]
            FROM dispatcher.batch b JOIN dispatcher.chunk c ON c.batch_id = b.id
            WHERE b.id = ANY(:ids)
            GROUP BY b.id, b.max_failed_chunks, b.cancel_kind, b.cancel_reason
            """,
            ids=ids,
        )
        return [BatchVerdictRow(*row) for row in rows]

    def end_batch(
        self, tx: sa.Connection, batch_id: str, state: BatchState, reason: str | None
    ) -> bool:
        """running → a final state."""
        moved = self.run(
            tx,
            """
            WITH b AS (
                UPDATE dispatcher.batch SET state = :state, reason = :reason, finished_at = now()
                WHERE id = :id AND state = 'running' RETURNING id
            ), e AS (
                INSERT INTO dispatcher.event (at, actor, kind, batch_id, old, new, reason)
                SELECT now(), :actor, 'batch', id, 'running', :state, :reason FROM b
            )
            SELECT id FROM b
            """,
            id=batch_id,
            state=state,
            reason=reason,
            actor=self.actor,
        )
        return moved.first() is not None

    def attach_log(self, attempt: OpenAttempt, tail: str) -> None:
        """Keep the last lines of an attempt that ended badly."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                UPDATE dispatcher.attempt SET log_tail = :tail
                WHERE batch_id = :batch_id AND chunk_index = :chunk_index AND number = :number
                """,
                batch_id=attempt.batch_id,
                chunk_index=attempt.chunk_index,
                number=attempt.number,
                tail=tail,
            )

    # ---------------------------------------------------------------- cancel

    def request_cancel(
        self,
        tx: sa.Connection,
        batch_id: str,
        kind: CancelKind,
        reason: str,
        actor: str | None = None,
    ) -> BatchState | None:
        """Store the intent on a batch; its pending chunks end at once.

        Returns the state the batch had, or None if there is no such batch; a final one is left
        alone. The caller ends the batch if no chunk of it is open.
        """
        who = actor or self.actor
        state = self.run(
            tx,
            "SELECT state FROM dispatcher.batch WHERE id = :id FOR NO KEY UPDATE",
            id=batch_id,
        ).scalar_one_or_none()
        if state not in (BatchState.PLANNING, BatchState.RUNNING):
            return None if state is None else BatchState(state)
        self.run(
            tx,
            """
            WITH b AS (
                UPDATE dispatcher.batch
                SET cancel_requested_at = now(), cancel_kind = :kind, cancel_reason = :reason
                WHERE id = :id AND cancel_requested_at IS NULL RETURNING id
            )
            INSERT INTO dispatcher.event (at, actor, kind, batch_id, reason)
            SELECT now(), :actor, 'batch', id, :reason FROM b
            """,
            id=batch_id,
            kind=kind,
            reason=reason,
            actor=who,
        )
        if state == BatchState.PLANNING:
            final = BatchState.CANCELLED if kind is CancelKind.OPERATOR else BatchState.FAILED
            self._end_planning(tx, batch_id, final, reason)
            return BatchState.PLANNING
        self.run(
            tx,
            f"""
            WITH l AS MATERIALIZED (
                SELECT id FROM dispatcher.execution
                WHERE batch_id = :id AND state IN {LIVE} AND cancel_requested_at IS NULL
                ORDER BY id FOR UPDATE
            )
            UPDATE dispatcher.execution e
            SET cancel_requested_at = now(), cancel_kind = :kind, next_cancel_at = now(),
                next_look_at = CASE WHEN e.state = 'unknown' THEN now() END
            FROM l WHERE e.id = l.id
            """,  # noqa: S608 - a constant of this module
            id=batch_id,
            kind=kind,
        )
        self.run(
            tx,
            """
            WITH l AS MATERIALIZED (
                SELECT batch_id, index FROM dispatcher.chunk
                WHERE batch_id = :id AND state = 'pending' ORDER BY index FOR UPDATE
            ), c AS (
                UPDATE dispatcher.chunk c
                SET state = :state, reason = :reason, finished_at = now(), hold_until = NULL
                FROM l WHERE c.batch_id = l.batch_id AND c.index = l.index
                RETURNING c.batch_id, c.index
            )
            INSERT INTO dispatcher.event
                (at, actor, kind, batch_id, chunk_index, old, new, reason)
            SELECT now(), :actor, 'chunk', batch_id, index, 'pending', :state, :reason FROM c
            """,
            id=batch_id,
            state=ChunkState.CANCELLED if kind is CancelKind.OPERATOR else ChunkState.FAILED,
            reason=reason,
            actor=who,
        )
        return BatchState.RUNNING

    def cancel_executions(self, ids: Sequence[int], kind: CancelKind, reason: str) -> None:
        """Ask for the end of executions for a reason of their own."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                WITH l AS MATERIALIZED (
                    SELECT id FROM dispatcher.execution
                    WHERE id = ANY(:ids) AND state = 'launched' AND cancel_requested_at IS NULL
                    ORDER BY id FOR UPDATE
                ), e AS (
                    UPDATE dispatcher.execution e
                    SET cancel_requested_at = now(), cancel_kind = :kind, next_cancel_at = now(),
                        reason = :reason
                    FROM l WHERE e.id = l.id RETURNING e.id, e.batch_id
                )
                INSERT INTO dispatcher.event (at, actor, kind, batch_id, execution_id, reason)
                SELECT now(), :actor, 'execution', batch_id, id, :reason FROM e
                """,
                ids=list(ids),
                kind=kind,
                reason=reason,
                actor=self.actor,
            )

    def cancel_sent(self, next_in: Mapping[int, float]) -> set[int]:
        """Write that cancel calls are about to be made, and in how many seconds the next are due.

        Returns the executions that still want it.
        """
        with self.transaction() as tx:
            rows = self.run(
                tx,
                """
                UPDATE dispatcher.execution e
                SET cancel_sent_at = coalesce(cancel_sent_at, now()),
                    cancel_calls = cancel_calls + 1,
                    next_cancel_at = now() + n.next_in * interval '1 second'
                FROM unnest(CAST(:ids AS bigint[]), CAST(:next_in AS float8[])) AS n (id, next_in)
                WHERE e.id = n.id AND e.state = 'launched' AND e.cancel_requested_at IS NOT NULL
                RETURNING e.id
                """,
                ids=list(next_in),
                next_in=list(next_in.values()),
            )
            return {row[0] for row in rows}

    # ---------------------------------------------------------------- retry by an operator

    def retry(
        self,
        tx: sa.Connection,
        batch_id: str,
        *,
        failed_only: bool,
        actor: str,
        deadline: timedelta,
    ) -> tuple[BatchState, int] | None:
        """Reopen a final batch: its failed and cancelled chunks, or all of them, are due again.

        Returns the state it had and the chunks that return to pending, or None if there is no such
        batch. Earlier outcomes no longer count against the budgets.
        """
        state = self.run(
            tx,
            "SELECT state FROM dispatcher.batch WHERE id = :id FOR NO KEY UPDATE",
            id=batch_id,
        ).scalar_one_or_none()
        if state is None:
            return None
        if state in (BatchState.PLANNING, BatchState.RUNNING):
            return BatchState(state), 0
        moved = self.run(
            tx,
            """
            WITH l AS MATERIALIZED (
                SELECT batch_id, index, state FROM dispatcher.chunk
                WHERE batch_id = :id AND state = ANY(:states) ORDER BY index FOR UPDATE
            ), c AS (
                UPDATE dispatcher.chunk c
                SET state = 'pending', budget_from = c.attempts, due_at = now(), reason = NULL,
                    hold_until = NULL, finished_at = NULL
                FROM l WHERE c.batch_id = l.batch_id AND c.index = l.index
                RETURNING c.batch_id, c.index, l.state AS old
            ), e AS (
                INSERT INTO dispatcher.event
                    (at, actor, kind, batch_id, chunk_index, old, new, reason)
                SELECT now(), :actor, 'chunk', batch_id, index, old, 'pending', 'retry' FROM c
            )
            SELECT count(*)::int FROM c
            """,
            id=batch_id,
            actor=actor,
            states=["failed", "cancelled", *([] if failed_only else ["succeeded"])],
        ).scalar_one()
        new = BatchState.RUNNING
        if moved == 0:
            never_planned = self.run(
                tx,
                """
                SELECT planned_at IS NULL FROM dispatcher.batch
                WHERE id = :id AND state IN ('failed', 'cancelled')
                """,
                id=batch_id,
            ).scalar_one_or_none()
            if not never_planned:
                return BatchState(state), 0
            new = BatchState.PLANNING
        self.run(
            tx,
            """
            WITH b AS (
                UPDATE dispatcher.batch
                SET state = :new, reason = NULL, finished_at = NULL, cancel_requested_at = NULL,
                    cancel_kind = NULL, cancel_reason = NULL, plan_tries = 0, plan_after = NULL,
                    deadline = now() + CAST(:deadline AS interval)
                WHERE id = :id AND state = :state RETURNING id
            )
            INSERT INTO dispatcher.event (at, actor, kind, batch_id, old, new, reason)
            SELECT now(), :actor, 'batch', id, :state, :new, 'retry' FROM b
            """,
            id=batch_id,
            state=state,
            new=new,
            deadline=deadline,
            actor=actor,
        )
        return BatchState(state), int(moved) if new is BatchState.RUNNING else 1

    # ---------------------------------------------------------------- sweep

    def due(self, target: str) -> dict[str, list[ExecutionRow]]:
        """Find the executions of a target that something is due for, by what it is."""
        with self.transaction() as tx:
            rows = self.run(
                tx,
                f"""
                SELECT w.what, {EXECUTION_COLUMNS}
                FROM dispatcher.execution e CROSS JOIN LATERAL (
                    SELECT CASE
                        WHEN e.state = 'unknown' AND e.next_look_at <= now() THEN 'look'
                        WHEN e.state = 'intended' AND e.call_by IS NULL
                            AND e.cancel_requested_at IS NOT NULL THEN 'uncalled'
                        WHEN e.state = 'intended' AND e.next_call_at <= now() THEN 'call'
                        WHEN e.state = 'launched' AND e.next_cancel_at <= now() THEN 'cancel'
                        WHEN e.state = 'launched' AND e.cancel_requested_at IS NULL
                            AND e.started_at IS NULL AND e.start_deadline <= now()
                            THEN 'start_timeout'
                        WHEN e.state = 'launched' AND e.cancel_requested_at IS NULL
                            AND e.deadline <= now() THEN 'timeout'
                    END AS what
                ) w
                WHERE e.target = :target AND e.state IN {LIVE} AND w.what IS NOT NULL
                ORDER BY e.id LIMIT 1000
                """,  # noqa: S608 - constants of this module
                target=target,
            )
            found: dict[str, list[ExecutionRow]] = {}
            for what, *columns in rows:
                found.setdefault(what, []).append(ExecutionRow(*columns))
            return found

    def overdue_batches(self) -> list[str]:
        """Find batches whose deadline passed and that nobody cancels yet."""
        with self.transaction() as tx:
            rows = self.run(
                tx,
                """
                SELECT id FROM dispatcher.batch
                WHERE state IN ('planning', 'running') AND cancel_requested_at IS NULL
                    AND deadline <= now()
                ORDER BY id LIMIT 100
                """,
            )
            return [row[0] for row in rows]

    def stalled_batches(self) -> list[str]:
        """Find running batches with no open chunk: a crash came before their last move."""
        with self.transaction() as tx:
            rows = self.run(
                tx,
                f"""
                SELECT b.id FROM dispatcher.batch b
                WHERE b.state = 'running' AND NOT EXISTS (
                    SELECT 1 FROM dispatcher.chunk c WHERE c.batch_id = b.id AND c.state IN {OPEN}
                ) ORDER BY b.id LIMIT 100
                """,  # noqa: S608 - a constant of this module
            )
            return [row[0] for row in rows]

    def lock_batches(self, tx: sa.Connection, batch_ids: Sequence[str]) -> None:
        """Lock batches by id."""
        self.run(
            tx,
            """
            SELECT id FROM dispatcher.batch WHERE id = ANY(:ids) ORDER BY id FOR NO KEY UPDATE
            """,
            ids=list(batch_ids),
        )

    def known_keys(self, keys: Sequence[str]) -> dict[str, tuple[str, str | None]]:
        """Read state and handle of executions by key."""
        with self.transaction() as tx:
            rows = self.run(
                tx,
                "SELECT key, state, handle FROM dispatcher.execution WHERE key = ANY(:keys)",
                keys=list(keys),
            )
            return {row[0]: (row[1], row[2]) for row in rows}

    # ---------------------------------------------------------------- workers and targets

    def beat(self, *, host: str, pid: int, version: str, problems: Mapping[str, str]) -> None:
        """Write this worker's heartbeat."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                INSERT INTO dispatcher.worker
                    (id, host, pid, version, code_version, problems, started_at, heartbeat_at)
                VALUES (:id, :host, :pid, :version, :code_version, CAST(:problems AS json), now(),
                    now())
                ON CONFLICT (id) DO UPDATE
                SET heartbeat_at = now(), problems = excluded.problems, stopped_at = NULL
                """,
                id=self.actor,
                host=host,
                pid=pid,
                version=version,
                code_version=schema.CODE_VERSION,
                problems=json.dumps(dict(problems)),
            )

    def forget_workers(self, silent: timedelta) -> None:
        """Drop the rows of workers that stopped or fell silent long ago."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                DELETE FROM dispatcher.worker
                WHERE heartbeat_at < now() - CAST(:silent AS interval)
                """,
                silent=silent,
            )

    def lease(
        self,
        target: str,
        *,
        backend: str,
        limits: Mapping[str, Any],
        home: Mapping[str, str] | None,
        lease: timedelta,
    ) -> str | None:
        """Take or renew a target's lease; None if it is ours now, else why it is not.

        A target with a home is served only there. When its machine was rebooted or its container
        restarted, the same host takes over as soon as the old lease has run out.
        """
        with self.transaction() as tx:
            self.run(
                tx,
                """
                INSERT INTO dispatcher.target (name, backend, limits, home)
                VALUES (:name, :backend, CAST(:limits AS json), CAST(:home AS json))
                ON CONFLICT (name) DO NOTHING
                """,
                name=target,
                backend=backend,
                limits=json.dumps(dict(limits)),
                home=None if home is None else json.dumps(dict(home)),
            )
            row = self.run(
                tx,
                """
                SELECT home, lease_owner, coalesce(lease_until > now(), false)
                FROM dispatcher.target WHERE name = :name FOR UPDATE
                """,
                name=target,
            ).one()
            theirs, owner, leased = row
            if theirs is not None and (home is None or theirs.get("host") != home.get("host")):
                return f"target {target} can be served only on host {theirs.get('host')}"
            if leased and owner != self.actor:
                return f"target {target} is led by {owner}"
            self.run(
                tx,
                """
                UPDATE dispatcher.target
                SET lease_until = now() + CAST(:lease AS interval), lease_owner = :actor,
                    lease_token = lease_token + CASE WHEN lease_owner = :actor THEN 0 ELSE 1 END,
                    backend = :backend, limits = CAST(:limits AS json), home = CAST(:home AS json)
                WHERE name = :name
                """,
                name=target,
                backend=backend,
                limits=json.dumps(dict(limits)),
                home=None if home is None else json.dumps(dict(home)),
                lease=lease,
                actor=self.actor,
            )
            return None

    def release(self) -> None:
        """Give up this worker's leases and say that it stopped, so that others go on at once."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                UPDATE dispatcher.target SET lease_until = now(), lease_owner = NULL
                WHERE lease_owner = :actor
                """,
                actor=self.actor,
            )
            self.run(
                tx,
                "UPDATE dispatcher.worker SET stopped_at = now() WHERE id = :actor",
                actor=self.actor,
            )

    def target_down(self, name: str, reason: str, *, resume_in: float | None) -> None:
        """Record that a target does not answer; with `resume_in`, hold its launches that long."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                WITH old AS (
                    SELECT name FROM dispatcher.target WHERE name = :name AND down_since IS NULL
                ), t AS (
                    UPDATE dispatcher.target
                    SET down_since = coalesce(down_since, now()), down_reason = :reason,
                        down_calls = down_calls + 1,
                        resume_at = CASE WHEN CAST(:resume_in AS float8) IS NULL THEN resume_at
                            ELSE now() + :resume_in * interval '1 second' END
                    WHERE name = :name
                )
                INSERT INTO dispatcher.event (at, actor, kind, old, new, reason)
                SELECT now(), :actor, 'target', 'up', 'down', name || ': ' || :reason FROM old
                """,
                name=name,
                reason=reason,
                resume_in=resume_in,
                actor=self.actor,
            )

    def target_up(self, name: str) -> None:
        """Record that a target answers again."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                WITH t AS (
                    UPDATE dispatcher.target
                    SET down_since = NULL, down_reason = NULL, down_calls = 0, resume_at = NULL
                    WHERE name = :name AND down_since IS NOT NULL RETURNING name
                )
                INSERT INTO dispatcher.event (at, actor, kind, old, new, reason)
                SELECT now(), :actor, 'target', 'down', 'up', name FROM t
                """,
                name=name,
                actor=self.actor,
            )

    def pace(self, name: str, factor: float) -> None:
        """Shrink (below 1) or grow (above 1) the rate of a target's launch calls."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                UPDATE dispatcher.target SET pace = least(1, greatest(0.05, pace * :factor))
                WHERE name = :name
                """,
                name=name,
                factor=factor,
            )


def new_batch_id() -> str:
    """Make a batch's id: 12 letters and digits, random from the first, so that prefixes differ."""
    alphabet = "abcdefghijkmnpqrstuvwxyz23456789"
    number = uuid.uuid4().int
    letters = []
    for _ in range(12):
        number, place = divmod(number, 32)
        letters.append(alphabet[place])
    return "".join(letters)


class Planning:
    """A batch that is held for planning, inside its transaction."""

    def __init__(
        self,
        store: Store,
        tx: sa.Connection,
        batch_id: str,
        job: dict[str, Any],
        params: dict[str, Any],
        items_from: str,
        tries: int,
    ) -> None:
        self.batch_id = batch_id
        self.job = job
        self.params = params
        self.items_from = items_from
        self.tries = tries
        self._store = store
        self._tx = tx

    def pages(self) -> Iterator[str]:
        """Read the pages of items one by one, as JSON text."""
        number = 0
        while True:
            page = self._store.run(
                self._tx,
                """
                SELECT items::text FROM dispatcher.item_page
                WHERE batch_id = :batch_id AND number = :number
                """,
                batch_id=self.batch_id,
                number=number,
            ).scalar_one_or_none()
            if page is None:
                return
            yield page
            number += 1

    def write(self, chunks: Sequence[tuple[int, int, float | None, str]]) -> None:
        """COPY chunks, given as index, size, weight and items."""
        raw = self._tx.connection.driver_connection
        if raw is None:
            raise Unreachable("the database connection was closed while a batch was planned")
        now = self._store.run(self._tx, "SELECT now()").scalar_one()
        with raw.cursor() as cursor:
            with cursor.copy(
                "COPY dispatcher.chunk (batch_id, index, state, size, weight, due_at) FROM STDIN"
            ) as copy:
                for index, size, weight, _ in chunks:
                    copy.write_row((self.batch_id, index, "pending", size, weight, now))
            with cursor.copy(
                "COPY dispatcher.chunk_items (batch_id, chunk_index, items) FROM STDIN"
            ) as copy:
                for index, _, _, items in chunks:
                    copy.write_row((self.batch_id, index, items))

    def finish(self, items: int, chunks: int) -> bool:
        """planning → running, or → succeeded where there is nothing to do.

        False if the batch was cancelled meanwhile: the caller must take everything back.
        """
        state = BatchState.RUNNING if chunks else BatchState.SUCCEEDED
        moved = self._store.run(
            self._tx,
            """
            WITH b AS (
                UPDATE dispatcher.batch
                SET state = :state, planned_at = now(), item_count = :items, chunk_count = :chunks,
                    reason = CASE WHEN :chunks = 0 THEN 'no items' END,
                    finished_at = CASE WHEN :chunks = 0 THEN now() END
                WHERE id = :id AND state = 'planning' RETURNING id, reason
            ), c AS (
                INSERT INTO dispatcher.event (at, actor, kind, batch_id, chunk_index, new)
                SELECT now(), :actor, 'chunk', :id, n, 'pending'
                FROM generate_series(0, :chunks - 1) AS n WHERE EXISTS (SELECT 1 FROM b)
            ), e AS (
                INSERT INTO dispatcher.event (at, actor, kind, batch_id, old, new, reason)
                SELECT now(), :actor, 'batch', id, 'planning', :state, reason FROM b
            ), p AS (
                DELETE FROM dispatcher.item_page
                WHERE batch_id = :id AND EXISTS (SELECT 1 FROM b)
            )
            SELECT id FROM b
            """,
            id=self.batch_id,
            state=state,
            items=items,
            chunks=chunks,
            actor=self._store.actor,
        )
        return moved.first() is not None
