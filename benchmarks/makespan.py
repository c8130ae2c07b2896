"""Makespans: the dispatcher, a Celery task per chunk and a bare script, on the same provider.

Each system gets a provider of its own that has just started, and the same run times. What the
provider is (a line protocol of ours, or the emulator of a cloud) is a `Place`.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from celery import Celery

from benchmarks.figures import Cost, Figure, Run, insist
from benchmarks.provider import Client
from benchmarks.stack import Meter, Stack, cpu_seconds, family, free_port, pss_mb, until
from dispatcher import BatchState

__all__ = [
    "LONGEST",
    "Load",
    "Place",
    "Places",
    "Seen",
    "bare_script",
    "celery_tasks",
    "dispatcher_run",
    "w1j",
    "w2",
]

LONGEST = 300.0
"""Seconds after which a run is given up."""

BENCH_JOBS = """
targets:
  bench: {backend: "benchmarks.provider:BenchBackend", port: %s}
jobs:
  work: {target: bench, command: [x]}
"""


@dataclass(frozen=True)
class Load:
    """What is to be done."""

    chunks: int
    least: float
    """Seconds that a chunk runs at least, and at most."""

    most: float


@dataclass(frozen=True)
class Seen:
    """What the provider itself has counted."""

    calls: Mapping[str, int]
    ends: Mapping[str, float]
    """When each run ended, in seconds since 1970, by the name that systems notice it under."""

    cpu: float | None = None
    """Seconds that the provider itself took, where it tells them."""


class Place(Protocol):
    """A provider that runs, in a process of its own."""

    peers: str
    """The module that has the script and the Celery task for this provider."""

    address: str
    name_sql: str
    """How a row of attempt `a` and execution `e` is named there, in SQL."""

    def seen(self) -> Seen:
        """Ask what it has counted."""
        ...


Places: TypeAlias = Callable[[Stack, Load], AbstractContextManager[Place]]


class LinePlace:
    """The provider of `provider.py`."""

    peers = "benchmarks.peers"
    name_sql = "e.key"

    def __init__(self, port: int) -> None:
        self.address = str(port)

    def seen(self) -> Seen:
        """Ask what it has counted."""
        told = Client(int(self.address)).call(verb="counts")
        return Seen(told["calls"], {key: end for key, (_, end) in told["runs"].items()})

    def listens(self) -> bool:
        """Whether it has come up."""
        try:
            self.seen()
        except OSError:
            return False
        return True


@contextmanager
def line_place(stack: Stack, load: Load) -> Iterator[Place]:
    """Start the provider of `provider.py`."""
    place = LinePlace(free_port())
    bounds = (str(load.least), str(load.most))
    process = stack.start("-m", "benchmarks.provider", place.address, *bounds)
    until(place.listens, 10)
    try:
        yield place
    finally:
        stack.stop(process)


def w1j(stack: Stack) -> Iterator[Figure]:
    """200 chunks of 15 to 25 s, one launch each, on a backend that takes 50 ms a call."""
    runs = _three(stack, Load(200, 15.0, 25.0))
    ours = runs["ours"]
    yield _against_floor("W1j: makespan", runs, 1.15)
    yield Figure("W1j: lag p95", ours.p95, "s", 1.5)
    yield Figure("W1j: calls per chunk", ours.calls_per_chunk, "calls", 1.3)
    yield Figure("W1j: PSS of worker + beat + Valkey", ours.cost.pss, "MB", 200.0)


def w2(stack: Stack) -> Iterator[Figure]:
    """1,000 chunks of 5 s, one launch each, on a backend that takes 50 ms a call."""
    yield _against_floor("W2: makespan", _three(stack, Load(1000, 5.0, 5.0)), 1.35)


def _three(stack: Stack, load: Load) -> dict[str, Run]:
    runs = {}
    with line_place(stack, load) as place:
        runs["floor"] = bare_script(stack, place, load)
    with line_place(stack, load) as place:
        runs["celery"] = celery_tasks(stack, place, load)
    with line_place(stack, load) as place:
        jobs = BENCH_JOBS % place.address
        runs["ours"] = dispatcher_run(stack, place, load, jobs, DISPATCHER_LAUNCH_CONCURRENCY="64")
    return runs


def _against_floor(what: str, runs: Mapping[str, Run], bar: float) -> Figure:
    note = "".join(f"\n      {name + ':':<8}{run}" for name, run in runs.items())
    return Figure(what, runs["ours"].makespan / runs["floor"].makespan, "x floor", bar, note=note)


def bare_script(stack: Stack, place: Place, load: Load, *how: str) -> Run:
    """Run the script that launches all at once and lists once a second."""
    process = stack.start("-m", place.peers, place.address, str(load.chunks), *how)
    meter = Meter([process.pid])
    process.wait(LONGEST)
    cost = meter.close()
    answer = _answer(stack, process)
    # Counted by itself: the time that its imports took is not in it, as for the others.
    return _run(place, answer, Cost(answer["cpu"], cost.rss, cost.pss))


def celery_tasks(stack: Stack, place: Place, load: Load) -> Run:
    """Run a Celery task per chunk that launches and then polls itself, prefork 8."""
    with stack.valkey.connect() as client:
        client.flushall()
    server = stack.valkey.process
    assert server is not None
    broker = stack.valkey.url
    environment = {"PEERS_BROKER": broker, "PEERS_RESULTS": broker}
    options = ["worker", "-P", "prefork", "-c", "8"]
    worker = stack.start("-m", "celery", "-A", place.peers, *options, **environment)
    control = Celery(broker=broker).control
    until(lambda: control.ping(timeout=0.5), 60)
    script = (
        "import json, sys, time\n"
        f"from {place.peers} import chunk\n"
        "address, chunks = sys.argv[1], int(sys.argv[2])\n"
        "began = time.time()\n"
        "sent = [chunk.delay(address, f'k{n}') for n in range(chunks)]\n"
        "print(json.dumps({'began': began, 'noticed': dict(s.get(timeout=300) for s in sent)}))\n"
    )
    meter = Meter([worker.pid, server.pid])
    driver = stack.start("-c", script, place.address, str(load.chunks), **environment)
    driver.wait(LONGEST + 100)
    cost = meter.close()
    stack.stop(worker)
    return _run(place, _answer(stack, driver), cost)


def dispatcher_run(stack: Stack, place: Place, load: Load, jobs: str, **settings: str) -> Run:
    """Run a batch of the job `work` on one worker, with beat."""
    dispatcher, processes = stack.installation(jobs, beat=True, **settings)
    server, postgres = stack.valkey.process, stack.postgres.process
    assert server is not None
    assert postgres is not None
    time.sleep(2)
    meter = Meter([*(process.pid for process in processes), server.pid])
    database_before = cpu_seconds(family(postgres.pid))
    began = time.time()
    batch = dispatcher.enqueue("work", range(load.chunks)).wait(LONGEST)
    cost = meter.close()
    spent = cpu_seconds(family(postgres.pid)) - database_before
    apart = f"Postgres apart: CPU {spent:.1f} s, PSS {pss_mb(family(postgres.pid)):.0f} MB"
    insist(batch.state is BatchState.SUCCEEDED, batch)
    rows = stack.sql(
        dispatcher.settings.database_url,
        f"SELECT {place.name_sql}, "  # noqa: S608 - ours
        " extract(epoch FROM pg_xact_commit_timestamp(a.xmin))::float8"
        " FROM dispatcher.attempt a JOIN dispatcher.execution e ON e.id = a.execution_id",
    )
    stack.stop(*processes)
    dispatcher.close()
    noticed = {str(name): float(str(at)) for name, at in rows}
    found = Cost(cost.cpu, cost.rss, cost.pss, apart)
    return _run(place, {"began": began, "noticed": noticed}, found)


def _answer(stack: Stack, process: Any) -> dict[str, Any]:
    """Read the last line that a driver printed."""
    lines = stack.log(process).splitlines()
    insist(process.returncode == 0 and lines, "\n".join(lines[-20:]))
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _run(place: Place, answer: Mapping[str, Any], cost: Cost) -> Run:
    """Put together what a system says with what the provider says."""
    seen, noticed = place.seen(), answer["noticed"]
    insist(noticed.keys() == seen.ends.keys(), "runs there and runs noticed are not the same")
    lags = [noticed[name] - end for name, end in seen.ends.items()]
    remarks = [] if seen.cpu is None else [f"emulator apart: CPU {seen.cpu:.1f} s"]
    makespan = max(noticed.values()) - answer["began"]
    return Run(makespan, lags, Counter(seen.calls), cost, remarks)
