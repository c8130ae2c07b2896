"""Receipts settled: outcomes of items, retries of what failed, splits, success by items."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from waiting import until
from workbench import HERE, Bench, job

from dispatcher.backends.base import LaunchRequest, TaskInput
from dispatcher.backends.local import LocalBackend, LocalSettings
from dispatcher.client import Batch
from dispatcher.engine import receipts as receipts_module
from dispatcher.engine.receipts import PROGRESS_READERS
from dispatcher.errors import Unreachable
from dispatcher.explaining import explain
from dispatcher.moments import clock
from dispatcher.receipts import Expected, InvalidReceipt, read_receipt
from dispatcher.states import Outcome
from dispatcher.storage import Storage
from dispatcher.testing import Ending

MakeBench = Callable[..., Bench]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/store")


def receipt(
    request: LaunchRequest,
    task: TaskInput,
    results: Iterable[tuple[int, bool]],
    *,
    complete: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    return {
        "version": 1,
        "key": request.key,
        "task": task.index,
        "chunk": task.chunk_index,
        "attempt": task.attempt,
        "complete": complete,
        "items": [
            {"i": i, "ok": ok, **({"output": {"n": i}} if ok else {"error": f"bad {i}"})}
            for i, ok in results
        ],
        **changes,
    }


class Containers:
    """Stands between the engine and a null backend: what the containers of a launch do."""

    def __init__(self, inner: Any, storage: Storage) -> None:
        self.inner = inner
        self.storage = storage
        self.given: list[tuple[int, int, list[Any]]] = []
        """Chunk, attempt and items of each attempt, in order."""

        self.work: Callable[[LaunchRequest, TaskInput, list[Any]], Ending] = self.all_good
        self._ends: dict[tuple[str, int], Ending] = {}
        inner.world.script = lambda batch, chunk, _attempt: self._ends.get((batch, chunk), Ending())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def launch(self, request: LaunchRequest) -> Any:
        for task in request.tasks:
            items = json.loads(task.items)
            self.given.append((task.chunk_index, task.attempt, items))
            self._ends[request.batch_id, task.chunk_index] = self.work(request, task, items)
        return self.inner.launch(request)

    def write(self, request: LaunchRequest, task: TaskInput, what: Any, name: str = "") -> None:
        data = what if isinstance(what, bytes) else json.dumps(what).encode()
        path = f"results/{request.batch_id}/{request.key}/{name or f'{task.index}.json'}"
        self.storage.create(path, data)

    def all_good(self, request: LaunchRequest, task: TaskInput, items: list[Any]) -> Ending:
        self.write(request, task, receipt(request, task, [(i, True) for i in range(len(items))]))
        return Ending()

    def some_bad(self, bad: set[Any]) -> None:
        """Report item by item; those that are bad fail, and the program exits with 0."""

        def work(request: LaunchRequest, task: TaskInput, items: list[Any]) -> Ending:
            results = [(i, item not in bad) for i, item in enumerate(items)]
            self.write(request, task, receipt(request, task, results))
            return Ending()

        self.work = work

    def poison(self, bad: set[Any], *, progress: bool) -> None:
        """Crash hard at the first bad item; with progress, what was done before is on record."""

        def work(request: LaunchRequest, task: TaskInput, items: list[Any]) -> Ending:
            at = next((i for i, item in enumerate(items) if item in bad), None)
            if at is None:
                return self.all_good(request, task, items) if progress else Ending()
            if progress:
                done = [(i, True) for i in range(at)]
                told = receipt(request, task, done, complete=False)
                self.write(request, task, told, f"{task.index}.progress.json")
            return Ending(Outcome.FAILED, exit_code=139)

        self.work = work


Make = Callable[..., tuple[Bench, Containers]]


@pytest.fixture
def make(make_bench: MakeBench, storage: Storage) -> Make:
    def made(*, storage: Storage = storage, **fields: Any) -> tuple[Bench, Containers]:
        found: list[Containers] = []

        def wrap(inner: Any) -> Any:
            found.append(Containers(inner, storage))
            return found[-1]

        bench = make_bench(job(**fields), wrap=wrap, storage=storage)
        return bench, found[0]

    return made


def states(bench: Bench, batch: Batch) -> dict[int, str]:
    return {chunk.index: str(chunk.state) for chunk in bench.dispatcher.chunks(batch.id)}


def outcomes(bench: Bench, batch: Batch, chunk: int = 0) -> list[tuple[str | None, str | None]]:
    found = next(c for c in bench.dispatcher.chunks(batch.id) if c.index == chunk)
    return [(attempt.outcome, attempt.reason) for attempt in found.attempts]


def failed_items(bench: Bench, batch: Batch) -> list[Any]:
    return sorted(one.item for one in bench.dispatcher.items(batch.id, failed=True))


# --- what a receipt makes of an end ---------------------------------------------------------------


def test_each_item_has_its_outcome_and_its_output(make: Make) -> None:
    bench, containers = make(chunk={"size": 3}, retry={"attempts": 1})
    containers.some_bad({"b"})
    batch = bench.finish(bench.enqueue(["a", "b", "c", "d"]))
    assert batch.state == "failed"
    assert batch.reason == (
        "1 of 2 chunks failed: failed; 1 of 1 attempts used: 1 of 3 items failed: bad 1"
    )
    told = [
        (one.chunk_index, one.position, one.item, one.state, one.output, one.error)
        for one in bench.dispatcher.items(batch.id)
    ]
    assert told == [
        (0, 0, "a", "succeeded", {"n": 0}, None),
        (0, 1, "b", "failed", None, "bad 1"),
        (0, 2, "c", "succeeded", {"n": 2}, None),
        (1, 0, "d", "succeeded", {"n": 0}, None),
    ]
    assert failed_items(bench, batch) == ["b"]
    assert outcomes(bench, batch) == [("failed", "1 of 3 items failed: bad 1")]


def test_a_retry_is_given_only_the_items_that_have_not_succeeded(make: Make) -> None:
    bench, containers = make(chunk={"size": 4})
    bad = {1: {"b", "d"}, 2: {"d"}, 3: set[str]()}

    def work(request: LaunchRequest, task: TaskInput, items: list[Any]) -> Ending:
        results = [(i, item not in bad[task.attempt]) for i, item in enumerate(items)]
        containers.write(request, task, receipt(request, task, results))
        return Ending()

    containers.work = work
    batch = bench.finish(bench.enqueue(["a", "b", "c", "d"]))
    assert batch.state == "succeeded"
    assert [items for _, _, items in containers.given] == [["a", "b", "c", "d"], ["b", "d"], ["d"]]
    assert [one.attempt for one in bench.dispatcher.items(batch.id)] == [1, 2, 1, 3]


def test_an_operators_retry_is_given_them_too(make: Make) -> None:
    bench, containers = make(chunk={"size": 3}, retry={"attempts": 1})
    containers.some_bad({2})
    batch = bench.finish(bench.enqueue([1, 2, 3]))
    assert batch.state == "failed"
    containers.work = containers.all_good
    bench.dispatcher.retry(batch.id)
    assert bench.finish(batch).state == "succeeded"
    assert [items for _, _, items in containers.given] == [[1, 2, 3], [2]]


def test_a_retry_of_everything_starts_anew(make: Make) -> None:
    bench, containers = make(chunk={"size": 2})
    batch = bench.finish(bench.enqueue([1, 2]))
    bench.dispatcher.retry(batch.id, failed_only=False)
    assert [one.state for one in bench.dispatcher.items(batch.id)] == ["open", "open"]
    assert bench.finish(batch).state == "succeeded"
    assert [items for _, _, items in containers.given] == [[1, 2], [1, 2]]


def test_what_was_done_before_a_crash_or_a_stop_is_kept(make: Make) -> None:
    bench, containers = make(chunk={"size": 4})
    containers.poison({"c"}, progress=True)
    batch = bench.enqueue(["a", "b", "c", "d"])
    bench.turn()
    bench.turn()
    containers.work = containers.all_good
    assert bench.finish(batch).state == "succeeded"
    assert [items for _, _, items in containers.given] == [["a", "b", "c", "d"], ["c", "d"]]


def test_exit_code_0_without_a_receipt_is_suspect_where_the_job_requires_one(make: Make) -> None:
    bench, containers = make(receipt="required", retry={"infrastructure_attempts": 2})
    containers.work = lambda _request, _task, _items: Ending()
    batch = bench.finish(bench.enqueue(["a"]))
    assert batch.state == "failed"
    why = "ended with exit code 0 and wrote no receipt, which the job requires"
    assert outcomes(bench, batch) == [("suspect", why)] * 2


def test_exit_code_0_is_success_where_nobody_speaks_of_receipts(make: Make) -> None:
    bench, containers = make()
    containers.work = lambda _request, _task, _items: Ending()
    batch = bench.finish(bench.enqueue(["a"]))
    assert batch.state == "succeeded"
    (one,) = bench.dispatcher.items(batch.id)
    assert (one.state, one.attempt, one.output) == ("succeeded", 1, None)


def test_exit_code_0_with_half_a_receipt_is_suspect(make: Make) -> None:
    bench, containers = make(chunk={"size": 2}, retry={"infrastructure_attempts": 1})

    def half(request: LaunchRequest, task: TaskInput, _items: list[Any]) -> Ending:
        told = receipt(request, task, [(0, True)], complete=False)
        containers.write(request, task, told, "0.progress.json")
        return Ending()

    containers.work = half
    batch = bench.finish(bench.enqueue(["a", "b"]))
    why = "ended with exit code 0, but its receipt tells of 1 items only"
    assert outcomes(bench, batch) == [("suspect", why)]
    assert failed_items(bench, batch) == ["b"]


def test_a_vanished_record_with_a_complete_receipt_is_a_success(make: Make) -> None:
    bench, containers = make(receipt="required")
    batch = bench.enqueue(["a"])
    bench.turn()
    (handle,) = bench.sql("SELECT handle FROM dispatcher.execution")
    bench.world.vanish(handle)
    batch = bench.finish(batch)
    assert batch.state == "succeeded"
    ((outcome, reason),) = outcomes(bench, batch)
    assert outcome == "succeeded"
    assert "its receipt is complete" in (reason or "")
    assert len(containers.given) == 1


def test_a_receipt_is_not_looked_for_where_the_job_ignores_them(make: Make) -> None:
    bench, containers = make(receipt="ignored", retry={"attempts": 1})
    containers.some_bad({"a"})
    batch = bench.finish(bench.enqueue(["a"]))
    assert batch.state == "succeeded"


# --- what cannot be a receipt ---------------------------------------------------------------------

GOOD = {"version": 1, "task": 0, "attempt": 1, "complete": True, "items": [{"i": 0, "ok": True}]}
REFUSED = {
    "another execution": ({**GOOD, "key": "d-other"}, "its key is 'd-other', and this is d-"),
    "an old attempt": ({**GOOD, "attempt": 7}, "its attempt is 7, and this is 1"),
    "another task": ({**GOOD, "task": 3}, "its task is 3, and this is 0"),
    "an item that was not given": (
        {**GOOD, "items": [{"i": 1, "ok": True}]},
        "item 1 was not given: 0 to 0 were",
    ),
    "an item below zero": (
        {**GOOD, "items": [{"i": -1, "ok": True}]},
        "item -1 was not given: 0 to 0 were",
    ),
    "items without number": ({**GOOD, "items": [{"ok": True}]}, "item None was not given"),
    "no word on success": ({**GOOD, "items": [{"i": 0, "ok": 1}]}, "`ok` of item 0 is 1"),
    "more items than were given": (
        {**GOOD, "items": [{"i": 0, "ok": True}] * 2},
        "it tells of 2 items; 1 were given",
    ),
    "complete without its items": (
        {**GOOD, "items": []},
        "it is said to be complete and tells of 0 of 1 items",
    ),
    "another version": ({**GOOD, "version": 2}, "its version is 2; known is 1"),
    "a large output": (
        {**GOOD, "items": [{"i": 0, "ok": True, "output": "x" * 5000}]},
        "the output of item 0 is larger than 4096 bytes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_receipt_that_cannot_be_right_is_refused_as_a_whole(make: Make, name: str) -> None:
    what, why = REFUSED[name]
    bench, containers = make(retry={"infrastructure_attempts": 1})

    def wrong(request: LaunchRequest, task: TaskInput, items: list[Any]) -> Ending:
        if task.chunk_index == 0:
            containers.write(request, task, what)
            return Ending()
        return containers.all_good(request, task, items)

    containers.work = wrong
    batch = bench.finish(bench.enqueue(["a", "b"]))
    assert states(bench, batch) == {0: "failed", 1: "succeeded"}
    ((outcome, reason),) = outcomes(bench, batch)
    assert outcome == "suspect"
    assert f"its receipt cannot be used: {why}" in (reason or "")
    assert failed_items(bench, batch) == ["a"]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"version": 1, "complete": tr', "it is no JSON"),
        (b"\xff\xfe", "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b'["mine"]', "it is no JSON object with `version` and `complete`"),
        (b'{"rows": 7}', "it is no JSON object with `version` and `complete`"),
        (b'{"version": "4.2", "rows": 7}', "it is no JSON object with `version` and `complete`"),
    ],
)
def test_a_file_of_another_kind_matters_only_where_a_receipt_is_required(
    make: Make, data: bytes, why: str
) -> None:
    with pytest.raises(InvalidReceipt, match=why) as told:
        read_receipt(data, Expected("key", 0, 1, 1))
    assert told.value.foreign
    bench, containers = make(retry={"infrastructure_attempts": 1})

    def other(request: LaunchRequest, task: TaskInput, _items: list[Any]) -> Ending:
        containers.write(request, task, data)
        return Ending()

    containers.work = other
    assert bench.finish(bench.enqueue(["a"])).state == "succeeded"


@pytest.mark.parametrize("data", [b'{"version": 1, "complete": tr', b'{"rows": 7}'])
def test_and_there_it_is_no_receipt(make: Make, data: bytes) -> None:
    bench, containers = make(receipt="required", retry={"infrastructure_attempts": 1})

    def other(request: LaunchRequest, task: TaskInput, _items: list[Any]) -> Ending:
        containers.write(request, task, data)
        return Ending()

    containers.work = other
    batch = bench.finish(bench.enqueue(["a"]))
    assert batch.state == "failed"
    assert outcomes(bench, batch)[0][0] == "suspect"


@pytest.mark.parametrize("required", [True, False])
def test_a_receipt_of_100_megabytes_is_not_read(make: Make, tmp_path: Path, required: bool) -> None:
    bench, containers = make(
        retry={"infrastructure_attempts": 1}, receipt="required" if required else "optional"
    )

    def huge(request: LaunchRequest, task: TaskInput, _items: list[Any]) -> Ending:
        containers.write(request, task, b"{}")
        path = tmp_path / "store" / "results" / request.batch_id / request.key / "0.json"
        with path.open("r+b") as file:
            file.truncate(100 << 20)
        return Ending()

    containers.work = huge
    batch = bench.finish(bench.enqueue(["a"]))
    ((outcome, reason),) = outcomes(bench, batch)
    assert outcome == ("suspect" if required else "succeeded")
    assert ("104,857,600 bytes" in (reason or "")) is required


@pytest.mark.parametrize("required", [True, False])
def test_a_receipt_is_not_read_that_is_too_large_for_the_items_that_were_given(
    make: Make, required: bool
) -> None:
    bench, containers = make(
        retry={"infrastructure_attempts": 1}, receipt="required" if required else "optional"
    )

    def large(request: LaunchRequest, task: TaskInput, items: list[Any]) -> Ending:
        told = receipt(request, task, [(i, True) for i in range(len(items))])
        containers.write(request, task, json.dumps(told).encode() + b" " * (400 << 10))
        return Ending()

    containers.work = large
    batch = bench.finish(bench.enqueue(["a"]))
    ((outcome, reason),) = outcomes(bench, batch)
    assert outcome == "suspect"
    refused = "409,7[0-9]{2} bytes, and may have 311,296; it was not read: the task was given 1 i"
    assert re.search(refused, reason or "")
    batch = bench.finish(bench.enqueue(range(4), chunk_size=4))
    assert batch.state == "succeeded"
    assert all(one.told for one in bench.dispatcher.items(batch.id)), "that many may have as much"


def test_a_result_of_the_programs_own_kind_may_be_large(make: Make) -> None:
    bench, containers = make(retry={"infrastructure_attempts": 1})

    def own(request: LaunchRequest, task: TaskInput, _items: list[Any]) -> Ending:
        containers.write(request, task, b'{"version": "4.2", "rows": [' + b"7, " * 300_000 + b"7]}")
        return Ending()

    containers.work = own
    batch = bench.finish(bench.enqueue(["a"]))
    assert batch.state == "succeeded"


def memory(kind: str) -> int:
    """How many megabytes this process has now, or had at most."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith(f"{kind}:")]
    return int(line.split()[1]) // 1024


@pytest.mark.parametrize(
    "nonsense",
    [b"[" + b"[]," * 1000, b'{"version":1,"complete":true,"own":[' + b"[]," * 1000],
    ids=["no JSON object", "a receipt with a large value"],
)
def test_many_large_receipts_that_are_none_take_little_memory_at_once(
    make: Make, tmp_path: Path, nonsense: bytes
) -> None:
    tasks, items = 16, 330
    bench, containers = make(
        chunk={"size": items},
        receipt="required",
        retry={"infrastructure_attempts": 1},
        options={"max_tasks": tasks, "parallelism": tasks},
    )
    data = nonsense + b"[]," * (5 << 20)
    names: list[Path] = []

    def large(request: LaunchRequest, task: TaskInput, _items: list[Any]) -> Ending:
        if not names:
            containers.write(request, task, data)
        path = (
            tmp_path / "store" / "results" / request.batch_id / request.key / f"{task.index}.json"
        )
        if names:
            path.hardlink_to(names[0])
        names.append(path)
        return Ending()

    containers.work = large
    batch = bench.enqueue(range(tasks * items))
    bench.turn()
    assert len(names) == tasks
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is taken anew
    before = memory("VmRSS")
    bench.until(lambda: batch.refresh().finished, "it ended")
    assert memory("VmHWM") - before < 200
    told = {outcome for index in range(tasks) for outcome, _ in outcomes(bench, batch, index)}
    assert told == {"suspect"}


def test_large_receipts_are_settled_beside_small_ones(make: Make) -> None:
    bench, containers = make(
        chunk={"size": 100}, options={"max_tasks": 4, "parallelism": 4}, receipt="required"
    )

    def work(request: LaunchRequest, task: TaskInput, items: list[Any]) -> Ending:
        entries = [
            {"i": i, "ok": True, "output": "x" * (4000 if task.index % 2 else 1)}
            for i in range(len(items))
        ]
        containers.write(request, task, receipt(request, task, [], items=entries))
        return Ending()

    containers.work = work
    batch = bench.finish(bench.enqueue(range(400)))
    assert batch.state == "succeeded"
    sizes = [len(str(one.output)) for one in bench.dispatcher.items(batch.id)]
    assert sizes == ([1] * 100 + [4000] * 100) * 2


def test_an_output_may_hold_what_postgres_cannot(make: Make) -> None:
    bench, containers = make()

    def odd(request: LaunchRequest, task: TaskInput, _items: list[Any]) -> Ending:
        entry = {"i": 0, "ok": True, "output": {"a\0": "b\0\ud800"}}
        containers.write(request, task, receipt(request, task, [], items=[entry]))
        return Ending()

    containers.work = odd
    batch = bench.finish(bench.enqueue(["a"]))
    (one,) = bench.dispatcher.items(batch.id)
    assert one.output == {"a\ufffd": "b\ufffd\ufffd"}


class Flaky(Storage):
    """A storage that does not answer for a while."""

    down = False
    failures = 0
    """Calls that fail before it answers again."""

    asked = 0

    def list(self, prefix: str) -> Any:
        self._answer()
        return super().list(prefix)

    def read(self, path: str, most: int) -> bytes | None:
        self._answer()
        return super().read(path, most)

    def _answer(self) -> None:
        self.asked += 1
        if self.down or self.failures:
            self.failures = max(0, self.failures - 1)
            raise Unreachable("timed out")


def test_while_the_storage_does_not_answer_nothing_is_decided(make: Make, tmp_path: Path) -> None:
    storage = Flaky(f"file://{tmp_path}/flaky")
    bench, containers = make(storage=storage, options={"max_tasks": 2, "parallelism": 2})
    containers.some_bad({"b"})
    batch = bench.enqueue(["a", "b"])
    bench.turn()
    storage.down = True
    for _ in range(3):
        bench.turn(6)
    assert states(bench, batch) == {0: "running", 1: "running"}
    for chunk in (None, 0):
        assert (
            "waiting for the storage, which does not answer since "
            f"{clock(bench.at - timedelta(seconds=12), bench.at)} (12 s ago): "
        ) in explain(bench.store, batch.id, chunk).text
    assert [e.reason for e in bench.dispatcher.events(batch.id) if e.reason] == [
        "receipts of it cannot be read: the storage does not answer"
    ], "said once"
    storage.down = False
    bench.turn(6)
    assert states(bench, batch) == {0: "succeeded", 1: "pending"}
    assert bench.sql("SELECT unread_since FROM dispatcher.execution") == [None]


def test_a_storage_that_stays_away_holds_no_end_up_for_ever(make: Make, tmp_path: Path) -> None:
    storage = Flaky(f"file://{tmp_path}/flaky")
    bench, _ = make(storage=storage, options={"max_tasks": 2, "parallelism": 2})
    batch = bench.enqueue(["a", "b"])
    bench.turn()
    storage.down = True
    bench.turn(6)
    assert states(bench, batch) == {0: "running", 1: "running"}
    batch = bench.finish(batch, step=60)
    assert batch.state == "succeeded", "the provider's word"


def test_of_a_large_pack_that_is_settled_in_pieces_none_is_lost_for_a_blip_of_the_storage(
    make: Make, tmp_path: Path
) -> None:
    """Of 600 tasks that succeed at once, the first 500 are looked at together."""
    storage = Flaky(f"file://{tmp_path}/flaky")
    bench, _ = make(storage=storage, options={"max_tasks": 1_000, "parallelism": 1_000})
    batch = bench.enqueue(range(600))
    bench.turn()
    storage.failures = 1
    bench.turn(6)
    assert set(states(bench, batch).values()) == {"running"}, "the storage was asked once"
    assert bench.finish(batch).state == "succeeded"
    assert bench.sql("SELECT DISTINCT outcome FROM dispatcher.attempt") == ["succeeded"]
    assert bench.sql("SELECT count(*) FROM dispatcher.attempt") == [600]


def test_of_a_large_pack_none_is_lost_for_receipts_that_are_left_for_later(make: Make) -> None:
    """The first 500 receipts are more than one round reads."""
    bench, containers = make(
        options={"max_tasks": 1_000, "parallelism": 1_000}, retry={"exit_codes": {3: "fail"}}
    )

    def work(request: LaunchRequest, task: TaskInput, _items: list[Any]) -> Ending:
        told = receipt(request, task, [(0, False)], pad="x" * 100_000)
        containers.write(request, task, told)
        return Ending(Outcome.FAILED, exit_code=3)

    containers.work = work
    batch = bench.finish(bench.enqueue(range(600)))
    assert batch.state == "failed"
    assert bench.sql("SELECT DISTINCT outcome, exit_code FROM dispatcher.attempt") == [
        ("failed", 3)
    ]
    assert len(containers.given) == 600


def test_a_storage_that_is_away_is_asked_once_in_a_settle(make: Make, tmp_path: Path) -> None:
    storage = Flaky(f"file://{tmp_path}/flaky")
    bench, _ = make(storage=storage, options={"max_tasks": 2, "parallelism": 2})
    batch = bench.enqueue(range(40))
    bench.turn()
    storage.down, storage.asked = True, 0
    bench.turn(6)
    assert storage.asked == 1, "twenty packs would wait as long each"
    storage.down = False
    assert bench.finish(batch).state == "succeeded"


def test_an_outage_of_the_storage_is_told_from_its_beginning(make: Make, tmp_path: Path) -> None:
    storage = Flaky(f"file://{tmp_path}/flaky")
    bench, containers = make(storage=storage, options={"max_tasks": 2, "parallelism": 2})
    containers.work = lambda _request, task, _items: Ending(seconds=2 + 600 * task.chunk_index)
    batch = bench.enqueue(["a", "b"])
    bench.turn()
    storage.down = True
    for _ in range(20):
        bench.turn(50)
    assert states(bench, batch) == {0: "succeeded", 1: "running"}, "the first one is given up"
    assert " (16 min ago): " in explain(bench.store, batch.id).text
    reasons = [str(event.reason) for event in bench.dispatcher.events(batch.id)]
    assert len([one for one in reasons if "cannot be read" in one]) == 1
    storage.down = False
    assert bench.finish(batch, step=6).state == "succeeded"


def test_receipts_are_read_at_the_same_time(make: Make, tmp_path: Path) -> None:
    met = threading.Barrier(2)
    lone: list[str] = []

    class Meeting(Storage):
        """A storage in which two reads wait for each other."""

        def read(self, path: str, most: int) -> bytes | None:
            try:
                met.wait(60)
            except threading.BrokenBarrierError:
                lone.append(path)
            return super().read(path, most)

    bench, _ = make(storage=Meeting(f"file://{tmp_path}/meeting"))
    batch = bench.finish(bench.enqueue(range(16)))
    assert batch.state == "succeeded"
    assert lone == []


@pytest.mark.parametrize("step", [6, 1000])
def test_what_is_too_much_for_one_round_is_settled_in_the_next_however_late_that_comes(
    make: Make, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(receipts_module, "ROUND_BYTES", 1)
    bench, containers = make(options={"max_tasks": 5, "parallelism": 5})
    containers.some_bad(set())
    batch = bench.enqueue(range(5))
    bench.turn()
    bench.turn(1)
    ended = [state for state in states(bench, batch).values() if state == "succeeded"]
    assert len(ended) == 1, "one receipt fills the room"
    assert bench.finish(batch, step=step).state == "succeeded"
    assert all(one.told for one in bench.dispatcher.items(batch.id))


def test_what_a_forgotten_execution_wrote_is_settled_in_rounds_too(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receipts_module, "ROUND_BYTES", 1)
    bench, containers = make(options={"max_tasks": 5, "parallelism": 5})

    def work(request: LaunchRequest, task: TaskInput, items: list[Any]) -> Ending:
        containers.all_good(request, task, items)
        return Ending(seconds=100_000)

    containers.work = work
    batch = bench.enqueue(range(5))
    bench.turn()
    bench.turn(2)
    (handle,) = bench.sql("SELECT handle FROM dispatcher.execution")
    bench.world.vanish(handle)
    assert bench.finish(batch, step=60).state == "succeeded"
    assert all(one.told for one in bench.dispatcher.items(batch.id))


def test_an_item_that_succeeded_later_without_a_word_keeps_no_old_error(make: Make) -> None:
    bench, containers = make(chunk={"size": 2})

    def work(request: LaunchRequest, task: TaskInput, _items: list[Any]) -> Ending:
        if task.attempt == 1:
            containers.write(request, task, receipt(request, task, [(0, False), (1, True)]))
        return Ending()

    containers.work = work
    batch = bench.finish(bench.enqueue(["a", "b"]))
    assert batch.state == "succeeded"
    told = [(one.item, one.attempt, one.error) for one in bench.dispatcher.items(batch.id)]
    assert told == [("a", 2, None), ("b", 1, None)]


def test_a_long_uri_of_an_output_is_kept_whole_or_refused() -> None:
    def entry(uri: Any) -> bytes:
        item = {"i": 0, "ok": True, "output_uri": uri}
        return json.dumps({**GOOD, "items": [item]}).encode()

    expected = Expected("key", 0, 1, 1)
    long = "s3://bucket/" + "x" * 5000
    assert read_receipt(entry(long), expected).items[0].output_uri == long
    for uri in ("s3://" + "x" * 9000, 7, "s3://a\0b"):
        with pytest.raises(InvalidReceipt, match="output_uri of item 0"):
            read_receipt(entry(uri), expected)


# --- split ----------------------------------------------------------------------------------------


def test_a_chunk_that_used_up_its_attempts_is_halved_until_the_bad_item_stands_alone(
    make: Make,
) -> None:
    bench, containers = make(
        chunk={"size": 16}, retry={"attempts": 2, "on_failure": "split"}, receipt="ignored"
    )
    containers.poison({11}, progress=False)
    batch = bench.finish(bench.enqueue(range(16)))
    assert batch.state == "failed"
    assert failed_items(bench, batch) == [11]
    chunks = {chunk.index: chunk for chunk in bench.dispatcher.chunks(batch.id)}
    assert chunks[0].state == "split"
    assert {chunk.parent for chunk in chunks.values() if chunk.depth == 1} == {0}
    alone = [chunk for chunk in chunks.values() if chunk.state == "failed"]
    assert [(chunk.size, chunk.depth, len(chunk.attempts)) for chunk in alone] == [(1, 4, 2)]
    assert len(containers.given) == 2 + 2 * 4 + 1, "two tries, two halves a level, one try more"
    done = sum(chunk.size for chunk in chunks.values() if chunk.state == "succeeded")
    assert (done, batch.chunk_count) == (15, 5)


def test_who_reports_item_by_item_has_the_suspect_alone_at_once(make: Make) -> None:
    bench, containers = make(
        chunk={"size": 100}, retry={"attempts": 2, "on_failure": "split"}, receipt="required"
    )
    containers.poison({40}, progress=True)
    batch = bench.finish(bench.enqueue(range(100)))
    assert failed_items(bench, batch) == [40]
    assert sorted(len(items) for _, _, items in containers.given) == [1, 1, 59, 60, 100]
    succeeded = [
        (chunk.size, len(chunk.attempts))
        for chunk in bench.dispatcher.chunks(batch.id)
        if chunk.state == "succeeded"
    ]
    assert sorted(succeeded) == [(40, 0), (59, 1)], "what was done before is a chunk of its own"


def test_while_nothing_succeeds_splitting_comes_to_an_end(make: Make) -> None:
    bench, containers = make(
        chunk={"size": 64}, retry={"attempts": 1, "on_failure": "split"}, receipt="ignored"
    )
    containers.work = lambda _request, _task, _items: Ending(Outcome.FAILED)
    batch = bench.finish(bench.enqueue(range(640)))
    assert batch.state == "failed"
    assert len(containers.given) == 10 + 20 * 2
    assert len(failed_items(bench, batch)) == 640
    whole = [chunk for chunk in bench.dispatcher.chunks(batch.id) if chunk.state == "failed"]
    assert any(
        (chunk.reason or "").startswith("not split further, as 20 chunks were and 0 succeeded: ")
        for chunk in whole
    )


@pytest.mark.parametrize("progress", [False, True], ids=["plain", "reporting"])
@pytest.mark.parametrize(
    ("items", "size", "every"),
    [
        (1_000, 10, 150),
        (1_000, 1_000, 150),
        (300, 100, 14),
        (128, 64, 4),
    ],
)
def test_only_bad_items_fail_whatever_the_chunks_and_however_many_they_are(
    make: Make, items: int, size: int, every: int, progress: bool
) -> None:
    bench, containers = make(
        chunk={"size": size},
        retry={"attempts": 1, "on_failure": "split"},
        receipt="required" if progress else "ignored",
        options={"max_tasks": 1_000, "parallelism": 1_000},
    )
    bad = set(range(every // 2, items, every))
    containers.poison(bad, progress=progress)
    batch = bench.finish(bench.enqueue(range(items)), step=10, turns=500)
    assert failed_items(bench, batch) == sorted(bad)


def test_chunks_that_wait_for_their_split_say_so_and_go_on_with_the_first_success(
    make: Make,
) -> None:
    bench, containers = make(
        chunk={"size": 2}, retry={"attempts": 1, "on_failure": "split"}, receipt="ignored"
    )
    slow = {80, 81}

    def work(_request: LaunchRequest, _task: TaskInput, items: list[Any]) -> Ending:
        return Ending(seconds=600) if slow & set(items) else Ending(Outcome.FAILED)

    containers.work = work
    batch = bench.enqueue(range(82))
    bench.until(lambda: len(containers.given) == 41 + 2 * 20, "all but one chunk have failed")
    for _ in range(5):
        bench.turn(5)
    waiting = bench.sql("SELECT index FROM dispatcher.chunk WHERE awaits_split IS NOT NULL")
    assert len(waiting) == 20
    said = explain(bench.store, batch.id).text
    assert "20 chunks have used up their attempts and wait to be split: each success" in said
    said = explain(bench.store, batch.id, waiting[0]).text
    assert f"Chunk {waiting[0]} has used up its attempts and waits to be split: each" in said
    assert len(containers.given) == 41 + 2 * 20, "none of them is tried again as it is"
    bench.advance(600)
    bench.finish(batch)
    assert len(containers.given) == 41 + 2 * (20 + 4), "one success pays for four splits"
    assert len(failed_items(bench, batch)) == 80


def test_a_cancel_ends_what_waits_for_its_split(make: Make) -> None:
    bench, containers = make(
        chunk={"size": 2}, retry={"attempts": 1, "on_failure": "split"}, receipt="ignored"
    )

    def work(_request: LaunchRequest, _task: TaskInput, items: list[Any]) -> Ending:
        return Ending(seconds=600) if 80 in items else Ending(Outcome.FAILED)

    containers.work = work
    batch = bench.enqueue(range(82))
    bench.until(lambda: len(containers.given) == 41 + 2 * 20, "all but one chunk have failed")
    batch.cancel()
    assert bench.finish(batch).state == "cancelled"
    assert bench.sql("SELECT count(*) FROM dispatcher.chunk WHERE awaits_split IS NOT NULL") == [0]


def test_items_that_are_known_to_be_bad_need_no_split(make: Make) -> None:
    bench, containers = make(chunk={"size": 8}, retry={"attempts": 2, "on_failure": "split"})
    containers.some_bad({2, 5})
    batch = bench.finish(bench.enqueue(range(8)))
    assert states(bench, batch) == {0: "failed"}
    assert failed_items(bench, batch) == [2, 5]


def test_ten_thousand_items_with_seven_poisoned_end_with_seven_named(make: Make) -> None:
    bench, containers = make(
        chunk={"size": 100},
        retry={"attempts": 3, "on_failure": "split"},
        receipt="required",
        success={"max_failed_items": 7},
        options={"max_tasks": 100, "parallelism": 100},
    )
    bad = {0, 199, 250, 251, 4999, 7777, 9999}
    containers.poison(bad, progress=True)
    batch = bench.finish(bench.enqueue(range(10_000)), step=10, turns=500)
    assert batch.state == "succeeded"
    assert batch.reason == "7 of 10,000 items failed, allowed"
    assert failed_items(bench, batch) == sorted(bad)
    extra = len(containers.given) - 100
    assert extra <= 7 * (6.64 + 2)


def test_a_batch_that_can_no_longer_succeed_stops(make: Make) -> None:
    bench, containers = make(
        chunk={"size": 10}, retry={"attempts": 1}, success={"min_ratio": 0.9}, limits={"running": 1}
    )
    containers.some_bad(set(range(0, 100, 4)))
    batch = bench.finish(bench.enqueue(range(100)))
    assert batch.state == "failed"
    assert (batch.reason or "").startswith("13 of 100 items failed, and 90 must succeed")
    assert len(containers.given) == 5, "the other five chunks were not started"
    assert {str(state): n for state, n in batch.counts.items()} == {"failed": 5, "cancelled": 5}
    assert failed_items(bench, batch) == list(range(0, 50, 4)), "no item that never ran"


def test_what_was_all_done_when_a_cancel_came_has_succeeded(make: Make) -> None:
    bench, containers = make(chunk={"size": 2})

    def done(request: LaunchRequest, task: TaskInput, items: list[Any]) -> Ending:
        containers.all_good(request, task, items)
        return Ending(seconds=1000)

    containers.work = done
    batch = bench.enqueue(["a", "b"])
    bench.turn()
    bench.turn(1)
    bench.dispatcher.cancel(batch.id)
    batch = bench.finish(batch)
    assert batch.state == "succeeded", "the cancel came too late to stop anything"
    ((outcome, _),) = outcomes(bench, batch)
    assert outcome == "cancelled"


def test_a_cancel_keeps_what_was_done(make: Make) -> None:
    bench, containers = make(chunk={"size": 2})

    def slow(request: LaunchRequest, task: TaskInput, _items: list[Any]) -> Ending:
        told = receipt(request, task, [(0, True)], complete=False)
        containers.write(request, task, told, "0.progress.json")
        return Ending(seconds=1000)

    containers.work = slow
    batch = bench.enqueue(["a", "b"])
    bench.turn()
    bench.turn(1)
    bench.dispatcher.cancel(batch.id)
    batch = bench.finish(batch)
    assert batch.state == "cancelled"
    assert [one.state for one in bench.dispatcher.items(batch.id)] == ["succeeded", "cancelled"]


# --- progress -------------------------------------------------------------------------------------


def test_how_far_running_tasks_are_is_read_beside_the_lifecycle(make: Make) -> None:
    bench, containers = make(chunk={"size": 4}, limits={"running": 2})

    def slow(request: LaunchRequest, task: TaskInput, _items: list[Any]) -> Ending:
        if task.chunk_index == 0:
            told = receipt(request, task, [(0, True), (1, True)], complete=False)
            containers.write(request, task, told, "0.progress.json")
        else:
            own = {"progress": {"done": 300, "total": 1000}}
            told = receipt(request, task, [], complete=False, **own)
            containers.write(request, task, told, "0.progress.json")
        return Ending(seconds=1000)

    containers.work = slow
    batch = bench.enqueue(range(9))
    bench.turn()
    bench.turn(1)
    assert bench.engine.follow_progress(HERE) == 2
    progress = [
        chunk.attempts[-1].progress if chunk.attempts else None
        for chunk in bench.dispatcher.chunks(batch.id)
    ]
    assert progress == [(2, 4), (300, 1000), None]
    assert states(bench, batch) == {0: "running", 1: "running", 2: "pending"}


def test_progress_that_is_no_progress_changes_nothing(make: Make) -> None:
    bench, containers = make()

    def slow(request: LaunchRequest, task: TaskInput, _items: list[Any]) -> Ending:
        containers.write(request, task, b"{", "0.progress.json")
        return Ending(seconds=1000)

    containers.work = slow
    batch = bench.enqueue([1])
    bench.turn()
    bench.turn(1)
    assert bench.engine.follow_progress(HERE) == 0
    (chunk,) = bench.dispatcher.chunks(batch.id)
    assert chunk.attempts[-1].progress is None


def test_progress_that_is_slow_to_read_holds_no_settle_up(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    reading: list[str] = []

    class Stuck(Storage):
        def read(self, path: str, most: int) -> bytes | None:
            if path.endswith("/0.progress.json"):
                reading.append(path)
                assert go_on.wait(60)
            return super().read(path, most)

    def monotonic() -> float:
        """The turn has taken an hour by the time that all its readers are stuck."""
        if not asked:
            asked.append(True)
            return 0.0
        until(lambda: len(reading) >= PROGRESS_READERS, "progress is being read")
        return 3600.0

    asked: list[bool] = []
    bench, containers = make(storage=Stuck(f"file://{tmp_path}/stuck"), receipt="required")

    def work(request: LaunchRequest, task: TaskInput, items: list[Any]) -> Ending:
        if task.chunk_index == 0:
            containers.all_good(request, task, items)
            return Ending(seconds=10)
        told = receipt(request, task, [(0, True)], complete=False)
        containers.write(request, task, told, "0.progress.json")
        return Ending(seconds=1000)

    containers.work = work
    batch = bench.enqueue(range(20))
    bench.turn()
    bench.turn(1)
    try:
        with monkeypatch.context() as patient:
            patient.setattr(receipts_module, "boottime", monotonic)
            assert bench.engine.follow_progress(HERE) == 0, "and this turn is over"
        settle = threading.Thread(target=bench.turn, args=(12,))
        settle.start()
        until(lambda: states(bench, batch)[0] == "succeeded", "what ended is settled")
    finally:
        go_on.set()
    settle.join(60)
    monkeypatch.setattr(receipts_module, "PROGRESS_SECONDS", 60.0)
    assert bench.engine.follow_progress(HERE) == 19
    looked = bench.sql("SELECT progress_done FROM dispatcher.attempt WHERE chunk_index > 0")
    assert looked == [1] * 19


PROGRAM = """
result="${DISPATCH_RESULT_URI#file://}"
told='{"version": 1, "complete": false, "items": [{"i": 0, "ok": true}]}'
echo "$told" > "${result%.json}.progress.json"
until [ -e "$1" ]; do sleep 0.05; done
kill -9 $$
"""


def test_without_a_storage_the_local_backends_tasks_tell_how_far_they_are(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    spool, go_on = tmp_path / "spool", tmp_path / "go-on"
    bench = make_bench(
        job(
            command=["sh", "-c", PROGRAM, "task", str(go_on)],
            chunk={"size": 3},
            retry={"attempts": 1},
        ),
        wrap=lambda _inner: LocalBackend(HERE, LocalSettings(spool=spool)),
    )
    batch = bench.enqueue(["a", "b", "c"])
    turn = partial(bench.turn, 0.1)
    try:
        until(lambda: turn() or bench.engine.follow_progress(HERE) == 1, "it tells, and is seen")
        (chunk,) = bench.dispatcher.chunks(batch.id)
        assert chunk.attempts[-1].progress == (1, 3)
    finally:
        go_on.touch()
    # It writes no receipt and is killed: what it told of before is kept.
    until(lambda: turn() or batch.refresh().finished, "it ended")
    assert outcomes(bench, batch)[0][0] == "failed"
    assert [one.state for one in bench.dispatcher.items(batch.id)] == [
        "succeeded",
        "failed",
        "failed",
    ]
