"""`ProcessRunner`: tasks as local processes, with the variables that a container would get.

A process leads a group of its own, which is killed when it ends, as a container's processes are.
No process outlives the emulator: `process_guard.py` sees to that even after a SIGKILL.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

from dispatcher.emulators.cloud_run.tasks import Handle, Line, TaskEnd, TaskStart

__all__ = ["ProcessRunner"]

GUARD: Final = Path(__file__).with_name("process_guard.py")
INHERITED: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR")
"""What a process gets of the emulator's own variables: what an image has, and no more."""

READ_BYTES: Final = 1 << 16
MAX_LINE: Final = 1 << 18
"""Bytes of one line; a longer one is cut into several (vendor: logging/quotas, 256 KB an entry)."""

LOOK_SECONDS: Final = 1.0
"""How often a process is asked whether it lives while something else holds its output open."""


class ProcessRunner:
    """Runs each attempt as a process of this machine.

    Args:
        images: the command that stands for an image's entrypoint, by the image's name. It is run
            where a job has no command of its own.
        env: variables for every task, below those of its container.
        stop_grace: seconds between SIGTERM and SIGKILL.
        limit: processes at once.
    """

    def __init__(
        self,
        images: Mapping[str, Sequence[str]],
        *,
        env: Mapping[str, str] | None = None,
        stop_grace: float = 10.0,
        limit: int = 16,
    ) -> None:
        self._images = {name: tuple(command) for name, command in images.items()}
        self._env = {name: os.environ[name] for name in INHERITED if name in os.environ}
        self._env.update(env or {})
        self._stop_grace = stop_grace
        self._lock = threading.Lock()
        self._alive: set[_Process] = set()
        self._guard: subprocess.Popen[bytes] | None = None
        self._closed = False
        self.limit: int | None = limit

    def has_image(self, image: str) -> bool:
        """Whether there is a command for the image."""
        return image in self._images

    def start(
        self,
        start: TaskStart,
        wrote: Callable[[Line], None],
        ended: Callable[[TaskEnd], None],
    ) -> TaskEnd | Handle:
        """Start a process; a thread of its own follows it."""
        with self._lock:
            if self._closed:
                return TaskEnd(problem="The emulator is being closed.")
            if self._guard is None:
                self._guard = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(GUARD)],
                    stdin=subprocess.PIPE,
                    start_new_session=True,
                )
            process = _Process(
                [*(start.command or self._images[start.image]), *start.args],
                {**self._env, **start.environment},
                self._stop_grace,
                wrote,
                self._tell_guard,
            )
            self._alive.add(process)

        def follow() -> None:
            end = process.run()
            with self._lock:
                self._alive.discard(process)
            ended(end)

        process.follow(follow)
        return process

    def _tell_guard(self, word: str) -> None:
        with self._lock:
            if self._guard is None or self._guard.stdin is None:
                return
            try:
                self._guard.stdin.write(f"{word}\n".encode())
                self._guard.stdin.flush()
            except BrokenPipeError:
                # Somebody has killed it: tasks go on, and end with the emulator unless that is
                # killed too.
                return

    def close(self) -> None:
        """Kill what still runs, and wait for it."""
        with self._lock:
            self._closed = True
            alive = tuple(self._alive)
        for process in alive:
            process.kill()
        for process in alive:
            process.join()
        with self._lock:
            guard, self._guard = self._guard, None
        if guard is not None:
            guard.communicate()


class _Process:
    """One process, and the thread that follows it."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        stop_grace: float,
        wrote: Callable[[Line], None],
        tell_guard: Callable[[str], None],
    ) -> None:
        self._command = list(command)
        self._env = dict(env)
        self._stop_grace = stop_grace
        self._wrote = wrote
        self._tell_guard = tell_guard
        self._lock = threading.Lock()
        self._popen: subprocess.Popen[bytes] | None = None
        self._wanted: int | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, body: Callable[[], None]) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=body, name="cloud-run-task", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for its end."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def run(self) -> TaskEnd:
        """Start it, read what it writes, wait for it; returns how it ended."""
        with self._lock:
            if self._wanted is not None:
                self._over.set()
                return TaskEnd(term_signal=self._wanted)
            try:
                popen = self._popen = subprocess.Popen(
                    self._command,
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
            except OSError as error:
                self._over.set()
                return TaskEnd(
                    problem="The container failed to start: "
                    f"{self._command[0]!r}: {error.strerror or error}"
                )
        self._tell_guard(f"+{popen.pid}")
        waiter = threading.Thread(target=self._wait, args=(popen,), daemon=True)
        waiter.start()
        self._read(popen)
        waiter.join()
        code = popen.wait()
        self._tell_guard(f"-{popen.pid}")
        return TaskEnd(term_signal=-code) if code < 0 else TaskEnd(exit_code=code)

    def _wait(self, popen: subprocess.Popen[bytes]) -> None:
        """Wait for the process, then end what it has left in its group."""
        # Without reaping it: its number, which is that of the group, stays its own until then.
        os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            self._over.set()
            _signal_group(popen.pid, signal.SIGKILL)

    def _read(self, popen: subprocess.Popen[bytes]) -> None:
        """Pass on what it writes, line by line, until nobody can write any more."""
        with selectors.DefaultSelector() as selector:
            kept: dict[IO[bytes], bytes] = {}
            for pipe in (popen.stdout, popen.stderr):
                if pipe is not None:
                    selector.register(pipe, selectors.EVENT_READ)
                    kept[pipe] = b""
            while selector.get_map():
                ready = selector.select(LOOK_SECONDS)
                if not ready and self._over.is_set():
                    break  # what holds the pipe has left the group: it is not waited for
                for key, _ in ready:
                    pipe = key.fileobj  # type: ignore[assignment]  # one of the two above
                    assert pipe is not None  # noqa: S101 - as above
                    data = os.read(key.fd, READ_BYTES)
                    if not data:
                        selector.unregister(pipe)
                    kept[pipe] = self._lines(kept[pipe] + data, error=pipe is popen.stderr)
        for pipe, rest in kept.items():
            if rest:
                self._write(rest, error=pipe is popen.stderr)
            pipe.close()

    def _lines(self, data: bytes, *, error: bool) -> bytes:
        """Pass on the lines of some bytes; returns the rest."""
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._write(line, error=error)
        if len(rest) > MAX_LINE:
            self._write(rest, error=error)
            return b""
        return rest

    def _write(self, line: bytes, *, error: bool) -> None:
        self._wrote(Line(line.decode(errors="replace").rstrip("\r"), error))

    def stop(self) -> None:
        """Send SIGTERM to the process, and SIGKILL to its group after the grace."""
        if self._send(signal.SIGTERM):
            timer = threading.Timer(self._stop_grace, self.kill)
            timer.daemon = True
            timer.start()

    def kill(self) -> None:
        """Send SIGKILL to its group."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> bool:
        """Send a signal; False if it is over, or has not started and now never will."""
        with self._lock:
            if self._popen is None:
                self._wanted = self._wanted or int(number)
                return False
            if self._over.is_set():
                return False
            if number is signal.SIGKILL:
                _signal_group(self._popen.pid, number)
            else:
                os.kill(self._popen.pid, number)
            return True


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return  # nothing is left of it; macOS says so with the second one
