"""What a container needs to take its part: its items, its claim, its receipt. One file.

Copy it into an image; it needs Python 3.8 or newer and nothing else. What it reads and writes is a
protocol of a few variables, files and URLs, so that images in other languages do without it:
docs/container.md describes both. In a program:

    from dispatcher import container            # or: import container

    with container.run() as task:
        for item in task.items:
            try:
                task.report(item, ok=True, output=work(item))
            except WorkError as error:
                task.report(item, ok=False, error=error)

In front of a program that knows nothing of it:

    python3 container.py exec -- COMMAND ARGS…             give it its input, and become it
    python3 container.py exec --receipt -- COMMAND ARGS…   run it; a receipt if it exits with 0
    python3 container.py exec --each -- COMMAND {item}     one process an item, one outcome each
"""
# Reasons for what is switched off here: there is little of files, and it is all of one kind (PTH);
# URLs are asked for by this file alone, whose schemes are looked at (S310); the numbers of HTTP are
# their own names (PLR2004).
# ruff: noqa: PTH103, PTH105, PTH108, PTH120, PTH123, S310, PLR2004

from __future__ import annotations

import atexit
import errno
import hashlib
import hmac
import http.client
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import IO, Any, NamedTuple, NoReturn
from urllib.parse import quote, unquote, urlencode, urlsplit

__all__ = [
    "EXIT_CLAIMED_BY_ANOTHER",
    "MAX_OUTPUT_BYTES",
    "MAX_RECEIPT_BYTES",
    "InputError",
    "StorageError",
    "Task",
    "attempt",
    "claim",
    "items",
    "main",
    "progress",
    "report",
    "report_at",
    "run",
    "task_count",
    "task_index",
]

EXIT_CLAIMED_BY_ANOTHER = 94
"""This execution is a double: another one of the same key claimed the work, and nothing was done.

No shell (1, 2, 126, 127), signal (128 and more), sysexits.h (64 to 78) or container engine (125)
uses 94. The dispatcher believes it only where the claim names another execution.
"""

EXIT_USAGE, EXIT_BAD_INPUT, EXIT_TRY_AGAIN, EXIT_SIGTERM = 64, 65, 75, 143

MAX_OUTPUT_BYTES = 4096
"""The largest output of an item, as JSON, that stands in the receipt itself."""

MAX_STORED_OUTPUT_BYTES = 16 << 20
"""The largest output that is written beside the receipt, as an object of its own."""

MAX_ERROR_CHARACTERS = 1000

MAX_URI_CHARACTERS = 8000
"""The longest `output_uri` that the dispatcher takes."""

MAX_RECEIPT_BYTES = 16 << 20
"""The largest receipt: the dispatcher reads no larger one."""

MAX_PROGRESS = 2**62
"""What `progress` can tell at most, of done and of total."""

SHORT_ERROR_CHARACTERS = 100
"""What must fit of an error beside an output, or the output goes beside the receipt."""

SHOWN_ITEMS = 10
"""Items that failed which the log names, where there is no receipt to do so."""

SHOWN = 60
"""Characters of an item in the log."""

SHOWN_ERROR = 200
"""Characters of an item's error in the log."""

PROGRESS_SECONDS = 5.0
"""Between two writes of what is done so far, at least: each is a call that somebody pays for."""

FILE_SECONDS = 0.05
"""The same where a write is one to a file."""

MAX_VARIABLE_BYTES = 131071
"""One variable, name and value: Linux takes 128 KiB with the zero at its end."""

CALL_SECONDS = 20.0
PAUSES = (0.3, 1.0, 3.0)
"""Seconds before each further try of a call that got no clear answer."""

GRACE_SECONDS = 5.0
"""For what was asked to end: the strictest platform kills ten seconds after its SIGTERM."""


class InputError(ValueError):
    """What this task was given cannot be used; it would be so the next time."""


class StorageError(OSError):
    """The storage refuses, or does not answer."""


# --- Who this is -----------------------------------------------------------------------------


def task_index(environ: Mapping[str, str] = os.environ) -> int:
    """Say which task of its execution this is, from 0, on whatever platform it runs."""
    names = (
        "DISPATCH_TASK_INDEX",
        "CLOUD_RUN_TASK_INDEX",
        "AWS_BATCH_JOB_ARRAY_INDEX",
        "JOB_COMPLETION_INDEX",
    )
    return _number(environ, names, 0)


def task_count(environ: Mapping[str, str] = os.environ) -> int:
    """Say how many tasks its execution has."""
    names = ("DISPATCH_TASK_COUNT", "CLOUD_RUN_TASK_COUNT", "AWS_BATCH_JOB_ARRAY_SIZE")
    return _number(environ, names, 1)


def attempt() -> int:
    """Say which attempt at its chunk this is, from 1."""
    return _this_task().attempt


def items() -> list[Any]:
    """Give the items that this task is to work on, in order."""
    return _this_task().items


def _number(environ: Mapping[str, str], names: Sequence[str], default: int) -> int:
    for name in names:
        text = environ.get(name)
        if text:
            if not re.fullmatch("[0-9]{1,9}", text):
                raise InputError(f"{name} is {text!r}, and must be a number")
            return int(text)
    return default


def _execution(environ: Mapping[str, str]) -> str:
    """Name this execution as its platform does, the same in all its tasks."""
    batch_job = environ.get("AWS_BATCH_JOB_ID", "").partition(":")[0]
    return environ.get("CLOUD_RUN_EXECUTION") or batch_job or socket.gethostname()


def claim(environ: Mapping[str, str] = os.environ) -> None:
    """Take the work of this key for this execution, or leave the process with code 94.

    Without DISPATCH_CLAIM_URI nothing needs to be claimed. `run` and the wrapper call this.

    Raises:
        StorageError: it cannot be claimed now; the work must not be begun.
    """
    uri = environ.get("DISPATCH_CLAIM_URI")
    if not uri:
        return
    if not uri.startswith(("file://", "s3://", "gs://")):
        raise InputError(f"DISPATCH_CLAIM_URI is {_shown(uri)}: a claim is written *and* read")
    own = _execution(environ)
    if _create(uri, own.encode()):
        return
    found = _read(uri, 4096)
    if found is None:
        raise StorageError(f"the claim {uri} was there and is not")
    other = found.decode(errors="replace").strip()
    if other != own:
        _remark(f"{uri} belongs to execution {other}, and this is {own}: nothing is done here")
        raise SystemExit(EXIT_CLAIMED_BY_ANOTHER)


# --- What it is given ------------------------------------------------------------------------


def _input(environ: Mapping[str, str]) -> dict[str, Any]:
    """Read this task's line of the input: its items, and what else stands in it."""
    if environ.get("DISPATCH_ITEMS"):
        return _line_of(os.fsencode(environ["DISPATCH_ITEMS"]), "DISPATCH_ITEMS")
    if environ.get("DISPATCH_ITEMS_FILE"):
        with open(environ["DISPATCH_ITEMS_FILE"], "rb") as file:
            return _line_of(file.read(), "DISPATCH_ITEMS_FILE")
    index = task_index(environ)
    if environ.get("DISPATCH_INPUT"):
        lines = iter(io.BytesIO(os.fsencode(environ["DISPATCH_INPUT"])))
        return _pick(lines, index, "DISPATCH_INPUT")
    uri = environ.get("DISPATCH_INPUT_URI")
    if not uri:
        raise InputError(
            "there is no input: none of DISPATCH_ITEMS, DISPATCH_INPUT and DISPATCH_INPUT_URI is "
            "set. To try the program by hand, set DISPATCH_ITEMS to a JSON array"
        )
    for pause in PAUSES:
        try:
            return _pick(_lines(uri), index, _shown(uri))
        except _CutOff:
            time.sleep(pause)
    return _pick(_lines(uri), index, _shown(uri))


def _pick(lines: Iterator[bytes], index: int, name: str) -> dict[str, Any]:
    count = 0
    for line in lines:
        if count == 0 and line.lstrip()[:1] == b"[":
            return _line_of(line + b"".join(lines), name)  # not lines, but the items of one task
        if count == index:
            return _line_of(line, f"line {index + 1} of {name}")
        count += 1
    raise InputError(f"{name} has {count} lines, and this is task {index}, counted from 0")


def _line_of(text: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text.decode())
    except ValueError as error:
        raise InputError(f"{name} is not JSON: {error}") from None
    line = {"items": value} if isinstance(value, list) else value
    if not isinstance(line, dict) or not isinstance(line.get("items"), list):
        raise InputError(f"{name} is neither an array of items nor an object with such `items`")
    return line


# --- The receipt -----------------------------------------------------------------------------


class Task:
    """The part of one task: what it works on, and the receipt of how each item ended.

    The receipt is `<task index>.json`, and exists only if every item was reported and the program
    ended in order. What is done before that is `<task index>.progress.json`.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self.index = task_index(environ)
        self.count = task_count(environ)
        self.line = _input(environ)
        self.items: list[Any] = self.line["items"]
        self.attempt = int(self.line.get("attempt") or _number(environ, ["DISPATCH_ATTEMPT"], 1))
        chunk = self.line.get("chunk")
        self.chunk: int | None = chunk
        if chunk is None and environ.get("DISPATCH_CHUNK"):
            self.chunk = _number(environ, ["DISPATCH_CHUNK"], 0)
        self.key = environ.get("DISPATCH_KEY")
        self._set_uris(environ)
        self._places: dict[str, list[int]] | None = None
        self._results: dict[int, dict[str, Any]] = {}
        self._room = _Room(self)
        self._told: dict[str, int] | None = None
        # Counted, so that what was reported while something was written is not taken for written.
        self._changes = 0
        self._kept = 0
        self._closing = False
        self._over = False
        # Re-entrant, because a signal may come while its own thread holds them.
        self._state = threading.RLock()
        self._writing = threading.RLock()
        self._stop = threading.Event()
        self._writer: threading.Thread | None = None
        self._pid = os.getpid()

    def _set_uris(self, environ: Mapping[str, str]) -> None:
        uri = self.line.get("result_uri") or environ.get("DISPATCH_RESULT_URI") or None
        progress_uri = self.line.get("progress_uri") or environ.get("DISPATCH_PROGRESS_URI")
        if uri and uri.endswith("/"):
            uri = f"{uri}{self.index}.json"
        self._stem: str | None = None
        if uri and not uri.startswith(("https://", "http://")):
            self._stem = uri[:-5] if uri.endswith(".json") else uri  # noqa: FURB188 -- 3.8
            progress_uri = f"{self._stem}.progress.json"
        self.result_uri: str | None = uri
        self.progress_uri: str | None = progress_uri or None

    def report(
        self,
        item: Any,
        ok: bool,
        output: Any = None,
        error: Any = None,
        *,
        output_uri: str | None = None,
    ) -> None:
        """Say how an item ended. What was said of it before is replaced.

        Of equal items, each call means the first that was not reported yet.

        Args:
            item: one of `items`, by its value.
            ok: whether it succeeded.
            output: any JSON value. Above `MAX_OUTPUT_BYTES` it is written beside the receipt.
            error: a text or an exception; only of an item that failed.
            output_uri: where the output lies, if the program wrote it somewhere itself.

        Raises:
            ValueError: no such item; an output that is not JSON, or too large for the receipt
                where nothing can be written beside it; more items than a receipt can tell of.
            StorageError: a large output could not be written.
        """
        with self._state:
            if self._places is None:
                self._places = {}
                for position, value in enumerate(self.items):
                    self._places.setdefault(_canonical(value), []).append(position)
            try:
                places = self._places.get(_canonical(item))
            except (TypeError, ValueError):  # no JSON, so no item
                places = None
            if not places:
                raise ValueError(f"{item!r} is none of this task's {len(self.items)} items")
            position = next((one for one in places if one not in self._results), places[-1])
        self.report_at(position, ok, output, error, output_uri=output_uri)

    def report_at(
        self,
        position: int,
        ok: bool,
        output: Any = None,
        error: Any = None,
        *,
        output_uri: str | None = None,
    ) -> None:
        """Say how the item at a position, from 0, ended. As `report`."""
        if not 0 <= position < len(self.items):
            raise ValueError(f"there is no item {position}: this task has {len(self.items)}")
        if not isinstance(ok, bool):
            raise TypeError(f"ok is {ok!r}, and must be True or False")
        if ok and error is not None:
            raise ValueError(f"item {position} is said to be ok, and to have the error {error!r}")
        if output is not None and output_uri is not None:
            raise ValueError(f"item {position} has an output and an output_uri: give one of them")
        self.refuse_too_many()
        told = None if ok else _error_text(error)
        entry: dict[str, Any] = {"i": position, "ok": ok}
        data = b"" if output is None else _output_bytes(position, output)
        if output_uri is not None:
            self._store({**entry, "output_uri": _uri_text(position, output_uri)}, told)
        elif not data or not self._store_inline(entry, data, told):
            uri = self._write_beside(entry, data) if data else None
            self._store({**entry, "output_uri": uri} if uri else entry, told)
        self._start_writer()

    def refuse_too_many(self) -> None:
        """Refuse a task of which no receipt can tell.

        Raises:
            InputError: it has more items than can be told of, though without output and error.
        """
        if self._room.most_items < len(self.items):
            raise InputError(
                f"this task has {len(self.items):,} items, and a receipt of {MAX_RECEIPT_BYTES:,} "
                f"bytes tells of {self._room.most_items:,}: make the job's chunks smaller"
            )

    def progress(self, done: int, total: int) -> None:
        """Say how far the work is, in any unit; shown while it runs."""
        told = {"done": int(done), "total": int(total)}
        with self._state:
            self._told = {name: min(max(n, 0), MAX_PROGRESS) for name, n in told.items()}
            self._changes += 1
        self._start_writer()

    @property
    def unreported(self) -> int:
        """How many items nothing was said of yet."""
        return len(self.items) - len(self._results)

    def flush(self) -> None:
        """Write what is done so far, as a receipt that is not complete.

        Raises:
            StorageError: it could not be written.
        """
        # A write that hangs must not use up the time that is left after a SIGTERM.
        held = self._writing.acquire(timeout=GRACE_SECONDS)
        try:
            # Made only now: of two writes, the later one must be that of the newer document.
            with self._state:
                if self._over:
                    return
                if self.progress_uri is None and (self.result_uri is None or not self._results):
                    return
                changes = self._changes
                # Where there is one URL only, a SIGTERM during the last write repeats that one.
                complete = self.progress_uri is None and self._closing
                data = self._document(complete=complete)
            if self.progress_uri is not None:
                _replace(self.progress_uri, data)
            elif self.result_uri is not None:
                _create(self.result_uri, data)
                self._over = True  # what stands there is the last word
            self._kept = changes
        finally:
            if held:
                self._writing.release()

    def close(self) -> bool:
        """Write the receipt; returns False where that cannot tell all: the exit code must.

        If not every item was reported, what is done is written as `flush` does.

        Raises:
            StorageError: it could not be written.
        """
        self._stop.set()
        if self._writer is not None and self._writer is not threading.current_thread():
            self._writer.join(GRACE_SECONDS)
        unreported = self.unreported
        failed = any(not entry["ok"] for entry in self._results.values())
        if self.result_uri is None:
            if failed:
                nowhere = "items failed, and there is no DISPATCH_RESULT_URI to say so at"
                _remark(nowhere + self._which())
            return not failed
        if unreported:
            _remark(f"{unreported} of {len(self.items)} items were not reported: no receipt")
            self.flush()
            return True
        with self._writing:
            if not self._over:
                self._write_last(self.result_uri)
        return True

    def _which(self) -> str:
        """Name some items that failed and their errors, for whoever reads the log."""
        bad = [entry for _, entry in sorted(self._results.items()) if not entry["ok"]]
        lines = [
            f"\n  item {entry['i']} ({_json(self.items[entry['i']])[:SHOWN]}): "
            + " ".join(entry.get("error", "failed").split())[:SHOWN_ERROR]
            for entry in bad[:SHOWN_ITEMS]
        ]
        more = len(bad) - len(lines)
        return ":" + "".join(lines) + (f"\n  and {more:,} more" if more else "")

    def _write_last(self, uri: str) -> None:
        """Write the complete receipt; or, if that fails, at least what is done."""
        self._closing = True
        try:
            if not _create(uri, self._document(complete=True)):
                _remark(f"there is a receipt at {_shown(uri)} already; it stands")
            self._over = True
        except BaseException:
            # Unless a SIGTERM did so in between. One URL alone has just refused the same.
            if self.progress_uri is not None and self._kept != self._changes:
                _keep(self)
            raise
        finally:
            self._closing = False

    def _store_inline(self, entry: dict[str, Any], output: bytes, error: str | None) -> bool:
        """Keep how an item ended with its output, unless that is too large for the receipt."""
        if len(output) > MAX_OUTPUT_BYTES:
            return False
        entry = {**entry, "output": json.loads(output)}  # as it is now, whatever becomes of it
        short = None if error is None else error[:SHORT_ERROR_CHARACTERS]
        with self._state:
            if not self._room.takes(entry if short is None else {**entry, "error": short}):
                return False
            self._store(entry, error)
        return True

    def _store(self, entry: dict[str, Any], error: str | None) -> None:
        with self._state:
            self._refuse_without_room(entry)
            text = "" if error is None else self._room.cut(entry, error)
            if text:
                entry = {**entry, "error": text}
            self._room.give(entry)
            self._results[entry["i"]] = entry
            self._changes += 1

    def _refuse_without_room(self, entry: dict[str, Any]) -> None:
        if not self._room.takes(entry):
            raise ValueError(
                f"the receipt has no room for the output_uri of item {entry['i']}: "
                "make the job's chunks smaller"
            )

    def _write_beside(self, entry: dict[str, Any], output: bytes) -> str | None:
        """Write an output that does not stand in the receipt; returns where it lies."""
        if self.result_uri is None:
            return None  # nobody asks for it
        position = entry["i"]
        uri = self.beside(position)
        if uri is None or len(output) > MAX_STORED_OUTPUT_BYTES:
            raise ValueError(
                f"the output of item {position} has {len(output):,} bytes as JSON, and may have "
                f"{MAX_OUTPUT_BYTES if uri is None else MAX_STORED_OUTPUT_BYTES:,}: write it to a "
                "place of your own and report its output_uri"
            )
        self._refuse_without_room({**entry, "output_uri": uri})
        _replace(uri, output)
        return uri

    def beside(self, position: int) -> str | None:
        """Name the place for an item's output beside the receipt, if there is one."""
        return None if self._stem is None else f"{self._stem}.output.{position}.json"

    def envelope(self, *, complete: bool) -> dict[str, Any]:
        """Make a receipt without items."""
        return {
            "version": 1,
            "key": self.key,
            "task": self.index,
            "chunk": self.chunk,
            "attempt": self.attempt,
            "complete": complete,
            "items": [],
            "written_at": _utc_now().strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    def _document(self, *, complete: bool) -> bytes:
        self.refuse_too_many()
        with self._state:
            receipt = self.envelope(complete=complete)
            receipt["items"] = [self._results[position] for position in sorted(self._results)]
            if self._told and not complete:
                receipt["progress"] = self._told
            return _json(receipt).encode()

    def _start_writer(self) -> None:
        if self.progress_uri is None or self._writer is not None or self._stop.is_set():
            return
        with self._state:
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_progress, daemon=True)
                self._writer.start()

    def _write_progress(self) -> None:
        least = (
            FILE_SECONDS if (self.progress_uri or "").startswith("file://") else PROGRESS_SECONDS
        )
        # In a later attempt something is wrong, and where is worth a few writes more.
        pause = FILE_SECONDS if self.attempt > 1 else least
        complained = False
        while not self._stop.wait(pause):
            if self._kept == self._changes:
                continue
            begun = time.monotonic()
            try:
                self.flush()
            except OSError as error:
                if not complained:
                    _remark(f"progress cannot be written: {error}")
                complained = True
            # A large receipt over a slow line must not be all that the container does.
            pause = max(min(least, 2 * pause), 20 * (time.monotonic() - begun))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _output_bytes(position: int, output: Any) -> bytes:
    try:
        return _json(output).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the output of item {position} is not JSON: {error}") from None


def _uri_text(position: int, uri: Any) -> str:
    """Take a URI as it is, or refuse it: half of one leads nowhere."""
    text = str(uri)
    if len(text) > MAX_URI_CHARACTERS or re.search("[\0\ud800-\udfff]", text):
        raise ValueError(
            f"the output_uri of item {position} must be Unicode without NUL, of at most "
            f"{MAX_URI_CHARACTERS:,} characters, and is {text[:80]!r}"
        )
    return text


def _error_text(error: Any) -> str:
    if isinstance(error, BaseException):
        error = f"{type(error).__name__}: {error}"
    text = "it failed" if error is None else str(error)
    text = text if len(text) <= MAX_ERROR_CHARACTERS else text[: MAX_ERROR_CHARACTERS - 1] + "…"
    # Half a surrogate pair is no Unicode, and databases take no NUL.
    return text.encode("utf-8", "replace").decode().replace("\0", "�")


class _Room:
    """How the bytes of a receipt are shared, so that it always tells of every item.

    Each item has a place of its own, which holds at least whether it succeeded and, unless there
    are too many, where its output lies. What is left is a pool for those that come first. All is
    counted as it will stand in the document: UTF-8, with what JSON escapes.
    """

    def __init__(self, task: Task) -> None:
        count = max(len(task.items), 1)
        told = {"done": MAX_PROGRESS, "total": MAX_PROGRESS}
        asked = task.result_uri or task.progress_uri  # else nothing of it is ever written
        room = MAX_RECEIPT_BYTES if asked else sys.maxsize
        room -= _size({**task.envelope(complete=False), "progress": told})
        bare = _size({"i": count - 1, "ok": False}) + len(",")
        self.most_items = room // bare
        room = max(room - count * bare, 0)
        uri = task.beside(count - 1)
        beside = 0 if uri is None else _size({"output_uri": uri})
        self._place = bare + max(room // 2 // count, min(beside, room // count))
        self._pool = room - count * (self._place - bare)
        self._taken: dict[int, int] = {}
        """From the pool, by position."""

    def takes(self, entry: dict[str, Any]) -> bool:
        """Say if what is to be told of an item fits."""
        return self._left(entry) >= 0

    def give(self, entry: dict[str, Any]) -> None:
        """Keep the room for what is told of an item, in place of what was told before."""
        position = entry["i"]
        self._pool += self._taken.pop(position, 0)
        taken = _size(entry) + len(",") - self._place
        if taken > 0:
            self._taken[position] = taken
            self._pool -= taken

    def cut(self, entry: dict[str, Any], error: str) -> str:
        """Give as much of an error as fits beside the rest of what is told of the item."""
        if self.takes({**entry, "error": error}):
            return error
        fits, too_many = 0, len(error)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.takes({**entry, "error": error[:middle] + "…"}):
                fits = middle
            else:
                too_many = middle
        return error[:fits] + "…" if fits else ""

    def _left(self, entry: dict[str, Any]) -> int:
        return self._place + self._pool + self._taken.get(entry["i"], 0) - _size(entry) - len(",")


def _size(value: Any) -> int:
    return len(_json(value).encode())


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)  # noqa: UP017 -- Python 3.8 has no datetime.UTC


def _remark(text: str) -> None:
    sys.stderr.write(f"dispatcher: {text}\n")
    sys.stderr.flush()


# --- The task of this process ----------------------------------------------------------------


class _Process:
    """What belongs to the process and not to a task: its exit, its SIGTERM."""

    task: Task | None = None
    leaves_by_exit = False
    crashed = False
    sigterm: Callable[[int, object], None] | None = None
    """Our handler, once there was one."""


_forking = threading.local()
"""The signal mask of a thread that forks."""


def _this_task() -> Task:
    if _Process.task is None:
        _Process.task = Task()
    return _Process.task


def report(
    item: Any, ok: bool, output: Any = None, error: Any = None, *, output_uri: str | None = None
) -> None:
    """Say how an item of this process's task ended: `Task.report`. Written when it exits."""
    _leave_by_exit()
    _this_task().report(item, ok, output, error, output_uri=output_uri)


def report_at(
    position: int,
    ok: bool,
    output: Any = None,
    error: Any = None,
    *,
    output_uri: str | None = None,
) -> None:
    """Say how the item at a position, from 0, ended: `Task.report_at`. Written at exit."""
    _leave_by_exit()
    _this_task().report_at(position, ok, output, error, output_uri=output_uri)


def progress(done: int, total: int) -> None:
    """Say how far this process's task is: `Task.progress`."""
    _leave_by_exit()
    _this_task().progress(done, total)


@contextmanager
def run() -> Iterator[Task]:
    """Claim the work, give this process's task, and write its receipt when the block ends.

    If the block ends by an exception or an exit code, or by SIGTERM, what is done by then is kept
    and there is no complete receipt. SIGTERM ends the process with 143.

    Raises:
        InputError: there is no usable input.
        StorageError: the input, the claim or the receipt could not be read or written.
        SystemExit: with 94, see `claim`; with 1 if items failed and there is no other way to tell.
    """
    claim()
    task = _this_task()
    task.refuse_too_many()
    _Process.leaves_by_exit = True  # the end of the block does it
    try:
        # A first word, so that a crash at the first item can be told from one before it.
        task.flush()
    except OSError as error:
        _remark(f"progress cannot be written: {error}")
    with _at_sigterm(task):
        try:
            yield task
        except BaseException as end:
            if not (isinstance(end, SystemExit) and end.code in (None, 0)):
                _keep(task)
                raise
            if not task.close():
                raise SystemExit(1) from None
            raise
        if not task.close():
            raise SystemExit(1)


@contextmanager
def _at_sigterm(task: Task) -> Iterator[None]:
    """Keep what is done when SIGTERM comes; a program's own handler is left alone."""
    ours = _sigterm_is_free()
    if ours:
        _set_sigterm(task)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _set_sigterm(task: Task) -> None:
    owner = os.getpid()

    def terminated(signum: int, _frame: object) -> None:
        if os.getpid() != owner:  # a forked child, whose end is its own affair
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        _Process.crashed = True
        _keep(task)
        raise SystemExit(EXIT_SIGTERM)

    signal.signal(signal.SIGTERM, terminated)
    if _Process.sigterm is None and hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=_before_fork, after_in_parent=_unblock, after_in_child=_after_fork
        )
    _Process.sigterm = terminated


def _before_fork() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork() -> None:
    """Have a forked child end at SIGTERM as it would without us, also while it begins.

    What a handler of Python's is to do then is forgotten, and whoever waits for the end of the
    child, as a pool of `multiprocessing` does, would wait for ever.
    """
    if signal.getsignal(signal.SIGTERM) is _Process.sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _unblock()


def _sigterm_is_free() -> bool:
    """Say if the handler may be set: not by another thread, and not over a program's own."""
    return (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )


def _keep(task: Task) -> None:
    """Write what is done; the process is ending badly already, and goes on ending."""
    try:
        task.flush()
    except OSError as error:
        _remark(f"what is done cannot be written: {error}")


def _leave_by_exit() -> None:
    """Without `run`: see to it that the receipt is written when the interpreter ends."""
    if _Process.leaves_by_exit:
        return
    task = _this_task()
    task.refuse_too_many()
    _Process.leaves_by_exit = True
    before = sys.excepthook

    def crashed(*details: Any) -> None:
        _Process.crashed = True
        before(*details)

    sys.excepthook = crashed
    if _sigterm_is_free():
        _set_sigterm(task)
    atexit.register(_at_exit, task, os.getpid())


def _at_exit(task: Task, owner: int) -> None:
    if os.getpid() != owner:
        return
    try:
        if _Process.crashed:
            task.flush()
            return
        told = task.close()
    except OSError as error:
        _remark(f"the receipt cannot be written: {error}")
        told = False
    except SystemExit:  # by a SIGTERM, this late
        _leave_now(EXIT_SIGTERM)
    if not told and not _Process.crashed:
        _leave_now(1)


def _leave_now(code: int) -> NoReturn:
    """Exit with a code while the interpreter ends: there is no other way to change it then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --- Objects: file://, s3://, gs://, and URLs that are signed ---------------------------------


class _CutOff(StorageError):
    """The answer ended before its time."""


class _Call(NamedTuple):
    method: str
    url: str
    headers: dict[str, str]


def _read(uri: str, most: int) -> bytes | None:
    """Read an object of at most `most` bytes; None if there is none."""
    stream = _open(uri)
    if stream is None:
        return None
    with _whole(stream, uri):
        data = stream.read(most + 1)
        if len(data) > most:
            raise StorageError(f"{_shown(uri)} has more than {most:,} bytes")
    return data


def _lines(uri: str) -> Iterator[bytes]:
    stream = _open(uri)
    if stream is None:
        raise StorageError(f"there is no {_shown(uri)}")
    with _whole(stream, uri):
        held = b""
        for line in stream:
            # The last line is given on only when it is known to be whole.
            if held:
                yield held
            held = line
        _refuse_cut(stream, uri)
        if held:
            yield held


@contextmanager
def _whole(stream: IO[bytes], uri: str) -> Iterator[None]:
    """Close a stream, and say if it broke."""
    with stream:
        try:
            yield
        except http.client.HTTPException as error:
            raise _CutOff(f"{_shown(uri)} was cut off: {error!r}") from error
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise _CutOff(f"{_shown(uri)} was cut off: {error}") from error


def _refuse_cut(stream: IO[bytes], uri: str) -> None:
    left = getattr(stream, "length", None)
    if left:
        raise _CutOff(f"{_shown(uri)} was cut off, {left:,} bytes before its end")


def _open(uri: str) -> IO[bytes] | None:
    if uri.startswith("file://"):
        try:
            return open(_path(uri), "rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot read {uri}: {error}") from error
    return _send("GET", uri, None, only_new=False)


def _create(uri: str, data: bytes) -> bool:
    """Write an object whole unless it exists; False if it does."""
    if uri.startswith("file://"):
        return _write_file(uri, data, only_new=True)
    answer = _send("PUT", uri, data, only_new=True)
    if answer is None:
        return False
    answer.close()
    return True


def _replace(uri: str, data: bytes) -> None:
    """Write an object whole, in place of an older one."""
    if uri.startswith("file://"):
        _write_file(uri, data, only_new=False)
        return
    answer = _send("PUT", uri, data, only_new=False)
    if answer is not None:
        answer.close()


def _path(uri: str) -> str:
    host, _, path = uri[len("file://") :].partition("/")
    if host not in ("", "localhost"):
        raise InputError(f"{uri} is relative or names a host: file:/// and the absolute path")
    return "/" + unquote(path)


def _write_file(uri: str, data: bytes, *, only_new: bool) -> bool:
    path = _path(uri)
    # Other writers of the same object have other names, on whichever machine they run.
    draft = f"{path}.{uuid.uuid4().hex}.draft"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(draft, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if only_new:
                _link(draft, path, data)
            else:
                os.replace(draft, path)
        finally:
            if os.path.lexists(draft):
                os.unlink(draft)
    except FileExistsError:
        return False
    except OSError as error:
        raise StorageError(f"cannot write {uri}: {error}") from error
    return True


def _link(draft: str, path: str, data: bytes) -> None:
    try:
        os.link(draft, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP):
            raise
        # A bucket mounted as a directory, and the like: it knows no links.
        with open(path, "xb") as file:
            file.write(data)


def _send(
    method: str, uri: str, data: bytes | None, *, only_new: bool
) -> http.client.HTTPResponse | None:
    """Make the call until its answer is clear; None: not there (GET), there already (only_new)."""
    problem = ""
    for pause in (*PAUSES, None):
        again = True
        try:
            return _urlopen(_call(method, uri, data, only_new=only_new), data)
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            error.close()
            if method == "GET" and error.code == 404 and "NoSuchBucket" not in said:
                return None
            if only_new and error.code == 412:
                return None
            problem = f"{error.code} {error.reason}: {' '.join(said.split())[:400]}"
            # 409 is two conditional writes at once; 401 a token that has just run out.
            again = error.code >= 500 or error.code in (401, 408, 409, 425, 429)
            if uri.startswith("s3://") and _learn_region(uri, error.headers, said):
                continue
            _forget_credentials(error.code)
        except (OSError, http.client.HTTPException) as error:
            problem = str(error) or type(error).__name__
        if pause is None or not again:
            break
        time.sleep(pause)
    raise StorageError(f"cannot {'read' if method == 'GET' else 'write'} {_shown(uri)}: {problem}")


def _urlopen(call: _Call, data: bytes | None) -> http.client.HTTPResponse:
    request = urllib.request.Request(call.url, data=data, headers=call.headers, method=call.method)
    response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=CALL_SECONDS)
    return response


def _call(method: str, uri: str, data: bytes | None, *, only_new: bool) -> _Call:
    scheme = uri.partition("://")[0]
    if scheme == "gs":
        return _google_call(method, uri, only_new=only_new)
    headers = {}
    if data is not None:
        headers["Content-Type"] = "application/json"
    if only_new:
        headers["If-None-Match"] = "*"
    if scheme == "s3":
        return _s3_call(method, uri, headers, data or b"")
    if scheme in ("https", "http"):
        return _Call(method, uri, headers)
    raise InputError(f"{_shown(uri)} is none of file://, s3://, gs:// and https://")


def _shown(uri: str) -> str:
    """Give a URI without what a signed one keeps secret."""
    return uri.partition("?")[0]


def _bucket_and_key(uri: str) -> list[str]:
    bucket, _, key = uri.partition("://")[2].partition("/")
    if not bucket or not key:
        raise InputError(f"{uri} names no bucket, or no object")
    return [bucket, key]


# --- Google Cloud Storage, by its JSON API ----------------------------------------------------


class _Credentials(NamedTuple):
    """Of AWS; or of Google, whose token is all there is."""

    access_key: str
    secret_key: str
    token: str | None
    until: float
    """When they must be fetched anew, by the clock on the wall."""


_kept: dict[str, _Credentials] = {}


def _forget_credentials(status: int) -> None:
    if status in (401, 403):
        _kept.clear()


def _google_call(method: str, uri: str, *, only_new: bool) -> _Call:
    """Make the call of the JSON API; what is a PUT elsewhere is a POST there."""
    bucket, key = _bucket_and_key(uri)
    headers = {}
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    base = "https://storage.googleapis.com"
    if emulator:
        base = (emulator if "://" in emulator else f"http://{emulator}").rstrip("/")
    else:
        headers["Authorization"] = f"Bearer {_google_token()}"
    if method == "GET":
        url = f"{base}/storage/v1/b/{bucket}/o/{quote(key, safe='')}?alt=media"
        return _Call("GET", url, headers)
    # Emulators take JSON for what is said of an object, and not for its content.
    headers["Content-Type"] = "application/octet-stream"
    query = {"uploadType": "media", "name": key}
    if only_new:
        query["ifGenerationMatch"] = "0"
    return _Call("POST", f"{base}/upload/storage/v1/b/{bucket}/o?{urlencode(query)}", headers)


def _google_token() -> str:
    given = os.environ.get("CLOUDSDK_AUTH_ACCESS_TOKEN")
    if given:
        return given
    kept = _kept.get("google")
    if kept is None or kept.until < time.time():
        host = os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
        url = f"http://{host}/computeMetadata/v1/instance/service-accounts/default/token"
        try:
            found = json.loads(_ask(url, {"Metadata-Flavor": "Google"}))
            until = time.time() + float(found["expires_in"]) - 60
            kept = _kept["google"] = _Credentials("", "", found["access_token"], until)
        except (OSError, KeyError, ValueError) as error:
            raise StorageError(
                "there is no token of Google here: no CLOUDSDK_AUTH_ACCESS_TOKEN, and no metadata "
                f"server that gives one ({error!r})"
            ) from error
    return kept.token or ""


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> bytes:
    """Ask the platform about itself; it is near, and no proxy stands between.

    Raises:
        OSError: no answer.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=headers, method=method)
    with opener.open(request, timeout=GRACE_SECONDS) as answer:
        data: bytes = answer.read(1 << 20)
    return data


# --- Amazon S3, and what speaks like it -------------------------------------------------------

_regions: dict[str, str] = {}


def _s3_call(method: str, uri: str, headers: dict[str, str], data: bytes) -> _Call:
    bucket, key = _bucket_and_key(uri)
    region = _regions.get(bucket) or _own_region()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    path = quote(key, safe="/-_.~")
    if endpoint:
        url = f"{endpoint.rstrip('/')}/{bucket}/{path}"
    elif "." in bucket:  # no certificate covers it as the name of a host
        url = f"https://s3.{region}.{suffix}/{bucket}/{path}"
    else:
        url = f"https://{bucket}.s3.{region}.{suffix}/{path}"
    signed = _sign(method, url, headers, data, _aws_credentials(), region, _utc_now())
    return _Call(method, url, signed)


def _sign(
    method: str,
    url: str,
    headers: dict[str, str],
    data: bytes,
    credentials: _Credentials,
    region: str,
    now: datetime,
) -> dict[str, str]:
    """Add the headers of AWS Signature Version 4; the path of the URL is quoted already."""
    parts = urlsplit(url)
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    digest = hashlib.sha256(data).hexdigest()
    signed = {**headers, "X-Amz-Date": stamp, "X-Amz-Content-SHA256": digest}
    if credentials.token:
        signed["X-Amz-Security-Token"] = credentials.token
    lines = {name.lower(): value.strip() for name, value in signed.items()}
    lines["host"] = parts.netloc
    names = ";".join(sorted(lines))
    canonical = "\n".join(
        [
            method,
            parts.path or "/",
            parts.query,
            *(f"{name}:{lines[name]}" for name in sorted(lines)),
            "",
            names,
            digest,
        ]
    )
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    to_sign = "\n".join(
        ["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()]
    )
    key = f"AWS4{credentials.secret_key}".encode()
    for part in (stamp[:8], region, "s3", "aws4_request", to_sign):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signed["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, "
        f"SignedHeaders={names}, Signature={key.hex()}"
    )
    return signed


def _own_region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def _learn_region(uri: str, headers: Any, said: str) -> bool:
    """Take the bucket's region from an answer that says that it is another one."""
    bucket = _bucket_and_key(uri)[0]
    told = re.search("<Region>([a-z0-9-]+)</Region>", said)
    region = headers.get("x-amz-bucket-region") or (told[1] if told else None)
    if not region or region == (_regions.get(bucket) or _own_region()):
        return False
    _regions[bucket] = region
    return True


def _aws_credentials() -> _Credentials:
    environ = os.environ
    if environ.get("AWS_ACCESS_KEY_ID") and environ.get("AWS_SECRET_ACCESS_KEY"):
        return _Credentials(
            environ["AWS_ACCESS_KEY_ID"],
            environ["AWS_SECRET_ACCESS_KEY"],
            environ.get("AWS_SESSION_TOKEN"),
            0,
        )
    kept = _kept.get("aws")
    if kept is None or kept.until < time.time():
        kept = _kept["aws"] = _fetched_credentials()
    return kept


def _fetched_credentials() -> _Credentials:
    environ = os.environ
    relative = environ.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    url = environ.get("AWS_CONTAINER_CREDENTIALS_FULL_URI")
    if relative:
        url = f"http://169.254.170.2{relative}"
    if environ.get("AWS_WEB_IDENTITY_TOKEN_FILE") and environ.get("AWS_ROLE_ARN"):
        return _web_identity()
    if url:
        return _parsed(json.loads(_ask(url, _container_authorization())))
    return _instance_credentials()


def _container_authorization() -> dict[str, str]:
    token = os.environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN")
    path = os.environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
    if path:
        with open(path) as file:
            token = file.read().strip()
    return {"Authorization": token} if token else {}


def _web_identity() -> _Credentials:
    """Change a Kubernetes service account's token into a role's credentials (EKS)."""
    with open(os.environ["AWS_WEB_IDENTITY_TOKEN_FILE"]) as file:
        token = file.read().strip()
    region = _own_region()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_STS") or os.environ.get("AWS_ENDPOINT_URL")
    query = {
        "Action": "AssumeRoleWithWebIdentity",
        "Version": "2011-06-15",
        "RoleArn": os.environ["AWS_ROLE_ARN"],
        "RoleSessionName": os.environ.get("AWS_ROLE_SESSION_NAME") or "dispatcher",
        "WebIdentityToken": token,
    }
    base = (endpoint or f"https://sts.{region}.amazonaws.com").rstrip("/")
    request = urllib.request.Request(f"{base}/", data=urlencode(query).encode())
    with urllib.request.urlopen(request, timeout=CALL_SECONDS) as answer:
        text = answer.read(1 << 20).decode()
    names = ("AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration")
    found = {name: re.search(f"<{name}>([^<]*)</{name}>", text) for name in names}
    return _parsed({name: match[1] for name, match in found.items() if match})


def _instance_credentials() -> _Credentials:
    base = (os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254").rstrip(
        "/"
    )
    try:
        wanted = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
        token = _ask(f"{base}/latest/api/token", wanted, "PUT").decode()
        headers = {"X-aws-ec2-metadata-token": token}
        url = f"{base}/latest/meta-data/iam/security-credentials/"
        role = _ask(url, headers).decode().split("\n")[0].strip()
        return _parsed(json.loads(_ask(url + role, headers)))
    except OSError as error:
        raise StorageError(
            "there are no credentials of AWS here: no AWS_ACCESS_KEY_ID, no container or "
            f"web identity credentials, and no instance that has some ({error})"
        ) from error


def _parsed(found: Mapping[str, Any]) -> _Credentials:
    try:
        end = datetime.strptime(str(found["Expiration"])[:19] + "Z", "%Y-%m-%dT%H:%M:%S%z")
        until = end - timedelta(seconds=60)
        token = found.get("SessionToken") or found.get("Token")
        return _Credentials(
            found["AccessKeyId"], found["SecretAccessKey"], token, until.timestamp()
        )
    except (KeyError, ValueError) as error:
        raise StorageError(f"the platform's credentials cannot be understood: {error}") from None


# --- The wrapper -----------------------------------------------------------------------------

USAGE = """usage: container.py exec [--each | --receipt] [--] COMMAND [ARGUMENT ...]

  (neither)   give the command its task's input, and become the command
  --receipt   run it, and write a receipt that every item succeeded if it exits with 0
  --each      run it once for every item, and write a receipt of how each of them ended;
              {item} in an argument, and the variable ITEM, are the item
"""


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code.

    64: wrong usage; 65: an input that cannot be used; 75: storage that cannot be reached or that
    refuses; 94: another execution has claimed the work; 126 and 127: as in a shell.
    """
    words = list(argv)
    mode = ""
    if words[:1] == ["exec"]:
        words.pop(0)
        if words and words[0] in ("--each", "--receipt"):
            mode = words.pop(0)
        if words[:1] == ["--"]:
            words.pop(0)
        elif words and words[0].startswith("-"):
            words = []
    else:
        words = []
    if not words:
        sys.stderr.write(USAGE)
        return EXIT_USAGE
    try:
        claim()
        task = Task()
        environ = _environment(task, items_too=mode != "--each")
        command = [*words, *_texts(task.line.get("args", []), "args")]
        if mode == "--each":
            return _Supervisor(task).run_each(command, environ)
        if mode == "--receipt":
            return _Supervisor(task).run_all(command, environ)
        return _become(command, environ)
    except ValueError as error:
        _remark(str(error))
        return EXIT_BAD_INPUT
    except OSError as error:
        _remark(str(error))
        return EXIT_TRY_AGAIN


def _environment(task: Task, *, items_too: bool) -> dict[str, str]:
    """Make the command's environment: this one, with what its task was given."""
    environ = dict(os.environ)
    for name in ("DISPATCH_INPUT", "DISPATCH_INPUT_URI", "DISPATCH_CLAIM_URI"):
        environ.pop(name, None)
    own = task.line.get("env", {})
    if not isinstance(own, dict):
        raise InputError("`env` in the input is not an object")
    _texts([*own, *own.values()], "env")
    environ.update(own)
    environ["DISPATCH_TASK_INDEX"] = str(task.index)
    environ["DISPATCH_ATTEMPT"] = str(task.attempt)
    if task.chunk is not None:
        environ["DISPATCH_CHUNK"] = str(task.chunk)
    if task.result_uri:
        environ["DISPATCH_RESULT_URI"] = task.result_uri
    if task.progress_uri:
        environ["DISPATCH_PROGRESS_URI"] = task.progress_uri
    environ.pop("DISPATCH_ITEMS", None)
    if items_too:
        environ.update(_items_variable(task.items))
    for name, value in environ.items():
        if not _fits(name, value):
            raise InputError(
                f"the variable {name} would have {len(os.fsencode(value)):,} bytes, and Linux "
                "takes 128 KiB: make the job's chunks smaller, or read DISPATCH_ITEMS_FILE"
            )
    return environ


def _items_variable(values: list[Any]) -> dict[str, str]:
    text = _json(values)
    if _fits("DISPATCH_ITEMS", text):
        return {"DISPATCH_ITEMS": text}
    number, path = tempfile.mkstemp(prefix="dispatch-items-", suffix=".json")
    with os.fdopen(number, "wb") as file:
        file.write(text.encode())
    return {"DISPATCH_ITEMS_FILE": path}


def _fits(name: str, value: str) -> bool:
    return len(os.fsencode(name)) + 1 + len(os.fsencode(value)) <= MAX_VARIABLE_BYTES


def _texts(values: Any, name: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise InputError(f"`{name}` in the input must hold nothing but texts")
    if any("\0" in one for one in values):
        raise InputError(f"`{name}` in the input holds a NUL, which no program can be given")
    return values


def _become(command: list[str], environ: Mapping[str, str]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    # Python ignores these; what is ignored stays so, and `yes | head` would never end.
    for name in ("SIGPIPE", "SIGXFSZ"):
        if hasattr(signal, name):  # not on Windows
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, environ)  # noqa: S606 -- becoming it is the purpose
    except OSError as error:
        return _not_started(command[0], error)


def _not_started(program: str, error: OSError) -> int:
    _remark(f"cannot run {program}: {error.strerror or error}")
    if isinstance(error, FileNotFoundError):
        return 127
    return 126


class _Supervisor:
    """Runs the command as a child, hands signals on, and keeps the receipt."""

    def __init__(self, task: Task) -> None:
        task.refuse_too_many()
        self.task = task
        self.child: subprocess.Popen[bytes] | None = None
        self.stopped = False
        # Each signal wakes the wait for the child by a pipe: also one that came just before it, and
        # the one that tells of the child's end.
        self._woken, wake = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self._hand_on)

    def run_all(self, command: Sequence[str], environ: Mapping[str, str]) -> int:
        try:
            code = self._run(command, environ)
        except OSError as error:
            return _not_started(command[0], error)
        if code == 0 and not self.stopped:
            for position in range(len(self.task.items)):
                self.task.report_at(position, ok=True)
            self.task.close()
        return code if code >= 0 else 128 - code

    def run_each(self, command: Sequence[str], environ: Mapping[str, str]) -> int:
        if shutil.which(command[0], path=environ.get("PATH")) is None:
            _remark(f"cannot run {command[0]}: there is no such program")
            return 127
        failed = False
        for position, item in enumerate(self.task.items):
            if self.stopped:
                break
            text = item if isinstance(item, str) else _json(item)
            error = self._run_one(position, text, command, environ)
            if self.stopped:
                break  # it was told to stop: not even 0 says that the item is done
            self.task.report_at(position, ok=error is None, error=error)
            failed = failed or error is not None
        if self.stopped and self.task.unreported:
            _keep(self.task)
            return EXIT_SIGTERM
        self.task.close()
        return 1 if failed else 0

    def _run_one(
        self, position: int, text: str, command: Sequence[str], environ: Mapping[str, str]
    ) -> str | None:
        """Run the command for one item; returns what went wrong."""
        if "\0" in text or not _fits("ITEM", text):
            return "the item holds a NUL or has more than 128 KiB: no program can be given it"
        # Only the first word is left as it is: an item does not choose the program.
        words = [command[0], *(word.replace("{item}", text) for word in command[1:])]
        try:
            code = self._run(words, {**environ, "ITEM": text, "ITEM_INDEX": str(position)})
        except OSError as error:
            return f"cannot run {command[0]}: {error.strerror or error}"
        if code < 0:
            return f"killed by {_signal_name(-code)}"
        return f"exit code {code}" if code else None

    def _run(self, command: Sequence[str], environ: Mapping[str, str]) -> int:
        self.child = subprocess.Popen(command, env=environ)
        if self.stopped:  # between the last look and the start
            self.child.terminate()
        try:
            while True:
                code = self.child.poll()
                if code is not None:
                    return code
                if select.select([self._woken], [], [], 60)[0]:
                    os.read(self._woken, 4096)
        finally:
            self.child = None

    def _hand_on(self, signum: int, _frame: object) -> None:
        self.stopped = True
        if self.child is not None:
            self.child.send_signal(signum)  # first: a storage may be slow, and the grace is short
        _keep(self.task)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _script() -> NoReturn:
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    _script()
