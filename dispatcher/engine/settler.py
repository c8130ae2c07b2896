"""Settle: outcomes are written, retries decided, chunks moved and, with the last one, the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Final, TypeAlias

import sqlalchemy as sa
import structlog

from dispatcher.backends.base import (
    Rejected,
    TaskReport,
    Unavailable,
)
from dispatcher.engine.moving import Splits, move
from dispatcher.engine.place import Ending, Place, plain
from dispatcher.engine.plans import PlanCache
from dispatcher.engine.receipts import Found, Listings, ReceiptReader, TaskPlace
from dispatcher.errors import DispatcherError
from dispatcher.items import join_items, split_items
from dispatcher.judging import beyond, judge, verdict
from dispatcher.receipts import STORAGE_PATIENCE, halves, open_positions, weigh
from dispatcher.requests import Plan
from dispatcher.states import CancelKind, ChunkState, Cut, Outcome
from dispatcher.store import Store, again
from dispatcher.store.rows import (
    Closing,
    ExecutionRow,
    MovedChunk,
    OpenAttempt,
    Part,
    ToSplit,
)

__all__ = ["Settler", "end_finished_batches"]

log = structlog.get_logger(__name__)

SETTLE_TASKS: Final = 2_000
"""Tasks settled in one transaction, about."""

SETTLE_RECEIPTS: Final = 500
"""The same where receipts are read: each may tell of many items."""

SPLIT_AT_ONCE: Final = 100
"""Chunks that waited for it and are split in one transaction; the next settle splits more."""

ALL: Final = 2**31 - 1

LOGGED_FAILURES: Final = 5
"""Log tails kept from one settle: enough to see why, within a provider's quota of log reads."""

LOG_LINES: Final = 20

Failed: TypeAlias = tuple[str, OpenAttempt]
"""The handle and the attempt of a task that ended badly."""


class Settler:
    """Settles attempts, as soon as their tasks are known to have ended."""

    def __init__(
        self,
        store: Store,
        plans: PlanCache,
        receipts: ReceiptReader,
        roll: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._store = store
        self._plans = plans
        self._receipts = receipts
        self._roll = roll
        self._monotonic = monotonic
        self._waited: dict[TaskPlace, float] = {}
        """Since when the receipts of tasks are waited for."""

    def settle(self, place: Place, endings: Sequence[Ending]) -> set[int]:
        """Write outcomes, decide on retries, move chunks and, with the last one, the batch.

        Returns the executions of which something could not be settled: their receipts cannot be
        read now, or the rows not be written. They must be looked at anew.
        """
        left: set[int] = set()
        most = SETTLE_TASKS if place.storage is None else SETTLE_RECEIPTS
        listings, logs = Listings(), LOGGED_FAILURES
        for pieces in _parts(endings, most):
            # Of what something was left nothing ends here: it would be taken for lost.
            part = [replace(p, final=False) if p.execution_id in left else p for p in pieces]
            reading = self._receipts.read(place, part, listings)
            waited_for = self._still_waited_for(reading.unread)
            unread = waited_for | reading.later
            left |= {execution_id for execution_id, _ in unread}
            waiting = frozenset(execution_id for execution_id, _ in waited_for)
            ready = list(_without(part, unread, reading.looked))
            if ready:
                failed, unsettled = self._settle_part(place, ready, reading.found, waiting)
                left |= unsettled
                for one in failed[:logs]:
                    # Who gives no log now would keep what waits to be settled waiting.
                    logs = logs - 1 if self._keep_log(place, one) else 0
            if waiting:
                again(partial(self._store.mark_unread, sorted(waiting)))
        return left

    def _still_waited_for(self, unread: set[TaskPlace]) -> set[TaskPlace]:
        """Name the tasks whose receipts are waited for: a storage that stays away holds up nothing.

        After that long the provider's word decides, and where a receipt is required, its lack.
        """
        now, patience = self._monotonic(), STORAGE_PATIENCE.total_seconds()
        for task in self._waited.keys() - unread:
            if now - self._waited[task] > 2 * patience:
                del self._waited[task]
        for task in unread:
            self._waited.setdefault(task, now)
        given_up = {task for task in unread if now - self._waited[task] > patience}
        if given_up:
            log.error("receipts are given up: the storage does not answer", tasks=len(given_up))
        return unread - given_up

    def _settle_part(
        self, place: Place, part: Sequence[Ending], found: Found, waiting: frozenset[int]
    ) -> tuple[list[Failed], set[int]]:
        """Settle in one transaction, or one by one if a single ending spoils it for the others."""
        try:
            return again(partial(self._settle, place, part, found, waiting)), set()
        except DispatcherError:
            raise
        except Exception:
            log.exception("cannot be settled", executions=[one.execution_id for one in part][:10])
            if len(part) == 1:
                return [], {part[0].execution_id}
        failed: list[Failed] = []
        left: set[int] = set()
        for one in part:
            more, unsettled = self._settle_part(place, [one], found, waiting)
            failed += more
            left |= unsettled
        return failed, left

    def _settle(
        self, place: Place, endings: Sequence[Ending], found: Found, waiting: frozenset[int]
    ) -> list[Failed]:
        """Settle in one transaction; the handles and attempts of tasks that ended badly.

        `waiting` are the executions of which other tasks still wait for the storage.
        """
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
            closings = [_with_receipt(c, found, plans) for c in closings]
            moved = self._moves(tx, closings, batches, executions, ended, plans)
            if moved:
                store.close_attempts(tx, moved)
                store.write_results(tx, moved)
                self._split(tx, moved)
                self._split_waiting(tx, {c.attempt.batch_id for c in closings})
            if closed:
                store.finish_tasks(tx, closed, ended, _starts(closings), waiting)
            self._release(tx, moved, ended, plans)
            self._stop_early(tx, moved, plans)
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
        splits = {name: self._splits(tx, name, plans) for name in {a.batch_id for a in bad}}
        moved = []
        for closing in closings:
            attempt = closing.attempt
            chunk = move(
                closing,
                plans.get(attempt.batch_id),
                cancel=batches.get(attempt.batch_id),
                tally=tallies.get((attempt.batch_id, attempt.chunk_index), {}),
                roll=rolls[attempt.execution_id],
                goes_on=attempt.execution_id not in ended,
                splits=splits.get(attempt.batch_id, Splits(0, 0)),
            )
            moved.append(chunk)
        return moved

    def _splits(self, tx: sa.Connection, batch_id: str, plans: Mapping[str, Plan]) -> Splits:
        """Count what was split in a batch, where its job splits chunks at all."""
        plan = plans.get(batch_id)
        if plan is None or plan.job.retry.on_failure != "split":
            return Splits(0, 0)
        split, succeeded, _ = self._store.splits(tx, batch_id)
        return Splits(split, succeeded)

    def _split(self, tx: sa.Connection, moved: Sequence[MovedChunk]) -> None:
        """Write the chunks in which the items of split ones go on."""
        for one in moved:
            if one.state is ChunkState.SPLIT and one.cut is not None:
                of = one.closing.attempt
                self._write_parts(
                    tx, ToSplit(of.batch_id, of.chunk_index, of.size, of.depth, one.cut)
                )

    def _split_waiting(self, tx: sa.Connection, batch_ids: Iterable[str]) -> None:
        """Split chunks that waited for successes of their batches, or fail them in the end."""
        for batch_id in self._store.awaiting_split(tx, batch_ids):
            split, succeeded, others = self._store.splits(tx, batch_id)
            splits = Splits(split, succeeded)
            state, most = ChunkState.SPLIT, min(splits.room, SPLIT_AT_ONCE)
            why = "enough of this batch has succeeded"
            if not most:
                if others:
                    continue
                state, most = ChunkState.FAILED, ALL
                why = f"not split further, as {split} chunks were and {succeeded} succeeded"
            for one in self._store.end_wait(tx, batch_id, state, why, most=most):
                cut = splits.take(one.cut)
                if cut is not None:
                    self._write_parts(tx, one._replace(cut=cut))

    def _write_parts(self, tx: sa.Connection, one: ToSplit) -> None:
        """Write the chunks in which the items of one go on."""
        texts = split_items(self._store.chunk_text(tx, one.batch_id, one.chunk_index))
        done = self._store.items_done(tx, one.batch_id, [one.chunk_index])
        succeeded = done.get(one.chunk_index, [])
        cut = halves(open_positions(one.size, succeeded), first_alone=one.cut is Cut.FIRST)
        parts = [
            Part(positions, join_items(texts[p] for p in positions), positions is succeeded)
            for positions in (*cut, *([succeeded] if succeeded else []))
        ]
        self._store.split(tx, one, parts, f"split from chunk {one.chunk_index}")

    def _stop_early(
        self, tx: sa.Connection, moved: Sequence[MovedChunk], plans: Mapping[str, Plan]
    ) -> None:
        """Cancel batches whose success policy can no longer be met, where it says so."""
        failing = {one.closing.attempt.batch_id for one in moved if one.state is ChunkState.FAILED}
        strict = [
            batch_id
            for batch_id in failing
            if batch_id in plans and plans[batch_id].job.success.stops_early
        ]
        for row in self._store.standing_of(tx, strict) if strict else ():
            why = beyond(row)
            if why is not None:
                self._store.request_cancel(tx, row.id, CancelKind.SUCCESS_POLICY, why)

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

    def _keep_log(self, place: Place, failed: tuple[str, OpenAttempt]) -> bool:
        """Keep the last lines of a failed task; without them the outcome stands all the same.

        Returns whether they could be asked for.
        """
        handle, attempt = failed
        try:
            lines = list(place.backend.logs(handle, attempt.task_index, LOG_LINES))
        except (Unavailable, Rejected) as error:
            log.info("no log tail", handle=handle, why=str(error))
            return isinstance(error, Rejected)
        if lines:
            self._store.attach_log(attempt, plain("\n".join(lines)))
        return True


def end_finished_batches(store: Store, tx: sa.Connection, batch_ids: Iterable[str]) -> None:
    """End those of the locked batches of which no chunk is open."""
    for row in store.finished_batches(tx, batch_ids):
        state, reason = verdict(row)
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
        left = [place for place in sorted(attempts) if place[0] == row.id]
        for attempt in [attempts.pop(p) for p in left if p[1] not in ending.elsewhere]:
            task = TaskReport(attempt.task_index, outcome, reason=reason)
            judged, why = judge(task, row.cancel_kind, row.cancel_sent_at)
            closings.append(Closing(attempt, judged, None, why, None, None))
    return closings


def _with_receipt(closing: Closing, found: Found, plans: Mapping[str, Plan]) -> Closing:
    """Weigh what a task wrote with what the provider says of it."""
    attempt = closing.attempt
    plan = plans.get(attempt.batch_id)
    told = found.get((attempt.execution_id, attempt.task_index))
    receipt = None if told is None else told.receipt
    required = plan is not None and plan.job.receipt == "required"
    problem = None
    if told is not None and (required or not told.foreign):
        problem = told.problem
    outcome, reason = weigh(closing.outcome, closing.reason, receipt, problem, required=required)
    if receipt is None:
        return closing._replace(outcome=outcome, reason=reason)
    return closing._replace(
        outcome=outcome,
        reason=reason,
        result_uri=receipt.uri or closing.result_uri,
        results=receipt.items,
        receipt="complete" if receipt.complete else "partial",
    )


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


def _parts(endings: Sequence[Ending], most: int) -> Iterator[list[Ending]]:
    """Cut endings into parts that are settled in one transaction each; a large one into pieces."""
    part: list[Ending] = []
    tasks = 0
    for ending in endings:
        for piece in _pieces(ending, most):
            part.append(piece)
            tasks += len(piece.tasks) or 1
            if tasks >= most:
                yield part
                part, tasks = [], 0
    if part:
        yield part


def _without(
    part: Sequence[Ending], unread: Collection[TaskPlace], looked: Collection[TaskPlace]
) -> Iterator[Ending]:
    """Leave out the tasks whose receipts cannot be read now; their executions go on until then.

    What an end says of tasks that no report tells of is said of those that have been looked at: the
    next round would else begin with the same ones, and come no further.
    """
    waiting = {execution_id for execution_id, _ in unread}
    for one in part:
        if one.execution_id not in waiting:
            yield one
            continue
        tasks = [task for task in one.tasks if (one.execution_id, task.index) not in unread]
        if one.final:
            told = one.elsewhere.union(task.index for task in one.tasks)
            outcome, reason = one.rest
            tasks += [
                TaskReport(index, outcome, reason=reason)
                for execution_id, index in sorted(looked)
                if execution_id == one.execution_id and index not in told
            ]
        if tasks:
            yield replace(one, tasks=tuple(tasks), final=False)


def _pieces(ending: Ending, most: int) -> Iterator[Ending]:
    """Cut an ending of many tasks; only with the last piece does the execution end."""
    elsewhere = ending.elsewhere
    while len(ending.tasks) > most:
        piece, rest = ending.tasks[:most], ending.tasks[most:]
        yield replace(ending, tasks=piece, final=False)
        elsewhere = elsewhere.union(task.index for task in piece)
        ending = replace(ending, tasks=rest, elsewhere=elsewhere)
    yield ending
