"""The local backend: an execution is a directory and a shim, its tasks are processes.

The directory `<spool>/<key>` is the execution, and its name is the handle. Renaming it into place
is the atomic intent; the shim (`local_shim.py`) that takes its lock runs the tasks and outlives the
worker. Everything here is read from those files: no state is kept in memory.

What the shim writes in a task's `exit.json`, and what it means:

    ended         exit                outcome
    exited        code 0              succeeded
    exited        code N              failed, exit code N
    exited        signal N            failed, exit code 128 + N (also 9: nobody says "memory" here)
    timed_out     any                 timed_out
    cancelled     any                 cancelled, also with exit code 0
    refused       none                rejected: not found, not executable, no cwd, too long
    not_started   none                start_failed: no memory, no process, no room on the disk
    stopped       any                 lost: the shim was told to stop, with the machine or container
    (no file)     shim is gone        lost, once nothing of it runs any more
    (no file)     cancelled unstarted cancelled: a shim that came later would start nothing

The spool belongs on a local disk: its locks are those of one kernel.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, field_validator

from dispatcher.backends import local_shim as shim
from dispatcher.backends.base import (
    UNMETERED,
    BackendLimits,
    Definition,
    Handle,
    Launched,
    LaunchRequest,
    Meter,
    Phase,
    Rejected,
    Remark,
    Report,
    TaskInput,
    TaskReport,
    Unavailable,
)
from dispatcher.durations import Duration, format_duration
from dispatcher.job import Job
from dispatcher.states import Outcome

__all__ = ["LocalBackend", "LocalOptions", "LocalSettings"]

log = structlog.get_logger(__name__)

INLINE_BYTES: Final = 64 * 1024
"""Items up to this size travel in DISPATCH_ITEMS: Linux takes 128 KiB in one variable."""

LAUNCH_SECONDS: Final = 5.0
"""How long `launch` waits for the shim's word."""

LIMITS: Final = BackendLimits(
    max_tasks=1000,
    max_payload_bytes=64 * 1024 * 1024,
    inline_bytes=64 * 1024 * 1024,
    max_text_bytes=128 * 1024 - 1,
    call_timeout=timedelta(seconds=7),
    find_grace=timedelta(seconds=2),
    absent_grace=timedelta(seconds=15),
    page_size=500,
    poll_interval=timedelta(0),
    relaunch_safe=True,
    own_results=True,
    per_task_env=True,
)

SHORTEST_KEEP: Final = timedelta(hours=1)
"""An end must lie there until a worker has settled it, also after a while without workers."""

OUTCOMES: Final = {
    shim.TIMED_OUT: Outcome.TIMED_OUT,
    shim.CANCELLED: Outcome.CANCELLED,
    shim.REFUSED: Outcome.REJECTED,
    shim.NOT_STARTED: Outcome.START_FAILED,
    shim.STOPPED: Outcome.LOST,
}

ALWAYS_INHERITED: Final = ("PATH", "HOME", "LANG", "TZ")
OURS: Final = ("DISPATCHER_", "DISPATCH_")
"""Settings of the worker, and what a task is given: neither is handed down."""

_MACHINE_ID: Final = Path("/etc/machine-id")
_PROC: Final = Path("/proc")

_ENV_END: Final = 48
"""The place of `env_end` in /proc/PID/stat, counted from the state: where the variables end."""

_KEY: Final = re.compile(r"[a-z][a-z0-9-]{0,49}")
_BLOCK: Final = 1 << 16
_GAP: Final = "--- some output is left out here: it was over max_log_bytes ---"


class LocalSettings(BaseModel):
    """What a target with `backend: local` may set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spool: Path = Field(
        default=Path(".dispatcher/spool"),
        description="the directory that holds the executions; on a local disk",
    )
    inherit_env: bool | tuple[str, ...] = Field(
        default=True,
        description="true: tasks get the worker's environment without DISPATCHER_* and DISPATCH_*;"
        " a list of names: only these and PATH, HOME, LANG, TZ; false: only those four",
    )
    max_log_bytes: int = Field(
        default=10 * 1024 * 1024,
        ge=4096,
        description="bytes kept of a task's stdout, and of its stderr: the beginning and the end",
    )
    stop_grace: float = Field(
        default=10.0, ge=0, le=300, description="seconds between SIGTERM and SIGKILL"
    )
    keep: Duration = Field(
        default=timedelta(days=7), description="how long the directories of what ended are kept"
    )

    @field_validator("keep")
    @classmethod
    def _keep_until_settled(cls, keep: timedelta) -> timedelta:
        if keep < SHORTEST_KEEP:
            raise ValueError(
                f"must be {format_duration(SHORTEST_KEEP)} or longer, not {format_duration(keep)}:"
                " a directory must stay until a worker has recorded how its execution ended"
            )
        return keep


class LocalOptions(BaseModel):
    """What a job may set in `options` for a local target."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tasks: int = Field(
        default=1, ge=1, le=LIMITS.max_tasks, description="chunks packed in one execution"
    )
    parallelism: int = Field(
        default=1, ge=1, le=200, description="tasks of an execution that run at once"
    )
    cwd: str | None = Field(
        default=None, description="where the command runs; as a default where the worker runs"
    )


@dataclass(frozen=True, slots=True)
class _Process:
    """A line of the process table."""

    pid: int
    start: str
    session: int


class _ProcessTable:
    """The machine's processes, read once and only if someone asks."""

    @cached_property
    def sessions(self) -> Mapping[int, Sequence[_Process]]:
        """The live processes by their session's id; empty where there is no /proc."""
        sessions: dict[int, list[_Process]] = {}
        for stat in _PROC.glob("[0-9]*/stat"):
            try:
                fields = stat.read_bytes().rpartition(b")")[2].split()
            except OSError:  # it ended while we read
                continue
            if fields[0] not in (b"Z", b"X"):
                process = _Process(int(stat.parent.name), fields[19].decode(), int(fields[3]))
                sessions.setdefault(process.session, []).append(process)
        return sessions


class LocalBackend:
    """Runs executions as processes of this machine, supervised by a shim each."""

    Options: ClassVar[type[BaseModel]] = LocalOptions
    Settings: ClassVar[type[BaseModel]] = LocalSettings
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    COMMAND: ClassVar[Literal["required", "refused"]] = "required"

    def __init__(self, name: str, settings: BaseModel, _meter: Meter = UNMETERED) -> None:
        if not isinstance(settings, LocalSettings):
            raise TypeError(f"target {name!r}: settings are {settings!r}, not LocalSettings")
        self.name = name
        self.settings = settings
        self._spool = Path.cwd() / settings.spool.expanduser()

    @property
    def limits(self) -> BackendLimits:
        """The numbers that the planner and the engine rely on."""
        return LIMITS

    def home(self) -> Mapping[str, str]:
        """Name this machine, this run of it and this container: only here are the processes.

        The machine's own id is left out where the system has none: hosts may share a name.
        """
        machine = _machine_id()
        return {
            "host": socket.gethostname(),
            "boot_id": shim.boot_id(),
            "pid_ns": shim.pid_namespace(),
            **({"machine": machine} if machine else {}),
        }

    def definition(self, _options: BaseModel) -> Definition:
        """Fix nothing: all that a job says is ours to keep."""
        return Definition()

    def check(self, job: Job, options: BaseModel) -> Sequence[Remark]:
        """Say if the command cannot be started here, looking in the PATH that tasks inherit."""
        path = self._environment().get("PATH", os.defpath)
        try:
            shim.find_program(job.command[0], path, str(_cwd(options)))
        except shim.Refusal as refusal:
            return (Remark("fail", str(refusal)),)
        return ()

    def launch(self, request: LaunchRequest) -> Launched:
        """Start the execution, or adopt the one whose directory is there already.

        However often, and from however many processes at once, it is called with one key, the
        command runs once. It returns when the shim has left its mark.

        Raises:
            Rejected: the request can never be run here.
            Unavailable: the spool cannot be written, or the shim has not answered within 5 s.
        """
        _refuse_misfits(request)
        directory = self._spool / request.key
        with _os_errors(f"cannot launch in the spool {self._spool}", not_started=True):
            if not directory.exists():
                self._declare(request, directory)
            if not (directory / shim.STARTED).exists():
                self._start_shim(directory)
        return _launched(directory)

    def find(self, request: LaunchRequest) -> Launched | None:
        """Look for the execution's directory with the mark that a shim has begun.

        A directory without the mark is none: `launch` may safely go on with it.

        Raises:
            Unavailable: the spool cannot be read.
        """
        directory = self._spool / request.key
        with _os_errors(f"cannot look in the spool {self._spool}"):
            if (directory / shim.STARTED).exists():
                return _launched(directory)
            # In this order: a directory that comes into place comes with its whole request, so one
            # that lacks it has lost it.
            if not directory.exists():
                return None
            record = shim.read_json(str(directory / shim.REQUEST))
            if record is None or record.get("boot_id") != shim.boot_id():
                return _launched(directory)  # a power cut may have cost the mark
        return None

    def poll(self, handles: Sequence[Handle]) -> Mapping[Handle, Report]:
        """Report on a page of executions; what a dead shim left running is killed on the way.

        An execution whose directory cannot be read, or holds what no shim has written, is left out
        with a warning in the log.

        Raises:
            Unavailable: the spool itself cannot be read.
        """
        table = _ProcessTable()
        reports = {}
        self._insist_on_the_spool()
        for handle in handles:
            try:
                reports[handle] = self._report(handle, table)
            except _UNREADABLE as error:
                self._pass_over(handle, error)
        return reports

    def winner(self, handle: Handle, _name: str) -> Handle:
        """Give the same handle: a key has one directory, and no double."""
        return handle

    def cancel(self, handle: Handle) -> None:
        """Leave word that the execution is to end, and wake its shim.

        Raises:
            Unavailable: the spool cannot be written, or the shim cannot be signalled.
        """
        if not _KEY.fullmatch(handle):
            return
        directory = self._spool / handle
        with _os_errors(f"cannot cancel in the spool {self._spool}"):
            try:
                (directory / shim.CANCEL).touch(mode=0o600)
            except FileNotFoundError:
                return  # unknown here: there is nothing to stop
            # In this order: a shim writes its mark first and then looks for a cancel.
            started = shim.read_json(str(directory / shim.STARTED))
            if (
                started is not None
                and _is_of_this_world(started)
                and shim.process_start(started["pid"]) == started["start"]
            ):
                with suppress(ProcessLookupError):
                    os.kill(started["pid"], signal.SIGUSR1)

    def strays(self, instance: str, since: datetime) -> Iterable[Launched]:
        """List what runs in this spool for an installation and was started since then.

        Raises:
            Unavailable: the spool cannot be read.
        """
        table = _ProcessTable()
        with _os_errors(f"cannot list the spool {self._spool}"):
            return [
                _launched(directory)
                for directory in self._executions()
                if self._is_stray(directory, instance, since, table)
            ]

    def logs(self, handle: Handle, task_index: int, tail: int) -> Iterator[str]:
        """Yield the last `tail` lines of stdout and of stderr, with a line between if both speak.

        Raises:
            Unavailable: the files cannot be read.
        """
        if not _KEY.fullmatch(handle):
            return
        directory = self._spool / handle / str(int(task_index))
        with _os_errors(f"cannot read the output in {directory}"):
            out = _last_lines(directory / shim.STDOUT, tail)
            err = _last_lines(directory / shim.STDERR, tail)
        yield from out
        if out and err:
            yield "--- stderr ---"
        yield from err

    def result_uri(self, handle: Handle, task_index: int) -> str:
        """Name the file in the spool that a task writes where no storage is configured."""
        return (self._spool / handle / str(task_index) / shim.RESULT).as_uri()

    def clean(self, now: datetime) -> int:
        """Remove the directories of executions that ended longer than `keep` ago; say how many.

        A key whose directory is gone could be launched again: keep them for longer than any
        launcher can sleep.

        Raises:
            Unavailable: the spool cannot be read or written.
        """
        removed = 0
        table = _ProcessTable()
        before = now - self.settings.keep
        limit = before.timestamp()
        with _os_errors(f"cannot clean the spool {self._spool}"):
            for directory in list(self._executions()):
                if _changed(directory) >= limit:
                    continue
                try:
                    report = self._report(directory.name, table)
                except _UNREADABLE as error:
                    self._pass_over(directory.name, error)
                    continue
                ends = [task.ended_at for task in report.tasks if task.ended_at is not None]
                if report.phase is Phase.ENDED and all(end < before for end in ends):
                    # Away with the name first: nobody shall meet half a directory.
                    away = self._spool / f".old-{uuid.uuid4().hex}"
                    with suppress(FileNotFoundError):
                        directory.rename(away)
                        removed += 1
            for scrap in self._spool.glob(".*-*"):
                if _changed(scrap) < limit or scrap.name.startswith(".old-"):
                    shutil.rmtree(scrap, ignore_errors=True)
        return removed

    # --- launching ----------------------------------------------------------------------------

    def _declare(self, request: LaunchRequest, directory: Path) -> None:
        """Put the directory with the request in place, or leave the one that is there first."""
        self._spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._spool / f".new-{uuid.uuid4().hex}"
        draft.mkdir(mode=0o700)
        try:
            tasks = [_place(task, draft) for task in request.tasks]
            record = {
                "key": request.key,
                "instance": request.instance,
                "batch_id": request.batch_id,
                "job": request.job,
                "command": list(request.command),
                "cwd": str(_cwd(request.options)),
                "timeout": request.timeout.total_seconds(),
                "parallelism": request.parallelism,
                "stop_grace": self.settings.stop_grace,
                "max_log_bytes": self.settings.max_log_bytes,
                "boot_id": shim.boot_id(),
                "uri": directory.as_uri(),
                "result_uri": request.result_uri,
                "tasks": tasks,
            }
            shim.write_json(str(draft / shim.REQUEST), record)
            try:
                os.rename(draft, directory)  # noqa: PTH104 -- beside the other calls on the system
            except OSError:
                if not directory.exists():
                    raise
                shutil.rmtree(draft, ignore_errors=True)  # another launcher was first: adopt
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        # The name must outlive a power cut: it is what keeps this key from running again.
        spool = os.open(self._spool, os.O_RDONLY)
        try:
            os.fsync(spool)
        finally:
            os.close(spool)

    def _start_shim(self, directory: Path) -> None:
        """Start a shim and wait for its word; where another one lives or lived, it goes at once."""
        listen, answer = os.pipe()
        try:
            with (directory / shim.LOG).open("ab") as log:
                first = subprocess.Popen(
                    [sys.executable, *_FLAGS, "-c", _BOOT, _SHIM_FOLDER, directory, str(answer)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                    cwd="/",
                    pass_fds=(answer,),
                    start_new_session=True,
                )
            os.close(answer)
            answer = -1
            word = _hear(listen)
            try:
                first.wait(timeout=1)  # it ends when it has forked, before the word is heard
            except subprocess.TimeoutExpired:
                first.kill()
                first.wait()
        finally:
            os.close(listen)
            if answer != -1:
                os.close(answer)
        if word in (shim.RUNS, shim.ANOTHER_BOOT):
            return
        if word is None:
            raise Unavailable(
                f"the shim in {directory} has not answered within {LAUNCH_SECONDS:g} s;"
                " the machine may be overloaded"
            )
        if word == shim.HELD:
            raise Unavailable(f"another shim holds {directory} and has not begun yet")
        why = word.decode(errors="replace") or _last_words(directory / shim.LOG)
        raise Unavailable(f"the shim in {directory} could not begin: {why}")

    def _environment(self) -> dict[str, str]:
        inherit = self.settings.inherit_env
        if inherit is True:
            return {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
        names = {*ALWAYS_INHERITED, *(inherit or ())}
        return {name: os.environ[name] for name in sorted(names) if name in os.environ}

    # --- reporting ----------------------------------------------------------------------------

    def _insist_on_the_spool(self) -> None:
        """Raise Unavailable if no execution could be read; a spool that is not there holds none."""
        with (
            _os_errors(f"cannot read the spool {self._spool}"),
            suppress(FileNotFoundError),
            os.scandir(self._spool),
        ):
            (self._spool / shim.REQUEST).stat()  # needs the right to search it

    def _pass_over(self, handle: Handle, error: Exception) -> None:
        """Log that a directory cannot be read, unless it is the spool that cannot."""
        self._insist_on_the_spool()
        why = f"{type(error).__name__}: {error}"
        log.warning("execution cannot be read", target=self.name, handle=handle, why=why)

    def _report(self, handle: Handle, table: _ProcessTable) -> Report:
        directory = self._spool / handle
        if not _KEY.fullmatch(handle):
            return Report(Phase.ABSENT)
        # The cancel before the mark. A shim marks first and looks for a cancel then; so if there is
        # a cancel and after that still no mark, no shim will ever start anything here.
        is_cancelled = (directory / shim.CANCEL).exists()
        started = shim.read_json(str(directory / shim.STARTED))
        if started is None:
            return _report_unstarted(directory, is_cancelled=is_cancelled)
        began = datetime.fromisoformat(started["started_at"])
        indexes: list[int] = started["tasks"]
        ended = _ends(directory, indexes)
        if len(ended) < len(indexes) and shim.lock_is_held(str(directory)):
            return Report(Phase.RUNNING, began, tuple(ended.values()))
        if len(ended) < len(indexes):
            ended = _ends(directory, indexes)  # the shim may have written its last one meanwhile
        missing = [index for index in indexes if index not in ended]
        if not missing:
            return Report(Phase.ENDED, began, tuple(ended.values()))
        if _is_of_this_world(started):
            alive = [index for index in missing if _kill_left_over(directory, index, table)]
            if alive:
                return Report(Phase.RUNNING, began, tuple(ended.values()))
            why = f"its supervisor (pid {started['pid']}) vanished, and nothing of it runs any more"
        else:
            why = "the machine or container that it ran in was restarted"
        lost = [TaskReport(index, Outcome.LOST, reason=why) for index in missing]
        return Report(Phase.ENDED, began, (*ended.values(), *lost))

    def _is_stray(
        self, directory: Path, instance: str, since: datetime, table: _ProcessTable
    ) -> bool:
        try:
            return (
                _changed(directory / shim.STARTED) >= since.timestamp()
                and _instance(directory) == instance
                and self._report(directory.name, table).phase is Phase.RUNNING
            )
        except _UNREADABLE as error:
            self._pass_over(directory.name, error)
            return False

    def _executions(self) -> Iterator[Path]:
        """Name the executions; a file that somebody has left in the spool is none."""
        if self._spool.exists():
            yield from (
                path
                for path in self._spool.iterdir()
                if _KEY.fullmatch(path.name) and path.is_dir()
            )


_SHIM_FOLDER: Final = str(Path(shim.__file__).parent)
_FLAGS: Final = ("-I", "-S")
"""Nothing of the task's environment reaches the shim's own Python, nor does site-packages."""

_UNREADABLE: Final = (OSError, LookupError, TypeError, ValueError, AttributeError)
"""What a directory raises that may not be read, or whose records are not what a shim writes."""

_BOOT: Final = (
    "import sys; sys.path.append(sys.argv[1]); import local_shim; local_shim.main(sys.argv[2:])"
)
"""Imported rather than run by its path: so that its compiled form is used."""


@contextmanager
def _os_errors(what: str, *, not_started: bool = False) -> Iterator[None]:
    """Turn errors of the operating system into the one that the engine knows."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"{what}: {error}", not_started=not_started) from error


def _machine_id() -> str | None:
    try:
        return _MACHINE_ID.read_text().strip() or None
    except (OSError, ValueError):  # none here, or not text
        return None


def _launched(directory: Path) -> Launched:
    return Launched(handle=directory.name, key=directory.name, console_url=directory.as_uri())


def _instance(directory: Path) -> str | None:
    started = shim.read_json(str(directory / shim.STARTED))
    return None if started is None else started["instance"]


def _cwd(options: BaseModel) -> Path:
    chosen = options.cwd if isinstance(options, LocalOptions) else None
    return Path.cwd() / Path(chosen or ".").expanduser()


def _refuse_misfits(request: LaunchRequest) -> None:
    if not _KEY.fullmatch(request.key):
        raise Rejected(f"key {request.key!r} does not match {_KEY.pattern}")
    if not request.command:
        raise Rejected("no command: a local job runs the program that its 'command' names")
    if not 1 <= len(request.tasks) <= LIMITS.max_tasks:
        raise Rejected(f"{len(request.tasks)} tasks; 1 to {LIMITS.max_tasks} are allowed")
    for task in request.tasks:
        size = len(task.items.encode())
        if size > LIMITS.max_payload_bytes:
            raise Rejected(
                f"the items of chunk {task.chunk_index} are {size} bytes of JSON;"
                f" {LIMITS.max_payload_bytes} are allowed"
            )


def _place(task: TaskInput, draft: Path) -> dict[str, Any]:
    """Describe a task for the shim; items that are too big for a variable become a file."""
    is_inline = len(task.items.encode()) <= INLINE_BYTES
    if not is_inline:
        folder = draft / str(task.index)
        folder.mkdir(mode=0o700)
        (folder / shim.INPUT).write_text(task.items, encoding="utf-8")
    return {
        "index": task.index,
        "chunk_index": task.chunk_index,
        "attempt": task.attempt,
        "items": task.items if is_inline else None,
        "args": list(task.args),
        "env": dict(task.env),
    }


def _hear(listen: int) -> bytes | None:
    """Wait for the shim's word: None if it is silent, empty if it died."""
    ear = select.poll()
    ear.register(listen, select.POLLIN)
    if not ear.poll(LAUNCH_SECONDS * 1000):
        return None
    return os.read(listen, _BLOCK)


def _last_words(log: Path) -> str:
    lines = _last_lines(log, 1)
    return lines[-1] if lines else "it ended without a word"


def _is_of_this_world(started: Mapping[str, Any]) -> bool:
    """Whether the pids in a record mean processes that can still be seen from here."""
    return bool(started["boot_id"] == shim.boot_id() and started["pid_ns"] == shim.pid_namespace())


def _report_unstarted(directory: Path, *, is_cancelled: bool) -> Report:
    request = shim.read_json(str(directory / shim.REQUEST))
    if request is None:
        return Report(Phase.ABSENT)
    indexes = [task["index"] for task in request["tasks"]]
    if is_cancelled:
        outcome, why = Outcome.CANCELLED, "cancelled before it started"
    elif request["boot_id"] != shim.boot_id():
        outcome, why = Outcome.LOST, "the machine was restarted around its start"
    else:
        return Report(Phase.PENDING)
    return Report(Phase.ENDED, None, tuple(TaskReport(i, outcome, reason=why) for i in indexes))


def _ends(directory: Path, indexes: Iterable[int]) -> dict[int, TaskReport]:
    """Read how tasks ended: those that did."""
    ends = {}
    for index in indexes:
        record = shim.read_json(f"{directory}/{index}/{shim.EXIT}")
        if record is not None:
            result = directory / str(index) / shim.RESULT
            ends[index] = _task_report(index, record, result.as_uri() if result.exists() else None)
    return ends


def _task_report(index: int, record: Mapping[str, Any], result_uri: str | None) -> TaskReport:
    code: int | None = record["exit_code"]
    number: int | None = record["signal"]
    reason: str | None = record["reason"]
    if number is not None:
        code = 128 + number
        reason = reason or f"killed by signal {number} ({_signal_name(number)})"
    if record["output"]:
        reason = "; ".join(filter(None, (reason, record["output"])))
    outcome = OUTCOMES.get(record["ended"], Outcome.FAILED if code else Outcome.SUCCEEDED)
    return TaskReport(
        index,
        outcome,
        exit_code=code,
        reason=reason,
        started_at=_moment(record["started_at"]),
        ended_at=_moment(record["ended_at"]),
        result_uri=result_uri,
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a real-time signal"


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _kill_left_over(directory: Path, index: int, table: _ProcessTable) -> bool:
    """Kill what a task of a dead shim left running; False when there is nothing (any more).

    What is killed now may take a moment to end, and what is about to become another program does
    not show yet whose it is: the next poll looks again.
    """
    record = shim.read_json(str(directory / str(index) / shim.PROCESS))
    if record is None:
        return False
    pid: int = record["pid"]
    is_leader_alive = shim.process_start(pid) == record["start"]
    is_one_unread = False
    if is_leader_alive:
        victims = [pid, *(process.pid for process in table.sessions.get(pid, ()))]
    else:
        # The number may have gone to another session since: take only those that carry our key.
        mark = f"DISPATCH_KEY={directory.name}".encode()
        seen = {p.pid: _environment_of(p.pid) for p in table.sessions.get(pid, ())}
        victims = [number for number, variables in seen.items() if mark in (variables or ())]
        is_one_unread = None in seen.values()
    for victim in victims:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    return bool(victims) or is_one_unread


def _environment_of(pid: int) -> Sequence[bytes] | None:
    """Read a process's variables; None while it has none: it becomes another program, or ends."""
    place = _PROC / str(pid)
    try:
        if variables := (place / "environ").read_bytes():
            return variables.split(b"\0")
        if (place / "stat").read_bytes().rpartition(b")")[2].split()[_ENV_END] == b"0":
            return None
        return (place / "environ").read_bytes().split(b"\0")  # it may have just become one
    except OSError:  # it ended, or is another user's
        return ()


def _changed(path: Path) -> float:
    """When a file last changed, in seconds; 0 if there is none."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _last_lines(path: Path, count: int) -> list[str]:
    """Read the last lines of a stream that the shim keeps in `path`, `path.8`, `path.9`."""
    segments = {int(part.suffix[1:]): part for part in path.parent.glob(f"{path.name}.[0-9]*")}
    segments[0] = path
    blocks: list[bytes] = []
    wanted = max(count, 0) + 1  # the end of the line before the first one wanted
    for number in sorted(segments, reverse=True):
        for block in _blocks_from_end(segments[number]):
            blocks.append(block)
            wanted -= block.count(b"\n")
            if wanted < 0:
                break
        if wanted < 0:
            break
        if number and number - 1 not in segments:
            blocks.append(f"\n{_GAP}\n".encode())
            wanted -= 2
    text = b"".join(reversed(blocks)).decode(errors="replace")
    lines = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    return lines[-count:] if count > 0 else []


def _blocks_from_end(path: Path) -> Iterator[bytes]:
    try:
        file = path.open("rb")
    except FileNotFoundError:  # never written, or a segment that has just gone
        return
    with file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(end - _BLOCK, 0)
            file.seek(start)
            yield file.read(end - start)
            end = start
