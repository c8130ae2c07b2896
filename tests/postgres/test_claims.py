"""Claims: of two executions of one key, the one that does the work is followed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from workbench import HERE, Bench, job

from dispatcher import container
from dispatcher.backends.base import Launched
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


def test_the_winner_is_followed_when_the_tasks_of_its_double_leave(
    make_bench: MakeBench, storage: Flaky
) -> None:
    bench, batch, key, first, second = doubled(make_bench, storage)
    storage.create(f"claims/{key}", first.encode())
    end(bench, second, Outcome.FAILED, 94)
    bench.turn(31)
    assert bench.sql("SELECT handle FROM dispatcher.execution") == [first]
    assert batch.refresh().state == "running", "losing is no outcome"
    end(bench, first, Outcome.SUCCEEDED, 0)
    assert bench.finish(batch).state == "succeeded"
    (chunk,) = bench.dispatcher.chunks(batch.id)
    assert [attempt.outcome for attempt in chunk.attempts] == ["succeeded"]
    reasons = [event.reason for event in bench.dispatcher.events(batch.id) if event.reason]
    assert f"the claim belongs to {first}, and {second} has done nothing" in reasons


def test_what_looks_like_a_stray_and_holds_the_claim_is_followed(
    make_bench: MakeBench, storage: Flaky
) -> None:
    bench, batch, key, first, second = doubled(make_bench, storage)
    storage.create(f"claims/{key}", first.encode())
    bench.engine.sweep_strays(HERE)
    assert bench.sql("SELECT handle FROM dispatcher.execution") == [first]
    bench.engine.sweep_strays(HERE)
    strays = bench.sql("SELECT handle FROM dispatcher.execution WHERE stray")
    assert strays == [second], "now the other one is the stray"
    assert bench.finish(batch, step=20).state == "succeeded"


def test_a_double_that_nobody_claimed_for_is_stopped(make_bench: MakeBench, storage: Flaky) -> None:
    bench, _, key, first, second = doubled(make_bench, storage)
    storage.create(f"claims/{key}", second.encode())
    bench.engine.sweep_strays(HERE)
    assert bench.sql("SELECT handle FROM dispatcher.execution WHERE stray") == [first]


def test_while_the_claim_cannot_be_read_nothing_is_decided(
    make_bench: MakeBench, storage: Flaky
) -> None:
    bench, batch, key, first, second = doubled(make_bench, storage)
    storage.create(f"claims/{key}", first.encode())
    storage.down = True
    end(bench, second, Outcome.FAILED, 94)
    bench.turn(31)
    bench.engine.sweep_strays(HERE)
    assert batch.refresh().state == "running"
    assert bench.sql("SELECT handle FROM dispatcher.execution") == [second]
    storage.down = False
    bench.turn(31)
    assert bench.sql("SELECT handle FROM dispatcher.execution") == [first]


def test_exit_code_94_without_a_claim_is_the_programs_own(
    make_bench: MakeBench, storage: Flaky
) -> None:
    bench, batch, _, _, second = doubled(make_bench, storage)
    end(bench, second, Outcome.FAILED, 94)
    assert bench.finish(batch).state == "failed"
    (chunk,) = bench.dispatcher.chunks(batch.id)
    assert [(a.outcome, a.exit_code) for a in chunk.attempts] == [("failed", 94)]


def test_where_a_key_cannot_be_launched_twice_nothing_is_claimed(
    make_bench: MakeBench, storage: Flaky
) -> None:
    bench = make_bench(storage=storage)
    bench.enqueue([1])
    bench.turn()
    (request,) = bench.world.requests()
    assert request.claim_uri is None


def test_a_report_of_the_double_that_comes_after_the_turn_settles_nothing(
    make_bench: MakeBench, storage: Flaky
) -> None:
    bench, batch, key, first, second = doubled(make_bench, storage)
    other = bench.worker("worker-2")
    other.follow(HERE)  # it watches the second one too
    storage.create(f"claims/{key}", first.encode())
    bench.engine.sweep_strays(HERE)
    assert bench.sql("SELECT handle FROM dispatcher.execution WHERE NOT stray") == [first]
    end(bench, second, Outcome.FAILED, 94)
    bench.advance(31)
    other.follow(HERE)
    assert batch.refresh().state == "running"
    assert bench.sql("SELECT state FROM dispatcher.execution WHERE NOT stray") == ["launched"]


def test_a_double_that_ends_in_another_way_is_no_outcome_either(
    make_bench: MakeBench, storage: Flaky
) -> None:
    bench, batch, key, first, second = doubled(make_bench, storage)
    storage.create(f"claims/{key}", first.encode())
    end(bench, second, Outcome.FAILED, 75)
    bench.turn(31)
    assert bench.sql("SELECT handle FROM dispatcher.execution") == [first]
    assert batch.refresh().state == "running"
    assert len(bench.world.requests()) == 2


@pytest.mark.parametrize("rubbish", [b"x\0y", b"../..", b"", b"two words", b"x" * 100_000])
def test_rubbish_in_a_claim_is_no_claim_and_holds_up_nothing(
    make_bench: MakeBench, storage: Flaky, rubbish: bytes
) -> None:
    bench, batch, key, _, second = doubled(make_bench, storage)
    storage.create(f"claims/{key}", rubbish)
    end(bench, second, Outcome.FAILED, 94)
    healthy = bench.enqueue([1], "work")
    bench.script(seconds=0)
    assert bench.finish(batch).state == "failed"
    assert healthy.refresh().state in ("running", "succeeded")


def test_a_late_answer_that_names_the_winner_is_followed_and_not_stopped(
    make_bench: MakeBench, storage: Flaky
) -> None:
    bench, _, key, first, second = doubled(make_bench, storage)
    storage.create(f"claims/{key}", first.encode())
    place = bench.engine.places[HERE]
    (row,) = bench.store.executions(bench.store.live_ids(HERE))
    call = bench.engine._launcher._call_of(place, row)
    assert call is not None
    bench.engine._launcher._adopt(place, [(call, Launched(handle=first, key=key))], reason=None)
    assert bench.sql("SELECT handle FROM dispatcher.execution WHERE NOT stray") == [first]
    assert bench.sql("SELECT handle FROM dispatcher.execution WHERE stray") == []
    assert second in bench.world._executions


def test_a_double_of_what_has_ended_shall_not_begin_any_more(
    make_bench: MakeBench, storage: Flaky
) -> None:
    bench, batch, key, first, second = doubled(make_bench, storage)
    end(bench, second, Outcome.SUCCEEDED, 0)
    assert bench.finish(batch).state == "succeeded"
    bench.engine.sweep_strays(HERE)
    assert bench.sql("SELECT handle FROM dispatcher.execution WHERE stray") == [first]
    assert storage.read(f"claims/{key}", 100) == b"nobody"


def test_an_execution_that_has_just_ended_is_no_stray_of_a_list_that_lags(
    make_bench: MakeBench,
) -> None:
    class Lagging:
        def __init__(self, inner: Any) -> None:
            self.inner = inner
            self.shown: list[Launched] = []

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def strays(self, _instance: str, _since: datetime) -> list[Launched]:
            return self.shown

    made: list[Lagging] = []

    def wrap(inner: Any) -> Lagging:
        made.append(Lagging(inner))
        return made[-1]

    bench = make_bench(wrap=wrap, settings={"find_grace": "20s"})
    bench.finish(bench.enqueue([1]))
    ((key, handle),) = bench.sql("SELECT key, handle FROM dispatcher.execution")
    made[0].shown = [Launched(key=key, handle=handle)]
    bench.engine.sweep_strays(HERE)
    assert bench.sql("SELECT count(*) FROM dispatcher.execution WHERE stray") == [0]
    bench.advance(600)
    bench.engine.sweep_strays(HERE)
    assert bench.sql("SELECT count(*) FROM dispatcher.execution WHERE stray") == [1], "it runs on"


# --- given up without having been found -----------------------------------------------------------


def unfound(make_bench: MakeBench, storage: Storage) -> tuple[Bench, Batch, str]:
    """Have every call of a launch lose its reply, and no record of it appear.

    The bench, the batch and the key, which nobody has claimed.
    """
    bench = make_bench(
        job(retry={"attempts": 1, "infrastructure_attempts": 1}),
        settings={"relaunch_safe": False, "find_grace": "5s", "absent_grace": "5m"},
        storage=storage,
    )
    bench.script(seconds=1000)
    batch = bench.enqueue([1])
    bench.plan()
    bench.world.fail_next("launch", Fault.REPLY_LOST, times=5)
    bench.world.find_lag = timedelta(hours=1)
    bench.launch()
    bench.until(lambda: len(bench.world.requests()) == 5, "it was called five times", step=5)
    assert batch.refresh().state == "running"
    return bench, batch, bench.world.requests()[0].key


def test_a_launch_that_nobody_can_find_is_not_given_up_while_one_has_claimed_its_work(
    make_bench: MakeBench, storage: Flaky
) -> None:
    bench, batch, key = unfound(make_bench, storage)
    storage.create(f"claims/{key}", f"{key}.3".encode())
    for _ in range(8):
        bench.turn(30)
    assert batch.refresh().state == "running", "a retry would do the same work once more"
    assert len(bench.world.requests()) == 5
    bench.world.find_lag = timedelta(0)
    end(bench, f"{key}.3", Outcome.SUCCEEDED, 0)
    for number in (1, 2, 4, 5):
        end(bench, f"{key}.{number}", Outcome.FAILED, 94)
    assert bench.finish(batch, step=20).state == "succeeded"
    (chunk,) = bench.dispatcher.chunks(batch.id)
    assert [attempt.outcome for attempt in chunk.attempts] == ["succeeded"]


def test_a_launch_whose_claim_was_taken_and_whose_record_never_comes_is_lost(
    make_bench: MakeBench, storage: Flaky
) -> None:
    bench, batch, key = unfound(make_bench, storage)
    storage.create(f"claims/{key}", f"{key}.3".encode())
    assert bench.finish(batch, step=60).state == "failed"
    (chunk,) = bench.dispatcher.chunks(batch.id)
    (attempt,) = chunk.attempts
    assert (attempt.outcome, attempt.reason) == (
        "lost",
        "its claim says that it ran, and the provider does not know it",
    )


def test_what_is_given_up_before_it_began_can_begin_no_more(
    make_bench: MakeBench, storage: Flaky
) -> None:
    bench, batch, key = unfound(make_bench, storage)
    storage.down = True
    for _ in range(4):
        bench.turn(30)
    assert batch.refresh().state == "running", "who has claimed it cannot be known now"
    storage.down = False
    assert bench.finish(batch, step=20).state == "failed"
    (chunk,) = bench.dispatcher.chunks(batch.id)
    assert [attempt.outcome for attempt in chunk.attempts] == ["start_failed"]
    with pytest.raises(SystemExit) as left:
        container.claim(
            {
                "DISPATCH_CLAIM_URI": storage.uri(f"claims/{key}"),
                "CLOUD_RUN_EXECUTION": f"{key}.1",
            }
        )
    assert left.value.code == container.EXIT_CLAIMED_BY_ANOTHER
