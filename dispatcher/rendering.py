"""What the command line shows: the documents behind `--json`, and tables and lines for people.

The shapes of the documents are stable: keys are added, never renamed. Tables have no frames and
cut nothing off, whether they go to a terminal, a pipe or a file; colour and progress bars appear on
a terminal only, and `NO_COLOR` is respected. What is shown is read and decided in `commands.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from typing import Any, Final, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from dispatcher.applying import Defined
from dispatcher.job import Job
from dispatcher.moments import ago, clock, iso, span
from dispatcher.queries import Attempt, AuditLine, BatchView, Chunk, Retry
from dispatcher.redaction import redact
from dispatcher.results import Item
from dispatcher.states import BatchState, ChunkState, Outcome

__all__ = [
    "ATTEMPT_TITLES",
    "ITEM_TITLES",
    "JOB_TITLES",
    "Follower",
    "Screen",
    "attempt_rows",
    "audit_document",
    "audit_text",
    "batch_document",
    "batch_row",
    "chunk_document",
    "definition_document",
    "definition_lines",
    "exit_code_of",
    "header",
    "is_bad",
    "item_row",
    "job_document",
    "job_row",
    "progress_text",
    "summary",
    "utc_now",
]

_STYLES: Final = {
    "succeeded": "green",
    "ok": "green",
    "failed": "red",
    "fail": "red",
    "cancelled": "yellow",
    "warn": "yellow",
    "running": "cyan",
    "launching": "cyan",
    "planning": "cyan",
    **dict.fromkeys(
        ("timed_out", "out_of_memory", "start_failed", "rejected", "lost", "preempted"), "red"
    ),
}
_GAP: Final = "  "

SHOWN_REASON: Final = 120
"""Characters of why a chunk is tried again that a line of progress shows."""


def utc_now() -> datetime:
    """Read this machine's clock, for "ago" and "in"; what moves anything is the database's."""
    return datetime.now(UTC)


class Screen:
    """Where a command writes: lines and tables for people, or documents with `--json`."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.is_terminal = not as_json and sys.stdout.isatty()

    @cached_property
    def _console(self) -> Console:
        return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def document(self, value: Any) -> None:
        """Write one JSON document: indented on a terminal, on one line elsewhere."""
        indent = 2 if sys.stdout.isatty() else None
        sys.stdout.write(json.dumps(_plain(value), ensure_ascii=False, indent=indent) + "\n")

    def json_line(self, value: Any) -> None:
        """Write a JSON document on a line of its own, at once."""
        sys.stdout.write(json.dumps(_plain(value), ensure_ascii=False) + "\n")
        sys.stdout.flush()

    def document_with_list(
        self, value: Mapping[str, Any], name: str, parts: Iterable[Mapping[str, Any]]
    ) -> None:
        """Write one JSON document whose last key is a list, part by part: it may be long."""
        opening = json.dumps(_plain(value), ensure_ascii=False)
        sys.stdout.write(f"{opening[:-1]}, {json.dumps(name)}: [")
        for place, part in enumerate(parts):
            comma = ",\n" if place else "\n"
            sys.stdout.write(comma + json.dumps(_plain(part), ensure_ascii=False))
        sys.stdout.write("\n]}\n")

    def line(self, text: str = "") -> None:
        """Write a line for people; what looks like a state is coloured by `table` only."""
        sys.stdout.write(f"{_printable(text)}\n")

    def note(self, text: str) -> None:
        """Write a line beside the output, to stderr."""
        sys.stderr.write(f"{_printable(text)}\n")
        sys.stderr.flush()

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write rows under titles; the last column may be of any length, and is never cut off."""
        cells = [tuple(_printable(cell, in_line=True) for cell in row) for row in rows]
        widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
        widths[-1] = 0
        self._row(titles, widths, head=True)
        for row in cells:
            self._row(row, widths)

    def _row(self, cells: Sequence[str], widths: Sequence[int], *, head: bool = False) -> None:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        if not self.is_terminal:
            sys.stdout.write(_GAP.join(padded).rstrip() + "\n")
            return
        line = Text()
        for place, cell in enumerate(padded):
            line.append(_GAP if place else "")
            line.append(cell, "bold" if head else _STYLES.get(cell.strip(), ""))
        line.rstrip()
        self._console.print(line)

    @contextmanager
    def following(self, batch_id: str) -> Iterator[Follower]:
        """Show how a batch goes on: a bar on a terminal, else a line for each change."""
        if self.as_json:
            yield _Silent()
        elif self.is_terminal and not self._console.is_dumb_terminal:
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[counts]}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            ) as progress:
                yield _Bar(progress, batch_id)
        else:
            yield _Lines(self)


class Follower(Protocol):
    """Shows a batch again and again."""

    def show(self, batch: BatchView, retry: Retry | None = None) -> None:
        """Show it as it is now, with the retry that is due next."""
        ...


class _Silent:
    """Shows nothing: `--json` writes its documents itself."""

    def show(self, batch: BatchView, retry: Retry | None = None) -> None:
        """Show nothing."""


class _Bar:
    """A progress bar."""

    def __init__(self, progress: Progress, batch_id: str) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task(batch_id, total=None, counts="")

    def show(self, batch: BatchView, retry: Retry | None = None) -> None:
        """Move the bar."""
        self._progress.update(
            self._task,
            description=f"{batch.id} {batch.state}",
            total=batch.chunk_count,
            completed=batch.done,
            counts=_counts_text(batch) + _retry_text(retry, utc_now(), brief=True),
        )


class _Lines:
    """A line for each change."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._last = ""

    def show(self, batch: BatchView, retry: Retry | None = None) -> None:
        """Write a line if anything changed."""
        now = utc_now()
        text = f"{batch.state}  {progress_text(batch)}{_retry_text(retry, now)}"
        if text != self._last and not batch.finished:
            self._screen.line(f"{clock(now, now)}  {text}")
            sys.stdout.flush()
        self._last = text


# --- batches --------------------------------------------------------------------------------------


def batch_document(batch: BatchView) -> dict[str, Any]:
    """Give the document of a batch; secrets among its params are masked."""
    return {
        "id": batch.id,
        "key": batch.key,
        "job": batch.job,
        "target": batch.target,
        "state": batch.state,
        "reason": batch.reason,
        "params": redact(batch.params),
        "labels": batch.labels,
        "priority": batch.priority,
        "actor": batch.actor,
        "created_at": batch.created_at,
        "planned_at": batch.planned_at,
        "deadline": batch.deadline,
        "cancel_requested_at": batch.cancel_requested_at,
        "finished_at": batch.finished_at,
        "items": batch.item_count,
        "chunks_total": batch.chunk_count,
        "counts": {state: batch.counts.get(state, 0) for state in ChunkState},
        "progress": batch.progress,
    }


def batch_row(batch: BatchView, now: datetime) -> tuple[str, ...]:
    """Give the cells of a batch in the table of batches."""
    return (
        batch.id,
        batch.job,
        str(batch.state),
        progress_text(batch),
        ago(batch.created_at, now),
        batch.actor,
        _first_line(batch.reason),
    )


def _first_line(reason: str | None) -> str:
    """Give what a reason says; `show` and `explain` give the lines under it too."""
    return (reason or "").partition("\n")[0]


def progress_text(batch: BatchView) -> str:
    """Say how far a batch is: "29/30 chunks: 29 succeeded, 1 failed"."""
    if batch.chunk_count is None:
        return "not planned yet"
    if not batch.chunk_count:
        return "no chunks"
    return f"{batch.done}/{batch.chunk_count} chunks: {_counts_text(batch)}"


def _counts_text(batch: BatchView) -> str:
    return ", ".join(f"{n} {state}" for state in ChunkState if (n := batch.counts.get(state)))


def _retry_text(retry: Retry | None, now: datetime, *, brief: bool = False) -> str:
    """Say which chunk is tried again next, when, and what became of it before."""
    if retry is None:
        return ""
    if brief:
        return f", retry at {clock(retry.due_at, now)}"
    more = f", and {retry.chunks - 1:,} more later" if retry.chunks > 1 else ""
    why = _first_line(retry.reason)[:SHOWN_REASON]
    return f"; retry of chunk {retry.chunk_index} at {clock(retry.due_at, now)}{more}: {why}"


def summary(batch: BatchView, now: datetime) -> str:
    """Say in a line how a batch ended, or where it is."""
    took = span((batch.finished_at or now) - batch.created_at)
    reason = f"; {_first_line(batch.reason)}" if batch.reason else ""
    word = "after" if batch.finished else "since"
    return f"{batch.id} {batch.state} {word} {took}: {progress_text(batch)}{reason}"


def header(batch: BatchView, now: datetime) -> Iterator[tuple[str, str]]:
    """Give the lines above the chunks of a batch, as name and text."""
    yield "batch", batch.id + (f" (key {batch.key})" if batch.key else "")
    yield "job", f"{batch.job} on target {batch.target}"
    yield "state", str(batch.state)
    if batch.reason:
        yield "reason", batch.reason
    yield "progress", progress_text(batch)
    if batch.item_count is not None:
        yield "items", f"{batch.item_count:,}"
    yield "enqueued", f"{ago(batch.created_at, now)} by {batch.actor}"
    if batch.cancel_requested_at is not None:
        yield "cancel", f"asked for {ago(batch.cancel_requested_at, now)}"
    if batch.finished_at is not None:
        took = span(batch.finished_at - batch.created_at)
        yield "finished", f"{ago(batch.finished_at, now)}, after {took}"
    else:
        yield "deadline", clock(batch.deadline, now)
    if batch.priority:
        yield "priority", str(batch.priority)
    if batch.params:
        yield "params", json.dumps(redact(batch.params), ensure_ascii=False)
    if batch.labels:
        yield "labels", ", ".join(f"{name}={value}" for name, value in batch.labels.items())


# --- chunks ---------------------------------------------------------------------------------------

SHOWN_VALUE: Final = 60
"""Characters of an item that a table shows."""

ATTEMPT_TITLES: Final = (
    "CHUNK",
    "STATE",
    "ITEMS",
    "ATTEMPT",
    "OUTCOME",
    "EXIT",
    "TOOK",
    "WHERE",
    "REASON",
)


ITEM_TITLES: Final = ("CHUNK", "ITEM", "STATE", "ATTEMPT", "VALUE", "OUTPUT OR ERROR")


def item_row(one: Item) -> tuple[str, ...]:
    """Give the cells of an item: what it is, and how it ended."""
    value = json.dumps(one.item, ensure_ascii=False)
    told = one.error or one.output_uri
    if told is None and one.output is not None:
        told = json.dumps(one.output, ensure_ascii=False)
    return (
        str(one.chunk_index),
        str(one.position),
        str(one.state),
        "" if one.attempt is None else str(one.attempt),
        value if len(value) <= SHOWN_VALUE else f"{value[: SHOWN_VALUE - 1]}…",
        told or "",
    )


def _item_document(one: Item) -> dict[str, Any]:
    return {
        "position": one.position,
        "state": one.state,
        "attempt": one.attempt,
        "output": one.output,
        "output_uri": one.output_uri,
        "error": one.error,
    }


def chunk_document(chunk: Chunk, told: Sequence[Item] = ()) -> dict[str, Any]:
    """Give the document of a chunk with its attempts.

    `items`, and `results` with how each ended, only where they were asked for.
    """
    items: dict[str, Any] = {}
    if chunk.items is not None:
        items["items"] = json.loads(chunk.items)
        items["results"] = [_item_document(one) for one in told]
    return {
        "index": chunk.index,
        "state": chunk.state,
        "size": chunk.size,
        "weight": chunk.weight,
        "due_at": chunk.due_at,
        "outcome": chunk.outcome,
        "reason": chunk.reason,
        "finished_at": chunk.finished_at,
        "items_ok": chunk.items_ok,
        "parent": chunk.parent,
        "attempts": [_attempt_document(attempt) for attempt in chunk.attempts],
        **items,
    }


def _attempt_document(attempt: Attempt) -> dict[str, Any]:
    return {
        "number": attempt.number,
        "outcome": attempt.outcome,
        "exit_code": attempt.exit_code,
        "reason": attempt.reason,
        "log_tail": None if attempt.log_tail is None else attempt.log_tail.split("\n"),
        "result_uri": attempt.result_uri,
        "opened_at": attempt.opened_at,
        "started_at": attempt.started_at,
        "ended_at": attempt.ended_at,
        "settled_at": attempt.settled_at,
        "execution": attempt.execution_key,
        "handle": attempt.handle,
        "progress": None if attempt.progress is None else list(attempt.progress),
        "task_index": attempt.task_index,
        "console_url": attempt.console_url,
        "logs_url": attempt.logs_url,
    }


def _going(attempt: Attempt) -> str:
    """Say how far a running task is, if it told."""
    return "" if attempt.progress is None else "{:,} of {:,}".format(*attempt.progress)


def attempt_rows(chunk: Chunk, now: datetime) -> Iterator[tuple[str, ...]]:
    """Give the cells of a chunk, a row for each attempt; the chunk is named in the first."""
    named = (str(chunk.index), str(chunk.state), str(chunk.size))
    if not chunk.attempts:
        yield (*named, "", "", "", "", "", chunk.reason or "")
    for place, attempt in enumerate(chunk.attempts):
        # The chunk's own reason says what was decided after its last attempt.
        is_last = place == len(chunk.attempts) - 1
        reason = chunk.reason if is_last and chunk.reason else attempt.reason
        yield (
            *(("", "", "") if place else named),
            str(attempt.number),
            _going(attempt) if attempt.outcome is None else str(attempt.outcome),
            "" if attempt.exit_code is None else str(attempt.exit_code),
            _took(attempt, now),
            attempt.console_url or attempt.handle or attempt.execution_key,
            reason or "",
        )


def _took(attempt: Attempt, now: datetime) -> str:
    if attempt.started_at is not None and attempt.ended_at is not None:
        return span(attempt.ended_at - attempt.started_at)
    if attempt.settled_at is not None:
        return span(attempt.settled_at - attempt.opened_at)
    return f"{span(now - attempt.opened_at)} so far"


# --- audit, jobs ----------------------------------------------------------------------------------


def audit_document(line: AuditLine) -> dict[str, Any]:
    """Give the document of one line of the audit."""
    event = line.event
    return {
        "id": event.id,
        "at": event.at,
        "actor": event.actor,
        "kind": event.kind,
        "batch": event.batch_id,
        "chunk": event.chunk_index,
        "attempt": event.attempt,
        "execution": event.execution_id,
        "old": event.old,
        "new": event.new,
        "reason": event.reason,
        "subject": line.subject,
    }


def audit_text(line: AuditLine) -> str:
    """Write one line of the audit for people."""
    event = line.event
    what = f"{event.kind} {event.batch_id or ''}".rstrip()
    if event.kind == "execution":
        what = f"execution {event.execution_id}"
        what += f" of {event.batch_id}" if event.batch_id else ""
    if event.chunk_index is not None:
        what += f"/{event.chunk_index}"
    if event.attempt is not None:
        what += f" attempt {event.attempt}"
    moved = ""
    if event.new is not None:
        moved = f"{event.old or 'new'} → {event.new}"
    told = " ".join(_subject_text(line.subject or {}))
    return _GAP.join(
        part for part in (iso(event.at), event.actor, what, moved, event.reason or "", told) if part
    )


def _subject_text(subject: Mapping[str, Any]) -> Iterator[str]:
    for name, value in subject.items():
        if value not in (None, {}, []):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{name}={text}"


JOB_TITLES: Final = ("JOB", "TARGET", "ITEMS", "CHUNK", "RETRY", "LIMITS", "TIMEOUT", "DESCRIPTION")


def job_document(job: Job) -> dict[str, Any]:
    """Give the document of a job: its fields as in the jobs file, defaults filled, no secrets."""
    document: dict[str, Any] = redact(job.model_dump(mode="json"))
    return document


def job_row(job: Job) -> tuple[str, ...]:
    """Give the cells of a job in the table of jobs."""
    values = job.model_dump(mode="json")

    def said(name: str) -> str:
        return ", ".join(f"{k} {v}" for k, v in values[name].items() if v is not None)

    retry = values["retry"]
    tries = f"{retry['attempts']} attempts, {retry['initial']} to {retry['max']}"
    return (
        job.name,
        job.target,
        "given" if job.items is None else job.items.source,
        said("chunk"),
        tries,
        said("limits") or "none",
        values["timeout"],
        job.description or "",
    )


def definition_document(defined: Defined, applied: str | None) -> dict[str, Any]:
    """Give the document of a definition: how it differs, and its name if it was written."""
    return {
        "job": defined.job.name,
        "target": defined.job.target,
        "changes": [
            {"path": change.path, "old": change.old, "new": change.new}
            for change in defined.changes
        ],
        "applied": applied,
    }


def definition_lines(found: Iterable[Defined]) -> Iterator[str]:
    """Write how definitions differ from what is there."""
    for defined in found:
        name = f"job {defined.job.name} on target {defined.job.target}"
        if not defined.changes:
            yield f"{name}: nothing differs"
            continue
        yield f"{name}:"
        for change in defined.changes:
            yield f"  {change.path}: {_value(change.old)} → {_value(change.new)}"


def _value(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)


# --- words ----------------------------------------------------------------------------------------


def _printable(text: str, *, in_line: bool = False) -> str:
    """Keep what a container wrote from moving the cursor; in a table also from breaking a line."""
    shown = text.expandtabs(4)
    if in_line:
        shown = " ".join(shown.split("\n"))
    if shown.isprintable():
        return shown
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in shown
    )


def _plain(value: Any) -> Any:
    """Turn a document into JSON values."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime):
        return iso(value)
    return str(value) if isinstance(value, StrEnum) else value


def is_bad(outcome: Outcome | None) -> bool:
    """Whether an attempt ended so that its log is worth a look."""
    return outcome not in (None, Outcome.SUCCEEDED, Outcome.CANCELLED)


def exit_code_of(state: BatchState) -> int:
    """Give the exit code by which a command tells the state of a batch."""
    return {BatchState.FAILED: 1, BatchState.CANCELLED: 3}.get(state, 0)
