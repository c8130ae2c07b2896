"""Cloud Run rows: the real client library over gRPC against the emulator, 50 ms a call, no quotas.

All systems of a row get an emulator of their own that has just started. Ours runs with the target's
`launches_per_minute` and `reads_per_minute` raised beyond what a row can use and `poll_interval`
1 s, as the floor looks once a second too; `cloud-pack` runs with the defaults of both.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.cloud_emulator import JOB, PROJECT, REGION
from benchmarks.figures import Figure, Run, insist
from benchmarks.makespan import Load, Place, Seen, bare_script, celery_tasks, dispatcher_run
from benchmarks.stack import Stack

__all__ = ["ROWS"]

JOBS = """
targets:
  bench: {backend: cloud_run, project: %(project)s, region: %(region)s, endpoint: "%(endpoint)s",
          insecure: true%(more)s}
jobs:
  work: {target: bench, timeout: 10m, options: {job: %(job)s, max_tasks: %(max_tasks)d}}
"""

RAISED = ", launches_per_minute: 100000, reads_per_minute: 100000, poll_interval: 1s"
"""What no project is given; with real quotas launches alone take minutes (docs/benchmarks.md)."""

FOLLOWED = RAISED + ", tasks_interval: 2s"
"""Packed: the ends within an execution are looked for every 2 s and not every 30 s."""


class CloudPlace:
    """Cloud Run's emulator."""

    peers = "benchmarks.cloud_peers"
    name_sql = "e.handle || '/' || a.task_index"

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        insist(line, "the emulator has ended")
        return line

    def seen(self) -> Seen:
        """Ask what it has counted; further pages of a list are apart."""
        assert self._process.stdin is not None
        self._process.stdin.write("tell\n")
        self._process.stdin.flush()
        told = json.loads(self._line())
        insist(not told["refused"], f"{told['refused']} calls were refused")
        calls = {_verb(method): number for method, number in told["calls"].items()}
        for method, number in told["pages"].items():
            calls[_verb(method)] -= number
            calls[f"{_verb(method)} further pages"] = number
        return Seen(calls, told["ends"], told["cpu"])


def _verb(method: str) -> str:
    return method.rpartition(".")[2]


@contextmanager
def cloud_place(load: Load) -> Iterator[Place]:
    """Start the emulator in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cloud_emulator", str(load.least), str(load.most)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    with process:
        try:
            yield CloudPlace(process)
        finally:
            process.terminate()


def _ours(stack: Stack, load: Load, max_tasks: int, more: str) -> Run:
    storage = stack.folder / "storage"
    storage.mkdir(exist_ok=True)
    with cloud_place(load) as place:
        jobs = JOBS % {
            "project": PROJECT,
            "region": REGION,
            "job": JOB,
            "endpoint": place.address,
            "max_tasks": max_tasks,
            "more": more,
        }
        return dispatcher_run(
            stack,
            place,
            load,
            jobs,
            DISPATCHER_LAUNCH_CONCURRENCY="64",
            DISPATCHER_STORAGE_URL=f"file://{storage}",
        )


def _all(stack: Stack, load: Load, pack: int) -> dict[str, Run]:
    """Run the floor, the Celery tasks, and ours with a launch per chunk and packed."""
    runs = {}
    with cloud_place(load) as place:
        runs["floor"] = bare_script(stack, place, load)
    with cloud_place(load) as place:
        runs["celery"] = celery_tasks(stack, place, load)
    runs["ours"] = _ours(stack, load, 1, RAISED)
    runs["packed"] = _ours(stack, load, pack, FOLLOWED)
    return runs


def _note(runs: Mapping[str, Run]) -> str:
    floor = runs["floor"].makespan
    lines = [
        f"\n      {name + ':':<8}{run}; {run.makespan / floor:.2f} x floor"
        for name, run in runs.items()
    ]
    return "".join(lines)


def w1j(stack: Stack) -> Iterator[Figure]:
    """200 chunks of 15 to 25 s, one launch each, and packed in one execution."""
    runs = _all(stack, Load(200, 15.0, 25.0), 200)
    floor, celery, ours, packed = runs["floor"], runs["celery"], runs["ours"], runs["packed"]
    ratio = ours.makespan / floor.makespan
    yield Figure("Cloud Run W1j: makespan", ratio, "x floor", 1.15, note=_note(runs))
    yield Figure("  the same beside Celery", ours.makespan / celery.makespan, "x celery", 1.0)
    yield Figure("  lag p95", ours.p95, "s", 2.0, note=f"celery {celery.p95:.2f} s")
    yield Figure("  calls per chunk", ours.calls_per_chunk, "calls", 1.3)
    yield Figure("  PSS of worker + beat + Valkey", ours.cost.pss, "MB", 250.0)
    yield Figure("  packed: makespan", packed.makespan / floor.makespan, "x floor", 1.15)
    yield Figure("  packed: lag p95", packed.p95, "s", 4.0, note="tasks_interval 2 s")
    yield Figure("  packed: calls per chunk", packed.calls_per_chunk, "calls", 0.3)


def w2(stack: Stack) -> Iterator[Figure]:
    """1,000 chunks of 5 s, one launch each, and packed in four executions."""
    runs = _all(stack, Load(1000, 5.0, 5.0), 250)
    floor, celery, ours, packed = runs["floor"], runs["celery"], runs["ours"], runs["packed"]
    ratio = ours.makespan / floor.makespan
    yield Figure("Cloud Run W2: makespan", ratio, "x floor", 1.5, note=_note(runs))
    yield Figure("  the same beside Celery", ours.makespan / celery.makespan, "x celery", 1.0)
    yield Figure("  calls per chunk", ours.calls_per_chunk, "calls", 1.3)
    yield Figure("  packed: makespan", packed.makespan / floor.makespan, "x floor", 1.35)
    yield Figure("  packed: calls per chunk", packed.calls_per_chunk, "calls", 0.1)


def pack(stack: Stack) -> Iterator[Figure]:
    """10,000 chunks of 10 to 20 s in one execution, with the target's default budgets of calls."""
    load = Load(10_000, 10.0, 20.0)
    with cloud_place(load) as place:
        floor = bare_script(stack, place, load, "packed")
    ours = _ours(stack, load, load.chunks, ", max_running: 10000")
    calls = ours.calls
    reads = calls["GetExecution"] + calls["ListExecutions"]
    tasks = calls["ListTasks"] + calls["ListTasks further pages"]
    runs = {"floor": floor, "ours": ours}
    ratio = ours.makespan / floor.makespan
    yield Figure("Cloud Run, a pack of 10,000: makespan", ratio, "x floor", 1.6, note=_note(runs))
    yield Figure("  launch calls", calls["RunJob"], "calls", 1.0)
    yield Figure("  reads of the execution", reads, "calls", 1.0 + ours.makespan / 5.0)
    yield Figure("  pages of its tasks", tasks, "pages", 45.0, note="20 hold them all")


ROWS = {"cloud-w1j": w1j, "cloud-w2": w2, "cloud-pack": pack}
