"""Plan, launch, poll, settle, sweep: where the store, the backends and the policies meet.

Every function here may be killed at any line and may run twice at once. Each step re-reads its
rows, decides with a pure function, and moves them with compare-and-set; what was not moved is found
again by the next sweep. No transaction is open while a backend is called.

The launch, which must happen once:

1. `_intend` commits the execution with its key, its attempts and `call_by`;
2. `_call` calls the backend, once, before `call_by` by this process's own clock;
3. `_record` writes the handle; or that nothing was started; or, if the answer leaves that open,
   that it is unknown. `_look` finds out by the key, and only then may the call be repeated.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from threading import Lock
from typing import Final, TypeVar

import sqlalchemy as sa
import structlog
from pydantic import ValidationError

from dispatcher.backends.base import (
    Backend,
    Handle,
    Launched,
    LaunchRequest,
    Phase,
    Rejected,
    Report,
    TaskReport,
    Unavailable,
)
from dispatcher.backends.registry import make_backend
from dispatcher.config import Config, Target
from dispatcher.errors import InvalidInput, Unreachable
from dispatcher.item_source import run_source
from dispatcher.items import split_items
from dispatcher.job import Job
from dispatcher.judging import ASKED, judge, verdict
from dispatcher.planning import Waiting, fair_shares, pack, plan_chunks
from dispatcher.polling import page_interval
from dispatcher.requests import Plan, audit_copy, check_chunk, launch_request, new_key
from dispatcher.retrying import decide
from dispatcher.states import CancelKind, ChunkState, Outcome
from dispatcher.storage import read_items
from dispatcher.store import (
    Closing,
    Conflict,
    ExecutionRow,
    Intent,
    MovedChunk,
    OpenAttempt,
    Planning,
    Store,
    WaitingBatch,
)
from dispatcher.watching import Watch, Watched

__all__ = ["Ending", "Engine", "Round", "again", "end_finished_batches"]

log = structlog.get_logger(__name__)

UNLIMITED: Final = 1_000_000
READERS: Final = 4
"""Threads that poll, cancel and look keys up, for each target."""

PLAN_ROWS: Final = 500
PLAN_BYTES: Final = 4 << 20
SETTLE_TASKS: Final = 2_000
"""Tasks settled in one transaction, about."""

LOGGED_FAILURES: Final = 5
"""Log tails kept from one settle: enough to see why, within a provider's quota of log reads."""

LOG_LINES: Final = 20
STRAYS_SINCE: Final = timedelta(days=7)

_T = TypeVar("_T")


def boottime() -> float:
    """Read a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(slots=True)
class Place:
    """A target as this process serves it."""

    target: Target
    backend: Backend
    home: Mapping[str, str] | None
    callers: ThreadPoolExecutor
    readers: ThreadPoolExecutor
    launching: Lock = field(default_factory=Lock)
    """Held by the one round of launches that this process makes at a time."""

    following: Lock = field(default_factory=Lock)
    watch: Watch = field(default_factory=Watch)
    poll_failures: int = 0
    down: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A launch that is committed and about to be made."""

    execution_id: int
    request: LaunchRequest
    plan: Plan


@dataclass(frozen=True, slots=True)
class Round:
    """What a round of launches did."""

    calls: int
    more: bool
    """Whether there may be more to launch at once."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What is known to have ended of one execution."""

    execution_id: int
    tasks: tuple[TaskReport, ...] = ()
    final: bool = False
    """Nothing of it runs any more; its open attempts are closed too."""

    rest: tuple[Outcome, str] = (
        Outcome.LOST,
        "the provider says that it ended, but not how this task did",
    )
    """What open attempts are closed with that no task report tells of."""

    reason: str | None = None


class Engine:
    """The verbs of the lifecycle over one store and the targets of one configuration.

    Args:
        store: The tables.
        config: The targets to serve.
        launch_concurrency: Launch calls of a target that this process makes at once.
        call_window: How long after its commit a launch call may begin.
        monotonic: This process's own clock, in seconds.
        roll: A number from 0 to 1 that spreads retries.
        backends: Made from the configuration where not given.
    """

    def __init__(
        self,
        store: Store,
        config: Config,
        *,
        launch_concurrency: int = 16,
        call_window: timedelta = timedelta(seconds=15),
        monotonic: Callable[[], float] = boottime,
        roll: Callable[[], float] = random.random,
        backends: Mapping[str, Backend] | None = None,
    ) -> None:
        self.store = store
        self.config = config
        self._concurrency = launch_concurrency
        self._window = call_window
        self._monotonic = monotonic
        self._roll = roll
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._plans_lock = Lock()
        self.places: dict[str, Place] = {}
        for name, target in config.targets.items():
            backend = (backends or {}).get(name) or make_backend(target)
            self.places[name] = Place(
                target,
                backend,
                backend.home(),
                ThreadPoolExecutor(launch_concurrency, f"launch-{name}"),
                ThreadPoolExecutor(READERS, f"read-{name}"),
            )

    def close(self) -> None:
        """Let the threads end; a call that is open goes on, and is found by its key."""
        for place in self.places.values():
            place.callers.shutdown(wait=False, cancel_futures=True)
            place.readers.shutdown(wait=False, cancel_futures=True)

    # ---------------------------------------------------------------- plan

    def plan(self, batch_id: str) -> str | None:
        """Cut a batch into chunks; the name of its target if it can be launched now, else None."""
        try:
            with self.store.planning(batch_id) as planning:
                if planning is None:
                    return None
                job = Job.model_validate(planning.job)
                place = self.places.get(job.target)
                if place is None:
                    return None
                return job.target if self._plan(planning, job, place) else None
        except _Undo:
            return None
        except (InvalidInput, ValidationError) as error:
            log.warning("cannot be planned", batch=batch_id, reason=str(error))
            self.store.fail_plan(batch_id, str(error))
        except _NotNow as error:
            wait_for = timedelta(seconds=min(300.0, 5.0 * 2 ** min(error.tries, 10)))
            log.warning("planning postponed", batch=batch_id, reason=str(error))
            self.store.postpone_plan(batch_id, wait_for, str(error))
        return None

    def _plan(self, planning: Planning, job: Job, place: Place) -> bool:
        """Write the chunks of a held batch; whether there are any."""
        items, chunks, rows, size = 0, 0, list[tuple[int, int, float | None, str]](), 0
        largest = place.backend.limits.max_payload_bytes
        with contextlib.closing(self._items(planning, job)) as texts:
            for cut in plan_chunks(texts, job.chunk, max_payload_bytes=largest):
                check_chunk(job, planning.batch_id, planning.params, cut.index, cut.items)
                rows.append((cut.index, cut.count, cut.weight, cut.items))
                items, chunks, size = items + cut.count, chunks + 1, size + cut.bytes
                if len(rows) == PLAN_ROWS or size > PLAN_BYTES:
                    planning.write(rows)
                    rows, size = [], 0
        if rows:
            planning.write(rows)
        if not planning.finish(items, chunks):
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
                source.source, planning.params, timeout=source.timeout.total_seconds()
            )
        else:
            stream = read_items(planning.items_from)
        with stream:
            try:
                yield from stream
            except Unreachable as error:
                raise _NotNow(str(error), planning.tries) from error

    # ---------------------------------------------------------------- launch

    def launch(self, target: str) -> Round:
        """Make one round of launches on a target: as many as may be called at once.

        Does nothing if this process is making one already.
        """
        place = self.places.get(target)
        if place is None or not place.launching.acquire(blocking=False):
            return Round(0, more=False)
        try:
            if not self.store.anything_due(target):
                return Round(0, more=False)
            by = self._monotonic() + self._window.total_seconds()
            calls = self._intend(place)
            if calls:
                self._call(place, calls, by)
            return Round(len(calls), more=bool(calls))
        except Conflict as error:
            log.info("launch met another transaction; tried again at the next turn", why=str(error))
            return Round(0, more=True)
        finally:
            place.launching.release()

    def _intend(self, place: Place) -> list[Call]:
        """Claim due chunks within every limit, and commit what is about to be asked for."""
        target, store = place.target, self.store
        with store.transaction() as tx:
            row = store.lock_target(tx, target.name)
            if row is None or (row.home is not None and row.home != place.home):
                return []
            if (row.resumes_in or 0.0) > 0.0:
                return []
            most_calls = 1 if row.down_calls else self._concurrency
            tokens = _tokens(target, row.tokens, row.tokens_age, row.pace)
            if tokens is not None:
                most_calls = min(most_calls, int(tokens))
            slots, executions = store.held_by_target(tx, target.name)
            free = UNLIMITED if target.max_running is None else target.max_running - slots
            if target.max_executions is not None:
                most_calls = min(most_calls, target.max_executions - executions)
            if free <= 0 or most_calls <= 0:
                return []
            waiting = store.waiting(tx, target.name, most_calls * place.backend.limits.max_tasks)
            plans = self._plans_of(tx, [w.batch_id for w in waiting], place)
            waiting = [w for w in waiting if w.batch_id in plans]
            sizes = self._share(tx, waiting, plans, free, most_calls)
            running = store.lock_running(tx, sizes)
            calls = []
            for batch_id, packs in sizes.items():
                if batch_id in running:
                    calls += self._claim(tx, plans[batch_id], packs, row.instance)
            if not calls:
                return []
            ids = store.intend(
                tx,
                target.name,
                [
                    Intent(
                        key=request.key,
                        batch_id=plan.batch_id,
                        job_name=plan.job.name,
                        parallelism=request.parallelism,
                        request=audit_copy(request),
                        chunks=tuple((t.chunk_index, t.attempt) for t in request.tasks),
                    )
                    for plan, request in calls
                ],
                window=self._window,
            )
            if tokens is not None:
                store.take_tokens(tx, target.name, tokens - len(calls))
        return [Call(ids[request.key], request, plan) for plan, request in calls]

    def _share(
        self,
        tx: sa.Connection,
        waiting: Sequence[WaitingBatch],
        plans: Mapping[str, Plan],
        free: int,
        most_calls: int,
    ) -> dict[str, list[int]]:
        """Share slots and calls among waiting batches: the sizes of the packs of each."""
        room = self._room(tx, waiting, plans)
        shares = fair_shares(
            [Waiting(w.batch_id, w.priority, w.due, w.held, room.get(w.batch_id)) for w in waiting],
            free,
        )
        sizes = {
            w.batch_id: _pack(w.due, shares.get(w.batch_id, 0), plans[w.batch_id]) for w in waiting
        }
        calls = fair_shares(
            [Waiting(w.batch_id, w.priority, len(sizes[w.batch_id]), 0) for w in waiting],
            most_calls,
        )
        return {name: sizes[name][:number] for name, number in calls.items() if number}

    def _room(
        self, tx: sa.Connection, waiting: Sequence[WaitingBatch], plans: Mapping[str, Plan]
    ) -> dict[str, int]:
        """Say how many more slots each batch may take within its own limit and its job's."""
        room: dict[str, int] = {}
        limited: dict[str, list[WaitingBatch]] = {}
        for one in waiting:
            limits = plans[one.batch_id].job.limits
            if limits.per_batch is not None:
                room[one.batch_id] = max(0, limits.per_batch - one.held)
            if limits.running is not None:
                limited.setdefault(one.job_name, []).append(one)
        self.store.lock_jobs(tx, limited)
        for job_name, batches in sorted(limited.items()):
            running = min(
                limit
                for b in batches
                if (limit := plans[b.batch_id].job.limits.running) is not None
            )
            free = max(0, running - self.store.held_by_job(tx, job_name))
            shares = fair_shares(
                [
                    Waiting(b.batch_id, b.priority, b.due, b.held, room.get(b.batch_id))
                    for b in batches
                ],
                free,
            )
            room.update({b.batch_id: shares.get(b.batch_id, 0) for b in batches})
        return room

    def _claim(
        self, tx: sa.Connection, plan: Plan, packs: Sequence[int], instance: str
    ) -> list[tuple[Plan, LaunchRequest]]:
        """Take due chunks of a batch and write the requests of the executions that hold them."""
        claimed = self.store.claim(tx, plan.batch_id, sum(packs))
        items = self.store.items_of(tx, plan.batch_id, [c.chunk_index for c in claimed])
        requests = []
        for size in packs:
            chunks, claimed = claimed[:size], claimed[size:]
            if chunks:
                key = new_key(plan.batch_id)
                requests.append((plan, launch_request(plan, key, instance, chunks, items)))
        return requests

    def _plans_of(
        self, tx: sa.Connection, batch_ids: Iterable[str], place: Place
    ) -> dict[str, Plan]:
        """Read the jobs of batches, from memory where they were read before: they never change."""
        with self._plans_lock:
            plans = {i: self._plans[i] for i in batch_ids if i in self._plans}
        missing = [i for i in batch_ids if i not in plans]
        for batch_id, (job, params, labels) in (
            self.store.jobs(tx, missing).items() if missing else ()
        ):
            try:
                plan = Plan.read(batch_id, Job.model_validate(job), params, labels, place.backend)
            except ValidationError as error:
                reason = f"the job cannot be run on target {place.target.name}: {error}"
                log.warning("job cannot be run", batch=batch_id, reason=reason)
                self.store.request_cancel(tx, batch_id, CancelKind.INVALID, reason)
                continue
            plans[batch_id] = plan
            with self._plans_lock:
                self._plans[batch_id] = plan
                while len(self._plans) > 1000:  # noqa: PLR2004 - a cache's size
                    self._plans.popitem(last=False)
        return plans

    def _call(self, place: Place, calls: Sequence[Call], by: float) -> None:
        """Make launch calls, all at once, and record the answers as they come."""
        open_calls: dict[Future[Launched], Call] = {
            place.callers.submit(self._call_one, place.backend, call.request, by): call
            for call in calls
        }
        while open_calls:
            done, _ = wait(open_calls, return_when=FIRST_COMPLETED)
            self._record(place, [(open_calls.pop(future), future) for future in done])

    def _call_one(self, backend: Backend, request: LaunchRequest, by: float) -> Launched:
        """Make one launch call, unless it has become too late for it."""
        if self._monotonic() >= by:
            raise _TooLate("the launcher came too late to its own call; nothing was called")
        return backend.launch(request)

    def _record(self, place: Place, answers: Sequence[tuple[Call, Future[Launched]]]) -> None:
        """Record what launch calls came to."""
        launched: list[tuple[Call, Launched]] = []
        unknown: dict[int, str] = {}
        postponed: dict[int, tuple[float, str]] = {}
        rejected: list[Ending] = []
        for call, future in answers:
            error = future.exception()
            if error is None:
                launched.append((call, future.result()))
            elif isinstance(error, Rejected):
                rejected.append(_refused(call.execution_id, len(call.request.tasks), str(error)))
            elif isinstance(error, Unavailable) and error.not_started:
                after = error.retry_after.total_seconds() if error.retry_after else 5.0
                postponed[call.execution_id] = (after * (1.0 + self._roll()), str(error))
            else:
                _report_breach(error, _TooLate)
                unknown[call.execution_id] = f"{type(error).__name__}: {error}".rstrip(": ")
        if launched:
            self._adopt(place, launched, reason=None)
            self._up(place)
        if unknown:
            self.store.record_unknown(unknown)
            self._down(place, next(iter(unknown.values())), resume=True)
        if postponed:
            self.store.postpone_calls(postponed)
        self._set_pace(place, throttled=bool(postponed), answered=bool(launched))
        if rejected:
            self.settle(place, rejected)

    def _adopt(
        self, place: Place, found: Sequence[tuple[Call, Launched]], *, reason: str | None
    ) -> None:
        """Record handles; what no row wants any more is a stray, and is cancelled."""
        moved = self.store.record_launched(
            [(call.execution_id, launched) for call, launched in found],
            start_timeouts={
                call.execution_id: call.plan.times(len(call.request.tasks)) for call, _ in found
            },
            reason=reason,
        )
        for call, launched in found:
            if call.execution_id not in moved and self.store.record_stray(
                place.target.name, launched, "its execution was given up before it was found"
            ):
                log.warning("stray", target=place.target.name, handle=launched.handle)

    # ---------------------------------------------------------------- follow: look, cancel, poll

    def follow(self, target: str) -> None:
        """Turn once to all that runs, or may run, on a target: look, call, cancel, time out, poll.

        For the holder of the target's lease; a second one would only double the calls.
        """
        place = self.places[target]
        if not place.following.acquire(blocking=False):
            return
        try:
            self._tend(place)
            self._poll(place)
        finally:
            place.following.release()

    def _tend(self, place: Place) -> None:
        """Do what is due for single executions."""
        name = place.target.name
        self.store.expire_calls(name)
        due = self.store.due(name)
        if not due:
            return
        for kind, reason in (
            (CancelKind.START_TIMEOUT, "no task started within start_timeout"),
            (CancelKind.TIMEOUT, "ran past its deadline"),
        ):
            if kind in due:
                self.store.cancel_executions([row.id for row in due[kind]], kind, reason)
        self.settle(
            place,
            [
                Ending(row.id, final=True, rest=ASKED[CancelKind(row.cancel_kind)])
                for row in due.get("uncalled", ())
                if row.cancel_kind is not None
            ],
        )
        self._each(place, due.get("look", ()), self._look)
        self._each(place, due.get("call", ()), self._call_again)
        self._cancel(place, due.get("cancel", ()))

    def _each(
        self,
        place: Place,
        rows: Sequence[ExecutionRow],
        step: Callable[[Place, ExecutionRow], None],
    ) -> None:
        """Take a step for each execution, a few at a time."""
        for future in [place.readers.submit(step, place, row) for row in rows]:
            future.result()

    def _look(self, place: Place, row: ExecutionRow) -> None:
        """Clear up an unknown launch: found → adopt; not there → end it, or call again."""
        call = self._call_of(place, row)
        if call is None:
            return
        try:
            found = place.backend.find(call.request)
        except Unavailable as error:
            self.store.postpone_look(row.id, min(30.0, 2.0 * 2 ** min(row.looks, 4)))
            self._down(place, str(error), resume=False)
            return
        if found is not None:
            self._adopt(place, [(call, found)], reason="found by its key")
            return
        limits = place.backend.limits
        grace = (limits.call_timeout + limits.find_grace).total_seconds()
        looks = 1 if limits.relaunch_safe else 2
        if (row.past_call_by or 0.0) <= grace or row.looks + 1 < looks:
            self.store.looked(row.id, min(10.0, 1.0 * 2 ** min(row.looks, 4)))
        elif row.cancel_kind is not None:
            rest = ASKED[CancelKind(row.cancel_kind)]
            self.settle(place, [Ending(row.id, final=True, rest=rest)])
        else:
            self._repeat(place, row, call, "not found by its key")

    def _call_again(self, place: Place, row: ExecutionRow) -> None:
        """Call again after the provider clearly refused for a while."""
        call = self._call_of(place, row)
        if call is not None:
            self._repeat(place, row, call, "the wait that the provider asked for is over")

    def _repeat(self, place: Place, row: ExecutionRow, call: Call, reason: str) -> None:
        """Call once more under the same key."""
        by = self._monotonic() + self._window.total_seconds()
        if self.store.call_again(row.id, old=row.state, window=self._window, reason=reason):
            self._call(place, [call], by)

    def _call_of(self, place: Place, row: ExecutionRow) -> Call | None:
        """Write the request of an execution again, from its rows."""
        if row.batch_id is None:
            return None
        with self.store.transaction() as tx:
            instance = self.store.instance(tx)
            plans = self._plans_of(tx, [row.batch_id], place)
            chunks = self.store.chunks_of(tx, row.id)
            items = self.store.items_of(tx, row.batch_id, [index for index, _ in chunks])
        if row.batch_id not in plans:
            return None
        plan = plans[row.batch_id]
        return Call(row.id, launch_request(plan, row.key, instance, chunks, items), plan)

    def _cancel(self, place: Place, rows: Sequence[ExecutionRow]) -> None:
        """Ask for the end of executions, again and again until a report confirms it."""
        if not rows:
            return
        wanted = self.store.cancel_sent(
            {row.id: min(60.0, 2.0 * 2 ** min(row.cancel_calls, 6)) for row in rows}
        )
        handles = [row.handle for row in rows if row.id in wanted and row.handle is not None]
        failures = [
            error
            for future in [place.readers.submit(place.backend.cancel, h) for h in handles]
            if (error := future.exception()) is not None
        ]
        for error in failures:
            _report_breach(error, Rejected)
        if failures:
            self._down(place, str(failures[0]), resume=False)
        place.watch.hurry(wanted, self._monotonic())

    def _poll(self, place: Place) -> None:
        """Ask for reports on what is due for one, a page a call; settle what ended."""
        store, watch = self.store, place.watch
        new = watch.keep(store.live_ids(place.target.name))
        for at in range(0, len(new), 1000):
            rows = store.executions(new[at : at + 1000])
            packed = [row.id for row in rows if row.tasks > 1]
            settled = store.settled_tasks(packed) if packed else {}
            watch.add(rows, settled, self._monotonic())
        pages = watch.due(self._monotonic(), place.backend.limits.page_size)
        if not pages:
            return
        watch.pause(self._monotonic() + page_interval(len(pages), place.target.reads_per_minute))
        polls = {
            place.readers.submit(place.backend.poll, [one.handle for one in page]): page
            for page in pages
        }
        notes = _Notes()
        open_polls = set(polls)
        while open_polls:
            done, open_polls = wait(open_polls, return_when=FIRST_COMPLETED)
            for future in done:
                self._read(place, polls[future], future, notes)
            if notes.tasks >= SETTLE_TASKS:
                notes = self._apply(place, notes)
        self._apply(place, notes)

    def _read(
        self,
        place: Place,
        page: Sequence[Watched],
        future: Future[Mapping[Handle, Report]],
        notes: _Notes,
    ) -> None:
        """Note what a page of reports says. An error says nothing about any execution."""
        now = self._monotonic()
        error = future.exception()
        if error is not None:
            _report_breach(error)
            place.poll_failures += 1
            place.watch.failed(page, now, place.poll_failures)
            self._down(place, str(error), resume=False)
            return
        place.poll_failures = 0
        self._up(place)
        reports = future.result()
        for one in page:
            report = reports.get(one.handle)
            if report is None:
                place.watch.seen(one, now)
            elif report.phase is Phase.ABSENT:
                self._read_absent(place, one, now, notes)
            else:
                self._read_present(place, one, report, now, notes)

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
            place.watch.seen(one, now)
            one.settled.update(task.index for task in ended)
        if ended or final:
            notes.endings.append(Ending(one.id, ended, final))
            notes.tasks += len(ended) or 1

    def _read_absent(self, place: Place, one: Watched, now: float, notes: _Notes) -> None:
        """Give up an execution that stays unknown to the provider, after a last cancel."""
        if one.absent is None:
            one.absent = now
            notes.absent.append(one.id)
        grace = place.backend.limits.absent_grace.total_seconds()
        if now - one.absent < grace:
            one.next_look = now + min(grace, max(1.0, grace / 3))
            return
        try:
            place.backend.cancel(one.handle)
        except Unavailable as error:
            log.info("last cancel of an absent execution", handle=one.handle, why=str(error))
            place.watch.seen(one, now)
            return
        place.watch.forget(one.id)
        reason = "the provider no longer knows it"
        notes.endings.append(Ending(one.id, final=True, rest=(Outcome.LOST, reason), reason=reason))
        notes.tasks += one.tasks

    def _apply(self, place: Place, notes: _Notes) -> _Notes:
        """Write what was noted. What cannot be written now is seen again at the next look."""
        if notes.present:
            self.store.mark_present(notes.present)
        if notes.started:
            self.store.mark_started(notes.started)
        if notes.absent:
            self.store.mark_absent(notes.absent)
        try:
            self.settle(place, notes.endings)
        except BaseException:
            for ending in notes.endings:
                place.watch.forget(ending.execution_id)
            raise
        return _Notes()

    def _down(self, place: Place, reason: str, *, resume: bool) -> None:
        """Record that a target does not answer; hold its launches for a while if asked to."""
        place.down = True
        pause = 1.0 + 9.0 * self._roll() if resume else None
        self.store.target_down(place.target.name, reason, resume_in=pause)

    def _up(self, place: Place) -> None:
        """Record that a target answers again."""
        if place.down:
            place.down = False
            self.store.target_up(place.target.name)

    def _set_pace(self, place: Place, *, throttled: bool, answered: bool) -> None:
        """Halve the rate of launch calls at a throttling, and let it grow again afterwards."""
        if place.target.launches_per_minute is None:
            return
        if throttled:
            self.store.pace(place.target.name, 0.5)
        elif answered:
            self.store.pace(place.target.name, 1.1)

    # ---------------------------------------------------------------- settle

    def settle(self, place: Place, endings: Sequence[Ending]) -> None:
        """Write outcomes, decide on retries, move chunks and, with the last one, the batch."""
        if not endings:
            return
        for part in _parts(endings):
            failed = again(partial(self._settle, place, part))
            for closing in failed[:LOGGED_FAILURES]:
                self._keep_log(place, closing)

    def _settle(self, place: Place, endings: Sequence[Ending]) -> list[tuple[str, OpenAttempt]]:
        """Settle in one transaction; the handles and attempts of tasks that ended badly."""
        store = self.store
        ids = sorted({ending.execution_id for ending in endings})
        with store.transaction() as tx:
            batches = store.lock_batches_of(tx, ids)
            executions = store.lock_executions(tx, ids)
            attempts = store.open_attempts(tx, list(executions))
            closings: list[Closing] = []
            ended: dict[int, str | None] = {}
            for ending in endings:
                row = executions.get(ending.execution_id)
                if row is not None:
                    closings += _closings(row, ending, attempts)
                    if ending.final:
                        ended[row.id] = ending.reason
            closed = Counter(dict.fromkeys(executions, 0))
            closed.update(closing.attempt.execution_id for closing in closings)
            plans = self._plans_of(tx, {c.attempt.batch_id for c in closings}, place)
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
        tallies = self.store.tallies(tx, bad) if bad else {}
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
            self.store.release_packs(tx, list(ended))
        for name in sorted({m.closing.attempt.batch_id for m in moved if m.hold is not None}):
            self.store.release_full_pack(tx, name, packed[name].max_tasks)

    def _keep_log(self, place: Place, failed: tuple[str, OpenAttempt]) -> None:
        """Keep the last lines of a failed task; without them the outcome stands all the same."""
        handle, attempt = failed
        try:
            lines = list(place.backend.logs(handle, attempt.task_index, LOG_LINES))
        except (Unavailable, Rejected) as error:
            log.info("no log tail", handle=handle, why=str(error))
            return
        if lines:
            self.store.attach_log(
                attempt, "\n".join(lines).replace("\0", "\N{REPLACEMENT CHARACTER}")
            )

    # ---------------------------------------------------------------- sweep

    def sweep(self) -> list[str]:
        """Do again what a lost message or a crash has left undone, over all batches.

        Returns the batches that wait to be planned, for the caller to plan.
        """
        for batch_id in self.store.overdue_batches():
            log.warning("batch deadline passed", batch=batch_id)
            again(partial(self._expire_batch, batch_id))
        stalled = self.store.stalled_batches()
        if stalled:
            with self.store.transaction() as tx:
                self.store.lock_batches(tx, stalled)
                end_finished_batches(self.store, tx, stalled)
        return self.store.unplanned(20)

    def _expire_batch(self, batch_id: str) -> None:
        """Cancel a batch whose deadline passed."""
        with self.store.transaction() as tx:
            reason = "the batch's deadline passed"
            self.store.request_cancel(tx, batch_id, CancelKind.BATCH_DEADLINE, reason)
            end_finished_batches(self.store, tx, [batch_id])

    def sweep_strays(self, target: str) -> None:
        """Cancel what runs on a target under our label and belongs to no live execution."""
        place = self.places[target]
        with self.store.transaction() as tx:
            instance = self.store.instance(tx)
        since = datetime.now(UTC) - STRAYS_SINCE
        try:
            running = list(place.backend.strays(instance, since))
        except Unavailable as error:
            self._down(place, str(error), resume=False)
            return
        known = self.store.known_keys([found.key for found in running])
        for found in running:
            state, handle = known.get(found.key, ("ended", None))
            if state == "ended" or (handle is not None and handle != found.handle):
                reason = "it runs and no open execution owns it"
                if self.store.record_stray(target, found, reason):
                    log.warning("stray", target=target, handle=found.handle)


@dataclass(slots=True)
class _Notes:
    """What a round of reports said that the rows do not say yet."""

    endings: list[Ending] = field(default_factory=list)
    started: dict[int, datetime | None] = field(default_factory=dict)
    absent: list[int] = field(default_factory=list)
    present: list[int] = field(default_factory=list)
    tasks: int = 0


class _Undo(Exception):
    """Takes a plan back: its batch was cancelled meanwhile."""


class _NotNow(Exception):
    """What a plan needs does not answer."""

    def __init__(self, message: str, tries: int) -> None:
        super().__init__(message)
        self.tries = tries


class _TooLate(Exception):
    """A launch was not called because `call_by` had passed."""


def _report_breach(error: BaseException, *allowed: type[BaseException]) -> None:
    """Log what a backend may not raise; it is taken for an answer that says nothing."""
    if not isinstance(error, (Unavailable, *allowed)):
        log.error("a backend broke its contract", exc_info=error)


def again(step: Callable[[], _T], tries: int = 5) -> _T:
    """Take a step again that met another transaction; it has written nothing."""
    for _ in range(tries - 1):
        try:
            return step()
        except Conflict as error:
            log.info("met another transaction; again", why=str(error))
    return step()


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


def _refused(execution_id: int, tasks: int, reason: str) -> Ending:
    """Say that a launch was refused, and with it every task of it."""
    return Ending(
        execution_id,
        tuple(TaskReport(index, Outcome.REJECTED, reason=reason) for index in range(tasks)),
        final=True,
        reason=reason,
    )


def _closings(
    row: ExecutionRow, ending: Ending, attempts: dict[tuple[int, int], OpenAttempt]
) -> list[Closing]:
    """Say how the open attempts of an execution ended; what was settled before is left out."""
    closings = []
    for task in ending.tasks:
        attempt = attempts.pop((row.id, task.index), None)
        if attempt is not None:
            outcome, reason = judge(task, row.cancel_kind, row.cancel_sent_at)
            closings.append(
                Closing(
                    attempt,
                    outcome,
                    task.exit_code,
                    reason,
                    task.started_at,
                    task.ended_at,
                    task.result_uri,
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


def _starts(closings: Iterable[Closing]) -> dict[int, datetime | None]:
    """Find when executions started, from their tasks."""
    starts: dict[int, datetime | None] = {}
    for closing in closings:
        began, known = closing.started_at, starts.get(closing.attempt.execution_id)
        if began is not None and (known is None or began < known):
            starts[closing.attempt.execution_id] = began
    return starts


def _seconds(report: Report) -> float | None:
    """Say how long an execution ran by the provider's times, if it gives them."""
    began = [task.started_at for task in report.tasks if task.started_at is not None]
    ended = [task.ended_at for task in report.tasks if task.ended_at is not None]
    if not began or not ended:
        return None
    return max(0.0, (max(ended) - min(began)).total_seconds())


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


def _pack(due: int, slots: int, plan: Plan) -> list[int]:
    """Say how many chunks go into which executions, so that these hold at most `slots`."""
    if slots <= 0:
        return []
    full, rest = divmod(slots, plan.parallelism)
    whole = full * plan.max_tasks
    if due <= whole:
        return pack(due, plan.max_tasks)
    return [plan.max_tasks] * full + ([min(rest, due - whole)] if rest else [])


def _tokens(target: Target, left: float | None, age: float | None, pace: float) -> float | None:
    """Say how many launch calls the bucket allows now; None where there is no bucket."""
    if target.launches_per_minute is None:
        return None
    rate = target.launches_per_minute * pace / 60.0
    burst = max(1.0, 10.0 * rate)
    if left is None or age is None:
        return burst
    return min(burst, left + rate * age)
