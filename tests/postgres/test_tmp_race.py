"""Claims: of two executions of one key, the one that does the work is followed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from workbench import HERE, Bench, job

from dispatcher.client import Batch
from dispatcher.errors import Unreachable
from dispatcher.states import Outcome
from dispatcher.storage import Storage
from dispatcher.testing import Ending, Fault

MakeBench = Callable[..., Bench]


class Flaky(Storage):
    """A storage that does not answer for a while."""

    down = False

    def read(self, path: str, most: int) -> bytes | None:
        if self.down and path.startswith("claims/"):
            raise Unreachable("timed out")
        return super().read(path, most)


@pytest.fixture
def storage(tmp_path: Path) -> Flaky:
    return Flaky(f"file://{tmp_path}/store")


def doubled(make_bench: MakeBench, storage: Storage) -> tuple[Bench, Batch, str, str, str]:
    """Have one key launched twice: its record appears only after the relaunch.

    The bench, the batch, the key, the first handle, which nobody knows, and the second, followed.
    """
    bench = make_bench(
        job(retry={"attempts": 1}),
        settings={"relaunch_safe": False, "find_grace": "5s"},
        storage=storage,
    )
    bench.script(seconds=1000)
    batch = bench.enqueue([1])
    bench.plan()
    bench.world.fail_next("launch", Fault.REPLY_LOST)
    bench.world.find_lag = timedelta(hours=1)
    bench.launch()
    bench.until(lambda: len(bench.world.requests()) == 2, "it was launched twice", step=5)
    bench.world.find_lag = timedelta(0)
    (request, _) = bench.world.requests()
    assert request.claim_uri == storage.uri(f"claims/{request.key}")
    handles = [f"{request.key}.1", f"{request.key}.2"]
    assert bench.sql("SELECT handle FROM dispatcher.execution") == [handles[1]]
    return bench, batch, request.key, handles[0], handles[1]


def end(bench: Bench, handle: str, outcome: Outcome, exit_code: int) -> None:
    """Have what runs under a handle end now."""
    execution = bench.world._executions[handle]
    execution.runs[0].ending = Ending(outcome, exit_code=exit_code)
    execution.runs[0].end = bench.world._now()



def test_race(make_bench: MakeBench, storage: Flaky) -> None:
    bench, batch, key, first, second = doubled(make_bench, storage)
    bench.engine.sweep_strays(HERE)
    print(bench.sql("SELECT handle, state, stray, cancel_kind FROM dispatcher.execution ORDER BY id"))
    # the provider has accepted nothing yet; the first starts now and claims
    print("claim", storage.read(f"claims/{key}", 99))
    won = storage.create(f"claims/{key}", first.encode())
    print("first won:", won)
    if won:
        bench.follow()
        print("now", bench.at)
        end(bench, second, Outcome.FAILED, 94); print({k:(v.runs[0].end, v.runs[0].ending.exit_code) for k,v in bench.world._executions.items()}, bench.world._now()); print(bench.world.poll([first,second], bench.config.targets[HERE].settings))
    orig=bench.engine._poller._follow_winner
    def spy(place, one, report, now):
        r=orig(place, one, report, now); print("spy", one.handle[-1], report.phase, report.tasks, r); return r
    bench.engine._poller._follow_winner=spy
    for i in range(10):
        bench.turn(31)
        print(i, bench.sql("SELECT handle, state, cancel_kind FROM dispatcher.execution ORDER BY id"))
        if batch.refresh().finished: break
    batch = batch.refresh()
    print(batch.state, batch.reason)
    print(bench.sql("SELECT handle, state, stray, cancel_kind, reason FROM dispatcher.execution ORDER BY id"))
    print([ (a.outcome, a.reason) for c in bench.dispatcher.chunks(batch.id) for a in c.attempts])
    for e in bench.dispatcher.events(batch.id): print(e.kind, e.old, e.new, e.reason)
