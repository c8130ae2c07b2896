"""Items into chunks, slots among batches, chunks into executions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher import planning
from dispatcher.items import split_items
from dispatcher.job import Chunking
from dispatcher.planning import (
    CannotPlan,
    PlannedChunk,
    Waiting,
    fair_shares,
    pack,
    plan_chunks,
)

ITEMS = st.lists(st.integers(0, 10**6).map(str), max_size=60)
WEIGHTS = st.lists(st.integers(0, 1000) | st.floats(0, 1000), max_size=60)
LIMIT = 10_000


def plan(items: Any, limit: int = LIMIT, **chunking: Any) -> list[PlannedChunk]:
    return list(plan_chunks(items, Chunking(**chunking), max_payload_bytes=limit))


def refusal(items: Any, limit: int = LIMIT, **chunking: Any) -> str:
    with pytest.raises(CannotPlan) as caught:
        plan(items, limit, **chunking)
    return str(caught.value)


def weighed(weights: list[Any]) -> list[str]:
    return [json.dumps({"n": n, "bytes": weight}) for n, weight in enumerate(weights)]


def items_of(chunks: list[PlannedChunk]) -> list[str]:
    return list(chain.from_iterable(split_items(chunk.items) for chunk in chunks))


class TestChunks:
    @given(ITEMS, st.integers(1, 20), st.sampled_from(["size", "max_items"]))
    def test_slices_keep_the_order_and_only_the_last_is_shorter(
        self, items: list[str], size: int, word: str
    ) -> None:
        chunks = plan(items, **{word: size})
        assert items_of(chunks) == items
        assert [chunk.count for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
        assert all(1 <= chunk.count <= size for chunk in chunks)
        assert [chunk.index for chunk in chunks] == list(range(len(chunks)))

    @given(ITEMS, st.integers(1, 80))
    def test_a_count_of_chunks_differs_by_one_item_at_most(
        self, items: list[str], count: int
    ) -> None:
        chunks = plan(items, count=count)
        assert items_of(chunks) == items
        assert len(chunks) == min(count, len(items))
        sizes = {chunk.count for chunk in chunks}
        assert not sizes or max(sizes) - min(sizes) <= 1

    @given(st.lists(st.text(min_size=1), max_size=20), st.integers(1, 5))
    def test_a_chunk_tells_its_size_in_bytes(self, values: list[str], size: int) -> None:
        items = [json.dumps(value, ensure_ascii=True) for value in values]
        for chunk in plan(items, size=size):
            assert chunk.bytes == len(chunk.items.encode())
            assert chunk.count == len(json.loads(chunk.items))
            assert chunk.weight is None

    def test_bytes_are_counted_and_not_characters(self) -> None:
        assert plan(['"é"'], size=1)[0].bytes == 6

    def test_slices_are_planned_while_the_items_still_come(self) -> None:
        taken = 0

        def endless() -> Iterator[str]:
            nonlocal taken
            while True:
                taken += 1
                yield str(taken)

        chunks = plan_chunks(endless(), Chunking(size=10), max_payload_bytes=LIMIT)
        assert next(chunks).count == 10
        assert taken == 10

    def test_no_items_make_no_chunks(self) -> None:
        assert plan([], size=3) == plan([], count=3) == plan([], max_items=3) == []
        assert plan([], count=3, balance_by="bytes") == []
        assert plan([], max_items=3, balance_by="bytes") == []

    def test_a_chunk_too_large_for_its_target_is_refused(self) -> None:
        assert refusal(["1", "2", '"long"', '"longer"', "5"], limit=17, size=4) == (
            "chunk 0 would be too large: 24 bytes with its first 4 items, and the target takes 17 "
            "for one task; give the job fewer items a chunk (`chunk`: a smaller `size` or "
            "`max_items`, or a larger `count`)"
        )
        assert refusal(["1", '"much too long"'], limit=12, size=1) == (
            "chunk 1 would be too large: 17 bytes with its first 1 item, and the target takes 12 "
            "for one task; put the data into storage and let the item name it"
        )

    def test_a_chunk_far_too_large_is_refused_before_it_fills_the_memory(self) -> None:
        taken = 0

        def endless() -> Iterator[str]:
            nonlocal taken
            while True:
                taken += 1
                yield '"0123456789"'

        assert "chunk 0 would be too large" in refusal(endless(), limit=100, size=1_000_000)
        assert taken < 20

    @pytest.mark.parametrize("chunking", [{"count": 3}, {"max_items": 3, "balance_by": "bytes"}])
    def test_more_items_than_can_be_seen_at_once_are_refused(
        self, chunking: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(planning, "MAX_BALANCED_ITEMS", 10)
        plan(weighed([1] * 10), **chunking)
        assert refusal(weighed([1] * 11), **chunking).startswith(
            "there are more than 10 items or 67,108,864 bytes of them"
        )
        monkeypatch.setattr(planning, "MAX_BALANCED_BYTES", 10)
        assert "or 10 bytes of them" in refusal(weighed([1]), **chunking)


class TestBalance:
    @given(WEIGHTS, st.integers(1, 20))
    def test_balancing_uses_as_few_chunks_as_the_largest_allows(
        self, weights: list[float], room: int
    ) -> None:
        items = weighed(weights)
        chunks = plan(items, max_items=room, balance_by="bytes")
        assert len(chunks) == -(-len(items) // room)
        assert all(1 <= chunk.count <= room for chunk in chunks)
        self.check(items, chunks)

    @given(WEIGHTS, st.integers(1, 80))
    def test_balancing_a_count_leaves_no_chunk_empty(
        self, weights: list[float], count: int
    ) -> None:
        items = weighed(weights)
        chunks = plan(items, count=count, balance_by="bytes")
        assert len(chunks) == min(count, len(items))
        assert all(chunk.count for chunk in chunks)
        self.check(items, chunks)

    @given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(1, 20))
    def test_no_chunk_of_a_count_is_heavier_than_greed_promises(
        self, weights: list[int], count: int
    ) -> None:
        chunks = plan(weighed(weights), count=count, balance_by="bytes")
        # The last item of the heaviest chunk went to what was the lightest one then.
        bound = sum(weights) / len(chunks) + max(weights)
        assert max(chunk.weight or 0 for chunk in chunks) <= bound

    @staticmethod
    def check(items: list[str], chunks: list[PlannedChunk]) -> None:
        """Each item is in one chunk; order inside, and of the chunks by their first item."""
        order = {item: place for place, item in enumerate(items)}
        places = [[order[item] for item in split_items(chunk.items)] for chunk in chunks]
        assert sorted(chain.from_iterable(places)) == list(range(len(items)))
        assert all(part == sorted(part) for part in places)
        assert places == sorted(places)
        assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
        for chunk in chunks:
            weights = [item["bytes"] for item in json.loads(chunk.items)]
            assert chunk.weight == pytest.approx(sum(weights))

    def test_the_heaviest_items_are_spread(self) -> None:
        chunks = plan(weighed([1, 100, 2, 90, 3, 80]), max_items=2, balance_by="bytes")
        assert [chunk.weight for chunk in chunks] == [101, 92, 83]

    def test_numbers_may_be_spelled_as_csv_spells_them(self) -> None:
        assert plan(weighed(["12", "1.5"]), count=1, balance_by="bytes")[0].weight == 13.5

    @pytest.mark.parametrize(
        ("item", "said"),
        [
            ('{"id":7}', "item 1 has no 'bytes', by which the job balances: {\"id\":7}; give each"),
            ("[1]", "item 1 is no object, so it has no 'bytes' to balance by: [1]; "),
            *(
                (
                    f'{{"bytes":{value}}}',
                    (
                        f"item 1 has 'bytes' = {shown}, by which the job balances; it must be a "
                        "number from 0 to 1e+18"
                    ),
                )
                for value, shown in [
                    *((bad, bad) for bad in ["true", "null", '"many"', '"-1"', "-1", "-0.5"]),
                    ("1e999", "Infinity"),
                    ("1000000000000000001", "1000000000000000001"),
                ]
            ),
        ],
    )
    def test_an_item_without_a_usable_weight_is_named(self, item: str, said: str) -> None:
        assert refusal(['{"bytes":1}', item], count=2, balance_by="bytes").startswith(said)


WAITING = st.builds(
    Waiting,
    batch_id=st.uuids().map(str),
    priority=st.integers(0, 2),
    due=st.integers(0, 40),
    running=st.integers(0, 40),
    room=st.none() | st.integers(-3, 40),
)


def room(one: Waiting) -> int:
    return max(0, one.due if one.room is None else min(one.due, one.room))


class TestShares:
    @given(st.lists(WAITING, max_size=12), st.integers(-5, 200))
    def test_no_share_is_more_than_is_free_or_wanted_and_no_slot_stays_free(
        self, waiting: list[Waiting], free: int
    ) -> None:
        shares = fair_shares(waiting, free)
        assert all(
            0 < shares[one.batch_id] <= room(one) for one in waiting if one.batch_id in shares
        )
        assert sum(shares.values()) == max(0, min(free, sum(map(room, waiting))))

    @given(st.lists(WAITING, max_size=12), st.integers(0, 200))
    def test_among_equals_nobody_gets_a_slot_that_would_even_things_out_elsewhere(
        self, waiting: list[Waiting], free: int
    ) -> None:
        shares = fair_shares(waiting, free)
        for one in waiting:
            for other in waiting:
                got = shares.get(one.batch_id, 0)
                others = shares.get(other.batch_id, 0)
                if one.priority == other.priority and got and others < room(other):
                    assert one.running + got <= other.running + others + 1

    @given(st.lists(WAITING, max_size=12), st.integers(0, 200))
    def test_a_lower_priority_gets_nothing_while_a_higher_one_wants_more(
        self, waiting: list[Waiting], free: int
    ) -> None:
        shares = fair_shares(waiting, free)
        for one in waiting:
            if shares.get(one.batch_id, 0) < room(one):
                assert not any(
                    other.batch_id in shares for other in waiting if other.priority < one.priority
                )

    @given(st.lists(WAITING, max_size=8), st.integers(0, 60))
    def test_sharing_is_the_same_as_giving_slot_by_slot(
        self, waiting: list[Waiting], free: int
    ) -> None:
        given = {one.batch_id: 0 for one in waiting}
        for _ in range(free):
            wanting = [one for one in waiting if given[one.batch_id] < room(one)]
            if not wanting:
                break
            first = min(wanting, key=lambda one: (-one.priority, one.running + given[one.batch_id]))
            given[first.batch_id] += 1
        assert fair_shares(waiting, free) == {name: got for name, got in given.items() if got}

    def test_a_small_batch_behind_a_large_one_starts_at_once(self) -> None:
        large = Waiting("large", priority=0, due=9_900, running=100)
        small = Waiting("small", priority=0, due=10, running=0)
        assert fair_shares([large, small], 7) == {"small": 7}
        assert fair_shares([large, small], 30) == {"large": 20, "small": 10}

    def test_thousands_of_batches_are_shared_among_quickly(self) -> None:
        waiting = [Waiting(str(n), n % 3, n % 50, n % 7, None) for n in range(5_000)]
        assert sum(fair_shares(waiting, 40_000).values()) == 40_000


class TestPack:
    @given(st.integers(0, 10_000), st.integers(1, 500))
    def test_packs_are_few_even_and_hold_everything(self, count: int, max_tasks: int) -> None:
        sizes = pack(count, max_tasks)
        assert sum(sizes) == count
        assert len(sizes) == -(-count // max_tasks)
        assert all(1 <= size <= max_tasks for size in sizes)
        assert not sizes or max(sizes) - min(sizes) <= 1
