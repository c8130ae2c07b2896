"""The faults under which launches are proved to happen once: replies lost, workers killed.

Five hundred launches, of which many are refused, throttled, or answered into the void; lists that
lag; and a worker killed every second. Cloud Run is the emulator, in the test's own process, so that
what it has run can be compared with what was recorded.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from threading import Event
from typing import Final

from waiting import until

from dispatcher import Batch
from dispatcher.emulators.cloud_run import CloudRunEmulator
from dispatcher.emulators.cloud_run.faults import lose_reply, refuse, stale_lists
from installation import Nursery, Site

LAUNCHES: Final = 500
WORKERS: Final = 4
KILLS: Final = 20
"""How many workers are killed, one a second, unless all has ended before."""

LONGEST: Final = KILLS + 5.0
"""Seconds that one task works: on a fast machine, too, all ends after the kills."""

LATEST: Final = 300.0
"""Seconds until all must have ended, from the last kill."""

MANY: Final = 40
"""Launch calls since the last kill that tell of a round of them which is under way."""

IN_FLIGHT: Final = 2
"""Kills that are to meet a worker with its launch calls open. The first is waited for; the others
come when they come."""

SEED: Final = 5
"""Of the emulator: it draws 30 % of lost replies or a bit more, and 10 % of refusals or more, with
any number of launch calls from 500 to 20,000."""

THROTTLED: Final = 10
"""Launches that each of the two bursts of 429 refuses."""


@dataclass
class Toll:
    """What the launches had to pass through."""

    kills: int = 0
    in_flight: int = 0
    """Kills that met a worker with launch calls open."""

    took: float = 0.0
    """Seconds in which workers were killed."""


def misbehave(emulator: CloudRunEmulator, list_lag: float) -> None:
    """Add the faults; `list_lag` is in seconds."""
    emulator.faults.add(
        refuse("Jobs.RunJob", code="RESOURCE_EXHAUSTED", skip=30, times=THROTTLED),
        refuse("Jobs.RunJob", code="RESOURCE_EXHAUSTED", skip=120, times=THROTTLED),
        refuse("Jobs.RunJob", share=0.1),
        lose_reply("Jobs.RunJob", share=0.15),
        lose_reply("Jobs.RunJob", "drop", share=0.18),
        stale_lists(list_lag),
    )


def hurry(site: Site) -> None:
    """Have the workers' times shorter than in production: what they guard stays the same."""
    site.environment |= {
        "DISPATCHER_LEASE": "1.5s",
        "DISPATCHER_HEARTBEAT": "0.5s",
        "DISPATCHER_CALL_WINDOW": "2s",
        "DISPATCHER_SWEEP_INTERVAL": "1s",
        "DISPATCHER_LAUNCH_CONCURRENCY": "100",
    }


def staff(nursery: Nursery) -> list[int]:
    """Start the workers, and wait for their heartbeats; gives their process ids."""
    workers = [nursery.start() for _ in range(WORKERS)]
    until(lambda: nursery.alive(workers), "the workers' heartbeats")
    return workers


def launching(site: Site, pids: list[int]) -> int | None:
    """Find a worker that has launch calls open at this moment."""
    names = site.sql("SELECT DISTINCT worker FROM dispatcher.execution WHERE state = 'intended'")
    found = {int(str(name).split("-")[-2]) for (name,) in names}
    return next(iter(found & set(pids)), None)


def kill_every_second(
    site: Site, nursery: Nursery, workers: list[int], emulator: CloudRunEmulator, *batches: Batch
) -> Toll:
    """Kill a worker a second, and start another, until the batches have ended or it is enough."""

    def ended() -> bool:
        return all(one.refresh().finished for one in batches)

    toll, seen = Toll(), 0
    began = due = time.monotonic()
    while toll.kills < KILLS and not ended():
        victim, due = None, due + 1
        while victim is None and (time.monotonic() < due or (not toll.in_flight and not ended())):
            now = emulator.calls["Jobs.RunJob"]
            if toll.in_flight < IN_FLIGHT and now >= seen + MANY:
                victim = launching(site, workers)
            Event().wait(0.03)
        due = max(due, time.monotonic())  # what has come late is not made up for
        toll.in_flight += victim is not None
        seen = emulator.calls["Jobs.RunJob"]
        victim = victim or workers[toll.kills % WORKERS]
        nursery.kill(victim)
        toll.kills += 1
        workers[workers.index(victim)] = nursery.start()
    toll.took = time.monotonic() - began
    return toll


def assert_all_struck(emulator: CloudRunEmulator, toll: Toll) -> str:
    """Look whether each of the faults was there, and often enough; gives the figures.

    With SEED the draws are the same each time, whatever order the calls come in.
    """
    struck, calls = emulator.faults.struck, emulator.calls["Jobs.RunJob"]
    figures = (
        f"{toll.kills} kills, {toll.in_flight} of them picked with calls open, "
        f"{calls} launch calls, {dict(struck)}, {toll.took:.0f} s and more"
    )
    throttled = emulator.refused["Jobs.RunJob", "RESOURCE_EXHAUSTED"]
    refused = struck["refuse"] - throttled
    assert throttled == 2 * THROTTLED, figures
    assert refused >= 0.09 * (calls - throttled), figures
    assert calls - struck["refuse"] >= LAUNCHES, figures
    assert struck["lose_reply"] >= 0.29 * (calls - struck["refuse"]), figures
    assert struck["stale_lists"], figures
    assert toll.kills >= 0.75 * KILLS, figures
    assert toll.in_flight >= 1, "a launcher was killed with its calls open"
    return figures
