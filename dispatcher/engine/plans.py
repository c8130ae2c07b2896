"""The jobs of batches, read against the backends of their targets, and remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock
from typing import Final

import sqlalchemy as sa
import structlog
from pydantic import ValidationError

from dispatcher.engine.place import Place
from dispatcher.job import Job
from dispatcher.requests import Plan
from dispatcher.states import CancelKind
from dispatcher.store import Store

__all__ = ["PlanCache"]

log = structlog.get_logger(__name__)

REMEMBERED: Final = 1000


class PlanCache:
    """Remembers how batches are launched: their jobs never change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._lock = Lock()

    def of(self, tx: sa.Connection, batch_ids: Iterable[str], place: Place) -> dict[str, Plan]:
        """Read the jobs of batches, from memory where they were read before: they never change."""
        with self._lock:
            plans = {i: self._plans[i] for i in batch_ids if i in self._plans}
        missing = [i for i in batch_ids if i not in plans]
        for batch_id, (job, params, labels) in (
            self._store.jobs(tx, missing).items() if missing else ()
        ):
            try:
                plan = Plan.read(batch_id, Job.model_validate(job), params, labels, place.backend)
            except ValidationError as error:
                reason = f"the job cannot be run on target {place.target.name}: {error}"
                log.warning("job cannot be run", batch=batch_id, reason=reason)
                self._store.request_cancel(tx, batch_id, CancelKind.INVALID, reason)
                continue
            plans[batch_id] = plan
            with self._lock:
                self._plans[batch_id] = plan
                while len(self._plans) > REMEMBERED:
                    self._plans.popitem(last=False)
        return plans
