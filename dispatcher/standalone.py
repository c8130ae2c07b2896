"""Everything on one machine: Postgres, Valkey, workers, beat and Flower under one supervisor.

`run` starts them in order over one directory, says where they are, starts again what dies, and
stops them all on ^C. What it starts is what a Procfile would start: the same commands, told of the
servers by the same variables. The servers themselves are `servers.py`'s.

User's work that the local backend started is not stopped with it: it runs on, and the workers of
the next start follow it to its end.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, Protocol, Self

import psycopg

from dispatcher import schema
from dispatcher.config import load_config
from dispatcher.errors import ConfigurationError, DispatcherError, Unreachable
from dispatcher.ports import HIGHEST_PORT, any_free_port, is_free
from dispatcher.servers import EmbeddedPostgres, EmbeddedValkey, leashed
from dispatcher.settings import standalone_file

__all__ = ["Standalone", "run"]

DATABASE: Final = "dispatcher"
CELERY: Final = (sys.executable, "-m", "celery", "-A", "workers.app")
FLOWER_PORT: Final = 5555

READY_WITHIN: Final = 60.0
LOOK_EVERY: Final = 0.2
STOP_WITHIN: Final = 10.0
FIRST_WAIT: Final = 1.0
LONGEST_WAIT: Final = 30.0
STEADY_AFTER: Final = 60.0
"""Seconds up after which a process counts as healthy: its next death is a first one again."""

LOG_TAIL_LINES: Final = 20


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Startable(Protocol):
    """What the supervisor keeps alive: a server of `servers.py`, or a `Program`."""

    @property
    def title(self) -> str:
        """What people call it."""
        ...

    @property
    def running(self) -> bool:
        """Whether its process is alive."""
        ...

    def start(self) -> None:
        """Start it."""
        ...


class Program:
    """A worker, beat or Flower: a command, its variables, and the file that takes its output."""

    def __init__(
        self,
        title: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        log_file: Path,
        at_death: signal.Signals = signal.SIGTERM,
    ) -> None:
        """Name the program; `start` runs it. `at_death` is what it gets if we are killed."""
        self.title = title
        self.command = tuple(command)
        self.log_file = log_file
        self.process: subprocess.Popen[bytes] | None = None
        self._env = env
        self._at_death = at_death
        self._log_start = 0

    @property
    def running(self) -> bool:
        """Whether its process is alive."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it; it ends with this process, however that ends."""
        with self.log_file.open("ab") as sink:
            self._log_start = sink.tell()
            self.process = subprocess.Popen(
                leashed(self.command, at_death=self._at_death),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=self._env,
                # ^C in a terminal is for the supervisor, which stops things in their order.
                start_new_session=True,
            )

    def ask_to_stop(self) -> None:
        """Send SIGTERM."""
        if self.running and self.process is not None:
            self.process.terminate()

    def wait_or_kill(self, deadline: float) -> bool:
        """Wait for its end, and bring it about at the deadline; say whether it came by itself."""
        if self.process is None:
            return True
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return False
        return True

    def last_words(self) -> str:
        """Return the end of what it wrote since it was last started."""
        with self.log_file.open("rb") as output:
            output.seek(self._log_start)
            lines = output.read().decode(errors="replace").splitlines()
        return "\n".join([f"{self.log_file} says", *lines[-LOG_TAIL_LINES:]])


@dataclass
class Keeper:
    """Starts one thing again when it has died: after 1 s, then twice as long, at most 30 s."""

    kept: Startable
    say: Callable[[str], None]
    started_at: float
    wait: float = FIRST_WAIT
    due_at: float | None = None
    """When it is to be started; None while it runs."""

    def turn(self, now: float) -> None:
        """Look after it once.

        Args:
            now: seconds on a clock that never goes back.
        """
        if self.due_at is not None:
            if now >= self.due_at:
                self._start_again(now)
        elif not self.kept.running:
            if now - self.started_at >= STEADY_AFTER:
                self.wait = FIRST_WAIT
            self._put_off(now, f"{self.kept.title} has died")

    def _start_again(self, now: float) -> None:
        try:
            self.kept.start()
        except DispatcherError as error:
            self._put_off(now, f"{self.kept.title} could not be started: {error}")
        else:
            self.due_at = None
            self.started_at = now
            self.say(f"{self.kept.title} was started again")

    def _put_off(self, now: float, what: str) -> None:
        self.say(f"{what}; starting it again in {self.wait:.0f} s")
        self.due_at = now + self.wait
        self.wait = min(self.wait * 2, LONGEST_WAIT)


@dataclass(frozen=True, slots=True)
class Ports:
    """Loopback ports; None is a unix socket that only this user may open."""

    postgres: int | None = None
    valkey: int | None = None
    flower: int = FLOWER_PORT

    def check(self) -> None:
        """Refuse a number that is no port."""
        for name in ("postgres", "valkey", "flower"):
            port = getattr(self, name)
            if port is not None and not 1 <= port <= HIGHEST_PORT:
                raise ConfigurationError(
                    f"--{name}-port is {port}; it must be from 1 to {HIGHEST_PORT}"
                )


@dataclass
class Standalone:
    """One supervised installation in a directory; a context manager that starts and stops it.

    `start` must be called from a thread that lives as long as the installation; see `servers.py`.
    """

    directory: Path
    jobs: str | None = None
    """The path of the jobs file or a module, as `DISPATCHER_JOBS`."""

    flower: bool = True
    workers: int = 1
    ports: Ports = field(default_factory=Ports)
    databases: Sequence[str] = ()
    """Further databases to create; their URLs are in `<NAME>_DATABASE_URL` of all it starts."""

    prepare: Sequence[str] = ()
    """A command to run to its end before the workers start, told what they are told."""

    suggest: bool = True
    """Whether to name a command to try, as for somebody who sits at a terminal."""

    say: Callable[[str], None] = _print

    def __post_init__(self) -> None:
        """Name the parts; nothing is started or written yet."""
        self.directory = self.directory.absolute()
        self.logs = self.directory / "logs"
        self.told_in = self.directory / "standalone.json"
        self.flower_url: str | None = None
        self._lock: IO[str] | None = None
        self._keepers: list[Keeper] = []
        self._programs: list[Program] = []
        self._postgres: EmbeddedPostgres | None = None
        self._valkey: EmbeddedValkey | None = None

    # --- start ---

    def start(self) -> None:
        """Start everything, and return when it can be used.

        Raises:
            ConfigurationError: another standalone has the directory, or the jobs cannot be read.
            Unreachable: something did not start; the text has its last words.
        """
        if self.workers < 1:
            raise ConfigurationError(f"workers is {self.workers}; it must be at least 1")
        if self.jobs is not None and Path(self.jobs).exists():
            self.jobs = str(Path(self.jobs).absolute())
        self.ports.check()
        example = self._example_job()
        self._take_directory()
        try:
            self._start_all()
        except BaseException:
            self.stop()
            raise
        self._tell()
        self._introduce(example)

    def _example_job(self) -> str | None:
        """Refuse a wrong jobs file before anything runs; name a job to try, and an item for it."""
        if self.jobs is None:
            raise ConfigurationError(
                "no jobs are configured: give --jobs or set DISPATCHER_JOBS, to a YAML file or a "
                "Python module"
            )
        jobs = load_config(self.jobs).jobs
        for job in jobs.values():
            if job.items is not None:
                return job.name
        return next((f"{name} --item 1" for name in jobs), None)

    def _take_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.logs.mkdir(exist_ok=True)
            lock = (self.directory / "lock").open("a+")
        except OSError as error:
            raise ConfigurationError(
                f"the directory {self.directory} cannot be used: {error.strerror}; choose another "
                "one with --dir"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "of an unknown number"
            lock.close()
            raise ConfigurationError(
                f"the directory {self.directory} is in use by the standalone process {owner}: "
                f"stop that one first (kill {owner}), or choose another directory"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock
        self.told_in.unlink(missing_ok=True)

    def _start_all(self) -> None:
        ports = self._free_ports()
        self._postgres = EmbeddedPostgres(
            self.directory / "postgres",
            port=ports.postgres,
            log_file=self.logs / "postgres.log",
        )
        self._valkey = EmbeddedValkey(
            self.directory / "valkey", port=ports.valkey, log_file=self.logs / "valkey.log"
        )
        for server in (self._postgres, self._valkey):
            server.start()
            self._keep(server)
        for name in (DATABASE, *self.databases):
            self._postgres.create_database(name)
        schema.upgrade(self.database_url)
        env = self.environment()
        if self.prepare:
            self._run_preparation(env)
        began = self._database_time()
        self._programs = [
            Program(
                title,
                command,
                env=env,
                log_file=self.logs / f"{title}.log",
                # Flower keeps nothing, and waits for a broker that is gone before it ends.
                at_death=signal.SIGKILL if title == "flower" else signal.SIGTERM,
            )
            for title, command in self._commands(ports).items()
        ]
        for program in self._programs:
            program.start()
            self._keep(program)
        if self.flower:
            self.flower_url = f"http://127.0.0.1:{ports.flower}"
        self._wait_until_ready(began)

    def _commands(self, ports: Ports) -> dict[str, tuple[str, ...]]:
        """What the Procfile says, with this directory's names; a test compares the two."""
        worker = (
            *(*CELERY, "worker", "--pool", "threads", "--concurrency", "4"),
            *("--without-gossip", "--without-mingle", "--loglevel", "INFO"),
        )
        commands: dict[str, tuple[str, ...]] = {"worker": worker}
        for number in range(2, self.workers + 1):
            commands[f"worker{number}"] = (*worker, "--hostname", f"worker{number}@%h")
        commands["beat"] = (*CELERY, "beat", "--schedule", str(self.directory / "beat-schedule"))
        if self.flower:
            place = ("--address=127.0.0.1", f"--port={ports.flower}")
            commands["flower"] = (*CELERY, "flower", *place)
        return commands

    def _free_ports(self) -> Ports:
        def free(wanted: int | None, what: str) -> int | None:
            if wanted is None or is_free(wanted):
                return wanted
            other = any_free_port()
            self.say(f"port {wanted} for {what} is taken: using {other} instead")
            return other

        flower = free(self.ports.flower, "Flower") if self.flower else None
        return Ports(
            postgres=free(self.ports.postgres, "Postgres"),
            valkey=free(self.ports.valkey, "Valkey"),
            flower=flower or self.ports.flower,
        )

    def _run_preparation(self, env: Mapping[str, str]) -> None:
        done = subprocess.run(
            leashed(self.prepare, at_death=signal.SIGTERM),
            stdin=subprocess.DEVNULL,
            env=env,
            check=False,
        )
        if done.returncode != 0:
            raise ConfigurationError(
                f"{shlex.join(self.prepare)} ended with {done.returncode}: nothing runs"
            )

    def _keep(self, kept: Startable) -> None:
        self._keepers.append(Keeper(kept, self.say, started_at=time.monotonic()))

    def _wait_until_ready(self, began: object) -> None:
        deadline = time.monotonic() + READY_WITHIN
        while not (self._workers_are_up(began) and self._flower_is_up()):
            # At the start a death is a mistake in the settings, and trying again cannot mend it.
            for program in self._programs:
                if not program.running:
                    raise Unreachable(f"{program.title} ended at once: {program.last_words()}")
            if time.monotonic() > deadline:
                words = "\n".join(program.last_words() for program in self._programs)
                raise Unreachable(f"not ready within {READY_WITHIN:.0f} s: {words}")
            time.sleep(LOOK_EVERY)

    def _workers_are_up(self, began: object) -> bool:
        """Whether every worker has written a heartbeat since they were started."""
        # Rows of workers of an earlier run stay for a while: only a new heartbeat counts.
        statement = "SELECT count(*) FROM dispatcher.worker WHERE heartbeat_at >= %s"
        with self._connection() as connection:
            row = connection.execute(statement, [began]).fetchone()
        return row is not None and row[0] >= self.workers

    def _flower_is_up(self) -> bool:
        if self.flower_url is None:
            return True
        try:
            # Anything but success is raised.
            urllib.request.urlopen(f"{self.flower_url}/healthcheck", timeout=2).close()  # noqa: S310 - our own loopback address
        except OSError:
            return False
        return True

    def _database_time(self) -> object:
        with self._connection() as connection:
            row = connection.execute("SELECT now()").fetchone()
        return row[0] if row else None

    @contextmanager
    def _connection(self) -> Iterator[psycopg.Connection]:
        address = self.database_url.replace("postgresql+psycopg:", "postgresql:", 1)
        with psycopg.connect(address, connect_timeout=5, autocommit=True) as connection:
            yield connection

    # --- what others are told ---

    @property
    def database_url(self) -> str:
        """Where the dispatcher's tables are, as a SQLAlchemy URL."""
        return self._url_of(DATABASE)

    def _url_of(self, database: str) -> str:
        if self._postgres is None:
            raise ConfigurationError("the standalone is not started: it has no database yet")
        return self._postgres.url(database)

    @property
    def broker_url(self) -> str:
        """Where Celery's messages go."""
        if self._valkey is None:
            raise ConfigurationError("the standalone is not started: it has no broker yet")
        return self._valkey.url

    @property
    def storage_url(self) -> str | None:
        """The storage of the workers, as the variable that they inherit says it."""
        return os.environ.get("DISPATCHER_STORAGE_URL") or None

    def environment(self) -> dict[str, str]:
        """The variables of all that is started: ours, and the programs of this virtualenv first."""
        programs = str(Path(sys.executable).parent)
        path = os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])
        return {**os.environ, **self._told(), "PATH": path, "PYTHONUNBUFFERED": "1"}

    def _told(self) -> dict[str, str]:
        told = {
            "DISPATCHER_DATABASE_URL": self.database_url,
            "DISPATCHER_BROKER_URL": self.broker_url,
        }
        if self.jobs is not None:
            told["DISPATCHER_JOBS"] = self.jobs
        if self.storage_url is not None:
            told["DISPATCHER_STORAGE_URL"] = self.storage_url
        for name in self.databases:
            told[f"{name.upper()}_DATABASE_URL"] = self._url_of(name)
        return told

    def _tell(self) -> None:
        """Write the file by which other processes find this installation: all of it or nothing."""
        told = {
            "database_url": self.database_url,
            "broker_url": self.broker_url,
            "storage_url": self.storage_url,
            "jobs": self.jobs,
            "flower_url": self.flower_url,
            "databases": {name: self._url_of(name) for name in self.databases},
            "pid": os.getpid(),
        }
        draft = self.told_in.with_suffix(".new")
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(told, indent=2) + "\n")
        draft.replace(self.told_in)

    def _introduce(self, example: str | None) -> None:
        logs = " ".join(sorted(path.name for path in self.logs.glob("*.log")))
        lines = [
            f"ready, as process {os.getpid()}; stop it with ^C",
            f"  database  {self.database_url}",
            f"  broker    {self.broker_url}",
            f"  flower    {self.flower_url or 'not started'}",
            f"  jobs      {self.jobs}",
            f"  logs      {_shown(self.logs)}: {logs}",
        ]
        if example is not None and self.suggest:
            program = _shown(Path(sys.executable).parent / "dispatcher")
            command = f"{program} enqueue {example} --wait"
            if self.told_in != standalone_file().absolute():
                told = self._told()
                names = [name for name in told if name.startswith("DISPATCHER_")]
                command = " ".join(
                    [*(f"{name}={shlex.quote(told[name])}" for name in names), command]
                )
            lines += ["try this in another terminal:", f"  {command}"]
        for line in lines:
            self.say(line)

    # --- go on, stop ---

    def turn(self) -> None:
        """Look after everything once: start again what has died and has waited long enough."""
        for keeper in self._keepers:
            keeper.turn(time.monotonic())

    def stop(self) -> None:
        """Stop everything: first what uses the servers, within 10 s, then the servers."""
        self.told_in.unlink(missing_ok=True)
        self._keepers.clear()
        deadline = time.monotonic() + STOP_WITHIN
        for program in self._programs:
            program.ask_to_stop()
        for program in self._programs:
            if not program.wait_or_kill(deadline):
                self.say(f"{program.title} did not stop within {STOP_WITHIN:.0f} s and was killed")
        if self._programs:
            self._say_what_goes_on()
        for server in (self._valkey, self._postgres):
            if server is not None:
                server.stop()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _say_what_goes_on(self) -> None:
        """Name the work that runs without us: it is nobody's to stop but its batch's."""
        statement = "SELECT count(*) FROM dispatcher.chunk WHERE state = 'running'"
        try:
            with self._connection() as connection:
                row = connection.execute(statement).fetchone()
        except psycopg.OperationalError as error:
            self.say(f"what still runs cannot be told: {str(error).partition(chr(10))[0]}")
            return
        count = 0 if row is None else row[0]
        if count:
            still = (
                "1 chunk still runs and goes" if count == 1 else f"{count} chunks still run and go"
            )
            which = "it" if count == 1 else "them"
            self.say(f"{still} on without the servers; the next start follows {which} to the end")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def run(
    directory: Path | None = None,
    *,
    jobs: str | None = None,
    flower: bool = True,
    workers: int = 1,
    ports: Ports | None = None,
    databases: Sequence[str] = (),
    prepare: str = "",
) -> int:
    """Run an installation until SIGINT or SIGTERM; call it from the main thread.

    Args:
        directory: where it keeps everything; `.dispatcher`, where other commands look, if None.
        jobs: the jobs file or module, which must be there.
        flower: whether to start Flower.
        workers: how many worker processes to start.
        ports: which loopback ports to use; another is taken, and said, where one is not free.
        databases: further databases to create.
        prepare: a command line to run before the workers start, quoted as for a shell.

    Returns:
        0: it was asked to stop, and everything is stopped.

    Raises:
        ConfigurationError: the directory is in use, or something it was told is wrong or missing.
        Unreachable: something did not start.
    """
    installation = Standalone(
        directory or standalone_file().parent,
        jobs=jobs,
        flower=flower,
        workers=workers,
        ports=ports or Ports(),
        databases=databases,
        prepare=_words(prepare),
        # Where nobody types, as in the demo, another program has started it and stops it.
        suggest=sys.stdin.isatty(),
    )
    with _stop_signals() as asked:
        try:
            with installation:
                asked.while_starting = False
                while not asked.to_stop:
                    installation.turn()
                    time.sleep(LOOK_EVERY)
                installation.say("stopping")
        except _Interrupted:
            installation.say("stopped before it was ready")
        else:
            installation.say("stopped")
    return 0


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigurationError(f"--prepare {command}: it cannot be read: {error}") from error


class _Interrupted(BaseException):
    """A signal came while things were being started: leave at once, stopping what there is."""


@dataclass
class _Asked:
    """Whether a signal has asked us to stop. No Event: setting one in a handler can deadlock."""

    to_stop: bool = False
    while_starting: bool = True

    def note(self, _number: int, _frame: object) -> None:
        if not self.to_stop:
            self.to_stop = True
            if self.while_starting:
                raise _Interrupted


@contextmanager
def _stop_signals() -> Iterator[_Asked]:
    asked = _Asked()
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {kind: signal.signal(kind, asked.note) for kind in kinds}
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _shown(path: Path) -> str:
    with suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
