"""Poll: reports on what runs, a page a call, handed to settle as soon as a task has ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Final

import structlog

from dispatcher.backends.base import (
    Handle,
    Phase,
    Rejected,
    Report,
)
from dispatcher.engine.claiming import Claims
from dispatcher.engine.place import Ending, Place, is_throttled, report_breach
from dispatcher.engine.settler import SETTLE_TASKS, Settler
from dispatcher.errors import DispatcherError
from dispatcher.polling import page_interval
from dispatcher.states import Outcome
from dispatcher.store import Store, again
from dispatcher.watching import Watched

__all__ = ["Poller"]

log = structlog.get_logger(__name__)

NOT_SETTLED: Final = 5.0
"""Seconds after which what could not be settled is looked at anew."""


class Poller:
    """Asks backends for reports and writes what the rows do not say yet."""

    def __init__(
        self, store: Store, settler: Settler, claims: Claims, monotonic: Callable[[], float]
    ) -> None:
        self._store = store
        self._settler = settler
        self._claims = claims
        self._monotonic = monotonic

    def poll(self, place: Place) -> int:
        """Ask for reports on what is due for one, a page a call; settle what ended.

        Returns how many tasks were settled.
        """
        store, watch = self._store, place.watch
        new = watch.keep(store.live_ids(place.target.name))
        for at in range(0, len(new), 1000):
            rows = store.executions(new[at : at + 1000])
            packed = [row.id for row in rows if row.tasks > 1]
            settled = store.settled_tasks(packed) if packed else {}
            watch.add(rows, settled, self._monotonic())
        pages = watch.due(self._monotonic(), place.backend.limits.page_size)
        if not pages:
            return 0
        apart = max(
            page_interval(len(pages), place.target.reads_per_minute),
            place.backend.limits.poll_interval.total_seconds(),
        )
        watch.pause(self._monotonic() + apart)
        asked = self._monotonic()
        polls = {
            place.readers.submit(place.backend.poll, [one.handle for one in page]): page
            for page in pages
        }
        notes, settled_now = _Notes(), 0
        open_polls = set(polls)
        try:
            while open_polls:
                done, open_polls = wait(open_polls, return_when=FIRST_COMPLETED)
                for future in done:
                    self._read(place, polls[future], future, asked, notes)
                if notes.tasks >= SETTLE_TASKS:
                    self._apply(place, notes)
                    settled_now, notes = settled_now + notes.tasks, _Notes()
            self._apply(place, notes)
        except BaseException:
            # What was noted and could not be written must be noted again: from the rows, anew.
            for execution_id in notes.touched():
                watch.forget(execution_id)
            raise
        return settled_now + notes.tasks

    def _read(
        self,
        place: Place,
        page: Sequence[Watched],
        future: Future[Mapping[Handle, Report]],
        asked: float,
        notes: _Notes,
    ) -> None:
        """Note what a page of reports says. An error says nothing about any execution.

        `asked` is from when on it was asked for: it may be read much later.
        """
        now = self._monotonic()
        error = future.exception()
        if error is not None:
            report_breach(error)
            place.poll_failures += 1
            place.watch.failed(page, now, place.poll_failures)
            if not is_throttled(error):
                place.went_down(str(error))  # else it answers, and asked for fewer calls
            return
        place.poll_failures = 0
        place.came_up()
        reports = future.result()
        for one in page:
            report = reports.get(one.handle)
            if report is None:
                place.watch.untold(one, now)
            elif report.phase is Phase.ABSENT:
                self._read_absent(place, one, asked, now, notes)
            elif not self._follow_winner(place, one, report, now):
                self._read_present(place, one, report, now, notes)

    def _follow_winner(self, place: Place, one: Watched, report: Report, now: float) -> bool:
        """Turn from an execution whose claim another one has to that one; whether it was so."""
        if not self._claims.may_be_double(place, report, one.calls, one.settled):
            return False
        try:
            followed = self._claims.follow(place, one.id, one.handle)
        except DispatcherError as error:
            log.warning("a claim cannot be read now", handle=one.handle, why=str(error))
            place.watch.put_off([one.id], now + NOT_SETTLED)
            return True
        if followed:
            place.watch.put_off([one.id], now)
        return followed

    def _read_present(
        self, place: Place, one: Watched, report: Report, now: float, notes: _Notes
    ) -> None:
        """Note what a report says that the rows do not say yet."""
        if one.absent is not None:
            one.absent = None
            notes.present.append(one.id)
        started = report.phase is not Phase.PENDING
        if started and not one.started and report.phase is not Phase.ENDED:
            one.started = True
            notes.started[one.id] = report.started_at
        ended = tuple(task for task in report.tasks if task.index not in one.settled)
        final = report.phase is Phase.ENDED
        if final:
            place.watch.ended(one, _seconds(report))
        else:
            more_in = report.more_in
            place.watch.seen(one, now, None if more_in is None else more_in.total_seconds())
            one.settled.update(task.index for task in ended)
        if ended or final:
            notes.endings.append(Ending(one.id, ended, final, handle=one.handle))
            notes.tasks += len(ended) or 1

    def _read_absent(
        self, place: Place, one: Watched, asked: float, now: float, notes: _Notes
    ) -> None:
        """Give up an execution that stays unknown to the provider, after a last cancel."""
        first = one.absent is None
        if one.absent is None:
            one.absent = now
            notes.absent.append(one.id)
        grace = place.backend.limits.absent_grace.total_seconds()
        if asked - one.absent < grace:
            one.next_look = now + min(grace, max(1.0, grace / 3))
            return
        if not first and not self._is_absent(one, grace):
            place.watch.put_off([one.id], now)
            return
        try:
            place.backend.cancel(one.handle)
        except Rejected as error:  # asked again it would say the same, and it is gone
            log.info("last cancel of an absent execution", handle=one.handle, why=str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, it says nothing of the others
            report_breach(error)
            log.info("last cancel of an absent execution", handle=one.handle, why=str(error))
            place.watch.seen(one, now)
            return
        place.watch.forget(one.id)
        reason = "the provider no longer knows it"
        rest = (Outcome.LOST, reason)
        notes.endings.append(
            Ending(one.id, final=True, rest=rest, reason=reason, handle=one.handle, absent=True)
        )
        notes.tasks += one.tasks

    def _is_absent(self, one: Watched, grace: float) -> bool:
        """Say if the row says so too, before it is stopped: another worker may have seen it."""
        (row,) = self._store.executions([one.id]) or (None,)
        if row is None or row.handle != one.handle or row.absent_for is None:
            return False
        return row.absent_for >= grace

    def _apply(self, place: Place, notes: _Notes) -> None:
        """Write what was noted."""
        if notes.present:
            again(partial(self._store.mark_present, sorted(notes.present)))
        if notes.started:
            again(partial(self._store.mark_started, dict(sorted(notes.started.items()))))
        if notes.absent:
            again(partial(self._store.mark_absent, sorted(notes.absent)))
        left = self._settler.settle(place, notes.endings)
        place.watch.put_off(left, self._monotonic() + NOT_SETTLED)


@dataclass(slots=True)
class _Notes:
    """What a round of reports said that the rows do not say yet."""

    endings: list[Ending] = field(default_factory=list)
    started: dict[int, datetime | None] = field(default_factory=dict)
    absent: list[int] = field(default_factory=list)
    present: list[int] = field(default_factory=list)
    tasks: int = 0

    def touched(self) -> set[int]:
        """Name every execution that something was noted of."""
        ended = (ending.execution_id for ending in self.endings)
        return {*ended, *self.started, *self.absent, *self.present}


def _seconds(report: Report) -> float | None:
    """Say how long an execution ran by the provider's times, if it gives them."""
    began = [task.started_at for task in report.tasks if task.started_at is not None]
    ended = [task.ended_at for task in report.tasks if task.ended_at is not None]
    if not began or not ended:
        return None
    return max(0.0, (max(ended) - min(began)).total_seconds())
