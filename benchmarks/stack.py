"""Servers and processes for a measurement, and what they cost: CPU seconds and memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psycopg

from benchmarks.figures import Cost, insist, plain
from dispatcher import Dispatcher, schema
from dispatcher.servers import EmbeddedPostgres, EmbeddedValkey

_T = TypeVar("_T")
TICKS = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """Find a loopback port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def until(probe: Callable[[], _T], seconds: float = 60.0) -> _T:
    """Wait until a probe says something true."""
    end = time.monotonic() + seconds
    while not (found := probe()):
        if time.monotonic() > end:
            raise TimeoutError(probe)
        time.sleep(0.02)
    return found


def family(pid: int) -> list[int]:
    """List a process and all that descend from it."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """Sum user and system time, children that have ended included."""
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15]))
    return total / TICKS


def pss_mb(pids: Sequence[int]) -> float:
    """Sum the proportional set sizes, in MB."""
    total = 0
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        except OSError:
            continue
    return total / 1024


def rss_mb(pids: Sequence[int]) -> float:
    """Sum the resident set sizes, in MB: pages that several share are counted for each."""
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Meter:
    """Measures processes and their descendants until it is closed.

    Memory is sampled every second; the highest sum counts.
    """

    def __init__(self, roots: Sequence[int]) -> None:
        self._roots = roots
        self._rss = self._pss = 0.0
        self._before = cpu_seconds(self._pids())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _pids(self) -> list[int]:
        return [pid for root in self._roots for pid in family(root)]

    def _sample(self) -> None:
        while not self._stop.wait(1.0):
            pids = self._pids()
            self._rss = max(self._rss, rss_mb(pids))
            self._pss = max(self._pss, pss_mb(pids))

    def close(self) -> Cost:
        """Stop, and say what they took."""
        cpu = cpu_seconds(self._pids()) - self._before
        self._stop.set()
        self._thread.join()
        return Cost(cpu, self._rss, self._pss)


class Stack:
    """One Postgres with fsync on, one Valkey, and the processes of an installation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.postgres = EmbeddedPostgres(folder / "postgres")
        self.valkey = EmbeddedValkey(folder / "valkey")
        self.processes: list[subprocess.Popen[bytes]] = []
        self._databases = 0

    def database(self) -> str:
        """Make a migrated database of its own for a row."""
        self._databases += 1
        name = f"bench_{self._databases}"
        self.postgres.create_database(name)
        url = self.postgres.url(name)
        schema.upgrade(url)
        return url

    def start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a Python process; it ends with the stack."""
        log = self.folder / f"{len(self.processes)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(Path.cwd()), **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        return process

    def log(self, process: subprocess.Popen[bytes]) -> str:
        """Read what a process has written so far."""
        return (self.folder / f"{self.processes.index(process)}.log").read_text()

    def installation(
        self, jobs: str, *, beat: bool = False, **settings: str
    ) -> tuple[Dispatcher, list[subprocess.Popen[bytes]]]:
        """Start a worker (and beat) over a database of its own and an empty broker."""
        with self.valkey.connect() as client:
            client.flushall()
        url = self.database()
        path = self.folder / f"jobs_{self._databases}.yaml"
        path.write_text(jobs)
        environment = {
            "DISPATCHER_DATABASE_URL": url,
            "DISPATCHER_BROKER_URL": self.valkey.url,
            "DISPATCHER_JOBS": str(path),
            **settings,
        }
        celery = ("-m", "celery", "-A", "workers.app")
        options = "--pool threads --concurrency 4 --without-gossip --without-mingle"
        processes = [self.start(*celery, "worker", *options.split(), **environment)]
        if beat:
            processes.append(
                self.start(*celery, "beat", "-s", f"beat_{self._databases}", **environment)
            )
        leased = "SELECT 1 FROM dispatcher.target WHERE lease_owner IS NOT NULL"
        until(lambda: processes[0].poll() is not None or self.sql(url, leased))
        insist(processes[0].poll() is None, self.log(processes[0]))
        dispatcher = Dispatcher(
            database_url=url, broker_url=self.valkey.url, jobs=str(path), actor="bench"
        )
        return dispatcher, processes

    @staticmethod
    def sql(url: str, statement: str) -> list[tuple[object, ...]]:
        """Run one statement."""
        with psycopg.connect(plain(url), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def stop(self, *processes: subprocess.Popen[bytes]) -> None:
        """End processes."""
        for process in processes or self.processes:
            process.terminate()
        for process in processes or self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def stack() -> Iterator[Stack]:
    """Start the servers for the rows of a run, and stop all at its end."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = Stack(Path(folder))
        try:
            made.postgres.start()
            # When a row was committed is what others can see; now() is when its work began.
            made.sql(made.postgres.url("postgres"), "ALTER SYSTEM SET track_commit_timestamp = on")
            made.postgres.stop()
            made.postgres.start()
            made.valkey.start()
            yield made
        finally:
            made.stop()
            made.valkey.stop()
            made.postgres.stop()
