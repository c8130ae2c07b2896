"""Runs an item source: a function `module:function` that lists the items when a batch is planned.

It runs in a process of its own, because it is the user's code in our worker: it may hang, print,
exit or eat memory, and must be killable with all that it started. This module holds the worker's
side; `item_source_child.py` is the other one and describes what goes through the pipe.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final

from dispatcher.errors import InvalidItems
from dispatcher.items import ItemStream

__all__ = ["run_source"]

_READ_BYTES: Final = 1 << 18
_TAIL_LINES: Final = 20
_TAIL_BYTES: Final = 16 << 10
_EXIT_GRACE: Final = 2.0
"""Seconds for the function's process to end by itself once it has said its last word."""


def run_source(
    spec: str,
    params: Mapping[str, Any],
    *,
    timeout: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> ItemStream:
    """Run the function in a process of its own and stream the items that it gives.

    The process starts at the first item asked for. It and all its children are killed when the
    stream ends, fails or is closed, and also when this process dies.

    Args:
        spec: `module:function`; the module is also looked for in `cwd`.
        params: the batch's params. The function gets those that it names as parameters.
        timeout: seconds from its start to its last item, the time of whoever reads them included.
        cwd: where it runs; this process's own directory if None.
        env: its whole environment; this process's own if None.

    Raises:
        InvalidItems: while reading: the function cannot be imported or called, raises, gives
            something that is not JSON, or does not end in time. With what it last wrote to stderr.
    """
    return ItemStream(f"item source {spec!r}", _items(spec, params, timeout, cwd, env))


def _items(
    spec: str,
    params: Mapping[str, Any],
    timeout: float,
    cwd: Path | None,
    env: Mapping[str, str] | None,
) -> Generator[list[str], None, None]:
    deadline = time.monotonic() + timeout
    count = 0
    last_word = ""
    carry = b""
    with _running(spec, params, cwd, env) as source:
        try:
            for data in source.read(deadline):
                whole, newline, tail = data.rpartition(b"\n")
                if not newline:
                    carry += data
                    continue
                lines = (carry + whole).decode().split("\n")
                carry = tail
                if lines[-1][0] in "!?":
                    last_word = lines.pop()
                count += len(lines)
                yield lines
                if last_word:
                    break
            source.drain()
        except TimeoutError:
            raise InvalidItems(
                f"item source {spec!r} was stopped: it did not end within its timeout of "
                f"{timeout:g} s; it had given {count:,} items{source.tail()}"
            ) from None
    if last_word.startswith("?"):
        raise InvalidItems(f"item source {spec!r}: {json.loads(last_word[1:])}{source.tail()}")
    if last_word != f"!{count}":
        raise InvalidItems(
            f"item source {spec!r} ended before its list did, with {source.ending()}, after "
            f"{count:,} items{source.tail()}"
        )


class _Source:
    """The process of an item source, and the two pipes that come from it."""

    def __init__(self, process: subprocess.Popen[bytes], items: int, log: int) -> None:
        self._process = process
        self._items = items
        self._log = log
        self._written: deque[bytes] = deque()
        self._selector = selectors.DefaultSelector()
        for pipe in (items, log):
            self._selector.register(pipe, selectors.EVENT_READ)

    def read(self, deadline: float) -> Iterator[bytes]:
        """Yield what comes through the pipe of items until that ends; keep the end of the log.

        Raises:
            TimeoutError: the deadline, on the monotonic clock, has passed.
        """
        while self._items in self._selector.get_map():
            ready = self._selector.select(max(0.0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                raise TimeoutError
            for key, _ in ready:
                data = os.read(key.fd, _READ_BYTES)
                if not data:
                    self._selector.unregister(key.fd)
                elif key.fd == self._items:
                    yield data
                else:
                    self._keep(data)

    def drain(self) -> None:
        """Let the process end by itself, for a moment, and take what it still writes to its log."""
        until = time.monotonic() + _EXIT_GRACE
        left = _EXIT_GRACE
        # The last look is one without waiting: this process may have been kept from the others.
        while left > 0 and (pipes := self._selector.get_map()):
            left = max(0.0, until - time.monotonic())
            # Only the process itself holds the pipe of items; a child of it may hold the log.
            ready = self._selector.select(left if self._items in pipes else 0)
            if not ready:
                return
            for key, _ in ready:
                data = os.read(key.fd, _READ_BYTES)
                if not data:
                    self._selector.unregister(key.fd)
                elif key.fd == self._log:
                    self._keep(data)

    def kill(self) -> None:
        """End the process and all it started. Before it is waited for: until then its id is its."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._selector.close()

    def ending(self) -> str:
        """How the process ended, in words; after `kill`."""
        code = self._process.returncode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def tail(self) -> str:
        """The last lines of its log, as the end of a message."""
        text = b"".join(self._written).decode(errors="replace")
        lines = text.splitlines()[-_TAIL_LINES:]
        return "\nThe last it wrote:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""

    def _keep(self, data: bytes) -> None:
        self._written.append(data[-_TAIL_BYTES:])
        while sum(map(len, self._written)) - len(self._written[0]) >= _TAIL_BYTES:
            self._written.popleft()


@contextmanager
def _running(
    spec: str, params: Mapping[str, Any], cwd: Path | None, env: Mapping[str, str] | None
) -> Iterator[_Source]:
    with ExitStack() as kept, ExitStack() as childs:

        def pipe(reader: ExitStack, writer: ExitStack) -> tuple[int, int]:
            ends = os.pipe()
            reader.callback(os.close, ends[0])
            writer.callback(os.close, ends[1])
            return ends

        items, items_in = pipe(kept, childs)
        log, log_in = pipe(kept, childs)
        lifeline, _ = pipe(childs, kept)
        # A file and not a pipe: nobody has to be there to read it.
        given = childs.enter_context(TemporaryFile())
        given.write(json.dumps(dict(params)).encode())
        given.seek(0)
        try:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-u", "-m", "dispatcher.item_source_child"),
                    *(spec, str(items_in), str(lifeline)),
                ],
                stdin=given,
                stdout=log_in,
                stderr=log_in,
                pass_fds=(items_in, lifeline),
                cwd=cwd,
                env=env,
                start_new_session=True,
            )
        except OSError as error:
            raise InvalidItems(f"item source {spec!r} cannot be run in {cwd}: {error}") from None
        source = _Source(process, items, log)
        kept.callback(source.kill)
        childs.close()
        yield source
