"""Cloud Run's emulator in a process of its own, so that its CPU is nobody's of those measured.

`python -m benchmarks.cloud_emulator LEAST MOST` prints its gRPC address, then answers each line on
standard input with one line of what it has counted, and ends with its input. Each call takes 50 ms;
no quota is imposed. Tasks only pretend to run: for seconds drawn from their place in the order of
starts, so that every system gets the same run times.
"""

from __future__ import annotations

import itertools
import json
import sys
import time

from benchmarks.provider import CALL_SECONDS, duration
from dispatcher.emulators.cloud_run import CloudRunEmulator, EmulatorOptions, TaskStart

PROJECT, REGION, JOB = "bench-project", "europe-west1", "work"
PAGE_SIZE = 1000
"""Executions or tasks on a page at most; what the real API allows is not documented."""


def main(least: float, most: float) -> None:
    """Serve until the input ends."""
    places = itertools.count()

    def script(_start: TaskStart) -> float:
        return duration(str(next(places)), least, most)

    options = EmulatorOptions(latency=CALL_SECONDS, page_size=PAGE_SIZE)
    with CloudRunEmulator(script=script, options=options) as emulator:
        emulator.world.define(PROJECT, REGION, JOB, timeout=3600)
        before = time.process_time()
        print(emulator.grpc_address, flush=True)
        for _ in sys.stdin:
            cpu = time.process_time() - before
            calls, pages = emulator.calls, emulator.pages
            told = {
                "calls": dict(calls),
                "pages": dict(pages),
                "refused": sum(emulator.refused.values()),
                "cpu": cpu,
                "ends": {
                    f"{execution.name}/{task.index}": task.ended_at
                    for execution in emulator.world.executed
                    for task in execution.tasks
                },
            }
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]))
