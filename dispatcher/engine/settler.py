"""Settle: outcomes are written, retries decided, chunks moved and, with the last one, the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Final

import sqlalchemy as sa
import structlog

from dispatcher.backends.base import (
    Rejected,
    TaskReport,
    Unavailable,
)
from dispatcher.engine.place import Ending, Place, plain
from dispatcher.engine.plans import PlanCache
from dispatcher.errors import DispatcherError
from dispatcher.judging import judge, verdict
from dispatcher.requests import Plan
from dispatcher.retrying import decide
from dispatcher.states import CancelKind, ChunkState, Outcome
from dispatcher.store import Store, again
from dispatcher.store.rows import (
    Closing,
    ExecutionRow,
    MovedChunk,
    OpenAttempt,
)

__all__ = ["Settler", "end_finished_batches"]

log = structlog.get_logger(__name__)

SETTLE_TASKS: Final = 2_000
"""Tasks settled in one transaction, about."""

LOGGED_FAILURES: Final = 5
"""Log tails kept from one settle: enough to see why, within a provider's quota of log reads."""

LOG_LINES: Final = 20


class Settler:
    """Settles attempts, as soon as their tasks are known to have ended."""

    def __init__(self, store: Store, plans: PlanCache, roll: Callable[[], float]) -> None:
        self._store = store
        self._plans = plans
        self._roll = roll

    def settle(self, place: Place, endings: Sequence[Ending]) -> None:
        """Write outcomes, decide on retries, move chunks and, with the last one, the batch."""
        if not endings:
            return
        for part in _parts(endings):
            for failed in self._settle_part(place, part)[:LOGGED_FAILURES]:
                self._keep_log(place, failed)

    def _settle_part(self, place: Place, part: Sequence[Ending]) -> list[tuple[str, OpenAttempt]]:
        """Settle in one transaction, or one by one if a single ending spoils it for the others."""
        try:
            return again(partial(self._settle, place, part))
        except DispatcherError:
            raise
        except Exception:
            log.exception("cannot be settled", executions=[one.execution_id for one in part][:10])
            if len(part) == 1:
                return []
        return [failed for one in part for failed in self._settle_part(place, [one])]

    def _settle(self, place: Place, endings: Sequence[Ending]) -> list[tuple[str, OpenAttempt]]:
        """Settle in one transaction; the handles and attempts of tasks that ended badly."""
        store = self._store
        ids = sorted({ending.execution_id for ending in endings})
        with store.transaction() as tx:
            batches = store.lock_batches_of(tx, ids)
            executions = store.lock_executions(tx, ids)
            attempts = store.open_attempts(tx, list(executions))
            closings: list[Closing] = []
            ended: dict[int, str | None] = {}
            for ending in endings:
                row = executions.get(ending.execution_id)
                if row is not None and ending.holds(row):
                    closings += _closings(row, ending, attempts)
                    if ending.final:
                        ended[row.id] = ending.reason
            closed = Counter(dict.fromkeys(executions, 0))
            closed.update(closing.attempt.execution_id for closing in closings)
            plans = self._plans.of(tx, {c.attempt.batch_id for c in closings}, place)
            moved = self._moves(tx, closings, batches, executions, ended, plans)
            if moved:
                store.close_attempts(tx, moved)
            if closed:
                store.finish_tasks(tx, closed, ended, _starts(closings))
            self._release(tx, moved, ended, plans)
            end_finished_batches(store, tx, {c.attempt.batch_id for c in closings})
        return [
            (handle, c.attempt)
            for c in closings
            if c.outcome not in (Outcome.SUCCEEDED, Outcome.CANCELLED, Outcome.REJECTED)
            and (handle := executions[c.attempt.execution_id].handle) is not None
        ]

    def _moves(
        self,
        tx: sa.Connection,
        closings: Sequence[Closing],
        batches: Mapping[str, str | None],
        executions: Mapping[int, ExecutionRow],
        ended: Mapping[int, str | None],
        plans: Mapping[str, Plan],
    ) -> list[MovedChunk]:
        """Decide where the chunk of each closed attempt goes."""
        bad = [c.attempt for c in closings if c.outcome is not Outcome.SUCCEEDED]
        tallies = self._store.tallies(tx, bad) if bad else {}
        rolls = {i: self._roll() for i in executions}
        moved = []
        for closing in closings:
            attempt, outcome = closing.attempt, closing.outcome
            if outcome is Outcome.SUCCEEDED:
                moved.append(MovedChunk(closing, ChunkState.SUCCEEDED, None, 0.0, None))
                continue
            cancel = batches.get(attempt.batch_id)
            plan = plans.get(attempt.batch_id)
            if cancel is not None or plan is None:
                operator = cancel == CancelKind.OPERATOR
                state = ChunkState.CANCELLED if operator else ChunkState.FAILED
                moved.append(MovedChunk(closing, state, closing.reason, 0.0, None))
                continue
            tally = Counter(tallies.get((attempt.batch_id, attempt.chunk_index), {}))
            tally[outcome] += 1
            decision = decide(
                plan.job.retry, outcome, closing.exit_code, tally, rolls[attempt.execution_id]
            )
            reason = f"{decision.reason}: {closing.reason}" if closing.reason else decision.reason
            if not decision.retry:
                moved.append(MovedChunk(closing, ChunkState.FAILED, reason, 0.0, None))
                continue
            waits = plan.max_tasks > 1 and attempt.execution_id not in ended
            hold = plan.job.retry.pack_wait.total_seconds() if waits else None
            delay = decision.delay.total_seconds()
            moved.append(MovedChunk(closing, ChunkState.PENDING, reason, delay, hold))
        return moved

    def _release(
        self,
        tx: sa.Connection,
        moved: Sequence[MovedChunk],
        ended: Mapping[int, str | None],
        plans: Mapping[str, Plan],
    ) -> None:
        """Let retries go that need not wait for company any longer."""
        packed = {name: plan for name, plan in plans.items() if plan.max_tasks > 1}
        if ended and packed:
            self._store.release_packs(tx, list(ended))
        for name in sorted({m.closing.attempt.batch_id for m in moved if m.hold is not None}):
            self._store.release_full_pack(tx, name, packed[name].max_tasks)

    def _keep_log(self, place: Place, failed: tuple[str, OpenAttempt]) -> None:
        """Keep the last lines of a failed task; without them the outcome stands all the same."""
        handle, attempt = failed
        try:
            lines = list(place.backend.logs(handle, attempt.task_index, LOG_LINES))
        except (Unavailable, Rejected) as error:
            log.info("no log tail", handle=handle, why=str(error))
            return
        if lines:
            self._store.attach_log(attempt, plain("\n".join(lines)))


def end_finished_batches(store: Store, tx: sa.Connection, batch_ids: Iterable[str]) -> None:
    """End those of the locked batches of which no chunk is open."""
    for row in store.finished_batches(tx, batch_ids):
        state, reason = verdict(
            succeeded=row.succeeded,
            failed=row.failed,
            cancelled=row.cancelled,
            max_failed_chunks=row.max_failed_chunks,
            cancel_kind=row.cancel_kind,
            cancel_reason=row.cancel_reason,
            example=row.example,
        )
        store.end_batch(tx, row.id, state, reason)


def _closings(
    row: ExecutionRow, ending: Ending, attempts: dict[tuple[int, int], OpenAttempt]
) -> list[Closing]:
    """Say how the open attempts of an execution ended; what was settled before is left out."""
    closings = []
    for told in ending.tasks:
        attempt = attempts.pop((row.id, told.index), None)
        if attempt is not None:
            task = _storable(told)
            outcome, reason = judge(task, row.cancel_kind, row.cancel_sent_at)
            closings.append(
                Closing(
                    attempt,
                    outcome,
                    task.exit_code,
                    None if reason is None else plain(reason),
                    task.started_at,
                    task.ended_at,
                    None if task.result_uri is None else plain(task.result_uri),
                )
            )
    if ending.final:
        outcome, reason = ending.rest
        left = [attempts.pop(place) for place in sorted(attempts) if place[0] == row.id]
        for attempt in left:
            task = TaskReport(attempt.task_index, outcome, reason=reason)
            judged, why = judge(task, row.cancel_kind, row.cancel_sent_at)
            closings.append(Closing(attempt, judged, None, why, None, None))
    return closings


def _storable(task: TaskReport) -> TaskReport:
    """Make what a backend says fit the rows: exit codes may be larger, times without a zone."""
    code, reason = task.exit_code, task.reason
    if code is not None and not -(2**31) <= code < 2**31:
        code, reason = None, f"{reason or 'ended'} (exit code {code})"
    began, ended = (
        at.replace(tzinfo=UTC) if at is not None and at.tzinfo is None else at
        for at in (task.started_at, task.ended_at)
    )
    return replace(task, exit_code=code, reason=reason, started_at=began, ended_at=ended)


def _starts(closings: Iterable[Closing]) -> dict[int, datetime | None]:
    """Find when executions started, from their tasks."""
    starts: dict[int, datetime | None] = {}
    for closing in closings:
        began, known = closing.started_at, starts.get(closing.attempt.execution_id)
        if began is not None and (known is None or began < known):
            starts[closing.attempt.execution_id] = began
    return starts


def _parts(endings: Sequence[Ending]) -> Iterator[list[Ending]]:
    """Cut endings into parts that are settled in one transaction each."""
    part: list[Ending] = []
    tasks = 0
    for ending in endings:
        part.append(ending)
        tasks += len(ending.tasks) or 1
        if tasks >= SETTLE_TASKS:
            yield part
            part, tasks = [], 0
    if part:
        yield part
