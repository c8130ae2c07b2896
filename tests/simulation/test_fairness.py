"""A small batch does not wait for a big one that came before it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from workbench import Bench, job

from dispatcher.client import Batch

TICK = 0.5
SLOTS = 20


@pytest.fixture
def bench(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    numbers = itertools.count()  # run times are drawn from the keys: let them be the same each time
    monkeypatch.setattr("dispatcher.engine.launcher.new_key", lambda _batch: f"d-{next(numbers)}")
    jobs = (job("single"), job("packed", options={"max_tasks": 4, "parallelism": 4}))
    made = Bench(
        database_url,
        jobs,
        limits={"max_running": SLOTS},
        settings={"task_seconds": (4.0, 6.0)},
    )
    yield made
    made.close()


def seconds(bench: Bench, batch: Batch) -> float:
    """Tell how long a batch takes, by the clock of the database."""
    done = bench.finish(batch, step=TICK, turns=400)
    assert done.state == "succeeded"
    assert done.finished_at is not None
    return (done.finished_at - done.created_at).total_seconds()


@pytest.mark.parametrize("name", ["single", "packed"])
def test_ten_chunks_behind_ten_thousand_take_at_most_twice_their_time_alone(
    bench: Bench, name: str
) -> None:
    alone = seconds(bench, bench.enqueue(range(10), "single"))
    big = bench.enqueue(range(10_000), name)
    ratios = []
    for _ in range(2):
        for _ in range(25):  # the big one fills all slots, and its tasks end at all times
            bench.turn(TICK)
        assert bench.world.running() > SLOTS / 2
        ratios.append(seconds(bench, bench.enqueue(range(10), "single")) / alone)
    assert max(ratios) <= 2.0, ratios
    assert bench.world.peak_running() <= SLOTS
    assert big.refresh().state == "running"
