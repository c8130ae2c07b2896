"""Reads what runs and what is due for it, and writes what was seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

from dispatcher import schema
from dispatcher.backends.base import Recorded
from dispatcher.states import CancelKind
from dispatcher.store.base import EXECUTION_COLUMNS, LIVE, BaseStore
from dispatcher.store.rows import (
    ExecutionRow,
)

__all__ = ["FollowStore"]

MOST_DUE: Final = 1_000
"""Executions of one kind that are read together, of those that something is due for."""


class FollowStore(BaseStore):
    """Reads what runs and what is due for it, and writes what was seen."""

    def live_ids(self, target: str) -> list[int]:
        """Read which executions of a target are launched: one array, cheap at ten thousand."""
        with self.transaction() as tx:
            ids = self.run(
                tx,
                """
                SELECT array_agg(id) FROM dispatcher.execution
                WHERE target = :target AND state = 'launched' AND code_version <= :code_version
                """,
                target=target,
                code_version=schema.CODE_VERSION,
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
        self._mark_since("absent_since", ids, "the provider does not know it")

    def mark_unread(self, ids: Sequence[int]) -> None:
        """Record since when the receipts of tasks that have ended cannot be read."""
        reason = "receipts of it cannot be read: the storage does not answer"
        self._mark_since("unread_since", ids, reason)

    def _mark_since(self, column: str, ids: Sequence[int], reason: str) -> None:
        """Write into a column since when something is so, and say it once."""
        with self.transaction() as tx:
            self.run(
                tx,
                f"""
                WITH l AS MATERIALIZED (
                    SELECT id FROM dispatcher.execution
                    WHERE id = ANY(:ids) AND state = 'launched' AND {column} IS NULL
                    ORDER BY id FOR UPDATE
                ), e AS (
                    UPDATE dispatcher.execution e SET {column} = now()
                    FROM l WHERE e.id = l.id RETURNING e.id, e.batch_id
                )
                INSERT INTO dispatcher.event (at, actor, kind, batch_id, execution_id, reason)
                SELECT now(), :actor, 'execution', batch_id, id, :reason FROM e
                """,  # noqa: S608 - one of the two columns above
                ids=list(ids),
                actor=self.actor,
                reason=reason,
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

    def cancel_executions(self, ids: Sequence[int], kind: CancelKind, reason: str) -> None:
        """Ask for the end of executions for a reason of their own, where it still holds.

        Whoever has slept since it found one late may not know that another saw it start.
        """
        with self.transaction() as tx:
            self.run(
                tx,
                """
                WITH l AS MATERIALIZED (
                    SELECT id FROM dispatcher.execution
                    WHERE id = ANY(:ids) AND state = 'launched' AND cancel_requested_at IS NULL
                        AND CASE CAST(:kind AS text)
                            WHEN 'start_timeout'
                                THEN started_at IS NULL AND start_deadline <= now()
                            WHEN 'timeout' THEN deadline <= now()
                            ELSE true
                        END
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

    def cancel_unsent(self, ids: Sequence[int]) -> None:
        """Take back that a cancel was sent, where each call so far was refused for now.

        What ends meanwhile has ended by itself.
        """
        with self.transaction() as tx:
            self.run(
                tx,
                """
                UPDATE dispatcher.execution SET cancel_sent_at = NULL, cancel_calls = 0
                WHERE id = ANY(:ids) AND state = 'launched' AND cancel_calls <= 1
                """,
                ids=sorted(ids),
            )

    def due(self, target: str) -> dict[str, list[ExecutionRow]]:
        """Find the executions of a target that something is due for, by what it is.

        Of each kind those that have waited longest, so that none hides another; and cancels that
        were never sent before those that were.
        """
        with self.transaction() as tx:
            rows = self.run(
                tx,
                f"""
                SELECT d.* FROM (
                    SELECT w.what, row_number() OVER (
                        PARTITION BY w.what ORDER BY
                            CASE w.what WHEN 'cancel' THEN e.cancel_calls END,
                            CASE w.what
                                WHEN 'look' THEN e.next_look_at
                                WHEN 'uncalled' THEN e.cancel_requested_at
                                WHEN 'call' THEN e.next_call_at
                                WHEN 'cancel' THEN e.next_cancel_at
                                WHEN 'start_timeout' THEN e.start_deadline
                                WHEN 'timeout' THEN e.deadline
                            END,
                            e.id
                    ) AS place, {EXECUTION_COLUMNS}
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
                        AND e.code_version <= :code_version
                ) d
                WHERE d.place <= :most ORDER BY d.place
                """,  # noqa: S608 - constants of this module
                code_version=schema.CODE_VERSION,
                target=target,
                most=MOST_DUE,
            )
            found: dict[str, list[ExecutionRow]] = {}
            for what, _, *columns in rows:
                found.setdefault(what, []).append(ExecutionRow(*columns))
            return found

    def now(self) -> datetime:
        """Read the database's time, by which everything is measured that is kept for a while."""
        with self.transaction() as tx:
            at: datetime = self.run(tx, "SELECT now()").scalar_one()
            return at

    def known_keys(self, keys: Sequence[str]) -> dict[str, tuple[str, str | None, float | None]]:
        """Read state and handle of executions by key, and for how many seconds they are ended."""
        with self.transaction() as tx:
            rows = self.run(
                tx,
                "SELECT key, state, handle, extract(epoch FROM now() - finished_at)::float8"
                " FROM dispatcher.execution WHERE key = ANY(:keys)",
                keys=list(keys),
            )
            return {row[0]: (row[1], row[2], row[3]) for row in rows}

    def recorded(self, keys: Sequence[str]) -> dict[str, Recorded]:
        """Say of those of these keys that are known whether their end is, and their calls."""
        with self.transaction() as tx:
            rows = self.run(
                tx,
                """
                SELECT key, bool_and(state = 'ended'), sum(calls)::int
                FROM dispatcher.execution WHERE key = ANY(:keys) GROUP BY key
                """,
                keys=list(keys),
            )
            return {row[0]: Recorded(row[1], row[2]) for row in rows}

    def follow_winner(self, key: str, old: str, new: str, reason: str) -> bool:
        """Change the handle of a launched execution to that of the one which claimed its key."""
        with self.transaction() as tx:
            moved = self.run(
                tx,
                """
                WITH e AS (
                    UPDATE dispatcher.execution
                    SET handle = :new, console_url = NULL, logs_url = NULL, absent_since = NULL,
                        unread_since = NULL, reason = :reason
                    WHERE key = :key AND state = 'launched' AND handle = :old
                    RETURNING id, batch_id
                ), v AS (
                    INSERT INTO dispatcher.event
                        (at, actor, kind, batch_id, execution_id, reason)
                    SELECT now(), :actor, 'execution', batch_id, id, :reason FROM e
                )
                SELECT id FROM e
                """,
                key=key,
                old=old,
                new=new,
                reason=reason,
                actor=self.actor,
            )
            return moved.first() is not None
