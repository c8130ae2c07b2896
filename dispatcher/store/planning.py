"""Holds a batch while it is planned and writes its chunks, all or nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psycopg
import sqlalchemy as sa

from dispatcher import schema
from dispatcher.errors import Unreachable
from dispatcher.states import BatchState
from dispatcher.store.base import BaseStore
from dispatcher.store.plain import plain

__all__ = ["PlanStore", "Planning"]


class PlanStore(BaseStore):
    """Holds a batch while it is planned and writes its chunks, all or nothing."""

    def unplanned(self, limit: int, targets: Collection[str] | None = None) -> list[str]:
        """Find batches that wait to be planned, oldest first; only those of `targets` if given.

        Whoever plans gives the targets that it serves: others' batches would fill the limit.
        """
        with self.transaction() as tx:
            rows = self.run(
                tx,
                """
                SELECT id FROM dispatcher.batch
                WHERE state = 'planning' AND (plan_after IS NULL OR plan_after <= now())
                    AND code_version <= :code_version
                    AND (CAST(:targets AS text[]) IS NULL OR target = ANY(:targets))
                ORDER BY created_at LIMIT :limit
                """,
                limit=limit,
                targets=None if targets is None else list(targets),
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
                reason=plain(reason),
                actor=self.actor,
            )

    def fail_plan(self, batch_id: str, reason: str) -> bool:
        """planning → failed: it cannot be planned."""
        with self.transaction() as tx:
            return self.end_planning(tx, batch_id, BatchState.FAILED, reason)

    def end_planning(
        self, tx: sa.Connection, batch_id: str, state: BatchState, reason: str | None
    ) -> bool:
        """planning → a final state; its pages of items stay, for a retry."""
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
            reason=None if reason is None else plain(reason),
            actor=self.actor,
        )
        return moved.first() is not None


class Planning:
    """A batch that is held for planning, inside its transaction."""

    def __init__(
        self,
        store: BaseStore,
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
        """COPY chunks, given as index, size, weight and items.

        Raises:
            Unreachable: the connection was lost.
        """
        raw = self._tx.connection.driver_connection
        if raw is None:
            raise Unreachable("the database connection was closed while a batch was planned")
        now = self._store.run(self._tx, "SELECT now()").scalar_one()
        try:
            with raw.cursor() as cursor:
                with cursor.copy(
                    "COPY dispatcher.chunk (batch_id, index, state, size, weight, due_at)"
                    " FROM STDIN"
                ) as copy:
                    for index, size, weight, _ in chunks:
                        copy.write_row((self.batch_id, index, "pending", size, weight, now))
                with cursor.copy(
                    "COPY dispatcher.chunk_items (batch_id, chunk_index, items) FROM STDIN"
                ) as copy:
                    for index, _, _, items in chunks:
                        copy.write_row((self.batch_id, index, items))
        except psycopg.Error as error:
            # SQLAlchemy has not seen it: such a connection must not go back to the pool.
            if raw.closed or error.sqlstate == schema.READ_ONLY:
                self._tx.invalidate(error)
            raise

    def finish(self, items: int, chunks: int, largest: int) -> bool:
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
                    largest_chunk = :largest,
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
            largest=largest,
            actor=self._store.actor,
        )
        return moved.first() is not None
