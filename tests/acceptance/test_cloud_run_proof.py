"""Five hundred launches on a Cloud Run that loses replies, under workers that are killed.

The workers are real ones on a real broker and database; only Cloud Run is the emulator, in this
process, so that what it has run can be compared with what was recorded.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from threading import Event
from typing import Final

import pytest

from dispatcher import BatchState
from dispatcher.emulators.cloud_run import CloudRunEmulator, EmulatorOptions, TaskStart
from dispatcher.emulators.cloud_run.faults import lose_reply, refuse, stale_lists
from installation import Nursery, Site, until

JOBS: Final = """
targets:
  cloud:
    backend: cloud_run
    project: project-1
    region: europe-west1
    endpoint: ENDPOINT
    insecure: true
    max_running: 1000
    launches_per_minute: 60000
    reads_per_minute: 60000
    writes_per_minute: 60000
    call_timeout: 2s
    find_grace: 6s
    poll_interval: 1s
jobs:
  etl:
    target: cloud
    options: {job: etl}
    retry: {attempts: 1, infrastructure_attempts: 3, initial: 1s}
"""

LAUNCHES: Final = 500
WORKERS: Final = 4
LONGEST: Final = 25.0
"""Seconds in which a worker is killed every second."""

MANY: Final = 40
"""Launch calls since the last kill that tell of a round of them which is under way."""

IN_FLIGHT: Final = 2
"""Kills that are to meet a worker with its launch calls open; the others come when they come."""


def launching(site: Site, pids: list[int]) -> int | None:
    """Find a worker that has launch calls open at this moment."""
    names = site.sql("SELECT DISTINCT worker FROM dispatcher.execution WHERE state = 'intended'")
    found = {int(str(name).split("-")[-2]) for (name,) in names}
    return next(iter(found & set(pids)), None)


@pytest.fixture
def emulator() -> Iterator[CloudRunEmulator]:
    def script(start: TaskStart) -> float:
        return 0.5 + int(start.env["DISPATCH_CHUNK"]) % 5 / 2

    with CloudRunEmulator(
        script=script, options=EmulatorOptions(page_size=500, seed=4)
    ) as emulator:
        emulator.world.define("project-1", "europe-west1", "etl")
        yield emulator


@pytest.mark.long
@pytest.mark.timeout(180)
def test_lost_replies_and_killed_workers_start_nothing_twice_and_lose_nothing(
    site: Site, emulator: CloudRunEmulator
) -> None:
    site.write_jobs(JOBS.replace("ENDPOINT", emulator.grpc_address))
    # Shorter than in production, so that the test is: what they guard stays the same.
    site.environment |= {
        "DISPATCHER_LEASE": "1.5s",
        "DISPATCHER_HEARTBEAT": "0.5s",
        "DISPATCHER_CALL_WINDOW": "2s",
        "DISPATCHER_SWEEP_INTERVAL": "1s",
        "DISPATCHER_LAUNCH_CONCURRENCY": "160",
    }
    emulator.faults.add(
        refuse("Jobs.RunJob", code="RESOURCE_EXHAUSTED", skip=30, times=10),
        refuse("Jobs.RunJob", code="RESOURCE_EXHAUSTED", skip=120, times=10),
        refuse("Jobs.RunJob", share=0.1),
        lose_reply("Jobs.RunJob", share=0.15),
        lose_reply("Jobs.RunJob", "drop", share=0.18),
        stale_lists(5.0),
    )
    nursery = Nursery(site)
    kills = in_flight = seen = 0
    try:
        workers = [nursery.start() for _ in range(WORKERS)]
        until(lambda: nursery.alive(workers), "the workers' heartbeats")
        with site.dispatcher() as dispatcher:
            began = time.monotonic()
            batch = dispatcher.enqueue("etl", range(LAUNCHES))
            while not batch.refresh().finished and time.monotonic() - began < LONGEST:
                victim = None
                while victim is None and time.monotonic() - began < kills + 1:
                    now = emulator.calls["Jobs.RunJob"]
                    if in_flight < IN_FLIGHT and now >= seen + MANY:
                        victim = launching(site, workers)
                    Event().wait(0.03)
                in_flight += victim is not None
                seen = emulator.calls["Jobs.RunJob"]
                victim = victim or workers[kills % WORKERS]
                nursery.kill(victim)
                kills += 1
                workers[workers.index(victim)] = nursery.start()
            took = time.monotonic() - began
            batch = batch.wait(60)
            chunks = list(dispatcher.chunks(batch.id))
    except BaseException:
        print(site.logs())  # noqa: T201 - shown by pytest where it failed
        raise
    finally:
        nursery.close()
    executed = [one.name for one in emulator.world.executed]
    rows = site.sql("SELECT handle, state, stray, calls FROM dispatcher.execution")
    work = Counter(start.env["DISPATCH_CHUNK"] for start in emulator.world.starts)
    struck, calls = emulator.faults.struck, emulator.calls["Jobs.RunJob"]
    figures = f"{kills} kills, {calls} launch calls, {dict(struck)}, {took:.0f} s and more"
    assert work == {str(index): 1 for index in range(LAUNCHES)}, figures
    assert sorted(executed) == sorted(str(h) for h, *_ in rows if h is not None), figures
    assert {(state, stray) for _, state, stray, _ in rows} == {("ended", False)}
    assert batch.state is BatchState.SUCCEEDED
    # Five calls in a row that came to nothing end an attempt: once in fifty runs of this test.
    others = [a.outcome for c in chunks for a in c.attempts if a.outcome != "succeeded"]
    assert len(others) <= 2, "none of it costs an attempt"
    assert set(others) <= {"start_failed"}
    assert struck["lose_reply"] >= 0.25 * LAUNCHES, figures
    assert emulator.refused["Jobs.RunJob", "RESOURCE_EXHAUSTED"] == 20, figures
    assert kills >= 20, figures
    assert in_flight >= 1, "a launcher was killed with its calls open"
    print(f"\n{figures}")  # noqa: T201 - shown to who runs it with -s
