"""Receipts, read from where tasks wrote them: outside of every transaction, before a settle."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Final, TypeAlias

import structlog

from dispatcher.documents import result_prefix
from dispatcher.engine.place import Ending, Place
from dispatcher.engine.plans import PlanCache
from dispatcher.errors import DispatcherError, Unreachable
from dispatcher.receipts import (
    MAX_RECEIPT_BYTES,
    PROGRESS,
    Expected,
    InvalidReceipt,
    Receipt,
    progress_name,
    read_receipt,
    receipt_name,
)
from dispatcher.states import Outcome
from dispatcher.storage import Storage, TooLarge, read_object
from dispatcher.store import Store
from dispatcher.store.rows import OpenTask

__all__ = ["Found", "Listed", "Reading", "ReceiptReader", "TaskPlace", "Told"]

log = structlog.get_logger(__name__)

READ_AT_ONCE: Final = 16
"""Receipts that are read at the same time."""

PROGRESS_AT_ONCE: Final = 50
"""Running tasks whose progress is read in one turn."""

NEVER_RAN: Final = frozenset({Outcome.REJECTED, Outcome.START_FAILED, Outcome.NO_CAPACITY})
"""Ends of tasks whose command did not run: they have written nothing."""

_parsing: Final = Lock()
"""Parsed one at a time, as the interpreter does it anyway: 16 MiB of nonsense can take 400 MB until
they are refused, and so 16 of them at once more than a worker has."""

ROUND_BYTES: Final = 32 << 20
"""Bytes of receipts that are read in one round, about: as values they take several times that."""

TaskPlace: TypeAlias = tuple[int, int]
"""An execution's id and a task index."""

Listed: TypeAlias = dict[str, Collection[str]]
"""What tasks of an execution have written, by its key: listed once for all parts of a settle."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a task wrote: a receipt, or why what it wrote is none."""

    receipt: Receipt | None
    problem: str | None = None
    size: int = 0
    """Bytes of it."""

    foreign: bool = False
    """Whether that does not say that there is a receipt: it matters only where one is needed."""


Found: TypeAlias = Mapping[TaskPlace, Told]
"""What was found; a task that wrote nothing is not in it."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What came of a round of reading."""

    found: dict[TaskPlace, Told] = field(default_factory=dict)
    unread: set[TaskPlace] = field(default_factory=set)
    """Tasks of which it cannot be said now: the storage does not answer."""

    later: set[TaskPlace] = field(default_factory=set)
    """Tasks that were left: what was read is enough for one round."""

    looked: set[TaskPlace] = field(default_factory=set)
    """Tasks of which it is known now what they wrote, if anything."""


class ReceiptReader:
    """Finds and reads the receipts of tasks."""

    def __init__(self, store: Store, plans: PlanCache) -> None:
        self._store = store
        self._plans = plans
        self._readers = ThreadPoolExecutor(READ_AT_ONCE, "receipt")

    def close(self) -> None:
        """Let the threads end."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def read(self, place: Place, endings: Sequence[Ending], listed: Listed) -> Reading:
        """Read what the tasks of some endings wrote; `listed` keeps listings between calls."""
        ran = [one for one in endings if _may_have_written(one)]
        uris = {
            (one.execution_id, task.index): task.result_uri
            for one in ran
            for task in one.tasks
            if task.result_uri is not None and task.result_uri.startswith("file://")
        }
        if not ran or (place.storage is None and not uris):
            return Reading()
        final = {one.execution_id for one in ran if one.final}
        ended = {(one.execution_id, task.index) for one in ran for task in one.tasks}
        with self._store.transaction() as tx:
            tasks = self._store.open_tasks(tx, [one.execution_id for one in ran])
            plans = self._plans.of(tx, {task.batch_id for task in tasks}, place)
        wanted = [
            task
            for task in tasks
            if (task.execution_id in final or (task.execution_id, task.task_index) in ended)
            and task.batch_id in plans
            and plans[task.batch_id].job.receipt != "ignored"
        ]
        return self._read_all(place.storage, wanted, uris, listed)

    def follow_progress(self, place: Place) -> int:
        """Read how far some running tasks are, and write it down; how many told.

        It is for people only: nothing waits for it, and a task that is not looked at now is looked
        at in a later turn.
        """
        storage = place.storage
        if storage is None:
            return 0
        tasks = self._store.running_tasks(place.target.name, PROGRESS_AT_ONCE)
        with self._store.transaction() as tx:
            plans = self._plans.of(tx, {task.batch_id for task in tasks}, place)
        calls = {
            (task.execution_id, task.task_index): self._readers.submit(_progress, storage, task)
            for task in tasks
            if task.batch_id in plans and plans[task.batch_id].job.receipt != "ignored"
        }
        told = {where: call.result() for where, call in calls.items()}
        looked = {(task.execution_id, task.task_index): None for task in tasks}
        if looked:
            self._store.write_progress({**looked, **told})
        return sum(one is not None for one in told.values())

    def _read_all(
        self,
        storage: Storage | None,
        tasks: Sequence[OpenTask],
        uris: Mapping[tuple[int, int], str],
        listed: Listed,
    ) -> Reading:
        """Read all at once, as far as there is room; the rest is left for the next look."""
        reading = Reading()
        wanted: list[tuple[OpenTask, str | None, Collection[str] | None]] = []
        for group in _by_execution(tasks):
            try:
                written = _written(storage, group, listed) if storage is not None else None
            except Unreachable as error:
                log.warning("receipts cannot be listed now", key=group[0].key, why=str(error))
                reading.unread.update(map(_place, group))
                continue
            except DispatcherError as error:
                log.warning("receipts cannot be listed", key=group[0].key, why=str(error))
                problem = Told(None, f"it cannot be looked for: {error}", foreign=True)
                reading.found.update((_place(task), problem) for task in group)
                reading.looked.update(map(_place, group))
                continue
            wanted += [(task, uris.get(_place(task)), written) for task in group]
        room, answers = ROUND_BYTES, True
        calls = [
            (one[0], self._readers.submit(_read_one, storage, *one))
            for one in wanted
            if one[1] is not None or storage is not None
        ]
        for task, call in calls:
            if room <= 0 or not answers:
                call.cancel()
                (reading.later if answers else reading.unread).add(_place(task))
                continue
            try:
                told = call.result()
            except Unreachable as error:
                log.warning("a receipt cannot be read now", key=task.key, why=str(error))
                reading.unread.add(_place(task))
                answers = False  # the others would wait as long, each of them
                continue
            reading.looked.add(_place(task))
            if told is not None:
                room -= told.size
                reading.found[_place(task)] = told
        return reading


def _place(task: OpenTask) -> TaskPlace:
    return task.execution_id, task.task_index


def _progress(storage: Storage, task: OpenTask) -> tuple[int, int] | None:
    """Read how far a running task says it is; None if it does not, or cannot be read now."""
    expected = Expected(task.key, task.task_index, task.number, task.items)
    path = result_prefix(task.batch_id, task.key) + progress_name(task.task_index)
    uri = storage.uri(path)
    try:
        data = storage.read(path, MAX_RECEIPT_BYTES)
        found = None if data is None else _parse(data, expected, uri)
    except (InvalidReceipt, DispatcherError) as error:
        log.info("no progress", key=task.key, task=task.task_index, why=str(error))
        return None
    if found is None:
        return None
    return found.progress or (len(found.items), task.items)


def _may_have_written(ending: Ending) -> bool:
    """Say if any task that an ending tells of, or that is left open by it, may have run."""
    if ending.call is not None:
        return False
    if any(task.outcome not in NEVER_RAN for task in ending.tasks):
        return True
    return ending.final and ending.rest[0] not in NEVER_RAN


def _by_execution(tasks: Sequence[OpenTask]) -> Iterator[list[OpenTask]]:
    groups: dict[int, list[OpenTask]] = {}
    for task in tasks:
        groups.setdefault(task.execution_id, []).append(task)
    yield from groups.values()


def _written(storage: Storage, group: Sequence[OpenTask], listed: Listed) -> Collection[str] | None:
    """List what several tasks of an execution wrote: one call for a thousand names.

    None where a listing would cost more than reading.
    """
    key = group[0].key
    if key in listed:
        return listed[key]
    if len(group) == 1:
        return None
    prefix = result_prefix(group[0].batch_id, key)
    listed[key] = {one.path.removeprefix(prefix) for one in storage.list(prefix)}
    return listed[key]


def _read_one(
    storage: Storage | None, task: OpenTask, uri: str | None, written: Collection[str] | None
) -> Told | None:
    """Read the receipt of a task; else what it has written while it ran.

    Raises:
        Unreachable: the storage does not answer.
    """
    expected = Expected(task.key, task.task_index, task.number, task.items)
    try:
        for place, read in _places(storage, task, uri, written):
            data = read(MAX_RECEIPT_BYTES)
            if data is not None:
                return Told(_parse(data, expected, place), size=len(data))
    except InvalidReceipt as error:
        return Told(None, str(error), foreign=error.foreign)
    except TooLarge as error:
        return Told(None, str(error), foreign=True)
    except Unreachable:
        raise
    except DispatcherError as error:
        return Told(None, f"it cannot be read: {error}", foreign=True)
    return None


def _parse(data: bytes, expected: Expected, uri: str) -> Receipt:
    with _parsing:
        return read_receipt(data, expected, uri)


def _places(
    storage: Storage | None, task: OpenTask, uri: str | None, written: Collection[str] | None
) -> Iterator[tuple[str, Callable[[int], bytes | None]]]:
    """Name where a receipt may lie and how it is read there, the complete one first."""
    if uri is not None:
        for own in (uri, uri.removesuffix(".json") + PROGRESS):
            yield own, partial(read_object, own)
    if storage is not None:
        for name in (receipt_name(task.task_index), progress_name(task.task_index)):
            if written is None or name in written:
                path = result_prefix(task.batch_id, task.key) + name
                yield storage.uri(path), partial(storage.read, path)
