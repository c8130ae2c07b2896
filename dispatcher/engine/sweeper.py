"""Sweep: what a lost message, a crash or a deadline has left behind is found, and done again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Final

import structlog

from dispatcher.backends.base import (
    BackendError,
    Crowded,
    Rejected,
    Unavailable,
)
from dispatcher.documents import STORED
from dispatcher.engine.claiming import Claims
from dispatcher.engine.launcher import Launcher
from dispatcher.engine.place import READERS, Ending, Place, is_throttled, report_breach
from dispatcher.engine.settler import Settler, end_finished_batches
from dispatcher.errors import DispatcherError, Unreachable
from dispatcher.judging import ASKED
from dispatcher.states import CancelKind
from dispatcher.storage import Storage
from dispatcher.store import Conflict, Store, again
from dispatcher.store.rows import (
    ExecutionRow,
)

__all__ = ["Sweeper"]

log = structlog.get_logger(__name__)

BUSY: Final = 1.0
"""Seconds that one kind of step goes on within a turn."""

WAIT_AFTER_ERROR: Final = 30.0
STRAYS_SINCE: Final = timedelta(days=7)

STORAGE_EVERY: Final = 3600.0
"""Seconds between two looks for what is old in the storage: a listing may be long."""


class Sweeper:
    """Does what is due for single executions and for batches."""

    def __init__(
        self,
        store: Store,
        launcher: Launcher,
        settler: Settler,
        claims: Claims,
        monotonic: Callable[[], float],
        keep: timedelta,
    ) -> None:
        self._claims = claims
        self._store = store
        self._launcher = launcher
        self._settler = settler
        self._monotonic = monotonic
        self._keep = keep
        self._next_storage = 0.0

    def tend(self, place: Place) -> None:
        """Do what is due for single executions."""
        name = place.target.name
        self._store.expire_calls(name)
        due = self._store.due(name)
        if not due:
            return
        for kind, reason in (
            (CancelKind.START_TIMEOUT, "no task started within start_timeout"),
            (CancelKind.TIMEOUT, "ran past its deadline"),
        ):
            late = place.watch.fresh([row.id for row in due.get(kind, ())], self._monotonic())
            if late:
                self._store.cancel_executions(late, kind, reason)
        self._settler.settle(
            place,
            [
                Ending(row.id, final=True, rest=ASKED[CancelKind(row.cancel_kind)], call=row.calls)
                for row in due.get("uncalled", ())
                if row.cancel_kind is not None
            ],
        )
        calls = due.get("call", [])
        if calls:
            calls = calls[: self._launcher.calls_allowed(place, len(calls))]
        looks = due.get("look", []) if not place.looks.lasts(self._monotonic()) else []
        if place.looks.failures:
            looks = _one_of_each_job(looks)  # enough to find out whether it answers again
        for rows, step in (
            (due.get("cancel", []), self._cancel),
            (looks, partial(self._each, step=self._launcher.look)),
            (calls, partial(self._each, step=self._launcher.call_again)),
        ):
            # A few at a time, and for a short time: the rest stays due, and polls go on between.
            end = self._monotonic() + BUSY
            for at in range(0, len(rows), READERS):
                step(place, rows[at : at + READERS])
                if self._monotonic() >= end:
                    break

    def _each(
        self,
        place: Place,
        rows: Sequence[ExecutionRow],
        *,
        step: Callable[[Place, ExecutionRow], None],
    ) -> None:
        """Take a step for some executions at once; what goes wrong with one is its own."""
        for row, future in [(row, place.readers.submit(step, place, row)) for row in rows]:
            error = future.exception()
            if isinstance(error, Conflict):
                log.info("met another transaction; again at the next turn", why=str(error))
            elif isinstance(error, Unreachable):
                raise error
            elif error is not None:
                log.error("cannot be cleared up", key=row.key, exc_info=error)
                self._store.postpone_look(row.id, WAIT_AFTER_ERROR)
                self._store.postpone_call(row.id, WAIT_AFTER_ERROR)

    def _cancel(self, place: Place, rows: Sequence[ExecutionRow]) -> None:
        """Ask for the end of some executions; a report will confirm it, or they are asked again."""
        wanted = self._store.cancel_sent(
            {row.id: min(60.0, 2.0 * 2 ** min(row.cancel_calls, 6)) for row in rows}
        )
        calls = [
            (row.id, place.readers.submit(place.backend.cancel, row.handle))
            for row in rows
            if row.id in wanted and row.handle is not None
        ]
        failures = []
        refused = []
        for execution_id, call in calls:
            error = call.exception()
            if error is not None:
                failures.append(error)
                if is_throttled(error):
                    refused.append(execution_id)
        if refused:
            self._store.cancel_unsent(refused)
        for error in failures:
            report_breach(error, Rejected)
        for error in failures:
            if not isinstance(error, Rejected) and not is_throttled(error):
                place.went_down(str(error))
                break
        place.watch.hurry(wanted, self._monotonic())

    def batches(self, targets: Collection[str]) -> list[str]:
        """Do again what a lost message or a crash has left undone, over all batches.

        A batch that cannot be moved keeps no other from it: it is logged and tried again the next
        time. Returns the batches of `targets` that wait to be planned, for the caller to plan.
        """
        for batch_id in self._store.overdue_batches():
            log.warning("batch deadline passed", batch=batch_id)
            self._sweep(self._expire_batch, batch_id)
        for batch_id in self._store.stalled_batches():
            self._sweep(self._end_stalled, batch_id)
        return self._store.unplanned(20, targets)

    def _sweep(self, step: Callable[[str], None], batch_id: str) -> None:
        """Take a step for one batch; a database that is gone ends the sweep, nothing else does."""
        try:
            again(partial(step, batch_id))
        except Unreachable:
            raise
        except DispatcherError as error:
            log.warning("not swept; tried again", batch=batch_id, why=str(error))
        except Exception:
            log.exception("not swept; tried again", batch=batch_id)

    def _end_stalled(self, batch_id: str) -> None:
        """End a batch whose last chunk ended and whose last move a crash has taken."""
        with self._store.transaction() as tx:
            self._store.lock_batches(tx, [batch_id])
            end_finished_batches(self._store, tx, [batch_id])

    def _expire_batch(self, batch_id: str) -> None:
        """Cancel a batch whose deadline passed."""
        with self._store.transaction() as tx:
            reason = "the batch's deadline passed"
            self._store.request_cancel(tx, batch_id, CancelKind.BATCH_DEADLINE, reason)
            end_finished_batches(self._store, tx, [batch_id])

    def strays(self, place: Place) -> None:
        """Cancel what runs on a target under our label and belongs to no live execution."""
        with self._store.transaction() as tx:
            instance = self._store.instance(tx)
        since = self._store.now() - STRAYS_SINCE
        try:
            running = list(place.backend.strays(instance, since))
        except BackendError as error:
            if not is_throttled(error):
                place.went_down(str(error))
            return
        place.down = True  # another worker may have said so, and nobody else may ask soon
        place.came_up()
        self._claims.sort_out(place, running, "it runs and no open execution owns it")

    def clean(self, place: Place) -> int:
        """Remove what finished executions have left, there and in the storage; say how much.

        By the database's time: a worker whose clock runs ahead would remove what is in use.
        """
        removed = 0
        now = self._store.now()
        try:
            removed += place.backend.clean(now)
        except Unavailable as error:
            log.info("not cleaned", target=place.target.name, why=str(error))
        if place.storage is not None and self._monotonic() >= self._next_storage:
            self._next_storage = self._monotonic() + STORAGE_EVERY
            removed += self._clean_storage(place.storage, now - self._keep)
        return removed

    def make_room(self, place: Place) -> int:
        """Remove what ended executions have left where places for it are few; say how much."""
        if not isinstance(place.backend, Crowded):
            return 0
        try:
            return place.backend.make_room(self._store.now(), self._store.recorded)
        except Unavailable as error:
            log.info("no room made", target=place.target.name, why=str(error))
            return 0

    def _clean_storage(self, storage: Storage, before: datetime) -> int:
        """Remove input documents, results and claims that were written before a time."""
        removed = 0
        for prefix in STORED:
            try:
                removed += storage.delete_older(prefix, before)
            except DispatcherError as error:
                log.info("storage not cleaned", prefix=prefix, why=str(error))
        return removed


def _one_of_each_job(rows: Sequence[ExecutionRow]) -> list[ExecutionRow]:
    """Pick the first of each job, of a few jobs: it may be one job that nobody answers for."""
    first: dict[str | None, ExecutionRow] = {}
    for row in rows:
        first.setdefault(row.job_name, row)
    return list(first.values())[:READERS]
