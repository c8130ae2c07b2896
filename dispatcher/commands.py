"""What each command does: open the queue, read or act, show the result, give the exit code.

How commands and options are named is `cli.py`'s; how things look is `rendering.py`'s. Nothing here
is for applications: they use `dispatcher.Dispatcher`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from pydantic_core import from_json

from dispatcher import applying, checking, explaining, logs, queries, rendering, results, schema
from dispatcher.backends.base import Backend, BackendError, Unavailable
from dispatcher.backends.registry import make_backend
from dispatcher.cli import Scope
from dispatcher.client import Batch, Dispatcher
from dispatcher.config import Config, Settings, load_config, load_settings
from dispatcher.counting import counted
from dispatcher.enqueueing import BatchRequest
from dispatcher.errors import (
    ConfigurationError,
    InvalidInput,
    InvalidItems,
    SchemaMismatch,
)
from dispatcher.item_source import run_source
from dispatcher.items import ItemStream, format_of, is_uri, open_items, stream_items
from dispatcher.job import Chunking, Job
from dispatcher.moments import read_moment
from dispatcher.overriding import overridden
from dispatcher.planning import pack, plan_chunks
from dispatcher.problems import shown
from dispatcher.queries import Attempt, BatchView, Chunk
from dispatcher.rendering import Screen, utc_now
from dispatcher.requests import Plan, check_chunk
from dispatcher.settings import misspelt_variables
from dispatcher.states import FINAL_CHUNK, BatchState, ChunkState
from dispatcher.storage import read_items
from dispatcher.store import Store

__all__ = [
    "apply",
    "audit",
    "batches",
    "cancel",
    "check",
    "db_check",
    "db_downgrade",
    "db_upgrade",
    "enqueue",
    "explain",
    "jobs",
    "logs_of",
    "retry",
    "run_standalone",
    "show",
    "watch",
]

MOST_CHUNKS: Final = 50
MOST_ITEMS: Final = 100
"""Chunks that `show` lists of a batch unless it is told to list all."""

LOGS_SHOWN: Final = 5
"""Failed chunks whose last lines `show` prints."""

LINES_SHOWN: Final = 10
INTERRUPTED: Final = 130
FAILED: Final = 1
UNREACHABLE: Final = 4

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 1.0


@contextmanager
def _opened(scope: Scope) -> Iterator[tuple[Dispatcher, Screen]]:
    """Open the queue for one command."""
    dispatcher = Dispatcher(_settings(scope))
    with dispatcher:
        yield dispatcher, Screen(as_json=scope.as_json)


def _settings(scope: Scope) -> Settings:
    _tell_misspelt()
    settings = load_settings(database_url=scope.database_url, jobs=scope.jobs)
    # What a library would tell the log of a service is noise to somebody at a terminal.
    level = settings.level if scope.debug else max(settings.level, logging.WARNING)
    logs.configure(level, settings.log_format)
    return settings


def _tell_misspelt() -> None:
    for line in misspelt_variables():
        sys.stderr.write(f"warning: {line}\n")


def _config(scope: Scope) -> Config:
    """Read the jobs without needing a database."""
    source = scope.jobs or os.environ.get("DISPATCHER_JOBS") or _settings(scope).jobs
    if not source:
        raise ConfigurationError(
            "no jobs are configured: give --jobs or set DISPATCHER_JOBS, to a YAML file or a "
            "Python module"
        )
    return load_config(source)


# --- enqueue --------------------------------------------------------------------------------------


def enqueue(
    scope: Scope,
    job: str,
    *,
    items: str | None,
    item: Sequence[str],
    param: Sequence[str],
    key: str | None,
    priority: int | None,
    chunk_size: int | None,
    arg: Sequence[str],
    env: Sequence[str],
    timeout: str | None,
    tasks: int | None,
    label: Sequence[str],
    wait: bool,
    dry_run: bool,
) -> int:
    """Enqueue a batch, or only say how it would be cut."""
    if items is not None and item:
        raise InvalidInput("--items and --item are both given; use one of them")
    if chunk_size is not None and tasks is not None:
        raise InvalidInput("--chunk-size and --tasks are both given; use one of them")
    overrides = {
        "args": list(arg) or None,
        "env": _pairs(env, "--env") or None,
        "timeout": timeout,
        "tasks": tasks,
    }
    if dry_run:
        config, found = _changed(_config(scope), job, chunk_size, overrides)
        params = found.check_params(_params(_pairs(param, "--param"), found))
        labels = _pairs(label, "--label")
        # What enqueueing would refuse before it looks at the items is refused here too.
        with BatchRequest(found, [], params=params, key=key, labels=labels, actor="dry-run"):
            return _dry_run(scope, config, found, params, items, item)
    with _opened(scope) as (dispatcher, screen):
        found = dispatcher.config.job(job)
        params = _params(_pairs(param, "--param"), found)
        labels = _pairs(label, "--label")
        if found.items is None and items is None and not item:
            raise _no_items(found)
        batch = dispatcher.enqueue(
            job,
            _given_items(items, item),
            params=params or None,
            key=key,
            priority=priority,
            chunk_size=chunk_size,
            labels=labels,
            overrides=overrides,
        )
        there_already = _there_already(batch, labels, priority) if batch.existed else None
        if wait:
            if not screen.as_json:
                screen.line(batch.id)
            if there_already:
                _note(screen, there_already)
            sys.stdout.flush()
            return _wait(dispatcher, screen, batch.id)
        if screen.as_json:
            screen.document(rendering.batch_document(batch))
        else:
            screen.line(batch.id)
            follow = f"`dispatcher watch {batch.id}` follows it"
            _note(screen, f"{there_already or f'enqueued {job}'}; {follow}")
    return 0


def _there_already(batch: Batch, labels: Mapping[str, str], priority: int | None) -> str:
    """Say that a key had its batch already, and what of this call is therefore not so."""
    kept = []
    if any(batch.labels.get(name) != value for name, value in labels.items()):
        kept.append("its labels")
    if priority is not None and priority != batch.priority:
        kept.append(f"its priority {batch.priority}")
    stay = f", and keeps {' and '.join(kept)}" if kept else ""
    return f"batch {batch.id} of this key was there already, {batch.state}{stay}"


def _note(screen: Screen, text: str) -> None:
    """Write a line to stderr after all that was written to stdout, also where both go to a file."""
    sys.stdout.flush()
    screen.note(text)


def _no_items(job: Job) -> InvalidItems:
    return InvalidItems(
        f'job "{job.name}" has no item source: give --item or --items, or set items.source in '
        "the job"
    )


def _file_of(items: str) -> Path:
    """Take --items as the path of a file whose name says what it holds."""
    try:
        format_of(items)
    except InvalidItems as error:
        raise InvalidItems(f"--items {error}. An item itself is given with --item") from None
    return Path(items)


def _given_items(items: str | None, item: Sequence[str]) -> Any:
    """Give `Dispatcher.enqueue` what the options name."""
    if items == "-":
        return _standard_input()
    if items is not None:
        return items if is_uri(items) else _file_of(items)
    return [read_value(text) for text in item] or None


def _standard_input() -> ItemStream:
    if sys.stdin.isatty():
        sys.stderr.write("reading items: one JSON value a line, ^D at the end\n")
    return stream_items(sys.stdin.buffer, "jsonl")


def _pairs(texts: Iterable[str], option: str) -> dict[str, str]:
    """Read NAME=VALUE.

    Raises:
        InvalidInput: one has no "=", no name, or a name that was given before.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InvalidInput(f"{option} is {shown(text)}; it must be NAME=VALUE")
        if name in pairs:
            raise InvalidInput(f"{option} {name} is given twice; leave one out")
        pairs[name] = value
    return pairs


def read_value(text: str) -> Any:
    """Read a value of the command line: JSON if it is that, else the text itself.

    So 7 is a number, true a boolean and [1, 2] a list, while abc, 007 and NaN are text. Text that
    looks like JSON goes in quotes of its own: '"7"'.
    """
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        return text


def _params(given: Mapping[str, str], job: Job) -> dict[str, Any]:
    """Read params as the job's schema types them; what has no type there is read as an item is."""
    properties = (job.params or {}).get("properties", {})
    return {name: _param(text, properties.get(name)) for name, text in given.items()}


def _param(text: str, schema: Any) -> Any:
    types = schema.get("type") if isinstance(schema, Mapping) else None
    if types is None:
        return read_value(text)
    allowed = {types} if isinstance(types, str) else set(types)
    value = read_value(text)
    fits = {
        "null": value is None,
        "boolean": isinstance(value, bool),
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, int | float) and not isinstance(value, bool),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
    }
    # What fits no type stays text, and the schema's own check says what is wrong with it.
    return value if any(fits.get(name) for name in allowed) else text


def _changed(
    config: Config, name: str, chunk_size: int | None, overrides: Mapping[str, Any]
) -> tuple[Config, Job]:
    job, _ = overridden(config.job(name), overrides)
    if chunk_size is None:
        return config, job
    return config, job.model_copy(update={"chunk": Chunking(size=chunk_size)})


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What was seen of the chunks of a plan; each could be filled into the job's templates."""

    items: int = 0
    chunks: int = 0
    least: int = 0
    most: int = 0
    bytes: int = 0
    lightest: float | None = None
    heaviest: float | None = None


@dataclass(frozen=True, slots=True)
class _Packs:
    """In what executions the chunks of a plan would be launched."""

    sizes: list[int]
    """The tasks of each, as few executions as possible."""

    exact: bool
    """False: not all can run at once, and what waits is launched in the slots that come free."""

    at_once: int | None
    """Tasks at once, as limits let them; None without a limit."""

    limit: str | None
    """The name of the limit that says so."""


def _packs(chunks: int, largest: int, plan: Plan, limits: Mapping[str, int | None]) -> _Packs:
    """Cut chunks into executions as the launcher does while nothing else runs."""
    most = plan.pack_tasks(largest)
    slots = {name: value for name, value in limits.items() if value is not None}
    limit = min(slots, key=lambda name: slots[name], default=None)
    if limit is None:
        return _Packs(pack(chunks, most), exact=True, at_once=None, limit=None)
    # An execution takes as many slots as it runs tasks at once, and is launched when it has them.
    each = min(most, plan.parallelism)
    full, rest = divmod(slots[limit], each)
    exact = most == 1 or chunks <= full * most + rest
    sizes = pack(chunks, most if full else rest)
    return _Packs(sizes, exact=exact, at_once=slots[limit], limit=limit)


def _dry_run(
    scope: Scope,
    config: Config,
    job: Job,
    params: Mapping[str, Any],
    items: str | None,
    item: Sequence[str],
) -> int:
    """Plan as a worker would, and write nothing."""
    target = config.targets[job.target]
    backend = make_backend(target)
    with _stream(job, params, items, item) as stream:
        seen = _sizes(stream, job, params, backend)
    plan = Plan.read("dry-run", job, params, job.labels, backend)
    slots = {
        "max_running": target.max_running,
        "running": job.limits.running,
        "per_batch": job.limits.per_batch,
    }
    found = _packs(seen.chunks, seen.bytes, plan, slots)
    packs = found.sizes
    fewest = min(packs, default=0) if found.exact else 1
    calls_take = (
        None
        if target.launches_per_minute is None
        else max(0.0, len(packs) - 1) * 60.0 / target.launches_per_minute
    )
    limits = {
        "max_running": target.max_running,
        "max_executions": target.max_executions,
        "launches_per_minute": target.launches_per_minute,
        "running": job.limits.running,
        "per_batch": job.limits.per_batch,
    }
    screen = Screen(as_json=scope.as_json)
    if screen.as_json:
        screen.document(
            {
                "job": job.name,
                "target": job.target,
                "params": params,
                "items": seen.items,
                "chunks": seen.chunks,
                "items_per_chunk": {"min": seen.least, "max": seen.most},
                "weight_per_chunk": {"min": seen.lightest, "max": seen.heaviest},
                "largest_chunk_bytes": seen.bytes,
                "executions": len(packs),
                "exact": found.exact,
                "tasks_per_execution": {"min": fewest, "max": max(packs, default=0)},
                "parallelism": plan.parallelism,
                "tasks_at_once": found.at_once,
                "launch_calls": len(packs),
                "launch_calls_seconds": calls_take,
                "limits": limits,
            }
        )
        return 0
    per_chunk = _range(seen.least, seen.most, "item")
    if seen.heaviest is not None:
        per_chunk += f", sums of {job.chunk.balance_by} {seen.lightest:,g} to {seen.heaviest:,g}"
    screen.line(f"job          {job.name} on target {job.target}")
    screen.line(f"items        {seen.items:,}")
    screen.line(f"chunks       {seen.chunks:,}, of {per_chunk}, {seen.bytes:,} bytes at most")
    tasks = _range(fewest, max(packs, default=0), "task")
    together = min(plan.parallelism, max(packs, default=0))
    more = "" if found.exact else " or more"
    screen.line(f"executions   {len(packs):,}{more}, of {tasks}, {together:,} at once")
    rate = "" if calls_take is None else f", over {calls_take:,.0f} s{more} at the target's rate"
    screen.line(f"launch calls {len(packs):,}{more}{rate}")
    named = ", ".join(f"{name} {value:g}" for name, value in limits.items() if value is not None)
    screen.line(f"limits       {named or 'none'}")
    if not found.exact:
        _note(
            screen,
            f"{found.limit} lets {found.at_once:,} tasks run at once: what waits is launched as "
            "tasks end, in as many executions as that takes",
        )
    _note(
        screen, "nothing was written; retries add launch calls, and other batches share the limits"
    )
    return 0


def _range(least: int, most: int, noun: str) -> str:
    if least == most:
        return counted(most, noun)
    return f"{least:,} to {most:,} {noun}s"


def _stream(
    job: Job, params: Mapping[str, Any], items: str | None, item: Sequence[str]
) -> ItemStream:
    """Open the items as the planner would."""
    if items == "-":
        return _standard_input()
    if items is not None:
        return read_items(items) if is_uri(items) else open_items(_file_of(items))
    if item:
        return open_items([read_value(text) for text in item])
    if job.items is None:
        raise _no_items(job)
    return run_source(job.items.source, params, timeout=job.items.timeout.total_seconds())


def _sizes(stream: Iterable[str], job: Job, params: Mapping[str, Any], backend: Backend) -> _Sizes:
    """Cut items into chunks and fill the job's templates with each, as planning does.

    Raises:
        InvalidInput: an item cannot be used, or does not fit a template; in planning's words.
    """
    items = chunks = least = most = size = 0
    weights: list[float] = []
    largest = backend.limits.max_payload_bytes
    for chunk in plan_chunks(stream, job.chunk, max_payload_bytes=largest):
        check_chunk(
            job,
            "dry-run",
            params,
            chunk.index,
            chunk.items,
            max_text_bytes=backend.limits.max_text_bytes,
        )
        items += chunk.count
        least = min(least, chunk.count) if chunks else chunk.count
        chunks += 1
        most, size = max(most, chunk.count), max(size, chunk.bytes)
        if chunk.weight is not None:
            weights = [min([chunk.weight, *weights]), max([chunk.weight, *weights])]
    lightest, heaviest = weights or (None, None)
    return _Sizes(items, chunks, least, most, size, lightest, heaviest)


# --- watch ----------------------------------------------------------------------------------------


def watch(scope: Scope, batch: str) -> int:
    """Follow a batch to its end."""
    with _opened(scope) as (dispatcher, screen):
        return _wait(dispatcher, screen, dispatcher.find(batch), every=scope.as_json)


def _wait(dispatcher: Dispatcher, screen: Screen, batch_id: str, *, every: bool = False) -> int:
    """Follow a batch and tell its end; with `every`, JSON has a line for each change."""
    try:
        batch = _followed(dispatcher, screen, batch_id, every=every)
    except KeyboardInterrupt:
        _note(
            screen,
            f"batch {batch_id} goes on; `dispatcher watch {batch_id}` follows it, "
            f"`dispatcher cancel {batch_id}` ends it",
        )
        return INTERRUPTED
    if screen.as_json:
        screen.json_line(rendering.batch_document(batch))
    else:
        screen.line(rendering.summary(batch, utc_now()))
    if batch.state is BatchState.FAILED:
        _note(
            screen,
            f"`dispatcher show --failed {batch_id}` shows what failed, "
            f"`dispatcher retry --failed {batch_id}` runs it again",
        )
    return rendering.exit_code_of(batch.state)


def _followed(dispatcher: Dispatcher, screen: Screen, batch_id: str, *, every: bool) -> Batch:
    pause = FIRST_PAUSE
    last: dict[str, Any] = {}
    with screen.following(batch_id) as follower:
        while True:
            batch = dispatcher.get(batch_id)
            waits = batch.counts.get(ChunkState.PENDING)
            follower.show(batch, queries.next_retry(dispatcher.store, batch_id) if waits else None)
            if batch.finished:
                return batch
            document = rendering.batch_document(batch)
            if every and document != last:
                screen.json_line(document)
            last = document
            time.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 1.3)


# --- read -----------------------------------------------------------------------------------------


def batches(
    scope: Scope,
    *,
    job: str | None,
    state: str | None,
    since: str | None,
    label: str | None,
    limit: int,
) -> int:
    """List batches, newest first."""
    now = utc_now()
    pair = next(iter(_pairs([label] if label else [], "--label").items()), None)
    with _opened(scope) as (dispatcher, screen):
        found = dispatcher.batches(
            job=job,
            state=state,
            since=None if since is None else read_moment(since, now),
            label=pair,
            limit=limit,
        )
        if screen.as_json:
            screen.document([rendering.batch_document(batch) for batch in found])
        elif found:
            titles = ("BATCH", "JOB", "STATE", "PROGRESS", "ENQUEUED", "BY", "REASON")
            screen.table(titles, [rendering.batch_row(batch, now) for batch in found])
        else:
            _note(screen, "no batches")
    return 0


def show(scope: Scope, batch: str, *, items: bool, failed: bool, everything: bool) -> int:
    """Show a batch and its chunks."""
    with _opened(scope) as (dispatcher, screen):
        store = dispatcher.store
        view = dispatcher.get(dispatcher.find(batch))
        troubled = queries.troubled(store, view.id)
        if screen.as_json:
            chunks = queries.chunks(store, view.id, items=items)
            screen.document_with_list(
                rendering.batch_document(view),
                "chunks",
                (
                    rendering.chunk_document(chunk, results.of_chunk(store, view.id, chunk.index))
                    if items
                    else rendering.chunk_document(chunk)
                    for chunk in chunks
                    if not failed or chunk.index in troubled
                ),
            )
            return 0
        now = utc_now()
        for name, text in rendering.header(view, now):
            screen.line(f"{name:<9} {text}")
        most = None if everything else MOST_CHUNKS
        listed = list(islice(_chosen(dispatcher, view, troubled, failed=failed, items=items), most))
        if listed:
            screen.line()
            rows = [row for chunk in listed for row in rendering.attempt_rows(chunk, now)]
            screen.table(rendering.ATTEMPT_TITLES, rows)
        total = len(troubled) if failed else view.chunk_count or 0
        if len(listed) < total:
            _note(
                screen,
                f"{len(listed)} of {total:,} chunks are shown, troubled ones first; --all shows "
                "all",
            )
        elif failed and not listed:
            _note(screen, "no chunk has failed")
        if items:
            _show_items(screen, dispatcher, view, failed=failed, everything=everything)
        _show_logs(screen, view, [chunk for chunk in listed if chunk.index in troubled])
    return 0


def _chosen(
    dispatcher: Dispatcher, view: BatchView, troubled: set[int], *, failed: bool, items: bool
) -> Iterator[Chunk]:
    """Give the chunks to list: all by index if they are few, else the troubled ones first."""
    store = dispatcher.store
    if not failed and (view.chunk_count or 0) <= MOST_CHUNKS:
        yield from queries.chunks(store, view.id, items=items)
        return
    for index in sorted(troubled):
        yield from queries.chunks(store, view.id, index=index, items=items)
    if failed:
        return
    for state in (
        ChunkState.RUNNING,
        ChunkState.LAUNCHING,
        ChunkState.PENDING,
        ChunkState.CANCELLED,
        ChunkState.SUCCEEDED,
    ):
        for chunk in queries.chunks(store, view.id, states=[state], items=items):
            if chunk.index not in troubled:
                yield chunk


def _show_items(
    screen: Screen, dispatcher: Dispatcher, view: BatchView, *, failed: bool, everything: bool
) -> None:
    """Show items with how each ended; where not all are shown, say so."""
    most = None if everything else MOST_ITEMS
    found = dispatcher.items(view.id, failed=failed)
    rows = [rendering.item_row(item) for item in islice(found, most)]
    screen.line()
    if rows:
        screen.table(rendering.ITEM_TITLES, rows)
    elif failed:
        _note(screen, "no item has failed")
    if next(found, None) is not None:
        _note(screen, f"{len(rows)} items are shown; --all shows all")


def _show_logs(screen: Screen, view: BatchView, chunks: Sequence[Chunk]) -> None:
    """Show the last lines of the first few chunks that ended badly."""
    told = 0
    for chunk in chunks:
        bad = [a for a in chunk.attempts if rendering.is_bad(a.outcome) and a.log_tail]
        if not bad or told == LOGS_SHOWN:
            continue
        told += 1
        last = bad[-1]
        screen.line(f"\nchunk {chunk.index}, attempt {last.number}, last lines:")
        for line in (last.log_tail or "").split("\n")[-LINES_SHOWN:]:
            screen.line(f"  | {line}")
    if told:
        _note(screen, f"`dispatcher logs {view.id}/CHUNK` shows more")


def _split(ref: str) -> tuple[str, int | None]:
    """Read BATCH or BATCH/CHUNK."""
    prefix, slash, number = ref.partition("/")
    if not slash:
        return prefix, None
    if not (number.isascii() and number.isdigit()) or len(number) > len("2147483647"):
        raise InvalidInput(
            f"{shown(ref)} names no chunk; write BATCH/CHUNK with the chunk's number from 0, "
            f"such as {prefix}/0"
        )
    return prefix, int(number)


def logs_of(scope: Scope, ref: str, *, attempt: int | None, tail: int) -> int:
    """Show what an attempt wrote."""
    prefix, index = _split(ref)
    if index is None:
        raise InvalidInput(f"{shown(ref)} is a batch; name one of its chunks, such as {ref}/0")
    with _opened(scope) as (dispatcher, screen):
        view = dispatcher.get(dispatcher.find(prefix))
        chunk = explaining.find_chunk(dispatcher.store, view, index)
        tried = _attempt(view, chunk, attempt)
        output = _output(dispatcher, view, tried, tail)
        if screen.as_json:
            screen.document(
                {
                    "batch": view.id,
                    "chunk": index,
                    "attempt": tried.number,
                    "handle": tried.handle,
                    "console_url": tried.console_url,
                    "logs_url": tried.logs_url,
                    "source": output.source,
                    "problem": output.problem,
                    "lines": output.lines,
                }
            )
        for line in () if screen.as_json else output.lines:
            screen.line(line)
        sys.stdout.flush()
        if output.problem is not None:
            kept = "; above is what was kept when it failed" if output.lines else ""
            _note(screen, f"{output.problem}{kept}")
        elif not output.lines:
            _note(screen, f"attempt {tried.number} of chunk {view.id}/{index} has written nothing")
        return 0 if output.lines else output.code


def _attempt(view: BatchView, chunk: Chunk, number: int | None) -> Attempt:
    if not chunk.attempts:
        raise InvalidInput(
            f"chunk {view.id}/{chunk.index} is {chunk.state} and has no attempt yet; "
            f"`dispatcher explain {view.id}/{chunk.index}` says why"
        )
    if number is None:
        return chunk.attempts[-1]
    for attempt in chunk.attempts:
        if attempt.number == number:
            return attempt
    raise InvalidInput(
        f"chunk {view.id}/{chunk.index} has no attempt {number}; it has 1 to "
        f"{chunk.attempts[-1].number}"
    )


@dataclass(frozen=True, slots=True)
class _Output:
    """What an attempt wrote, as far as it can be read from here."""

    lines: list[str]
    source: str
    """backend, or stored: the lines that were kept in the database."""

    problem: str | None = None
    code: int = 0


def _output(dispatcher: Dispatcher, view: BatchView, attempt: Attempt, tail: int) -> _Output:
    """Read from the backend; where that cannot be, what was kept in the database."""
    stored = (attempt.log_tail or "").split("\n")[-tail:] if attempt.log_tail else []
    if attempt.handle is None:
        why = f": {attempt.reason}" if attempt.reason else ""
        problem = f"attempt {attempt.number} has no handle, so nothing of it ran{why}"
        return _Output(stored, "stored", problem, FAILED)
    try:
        target = dispatcher.config.targets.get(view.target)
    except ConfigurationError as error:
        return _Output(stored, "stored", f"the target cannot be asked: {error}", FAILED)
    if target is None:
        problem = f"target {view.target} is not configured in {dispatcher.config.source}"
        return _Output(stored, "stored", problem, FAILED)
    backend = make_backend(target)
    home = backend.home()
    row = queries.targets(dispatcher.store).get(view.target)
    theirs = None if row is None or row.home is None else row.home.get("host")
    if home is not None and theirs is not None and home.get("host") != theirs:
        problem = (
            f"the output is on host {theirs} and this is {home.get('host')}: run this command there"
        )
        return _Output(stored, "stored", problem, FAILED)
    try:
        lines = list(backend.logs(attempt.handle, attempt.task_index, tail))
    except BackendError as error:
        code = UNREACHABLE if isinstance(error, Unavailable) else FAILED
        return _Output(stored, "stored", f"the output cannot be read: {error}", code)
    return _Output(lines, "backend") if lines or not stored else _Output(stored, "stored")


def explain(scope: Scope, ref: str) -> int:
    """Say why a batch or a chunk is where it is."""
    prefix, index = _split(ref)
    with _opened(scope) as (dispatcher, screen):
        told = explaining.explain(dispatcher.store, dispatcher.find(prefix), index)
        if screen.as_json:
            screen.document({"text": told.text, **told.facts})
        else:
            screen.line(told.text)
    return 0


def audit(scope: Scope, batch: str | None, *, since: str | None, until: str | None) -> int:
    """Stream the audit."""
    now = utc_now()
    with _opened(scope) as (dispatcher, screen):
        lines = queries.audit(
            dispatcher.store,
            batch_id=None if batch is None else dispatcher.find(batch),
            since=None if since is None else read_moment(since, now),
            until=None if until is None else read_moment(until, now),
        )
        for line in lines:
            if screen.as_json:
                screen.json_line(rendering.audit_document(line))
            else:
                screen.line(rendering.audit_text(line))
    return 0


def jobs(scope: Scope) -> int:
    """List the configured jobs."""
    config = _config(scope)
    screen = Screen(as_json=scope.as_json)
    if screen.as_json:
        screen.document([rendering.job_document(job) for job in config.jobs.values()])
    elif config.jobs:
        screen.table(rendering.JOB_TITLES, [rendering.job_row(j) for j in config.jobs.values()])
    else:
        _note(screen, f"no jobs in {config.source}")
    return 0


# --- act ------------------------------------------------------------------------------------------


def retry(scope: Scope, batch: str, *, failed: bool) -> int:
    """Reopen a batch."""
    with _opened(scope) as (dispatcher, screen):
        reopened = dispatcher.retry(dispatcher.find(batch), failed_only=failed)
        if screen.as_json:
            screen.document(rendering.batch_document(reopened))
            return 0
        # A worker may have taken some of them already.
        due = sum(number for state, number in reopened.counts.items() if state not in FINAL_CHUNK)
        what = f"{counted(due, 'chunk')} due again"
        if reopened.state is BatchState.PLANNING:
            what = "to be planned again"
        screen.line(f"{reopened.id} {reopened.state}: {what}")
        _note(screen, f"`dispatcher watch {reopened.id}` follows it")
    return 0


def cancel(scope: Scope, batch: str, *, wait: bool, reason: str) -> int:
    """Ask for the end of a batch, and wait for it if told to."""
    with _opened(scope) as (dispatcher, screen):
        view = dispatcher.cancel(dispatcher.find(batch), reason)
        if wait and not view.finished:
            try:
                view = _followed(dispatcher, screen, view.id, every=False)
            except KeyboardInterrupt:
                _note(screen, f"the cancel of batch {view.id} stands and goes on")
                return INTERRUPTED
        if screen.as_json:
            screen.document(rendering.batch_document(view))
        elif view.finished:
            screen.line(rendering.summary(view, utc_now()))
        else:
            live = view.counts.get(ChunkState.RUNNING, 0) + view.counts.get(ChunkState.LAUNCHING, 0)
            screen.line(
                f"{view.id} {view.state}: its cancel is asked for; "
                + (
                    "1 chunk still runs and is"
                    if live == 1
                    else f"{live:,} chunks still run and are"
                )
                + " being stopped"
            )
        if view.finished and view.state is not BatchState.CANCELLED:
            _note(screen, f"batch {view.id} had {view.state} before it could be cancelled")
            return FAILED
    return 0


# --- operate --------------------------------------------------------------------------------------


def check(scope: Scope, *, worker: bool) -> int:
    """Look at everything that an installation needs."""
    _tell_misspelt()
    screen = Screen(as_json=scope.as_json)
    findings = checking.check_worker(scope) if worker else checking.check_all(scope)
    found = []
    for finding in findings:
        found.append(finding)
        if not screen.as_json:
            screen.line(f"{finding.level:<4}  {finding.name:<9} {finding.text}")
            if finding.todo:
                screen.line(f"{'':<15} → {finding.todo}")
            sys.stdout.flush()
    code = checking.exit_code(found)
    if screen.as_json:
        screen.document({"ok": code == 0, "checks": [asdict(finding) for finding in found]})
    return code


def apply(scope: Scope, names: Sequence[str], *, yes: bool, check_only: bool) -> int:
    """Show how definitions differ from what is at their providers, and write them."""
    config = _config(scope)
    screen = Screen(as_json=scope.as_json)
    found = applying.compare(config, names)
    changed = [defined for defined in found if defined.changes]
    if not screen.as_json:
        for line in rendering.definition_lines(found):
            screen.line(line)
        if not found:
            _note(screen, f"no job in {config.source} has a definition")
    written = {}
    if changed and not check_only:
        if not yes:
            names_of = ", ".join(defined.job.name for defined in changed)
            _confirm(f"Write the definition of {names_of}?")
        for defined in changed:
            written[defined.job.name] = applying.write(defined)
            if not screen.as_json:
                screen.line(f"applied {written[defined.job.name]}")
            for problem in applying.unfit(defined):
                screen.note(problem)
    if screen.as_json:
        screen.document(
            [
                rendering.definition_document(defined, written.get(defined.job.name))
                for defined in found
            ]
        )
    return FAILED if changed and check_only else 0


def db_upgrade(scope: Scope) -> int:
    """Bring the tables to this code's revision."""
    url = _settings(scope).database_url
    was = checking.read_revision(url)
    _refuse_newer(was)
    schema.upgrade(url)
    return _tell_revision(scope, was, checking.read_revision(url))


def db_check(scope: Scope) -> int:
    """Compare the tables' revision with this code's."""
    store = Store(schema.create_engine(_settings(scope).database_url, pool_size=1), actor="check")
    problem = None
    try:
        with store.transaction() as tx:
            found = schema.revision(tx)
            schema.check(tx)
    except SchemaMismatch as error:
        problem = str(error)
    finally:
        store.engine.dispose()
    screen = Screen(as_json=scope.as_json)
    if screen.as_json:
        document = {"ok": problem is None, "revision": found, "needed": schema.REVISION}
        screen.document({**document, "problem": problem})
    elif problem is None:
        screen.line(f"the database is at revision {found}, which fits this code")
    else:
        _note(screen, f"error: {problem}")
    return 0 if problem is None else FAILED


def db_downgrade(scope: Scope, revision: str, *, yes: bool) -> int:
    """Bring the tables back to an older revision."""
    url = _settings(scope).database_url
    known = [f"{number:04}" for number in range(1, int(schema.REVISION) + 1)]
    if revision not in {"base", *known}:
        raise InvalidInput(
            f"{shown(revision)} is no revision of this code; known: base (no tables at all), "
            f"{', '.join(known)}"
        )
    was = checking.read_revision(url)
    _refuse_newer(was)
    if was is None or (revision != "base" and was < revision):
        raise InvalidInput(
            f"the database is at revision {was or 'none'}, which is older than {revision}: "
            "there is nothing to go back to"
        )
    if not yes:
        _confirm(
            f"Bring the database from revision {was} back to {revision}? What the newer tables "
            "and columns hold is lost."
        )
    schema.downgrade(url, revision)
    return _tell_revision(scope, was, checking.read_revision(url))


def _refuse_newer(found: str | None) -> None:
    """Leave a database alone whose migrations this code does not have."""
    if found is not None and found > schema.REVISION:
        raise SchemaMismatch(
            f"the database is at revision {found} and this code knows {schema.REVISION} at most: "
            "use the newer dispatcher that brought it there"
        )


def _confirm(question: str) -> None:
    """Ask somebody at a terminal.

    Raises:
        InvalidInput: the answer is no, or nobody is there.
    """
    if not sys.stdin.isatty():
        raise InvalidInput(f"{question} Nobody is there to ask: give --yes to say so")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise InvalidInput("nothing was changed, as the answer was not yes")


def _tell_revision(scope: Scope, was: str | None, revision: str | None) -> int:
    screen = Screen(as_json=scope.as_json)
    if screen.as_json:
        screen.document({"revision": revision, "was": was})
    elif was == revision:
        screen.line(f"the database was at revision {revision or 'none'} already")
    else:
        screen.line(f"the database is at revision {revision or 'none'}; it was at {was or 'none'}")
    return 0


def run_standalone(
    scope: Scope,
    *,
    directory: Path | None,
    flower: bool,
    workers: int,
    flower_port: int,
    postgres_port: int | None,
    valkey_port: int | None,
    databases: Sequence[str],
    prepare: str,
) -> int:
    """Run everything on this machine until ^C."""
    # Imported here: it brings the clients of the servers, which no other command needs.
    from dispatcher import standalone  # noqa: PLC0415 - as said above

    _tell_misspelt()
    return standalone.run(
        directory,
        jobs=scope.jobs or os.environ.get("DISPATCHER_JOBS"),
        flower=flower,
        workers=workers,
        ports=standalone.Ports(postgres_port, valkey_port, flower_port),
        databases=databases,
        prepare=prepare,
    )
