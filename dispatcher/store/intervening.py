"""Cancels and reopens batches, and finds those that a crash or a deadline has left behind."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import sqlalchemy as sa

from dispatcher.states import BatchState, CancelKind
from dispatcher.store.base import LIVE, OPEN
from dispatcher.store.planning import PlanStore

__all__ = ["InterveneStore"]


class InterveneStore(PlanStore):
    """Cancels and reopens batches, and finds those that a crash or a deadline has left behind."""

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
            self.end_planning(tx, batch_id, final, reason)
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
                SET state = :state, reason = :reason, finished_at = now(), hold_until = NULL,
                    awaits_split = NULL
                FROM l WHERE c.batch_id = l.batch_id AND c.index = l.index
                RETURNING c.batch_id, c.index
            )
            INSERT INTO dispatcher.event
                (at, actor, kind, batch_id, chunk_index, old, new, reason)
            SELECT now(), :actor, 'chunk', batch_id, index, 'pending', :state, :reason FROM c
            """,
            id=batch_id,
            state=kind.ends_chunks_as,
            reason=reason,
            actor=who,
        )
        return BatchState.RUNNING

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
        if not failed_only:
            # Everything anew: what succeeded before says nothing of what will be done now.
            self.run(tx, "DELETE FROM dispatcher.item_result WHERE batch_id = :id", id=batch_id)
            self.run(
                tx,
                """
                UPDATE dispatcher.chunk SET items_ok = 0
                WHERE batch_id = :id AND items_ok > 0 AND state <> 'split'
                """,
                id=batch_id,
            )
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
