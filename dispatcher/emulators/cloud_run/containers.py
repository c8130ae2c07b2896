"""`ContainerRunner`: tasks as containers of a local engine, from the job's real image.

A container is created, started with its output attached, asked how it ended, and removed. No
container outlives the emulator: each has the emulator's own label, and `guarding.py` has what is
left removed, even after a SIGKILL. What the engine cannot do, or does no more, ends an attempt as a
failure of the infrastructure.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from dispatcher.emulators.cloud_run.engines import Engine, EngineFailed, kill_call, last_words
from dispatcher.emulators.cloud_run.following import Follower, pass_on_lines
from dispatcher.emulators.cloud_run.guarding import Guard
from dispatcher.emulators.cloud_run.quantities import amount
from dispatcher.emulators.cloud_run.tasks import Handle, Line, TaskEnd, TaskStart

__all__ = ["LABEL", "ContainerRunner"]

LABEL: Final = "dispatcher.emulator"
"""The label that says whose a container is; its value is another one for each runner."""

NOT_STARTED: Final = frozenset({"created", "configured", "initialized"})
"""States of a container that has never run. Docker has the first, Podman all."""

INIT_FAILED: Final = re.compile(r"\[FATAL tini \(\d+\)\] (exec .*)|ERROR \(catatonit:\d+\): (.*)")
"""What the engine's first process writes in place of the program that it cannot start."""

BY_SIGNAL: Final = 128
"""Added to a signal's number it is the exit code of what the signal ended.

guess: container_signals.
"""

KILLED: Final = BY_SIGNAL + signal.SIGKILL

SIGNAL_SECONDS: Final = 20.0
"""How long a signal may take to arrive, and a container to end after SIGKILL."""

AGAIN_SECONDS: Final = 0.1
"""Until a signal is sent again to a container that does not run yet, or its state is read again."""

KILLED_SECONDS: Final = 1.0
"""How long an engine may take to learn that memory was the reason of a SIGKILL. Some never do."""


class ContainerRunner:
    """Runs each attempt as a container of a local engine.

    Args:
        engine: what runs them; its own settings say with which context, registries and users.
        network: the network of each container, by the engine's name for it. That of the machine
            reaches what listens on its loopback, such as other emulators.
        mounts: directories of this machine that each container has at the same path, to write too.
        stop_grace: seconds between SIGTERM and SIGKILL (guess: stop_grace).
        limit: containers at once.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        network: str = "host",
        mounts: Iterable[Path] = (),
        stop_grace: float = 10.0,
        limit: int = 16,
    ) -> None:
        self._engine = engine
        self._options = ["--network", network]
        for path in mounts:
            self._options += ["--mount", _bind(path.resolve())]
        self._stop_grace = stop_grace
        self._instance = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._guard = Guard(engine.path, f"{LABEL}={self._instance}")
        self._follower = Follower(self._guard)
        self.limit: int | None = limit

    def has_image(self, image: str) -> bool:  # noqa: ARG002 - the shape of a runner
        """Whether it may be there: what a registry has is known only when a task needs it."""
        return True

    def start(
        self,
        start: TaskStart,
        wrote: Callable[[Line], None],
        ended: Callable[[TaskEnd], None],
    ) -> TaskEnd | Handle:
        """Start a container; a thread of its own follows it."""
        # The number tells it from a container of the same task that is still being stopped.
        name = f"dispatch-{self._instance}-{next(self._numbers)}-{start.execution_id}-{start.index}"
        labels = {
            LABEL: self._instance,
            "dispatcher.execution": start.execution,
            "dispatcher.task": str(start.index),
            "dispatcher.attempt": str(start.attempt),
        }
        options = [*self._options, *_limits(start, self._engine)]
        for label, value in labels.items():
            options += ["--label", f"{label}={value}"]
        container = _Container(
            name, start, options, self._engine, self._guard, self._stop_grace, wrote
        )
        return self._follower.follow(container, ended)

    def close(self) -> None:
        """Kill what still runs, wait for it, and remove what is left."""
        self._follower.close()


class _Container:
    """One container."""

    def __init__(
        self,
        name: str,
        start: TaskStart,
        options: list[str],
        engine: Engine,
        guard: Guard,
        stop_grace: float,
        wrote: Callable[[Line], None],
    ) -> None:
        self._name = name
        self._start = start
        self._options = options
        self._engine = engine
        self._guard = guard
        self._stop_grace = stop_grace
        self._wrote = wrote
        self._first_error = ""
        self._lock = threading.Lock()
        self._call: subprocess.Popen[bytes] | None = None
        self._started = False
        self._wanted: signal.Signals | None = None
        self._given_up = False
        self._over = threading.Event()

    # --- from its start to its end ----------------------------------------------------------------

    def run(self) -> TaskEnd:
        """Have the image, create, start and follow it, and remove it; returns how it ended."""
        try:
            end = self._fetch() or self._run()
        except EngineFailed as failed:
            end = TaskEnd(problem=f"The container engine failed: {failed}")
        if self._wanted is not None and not self._started:
            return TaskEnd(term_signal=int(self._wanted))
        return end

    def _fetch(self) -> TaskEnd | None:
        """Have the engine pull the image if it is not there; returns the end if it cannot."""
        image = self._start.image
        if self._engine.has_image(image):
            return None
        self._wrote(Line(f"Pulling image '{image}'.", error=True))
        pull = self._open("pull", "--quiet", "--", image)
        if pull is None:
            return TaskEnd()
        words = last_words(pull.communicate()[1].decode(errors="replace"))
        self._close(pull)
        # Not by its exit code: an engine that has gone meanwhile fails here.
        if self._engine.has_image(image):
            return None
        return TaskEnd(problem=f"Image '{image}' not found. {words}".strip(), missing_image=True)

    def _run(self) -> TaskEnd:
        """Create it, start it and follow it to its end."""
        start = self._start
        text, env = _variables(start.environment)
        words = ["create", "--name", self._name, "--pull", "never", "--init", *self._options]
        words += ["--env-file", "/dev/stdin", *(f"--env={name}" for name in env)]
        if start.working_dir:
            words += ["--workdir", start.working_dir]
        if start.command:
            words += ["--entrypoint", start.command[0]]
        try:
            self._engine.call(
                *(*words, "--", start.image, *start.command[1:], *start.args),
                text=text,
                env=env,
                pass_fds=self._guard.making,
            )
            attached = self._open("start", "--attach", self._name, starts=True)
            if attached is None:
                return TaskEnd()
            pass_on_lines(attached, self._note, lambda: attached.poll() is not None)
            self._close(attached)
            self._over.set()
            return self._end()
        finally:
            self._remove()

    def _open(self, *words: str, starts: bool = False) -> subprocess.Popen[bytes] | None:
        """Make a call that may take long; None if it is not wanted any more."""
        with self._lock:
            if self._wanted is not None:
                return None
            self._call = self._engine.open(*words)
            self._started = starts
            self._guard.watch(self._call.pid)
            return self._call

    def _close(self, call: subprocess.Popen[bytes]) -> None:
        """Wait for such a call."""
        call.wait()
        with self._lock:
            self._call = None
        self._guard.forget(call.pid)

    def _note(self, line: Line) -> None:
        if line.error and not self._first_error:
            self._first_error = line.text
        self._wrote(line)

    def _end(self) -> TaskEnd:
        """Ask how it ended."""
        if self._given_up:
            raise EngineFailed(f"no answer in {SIGNAL_SECONDS:g} s")
        state = self._engine.state(self._name)
        code = int(state["ExitCode"])
        deadline = time.monotonic() + KILLED_SECONDS
        while code == KILLED and self._wanted is None and not state.get("OOMKilled"):
            if time.monotonic() > deadline:
                break
            time.sleep(AGAIN_SECONDS)
            state = self._engine.state(self._name)
        init = INIT_FAILED.fullmatch(self._first_error)
        if state["Status"] in NOT_STARTED or (code and init):
            said = state.get("Error") or (init and (init[1] or init[2])) or self._first_error
            return TaskEnd(problem=f"The container failed to start: {said}")
        if state["Running"]:
            return TaskEnd(problem="The container engine lost the container.")
        if self._wanted is not None and code - BY_SIGNAL in (self._wanted, signal.SIGKILL):
            return TaskEnd(term_signal=code - BY_SIGNAL)
        # The flag alone may be about a process that the program has started, and survived.
        if state.get("OOMKilled") and code == KILLED:
            return TaskEnd(exit_code=code, out_of_memory=True)
        return TaskEnd(exit_code=code)

    def _remove(self) -> None:
        if self._given_up:
            return  # the guard looks again at the end
        try:
            self._engine.call("rm", "--force", "--volumes", self._name)
        except EngineFailed:
            return  # there is none, or the engine is gone: as above

    # --- stopping ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL after the grace."""
        if self._send(signal.SIGTERM):
            timer = threading.Timer(self._stop_grace, self.kill)
            timer.daemon = True
            timer.start()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> bool:
        """Have a signal sent; False if it is over, or has not started and now never will."""
        with self._lock:
            if self._wanted is None or number is signal.SIGKILL:
                self._wanted = number
            if not self._started:
                if self._call is not None:
                    kill_call(self._call)
                return False
            if self._over.is_set():
                return False
        threading.Thread(target=self._deliver, args=(number,), daemon=True).start()
        return True

    def _deliver(self, number: signal.Signals) -> None:
        """Send a signal until it has arrived; what SIGKILL does not end is given up."""
        deadline = time.monotonic() + SIGNAL_SECONDS
        arrived = False
        while not (arrived or self._over.is_set() or time.monotonic() > deadline):
            try:
                self._engine.call("kill", "--signal", number.name, self._name)
                arrived = True
            except EngineFailed:
                # It does not run yet, or no more, or the engine does not answer.
                self._over.wait(AGAIN_SECONDS)
        if number is signal.SIGKILL and not (arrived and self._over.wait(SIGNAL_SECONDS)):
            with self._lock:
                if self._call is not None:
                    self._given_up = True
                    kill_call(self._call)


def _bind(path: Path) -> str:
    """Write a mount in the engines' words, which are a line of CSV."""
    fields = ("type=bind", f"source={path}", f"target={path}")
    return ",".join('"' + field.replace('"', '""') + '"' for field in fields)


def _limits(start: TaskStart, engine: Engine) -> Iterator[str]:
    """Give a container what Cloud Run gives it: no swap, and no more cpus than there are."""
    if "memory" in engine.limits:
        size = str(int(amount(start.memory)))
        yield from ("--memory", size, "--memory-swap", size)
    if "cpu" in engine.limits:
        yield from ("--cpus", str(min(amount(start.cpu), engine.cpus)))


def _variables(given: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Part variables into those for a file that is piped, and those for the call's environment.

    No value is on the command line, where others could read it. In the file a value cannot have
    several lines; in the environment a name could change what the engine's command itself does.

    Raises:
        EngineFailed: one can be passed in neither way.
    """
    piped, env = [], {}
    for name, value in given.items():
        if re.search(r"[\s#*]", name) or re.search(r"[\r\n]", value):
            env[name] = value
        else:
            piped.append(f"{name}={value}\n")
    for name in env.keys() & os.environ.keys():
        raise EngineFailed(
            f"the variable {name} has several lines, which cannot be passed on as the engine's own "
            "command uses a variable of that name"
        )
    return "".join(piped), env
