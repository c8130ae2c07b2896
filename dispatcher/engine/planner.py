"""Plan: a batch's items are read and cut into chunks, all in one transaction or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Mapping
from datetime import timedelta
from typing import Final

import structlog
from pydantic import ValidationError

from dispatcher.engine.place import Place
from dispatcher.errors import InvalidInput, Unreachable
from dispatcher.item_source import run_source
from dispatcher.items import split_items
from dispatcher.job import Job
from dispatcher.planning import plan_chunks
from dispatcher.requests import check_chunk
from dispatcher.storage import read_items
from dispatcher.store import Planning, Store

__all__ = ["Planner"]

log = structlog.get_logger(__name__)

OURS: Final = "DISPATCHER_"
"""Variables that item sources do not get, as jobs do not: the database's password is in one."""

PLAN_ROWS: Final = 1_000
PLAN_BYTES: Final = 4 << 20


class Planner:
    """Plans batches."""

    def __init__(self, store: Store, places: Mapping[str, Place]) -> None:
        self._store = store
        self._places = places

    def plan(self, batch_id: str) -> str | None:
        """Cut a batch into chunks; the name of its target if it can be launched now, else None."""
        try:
            with self._store.planning(batch_id) as planning:
                if planning is None:
                    return None
                job = Job.model_validate(planning.job)
                place = self._places.get(job.target)
                if place is None:
                    return None
                return job.target if self._plan(planning, job, place) else None
        except _Undo:
            return None
        except (InvalidInput, ValidationError) as error:
            log.warning("cannot be planned", batch=batch_id, reason=str(error))
            self._store.fail_plan(batch_id, str(error))
        except _NotNow as error:
            wait_for = timedelta(seconds=min(300.0, 5.0 * 2 ** min(error.tries, 10)))
            log.warning("planning postponed", batch=batch_id, reason=str(error))
            self._store.postpone_plan(batch_id, wait_for, str(error))
        return None

    def _plan(self, planning: Planning, job: Job, place: Place) -> bool:
        """Write the chunks of a held batch; whether there are any."""
        if job.receipt == "required" and not _takes_results(place):
            raise InvalidInput(
                f"job {job.name} requires receipts, and the tasks of target {job.target} have "
                "nowhere to write them: set DISPATCHER_STORAGE_URL for the workers, to a place "
                "that the containers can write"
            )
        items, chunks, rows, size = 0, 0, list[tuple[int, int, float | None, str]](), 0
        largest, heaviest = place.backend.limits.max_payload_bytes, 0
        with contextlib.closing(self._items(planning, job)) as texts:
            for cut in plan_chunks(texts, job.chunk, max_payload_bytes=largest):
                check_chunk(
                    job,
                    planning.batch_id,
                    planning.params,
                    cut.index,
                    cut.items,
                    max_text_bytes=place.backend.limits.max_text_bytes,
                )
                rows.append((cut.index, cut.count, cut.weight, cut.items))
                items, chunks, size = items + cut.count, chunks + 1, size + cut.bytes
                heaviest = max(heaviest, cut.bytes)
                if len(rows) == PLAN_ROWS or size > PLAN_BYTES:
                    planning.write(rows)
                    rows, size = [], 0
        if rows:
            planning.write(rows)
        if not planning.finish(items, chunks, heaviest):
            raise _Undo
        return chunks > 0

    def _items(self, planning: Planning, job: Job) -> Generator[str, None, None]:
        """Stream the items of a batch from where they are."""
        if planning.items_from == "pages":
            for page in planning.pages():
                yield from split_items(page)
            return
        if planning.items_from == "source":
            if job.items is None:
                raise InvalidInput(f"job {job.name} has no item source any more")
            source = job.items
            stream = run_source(
                source.source,
                planning.params,
                timeout=source.timeout.total_seconds(),
                env={k: v for k, v in os.environ.items() if not k.startswith(OURS)},
            )
        else:
            stream = read_items(planning.items_from)
        with stream:
            try:
                yield from stream
            except Unreachable as error:
                raise _NotNow(str(error), planning.tries) from error


def _takes_results(place: Place) -> bool:
    """Say if the tasks of a target can leave results."""
    return place.storage is not None or place.backend.limits.own_results


class _Undo(Exception):
    """Takes a plan back: its batch was cancelled meanwhile."""


class _NotNow(Exception):
    """What a plan needs does not answer."""

    def __init__(self, message: str, tries: int) -> None:
        super().__init__(message)
        self.tries = tries
