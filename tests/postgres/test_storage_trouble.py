"""A storage that has to be mended: who is refused meanwhile, who waits, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from workbench import HERE, LEASE, Bench, job

from dispatcher.errors import InvalidInput
from dispatcher.explaining import explain
from dispatcher.storage import Storage
from dispatcher.storing import Told, tell

MakeBench = Callable[..., Bench]

GONE = "cannot write s3://none/checks/x: there is no such bucket; make it, or mend the storage URL"
SHARED: Mapping[str, Any] = {"per_task_env": False, "relaunch_safe": False}


def lead(bench: Bench, told: Told, lease: timedelta = LEASE) -> None:
    """Let the leader of the target tell what it found."""
    limits = tell(told)
    assert bench.store.lease(HERE, backend="null", limits=limits, home=None, lease=lease) is None


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/store")


@pytest.fixture
def bench(make_bench: MakeBench, storage: Storage) -> Bench:
    made = make_bench(
        job(),
        job("strict", receipt="required"),
        job("wrapped", options={"wrapped": True}),
        job("signed", options={"signed_urls": True}),
        settings=SHARED,
        storage=storage,
    )
    lead(made, Told(results=True, claims=True, storage_problem=GONE))
    return made


@pytest.mark.parametrize(
    ("name", "need"),
    [
        ("strict", "requires receipts"),
        ("wrapped", "has an entry wrapper, which claims its work there"),
        ("signed", "gives its tasks signed URLs"),
    ],
)
def test_a_job_that_needs_a_storage_which_has_to_be_mended_is_refused_in_its_words(
    name: str, need: str, bench: Bench
) -> None:
    with pytest.raises(InvalidInput) as refused:
        bench.enqueue([1], name)
    assert str(refused.value) == (
        f"job {name} {need}, and the workers of target here cannot use their storage: {GONE}. Mend "
        "DISPATCHER_STORAGE_URL of the workers, or what they may do there, and enqueue again: they "
        "look every half minute. What does not need the storage can be enqueued meanwhile"
    )
    assert bench.sql("SELECT id FROM dispatcher.batch") == []


def test_what_needs_no_storage_runs_beside_one_that_has_to_be_mended(bench: Bench) -> None:
    batch = bench.enqueue([1])
    bench.plan()
    said = explain(bench.store, batch.id)
    assert f"The storage of target here cannot be used: {GONE}. Meanwhile receipts are" in said.text
    assert bench.finish(batch).state == "succeeded"


def test_a_wrapped_image_needs_no_storage_where_nothing_is_claimed(bench: Bench) -> None:
    lead(bench, Told(results=True, claims=False, storage_problem=GONE))
    bench.enqueue([1], "wrapped")


def test_only_signed_urls_are_refused_where_only_the_signing_does_not_work(bench: Bench) -> None:
    lead(bench, Told(results=True, claims=True, signing_problem="403: Request is not valid yet"))
    bench.enqueue([1], "strict")
    with pytest.raises(InvalidInput, match="cannot use their storage: 403: Request is not valid"):
        bench.enqueue([1], "signed")


def test_nothing_is_refused_on_the_word_of_a_leader_that_is_gone(bench: Bench) -> None:
    lead(bench, Told(results=True, claims=True, storage_problem=GONE), timedelta(seconds=5))
    bench.advance(6)
    bench.enqueue([1], "strict")


def test_asking_again_under_the_key_of_a_batch_finds_it_also_while_the_storage_is_gone(
    bench: Bench,
) -> None:
    lead(bench, Told(results=True, claims=True))
    batch = bench.enqueue([1], "strict", key="once")
    lead(bench, Told(results=True, claims=True, storage_problem=GONE))
    assert bench.enqueue([1], "strict", key="once").id == batch.id


def test_what_was_enqueued_before_waits_for_the_storage_and_no_attempt_is_spent(
    bench: Bench,
) -> None:
    lead(bench, Told(results=True, claims=True))
    batch = bench.enqueue([1], "signed")
    lead(bench, Told(results=True, claims=True, storage_problem=GONE))
    said = explain(bench.store, batch.id)
    assert "Meanwhile nothing is launched until it is mended." in said.text
    bench.turn()
    bench.turn(60)
    assert bench.world.calls["launch"] == 0
    assert bench.sql("SELECT attempts FROM dispatcher.chunk") == [0]
    assert bench.sql("SELECT count(*) FROM dispatcher.execution") == [0]
    said = explain(bench.store, batch.id)
    assert (
        "0 of 1 chunk is final. 1 chunk could be launched now, but the job gives its tasks signed "
        f"URLs, and the storage of target here cannot be used: {GONE}. A worker looks every half "
        "minute, and launches when it is mended."
    ) in said.text
    assert [r["problem"] for r in said.facts["reasons"] if r["code"] == "storage"] == [GONE]
    lead(bench, Told(results=True, claims=True))
    assert bench.finish(batch).state == "succeeded"


def test_an_input_that_turns_out_too_large_waits_for_the_storage_too(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    (tmp_path / "store").write_text("a file, where a directory should be")
    storage = Storage(f"file://{tmp_path}/store")
    bench = make_bench(settings={**SHARED, "inline_bytes": 10}, storage=storage)
    lead(bench, Told(results=True, claims=True, storage_problem=GONE))
    batch = bench.enqueue(["x" * 20])
    bench.turn()
    bench.turn(60)
    (chunk,) = bench.dispatcher.chunks(batch.id)
    assert {attempt.outcome for attempt in chunk.attempts} == {"no_capacity"}
    assert "until the storage is mended" in (chunk.attempts[0].reason or "")
    (tmp_path / "store").unlink()
    assert bench.finish(batch).state == "succeeded"
