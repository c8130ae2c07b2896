"""Receipts, read from where tasks wrote them: outside of every transaction, before a settle."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Semaphore
from typing import Final, NamedTuple, TypeAlias

import structlog

from dispatcher.backends.base import KeepsResults
from dispatcher.boottime import boottime
from dispatcher.documents import result_prefix
from dispatcher.engine.place import Ending, Place
from dispatcher.engine.plans import PlanCache
from dispatcher.errors import DispatcherError, Unreachable
from dispatcher.receipts import (
    PROGRESS,
    Expected,
    InvalidReceipt,
    Receipt,
    begins_a_receipt,
    most_bytes,
    progress_name,
    read_receipt,
    receipt_name,
)
from dispatcher.states import Outcome
from dispatcher.storage import Storage, TooLarge, read_beginning, read_object
from dispatcher.store import Store
from dispatcher.store.rows import OpenTask

__all__ = ["Found", "Listings", "Reading", "ReceiptReader", "TaskPlace", "Told"]

log = structlog.get_logger(__name__)

READ_AT_ONCE: Final = 16
"""Receipts that are read at the same time, each of `SMALL_BYTES` at most."""

SMALL_BYTES: Final = 256 << 10
"""What is larger is read one after the other, and beside few others of its kind."""

SNIFFED_BYTES: Final = 64 << 10
"""Of what is too large to be a receipt, so much is read to see whether it claims to be one."""

LARGE_AT_ONCE: Final = 2
"""Larger ones that are held at the same time, by all targets together: of 16 MiB at most each."""

PROGRESS_AT_ONCE: Final = 50
"""Running tasks whose progress is read in one turn."""

NEVER_RAN: Final = frozenset({Outcome.REJECTED, Outcome.START_FAILED, Outcome.NO_CAPACITY})
"""Ends of tasks whose command did not run: they have written nothing."""

ROUND_BYTES: Final = 32 << 20
"""What is read in one round, about: as rows for the database it takes several times that."""

ITEM_BYTES: Final = 200
"""What an item takes beside its output and its error, about."""

PROGRESS_READERS: Final = 4
"""Threads that read how far running tasks are: not those that a settle waits for."""

PROGRESS_SECONDS: Final = 5.0
"""How long one turn waits for that, at most."""

TaskPlace: TypeAlias = tuple[int, int]
"""An execution's id and a task index."""


@dataclass(slots=True)
class Listings:
    """What the storage has said so far, for all parts of one settle."""

    written: dict[str, Collection[str]] = field(default_factory=dict)
    """What tasks of an execution have written, by its key."""

    away: bool = False
    """It did not answer, and is asked no more: each of the others would wait as long."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a task wrote: a receipt, or why what it wrote is none."""

    receipt: Receipt | None
    problem: str | None = None
    size: int = 0
    """Bytes that it takes here, about."""

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


class Wanted(NamedTuple):
    """A task whose receipt is looked for, and where."""

    task: OpenTask
    uri: str | None
    """Its own result, where its backend keeps that."""

    storage: Storage | None
    written: Collection[str] | None = None
    """What its execution has written to the storage; None if that was not listed."""

    @property
    def place(self) -> TaskPlace:
        """Which task it is."""
        return self.task.execution_id, self.task.task_index


class ReceiptReader:
    """Finds and reads the receipts of tasks."""

    def __init__(self, store: Store, plans: PlanCache) -> None:
        self._store = store
        self._plans = plans
        self._readers = ThreadPoolExecutor(READ_AT_ONCE, "receipt")
        self._large = Semaphore(LARGE_AT_ONCE)
        self._progress_readers = ThreadPoolExecutor(PROGRESS_READERS, "progress")
        self._large_progress = Semaphore()

    def close(self) -> None:
        """Let the threads end."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._progress_readers.shutdown(wait=False, cancel_futures=True)

    def read(self, place: Place, endings: Sequence[Ending], listings: Listings) -> Reading:
        """Read what the tasks of some endings wrote; `listings` is kept between calls."""
        ran = [one for one in endings if _may_have_written(one)]
        reported = {
            (one.execution_id, task.index): task.result_uri
            for one in ran
            for task in one.tasks
            if task.result_uri is not None
        }
        keeps = isinstance(place.backend, KeepsResults)
        if not ran or (place.storage is None and not keeps and not reported):
            return Reading()
        final = {one.execution_id for one in ran if one.final}
        ended = {(one.execution_id, task.index) for one in ran for task in one.tasks}
        elsewhere = {(one.execution_id, index) for one in ran for index in one.elsewhere}
        with self._store.transaction() as tx:
            tasks = self._store.open_tasks(tx, [one.execution_id for one in ran])
            plans = self._plans.of(tx, {task.batch_id for task in tasks}, place)
        wanted = [
            Wanted(task, _own_result(place, task, reported), place.storage)
            for task in tasks
            if (
                (task.execution_id, task.task_index) in ended
                or (
                    task.execution_id in final
                    and (task.execution_id, task.task_index) not in elsewhere
                )
            )
            and task.batch_id in plans
            and plans[task.batch_id].job.receipt != "ignored"
        ]
        reading = Reading()
        self._read_all(_listed(wanted, listings, reading), reading)
        listings.away = listings.away or bool(reading.unread)
        return reading

    def follow_progress(self, place: Place) -> int:
        """Read how far some running tasks are, and write it down; how many told.

        It is for people only: nothing waits for it, and a task that is not looked at now is looked
        at in a later turn. It has threads of its own, and takes `PROGRESS_SECONDS` at most.
        """
        if place.storage is None and not isinstance(place.backend, KeepsResults):
            return 0
        tasks = self._store.running_tasks(place.target.name, PROGRESS_AT_ONCE)
        with self._store.transaction() as tx:
            plans = self._plans.of(tx, {task.batch_id for task in tasks}, place)
        looked: dict[TaskPlace, tuple[int, int] | None] = {}
        calls: list[tuple[TaskPlace, Future[tuple[int, int] | None]]] = []
        until = boottime() + PROGRESS_SECONDS
        for task in tasks:
            one = Wanted(task, _own_result(place, task, {}), place.storage)
            if task.batch_id in plans and plans[task.batch_id].job.receipt != "ignored":
                call = self._progress_readers.submit(self._progress, one)
                calls.append((one.place, call))
            else:
                looked[one.place] = None
        for where, call in calls:
            try:
                looked[where] = call.result(max(0.0, until - boottime()))
            except CancelledError:
                continue  # the engine is closed
            except TimeoutError:
                # One that is being read is left for others: it may take as long the next time.
                if not call.cancel():
                    looked[where] = None
        if looked:
            self._store.write_progress(looked)
        return sum(one is not None for one in looked.values())

    def _progress(self, one: Wanted) -> tuple[int, int] | None:
        """Read how far a running task says it is; None if it does not, or cannot be read now."""
        try:
            try:
                told = _read(_progress_places(one), one.task, SMALL_BYTES)
            except TooLarge:
                with self._large_progress:
                    told = _read(_progress_places(one), one.task, most_bytes(one.task.items))
        except (InvalidReceipt, DispatcherError, OSError) as error:
            log.info("no progress", key=one.task.key, task=one.task.task_index, why=str(error))
            return None
        if told is None or told.receipt is None:
            return None
        return told.receipt.progress or (len(told.receipt.items), one.task.items)

    def _read_all(self, wanted: Sequence[Wanted], reading: Reading) -> None:
        """Read all, as far as there is room; the rest is left for the next look."""
        room, answers = ROUND_BYTES, True
        rest = deque(wanted)
        begun: deque[tuple[Wanted, Future[Told | None]]] = deque()
        large: list[Wanted] = []
        while (rest or begun) and room > 0 and answers:
            # What was read is held until it is taken: so only some are begun ahead.
            while rest and len(begun) < 2 * READ_AT_ONCE:
                begun.append((rest[0], self._readers.submit(_read_small, rest.popleft())))
            one, call = begun.popleft()
            try:
                room -= _note(one, call.result(), reading)
            except TooLarge:
                large.append(one)
            except Unreachable as error:
                answers = False  # the others would wait as long, each of them
                _note_unread(one, error, reading)
        for _, call in begun:
            call.cancel()
        left = [*(one for one, _ in begun), *rest]
        for number, one in enumerate(large):
            # One in each round, however much else there was: else it might never have its turn.
            if not answers or (room <= 0 and number > 0):
                left.append(one)
                continue
            try:
                with self._large:
                    told = _read_large(one)
            except Unreachable as error:
                answers = False
                _note_unread(one, error, reading)
            else:
                # What is too large to be read takes a call all the same.
                room -= max(SMALL_BYTES, _note(one, told, reading))
        (reading.later if answers else reading.unread).update(one.place for one in left)


def _own_result(place: Place, task: OpenTask, reported: Mapping[TaskPlace, str]) -> str | None:
    """Name where a task leaves its result with its backend, if that can be read from here."""
    uri = reported.get((task.execution_id, task.task_index))
    if uri is None and task.handle is not None and isinstance(place.backend, KeepsResults):
        uri = place.backend.result_uri(task.handle, task.task_index)
    return uri if uri is not None and uri.startswith("file://") else None


def _note(one: Wanted, told: Told | None, reading: Reading) -> int:
    """Keep what a task wrote; how much that is."""
    reading.looked.add(one.place)
    if told is None:
        return 0
    reading.found[one.place] = told
    return told.size


def _note_unread(one: Wanted, error: Unreachable, reading: Reading) -> None:
    log.warning("a receipt cannot be read now", key=one.task.key, why=str(error))
    reading.unread.add(one.place)


def _may_have_written(ending: Ending) -> bool:
    """Say if any task that an ending tells of, or that is left open by it, may have run."""
    if ending.call is not None:
        return False
    if any(task.outcome not in NEVER_RAN for task in ending.tasks):
        return True
    return ending.final and ending.rest[0] not in NEVER_RAN


def _listed(wanted: Sequence[Wanted], listings: Listings, reading: Reading) -> list[Wanted]:
    """List what executions wrote to the storage, and leave out those of which nothing is known."""
    found = []
    for group in _by_execution(wanted):
        key, places = group[0].task.key, [one.place for one in group]
        if listings.away and group[0].storage is not None:
            reading.unread.update(places)
            continue
        try:
            written = _written(group, listings.written)
        except Unreachable as error:
            log.warning("receipts cannot be listed now", key=key, why=str(error))
            reading.unread.update(places)
            listings.away = True
        except DispatcherError as error:
            log.warning("receipts cannot be listed", key=key, why=str(error))
            problem = Told(None, f"it cannot be looked for: {error}", foreign=True)
            reading.found.update(dict.fromkeys(places, problem))
            reading.looked.update(places)
        else:
            found += [one._replace(written=written) for one in group]
    return found


def _by_execution(wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    groups: dict[int, list[Wanted]] = {}
    for one in wanted:
        groups.setdefault(one.task.execution_id, []).append(one)
    yield from groups.values()


def _written(group: Sequence[Wanted], listed: dict[str, Collection[str]]) -> Collection[str] | None:
    """List what several tasks of an execution wrote: one call for a thousand names.

    None where a listing would cost more than reading, and where there is nothing to list.
    """
    storage, key = group[0].storage, group[0].task.key
    if storage is None:
        return None
    if key in listed:
        return listed[key]
    if len(group) == 1:
        return None
    prefix = result_prefix(group[0].task.batch_id, key)
    listed[key] = {one.path.removeprefix(prefix) for one in storage.list(prefix)}
    return listed[key]


def _read_small(one: Wanted) -> Told | None:
    """Read the receipt of a task; else what it has written while it ran.

    Raises:
        TooLarge: it is none of the small ones.
        Unreachable: the storage does not answer.
    """
    return _or_problem(one, SMALL_BYTES)


def _read_large(one: Wanted) -> Told | None:
    """Read what is larger, as far as a receipt of so many items may be.

    Raises:
        Unreachable: the storage does not answer.
    """
    try:
        return _or_problem(one, most_bytes(one.task.items))
    except TooLarge as error:
        why = f"{error}: the task was given {one.task.items} items"
    # A result of the program's own kind may be as large as it likes, and is no receipt that failed.
    try:
        found = (begin(SNIFFED_BYTES) for _, _, begin in _places(one))
        beginning = next((data for data in found if data is not None), b"")
    except Unreachable:
        raise
    except DispatcherError as error:
        return Told(None, f"it cannot be read: {error}", foreign=True)
    return Told(None, why, foreign=not begins_a_receipt(beginning))


def _or_problem(one: Wanted, most: int) -> Told | None:
    try:
        return _read(_places(one), one.task, most)
    except InvalidReceipt as error:
        return Told(None, str(error), foreign=error.foreign)
    except (TooLarge, Unreachable):
        raise
    except DispatcherError as error:
        return Told(None, f"it cannot be read: {error}", foreign=True)


Source: TypeAlias = tuple[str, Callable[[int], bytes | None], Callable[[int], bytes | None]]
"""A URI, what reads it up to a size, and what reads its beginning."""


def _read(sources: Iterator[Source], task: OpenTask, most: int) -> Told | None:
    """Read the first that is there."""
    for uri, read, _ in sources:
        data = read(most)
        if data is not None:
            expected = Expected(task.key, task.task_index, task.number, task.items)
            receipt = read_receipt(data, expected, uri)
            return Told(receipt, size=len(data) + ITEM_BYTES * len(receipt.items))
    return None


def _places(one: Wanted) -> Iterator[Source]:
    """Name where a receipt may lie and how it is read there, the complete one first."""
    if one.uri is not None:
        yield _own(one.uri)
        yield _own(_progress_of(one.uri))
    yield from _stored(one, receipt_name(one.task.task_index))
    yield from _stored(one, progress_name(one.task.task_index))


def _progress_places(one: Wanted) -> Iterator[Source]:
    """Name where a running task may say how far it is."""
    if one.uri is not None:
        yield _own(_progress_of(one.uri))
    yield from _stored(one, progress_name(one.task.task_index))


def _progress_of(uri: str) -> str:
    return uri.removesuffix(".json") + PROGRESS


def _own(uri: str) -> Source:
    return uri, partial(read_object, uri), partial(read_beginning, uri)


def _stored(one: Wanted, name: str) -> Iterator[Source]:
    if one.storage is not None and (one.written is None or name in one.written):
        path = result_prefix(one.task.batch_id, one.task.key) + name
        storage = one.storage
        yield storage.uri(path), partial(storage.read, path), partial(storage.beginning, path)
