"""The rows of the core: each measures one thing of ours and its baseline, and has its bar."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg

from benchmarks.figures import Figure, insist, plain
from benchmarks.makespan import w1j, w2
from benchmarks.stack import Stack, cpu_seconds, family, pss_mb, until
from dispatcher import BatchState, Dispatcher

NULL_JOBS = """
targets:
  fake: {backend: "null", page_size: 100%(more)s}
jobs:
  work:
    target: fake
    command: [x]
    options: {max_tasks: %(max_tasks)d, parallelism: %(max_tasks)d}
"""


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
        insist(batch.state is BatchState.SUCCEEDED, batch)
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


ROWS: dict[str, Callable[[Stack], Iterator[Figure]]] = {
    "enqueue": enqueue,
    "plan": plan,
    "throughput": throughput,
    "in-flight": in_flight,
    "idle": idle,
    "w1j": w1j,
    "w2": w2,
}

__all__ = ["ROWS"]
