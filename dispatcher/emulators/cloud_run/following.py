"""What runners that start something real share: a thread for each attempt, and reading its lines.

`processes.py` and `containers.py` say what an attempt is.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import threading
from collections.abc import Callable
from typing import IO, Final, Protocol

from dispatcher.emulators.cloud_run.guarding import Guard
from dispatcher.emulators.cloud_run.tasks import Handle, Line, TaskEnd

__all__ = ["Attempt", "Follower", "pass_on_lines"]

READ_BYTES: Final = 1 << 16
MAX_LINE: Final = 1 << 18
"""Bytes of one line; a longer one is cut into several (vendor: logging/quotas, 256 KB an entry)."""

LOOK_SECONDS: Final = 1.0
"""How often it is asked whether the writer is over while something else holds its output open."""


class Attempt(Handle, Protocol):
    """Something real that runs from its start to its end."""

    def run(self) -> TaskEnd:
        """Start it, pass on what it writes and wait for it; returns how it ended."""
        ...


class Follower:
    """Follows attempts, each on a thread of its own, and ends them when it is closed."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._lock = threading.Lock()
        self._threads: dict[Attempt, threading.Thread] = {}
        self._closed = False

    def follow(self, attempt: Attempt, ended: Callable[[TaskEnd], None]) -> TaskEnd | Handle:
        """Run an attempt; `ended` is told of its end."""

        def body() -> None:
            try:
                end = attempt.run()
            except Exception as error:  # noqa: BLE001 - an attempt without an end would be for ever
                end = TaskEnd(problem=f"The emulator failed: {error!r}")
            with self._lock:
                del self._threads[attempt]
            ended(end)

        with self._lock:
            if self._closed:
                return TaskEnd(problem="The emulator is being closed.")
            self._guard.open()
            thread = threading.Thread(target=body, name="cloud-run-task", daemon=True)
            self._threads[attempt] = thread
            thread.start()
        return attempt

    def close(self) -> None:
        """Kill what still runs, wait for it, and have the guard look for what is left."""
        with self._lock:
            self._closed = True
            threads = dict(self._threads)
        for attempt in threads:
            attempt.kill()
        for thread in threads.values():
            thread.join()
        self._guard.close()


def pass_on_lines(
    popen: subprocess.Popen[bytes], wrote: Callable[[Line], None], is_over: Callable[[], bool]
) -> None:
    """Pass on what a process writes, line by line, until nobody can write any more.

    What holds its output open beyond its end is not waited for: `is_over` says that it has come.
    """
    with selectors.DefaultSelector() as selector:
        kept: dict[IO[bytes], bytes] = {}
        for pipe in (popen.stdout, popen.stderr):
            if pipe is not None:
                selector.register(pipe, selectors.EVENT_READ)
                kept[pipe] = b""
        while selector.get_map():
            # Asked before the look: what was written up to the end is then seen, however late.
            over = is_over()
            ready = selector.select(LOOK_SECONDS)
            if over and not ready:
                break
            for key, _ in ready:
                pipe = key.fileobj  # type: ignore[assignment]  # one of the two above
                assert pipe is not None  # noqa: S101 - as above
                data = os.read(key.fd, READ_BYTES)
                if not data:
                    selector.unregister(pipe)
                kept[pipe] = _lines(kept[pipe] + data, wrote, error=pipe is popen.stderr)
    for pipe, rest in kept.items():
        if rest:
            wrote(_line(rest, error=pipe is popen.stderr))
        pipe.close()


def _lines(data: bytes, wrote: Callable[[Line], None], *, error: bool) -> bytes:
    """Pass on the lines of some bytes; returns the rest."""
    *lines, rest = data.split(b"\n")
    for line in lines:
        wrote(_line(line, error=error))
    if len(rest) > MAX_LINE:
        wrote(_line(rest, error=error))
        return b""
    return rest


def _line(data: bytes, *, error: bool) -> Line:
    return Line(data.decode(errors="replace").rstrip("\r"), error)
