"""Real servers for the tests that need them: one Postgres and one Valkey for each pytest process.

A test gets a database of its own, copied from a template that was migrated once. Set
TEST_DATABASE_URL to the URL of a superuser on another server to run against that one instead.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeAlias

import psycopg
import pytest
import sqlalchemy
import structlog
from hypothesis import HealthCheck, settings
from psycopg import sql

# How long an example takes says how busy the machine is; the rest is as Hypothesis has it.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

# The asserts of the contract explain themselves as those of a test module do; before any import.
pytest.register_assert_rewrite("dispatcher.testing")

from dispatcher.servers import EmbeddedPostgres, EmbeddedValkey  # noqa: E402 - see above

MakeDatabase: TypeAlias = Callable[[str], AbstractContextManager[str]]

MEMORY_NEEDED = 4 << 30
"""Bytes that must be free in memory before a Postgres of tests is put there: a process of
pytest-xdist has one, which takes some 200 MB, and a test or two fill hundreds more."""


def pytest_configure() -> None:
    """Set up what a shell, or a library, would have otherwise."""
    # A shell that began this run in the background has ^C ignored, and so would every process that
    # a test starts to interrupt it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # With rich at hand structlog shows the variables of each frame: a second for a traceback.
    plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    processors = structlog.get_config()["processors"]
    processors[:] = [
        plain if isinstance(one, structlog.dev.ConsoleRenderer) else one for one in processors
    ]


# What is imported and collected stays until the end. The collector of garbage looks for nothing in
# it: neither while it is made nor, again and again, during the tests.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let every process of pytest-xdist begin with its part of the long tests.

    Each is given an equal run of the list, from its start, and takes from the ends of the others'
    when it is through. A long test in the middle of a run would keep one at work when the others
    have nothing left to take.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if item.get_closest_marker("long")]
    short = [item for item in items if not item.get_closest_marker("long")]
    dealt: list[pytest.Item] = []
    for worker in range(workers):
        dealt += long[worker::workers]
        room = max(0, len(items) * (worker + 1) // workers - len(dealt))
        dealt += short[:room]
        short = short[room:]
    items[:] = dealt + short


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """Undo how a command that ran in this process has set up its log: the next test has its own."""
    root = logging.getLogger()
    handlers, level, config = root.handlers[:], root.level, structlog.get_config()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**config)
    for name, module in tuple(sys.modules.items()):
        # A logger that was used meanwhile keeps what was set then, whatever is set later.
        logger = vars(module).get("log") if name.startswith(("dispatcher.", "workers.")) else None
        if isinstance(logger, structlog._config.BoundLoggerLazyProxy):
            vars(logger).pop("bind", None)


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port of this machine on which nobody listens, or can begin to while the test lasts."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def migrate(url: str) -> None:
    from dispatcher import schema  # noqa: PLC0415 - only tests that ask for a database need it

    schema.upgrade(url)


def named(url: str, database: str) -> str:
    """The same server, another database."""
    parsed = sqlalchemy.make_url(url).set(drivername="postgresql+psycopg", database=database)
    return parsed.render_as_string(hide_password=False)


def connect(url: str) -> psycopg.Connection:
    dsn = named(url, "postgres").replace("postgresql+psycopg:", "postgresql:", 1)
    return psycopg.connect(dsn, autocommit=True)


@contextmanager
def memory_folder(otherwise: Path) -> Iterator[Path]:
    """Make a folder in memory for as long as the block lasts, where there is room for one.

    A database is some 340 files. On ext4 without a journal a removed inode is not given out again
    for minutes, and each new file looks past all of them: to copy and drop a database took 90 to
    150 ms of the kernel's time there, and in memory 13.
    """
    memory = Path("/dev/shm")  # noqa: S108 - the folder in it is made under a name of its own
    if not memory.is_dir() or shutil.disk_usage(memory).free < MEMORY_NEEDED:
        yield otherwise
        return
    with tempfile.TemporaryDirectory(prefix="dispatcher-tests-", dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a superuser on a Postgres that only this pytest process uses.

    A process of pytest-xdist has its own: half a second to make, and nothing to agree on.
    """
    if given := os.environ.get("TEST_DATABASE_URL"):
        yield named(given, "postgres")
        return
    with (
        memory_folder(tmp_path_factory.mktemp("postgres")) as folder,
        EmbeddedPostgres(folder / "data", fsync=False) as server,
    ):
        with connect(server.url("postgres")) as connection:
            # No work of its own: it takes time, and what it finds would differ from run to run.
            connection.execute("ALTER SYSTEM SET autovacuum = off")
            connection.execute("ALTER SYSTEM SET checkpoint_timeout = '1h'")
            connection.execute("SELECT pg_reload_conf()")
        yield server.url("postgres")


@pytest.fixture(scope="session")
def make_database(postgres: str) -> Iterator[MakeDatabase]:
    """Make a database for as long as a block lasts, as a copy of another; its name."""
    # On a server without fsync a copy of the files takes 9 ms, and one through the log 42 ms.
    strategy = "" if "TEST_DATABASE_URL" in os.environ else " STRATEGY FILE_COPY"
    with connect(postgres) as administrator:

        @contextmanager
        def make(template: str) -> Iterator[str]:
            name = f"test_{uuid.uuid4().hex}"
            both = [sql.Identifier(name), sql.Identifier(template)]
            administrator.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}" + strategy).format(*both)
            )
            try:
                yield name
            finally:
                administrator.execute(
                    sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(both[0])
                )

        yield make


@pytest.fixture(scope="session")
def database_template(postgres: str, make_database: MakeDatabase) -> Iterator[str]:
    """The name of a migrated database that nobody is connected to."""
    with make_database("template0") as name:
        migrate(named(postgres, name))
        yield name


@pytest.fixture
def database_url(
    postgres: str, make_database: MakeDatabase, database_template: str
) -> Iterator[str]:
    """A migrated database of this test's own, as a SQLAlchemy URL."""
    with make_database(database_template) as name:
        yield named(postgres, name)


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def valkey(valkey_server: EmbeddedValkey) -> Iterator[str]:
    """The URL of an empty broker."""
    valkey_server.start()  # a test may have stopped it
    with valkey_server.connect() as client:
        client.flushall()
    yield valkey_server.url
    valkey_server.start()
