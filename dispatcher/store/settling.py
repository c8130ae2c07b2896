"""Writes outcomes, moves chunks and, with the last one, the batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

import sqlalchemy as sa

from dispatcher.judging import Policy, Standing
from dispatcher.states import BatchState, ChunkState, Cut
from dispatcher.store.base import EXECUTION_COLUMNS, LIVE, OPEN, BaseStore
from dispatcher.store.rows import (
    ExecutionRow,
    MovedChunk,
    OpenAttempt,
    OpenTask,
    Part,
    ToSplit,
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
            SELECT a.batch_id, a.chunk_index, a.number, a.execution_id, a.task_index, c.budget_from,
                c.size, c.items_ok, c.depth, a.positions
            FROM dispatcher.attempt a
            JOIN dispatcher.chunk c ON c.batch_id = a.batch_id AND c.index = a.chunk_index
            WHERE a.execution_id = ANY(:ids) AND a.outcome IS NULL
            """,
            ids=list(execution_ids),
        )
        return {(row[3], row[4]): OpenAttempt(*row) for row in rows}

    def open_tasks(self, tx: sa.Connection, execution_ids: Sequence[int]) -> list[OpenTask]:
        """Read the tasks of executions that are not settled, to look for their receipts."""
        rows = self.run(
            tx,
            """
            SELECT a.execution_id, a.task_index, e.key, a.batch_id, a.number,
                coalesce(cardinality(a.positions), c.size), e.handle
            FROM dispatcher.attempt a
            JOIN dispatcher.execution e ON e.id = a.execution_id
            JOIN dispatcher.chunk c ON c.batch_id = a.batch_id AND c.index = a.chunk_index
            WHERE a.execution_id = ANY(:ids) AND a.outcome IS NULL
            ORDER BY a.execution_id, a.task_index
            """,
            ids=sorted(set(execution_ids)),
        )
        return [OpenTask(*row) for row in rows]

    def running_tasks(self, target: str, most: int) -> list[OpenTask]:
        """Choose running tasks of a target whose progress was not looked at for longest."""
        with self.transaction() as tx:
            rows = self.run(
                tx,
                """
                SELECT a.execution_id, a.task_index, e.key, a.batch_id, a.number,
                    coalesce(cardinality(a.positions), c.size), e.handle
                FROM dispatcher.execution e
                JOIN dispatcher.attempt a ON a.execution_id = e.id AND a.outcome IS NULL
                JOIN dispatcher.chunk c ON c.batch_id = a.batch_id AND c.index = a.chunk_index
                WHERE e.target = :target AND e.state = 'launched' AND e.started_at IS NOT NULL
                ORDER BY a.progress_at NULLS FIRST, a.execution_id, a.task_index LIMIT :most
                """,
                target=target,
                most=most,
            )
            return [OpenTask(*row) for row in rows]

    def write_progress(self, looked: Mapping[tuple[int, int], tuple[int, int] | None]) -> None:
        """Write how far running tasks are, by execution and task index; None where none told."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                UPDATE dispatcher.attempt a
                SET progress_at = now(), progress_done = coalesce(n.done, a.progress_done),
                    progress_total = coalesce(n.total, a.progress_total)
                FROM unnest(
                    CAST(:executions AS bigint[]), CAST(:places AS int[]), CAST(:dones AS bigint[]),
                    CAST(:totals AS bigint[])
                ) AS n (execution_id, task_index, done, total)
                WHERE a.execution_id = n.execution_id AND a.task_index = n.task_index
                    AND a.outcome IS NULL
                """,
                executions=[execution for execution, _ in looked],
                places=[place for _, place in looked],
                dones=[None if told is None else told[0] for told in looked.values()],
                totals=[None if told is None else told[1] for told in looked.values()],
            )

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
                    CAST(:delays AS float8[]), CAST(:holds AS float8[]), CAST(:items_ok AS int[]),
                    CAST(:cuts AS text[])
                ) AS n (
                    batch_id, chunk_index, number, execution_id, outcome, exit_code, attempt_reason,
                    started_at, ended_at, result_uri, state, reason, delay, hold, items_ok, cut
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
                SET state = n.state, outcome = n.outcome, reason = n.reason, items_ok = n.items_ok,
                    due_at = CASE WHEN n.state = 'pending'
                        THEN now() + n.delay * interval '1 second' ELSE c.due_at END,
                    hold_until = CASE WHEN n.state = 'pending'
                        THEN now() + n.hold * interval '1 second' END,
                    awaits_split = CASE WHEN n.state = 'pending' THEN n.cut END,
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
            items_ok=[m.items_ok for m in moved],
            cuts=[m.cut for m in moved],
        )

    def write_results(self, tx: sa.Connection, moved: Sequence[MovedChunk]) -> None:
        """Write how items ended; a success is never overwritten."""
        told = [
            (a.batch_id, a.chunk_index, given[result.position], a.number, result)
            for m in moved
            if m.closing.results
            for a, given in [(m.closing.attempt, m.closing.attempt.given)]
            for result in m.closing.results
        ]
        if not told:
            return
        batches, chunks, positions, numbers, results = zip(*told, strict=True)
        self.run(
            tx,
            """
            INSERT INTO dispatcher.item_result AS r
                (batch_id, chunk_index, position, attempt, ok, output, output_uri, error)
            SELECT batch_id, chunk_index, position, attempt, ok, CAST(output AS json), output_uri,
                error
            FROM unnest(
                CAST(:batches AS text[]), CAST(:chunks AS int[]), CAST(:positions AS int[]),
                CAST(:numbers AS int[]), CAST(:oks AS bool[]), CAST(:outputs AS text[]),
                CAST(:uris AS text[]), CAST(:errors AS text[])
            ) AS n (batch_id, chunk_index, position, attempt, ok, output, output_uri, error)
            ON CONFLICT (batch_id, chunk_index, position) DO UPDATE
            SET attempt = excluded.attempt, ok = excluded.ok, output = excluded.output,
                output_uri = excluded.output_uri, error = excluded.error
            WHERE NOT r.ok
            """,
            batches=list(batches),
            chunks=list(chunks),
            positions=list(positions),
            numbers=list(numbers),
            oks=[r.ok for r in results],
            outputs=[r.output for r in results],
            uris=[r.output_uri for r in results],
            errors=[r.error for r in results],
        )

    def chunk_text(self, tx: sa.Connection, batch_id: str, index: int) -> str:
        """Read the items of a chunk, as the JSON array that was planned."""
        text: str = self.run(
            tx,
            """
            SELECT items::text FROM dispatcher.chunk_items
            WHERE batch_id = :batch_id AND chunk_index = :index
            """,
            batch_id=batch_id,
            index=index,
        ).scalar_one()
        return text

    def split(self, tx: sa.Connection, parent: ToSplit, parts: Sequence[Part], reason: str) -> None:
        """Write the chunks that one goes on in; its batch is locked, so indexes are free."""
        batch_id = parent.batch_id
        first: int = self.run(
            tx,
            "SELECT max(index) + 1 FROM dispatcher.chunk WHERE batch_id = :id",
            id=batch_id,
        ).scalar_one()
        self.run(
            tx,
            """
            WITH n AS MATERIALIZED (
                SELECT * FROM unnest(
                    CAST(:indexes AS int[]), CAST(:sizes AS int[]), CAST(:dones AS bool[]),
                    CAST(:items AS text[])
                ) AS n (index, size, done, items)
            ), c AS (
                INSERT INTO dispatcher.chunk (
                    batch_id, index, state, size, items_ok, parent, depth, due_at, reason,
                    outcome, finished_at
                )
                SELECT :batch_id, index, CASE WHEN done THEN 'succeeded' ELSE 'pending' END, size,
                    CASE WHEN done THEN size ELSE 0 END, :parent, :depth, now(), :reason,
                    CASE WHEN done THEN 'succeeded' END, CASE WHEN done THEN now() END
                FROM n
            ), i AS (
                INSERT INTO dispatcher.chunk_items (batch_id, chunk_index, items)
                SELECT :batch_id, index, CAST(items AS json) FROM n
            ), b AS (
                UPDATE dispatcher.batch SET chunk_count = chunk_count + :more WHERE id = :batch_id
            )
            INSERT INTO dispatcher.event (at, actor, kind, batch_id, chunk_index, new, reason)
            SELECT now(), :actor, 'chunk', :batch_id, index,
                CASE WHEN done THEN 'succeeded' ELSE 'pending' END, :reason
            FROM n ORDER BY index
            """,
            batch_id=batch_id,
            indexes=list(range(first, first + len(parts))),
            sizes=[len(part.positions) for part in parts],
            dones=[part.done for part in parts],
            items=[part.items for part in parts],
            parent=parent.chunk_index,
            depth=parent.depth + 1,
            more=len(parts) - 1,
            reason=reason,
            actor=self.actor,
        )
        moves = [
            (first + number, old, new)
            for number, part in enumerate(parts)
            for new, old in enumerate(part.positions)
        ]
        children, olds, news = zip(*moves, strict=True)
        self.run(
            tx,
            """
            INSERT INTO dispatcher.item_result
                (batch_id, chunk_index, position, attempt, ok, output, output_uri, error)
            SELECT r.batch_id, n.child, n.new, r.attempt, r.ok, r.output, r.output_uri, r.error
            FROM dispatcher.item_result r
            JOIN unnest(CAST(:children AS int[]), CAST(:olds AS int[]), CAST(:news AS int[]))
                AS n (child, old, new) ON n.old = r.position
            WHERE r.batch_id = :batch_id AND r.chunk_index = :parent
            """,
            batch_id=batch_id,
            parent=parent.chunk_index,
            children=list(children),
            olds=list(olds),
            news=list(news),
        )

    def splits(self, tx: sa.Connection, batch_id: str) -> tuple[int, int, bool]:
        """Count the chunks of a batch that were split, and those that succeeded.

        And say whether any is open that does not wait to be split.
        """
        row = self.run(
            tx,
            f"""
            SELECT count(*) FILTER (WHERE state = 'split')::int,
                count(*) FILTER (WHERE state = 'succeeded')::int,
                coalesce(bool_or(state IN {OPEN} AND awaits_split IS NULL), false)
            FROM dispatcher.chunk WHERE batch_id = :id
            """,  # noqa: S608 - a constant of this package
            id=batch_id,
        ).one()
        return row[0], row[1], row[2]

    def awaiting_split(self, tx: sa.Connection, batch_ids: Iterable[str]) -> list[str]:
        """Find locked batches of which chunks wait to be split."""
        rows = self.run(
            tx,
            """
            SELECT n.id FROM unnest(CAST(:ids AS text[])) AS n (id) WHERE EXISTS (
                SELECT 1 FROM dispatcher.chunk c
                WHERE c.batch_id = n.id AND c.awaits_split IS NOT NULL
            ) ORDER BY n.id
            """,
            ids=sorted(set(batch_ids)),
        )
        return [row[0] for row in rows]

    def end_wait(
        self, tx: sa.Connection, batch_id: str, state: ChunkState, why: str, *, most: int
    ) -> list[ToSplit]:
        """pending → split or failed, for the first chunks of a locked batch that await a split."""
        rows = self.run(
            tx,
            """
            WITH l AS MATERIALIZED (
                SELECT index, awaits_split FROM dispatcher.chunk
                WHERE batch_id = :id AND awaits_split IS NOT NULL
                ORDER BY index LIMIT :most FOR UPDATE
            ), c AS (
                UPDATE dispatcher.chunk c
                SET state = :state, reason = concat_ws(': ', CAST(:why AS text), c.reason),
                    awaits_split = NULL, finished_at = now()
                FROM l WHERE c.batch_id = :id AND c.index = l.index
                RETURNING c.index, c.size, c.depth, l.awaits_split AS cut, c.reason
            ), e AS (
                INSERT INTO dispatcher.event
                    (at, actor, kind, batch_id, chunk_index, old, new, reason)
                SELECT now(), :actor, 'chunk', :id, index, 'pending', :state, reason FROM c
            )
            SELECT index, size, depth, cut FROM c ORDER BY index
            """,
            id=batch_id,
            state=state,
            why=why,
            most=most,
            actor=self.actor,
        )
        return [ToSplit(batch_id, row[0], row[1], row[2], Cut(row[3])) for row in rows]

    def standing_of(self, tx: sa.Connection, batch_ids: Iterable[str]) -> list[Standing]:
        """Count what locked batches have come to so far, those that nobody cancels."""
        return self._verdicts(tx, sorted(set(batch_ids)), uncancelled=True)

    def finish_tasks(
        self,
        tx: sa.Connection,
        closed: Mapping[int, int],
        ended: Mapping[int, str | None],
        started: Mapping[int, datetime | None],
        waiting: Iterable[int] = (),
    ) -> None:
        """Give back the slots of closed tasks, and end executions of which nothing runs any more.

        `closed` counts the tasks closed now; `ended` gives the reason, if any, of those that end;
        `waiting` are those of which other tasks still wait for their receipts to be read.
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
                    unread_since = CASE WHEN NOT n.ended AND e.id = ANY(:waiting)
                        THEN e.unread_since END,
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
            waiting=list(waiting),
        )

    def release_packs(self, tx: sa.Connection, execution_ids: Sequence[int]) -> None:
        """Let retries go that waited for company from executions that have now ended.

        Those of one execution go together, whenever each of them was settled: one pack, one delay.
        Only what has to wait for over a minute longer than the first goes by itself.
        """
        self.run(
            tx,
            """
            WITH waiting AS MATERIALIZED (
                SELECT a.execution_id, c.batch_id, c.index, c.due_at
                FROM dispatcher.attempt a
                JOIN dispatcher.chunk c ON c.batch_id = a.batch_id AND c.index = a.chunk_index
                    AND c.attempts = a.number
                WHERE a.execution_id = ANY(:ids) AND c.state || '' = 'pending'
            ), first AS (
                SELECT execution_id, min(due_at) + interval '1 minute' AS latest
                FROM waiting GROUP BY execution_id
            ), together AS (
                SELECT w.execution_id, max(w.due_at) AS due_at
                FROM waiting w JOIN first f USING (execution_id)
                WHERE w.due_at <= f.latest GROUP BY w.execution_id
            )
            UPDATE dispatcher.chunk c
            SET hold_until = NULL, due_at = greatest(c.due_at, t.due_at)
            FROM waiting w JOIN together t USING (execution_id)
            WHERE c.batch_id = w.batch_id AND c.index = w.index
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

    def finished_batches(self, tx: sa.Connection, batch_ids: Iterable[str]) -> list[Standing]:
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
        return self._verdicts(tx, ids, uncancelled=False) if ids else []

    def _verdicts(
        self, tx: sa.Connection, ids: Sequence[str], *, uncancelled: bool
    ) -> list[Standing]:
        rows = self.run(
            tx,
            """
            SELECT b.id, b.max_failed_chunks, b.max_failed_items, b.min_ratio, b.cancel_kind,
                b.cancel_reason, count(*) FILTER (WHERE c.state = 'succeeded')::int,
                count(*) FILTER (WHERE c.state = 'failed')::int,
                count(*) FILTER (WHERE c.state = 'cancelled')::int,
                coalesce(sum(c.size), 0)::bigint,
                coalesce(sum(c.size - c.items_ok)
                    FILTER (WHERE c.state IN ('failed', 'cancelled')), 0)::bigint,
                (array_agg(c.reason ORDER BY c.index) FILTER (WHERE c.state = 'failed'))[1]
            FROM dispatcher.batch b JOIN dispatcher.chunk c ON c.batch_id = b.id
            WHERE b.id = ANY(:ids) AND c.state <> 'split'
                AND (NOT :uncancelled OR b.cancel_requested_at IS NULL)
            GROUP BY b.id, b.max_failed_chunks, b.max_failed_items, b.min_ratio, b.cancel_kind,
                b.cancel_reason
            """,
            ids=list(ids),
            uncancelled=uncancelled,
        )
        return [Standing(row[0], Policy(*row[1:4]), *row[4:]) for row in rows]

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
