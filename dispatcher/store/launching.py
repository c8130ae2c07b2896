"""Claims due chunks, writes what is about to be asked of a provider, and what it answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

import sqlalchemy as sa

from dispatcher import schema
from dispatcher.backends.base import Launched
from dispatcher.receipts import open_positions
from dispatcher.store.base import DUE, LIVE, BaseStore
from dispatcher.store.rows import (
    Claimed,
    Held,
    Intent,
    TargetRow,
    WaitingBatch,
)

__all__ = ["LaunchStore"]

MOST_WAITING: Final = 1_000
"""Batches that one round of launches looks at."""

MOST_OF_JOB: Final = 200
"""Those of one job."""

FIRST_OF_JOB: Final = 20
"""Those of each job that come before the rest of any, so that no job hides another."""


class LaunchStore(BaseStore):
    """Claims due chunks, writes what is about to be asked of a provider, and what it answered."""

    def lock_target(self, tx: sa.Connection, name: str) -> TargetRow | None:
        """Lock the target: whoever counts its slots or takes from its bucket comes one by one."""
        row = self.run(
            tx,
            """
            SELECT t.home, t.down_calls, t.down_since IS NOT NULL,
                extract(epoch FROM t.resume_at - now())::float8, i.instance, now(),
                CASE WHEN t.lease_owner IS NOT NULL AND t.lease_until > now() THEN t.limits END
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

    def waiting(
        self, tx: sa.Connection, target: str, *, without: Iterable[str] = ()
    ) -> list[WaitingBatch]:
        """Find batches of a target with due chunks, with the slots that they hold now.

        None of the jobs `without`; and of each other job the first before more of any, as jobs that
        are at their limits must hide no other. How many chunks are due is counted by `count_due`.
        """
        rows = self.run(
            tx,
            f"""
            SELECT b.id, b.priority, b.job_name,
                coalesce((
                    SELECT sum(least(e.open_tasks, e.parallelism)) FROM dispatcher.execution e
                    WHERE e.batch_id = b.id AND e.state IN {LIVE}
                ), 0)::int, 0, b.largest_chunk
            FROM (
                SELECT * FROM (
                    SELECT b.*, row_number() OVER (
                        PARTITION BY b.job_name ORDER BY b.priority DESC, b.created_at, b.id
                    ) AS place
                    FROM dispatcher.batch b
                    WHERE b.target = :target AND b.state = 'running'
                        AND b.cancel_requested_at IS NULL AND b.code_version <= :code_version
                        AND b.job_name <> ALL(:without) AND EXISTS (
                            SELECT 1 FROM dispatcher.chunk c
                            WHERE c.batch_id = b.id AND {DUE}
                        )
                ) b
                WHERE b.place <= :most_of_job
                ORDER BY b.place > 1, b.place > :first_of_job, b.priority DESC, b.created_at, b.id
                LIMIT :most
            ) b
            ORDER BY b.priority DESC, b.created_at, b.id
            """,  # noqa: S608 - constants of this package
            target=target,
            without=list(without),
            most=MOST_WAITING,
            most_of_job=MOST_OF_JOB,
            first_of_job=FIRST_OF_JOB,
            code_version=schema.CODE_VERSION,
        )
        return [WaitingBatch(*row) for row in rows]

    def count_due(self, tx: sa.Connection, caps: Mapping[str, int]) -> dict[str, int]:
        """Count the due chunks of batches, each up to a number that is enough to know."""
        rows = self.run(
            tx,
            f"""
            SELECT n.batch_id, d.due
            FROM unnest(CAST(:ids AS text[]), CAST(:caps AS bigint[])) AS n (batch_id, cap)
            CROSS JOIN LATERAL (
                SELECT count(*)::int AS due FROM (
                    SELECT 1 FROM dispatcher.chunk c
                    WHERE c.batch_id = n.batch_id AND {DUE}
                    LIMIT n.cap
                ) AS found
            ) d
            """,  # noqa: S608 - a constant of this package
            ids=list(caps),
            caps=list(caps.values()),
        )
        return {row[0]: row[1] for row in rows}

    def held_by_target(self, tx: sa.Connection, target: str, *, telling: int) -> Held:
        """Count a target's slots and live executions, and what waits for another call.

        Of these come first those that are due for it, up to their `telling`-th call: what was
        refused more often may be refused for ever.
        """
        row = self.run(
            tx,
            f"""
            SELECT coalesce(sum(least(open_tasks, parallelism)), 0)::int, count(*)::int,
                (count(*) FILTER (
                    WHERE state = 'intended' AND call_by IS NULL AND next_call_at <= now()
                        AND calls <= :telling AND cancel_requested_at IS NULL
                        AND code_version <= :code_version
                ))::int,
                coalesce(array_agg(DISTINCT job_name) FILTER (
                    WHERE state = 'intended' AND call_by IS NULL AND job_name IS NOT NULL
                ), '{{}}')
            FROM dispatcher.execution WHERE target = :target AND state IN {LIVE}
            """,  # noqa: S608 - a constant of this module
            target=target,
            telling=telling,
            code_version=schema.CODE_VERSION,
        ).one()
        return Held(*row)

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

    def anything_due(self, target: str) -> bool:
        """Say, without a lock, whether a launch of this target could find a due chunk."""
        with self.transaction() as tx:
            found: bool = self.run(
                tx,
                f"""
                SELECT EXISTS (
                    SELECT 1 FROM dispatcher.batch b
                    WHERE b.target = :target AND b.state = 'running'
                        AND b.cancel_requested_at IS NULL AND EXISTS (
                            SELECT 1 FROM dispatcher.chunk c
                            WHERE c.batch_id = b.id AND {DUE}
                        )
                )
                """,  # noqa: S608 - a constant of this package
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
            f"""
            WITH picked AS MATERIALIZED (
                SELECT c.batch_id, c.index, c.reason FROM dispatcher.chunk c
                WHERE c.batch_id = :batch_id AND {DUE}
                ORDER BY c.due_at, c.index LIMIT :most FOR UPDATE SKIP LOCKED
            )
            UPDATE dispatcher.chunk c
            SET state = 'launching', attempts = c.attempts + 1, hold_until = NULL, reason = NULL
            FROM picked p WHERE c.batch_id = p.batch_id AND c.index = p.index
            RETURNING c.index, c.attempts, c.items_ok, c.size, p.reason
            """,  # noqa: S608 - a constant of this package
            batch_id=batch_id,
            most=most,
        )
        claimed = {row[0]: row for row in rows}
        partly = [index for index, row in claimed.items() if row[2]]
        done = self.items_done(tx, batch_id, partly) if partly else {}
        return [
            Claimed(
                index,
                number,
                open_positions(size, done[index]) if index in done else None,
                reason,
            )
            for index, number, _, size, reason in (claimed[index] for index in sorted(claimed))
        ]

    def give_back(self, tx: sa.Connection, batch_id: str, claimed: Sequence[Claimed]) -> None:
        """launching → pending for chunks that this transaction has claimed: nobody saw it."""
        self.run(
            tx,
            """
            UPDATE dispatcher.chunk c
            SET state = 'pending', attempts = c.attempts - 1, reason = n.reason
            FROM unnest(CAST(:indexes AS int[]), CAST(:numbers AS int[]), CAST(:reasons AS text[]))
                AS n (index, number, reason)
            WHERE c.batch_id = :batch_id AND c.index = n.index AND c.state = 'launching'
                AND c.attempts = n.number
            """,
            batch_id=batch_id,
            indexes=[one.chunk_index for one in claimed],
            numbers=[one.number for one in claimed],
            reasons=[one.reason for one in claimed],
        )

    def items_done(
        self, tx: sa.Connection, batch_id: str, indexes: Sequence[int]
    ) -> dict[int, list[int]]:
        """Read which items of chunks have succeeded, as receipts say."""
        rows = self.run(
            tx,
            """
            SELECT chunk_index, array_agg(position ORDER BY position)
            FROM dispatcher.item_result
            WHERE batch_id = :batch_id AND chunk_index = ANY(:indexes) AND ok
            GROUP BY chunk_index
            """,
            batch_id=batch_id,
            indexes=list(indexes),
        )
        return {row[0]: row[1] for row in rows}

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
                    key, target, batch_id, job_name, code_version, state, tasks, open_tasks,
                    parallelism, request, worker, intent_at, calls, call_by
                )
                SELECT n.key, :target, n.batch_id, n.job_name,
                    (SELECT b.code_version FROM dispatcher.batch b WHERE b.id = n.batch_id),
                    'intended', n.tasks, n.tasks, n.parallelism, n.request::json, :actor, now(), 1,
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
            (i.batch_id, one.chunk_index, one.number, ids[i.key], place, _array(one.positions))
            for i in intents
            for place, one in enumerate(i.chunks)
        ]
        batches, chunks, numbers, executions, places, positions = zip(*opened, strict=True)
        self.run(
            tx,
            """
            WITH n AS (
                SELECT * FROM unnest(
                    CAST(:batches AS text[]), CAST(:chunks AS int[]), CAST(:numbers AS int[]),
                    CAST(:executions AS bigint[]), CAST(:places AS int[]),
                    CAST(:positions AS text[])
                ) AS n (batch_id, chunk_index, number, execution_id, place, positions)
            ), a AS (
                INSERT INTO dispatcher.attempt
                    (batch_id, chunk_index, number, execution_id, task_index, positions, opened_at)
                SELECT batch_id, chunk_index, number, execution_id, place,
                    CAST(positions AS int[]), now()
                FROM n
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
            positions=list(positions),
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
                    WHERE c.batch_id = a.batch_id AND c.index = a.chunk_index
                        AND c.attempts = a.number AND c.state || '' = 'launching'
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
                        (at, actor, kind, batch_id, execution_id, old, new, reason)
                    SELECT now(), :actor, 'execution', s.batch_id, s.id, old.state, 'launched',
                        :reason
                    FROM s LEFT JOIN dispatcher.execution old ON old.id = s.id
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

    def record_unknown(self, unknown: Mapping[int, tuple[int, str]]) -> None:
        """intended → unknown: the answer leaves open whether something was started.

        Given as the number of the call that was answered so, and the reason. An answer that comes
        after another call was begun changes nothing.
        """
        with self.transaction() as tx:
            self.run(
                tx,
                """
                WITH e AS (
                    UPDATE dispatcher.execution e
                    SET state = 'unknown', looks = 0, next_look_at = now(), reason = n.reason
                    FROM unnest(
                        CAST(:ids AS bigint[]), CAST(:calls AS int[]), CAST(:reasons AS text[])
                    ) AS n (id, calls, reason)
                    WHERE e.id = n.id AND e.state = 'intended' AND e.calls = n.calls
                    RETURNING e.id, e.batch_id, n.reason
                )
                INSERT INTO dispatcher.event
                    (at, actor, kind, batch_id, execution_id, old, new, reason)
                SELECT now(), :actor, 'execution', batch_id, id, 'intended', 'unknown', reason
                FROM e
                """,
                ids=list(unknown),
                calls=[call for call, _ in unknown.values()],
                reasons=[reason for _, reason in unknown.values()],
                actor=self.actor,
            )

    def postpone_calls(self, postponed: Mapping[int, tuple[int, float, str]]) -> None:
        """Keep executions intended and move their next call: the provider clearly refused for now.

        Given as the number of the call that was answered so, the seconds and the reason. Costs no
        attempt: the key, the attempts and the chunks stay as they are.
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
                        CAST(:ids AS bigint[]), CAST(:calls AS int[]),
                        CAST(:seconds AS float8[]), CAST(:reasons AS text[])
                    ) AS n (id, calls, seconds, reason)
                    WHERE e.id = n.id AND e.state = 'intended' AND e.calls = n.calls
                    RETURNING e.id, e.batch_id, n.reason
                )
                INSERT INTO dispatcher.event (at, actor, kind, batch_id, execution_id, reason)
                SELECT now(), :actor, 'execution', batch_id, id, reason FROM e
                """,
                ids=list(postponed),
                calls=[call for call, _, _ in postponed.values()],
                seconds=[seconds for _, seconds, _ in postponed.values()],
                reasons=[reason for _, _, reason in postponed.values()],
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
                        AND code_version <= :code_version
                    RETURNING id, batch_id, reason
                )
                INSERT INTO dispatcher.event
                    (at, actor, kind, batch_id, execution_id, old, new, reason)
                SELECT now(), :actor, 'execution', batch_id, id, 'intended', 'unknown', reason
                FROM e
                """,
                target=target,
                code_version=schema.CODE_VERSION,
                actor=self.actor,
            )
            return moved.rowcount

    def call_again(
        self, execution_id: int, *, old: str, calls: int, window: timedelta, reason: str
    ) -> int | None:
        """intended (throttled) or unknown (not found) → intended, with the same key.

        `calls` is how many were made when that was found out: who has slept since knows too little.
        Returns the number of the call that may now be made, or None if it may not.
        """
        with self.transaction() as tx:
            moved = self.run(
                tx,
                """
                WITH e AS (
                    UPDATE dispatcher.execution
                    SET state = 'intended', call_by = now() + CAST(:window AS interval),
                        next_call_at = NULL, next_look_at = NULL, calls = calls + 1,
                        worker = :actor, reason = NULL
                    WHERE id = :id AND state = :old AND calls = :calls
                        AND cancel_requested_at IS NULL
                        AND (call_by IS NULL OR call_by < now())
                    RETURNING id, batch_id, calls
                ), v AS (
                    INSERT INTO dispatcher.event
                        (at, actor, kind, batch_id, execution_id, old, new, reason)
                    SELECT now(), :actor, 'execution', batch_id, id, nullif(:old, 'intended'),
                        CASE WHEN :old <> 'intended' THEN 'intended' END, :reason
                    FROM e
                )
                SELECT calls FROM e
                """,
                id=execution_id,
                old=old,
                calls=calls,
                window=window,
                actor=self.actor,
                reason=reason,
            )
            number: int | None = moved.scalar_one_or_none()
            return number

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

    def postpone_call(self, execution_id: int, delay: float) -> None:
        """Call again later: nothing was called."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                UPDATE dispatcher.execution
                SET next_call_at = now() + :delay * interval '1 second'
                WHERE id = :id AND state = 'intended' AND call_by IS NULL
                """,
                id=execution_id,
                delay=delay,
            )

    def chunks_of(self, tx: sa.Connection, execution_id: int) -> list[Claimed]:
        """Read the chunks of an execution by task index, to write its request again."""
        rows = self.run(
            tx,
            """
            SELECT chunk_index, number, positions FROM dispatcher.attempt
            WHERE execution_id = :id ORDER BY task_index
            """,
            id=execution_id,
        )
        return [Claimed(*row) for row in rows]


def _array(positions: Sequence[int] | None) -> str | None:
    """Write an array as Postgres reads it from text: arrays of arrays must all be of one length."""
    return None if positions is None else "{" + ",".join(map(str, positions)) + "}"
