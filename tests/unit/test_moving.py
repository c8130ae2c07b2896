from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.engine.moving import FREE_SPLITS, SCARCE, SPLITS_PER_SUCCESS, Splits, move
from dispatcher.job import RetryPolicy
from dispatcher.receipts import ItemResult
from dispatcher.requests import Plan
from dispatcher.states import CancelKind, ChunkState, Cut, Outcome
from dispatcher.store.rows import Closing, MovedChunk, OpenAttempt

BAD = sorted(set(Outcome) - {Outcome.SUCCEEDED})


def attempt(size: int = 4, *, items_ok: int = 0, depth: int = 0) -> OpenAttempt:
    return OpenAttempt("b", 0, 1, 7, 0, 0, size, items_ok, depth, None)


def closing(outcome: Outcome, of: OpenAttempt | None = None, **more: Any) -> Closing:
    return Closing(of or attempt(), outcome, None, None, None, None, **more)


def results(*ok: bool) -> tuple[ItemResult, ...]:
    return tuple(ItemResult(position, good) for position, good in enumerate(ok))


def moved(one: Closing, *, pack: int = 1, retry: Any = None, **more: Any) -> MovedChunk:
    policy = RetryPolicy.model_validate({"attempts": 2, **(retry or {})})
    plan = cast("Plan", SimpleNamespace(job=SimpleNamespace(retry=policy), max_tasks=pack))
    given_ = {
        "cancel": None,
        "tally": {},
        "roll": 0.5,
        "goes_on": False,
        "splits": Splits(0, 0),
        **more,
    }
    return move(one, plan, **given_)


def test_a_success_counts_all_items_whatever_was_told_of_them() -> None:
    chunk = moved(closing(Outcome.SUCCEEDED, results=results(True)))
    assert (chunk.state, chunk.items_ok, chunk.reason) == (ChunkState.SUCCEEDED, 4, None)


@pytest.mark.parametrize("outcome", BAD)
def test_a_chunk_of_which_each_item_has_succeeded_has_succeeded(outcome: Outcome) -> None:
    one = closing(outcome, attempt(4, items_ok=2), results=results(True, True))
    assert moved(one).state is ChunkState.SUCCEEDED


@pytest.mark.parametrize(
    ("cancel", "state"),
    [
        (CancelKind.OPERATOR, ChunkState.CANCELLED),
        (CancelKind.BATCH_DEADLINE, ChunkState.FAILED),
        (CancelKind.SUCCESS_POLICY, ChunkState.FAILED),
    ],
)
def test_in_a_cancelled_batch_nothing_is_tried_again(cancel: CancelKind, state: ChunkState) -> None:
    assert moved(closing(Outcome.FAILED), cancel=cancel).state is state


def test_a_retry_waits_for_company_only_while_others_of_its_execution_run() -> None:
    one = closing(Outcome.FAILED)
    assert moved(one, pack=10, goes_on=True).hold is not None
    assert moved(one, pack=10, goes_on=False).hold is None
    assert moved(one, pack=1, goes_on=True).hold is None


def test_a_chunk_is_split_only_when_its_attempts_are_used_up() -> None:
    retry, used = {"on_failure": "split"}, {"failed": 1}
    assert moved(closing(Outcome.FAILED), retry=retry).state is ChunkState.PENDING
    assert moved(closing(Outcome.FAILED), retry=retry, tally=used).state is ChunkState.SPLIT


def test_a_chunk_is_not_split_whose_bad_items_are_known_by_name() -> None:
    one = closing(Outcome.FAILED, results=results(True, False), receipt="complete")
    assert moved(one, retry={"on_failure": "split"}, tally={"failed": 1}).state is ChunkState.FAILED


def test_parts_have_one_try_each_and_an_item_alone_has_them_all() -> None:
    retry = {"on_failure": "split", "attempts": 3}
    assert moved(closing(Outcome.FAILED, attempt(2, depth=1)), retry=retry).state == "split"
    assert moved(closing(Outcome.FAILED, attempt(1, depth=2)), retry=retry).state == "pending"


def test_while_nothing_succeeds_some_chunks_of_a_batch_are_split_and_the_others_wait() -> None:
    splits = Splits(0, 0)
    chunks = [
        moved(
            closing(Outcome.FAILED),
            retry={"on_failure": "split", "attempts": 1},
            splits=splits,
        )
        for _ in range(FREE_SPLITS + 5)
    ]
    assert [chunk.state for chunk in chunks] == ["split"] * FREE_SPLITS + ["pending"] * 5
    few = FREE_SPLITS - SCARCE + 1
    assert [chunk.cut for chunk in chunks] == [
        *[Cut.HALVES] * few,
        *[Cut.FIRST] * (FREE_SPLITS - few),
        *[Cut.HALVES] * 5,
    ], "when few are left, single items tell soonest whether anything can succeed"
    assert Splits(FREE_SPLITS, 1).room == SPLITS_PER_SUCCESS, "successes pay for further ones"


def test_a_part_without_its_receipt_has_one_try_too() -> None:
    retry = {"on_failure": "split", "infrastructure_attempts": 5}
    suspect = closing(Outcome.SUSPECT, attempt(2, depth=1))
    assert moved(suspect, retry=retry).state is ChunkState.SPLIT
    lost = closing(Outcome.LOST, attempt(2, depth=1))
    assert moved(lost, retry=retry).state is ChunkState.PENDING, "that says nothing of its items"


def test_what_never_started_is_not_split() -> None:
    retry = {"on_failure": "split", "infrastructure_attempts": 1}
    assert moved(closing(Outcome.START_FAILED), retry=retry).state is ChunkState.FAILED


def test_an_exit_code_that_is_not_to_be_tried_again_is_split_at_once() -> None:
    one = closing(Outcome.FAILED)._replace(exit_code=65)
    retry = {"on_failure": "split", "attempts": 3, "exit_codes": {65: "fail"}}
    assert moved(one, retry=retry).state is ChunkState.SPLIT
    alone = closing(Outcome.FAILED, attempt(1, depth=2))._replace(exit_code=65)
    assert moved(alone, retry=retry).state is ChunkState.FAILED


def test_what_a_spoilt_batch_stops_is_cancelled_and_what_spoilt_it_has_failed() -> None:
    for outcome, state in ((Outcome.CANCELLED, "cancelled"), (Outcome.FAILED, "failed")):
        assert moved(closing(outcome), cancel=CancelKind.SUCCESS_POLICY).state == state


@given(
    outcome=st.sampled_from(list(Outcome)),
    size=st.integers(1, 6),
    told=st.lists(st.booleans(), max_size=6),
    depth=st.integers(0, 8),
    policy=st.sampled_from(["fail", "split"]),
    tally=st.dictionaries(st.sampled_from(list(Outcome)), st.integers(0, 9)),
    cancel=st.none() | st.sampled_from(list(CancelKind)),
)
def test_a_chunk_goes_on_only_if_items_are_left_and_nobody_cancelled(
    outcome: Outcome,
    size: int,
    told: list[bool],
    depth: int,
    policy: str,
    tally: dict[Outcome, int],
    cancel: CancelKind | None,
) -> None:
    one = closing(outcome, attempt(size, depth=depth), results=results(*told[:size]))
    chunk = moved(one, retry={"on_failure": policy}, tally=tally, cancel=cancel)
    assert 0 <= chunk.items_ok <= size
    if chunk.state in (ChunkState.PENDING, ChunkState.SPLIT):
        assert chunk.items_ok < size
        assert cancel is None
        assert outcome is not Outcome.SUCCEEDED
    if chunk.state is ChunkState.SPLIT:
        assert size - chunk.items_ok > 1, "halves are smaller: it ends"
    if chunk.state is ChunkState.SUCCEEDED:
        assert chunk.items_ok == size
    assert (chunk.delay, chunk.hold) == (0.0, None) or chunk.state is ChunkState.PENDING
