"""Writes outcomes, moves chunks and, with the last one, the batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

import sqlalchemy as sa

from dispatcher.states import BatchState
from dispatcher.store.base import EXECUTION_COLUMNS, LIVE, OPEN, BaseStore
from dispatcher.store.rows import (
    BatchVerdictRow,
    ExecutionRow,
    MovedChunk,
    OpenAttempt,
)

__all__ = ["SettleStore"]


class SettleStore(BaseStore):
    """Writes outcomes, moves chunks and, with the last one, the batch."""

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
                WHERE c.state || '' IN ('launching', 'running')
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
                AND c.index = a.chunk_index AND c.state || '' = 'pending'
                AND c.hold_until IS NOT NULL
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
