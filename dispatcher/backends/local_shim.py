"""The shim: the supervisor of one local execution, a small process that outlives the worker.

`local.py` starts it with a directory that holds `request.json`. It takes the directory's lock for
life, writes `started.json` before it starts anything, runs the tasks, and writes one `exit.json` a
task by rename. Whoever finds the lock free afterwards knows that it is gone. It decides nothing
about outcomes: it writes what happened (`EXITED` and its kin), and `local.py` says what that means.

What a crash leaves:

    no `started.json`              nothing was started; another shim may begin
    `started.json`, lock held      it runs
    `started.json`, lock free      it is over for good; a task without `exit.json` is lost

It starts with every launch, so it imports only what the standard library loads in milliseconds.
"""
# Importing pathlib would cost as much as all the rest of the start:
# ruff: noqa: PTH103, PTH104, PTH108, PTH110, PTH112, PTH113, PTH115, PTH118, PTH123

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing costs as much as json
    from collections.abc import Mapping, Sequence
    from typing import Any, NoReturn

__all__ = [
    "ANOTHER_BOOT",
    "CANCEL",
    "CANCELLED",
    "EXIT",
    "EXITED",
    "HELD",
    "INPUT",
    "LOCK",
    "LOG",
    "NOT_STARTED",
    "PROCESS",
    "REFUSED",
    "REQUEST",
    "RESULT",
    "STARTED",
    "STDERR",
    "STDOUT",
    "STOPPED",
    "TIMED_OUT",
    "Refusal",
    "boot_id",
    "find_program",
    "lock_is_held",
    "main",
    "pid_namespace",
    "process_start",
    "read_json",
    "write_json",
]

# The files of an execution's directory, and of each task's directory in it.
REQUEST = "request.json"
LOCK = "lock"
STARTED = "started.json"
CANCEL = "cancel"
LOG = "shim.log"
PROCESS = "process.json"
EXIT = "exit.json"
INPUT = "input.json"
RESULT = "result.json"
STDOUT = "stdout"
STDERR = "stderr"

# How a task ended: the word `ended` of its exit.json.
EXITED = "exited"
TIMED_OUT = "timed_out"
CANCELLED = "cancelled"
STOPPED = "stopped"
REFUSED = "refused"
NOT_STARTED = "not_started"

# What the shim answers the launcher, in place of an error's text.
RUNS = b"started"
HELD = b"held"
ANOTHER_BOOT = b"another boot"

PR_SET_PDEATHSIG = 1
READ_BYTES = 1 << 16
DRAIN_READS = 64
"""Reads of a pipe after its task's end: more than a pipe holds, so that nothing is left behind."""

LOOK_SECONDS = 5.0
"""How often the shim looks whether its directory still stands, and whether a cancel lies there."""

MARKER_SECONDS = 2.0
"""How long a second shim waits for the first one's marker."""

REFUSALS = {
    errno.EACCES: "permission denied, for it or for the interpreter of its '#!' line",
    errno.E2BIG: "its arguments and environment are too big for this system",
    errno.EINVAL: "an argument or a variable holds a NUL byte",
    errno.ENOENT: "the interpreter of its '#!' line does not exist",
    errno.ENOEXEC: "it is no program and has no '#!' line",
}
"""Errors of the start that would come again, in words for people."""

DEFAULT_SIGNALS = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGPIPE,
    signal.SIGCHLD,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXFSZ,
)


class Refusal(Exception):
    """A command that cannot be started here, now or later; the text says why and what to mend."""


def boot_id() -> str:
    """Name this run of the machine; empty where the system does not say."""
    return _first_line("/proc/sys/kernel/random/boot_id")


def pid_namespace() -> str:
    """Name the PID namespace of this process; empty where the system has none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.readline().strip()
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """Say when a live process started, in the system's own unit; None if there is none.

    With the pid it names one process for as long as the machine runs. A zombie is not alive.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None if os.path.isdir("/proc/self") else _start_by_ps(pid)
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def _start_by_ps(pid: int) -> str | None:
    import subprocess  # noqa: PLC0415 -- only where there is no /proc, and too slow for each start

    answer = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, check=False, text=True
    )
    return answer.stdout.strip() or None


def read_json(path: str) -> dict[str, Any] | None:
    """Read a record, or None if there is none that is whole."""
    try:
        with open(path, "rb") as file:
            record = json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write_json(path: str, record: Mapping[str, Any]) -> None:
    """Write a record so that nobody ever sees half of it."""
    part = f"{path}.{os.getpid()}.part"
    with open(part, "w", encoding="ascii") as file:
        json.dump(record, file)
    os.rename(part, path)


def lock_is_held(directory: str) -> bool:
    """Whether a shim lives in the directory. Only to be asked once `started.json` is there.

    Before that, asking could take the lock away from a shim that is just starting.
    """
    try:
        lock = os.open(os.path.join(directory, LOCK), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(lock)


def find_program(name: str, path: str, cwd: str) -> str:
    """Find the file that a command names.

    Raises:
        Refusal: there is none, or it may not be executed.
    """
    if not os.path.isdir(cwd):
        raise Refusal(f"cwd not found: {cwd!r} is no directory; correct 'cwd' in the job's options")
    if "/" in name:
        places = [os.path.join(cwd, name)]
    else:
        places = [os.path.join(cwd, folder, name) for folder in path.split(os.pathsep)]
    barred = None
    for place in places:
        if os.path.isfile(place):
            if os.access(place, os.X_OK):
                return place
            barred = barred or place
    if barred is not None:
        raise Refusal(
            f"command not executable: {barred!r} is a file that may not be executed;"
            f" make it executable (chmod +x) or name its interpreter in the job's 'command'"
        )
    if "/" in name:
        raise Refusal(
            f"command not found: there is no file {places[0]!r}; correct the job's 'command'"
        )
    raise Refusal(
        f"command not found: {name!r} is in no directory of PATH ({path});"
        f" correct the job's 'command', give its full path, or set PATH in the job's 'env'"
    )


def _now() -> str:
    seconds, fraction = divmod(time.time(), 1)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(fraction * 1e6):06d}+00:00"


def _log(line: str) -> None:
    """Write to shim.log, which is this process's stderr."""
    sys.stderr.write(f"{_now()} {line}\n")
    sys.stderr.flush()


class Pump:
    """Copies one stream of a task into files that together never hold more than `limit` bytes.

    The first half goes to `path`. Then come `path.1`, `path.2` and so on, a quarter each, of which
    the last two stay: the beginning and the newest output are kept.
    """

    def __init__(self, path: str, limit: int) -> None:
        self.error: str | None = None
        self._path = path
        self._segment = max(limit // 4, 1)
        self._room = max(limit // 2, 1)
        self._number = 0
        self._file = self._open(path)
        self.source, self.sink = os.pipe()
        os.set_blocking(self.source, False)

    def copy(self) -> bool | None:
        """Copy what is there, up to one read; None if nothing is there now, False at the end."""
        try:
            data = os.read(self.source, READ_BYTES)
        except BlockingIOError:
            return None
        try:
            self._write(data)
        except OSError as error:
            # A full disk must not stop the task; that output is missing is said in exit.json.
            self.error = f"some output could not be kept: {error.strerror}"
        return bool(data)

    def close(self) -> None:
        """Copy what is left in the pipe and let go of it."""
        for _ in range(DRAIN_READS):
            if not self.copy():
                break
        os.close(self.source)
        os.close(self._file)

    def _write(self, data: bytes) -> None:
        while data:
            if not self._room:
                self._roll()
            written = os.write(self._file, data[: self._room])
            self._room -= written
            data = data[written:]

    def _roll(self) -> None:
        following = self._open(f"{self._path}.{self._number + 1}")
        os.close(self._file)
        self._file = following
        self._number += 1
        self._room = self._segment
        if self._number > 2:  # noqa: PLR2004 -- two segments stay
            os.unlink(f"{self._path}.{self._number - 2}")

    @staticmethod
    def _open(path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)


class Task:
    """One task of the execution, and its process while it has one."""

    def __init__(self, place: Mapping[str, Any], directory: str) -> None:
        self.index: int = place["index"]
        self.attempt: int = place["attempt"]
        self.args: list[str] = place["args"]
        self.env: dict[str, str] = place["env"]
        self.items: str | None = place["items"]
        self.directory = os.path.join(directory, str(self.index))
        self.pid = 0
        self.pumps: list[Pump] = []
        self.started_at: str | None = None
        self.timeout_at = 0.0
        self.kill_at: float | None = None
        self.stopped_by: tuple[str, str] | None = None
        """How and why the shim is stopping it: what its end will be called."""


class Supervisor:
    """Runs the tasks of one execution to their ends, in one thread that waits for events."""

    def __init__(self, directory: str, request: Mapping[str, Any]) -> None:
        self._directory = directory
        self._request = request
        self._waiting = [Task(place, directory) for place in reversed(request["tasks"])]
        self._count = len(self._waiting)
        self._running: dict[int, Task] = {}
        self._unwritten: list[tuple[Task, dict[str, Any]]] = []
        self._streams: dict[int, Pump] = {}
        self._poller = select.poll()
        self._look_at = 0.0
        self._ending: tuple[str, str] | None = None
        self._bind = _death_binding()
        self._wake, wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake, False)
        self._poller.register(self._wake, select.POLLIN)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for signum in (signal.SIGCHLD, signal.SIGUSR1, signal.SIGTERM):
            signal.signal(signum, _noticed)

    def run(self) -> None:
        """Return when every task has its exit.json, or when the directory is gone."""
        self._look()
        while True:
            while self._waiting and (
                self._ending or len(self._running) < self._request["parallelism"]
            ):
                self._start(self._waiting.pop())
            self._write_exits()
            if not (self._running or self._waiting or self._unwritten):
                return
            self._wait()
            self._enforce()

    def _wait(self) -> None:
        now = time.monotonic()
        until = now + 1.0 if self._unwritten else self._look_at
        for task in self._running.values():
            until = min(until, task.timeout_at if task.kill_at is None else task.kill_at)
        for number, _ in self._poller.poll(max(until - now, 0.0) * 1000):
            if number == self._wake:
                self._heed(os.read(self._wake, READ_BYTES))
            elif number in self._streams and self._streams[number].copy() is False:
                self._poller.unregister(number)
                del self._streams[number]
        if time.monotonic() >= self._look_at:
            self._look()

    def _heed(self, signals: bytes) -> None:
        if signal.SIGTERM in signals:
            self._stop_all(STOPPED, "its supervisor was told to stop (SIGTERM)")
        if signal.SIGUSR1 in signals:
            self._look()
        if signal.SIGCHLD in signals:
            for task in list(self._running.values()):
                self._reap(task)

    def _look(self) -> None:
        self._look_at = time.monotonic() + LOOK_SECONDS
        if not os.path.isdir(self._directory):
            # Nobody can ever learn how these tasks end, and they count as lost: that shall be true.
            for task in self._running.values():
                _signal_group(task.pid, signal.SIGKILL)
            sys.exit(1)
        if os.path.exists(os.path.join(self._directory, CANCEL)):
            self._stop_all(CANCELLED, "cancelled")

    def _stop_all(self, ended: str, reason: str) -> None:
        self._ending = self._ending or (ended, reason)
        for task in list(self._running.values()):
            self._stop(task, *self._ending)

    def _stop(self, task: Task, ended: str, reason: str) -> None:
        if task.kill_at is not None:
            return
        self._reap(task)  # one that has just ended by itself did not end by us
        if task.index in self._running:
            task.stopped_by = (ended, reason)
            task.kill_at = time.monotonic() + self._request["stop_grace"]
            _signal_group(task.pid, signal.SIGTERM)

    def _enforce(self) -> None:
        now = time.monotonic()
        for task in list(self._running.values()):
            if task.kill_at is not None:
                if now >= task.kill_at:
                    _signal_group(task.pid, signal.SIGKILL)
                    task.kill_at = now + LOOK_SECONDS
            elif now >= task.timeout_at:
                limit = self._request["timeout"]
                self._stop(task, TIMED_OUT, f"ran longer than its timeout of {limit:g} s")

    def _start(self, task: Task) -> None:
        if self._ending is not None:
            ended, reason = self._ending
            self._end(task, ended, reason=f"{reason} before it started")
            return
        task.started_at = _now()
        try:
            os.makedirs(task.directory, mode=0o700, exist_ok=True)
            self._spawn(task)
        except Refusal as refusal:
            self._end(task, REFUSED, reason=str(refusal))
        except OSError as error:
            self._end(task, NOT_STARTED, reason=f"could not be started: {error}")

    def _spawn(self, task: Task) -> None:
        env = {**os.environ, **task.env, **self._identity(task)}
        argv = [*self._request["command"], *task.args]
        program = find_program(argv[0], env.get("PATH", os.defpath), self._request["cwd"])
        for stream in (STDOUT, STDERR):
            path = os.path.join(task.directory, stream)
            task.pumps.append(Pump(path, self._request["max_log_bytes"]))
        fate, sink = os.pipe()
        sinks = [*(pump.sink for pump in task.pumps), sink]
        parent = os.getpid()
        with open(fate, "rb") as verdict:
            try:
                task.pid = os.fork()
                if task.pid == 0:
                    self._become(task, program, argv, env, sinks, parent)
            finally:
                for end in sinks:
                    os.close(end)
            failure = verdict.read().decode()
        if failure:
            os.waitpid(task.pid, 0)
            number = int(failure)
            why = REFUSALS.get(number, os.strerror(number))
            ended = REFUSED if number in REFUSALS else NOT_STARTED
            self._end(task, ended, reason=f"command cannot be run: {program!r}: {why}")
            return
        task.timeout_at = time.monotonic() + self._request["timeout"]
        self._running[task.index] = task
        for pump in task.pumps:
            self._streams[pump.source] = pump
            self._poller.register(pump.source, select.POLLIN)

    def _identity(self, task: Task) -> dict[str, str]:
        uri = f"{self._request['uri']}/{task.index}"
        identity = {
            "DISPATCH_KEY": self._request["key"],
            "DISPATCH_BATCH_ID": self._request["batch_id"],
            "DISPATCH_ATTEMPT": str(task.attempt),
            "DISPATCH_TASK_COUNT": str(self._count),
            "DISPATCH_TASK_INDEX": str(task.index),
            "DISPATCH_RESULT_URI": f"{uri}/{RESULT}",
        }
        # Where a storage is configured the result lies there, and outlives this directory.
        if self._request.get("result_uri"):
            identity["DISPATCH_RESULT_URI"] = f"{self._request['result_uri']}{task.index}.json"
        if task.items is None:
            identity["DISPATCH_INPUT_URI"] = f"{uri}/{INPUT}"
        else:
            identity["DISPATCH_ITEMS"] = task.items
        return identity

    def _become(
        self,
        task: Task,
        program: str,
        argv: list[str],
        env: Mapping[str, str],
        sinks: Sequence[int],
        parent: int,
    ) -> NoReturn:
        """Turn this forked process into the task's command; never returns."""
        try:
            os.setsid()
            self._bind()
            if os.getppid() != parent:  # the shim died before it could take us with it
                os._exit(1)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(sinks[0], 1)
            os.dup2(sinks[1], 2)
            signal.set_wakeup_fd(-1)
            for signum in DEFAULT_SIGNALS:
                signal.signal(signum, signal.SIG_DFL)
            # Written by the process itself: there is none of which nobody knows.
            pid = os.getpid()
            record = {"pid": pid, "start": process_start(pid)}
            write_json(os.path.join(task.directory, PROCESS), record)
            os.chdir(self._request["cwd"])
            os.execve(program, argv, env)  # noqa: S606 -- becoming the command is the purpose
        except OSError as error:
            os.write(sinks[2], str(error.errno).encode())
        except ValueError:  # a NUL byte in an argument or in the environment
            os.write(sinks[2], str(errno.EINVAL).encode())
        finally:
            os._exit(127)

    def _reap(self, task: Task) -> None:
        status = os.waitid(os.P_PID, task.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is None:
            return
        # As in a container, what it left running ends with it. Until the process is reaped its pid
        # still is the name of this group and of no other.
        _signal_group(task.pid, signal.SIGKILL)
        os.waitpid(task.pid, 0)
        del self._running[task.index]
        ended, reason = task.stopped_by or (EXITED, None)
        if status.si_code == os.CLD_EXITED:
            self._end(task, ended, reason=reason, exit_code=status.si_status)
        else:
            self._end(task, ended, reason=reason, signum=status.si_status)

    def _end(
        self,
        task: Task,
        ended: str,
        *,
        reason: str | None,
        exit_code: int | None = None,
        signum: int | None = None,
    ) -> None:
        for pump in task.pumps:
            if self._streams.pop(pump.source, None) is not None:
                self._poller.unregister(pump.source)
            pump.close()
        record = {
            "ended": ended,
            "exit_code": exit_code,
            "signal": signum,
            "reason": reason,
            "output": next((pump.error for pump in task.pumps if pump.error), None),
            "started_at": task.started_at,
            "ended_at": _now(),
        }
        self._unwritten.append((task, record))

    def _write_exits(self) -> None:
        unwritten, self._unwritten = self._unwritten, []
        for task, record in unwritten:
            try:
                os.makedirs(task.directory, mode=0o700, exist_ok=True)
                write_json(os.path.join(task.directory, EXIT), record)
            except OSError as error:
                # A full disk: the end is told as soon as there is room.
                _log(f"exit of task {task.index}: {error}")
                self._unwritten.append((task, record))
        if self._unwritten:
            self._look()


def _noticed(_signum: int, _frame: object) -> None:
    """Do nothing: the byte in the wake pipe is what counts."""


def _signal_group(pid: int, signum: signal.Signals) -> None:
    try:
        os.killpg(pid, signum)
    except (ProcessLookupError, PermissionError) as error:
        # Gone already; or it runs as another user, and only that user can end it.
        if isinstance(error, PermissionError):
            _log(f"{signum.name} to group {pid}: {error}")


def _death_binding() -> Any:
    """Return a function that makes the calling process die with its parent, where that exists."""
    if not sys.platform.startswith("linux"):
        return int
    try:
        import ctypes  # noqa: PLC0415 -- only where it is of use

        prctl = ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        return int  # `poll` kills what is left
    return lambda: prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)


def supervise(directory: str, ready: int) -> None:
    """Take the directory's lock and run its tasks, unless another shim has or had it.

    `ready` is a pipe to the launcher, who waits for one word.
    """
    lock = os.open(os.path.join(directory, LOCK), os.O_RDWR | os.O_CREAT, 0o600)
    marker = os.path.join(directory, STARTED)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        until = time.monotonic() + MARKER_SECONDS
        while not os.path.exists(marker) and time.monotonic() < until:
            time.sleep(0.005)
        _tell(ready, RUNS if os.path.exists(marker) else HELD)
        return
    if os.path.exists(marker):
        _tell(ready, RUNS)
        return
    request = read_json(os.path.join(directory, REQUEST))
    if request is None:
        _tell(ready, f"{REQUEST} cannot be read".encode())
        return
    if request["boot_id"] != boot_id():
        # After a power cut the marker of a shim that ran may be missing.
        _tell(ready, ANOTHER_BOOT)
        return
    supervisor = Supervisor(directory, request)
    pid = os.getpid()
    write_json(
        marker,
        {
            "pid": pid,
            "start": process_start(pid),
            "boot_id": request["boot_id"],
            "pid_ns": pid_namespace(),
            "instance": request["instance"],
            "tasks": [task["index"] for task in request["tasks"]],
            "started_at": _now(),
        },
    )
    _tell(ready, RUNS)
    supervisor.run()


def _tell(ready: int, word: bytes) -> None:
    try:
        os.write(ready, word)
    except BrokenPipeError:
        pass  # the launcher is gone; whoever comes next finds the marker
    finally:
        os.close(ready)


def main(argv: Sequence[str]) -> NoReturn:
    """Leave the launcher's family and supervise: `argv` is the directory and the pipe's number."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if os.fork():
        os._exit(0)  # the launcher waits for this one; the child is nobody's zombie
    directory, ready = argv[0], int(argv[1])
    os.set_inheritable(ready, False)
    os.chdir("/")
    try:
        supervise(directory, ready)
    except OSError as error:
        _log(str(error))
        sys.exit(1)
    sys.exit(0)
