"""Launch, which must happen once for each key.

1. `_intend` commits the execution with its key, its attempts and `call_by`;
2. `_call` calls the backend, once, before `call_by` by this process's own clock;
3. `_record` writes the handle; or that nothing was started; or, if the answer leaves that open,
   that it is unknown. `look` finds out by the key, and only then may the call be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Final

import sqlalchemy as sa
import structlog

from dispatcher import budget
from dispatcher.backends.base import (
    BackendError,
    Launched,
    LaunchRequest,
    Rejected,
    TaskReport,
    Unavailable,
)
from dispatcher.config import Target
from dispatcher.documents import (
    DOCUMENT_BYTES,
    claim_path,
    document,
    input_path,
    needs_document,
    result_prefix,
    tasks_that_fit,
)
from dispatcher.engine.claiming import Claims
from dispatcher.engine.place import (
    Call,
    Ending,
    Place,
    Round,
    is_throttled,
    plain,
    report_breach,
)
from dispatcher.engine.plans import PlanCache
from dispatcher.engine.settler import Settler
from dispatcher.errors import DispatcherError, Unreachable
from dispatcher.judging import ASKED
from dispatcher.planning import Waiting, fair_shares, pack
from dispatcher.receipts import progress_name, receipt_name
from dispatcher.requests import Plan, audit_copy, launch_request, new_key
from dispatcher.states import CancelKind, Outcome
from dispatcher.storage import LONGEST_SIGNED, Storage, TooLarge
from dispatcher.store import Conflict, Store, again
from dispatcher.store.rows import (
    Claimed,
    ExecutionRow,
    Held,
    Intent,
    TargetRow,
    WaitingBatch,
)
from dispatcher.storing import storage_trouble

__all__ = ["Launcher"]

log = structlog.get_logger(__name__)

UNLIMITED: Final = 1_000_000


MOST_CALLS: Final = 5
"""Launch calls without a clear answer, each looked up in vain, after which an attempt is over."""

WAIT_TO_CALL: Final = 5.0
"""Seconds until a launch that was not found, and that may not be called again now, is looked up."""

TELLING: Final = 3
"""Refusals for now of one execution that are taken for the whole target's: it is not launched on
meanwhile. Those that follow may be due to a quota that only the job meets: only this job waits."""

LONGEST_LOOK: Final = 30.0
"""Seconds between two looks for one execution that cannot be looked up, at most."""

LONGEST_HOLD: Final = 60.0
"""Seconds for which a target is not launched on after it has refused a call for now, at most;
longer only if it says so itself."""

ROUND_BYTES: Final = 64 << 20
"""Items of one batch that a round of launches holds in memory, about."""


class Launcher:
    """Launches due chunks, and clears up launches whose answer was lost."""

    def __init__(
        self,
        store: Store,
        plans: PlanCache,
        settler: Settler,
        claims: Claims,
        *,
        concurrency: int,
        window: timedelta,
        monotonic: Callable[[], float],
        roll: Callable[[], float],
    ) -> None:
        self._store = store
        self._plans = plans
        self._settler = settler
        self._claims = claims
        self._concurrency = concurrency
        self._window = window
        self._monotonic = monotonic
        self._roll = roll

    def launch(self, place: Place) -> Round:
        """Make one round of launches on a target: as many as may be called at once.

        Does nothing if this process is making one already.
        """
        if not place.launching.acquire(blocking=False):
            return Round(0, more=False)
        try:
            if not self._store.anything_due(place.target.name):
                return Round(0, more=False)
            calls = self._intend_and_call(place)
            if self._read_definitions(place) and not calls:
                calls = self._intend_and_call(place)
            return Round(calls, more=bool(calls))
        except Conflict as error:
            log.info("launch met another transaction; tried again at the next turn", why=str(error))
            return Round(0, more=True)
        finally:
            place.launching.release()

    def _intend_and_call(self, place: Place) -> int:
        """Commit what is to be asked for, and ask; the number of calls."""
        by = self._monotonic() + self._window.total_seconds()
        calls = self._intend(place)
        if calls:
            self._call(place, calls, by)
        return len(calls)

    def _read_definitions(self, place: Place) -> bool:
        """Read the definitions that a batch had to go without; whether there were any."""
        try:
            return place.definitions.read()
        except Unavailable as error:
            if not error.not_started:
                # Those whose definitions are known may well be possible, and are not held.
                hold = None if place.definitions.answered else 1.0 + self._roll()
                place.went_down(str(error), resume_in=hold)
            return False

    def _intend(self, place: Place) -> list[Call]:
        """Claim due chunks within every limit, and commit what is about to be asked for."""
        target, store = place.target, self._store
        with store.transaction() as tx:
            row = store.lock_target(tx, target.name)
            if row is None or (row.home is not None and row.home != place.home):
                return []
            # Another worker may have said so.
            place.down = place.down or row.down
            place.told = row.told
            place.launches_fail = place.launches_fail or row.down_calls > 0
            tokens = self._tokens(tx, target)
            held = store.held_by_target(tx, target.name, telling=TELLING)
            if (row.resumes_in or 0.0) > 0.0 or held.first:
                return []  # it asked us to wait, and what was asked of it before comes first
            free, most_calls = self._free(tx, target, row, held, tokens)
            if free <= 0 or most_calls <= 0:
                return []
            waiting = store.waiting(tx, target.name, without=held.waiting_jobs)
            plans = {
                batch_id: under
                for batch_id, plan in self._plans.of(
                    tx, [w.batch_id for w in waiting], place
                ).items()
                # What would fail for the want of the storage waits until it is mended.
                if storage_trouble(plan.job, row.told) is None
                and (under := place.definitions.under(plan)) is not None
            }
            waiting = self._count_due(tx, waiting, plans, min(most_calls, free))
            sizes = self._share(tx, waiting, plans, free, most_calls)
            running = store.lock_running(tx, sizes)
            calls = []
            for batch_id, packs in sizes.items():
                if batch_id in running:
                    calls += self._claim(tx, plans[batch_id], packs, row)
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
                        chunks=chunks,
                    )
                    for plan, request, chunks in calls
                ],
                window=self._window,
            )
            if tokens is not None:
                store.write_tokens(tx, target.name, "launch", tokens - len(calls))
        return [Call(ids[request.key], request, plan) for plan, request, _ in calls]

    def _free(
        self,
        tx: sa.Connection,
        target: Target,
        row: TargetRow,
        held: Held,
        tokens: float | None,
    ) -> tuple[int, int]:
        """Say how many slots are free on a target, and how many launch calls may be made now."""
        calls = 1 if row.down_calls else self._concurrency
        if held.waiting_jobs:
            # It may refuse other jobs too: as with a rate, the slower the more was refused.
            pace = budget.pace(self._store.bucket(tx, target.name, "launch"))
            calls = max(1, int(calls * pace))
        if tokens is not None:
            calls = min(calls, int(tokens))
        if target.max_executions is not None:
            calls = min(calls, target.max_executions - held.executions)
        free = UNLIMITED if target.max_running is None else target.max_running - held.slots
        return free, calls

    def _count_due(
        self,
        tx: sa.Connection,
        waiting: Sequence[WaitingBatch],
        plans: Mapping[str, Plan],
        most: int,
    ) -> list[WaitingBatch]:
        """Count the due chunks of waiting batches, as far as one round could take them."""
        caps = {
            w.batch_id: min(
                most * plans[w.batch_id].pack_tasks(w.largest_chunk),
                max(1, ROUND_BYTES // max(1, w.largest_chunk or 1)),
            )
            for w in waiting
            if w.batch_id in plans
        }
        due = self._store.count_due(tx, caps)
        return [w._replace(due=due[w.batch_id]) for w in waiting if due.get(w.batch_id)]

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
            w.batch_id: _pack(w, shares.get(w.batch_id, 0), plans[w.batch_id]) for w in waiting
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
        self._store.lock_jobs(tx, limited)
        for job_name, batches in sorted(limited.items()):
            running = min(
                limit
                for b in batches
                if (limit := plans[b.batch_id].job.limits.running) is not None
            )
            free = max(0, running - self._store.held_by_job(tx, job_name))
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
        self, tx: sa.Connection, plan: Plan, packs: Sequence[int], target: TargetRow
    ) -> list[tuple[Plan, LaunchRequest, tuple[Claimed, ...]]]:
        """Take due chunks of a batch and write the requests of the executions that hold them."""
        claimed = self._store.claim(tx, plan.batch_id, sum(packs))
        items = self._store.items_of(tx, plan.batch_id, [c.chunk_index for c in claimed])
        requests = []
        left: list[Claimed] = []
        for size in packs:
            chunks, claimed = claimed[:size], claimed[size:]
            if chunks:
                request, taken = self._request(plan, chunks, items, target)
                requests.append((plan, request, tuple(chunks[:taken])))
                left += chunks[taken:]
        if left:
            self._store.give_back(tx, plan.batch_id, left)
        return requests

    def _request(
        self,
        plan: Plan,
        chunks: Sequence[Claimed],
        items: Mapping[int, str],
        target: TargetRow,
    ) -> tuple[LaunchRequest, int]:
        """Write the request of an execution, and say for how many of the chunks.

        Fewer than all where its document would be too large: the others wait for another round, as
        one more execution was counted against no limit.
        """
        key, tasks = new_key(plan.batch_id), [one.task for one in chunks]
        request = launch_request(plan, key, target.instance, tasks, items, intended_at=target.now)
        fit = tasks_that_fit(request, DOCUMENT_BYTES) if plan.wrapped else len(tasks)
        if fit < len(tasks):
            # Written anew, and no larger than before: a pack's items may be in each line.
            request = launch_request(
                plan, key, target.instance, tasks[:fit], items, intended_at=target.now
            )
        return request, fit

    def _call(self, place: Place, calls: Sequence[Call], by: float) -> None:
        """Make launch calls, all at once, and record the answers as they come."""
        open_calls: dict[Future[Launched], Call] = {
            place.callers.submit(self._call_one, place, call, by): call for call in calls
        }
        while open_calls:
            done, _ = wait(open_calls, return_when=FIRST_COMPLETED)
            self._record(place, [(open_calls.pop(future), future) for future in done])

    def _call_one(self, place: Place, call: Call, by: float) -> Launched:
        """Make one launch call, unless it has become too late for it."""
        request = _with_storage(place, call)
        if self._monotonic() >= by:
            raise _TooLate("the launcher came too late to its own call; nothing was called")
        return place.backend.launch(request)

    def _record(self, place: Place, answers: Sequence[tuple[Call, Future[Launched]]]) -> None:
        """Record what launch calls came to."""
        found = self._sort(answers)
        if found.launched:
            self._adopt(place, found.launched, reason=None)
            place.came_up(launches=True)
        if found.unknown:
            again(partial(self._store.record_unknown, found.unknown))
        if found.failures:
            place.went_down(found.failures[0], resume_in=1.0 + self._roll())
        if found.postponed:
            again(partial(self._store.postpone_calls, found.postponed))
            waits = [after for number, after, _ in found.postponed.values() if number <= TELLING]
            if waits:
                self._store.hold_launches(place.target.name, max(waits))
                self._store.slow_down(place.target.name, "launch")
        if found.rejected:
            self._settler.settle(place, found.rejected)

    def _sort(self, answers: Sequence[tuple[Call, Future[Launched]]]) -> _Answers:
        """Tell a handle, a refusal, a "not now" and an answer that leaves it open apart."""
        found = _Answers()
        for call, future in answers:
            error = future.exception()
            if error is None:
                found.launched.append((call, future.result()))
            elif isinstance(error, Rejected):
                found.rejected.append(_refused(call, plain(str(error))))
            elif isinstance(error, _NoStorage):
                found.rejected.append(_ended(call, Outcome.NO_CAPACITY, plain(str(error))))
            elif isinstance(error, Unavailable) and error.not_started:
                after = error.retry_after.total_seconds() if error.retry_after else 5.0
                after *= 1.0 + self._roll()
                # At first all launches of the target wait as long; its slower bucket does the rest.
                after = max(after, min(LONGEST_HOLD, after * 2 ** min(call.number - 1, 5)))
                found.postponed[call.execution_id] = (call.number, after, plain(str(error)))
            else:
                report_breach(error, _TooLate)
                reason = plain(f"{type(error).__name__}: {error}".rstrip(": "))
                found.unknown[call.execution_id] = (call.number, reason)
                if not isinstance(error, _TooLate):
                    found.failures.append(reason)
        return found

    def _adopt(
        self, place: Place, found: Sequence[tuple[Call, Launched]], *, reason: str | None
    ) -> None:
        """Record handles; what no row wants any more is a stray, and is cancelled."""
        moved = again(
            partial(
                self._store.record_launched,
                [(call.execution_id, launched) for call, launched in found],
                start_timeouts={
                    call.execution_id: call.plan.times(
                        len(call.request.tasks), call.request.parallelism
                    )
                    for call, _ in found
                },
                reason=reason,
            )
        )
        unwanted = [launched for call, launched in found if call.execution_id not in moved]
        if unwanted:
            why = "its execution was given up before it was found"
            self._claims.sort_out(place, unwanted, why)

    def look(self, place: Place, row: ExecutionRow) -> None:
        """Clear up an unknown launch: found → adopt; not there → end it, or call again."""
        limits = place.backend.limits
        grace = (limits.call_timeout + limits.find_grace).total_seconds()
        left = grace - (row.past_call_by or 0.0)
        can_be_found = left >= 0.0
        delay = min(10.0, 1.0 * 2 ** min(row.looks, 4))
        if can_be_found:
            delay = min(delay, max(1.0, left + 0.1))  # the next look is the one that tells
        call = self._call_of(place, row)
        if call is None:
            # Its job cannot be read any more, and so its batch was cancelled: nothing can be looked
            # up. What may run of it is found by its label, as a stray.
            if can_be_found:
                self._store.postpone_look(row.id, delay)
            else:
                rest = ASKED[CancelKind.INVALID]
                self._settler.settle(place, [Ending(row.id, final=True, rest=rest, call=row.calls)])
            return
        try:
            found = place.backend.find(call.request)
        except Exception as error:  # noqa: BLE001 - whatever it is, it tells nothing
            report_breach(error, BackendError)
            # The longer it could not be looked up the later again, so that others get their turn.
            age = row.past_call_by or 0.0
            self._store.postpone_look(row.id, min(LONGEST_LOOK, max(2.0, age / 4)))
            if not is_throttled(error):
                place.looks.failed(self._monotonic())
                place.went_down(f"{type(error).__name__}: {error}")
            return
        place.looks.answered()
        if found is not None:
            self._adopt(place, [(call, found)], reason="found by its key")
            return
        looks = 1 if limits.relaunch_safe else 2
        if can_be_found or row.looks + 1 < looks:
            self._store.looked(row.id, delay)
        elif row.cancel_kind is not None or row.calls >= MOST_CALLS:
            self._give_up(place, row, missing=-left, delay=delay)
        elif self.calls_allowed(place, 1, refused=False):
            self._repeat(place, row, call, "not found by its key")
        else:
            self._store.postpone_look(row.id, WAIT_TO_CALL)  # it may be found until then

    def _give_up(self, place: Place, row: ExecutionRow, *, missing: float, delay: float) -> None:
        """End an execution that is not to be found, unless its claim says that it has begun.

        Its work may not be begun by a retry as well. So its record is waited for, as long as for
        one that has vanished; `missing` and `delay` are seconds.
        """
        try:
            begun = self._claims.begun(place, row.key)
        except Unreachable as error:
            log.warning("a claim cannot be read now", key=row.key, why=str(error))
            self._store.postpone_look(row.id, delay)
            return
        if begun and missing < place.backend.limits.absent_grace.total_seconds():
            self._store.looked(row.id, delay)
            return
        if row.cancel_kind is not None:
            rest = ASKED[CancelKind(row.cancel_kind)]
        elif begun:
            rest = (Outcome.LOST, "its claim says that it ran, and the provider does not know it")
        else:
            rest = (
                Outcome.START_FAILED,
                f"{row.calls} launch calls got no clear answer and started nothing",
            )
        self._settler.settle(place, [Ending(row.id, final=True, rest=rest, call=row.calls)])

    def calls_allowed(self, place: Place, wanted: int, *, refused: bool = True) -> int:
        """Say how many calls may be made again now, and take their tokens from the bucket.

        A call that was `refused` for now waits as long as the target does. One whose answer was
        lost has had a wait of its own, and waits with others only where the provider asks for it:
        else each answer that gets lost would hold up all that were lost before.
        """
        with self._store.transaction() as tx:
            row = self._store.lock_target(tx, place.target.name)
            if row is None:
                return 0
            if (row.resumes_in or 0.0) > 0.0 and (refused or not row.down_calls):
                return 0
            tokens = self._tokens(tx, place.target)
            if tokens is None:
                return min(wanted, self._concurrency)
            allowed = min(wanted, int(tokens), self._concurrency)
            if allowed:
                self._store.write_tokens(tx, place.target.name, "launch", tokens - allowed)
            return allowed

    def call_again(self, place: Place, row: ExecutionRow) -> None:
        """Call again after the provider clearly refused for a while."""
        call = self._call_of(place, row)
        if call is not None:
            self._repeat(place, row, call, "the wait that the provider asked for is over")

    def _repeat(self, place: Place, row: ExecutionRow, call: Call, reason: str) -> None:
        """Call once more under the same key."""
        by = self._monotonic() + self._window.total_seconds()
        number = self._store.call_again(
            row.id, old=row.state, calls=row.calls, window=self._window, reason=reason
        )
        if number is not None:
            self._call(place, [replace(call, number=number)], by)

    def _call_of(self, place: Place, row: ExecutionRow) -> Call | None:
        """Write the request of an execution again, from its rows."""
        if row.batch_id is None:
            return None
        with self._store.transaction() as tx:
            instance = self._store.instance(tx)
            plans = self._plans.of(tx, [row.batch_id], place)
            chunks = self._store.chunks_of(tx, row.id)
            items = self._store.items_of(tx, row.batch_id, [one.chunk_index for one in chunks])
        if row.batch_id not in plans:
            return None
        plan = plans[row.batch_id]
        request = launch_request(
            plan,
            row.key,
            instance,
            [one.task for one in chunks],
            items,
            intended_at=row.intent_at,
            parallelism=row.parallelism,
        )
        return Call(row.id, request, plan)

    def _tokens(self, tx: sa.Connection, target: Target) -> float | None:
        """Say how many launch calls the bucket allows now; None where there is no bucket."""
        if target.launches_per_minute is None:
            return None
        bucket = self._store.bucket(tx, target.name, "launch")
        return budget.left(bucket, target.launches_per_minute)


@dataclass(slots=True)
class _Answers:
    """The answers to launch calls, by what they say."""

    launched: list[tuple[Call, Launched]] = field(default_factory=list)
    unknown: dict[int, tuple[int, str]] = field(default_factory=dict)
    postponed: dict[int, tuple[int, float, str]] = field(default_factory=dict)
    rejected: list[Ending] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Why the target seems to be down."""


class _NoStorage(Exception):
    """The storage is needed and cannot be used now; nothing was called, and other jobs may be."""


class _TooLate(Exception):
    """A launch was not called because `call_by` had passed."""


def _refused(call: Call, reason: str) -> Ending:
    """Say that a launch was refused, and with it every task of it."""
    return _ended(call, Outcome.REJECTED, reason)


def _ended(call: Call, outcome: Outcome, reason: str) -> Ending:
    """Say that a launch started nothing, and how each task of it ended so."""
    tasks = range(len(call.request.tasks))
    return Ending(
        call.execution_id,
        tuple(TaskReport(index, outcome, reason=reason) for index in tasks),
        final=True,
        reason=reason,
        call=call.number,
    )


def _pack(waiting: WaitingBatch, slots: int, plan: Plan) -> list[int]:
    """Say how many chunks go into which executions, so that these hold at most `slots`."""
    if slots <= 0:
        return []
    due, most = waiting.due, plan.pack_tasks(waiting.largest_chunk)
    full, rest = divmod(slots, min(most, plan.parallelism))
    whole = full * most
    if due <= whole:
        return pack(due, most)
    return [most] * full + ([min(rest, due - whole)] if rest else [])


def _with_storage(place: Place, call: Call) -> LaunchRequest:
    """Write the input document that a launch refers to, if it needs one, and name the places.

    What is signed is signed anew for each call: that of an earlier one may have run out.

    Raises:
        Rejected: it needs one, and no storage is configured; or the storage refuses it for ever.
        _NoStorage: the storage does not answer, or its trouble is known and is being waited for;
            nothing was called.
    """
    storage, request = place.storage, call.request
    signed = storage is not None and call.plan.signed
    if storage is not None and signed:
        request = _with_signed_urls(place, storage, call)
    uri = None
    if needs_document(request, place.backend.limits):
        text = document(request).encode()
        if len(text) > place.backend.limits.inline_bytes:
            if storage is None:
                raise Rejected(
                    f"the input of this execution is {len(text)} bytes, more than the "
                    f"{place.backend.limits.inline_bytes} that a launch call can carry: set "
                    "DISPATCHER_STORAGE_URL for the workers, to a place that the containers can "
                    "read; or give fewer items to a chunk, or fewer chunks to an execution "
                    "(options.max_tasks)"
                )
            uri = _write_document(place, storage, request, text, call.number)
    if storage is None or signed:
        return replace(request, input_uri=uri)
    return replace(
        request,
        input_uri=uri,
        result_uri=storage.uri(result_prefix(request.batch_id, request.key)),
        claim_uri=None if place.claims is None else storage.uri(claim_path(request.key)),
    )


def _with_signed_urls(place: Place, storage: Storage, call: Call) -> LaunchRequest:
    """Give each task URLs of its own for its receipt and its progress."""
    request = call.request
    prefix, indexes = result_prefix(request.batch_id, request.key), [t.index for t in request.tasks]
    paths = [f"{prefix}{name(i)}" for name in (receipt_name, progress_name) for i in indexes]
    expires = call.plan.signed_for(len(request.tasks), request.parallelism)
    with _explaining(place, "the URLs for receipts cannot be signed"):
        urls = storage.sign_all(paths, method="PUT", expires=expires)
    tasks = zip(request.tasks, urls[: len(indexes)], urls[len(indexes) :], strict=True)
    return replace(
        request,
        tasks=tuple(
            replace(task, result_uri=result, progress_uri=progress)
            for task, result, progress in tasks
        ),
    )


def _write_document(
    place: Place, storage: Storage, request: LaunchRequest, text: bytes, number: int
) -> str:
    """Write an input document once; who comes again with the same key finds the same text."""
    path = input_path(request, number)
    with _explaining(place, "the input document cannot be written"):
        storage.create(path, text)
        if getattr(request.options, "signed_urls", False):
            # Tasks of a pack may wait for days until they start.
            return storage.sign(path, method="GET", expires=LONGEST_SIGNED)
    return storage.uri(path)


@contextmanager
def _explaining(place: Place, what: str) -> Iterator[None]:
    """Tell a storage that will do later, by itself or mended, from one that refuses a launch."""
    try:
        yield
    except Unreachable as error:
        raise _NoStorage(f"the storage does not answer: {error}") from error
    except TooLarge as error:
        raise Rejected(f"{what}: {error}") from error
    except DispatcherError as error:
        if (place.told or {}).keys() & {"storage_problem", "signing_problem"}:
            raise _NoStorage(f"{what}, until the storage is mended: {error}") from error
        raise Rejected(f"{what}: {error}") from error
