"""`ProcessRunner`: tasks as local processes, with the variables that a container would get.

A process leads a group of its own, which is killed when it ends, as a container's processes are.
No process outlives the emulator: `guarding.py` sees to that even after a SIGKILL.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from dispatcher.emulators.cloud_run.following import Follower, pass_on_lines
from dispatcher.emulators.cloud_run.guarding import Guard
from dispatcher.emulators.cloud_run.tasks import Handle, Line, TaskEnd, TaskStart

__all__ = ["ProcessRunner"]

INHERITED: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR")
"""What a process gets of the emulator's own variables: what an image has, and no more."""


class ProcessRunner:
    """Runs each attempt as a process of this machine.

    Args:
        images: the command that stands for an image's entrypoint, by the image's name. It is run
            where a job has no command of its own.
        env: variables for every task, below those of its container.
        stop_grace: seconds between SIGTERM and SIGKILL (guess: stop_grace).
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
        self._guard = Guard()
        self._follower = Follower(self._guard)
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
        process = _Process(
            [*(start.command or self._images[start.image]), *start.args],
            {**self._env, **start.environment},
            self._stop_grace,
            wrote,
            self._guard,
        )
        return self._follower.follow(process, ended)

    def close(self) -> None:
        """Kill what still runs, and wait for it."""
        self._follower.close()


class _Process:
    """One process."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        stop_grace: float,
        wrote: Callable[[Line], None],
        guard: Guard,
    ) -> None:
        self._command = list(command)
        self._env = dict(env)
        self._stop_grace = stop_grace
        self._wrote = wrote
        self._guard = guard
        self._lock = threading.Lock()
        self._popen: subprocess.Popen[bytes] | None = None
        self._wanted: int | None = None
        self._over = threading.Event()

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
        self._guard.watch(popen.pid)
        waiter = threading.Thread(target=self._wait, args=(popen,), daemon=True)
        waiter.start()
        pass_on_lines(popen, self._wrote, self._over.is_set)
        waiter.join()
        code = popen.wait()
        self._guard.forget(popen.pid)
        return TaskEnd(term_signal=-code) if code < 0 else TaskEnd(exit_code=code)

    def _wait(self, popen: subprocess.Popen[bytes]) -> None:
        """Wait for the process, then end what it has left in its group."""
        # Without reaping it: its number, which is that of the group, stays its own until then.
        os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            self._over.set()
            _signal_group(popen.pid, signal.SIGKILL)

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
