"""Five hundred launches on a Cloud Run that loses replies, under workers that are killed.

The workers are real ones on a real broker and database; only Cloud Run is the emulator, in this
process, so that what it has run can be compared with what was recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

import pytest
from launch_once import (
    LATEST,
    LAUNCHES,
    LONGEST,
    SEED,
    assert_all_struck,
    hurry,
    kill_every_second,
    misbehave,
    staff,
)

from dispatcher import BatchState
from dispatcher.emulators.cloud_run import CloudRunEmulator, EmulatorOptions, TaskStart
from installation import Nursery, Site

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
    call_timeout: 4s
    find_grace: 6s
    poll_interval: 1s
jobs:
  etl:
    target: cloud
    options: {job: etl}
    retry: {attempts: 1, infrastructure_attempts: 3, initial: 1s}
"""


@pytest.fixture
def emulator() -> Iterator[CloudRunEmulator]:
    def script(start: TaskStart) -> float:
        chunk = int(start.env["DISPATCH_CHUNK"])
        return LONGEST if chunk == 0 else 0.5 + chunk % 5 / 2

    with CloudRunEmulator(
        script=script, options=EmulatorOptions(page_size=500, seed=SEED)
    ) as emulator:
        emulator.world.define("project-1", "europe-west1", "etl")
        yield emulator


@pytest.mark.long
@pytest.mark.timeout(700)
def test_lost_replies_and_killed_workers_start_nothing_twice_and_lose_nothing(
    site: Site, emulator: CloudRunEmulator
) -> None:
    site.write_jobs(JOBS.replace("ENDPOINT", emulator.grpc_address))
    hurry(site)
    misbehave(emulator, list_lag=5.0)
    nursery = Nursery(site)
    try:
        workers = staff(nursery)
        with site.dispatcher() as dispatcher:
            batch = dispatcher.enqueue("etl", range(LAUNCHES))
            toll = kill_every_second(site, nursery, workers, emulator, batch)
            batch = batch.wait(LATEST)
            chunks = list(dispatcher.chunks(batch.id))
    except BaseException:
        print(site.logs())  # noqa: T201 - shown by pytest where it failed
        raise
    finally:
        nursery.close()
    executed = [one.name for one in emulator.world.executed]
    rows = site.sql("SELECT handle, state, stray, calls FROM dispatcher.execution")
    work = Counter(start.env["DISPATCH_CHUNK"] for start in emulator.world.starts)
    figures = assert_all_struck(emulator, toll)
    assert work == {str(index): 1 for index in range(LAUNCHES)}, figures
    assert sorted(executed) == sorted(str(h) for h, *_ in rows if h is not None), figures
    assert {(state, stray) for _, state, stray, _ in rows} == {("ended", False)}
    assert batch.state is BatchState.SUCCEEDED
    # Five calls in a row that came to nothing end an attempt: once in fifty runs of this test.
    others = [a.outcome for c in chunks for a in c.attempts if a.outcome != "succeeded"]
    assert len(others) <= 2, "none of it costs an attempt"
    assert set(others) <= {"start_failed"}
    print(f"\n{figures}")  # noqa: T201 - shown to who runs it with -s
