"""Input documents, what a definition fixes, and templates that hold a whole pack."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from workbench import HERE, Bench, job

from dispatcher import requests
from dispatcher.backends.base import Definition, LaunchRequest, Rejected, Unavailable
from dispatcher.engine import launcher
from dispatcher.errors import InvalidInput, Unreachable
from dispatcher.explaining import explain
from dispatcher.states import Outcome
from dispatcher.storage import Storage, StorageRefused
from dispatcher.testing import Ending, Fault

MakeBench = Callable[..., Bench]
SHARED = {"per_task_env": False, "inline_bytes": 40}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/store")


def lines(request: LaunchRequest) -> list[Any]:
    assert request.input_uri is not None
    path = Path(request.input_uri.removeprefix("file://"))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tasks_with_one_environment_find_their_items_in_a_document(
    make_bench: MakeBench, storage: Storage
) -> None:
    bench = make_bench(job(options={"max_tasks": 3}), settings=SHARED, storage=storage)
    batch = bench.enqueue(["ä", {"b": [1, 2]}, None])
    bench.turn()
    (request,) = bench.world.requests()
    assert request.input_uri == storage.uri(f"inputs/{batch.id}/{request.key}.jsonl")
    assert request.result_uri == storage.uri(f"results/{batch.id}/{request.key}/")
    assert lines(request) == [
        {"chunk": 0, "attempt": 1, "items": ["ä"]},
        {"chunk": 1, "attempt": 1, "items": [{"b": [1, 2]}]},
        {"chunk": 2, "attempt": 1, "items": [None]},
    ]


def test_a_retry_gets_a_document_of_what_failed_only(
    make_bench: MakeBench, storage: Storage
) -> None:
    bench = make_bench(job(options={"max_tasks": 4}), settings=SHARED, storage=storage)
    bench.world.script = lambda _batch, chunk, attempt: Ending(
        Outcome.FAILED if attempt == 1 and chunk in {1, 3} else Outcome.SUCCEEDED
    )
    batch = bench.enqueue(["a", "b", "c", "d"])
    bench.finish(batch)
    first, second = bench.world.requests()
    assert len(lines(first)) == 4
    assert lines(second) == [
        {"chunk": 1, "attempt": 2, "items": ["b"]},
        {"chunk": 3, "attempt": 2, "items": ["d"]},
    ]


def test_a_small_input_needs_no_storage(make_bench: MakeBench) -> None:
    bench = make_bench(
        job(options={"max_tasks": 2}), settings={"per_task_env": False, "inline_bytes": 200}
    )
    batch = bench.enqueue([1, 2])
    assert bench.finish(batch).state == "succeeded"
    (request,) = bench.world.requests()
    assert (request.input_uri, request.result_uri) == (None, None)


def test_a_large_item_goes_by_reference_also_alone(make_bench: MakeBench, storage: Storage) -> None:
    bench = make_bench(job(), settings={"inline_bytes": 100}, storage=storage)
    bench.enqueue(["x" * 20, "y" * 200])
    bench.turn()
    small, large = sorted(bench.world.requests(), key=lambda one: one.tasks[0].chunk_index)
    assert small.input_uri is None
    assert lines(large) == [{"chunk": 1, "attempt": 1, "items": ["y" * 200]}]


def test_an_entry_wrapper_finds_args_and_env_of_its_task_in_the_document(
    make_bench: MakeBench, storage: Storage
) -> None:
    wrapped = job(
        args=["--at", "{chunk.index}"],
        env={"IDS": "{items:csv}"},
        options={"max_tasks": 2, "wrapped": True},
        chunk={"size": 2},
    )
    bench = make_bench(wrapped, settings=SHARED, storage=storage)
    bench.enqueue(["a", "b", "c"])
    bench.turn()
    (request,) = bench.world.requests()
    assert [(line["args"], line["env"]) for line in lines(request)] == [
        (["--at", "0"], {"IDS": "a,b"}),
        (["--at", "1"], {"IDS": "c"}),
    ]


def test_without_a_storage_what_needs_one_is_rejected_and_not_tried_again(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(job(options={"max_tasks": 3}), settings=SHARED)
    batch = bench.enqueue(["a", "b", "c"])
    bench.turn(3)
    view = batch.refresh()
    assert view.state == "failed"
    assert bench.world.calls["launch"] == 0
    (attempt,) = next(iter(bench.dispatcher.chunks(batch.id))).attempts
    assert attempt.outcome == "rejected"
    assert "set DISPATCHER_STORAGE_URL for the workers" in (attempt.reason or "")


class FailingStorage(Storage):
    """A storage that fails for a while."""

    failures: list[Exception]

    def create(self, path: str, data: bytes) -> bool:
        if self.failures:
            raise self.failures.pop()
        return super().create(path, data)


def test_a_storage_that_does_not_answer_postpones_the_launch_and_costs_nothing(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    storage = FailingStorage(f"file://{tmp_path}/store")
    storage.failures = [Unreachable("timed out"), Unreachable("timed out")]
    bench = make_bench(job(options={"max_tasks": 3}), settings=SHARED, storage=storage)
    batch = bench.enqueue(["a", "b", "c"])
    bench.until(lambda: batch.refresh().finished, "the batch ended", step=5)
    assert batch.refresh().state == "succeeded"
    for chunk in bench.dispatcher.chunks(batch.id):
        told = [attempt.outcome for attempt in chunk.attempts]
        assert told == ["no_capacity", "no_capacity", "succeeded"], "of no budget"
    assert len(bench.world.requests()) == 1


def test_a_storage_that_does_not_answer_holds_up_no_job_without_a_document(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    storage = FailingStorage(f"file://{tmp_path}/store")
    storage.failures = [Unreachable("timed out")] * 100
    packed = job("packed", options={"max_tasks": 3})
    bench = make_bench(packed, job("small"), settings=SHARED, storage=storage)
    waiting = bench.enqueue(["a", "b", "c"], "packed")
    small = bench.enqueue([1], "small")
    bench.finish(small)
    assert waiting.refresh().state == "running"


def test_a_storage_that_refuses_rejects_the_launch_in_its_words(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    storage = FailingStorage(f"file://{tmp_path}/store")
    storage.failures = [StorageRefused("no permission to write")]
    bench = make_bench(job(options={"max_tasks": 3}), settings=SHARED, storage=storage)
    batch = bench.enqueue(["a", "b", "c"])
    bench.turn(3)
    assert batch.refresh().state == "failed"
    (attempt,) = next(iter(bench.dispatcher.chunks(batch.id))).attempts
    assert attempt.reason == "the input document cannot be written: no permission to write"


def test_a_repeated_launch_finds_its_own_document(make_bench: MakeBench, storage: Storage) -> None:
    bench = make_bench(job(options={"max_tasks": 3}), settings=SHARED, storage=storage)
    bench.enqueue(["a", "b", "c"])
    bench.plan()
    bench.intend()
    bench.advance(120)
    bench.engine.follow(HERE)
    bench.engine.follow(HERE)
    (request,) = bench.world.requests()
    before = lines(request)
    assert [line["items"] for line in before] == [["a"], ["b"], ["c"]]


class Signing(Storage):
    """A storage that signs, as those of clouds do."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.signed: list[tuple[str, str, timedelta]] = []

    def documents(self) -> list[list[dict[str, Any]]]:
        """The input documents, by name."""
        paths = sorted(one.path for one in self.list("inputs/"))
        return [
            [json.loads(line) for line in (self.read(path, 1 << 20) or b"").splitlines()]
            for path in paths
        ]

    def sign(self, path: str, *, method: Any, expires: timedelta) -> str:
        self.signed.append((method, path, expires))
        return f"https://storage.example/{path}?X-Signature=secret{len(self.signed)}"


def test_a_container_without_a_cloud_sdk_is_given_a_signed_url_that_no_audit_shows(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    storage = Signing(f"file://{tmp_path}/store")
    one = job(options={"max_tasks": 3, "signed_urls": True})
    bench = make_bench(one, settings=SHARED, storage=storage)
    bench.enqueue(["a", "b", "c"])
    bench.turn()
    (request,) = bench.world.requests()
    assert (request.input_uri or "").startswith("https://storage.example/inputs/")
    assert ("GET", f"inputs/{request.batch_id}/{request.key}.jsonl", WEEK) in storage.signed
    assert len(list(storage.list("inputs/"))) == 1
    assert stored_secrets(bench) == []


WEEK = timedelta(days=7)


def stored_secrets(bench: Bench) -> list[str]:
    """The rows of the database, of any table, in which a signature stands."""
    tables = bench.sql("SELECT tablename FROM pg_tables WHERE schemaname = 'dispatcher'")
    assert len(tables) > 10
    return [
        row
        for table in tables
        for row in bench.sql(f'SELECT t::text FROM dispatcher."{table}" t')  # noqa: S608 - its own tables
        if "X-Signature" in row
    ]


def test_each_task_is_given_signed_urls_for_its_receipt_and_progress_and_no_claim(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    storage = Signing(f"file://{tmp_path}/store")
    one = job(timeout="1h", start_timeout="10m", options={"max_tasks": 3, "signed_urls": True})
    bench = make_bench(one, settings={**SHARED, "relaunch_safe": False}, storage=storage)
    bench.enqueue(["a", "b", "c"])
    bench.turn()
    (request,) = bench.world.requests()
    (document,) = storage.documents()
    results = f"https://storage.example/results/{request.batch_id}/{request.key}"
    for number, line in enumerate(document):
        assert line["result_uri"].startswith(f"{results}/{number}.json?X-Signature=secret")
        assert line["progress_uri"].startswith(f"{results}/{number}.progress.json?X-Signature=")
    assert (request.result_uri, request.claim_uri) == (None, None)
    # Three tasks, one after the other: the last one may write this long after the launch.
    longest = timedelta(minutes=10) + 3 * timedelta(hours=1) + timedelta(minutes=15, seconds=30)
    assert {e for method, _, e in storage.signed if method == "PUT"} == {longest}
    assert "secret" not in repr(request.tasks)
    assert stored_secrets(bench) == []


def test_no_url_is_signed_for_longer_than_a_week_and_no_task_may_need_that(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    storage = Signing(f"file://{tmp_path}/store")
    options = {"max_tasks": 3, "signed_urls": True}
    bench = make_bench(
        job(timeout="6d", options=options),
        job("long", timeout="7d", options=options),
        job("untold", timeout="7d", options=options, receipt="ignored"),
        settings=SHARED,
        storage=storage,
    )
    bench.enqueue(["a", "b", "c"])
    bench.turn()
    assert {expires for _, _, expires in storage.signed} == {WEEK}
    with pytest.raises(InvalidInput) as refused:
        bench.enqueue(["a"], "long")
    assert str(refused.value) == (
        "job long gives its tasks signed URLs, which live 7d at most, and a task may write its "
        "receipt only 7d25m after its launch (start_timeout 10m, timeout 7d, and 15m): shorten "
        "these, or do without options.signed_urls"
    )
    bench.enqueue(["a"], "untold")


def test_a_launch_that_is_repeated_is_given_urls_that_are_signed_anew(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    storage = Signing(f"file://{tmp_path}/store")
    one = job(options={"max_tasks": 3, "signed_urls": True})
    bench = make_bench(one, settings=SHARED, storage=storage)
    bench.enqueue(["a", "b", "c"])
    bench.world.fail_next("launch", Fault.UNAVAILABLE)
    bench.turn()
    bench.until(lambda: bool(bench.world.requests()), "it was launched", step=5)
    (request,) = bench.world.requests()
    again, first = storage.documents()
    assert f"{request.key}.2.jsonl" in (request.input_uri or "")
    assert [line["items"] for line in again] == [line["items"] for line in first]
    assert not {line["result_uri"] for line in again} & {line["result_uri"] for line in first}


def test_signed_urls_keep_packs_so_small_that_they_can_be_signed_in_time(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    storage = Signing(f"file://{tmp_path}/store")
    options = {"max_tasks": 600, "signed_urls": True}
    bench = make_bench(
        job(options=options),
        job("untold", options=options, receipt="ignored"),
        settings=SHARED,
        storage=storage,
    )
    bench.enqueue(range(600))
    bench.turn()
    bench.enqueue(range(600), "untold")
    bench.turn()
    assert sorted(len(request.tasks) for request in bench.world.requests()) == [300, 300, 600]


class Unsigning(Storage):
    """A storage for which nothing can be signed."""

    def sign_all(self, *_: Any, **__: Any) -> list[str]:
        raise StorageRefused("no permission to sign")


def test_urls_that_cannot_be_signed_reject_the_launch_in_the_storages_words(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    bench = make_bench(
        job(options={"signed_urls": True}), storage=Unsigning(f"file://{tmp_path}/store")
    )
    batch = bench.enqueue(["a"])
    bench.turn(3)
    (attempt,) = next(iter(bench.dispatcher.chunks(batch.id))).attempts
    assert attempt.outcome == "rejected"
    assert attempt.reason == "the URLs for receipts cannot be signed: no permission to sign"
    assert bench.world.calls["launch"] == 0


def test_old_documents_and_results_are_removed(make_bench: MakeBench, storage: Storage) -> None:
    bench = make_bench(job(options={"max_tasks": 3}), settings=SHARED, storage=storage)
    bench.enqueue(["a", "b", "c"])
    bench.turn()
    storage.create("results/b/k/0.json", b"{}")
    bench.engine.clean(HERE)
    assert len(list(storage.list("inputs/"))) == 1, "they are not old"
    bench.advance(13 * 86400)
    bench.engine.clean(HERE)
    assert len(list(storage.list("inputs/"))) == 1, "they are kept for two weeks"
    bench.advance(2 * 86400)  # by the database's clock; the worker's own does not count
    bench.engine.clean(HERE)
    assert [o for p in ("inputs/", "results/") for o in storage.list(p)] == []


# --- definitions ----------------------------------------------------------------------------------


def test_the_parallelism_of_a_definition_decides_slots_and_deadlines(make_bench: MakeBench) -> None:
    one = job(timeout="1h", options={"max_tasks": 200, "parallelism": 200})
    bench = make_bench(one, settings={"parallelism": 2}, limits={"max_running": 3})
    bench.script(seconds=7200)
    bench.enqueue(range(200))
    bench.turn()
    (row,) = bench.sql("SELECT parallelism || ' of ' || open_tasks FROM dispatcher.execution")
    assert row == "2 of 200", "it holds two slots, so one pack has room in three"
    (hours,) = bench.sql(
        "SELECT extract(epoch FROM deadline - start_deadline)::int / 3600 FROM dispatcher.execution"
    )
    assert hours == 100


def test_a_start_deadline_is_not_held_against_tasks_that_wait_for_their_turn(
    make_bench: MakeBench,
) -> None:
    one = job(timeout="1h", start_timeout="1m", options={"max_tasks": 6, "parallelism": 6})
    bench = make_bench(one, settings={"parallelism": 2})
    bench.script(seconds=300)
    batch = bench.enqueue(range(6))
    bench.turn(2)
    bench.turn(2)
    said = explain(bench.store, batch.id).text
    assert "At most 2 of them run at the same time" in said
    assert "the other 4 wait there for their turn" in said
    bench.until(lambda: batch.refresh().finished, "the batch ended", step=20)
    assert batch.refresh().state == "succeeded"


def test_a_definition_is_asked_for_once_in_five_minutes(make_bench: MakeBench) -> None:
    bench = make_bench()
    place = bench.engine.places[HERE]
    asked: list[Any] = []
    place.definitions._backend = _Asked(asked)  # type: ignore[assignment]  # only this is called
    for _ in range(3):
        bench.enqueue([1])
        bench.turn(1)
    assert len(asked) == 1
    bench.enqueue([1])
    bench.turn(301)
    assert len(asked) == 2


class _Asked:
    """Answers for definitions and notes that it was asked."""

    def __init__(self, asked: list[Any], *errors: Exception) -> None:
        self._asked = asked
        self._errors = list(errors)

    def definition(self, options: Any) -> Definition:
        self._asked.append(options)
        if self._errors:
            raise self._errors.pop(0)
        return Definition()


def test_while_a_definition_cannot_be_read_its_batches_wait(make_bench: MakeBench) -> None:
    bench = make_bench()
    place = bench.engine.places[HERE]
    place.definitions._backend = _Asked([], Unavailable("no route"))  # type: ignore[assignment]  # as above
    batch = bench.enqueue([1])
    bench.turn()
    assert bench.world.calls["launch"] == 0
    assert bench.sql("SELECT down_reason FROM dispatcher.target") == ["no route"]
    bench.until(lambda: batch.refresh().finished, "the batch ended", step=5)


def test_a_definition_that_is_not_there_leaves_the_refusal_to_the_launch(
    make_bench: MakeBench,
) -> None:
    bench = make_bench()
    place = bench.engine.places[HERE]
    place.definitions._backend = _Asked([], Rejected("no such job"))  # type: ignore[assignment]  # as above
    bench.enqueue([1])
    bench.turn()
    assert bench.world.calls["launch"] == 1


def test_what_a_definition_was_goes_on_to_count_while_it_cannot_be_read(
    make_bench: MakeBench,
) -> None:
    one = job(options={"max_tasks": 6, "parallelism": 6})
    bench = make_bench(one, settings={"parallelism": 2})
    bench.enqueue([1])
    bench.turn()
    place = bench.engine.places[HERE]
    errors = [RuntimeError("met another transaction"), Rejected("not now")]
    place.definitions._backend = _Asked([], *errors)  # type: ignore[assignment]  # as above
    bench.advance(301)
    for _ in range(2):
        bench.enqueue(range(6))
        bench.turn(1)
    rows = bench.sql("SELECT parallelism FROM dispatcher.execution WHERE tasks = 6")
    assert rows == [2, 2]


def test_a_pack_is_written_once_for_all_its_tasks(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[str] = []
    original = requests.render

    def counting(text: str, values: Any) -> str:
        rendered.append(text)
        return original(text, values)

    monkeypatch.setattr(requests, "render", counting)
    one = job(env={"IDS": "{pack:csv}"}, options={"max_tasks": 50, "parallelism": 50})
    bench = make_bench(one, settings={"per_task_env": False})
    bench.enqueue(range(50))
    bench.plan()
    rendered.clear()
    bench.launch()
    assert rendered == ["{pack:csv}"]


def test_a_document_that_is_too_large_is_cut_into_several_executions(
    make_bench: MakeBench, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "DOCUMENT_BYTES", 2000)
    wrapped = job(args=["{items:json}", "{items:json}"], options={"max_tasks": 8, "wrapped": True})
    bench = make_bench(wrapped, settings=SHARED, storage=storage)
    bench.enqueue(["x" * 200] * 8)
    bench.turn()
    assert [len(lines(request)) for request in bench.world.requests()] == [2, 2, 2, 2]


def test_the_request_says_when_it_was_meant(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.enqueue([1])
    bench.turn()
    (request,) = bench.world.requests()
    assert request.intended_at is not None
    assert abs(request.intended_at - datetime.now(UTC)) < timedelta(hours=1)
