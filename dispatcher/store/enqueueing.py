"""Writes batches as `enqueue` asks for them: with their items, and once for a key."""

from __future__ import annotations

import uuid
from typing import Any

import sqlalchemy as sa

from dispatcher import schema
from dispatcher.store.base import BaseStore
from dispatcher.store.rows import (
    NewBatch,
)

__all__ = ["EnqueueStore", "new_batch_id"]


class EnqueueStore(BaseStore):
    """Writes batches as `enqueue` asks for them: with their items, and once for a key."""

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
                    items_from, state, actor, created_at, deadline, max_failed_chunks,
                    max_failed_items, min_ratio, stop_early
                ) VALUES (
                    :id, :key, CAST(:request AS json), :job_name, CAST(:job AS json), :code_version,
                    :target, CAST(:params AS json), CAST(:labels AS json), :priority, :items_from,
                    'planning', :actor, now(), now() + CAST(:deadline AS interval),
                    :max_failed_chunks, :max_failed_items, :min_ratio, :stop_early
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
            max_failed_items=new.max_failed_items,
            min_ratio=new.min_ratio,
            stop_early=new.stop_early,
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

    def told_by_leader(self, tx: sa.Connection, target: str) -> tuple[dict[str, Any], bool]:
        """Read the limits of a target as who led it last told, and whether that one still does."""
        row = self.run(
            tx,
            """
            SELECT limits, coalesce(lease_owner IS NOT NULL AND lease_until > now(), false)
            FROM dispatcher.target WHERE name = :name
            """,
            name=target,
        ).first()
        return ({}, False) if row is None else (row[0], row[1])


def new_batch_id() -> str:
    """Make a batch's id: 12 letters and digits, random from the first, so that prefixes differ."""
    alphabet = "abcdefghijkmnpqrstuvwxyz23456789"
    number = uuid.uuid4().int
    letters = []
    for _ in range(12):
        number, place = divmod(number, 32)
        letters.append(alphabet[place])
    return "".join(letters)
