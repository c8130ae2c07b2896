"""The rows: each measures one thing of ours and its baseline, and says what the bar is."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.provider import Client
from benchmarks.stack import Peak, Stack, cpu_seconds, family, free_port, pss_mb, until
from dispatcher import BatchState, Dispatcher


@dataclass(frozen=True)
class Figure:
    """One measured number beside its bar."""

    what: str
    measured: float
    unit: str
    bar: float
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the bar is met."""
        return self.measured >= self.bar if self.at_least else self.measured <= self.bar


NULL_JOBS = """
targets:
  fake: {backend: "null", page_size: 100%(more)s}
jobs:
  work:
    target: fake
    command: [x]
    options: {max_tasks: %(max_tasks)d, parallelism: %(max_tasks)d}
"""


def plain(url: str) -> str:
    """Write a URL as psycopg takes it."""
    return url.replace("postgresql+psycopg:", "postgresql:", 1)


def enqueue(stack: Stack) -> Iterator[Figure]:
    """Enqueue 100 inline items, beside a bare INSERT + COMMIT of the same bytes."""
    url = stack.database()
    jobs = stack.folder / "enqueue.yaml"
    jobs.write_text(NULL_JOBS % {"more": "", "max_tasks": 1})
    items = [{"id": n, "name": f"table_{n}"} for n in range(100)]
    text = json.dumps(items)
    ours, bare = [], []
    with (
        Dispatcher(database_url=url, broker_url=stack.valkey.url, jobs=str(jobs)) as dispatcher,
        psycopg.connect(plain(url)) as connection,
    ):
        connection.execute("CREATE TABLE bare (id bigint GENERATED ALWAYS AS IDENTITY, items json)")
        connection.commit()
        for turn in range(330):
            began = time.perf_counter()
            connection.execute("INSERT INTO bare (items) VALUES (%s)", (text,))
            connection.commit()
            middle = time.perf_counter()
            dispatcher.enqueue("work", items)
            ended = time.perf_counter()
            if turn >= 30:
                bare.append(middle - began)
                ours.append(ended - middle)
    base, mine = statistics.median(bare), statistics.median(ours)
    note = f"p50 {mine * 1e3:.2f} ms, bare INSERT + COMMIT {base * 1e3:.2f} ms"
    yield Figure("enqueue of 100 inline items", mine / base, "x bare", 3.0, note=note)


def plan(stack: Stack) -> Iterator[Figure]:
    """Plan 1,000,000 items from JSONL into 10,000 chunks, beside reading and COPYing them bare."""
    url = stack.database()
    path = stack.folder / "items.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"id": {n}, "name": "row {n}"}}\n' for n in range(1_000_000))
    jobs = stack.folder / "plan.yaml"
    jobs.write_text(NULL_JOBS % {"more": "", "max_tasks": 1})
    with psycopg.connect(plain(url)) as connection:
        connection.execute(
            "CREATE TABLE bare (batch text, index int, items json, PRIMARY KEY (batch, index))"
        )
        connection.commit()
        bare = min(_copy_bare(connection, path, turn) for turn in range(3))
    script = (
        "import sys, time\n"
        "from dispatcher import Dispatcher\n"
        "from dispatcher.engine import Engine\n"
        "from dispatcher.schema import create_engine\n"
        "from dispatcher.store import Store\n"
        "url, jobs, items = sys.argv[1:]\n"
        "d = Dispatcher(database_url=url, jobs=jobs)\n"
        "e = Engine(Store(create_engine(url), actor='bench'), d.config)\n"
        "e.plan(d.enqueue('work', [1]).id)\n"
        "times = []\n"
        "def memory(name):\n"
        "    lines = open('/proc/self/status')\n"
        "    return int(next(x for x in lines if x.startswith(name)).split()[1])\n"
        "open('/proc/self/clear_refs', 'w').write('5')  # the high-water mark begins anew\n"
        "before = memory('VmRSS')\n"
        "for _ in range(3):\n"
        "    b = d.enqueue('work', 'file://' + items, chunk_size=100)\n"
        "    t = time.perf_counter(); e.plan(b.id); times.append(time.perf_counter() - t)\n"
        "    assert b.refresh().chunk_count == 10000\n"
        "print(min(times), (memory('VmHWM') - before) / 1024)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, url, str(jobs), str(path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    ours, grown = map(float, answer)
    note = f"{ours:.2f} s, bare {bare:.2f} s"
    yield Figure("plan 1,000,000 items into 10,000 chunks", ours / bare, "x bare", 3.0, note=note)
    yield Figure("  its memory grows", grown, "MB", 64.0)


def _copy_bare(connection: psycopg.Connection, path: Path, turn: int) -> float:
    began = time.perf_counter()
    with (
        path.open() as file,
        connection.cursor() as cursor,
        cursor.copy("COPY bare FROM STDIN") as copy,
    ):
        for index in range(10_000):
            items = "[" + ",".join(file.readline()[:-1] for _ in range(100)) + "]"
            copy.write_row((str(turn), index, items))
    connection.commit()
    return time.perf_counter() - began


def throughput(stack: Stack) -> Iterator[Figure]:
    """Run chunks that end at once on one worker, packed and one by one."""
    for chunks, pack, bar, unit in ((10_000, 100, 1000.0, "chunks/s"), (3_000, 1, 200.0, "exec/s")):
        jobs = NULL_JOBS % {"more": "", "max_tasks": pack}
        dispatcher, processes = stack.installation(jobs, DISPATCHER_LAUNCH_CONCURRENCY="32")
        dispatcher.enqueue("work", [1]).wait(30)
        began = time.perf_counter()
        cpu = cpu_seconds(family(processes[0].pid))
        batch = dispatcher.enqueue("work", range(chunks)).wait(300)
        seconds = time.perf_counter() - began
        cpu = cpu_seconds(family(processes[0].pid)) - cpu
        _insist(batch.state is BatchState.SUCCEEDED, batch)
        stack.stop(*processes)
        dispatcher.close()
        what = f"{chunks} chunks, {pack} an execution, one worker"
        note = f"{seconds:.2f} s, worker CPU {cpu:.1f} s"
        yield Figure(what, chunks / seconds, unit, bar, at_least=True, note=note)


def in_flight(stack: Stack) -> Iterator[Figure]:
    """Follow 10,000 executions that run, polled every 5 s in pages of 100."""
    more = ", task_seconds: [3600, 3600], reads_per_minute: 1200"
    dispatcher, processes = stack.installation(
        NULL_JOBS % {"more": more, "max_tasks": 1}, DISPATCHER_LAUNCH_CONCURRENCY="64"
    )
    batch = dispatcher.enqueue("work", range(10_000))
    until(lambda: batch.refresh().counts.get("running") == 10_000, 300)  # type: ignore[call-overload]  # states are text
    time.sleep(15)
    worker = processes[0]
    before = cpu_seconds(family(worker.pid))
    time.sleep(30)
    share = (cpu_seconds(family(worker.pid)) - before) / 30 * 100
    memory = pss_mb(family(worker.pid))
    stack.stop(*processes)
    dispatcher.close()
    yield Figure("10,000 executions in flight, polled every 5 s", share, "% core", 10.0)
    yield Figure("  memory of the worker (PSS)", memory, "MB", 150.0)


def idle(stack: Stack) -> Iterator[Figure]:
    """Measure a worker with nothing to do."""
    dispatcher, processes = stack.installation(NULL_JOBS % {"more": "", "max_tasks": 1})
    time.sleep(5)
    before = cpu_seconds(family(processes[0].pid))
    time.sleep(30)
    share = (cpu_seconds(family(processes[0].pid)) - before) / 30 * 100
    memory = pss_mb(family(processes[0].pid))
    stack.stop(*processes)
    dispatcher.close()
    yield Figure("idle worker and clock", share, "% core", 2.0)
    yield Figure("  memory (PSS)", memory, "MB", 100.0)


BENCH_JOBS = """
targets:
  bench: {backend: "benchmarks.provider:BenchBackend", port: %(port)d}
jobs:
  work: {target: bench, command: [x]}
"""


@dataclass
class Run:
    """What one system made of the load."""

    makespan: float
    lags: list[float]
    calls: float
    cpu: float
    pss: float
    apart: str = ""

    @property
    def p95(self) -> float:
        """The lag from end to recorded that 95 % stay within, in seconds."""
        return statistics.quantiles(self.lags, n=20)[-1]

    def __str__(self) -> str:
        return (
            f"makespan {self.makespan:.1f} s, lag p95 {self.p95:.2f} s, "
            f"calls/chunk {self.calls:.2f}, CPU {self.cpu:.1f} s, PSS {self.pss:.0f} MB{self.apart}"
        )


def w1j(stack: Stack) -> Iterator[Figure]:
    """200 chunks of 15 to 25 s, one launch each, on a backend that takes 50 ms a call."""
    yield from _makespan(stack, "W1j", 200, (15.0, 25.0), 1.15, full=True)


def w2(stack: Stack) -> Iterator[Figure]:
    """1,000 chunks of 5 s, one launch each, on a backend that takes 50 ms a call."""
    yield from _makespan(stack, "W2", 1000, (5.0, 5.0), 1.35, full=False)


def _makespan(
    stack: Stack, name: str, chunks: int, bounds: tuple[float, float], bar: float, *, full: bool
) -> Iterator[Figure]:
    runs: dict[str, Run] = {}
    for system in (_floor, _celery, _ours):
        port = free_port()
        provider = stack.start("-m", "benchmarks.provider", str(port), *map(str, bounds))
        until(lambda port=port: _listens(port), 10)
        runs[system.__name__] = system(stack, port, chunks)
        stack.stop(provider)
    ours, bare, peer = runs["_ours"], runs["_floor"], runs["_celery"]
    note = f"\n      ours:   {ours}\n      celery: {peer}\n      floor:  {bare}"
    yield Figure(f"{name}: makespan", ours.makespan / bare.makespan, "x floor", bar, note=note)
    if full:
        yield Figure(f"{name}: lag p95", ours.p95, "s", 1.5)
        yield Figure(f"{name}: calls per chunk", ours.calls, "calls", 1.3)
        yield Figure(f"{name}: PSS of worker + beat + Valkey", ours.pss, "MB", 200.0)


def _listens(port: int) -> bool:
    try:
        Client(port).call(verb="counts")
    except OSError:
        return False
    return True


def _result(port: int, began: float, noticed: dict[str, float], cpu: float, pss: float) -> Run:
    counts: dict[str, Any] = Client(port).call(verb="counts")
    lags = [noticed[key] - end for key, (_, end) in counts["runs"].items()]
    calls = sum(counts["calls"].values()) / len(lags)
    return Run(max(noticed.values()) - began, lags, calls, cpu, pss)


def _floor(stack: Stack, port: int, chunks: int) -> Run:
    process = stack.start("-m", "benchmarks.peers", str(port), str(chunks))
    peak = Peak([process.pid])
    process.wait(300)
    pss = peak.close()
    log = stack.folder / f"{stack.processes.index(process)}.log"
    answer = json.loads(log.read_text().splitlines()[-1])
    return _result(port, answer["began"], answer["noticed"], answer["cpu"], pss)


def _celery(stack: Stack, port: int, chunks: int) -> Run:
    with stack.valkey.connect() as client:
        client.flushall()
    server = stack.valkey.process
    _insist(server is not None, "valkey")
    broker = stack.valkey.url
    environment = {"PEERS_BROKER": broker, "PEERS_RESULTS": broker}
    worker = stack.start(
        "-m",
        "celery",
        "-A",
        "benchmarks.peers",
        "worker",
        "-P",
        "prefork",
        "-c",
        "8",
        **environment,
    )
    script = (
        "import json, sys, time\n"
        "from benchmarks.peers import app, chunk\n"
        "until = time.time() + 30\n"
        "while not app.control.ping(timeout=0.5):\n"
        "    assert time.time() < until\n"
        "began = time.time()\n"
        "sent = [chunk.delay(int(sys.argv[1]), f'k{n}') for n in range(int(sys.argv[2]))]\n"
        "print(json.dumps({'began': began, 'noticed': dict(s.get(timeout=300) for s in sent)}))\n"
    )
    driver = stack.start("-c", script, str(port), str(chunks), **environment)
    roots = [worker.pid, server.pid]
    peak = Peak(roots)
    before = cpu_seconds([p for root in roots for p in family(root)])
    driver.wait(400)
    cpu = cpu_seconds([p for root in roots for p in family(root)]) - before
    pss = peak.close()
    stack.stop(worker)
    log = stack.folder / f"{stack.processes.index(driver)}.log"
    answer = json.loads(log.read_text().splitlines()[-1])
    return _result(port, answer["began"], answer["noticed"], cpu, pss)


def _ours(stack: Stack, port: int, chunks: int) -> Run:
    dispatcher, processes = stack.installation(
        BENCH_JOBS % {"port": port}, beat=True, DISPATCHER_LAUNCH_CONCURRENCY="64"
    )
    server = stack.valkey.process
    _insist(server is not None, "valkey")
    roots = [*(process.pid for process in processes), server.pid]
    time.sleep(2)
    postgres = stack.postgres.process
    _insist(postgres is not None, "postgres")
    peak = Peak(roots)
    before = cpu_seconds([p for root in roots for p in family(root)])
    database_before = cpu_seconds(family(postgres.pid))
    began = time.time()
    batch = dispatcher.enqueue("work", range(chunks)).wait(300)
    cpu = cpu_seconds([p for root in roots for p in family(root)]) - before
    spent = cpu_seconds(family(postgres.pid)) - database_before
    apart = f"; Postgres: CPU {spent:.1f} s, PSS {pss_mb(family(postgres.pid)):.0f} MB"
    pss = peak.close()
    _insist(batch.state is BatchState.SUCCEEDED, batch)
    rows = stack.sql(
        dispatcher.settings.database_url,
        "SELECT e.key, extract(epoch FROM a.settled_at)::float8 FROM dispatcher.attempt a"
        " JOIN dispatcher.execution e ON e.id = a.execution_id",
    )
    stack.stop(*processes)
    dispatcher.close()
    noticed = {str(key): float(str(at)) for key, at in rows}
    return replace(_result(port, began, noticed, cpu, pss), apart=apart)


def _insist(right: object, what: object) -> None:
    if not right:
        raise RuntimeError(f"the measurement is void: {what}")


ROWS: dict[str, Callable[[Stack], Iterator[Figure]]] = {
    "enqueue": enqueue,
    "plan": plan,
    "throughput": throughput,
    "in-flight": in_flight,
    "idle": idle,
    "w1j": w1j,
    "w2": w2,
}

__all__ = ["ROWS", "Figure"]
