"""Real workers from the command line, on a database and a broker of the test's own."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from waiting import until

from dispatcher import Dispatcher

ROOT = Path(__file__).parents[1]


def procfile(name: str) -> list[str]:
    """The command line of a process type, exactly as it is deployed."""
    for line in (ROOT / "Procfile").read_text().splitlines():
        kind, _, command = line.partition(": ")
        if kind == name:
            program, *words = shlex.split(command)
            return [sys.executable, "-m", program, *words]
    raise AssertionError(name)


class Site:
    """One installation: a folder, a database, a broker, a jobs file and its processes."""

    def __init__(self, folder: Path, database_url: str, broker_url: str) -> None:
        self.folder = folder
        self.database_url = database_url
        self.broker_url = broker_url
        self.jobs = folder / "jobs.yaml"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("DISPATCHER_")},
            "DISPATCHER_DATABASE_URL": database_url,
            "DISPATCHER_BROKER_URL": broker_url,
            "DISPATCHER_JOBS": str(self.jobs),
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "default",
        }

    def write_jobs(self, text: str) -> None:
        self.jobs.write_text(text.replace("SPOOL", str(self.folder / "spool")))

    def dispatcher(self) -> Dispatcher:
        return Dispatcher(
            database_url=self.database_url, broker_url=self.broker_url, jobs=str(self.jobs)
        )

    def start(self, name: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a process of the Procfile; its output goes to a file in the folder."""
        log = self.folder / f"{name}-{len(self.processes)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                procfile(name),
                cwd=self.folder,
                env={**self.environment, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def worker(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start a worker and wait for its heartbeat."""
        process = self.start("worker", **environment)
        until(lambda: self.alive(process), "the worker's first heartbeat", seconds=120)
        return process

    def alive(self, process: subprocess.Popen[bytes]) -> bool:
        if process.poll() is not None:
            pytest.fail(f"a process ended with {process.returncode}:\n{self.logs()}")
        return bool(
            self.sql(
                "SELECT 1 FROM dispatcher.worker WHERE pid = %s AND stopped_at IS NULL", process.pid
            )
        )

    def sql(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        url = self.database_url.replace("postgresql+psycopg:", "postgresql:", 1)
        with psycopg.connect(url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), values)
            return cursor.fetchall() if cursor.description else []

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()


_NURSERY = """
import os, signal, sys
import celery.apps.worker, celery.bin.celery, celery.concurrency.thread, celery.events.state
import celery.worker.autoscale, celery.worker.components, celery.worker.consumer
import celery.worker.control, celery.worker.strategy, kombu.matcher, kombu.transport.redis
import dispatcher.backends.cloud_run, dispatcher.backends.local
import workers.app, workers.clock, workers.tasks
from celery.__main__ import main
workers.app.app.finalize()
born = []
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(line.strip(), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        main()
    born.append(pid)
    print(pid, flush=True)
for pid in born:
    os.waitpid(pid, 0)
"""
"""Forks workers that have everything imported: or most of the time would go into that.

The dead are kept until the end, so that no number is another process's when it is killed.
"""


class Nursery:
    """Workers as in the Procfile, that begin within a blink."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._pids: set[int] = set()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _NURSERY, *procfile("worker")[3:]],
            cwd=site.folder,
            env=site.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self) -> int:
        """Start a worker; returns its process id."""
        streams = self._process.stdin, self._process.stdout
        assert streams[0] is not None
        assert streams[1] is not None
        streams[0].write(f"{self._site.folder}/worker-{len(self._pids)}.log\n")
        streams[0].flush()
        pid = int(streams[1].readline())
        self._pids.add(pid)
        return pid

    def alive(self, pids: list[int]) -> bool:
        """Whether these have written their heartbeats."""
        here = self._site.sql("SELECT pid FROM dispatcher.worker WHERE stopped_at IS NULL")
        return {pid for (pid,) in here} >= set(pids)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self._pids.discard(pid)

    def close(self) -> None:
        for pid in list(self._pids):
            self.kill(pid)
        try:
            self._process.communicate(timeout=60)  # it buries them
        finally:
            self._process.kill()
            self._process.wait()
