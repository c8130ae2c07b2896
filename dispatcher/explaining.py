"""Why a batch or a chunk is where it is, what happens next, and when: in a sentence or two.

It only reads. Each reason is a `Point`: a code and facts for programs, a sentence for people. What
may hold something up is decided in `engine.py` and `store.py`; whoever adds a reason there for a
chunk to wait adds the point for it here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import islice
from typing import Any, Final

from pydantic import ValidationError

from dispatcher import budget, queries
from dispatcher.counting import counted
from dispatcher.errors import InvalidInput
from dispatcher.job import Job
from dispatcher.moments import ago, ahead, clock, iso, since, span
from dispatcher.queries import (
    BatchView,
    Chunk,
    Holder,
    Live,
    Standing,
    TargetView,
    WorkerView,
)
from dispatcher.receipts import STORAGE_PATIENCE
from dispatcher.retrying import APPLICATION, CAPACITY, INFRASTRUCTURE
from dispatcher.states import BatchState, CancelKind, ChunkState, Outcome
from dispatcher.store import Store
from dispatcher.storing import Trouble, storage_trouble

__all__ = ["Explanation", "Point", "explain", "find_chunk"]

EXAMPLES: Final = 3
"""Chunks and holders of slots that are named; the rest is counted."""

LONG_REASON: Final = 40
"""Characters of a reason that is not said twice."""


@dataclass(frozen=True, slots=True)
class Point:
    """One reason."""

    code: str
    """Names the kind of reason, for programs; stable."""

    text: str
    """A sentence."""

    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why it is where it is, and what happens next."""

    text: str
    """One or two sentences, a few more where several things hold it up."""

    facts: dict[str, Any]
    """`batch`, `chunk` (null for a batch), `state`, `at` (the database's time) and `reasons`: a
    list of objects with `code`, `text` and the facts of that reason. Times are in ISO 8601."""


def explain(store: Store, batch_id: str, chunk_index: int | None = None) -> Explanation:
    """Explain a batch, or one of its chunks.

    Args:
        store: The tables.
        batch_id: The whole id.
        chunk_index: None explains the batch.

    Raises:
        UnknownBatch: there is no such batch.
        InvalidInput: the batch has no such chunk.
        Unreachable: the database does not answer.
    """
    case = _read(store, batch_id)
    state: StrEnum = case.batch.state
    if chunk_index is None:
        points = list(_of_batch(case))
    else:
        chunk = find_chunk(store, case.batch, chunk_index)
        state = chunk.state
        points = list(_of_chunk(case, chunk))
    points = list(_said_once(points))
    facts = {
        "batch": batch_id,
        "chunk": chunk_index,
        "state": str(state),
        "at": case.now,
        "reasons": [{"code": p.code, "text": p.text, **p.facts} for p in points],
    }
    # What a program wrote, in lines of their own, ends its sentence.
    parts = (point.text + ("\n" if "\n" in point.text else " ") for point in points)
    return Explanation("".join(parts).rstrip(), _plain(facts))


def find_chunk(store: Store, batch: BatchView, index: int, *, items: bool = False) -> Chunk:
    """Read one chunk.

    Raises:
        InvalidInput: the batch has no such chunk.
    """
    found = next(queries.chunks(store, batch.id, index=index, items=items), None)
    if found is not None:
        return found
    # Also those that were split, which its count leaves out.
    last = sum(batch.counts.values()) - 1
    why = f"it has none, and is {batch.state}" if last < 0 else f"its chunks are 0 to {last}"
    raise InvalidInput(f"batch {batch.id} has no chunk {index}: {why}")


@dataclass(frozen=True, slots=True)
class _Case:
    """What was read of a batch."""

    store: Store
    batch: BatchView
    standing: Standing
    job: Job | None
    """None where newer code wrote it."""

    target: TargetView | None
    workers: Sequence[WorkerView]

    @property
    def now(self) -> datetime:
        return self.standing.now

    @property
    def alive(self) -> list[WorkerView]:
        return [worker for worker in self.workers if worker.alive]

    def count(self, *states: ChunkState) -> int:
        return sum(self.batch.counts.get(state, 0) for state in states)

    def limit(self, name: str) -> Any:
        return None if self.target is None else self.target.limits.get(name)


def _read(store: Store, batch_id: str) -> _Case:
    batch = queries.get_batch(store, batch_id)
    standing = queries.standing(store, batch_id)
    try:
        job = Job.model_validate(standing.job)
    except ValidationError:
        job = None
    return _Case(
        store,
        batch,
        standing,
        job,
        queries.targets(store).get(batch.target),
        queries.workers(store),
    )


# --- a batch --------------------------------------------------------------------------------------


def _of_batch(case: _Case) -> Iterator[Point]:
    if case.batch.finished:
        yield from _ended(case)
        return
    hindrances = list(_service(case))
    yield from hindrances
    if case.batch.state is BatchState.PLANNING:
        yield from _planning(case, served=not hindrances)
        yield from _storage_to_mend(case)
        yield _deadline(case)
        return
    yield _progress(case)
    live = queries.live(case.store, case.batch.id)
    if case.batch.cancel_requested_at is not None:
        yield _cancelling(case, case.batch.cancel_requested_at, live)
        return
    if not case.count(ChunkState.PENDING, ChunkState.LAUNCHING, ChunkState.RUNNING):
        yield Point(
            "verdict",
            "Every chunk is final: a worker's next sweep writes how the batch ended, within "
            "seconds.",
        )
        return
    yield from _moving(case, live)
    if _trouble(case) is None or not case.standing.due:
        yield from _storage_to_mend(case)
    if case.standing.due:
        who = f"{counted(case.standing.due, 'chunk')} could be launched now"
        yield from _waiting(case, who, served=not hindrances)
    if case.standing.later and case.standing.next_due_chunk is not None:
        yield from _next_retry(case)
    if case.standing.held and case.standing.held_until is not None:
        yield _held(case.standing.held_until, case.now, counted(case.standing.held, "chunk"))
    if case.standing.awaiting_split:
        yield _awaiting_split(counted(case.standing.awaiting_split, "chunk"))
    yield _deadline(case)


def _service(case: _Case) -> Iterator[Point]:
    """Say who does not serve the batch; nothing where someone does."""
    batch, now = case.batch, case.now
    if not case.alive:
        last = max((worker.heartbeat_at for worker in case.workers), default=None)
        been = "has ever been alive" if last is None else f"has been alive {since(last, now)}"
        goes_on = " What runs already runs on." if case.count(ChunkState.RUNNING) else ""
        yield Point(
            "no_worker",
            f"Nothing moves: no worker {been}; start one.{goes_on}",
            {"last_heartbeat": last},
        )
        return
    newest = max(worker.code_version for worker in case.alive)
    if case.standing.code_version > newest:
        yield Point(
            "newer_code",
            f"It was written by newer code (version {case.standing.code_version}) than any worker "
            f"that is alive understands (version {newest}): it waits for a newer worker.",
            {"code_version": case.standing.code_version, "workers": newest},
        )
    target = case.target
    problems = {w.id: w.problems[batch.target] for w in case.alive if batch.target in w.problems}
    if target is not None and target.leased:
        return
    # Planning needs a worker that knows the target, launching and following one that leads it.
    if problems and batch.state is BatchState.PLANNING:
        return
    home = None if target is None or target.home is None else target.home.get("host")
    if home is not None and not any(worker.host == home for worker in case.alive):
        yield Point(
            "home",
            f"Only host {home} can serve target {batch.target}, and no worker there is alive: "
            "start one there.",
            {"target": batch.target, "host": home},
        )
        return
    lost = None if target is None else queries.silent_leader(target, case.alive)
    if lost is not None:
        yield Point(
            "silent_worker",
            f"Nobody serves target {batch.target} now: its worker {lost.id} has not been heard of "
            f"{since(lost.heartbeat_at, now)}, and its lease has run out; another worker that "
            "has the target in its jobs file takes over within seconds.",
            {"target": batch.target, "worker": lost.id, "last_heartbeat": lost.heartbeat_at},
        )
        return
    led = None if target is None or target.lease_until is None else target.lease_until
    how_long = "" if led is None else f" {since(led, now)}"
    why = "; ".join(sorted({_told(problem) for problem in problems.values()}))
    yield Point(
        "unserved",
        f"No worker that is alive serves target {batch.target}{how_long}"
        + (f": {why}." if why else ": is it in the jobs file of the workers?"),
        {"target": batch.target, "since": led, "problems": problems},
    )


def _planning(case: _Case, *, served: bool) -> Iterator[Point]:
    standing, now = case.standing, case.now
    made = ago(case.batch.created_at, now)
    if standing.being_planned:
        yield Point("being_planned", f"A worker is planning it now; it was enqueued {made}.")
    elif standing.plan_after is not None and standing.plan_after > now:
        tries = f"{standing.plan_tries} tr{'y' if standing.plan_tries == 1 else 'ies'}"
        yield Point(
            "plan_postponed",
            f"Planning was put off after {tries}: {_told(case.batch.reason)}. "
            f"The next try is {ahead(standing.plan_after, now)}.{_lines_of(case.batch.reason)}",
            {
                "tries": standing.plan_tries,
                "next_try": standing.plan_after,
                "reason": case.batch.reason,
            },
        )
    else:
        source = {
            "pages": "its items are stored",
            "source": "its items will come from the job's item source",
        }.get(standing.items_from, f"its items will be read from {standing.items_from}")
        then = "; a worker's next sweep plans it within seconds" if served else ""
        yield Point(
            "unplanned",
            f"It was enqueued {made} and waits to be planned ({source}){then}.",
            {"items_from": standing.items_from},
        )


def _progress(case: _Case) -> Point:
    total = case.batch.chunk_count or 0
    counts = {str(state): case.count(state) for state in ChunkState}
    final = [
        f"{counts[state]} {state}"
        for state in (ChunkState.SUCCEEDED, ChunkState.FAILED, ChunkState.CANCELLED)
        if counts[state]
    ]
    done = sum(case.count(s) for s in (ChunkState.SUCCEEDED, ChunkState.FAILED))
    done += case.count(ChunkState.CANCELLED)
    said = f" ({', '.join(final)})" if final else ""
    are = "is" if 1 in (done, total) else "are"
    return Point(
        "progress",
        f"{done:,} of {counted(total, 'chunk')} {are} final{said}.",
        {"chunks": total, "final": done, "counts": counts},
    )


def _cancelling(case: _Case, at: datetime, live: Mapping[str, Live]) -> Point:
    standing, now = case.standing, case.now
    total, ended, unsent = queries.cancelled_executions(case.store, case.batch.id, at)
    if standing.cancel_kind == CancelKind.OPERATOR:
        who = f"{standing.cancel_actor or 'somebody'} asked {ago(at, now)} for its cancel"
        text = f"{who} ({_told(standing.cancel_reason)})"
    else:
        text = f"It is being ended {since(at, now)}: {_told(standing.cancel_reason)}"
    facts: dict[str, Any] = {
        "kind": standing.cancel_kind,
        "reason": standing.cancel_reason,
        "actor": standing.cancel_actor,
        "requested_at": at,
        "executions": total,
        "confirmed": ended,
        "unsent": unsent,
    }
    are = "is" if 1 in (ended, total) else "are"
    text += f"; {ended:,} of {counted(total, 'execution')} {are} confirmed to have ended"
    if unsent > 1:
        text += f", the cancels of {unsent:,} are still to be sent"
        rate = case.limit("writes_per_minute")
        if rate is not None:
            text += f" at {rate:g} a minute"
    one = live.get("cancelling")
    if one is not None:
        what, more = _cancel_step(one, now)
        text += f", and {what}"
        facts |= more
    return Point("cancelling", text + ".", facts)


def _cancel_step(one: Live, now: datetime) -> tuple[str, dict[str, Any]]:
    """Say what is done next to end an execution that is still live."""
    calls = f"{counted(one.cancel_calls, 'call')} so far"
    if one.state == "unknown":
        when = "at once" if one.next_look_at is None else ahead(one.next_look_at, now)
        step = "one whose launch is unclear is looked up by its key and never launched again, next"
        return f"{step} {when}", {"next_look": one.next_look_at}
    if one.state == "intended":
        return "one that was about to be launched is settled when its call is over", {}
    when = "at once" if one.next_cancel_at is None else ahead(one.next_cancel_at, now)
    return (
        f"the provider is asked again {when} ({calls})",
        {"next_call": one.next_cancel_at, "calls": one.cancel_calls},
    )


def _moving(case: _Case, live: Mapping[str, Live]) -> Iterator[Point]:
    """Say what the executions of a batch are at, a sentence for each situation."""
    now = case.now
    running = live.get("running")
    if running is not None:
        began = running.started_at or now
        oldest = f", the oldest (chunk {running.chunk_index}) {since(began, now)}"
        waiting = running.tasks - running.at_once
        turns = (
            f" At most {running.at_once} of them run at the same time, as `parallelism` says in "
            f"the job's options or its definition at the provider; the other {waiting} wait there "
            "for their turn, and no start deadline is held against them."
            if waiting
            else ""
        )
        yield Point(
            "running",
            f"{counted(running.tasks, 'chunk')} run{'s' if running.tasks == 1 else ''} in "
            f"{counted(running.executions, 'execution')}{oldest}.{turns}",
            {
                "tasks": running.tasks,
                "at_once": running.at_once,
                "executions": running.executions,
                "oldest_chunk": running.chunk_index,
                "oldest_since": began,
            },
        )
    for what in ("starting", "calling", "throttled", "unknown", "absent", "unread", "cancelling"):
        one = live.get(what)
        if one is not None:
            who = counted(one.executions, "execution") if one.executions > 1 else "One execution"
            chunk = "" if one.chunk_index is None else f" (chunk {one.chunk_index})"
            yield _situation(case, one, f"{who}{chunk if one.executions == 1 else ''}")
    yield from _target_down(case)


def _next_retry(case: _Case) -> Iterator[Point]:
    standing, now = case.standing, case.now
    index, due = standing.next_due_chunk, standing.next_due
    chunk = next(queries.chunks(case.store, case.batch.id, index=index), None)
    if chunk is None or due is None or index is None:
        return
    why, facts = _last_attempt(case, chunk)
    more = standing.later - 1
    others = (
        f"; {counted(more, 'chunk')} more wait{'s' if more == 1 else ''} for theirs" if more else ""
    )
    yield Point(
        "retry_due",
        f"A retry of chunk {index} is due {ahead(due, now)}{why}{others}.",
        {"chunks": standing.later, "chunk_index": index, "due": due, **facts},
    )


def _deadline(case: _Case) -> Point:
    deadline = case.batch.deadline
    return Point(
        "deadline",
        f"What is not final by its deadline {ahead(deadline, case.now)} is ended and fails.",
        {"deadline": deadline},
    )


# --- a chunk --------------------------------------------------------------------------------------


def _of_chunk(case: _Case, chunk: Chunk) -> Iterator[Point]:
    now = case.now
    if chunk.state in (ChunkState.SUCCEEDED, ChunkState.FAILED, ChunkState.CANCELLED):
        yield _final_chunk(case, chunk)
        return
    if chunk.state is ChunkState.SPLIT:
        yield _split_chunk(case, chunk)
        return
    hindrances = list(_service(case))
    yield from hindrances
    stored = queries.chunk_standing(case.store, case.batch.id, chunk.index)
    if chunk.state is not ChunkState.PENDING:
        yield from _open_chunk(case, chunk, stored.execution_id)
        return
    why, facts = _last_attempt(case, chunk)
    if stored.awaits_split is not None:
        yield _awaiting_split(f"Chunk {chunk.index}")
    elif chunk.due_at > now:
        yield Point(
            "retry_due",
            f"A retry of chunk {chunk.index} is due {ahead(chunk.due_at, now)}{why}.",
            {"chunks": 1, "chunk_index": chunk.index, "due": chunk.due_at, **facts},
        )
    elif stored.hold_until is not None and stored.hold_until > now:
        yield _held(stored.hold_until, now, f"Chunk {chunk.index}")
    else:
        who = f"Chunk {chunk.index} could be launched now{why}"
        yield from _waiting(case, who, served=not hindrances)


def _final_chunk(case: _Case, chunk: Chunk) -> Point:
    now = case.now
    finished = chunk.finished_at or now
    attempt = chunk.attempts[-1].number if chunk.attempts else None
    facts = {
        "attempts": len(chunk.attempts),
        "outcome": chunk.outcome,
        "exit_code": chunk.attempts[-1].exit_code if chunk.attempts else None,
        "finished_at": finished,
        "reason": chunk.reason,
    }
    if chunk.state is ChunkState.SUCCEEDED:
        return Point(
            "succeeded",
            f"Chunk {chunk.index} succeeded {ago(finished, now)} with attempt {attempt}.",
            facts,
        )
    what = f"Chunk {chunk.index} {_was(chunk.state)} {ago(finished, now)}"
    what += (
        f" after {counted(len(chunk.attempts), 'attempt')}"
        if chunk.attempts
        else " before any attempt"
    )
    why = f": {_told(chunk.reason)}" if chunk.reason else ""
    return Point(
        str(chunk.state), f"{what}{why}.{_retry_advice(case)}{_lines_of(chunk.reason)}", facts
    )


def _split_chunk(case: _Case, chunk: Chunk) -> Point:
    """Say where the items of a chunk go on that is itself no more."""
    finished = chunk.finished_at or case.now
    parts = queries.parts(case.store, case.batch.id, chunk.index)
    where = f"chunk{'' if len(parts) == 1 else 's'} {_listed(map(str, parts))}"
    why = f": {_told(chunk.reason)}" if chunk.reason else ""
    return Point(
        "split",
        f"Chunk {chunk.index} was split {ago(finished, case.now)} after "
        f"attempt {len(chunk.attempts)}{why}. Its items go on in {where}."
        f"{_lines_of(chunk.reason)}",
        {
            "attempts": len(chunk.attempts),
            "outcome": chunk.outcome,
            "finished_at": finished,
            "reason": chunk.reason,
            "parts": parts,
        },
    )


def _open_chunk(case: _Case, chunk: Chunk, execution_id: int | None) -> Iterator[Point]:
    live = (
        {}
        if execution_id is None
        else queries.live(case.store, case.batch.id, execution_id=execution_id)
    )
    number = chunk.attempts[-1].number if chunk.attempts else 1
    for one in live.values():
        who = f"Attempt {number} of chunk {chunk.index}"
        if one.what == "running":
            yield _running_chunk(case, chunk, one, who)
        else:
            yield _situation(case, one, who)
    if not live:
        yield Point("settling", f"Chunk {chunk.index} has moved on at this very moment; ask again.")
    yield from _target_down(case)


def _running_chunk(case: _Case, chunk: Chunk, one: Live, who: str) -> Point:
    now = case.now
    began = one.started_at or now
    facts: dict[str, Any] = {"since": began, "handle": one.handle, "deadline": one.deadline}
    text = f"{who} runs {since(began, now)} as {one.handle} on target {case.batch.target}"
    if one.tasks > 1:
        text += f", an execution with {one.tasks} open tasks"
        if one.at_once < one.tasks:
            text += f" of which {one.at_once} run at the same time: it may still wait for its turn"
    if case.job is not None:
        facts["timeout"] = case.job.timeout
        text += f"; a task is stopped after {span(case.job.timeout)}"
    if one.deadline is not None:
        text += f", the execution at the latest {ahead(one.deadline, now)}"
    return Point("running", f"{text}.", {"chunk_index": chunk.index, **facts})


# --- what both have -------------------------------------------------------------------------------


def _situation(case: _Case, one: Live, who: str) -> Point:
    """Say what an execution that does not simply run is at, and what comes next."""
    now, target = case.now, case.batch.target
    facts: dict[str, Any] = {"executions": one.executions, "tasks": one.tasks}
    are = "are" if one.executions > 1 else "is"
    reason = f": {_told(one.reason)}" if one.reason else ""
    if one.what == "calling":
        until = "" if one.call_by is None else f", which must begin {ahead(one.call_by, now)}"
        if one.call_by is not None and one.call_by <= now:
            until = "; no answer was recorded in time, so it is looked up by its key next"
        text = f"{who} {are} being launched: {one.worker} is making the call{until}."
        facts |= {"worker": one.worker, "call_by": one.call_by}
    elif one.what == "throttled":
        when = ahead(one.next_call_at or now, now)
        text = f"{who} {are} waiting to be called again, next {when}{reason}. It costs no attempt."
        facts |= {"next_call": one.next_call_at, "calls": one.calls, "reason": one.reason}
    elif one.what == "unknown":
        when = ahead(one.next_look_at or now, now)
        looks = f"{counted(one.looks, 'look')} found nothing so far"
        text = (
            f"It is not known whether the launch of {who[0].lower()}{who[1:]} started anything "
            f"(call of {ago(one.intent_at, now)}{reason}): it is looked up by its key on target "
            f"{target}, next {when}; {looks}."
        )
        facts |= {"next_look": one.next_look_at, "looks": one.looks, "reason": one.reason}
    elif one.what == "starting":
        launched = since(one.launched_at or now, now)
        text = (
            f"{who} {are} accepted by target {target} {launched}, which counts as running, and not "
            "started yet"
        )
        if one.start_deadline is not None:
            text += f"; given up if not started {ahead(one.start_deadline, now)}"
        text += "."
        facts |= {
            "launched_at": one.launched_at,
            "start_deadline": one.start_deadline,
            "handle": one.handle,
        }
    elif one.what == "absent":
        gone = one.absent_since or now
        grace = case.limit("absent_grace")
        until = "" if grace is None else f" until {clock(gone + timedelta(seconds=grace), now)}"
        text = (
            f"{who} {are} unknown to target {target} {since(gone, now)}; if that stays so "
            f"for its grace{until}, it counts as lost after a last cancel."
        )
        facts |= {"absent_since": one.absent_since, "handle": one.handle}
    elif one.what == "unread":
        unread = one.unread_since or now
        text = (
            f"{who} {are} waiting for the storage, which does not answer {since(unread, now)}: "
            f"on target {target} the task has ended, and its receipt cannot be read"
            if one.tasks == one.executions
            else f"{who} may be waiting for the storage, which does not answer "
            f"{since(unread, now)}: on target {target} some of {one.tasks} open tasks have ended, "
            "and their receipts cannot be read; what still runs runs on"
        )
        text += (
            f". {span(STORAGE_PATIENCE)} after its end, what the provider says of a task counts "
            "without."
        )
        facts |= {"unread_since": one.unread_since, "handle": one.handle}
    else:
        step, more = _cancel_step(one, now)
        asked = since(one.cancel_requested_at or now, now)
        why = {
            CancelKind.TIMEOUT: "it ran past its deadline",
            CancelKind.START_TIMEOUT: "no task of it started in time",
            CancelKind.OPERATOR: "the batch was cancelled",
            CancelKind.BATCH_DEADLINE: "the batch's deadline passed",
            CancelKind.INVALID: "its job cannot be run",
            CancelKind.SUCCESS_POLICY: "the batch can no longer succeed",
            CancelKind.STRAY: "no attempt belongs to it",
        }[CancelKind(one.cancel_kind or CancelKind.STRAY)]
        text = f"{who} {are} being ended {asked}, as {why}; {step}."
        facts |= {"kind": one.cancel_kind, "requested_at": one.cancel_requested_at, **more}
    return Point(one.what, text, facts)


def _target_down(case: _Case) -> Iterator[Point]:
    """Say that news may be late, as the target does not answer."""
    target, now = case.target, case.now
    if target is not None and target.down_since is not None and not _is_held_back(case):
        yield Point(
            "target_down",
            f"Target {target.name} does not answer {since(target.down_since, now)} "
            f"({_told(target.down_reason)}): what has ended there is noted when it does.",
            {"target": target.name, "since": target.down_since, "reason": target.down_reason},
        )


def _is_held_back(case: _Case) -> bool:
    return case.target is not None and (
        case.target.resume_at is not None and case.target.resume_at > case.now
    )


def _held(until: datetime, now: datetime, who: str) -> Point:
    return Point(
        "held_for_pack",
        f"{who} {'wait' if who.endswith('chunks') else 'waits'} for other retries to share an "
        f"execution with, and will be due {ahead(until, now)} at the latest.",
        {"until": until},
    )


def _awaiting_split(who: str) -> Point:
    plural = who.endswith("chunks")
    return Point(
        "awaits_split",
        f"{who} {'have' if plural else 'has'} used up {'their' if plural else 'its'} attempts and "
        f"{'wait' if plural else 'waits'} to be split: each success in this batch pays for some "
        "more splits. If nothing else of it is open any more, what waits fails as it is.",
    )


def _waiting(case: _Case, who: str, *, served: bool) -> Iterator[Point]:
    """Say why what is due is not launched."""
    blockers = list(_blockers(case))
    if blockers:
        for place, blocker in enumerate(blockers):
            lead = f"{who}, but " if not place else "Also, "
            yield Point(blocker.code, f"{lead}{blocker.text}.", blocker.facts)
        return
    first = queries.ahead(case.store, case.batch.target, case.batch.priority)
    facts = {"ahead": [{"batch": i, "job": j, "priority": p} for i, j, p in first]}
    if first:
        names = _listed(f"batch {i} ({j}, priority {p})" for i, j, p in first[:EXAMPLES])
        yield Point("priority", f"{who}; of a higher priority, and first, is {names}.", facts)
    elif served:
        soon = "the next round of launches is a second or two away"
        yield Point("launching_soon", f"{who}: {soon}.")
    else:
        yield Point("due", f"{who}.")


def _blockers(case: _Case) -> Iterator[Point]:
    """Check each thing that launch checks, in its order."""
    target = case.target
    if target is None:
        return
    yield from _hold(case, target)
    trouble = _trouble(case)
    if trouble is not None:
        yield Point(
            "storage",
            f"the job {trouble.need}, and the storage of target {target.name} cannot be used: "
            f"{_told(trouble.problem)}. A worker looks every half minute, and launches when it is "
            "mended",
            {"target": target.name, "problem": trouble.problem},
        )
    yield from _refused_for_now(case, target)
    yield from _empty_bucket(case, target)
    on_target = queries.holders(case.store, target=target.name)
    slots = sum(holder.slots for holder in on_target)
    executions = sum(holder.executions for holder in on_target)
    most = case.limit("max_running")
    if most is not None and slots >= most:
        yield _full(
            "target_slots", f"{most} slots of target {target.name} (max_running)", on_target
        )
    most = case.limit("max_executions")
    if most is not None and executions >= most:
        what = f"{most} executions of target {target.name} (max_executions)"
        yield _full("target_executions", what, on_target)
    limits = None if case.job is None else case.job.limits
    if limits is not None and limits.running is not None:
        of_job = queries.holders(case.store, job=case.batch.job)
        if sum(holder.slots for holder in of_job) >= limits.running:
            what = f"{limits.running} slots of job {case.batch.job} (limits.running)"
            yield _full("job_slots", what, of_job)
    if limits is not None and limits.per_batch is not None:
        own = queries.holders(case.store, batch_id=case.batch.id)
        if sum(holder.slots for holder in own) >= limits.per_batch:
            what = f"{limits.per_batch} slots of this batch (limits.per_batch)"
            yield _full("batch_slots", what, own)


def _hold(case: _Case, target: TargetView) -> Iterator[Point]:
    now = case.now
    if target.resume_at is None or target.resume_at <= now:
        return
    if target.down_since is None:
        yield Point(
            "target_throttled",
            f"target {target.name} refuses launches for now; they resume "
            f"{ahead(target.resume_at, now)}",
            {"target": target.name, "resume_at": target.resume_at},
        )
    else:
        yield Point(
            "target_down",
            f"target {target.name} does not answer {since(target.down_since, now)} "
            f"({_told(target.down_reason)}); launches resume {ahead(target.resume_at, now)}",
            {
                "target": target.name,
                "since": target.down_since,
                "reason": target.down_reason,
                "resume_at": target.resume_at,
            },
        )


def _trouble(case: _Case) -> Trouble | None:
    """Say what of the storage has to be mended before launches go on."""
    target = case.target
    if case.job is None or target is None or not target.leased:
        return None
    return storage_trouble(case.job, target.limits)


def _storage_to_mend(case: _Case) -> Iterator[Point]:
    """Say that the storage has to be mended, where nothing due waits for that."""
    target, trouble = case.target, _trouble(case)
    if target is None or not target.leased:
        return
    problem = trouble.problem if trouble else target.limits.get("storage_problem")
    if problem is None:
        return
    then = "nothing is launched until it is mended"
    if trouble is None:
        then = "receipts are not found, and inputs that are too large for a launch call wait"
    yield Point(
        "storage",
        f"The storage of target {target.name} cannot be used: {_told(problem)}. Meanwhile {then}.",
        {"target": target.name, "problem": problem},
    )


def _refused_for_now(case: _Case, target: TargetView) -> Iterator[Point]:
    job = case.batch.job
    executions, next_call, reason = queries.refused_for_now(case.store, target.name, job)
    if not executions:
        return
    many = "an execution" if executions == 1 else f"{executions} executions"
    why = f" ({reason})" if reason else ""
    yield Point(
        "job_throttled",
        f"target {target.name} has refused {many} of job {job} for now{why}, and what was asked "
        f"for before comes first: called again {ahead(next_call or case.now, case.now)}",
        {"executions": executions, "next_call": next_call, "reason": reason},
    )


def _empty_bucket(case: _Case, target: TargetView) -> Iterator[Point]:
    per_minute = case.limit("launches_per_minute")
    if per_minute is None:
        return
    wait = budget.seconds_until(target.launch_bucket, per_minute, 1.0)
    if wait <= 0.0:
        return
    next_call = case.now + timedelta(seconds=wait)
    pace = budget.pace(target.launch_bucket)
    slowed = "" if pace >= 1.0 else f", slowed to {pace:.0%} after throttling"
    yield Point(
        "launch_rate",
        f"target {target.name} may be called {per_minute:g} times a minute "
        f"(launches_per_minute{slowed}); the next call is due {ahead(next_call, case.now)}",
        {
            "target": target.name,
            "launches_per_minute": per_minute,
            "pace": pace,
            "next_call": next_call,
        },
    )


def _full(code: str, what: str, held: Sequence[Holder]) -> Point:
    named = [f"{h.slots} by {_holder(h)}" for h in held[:EXAMPLES]]
    rest = sum(h.slots for h in held[EXAMPLES:])
    if rest:
        named.append(f"{rest} by {len(held) - EXAMPLES} more")
    return Point(
        code,
        f"all {what} are held, {_listed(named)}: the next goes out when one is given back",
        {
            "held_by": [
                {"batch": h.batch_id, "job": h.job, "slots": h.slots, "executions": h.executions}
                for h in held
            ]
        },
    )


def _holder(holder: Holder) -> str:
    if holder.batch_id is None:
        return "strays that are being cancelled"
    return f"batch {holder.batch_id} ({holder.job})"


def _last_attempt(case: _Case, chunk: Chunk) -> tuple[str, dict[str, Any]]:
    """Say how the last attempt of a chunk ended, and what is left of its budget."""
    ended = [attempt for attempt in chunk.attempts if attempt.outcome is not None]
    if not ended:
        return "", {}
    last = ended[-1]
    outcome = last.outcome or Outcome.FAILED
    said = outcome.replace("_", " ") + (
        f" with exit code {last.exit_code}" if last.exit_code else ""
    )
    facts: dict[str, Any] = {
        "attempt": last.number,
        "outcome": outcome,
        "exit_code": last.exit_code,
    }
    text = f", after attempt {last.number} {said}"
    if case.job is None:
        return text, facts
    policy = case.job.retry
    budget_from = queries.chunk_standing(case.store, case.batch.id, chunk.index).budget_from
    kinds, budget, word = {
        **dict.fromkeys(APPLICATION, (APPLICATION, policy.attempts, "attempts")),
        **dict.fromkeys(
            INFRASTRUCTURE,
            (INFRASTRUCTURE, policy.infrastructure_attempts, "infrastructure attempts"),
        ),
    }.get(outcome, (CAPACITY, None, ""))
    used = sum(a.outcome in kinds for a in ended if a.number > budget_from)
    if budget is None or not used:  # an operator's retry made it due, or it costs only time
        return text, facts
    facts |= {"used": used, "budget": budget}
    return f"{text} ({used} of {budget} {word} used)", facts


# --- the end --------------------------------------------------------------------------------------


def _ended(case: _Case) -> Iterator[Point]:
    batch, now = case.batch, case.now
    finished = batch.finished_at or now
    took = span(finished - batch.created_at)
    facts: dict[str, Any] = {"finished_at": finished, "reason": batch.reason, "retry": None}
    if batch.state is BatchState.SUCCEEDED:
        chunks = counted(batch.chunk_count or 0, "chunk")
        how = f"all {chunks} succeeded" if batch.chunk_count else "it had no items"
        if batch.chunk_count and batch.reason:
            how = batch.reason
        yield Point("succeeded", f"It succeeded {ago(finished, now)}, after {took}: {how}.", facts)
        if not case.count(ChunkState.FAILED, ChunkState.CANCELLED):
            return
    elif batch.state is BatchState.CANCELLED:
        actor = case.standing.cancel_actor or "somebody"
        facts["actor"] = actor
        done = case.count(ChunkState.SUCCEEDED)
        so_far = f"; {counted(done, 'chunk')} had succeeded" if done else ""
        yield Point(
            "cancelled",
            f"It was cancelled by {actor}, and nothing of it runs {since(finished, now)} "
            f"({_told(batch.reason)}){so_far}.",
            facts,
        )
    elif batch.planned_at is None:
        why = f"{_told(batch.reason)}.{_lines_of(batch.reason)}"
        yield Point("failed", f"It failed {ago(finished, now)} unplanned: {why}", facts)
    failed = list(
        islice(queries.chunks(case.store, batch.id, states=[ChunkState.FAILED]), EXAMPLES)
    )
    if batch.state is BatchState.FAILED and batch.planned_at is not None:
        why = batch.reason or ""
        for chunk in failed:  # its example is told with its chunk
            why = why.removesuffix(f": {chunk.reason}")
        yield Point("failed", f"It failed {ago(finished, now)}: {_told(why)}.", facts)
    told: dict[str, int] = {}
    for chunk in failed:
        last = chunk.attempts[-1] if chunk.attempts else None
        why = f"{_told(chunk.reason or 'failed')}.{_lines_of(chunk.reason)}"
        same = told.setdefault(why, chunk.index)
        yield Point(
            "failed_chunk",
            f"Chunk {chunk.index}: {why if same == chunk.index else f'as chunk {same}.'}",
            {
                "chunk_index": chunk.index,
                "reason": chunk.reason,
                "outcome": chunk.outcome,
                "exit_code": None if last is None else last.exit_code,
                "attempts": len(chunk.attempts),
            },
        )
    advice = _retry_advice(case).strip()
    if advice:
        yield Point("retry", advice, {"command": _retry_command(case)})


def _retry_command(case: _Case) -> str:
    return f"dispatcher retry --failed {case.batch.id}"


def _retry_advice(case: _Case) -> str:
    """Say what an operator's retry would do; "" where it is refused."""
    batch = case.batch
    if not batch.finished:
        return " It can be retried when the batch has ended."
    again = case.count(ChunkState.FAILED, ChunkState.CANCELLED)
    if again:
        return (
            f" `{_retry_command(case)}` runs {counted(again, 'chunk')} again, with fresh budgets."
        )
    if batch.planned_at is None:
        return f" `{_retry_command(case)}` plans it again."
    return ""


# --- words ----------------------------------------------------------------------------------------


def _told(reason: str | None) -> str:
    """Give the first line of a reason as a part of a sentence, which has a stop of its own."""
    return (reason or "no reason was recorded").strip().split("\n")[0].rstrip(" .;:")


def _lines_of(reason: str | None) -> str:
    """Give what follows the first line of a reason, as lines under the sentence."""
    _, newline, rest = (reason or "").strip().partition("\n")
    return newline + rest


def _said_once(points: Iterable[Point]) -> Iterator[Point]:
    """Leave out of a sentence the long reason that an earlier one gave."""
    said: list[str] = []
    for point in points:
        text, reason = point.text, _told(point.facts.get("reason"))
        if len(reason) >= LONG_REASON and any(reason in earlier for earlier in said):
            text = text.replace(reason, "as said above")
        said.append(point.text)
        yield replace(point, text=text)


def _was(state: ChunkState) -> str:
    return "was cancelled" if state is ChunkState.CANCELLED else "failed"


def _listed(parts: Iterable[str]) -> str:
    *head, last = parts
    return f"{', '.join(head)} and {last}" if head else last


def _plain(value: Any) -> Any:
    """Turn facts into JSON values."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime):
        return iso(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    return str(value) if isinstance(value, StrEnum) else value
