"""Fire: a schedule's due time and its batch are written in one transaction, once."""

from __future__ import annotations

import sqlalchemy as sa
import structlog

from dispatcher.config import Config
from dispatcher.enqueueing import scheduled
from dispatcher.errors import DispatcherError, InvalidInput
from dispatcher.schedule import FIRST_SEEN, Firing, Schedule, firings
from dispatcher.store import Store

__all__ = ["Firer"]

log = structlog.get_logger(__name__)


class Firer:
    """Turns due times into batches, however many fire at once."""

    def __init__(self, store: Store, config: Config) -> None:
        self._store = store
        self._config = config

    def fire(self) -> list[str]:
        """Fire what is due of every schedule; the batches that were enqueued.

        A schedule that cannot be fired keeps no other from it, whatever the reason: it is logged
        and tried again the next time.
        """
        fired: list[str] = []
        for schedule in self._config.schedules.values():
            try:
                fired += self._fire(schedule)
            except DispatcherError as error:
                log.warning("not fired; tried again", schedule=schedule.name, why=str(error))
            except Exception:
                log.exception("not fired; tried again", schedule=schedule.name)
        return fired

    def _fire(self, schedule: Schedule) -> list[str]:
        """Fire what is due of one schedule since its last recorded time."""
        with self._store.transaction() as tx:
            held = self._store.hold_schedule(tx, schedule.name)
            if held is None:
                return []
            last, now = held
            if last is None:
                # From here on: a new schedule has missed nothing.
                self._store.record_firing(tx, schedule.name, now, batch_id=None, reason=FIRST_SEEN)
                return []
            fired = [self._write(tx, schedule, due) for due in firings(schedule, last, now)]
        return [batch for batch in fired if batch is not None]

    def _write(self, tx: sa.Connection, schedule: Schedule, due: Firing) -> str | None:
        """Write one due time, and its batch if it has one."""
        batch_id, reason = None, due.skipped
        if reason is None:
            try:
                with tx.begin_nested():
                    batch_id = self._enqueue(tx, schedule, due)
            except InvalidInput as error:
                reason = str(error)
                log.error("schedule cannot be fired", schedule=schedule.name, why=reason)  # noqa: TRY400 - the text says it
        self._store.record_firing(tx, schedule.name, due.due_at, batch_id=batch_id, reason=reason)
        return batch_id

    def _enqueue(self, tx: sa.Connection, schedule: Schedule, due: Firing) -> str:
        """Write the batch of a due time; its key keeps it from being written twice for ever."""
        with scheduled(self._config.job(schedule.job), schedule, due.due_at) as request:
            return request.write(self._store, tx, patient=True)
