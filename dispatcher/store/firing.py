"""Records which due times of schedules were fired or skipped, each once."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from dispatcher.store.base import BaseStore
from dispatcher.store.plain import plain

__all__ = ["FireStore"]


class FireStore(BaseStore):
    """Records which due times of schedules were fired or skipped, each once."""

    def hold_schedule(
        self, tx: sa.Connection, schedule: str
    ) -> tuple[datetime | None, datetime] | None:
        """Hold a schedule until the transaction ends; its last recorded time and the time now.

        None if it is held elsewhere: whoever holds it does the same.
        """
        held = self.run(
            tx,
            """
            SELECT pg_try_advisory_xact_lock(hashtextextended('dispatcher.schedule:' || :name, 0))
            """,
            name=schedule,
        ).scalar_one()
        if not held:
            return None
        row = self.run(
            tx,
            "SELECT max(due_at), now() FROM dispatcher.schedule_firing WHERE schedule = :name",
            name=schedule,
        ).one()
        return row[0], row[1]

    def record_firing(
        self,
        tx: sa.Connection,
        schedule: str,
        due_at: datetime,
        *,
        batch_id: str | None,
        reason: str | None,
    ) -> bool:
        """Record a due time, in the transaction that writes its batch; False if it was before."""
        written = self.run(
            tx,
            """
            WITH f AS (
                INSERT INTO dispatcher.schedule_firing
                    (schedule, due_at, batch_id, fired_at, actor, reason)
                VALUES (:schedule, :due_at, :batch_id, now(), :actor, :reason)
                ON CONFLICT (schedule, due_at) DO NOTHING RETURNING schedule, batch_id
            ), e AS (
                INSERT INTO dispatcher.event (at, actor, kind, batch_id, new, reason)
                SELECT now(), :actor, 'schedule', batch_id,
                    CASE WHEN batch_id IS NULL THEN 'skipped' ELSE 'fired' END,
                    schedule || ' of ' || CAST(:told AS text)
                        || coalesce(': ' || CAST(:reason AS text), '')
                FROM f
            )
            SELECT 1 FROM f
            """,
            schedule=schedule,
            due_at=due_at,
            told=due_at.isoformat(),
            batch_id=batch_id,
            actor=self.actor,
            reason=None if reason is None else plain(reason),
        )
        return written.first() is not None
