"""How items become chunks, how free slots are shared, how chunks fill executions.

Functions of their arguments only: nothing here reads a file, a clock or a database.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from pydantic_core import from_json, to_json

from dispatcher.errors import InvalidItems
from dispatcher.items import join_items
from dispatcher.job import Chunking

__all__ = [
    "MAX_BALANCED_BYTES",
    "MAX_BALANCED_ITEMS",
    "MAX_WEIGHT",
    "CannotPlan",
    "PlannedChunk",
    "Waiting",
    "fair_shares",
    "pack",
    "plan_chunks",
]

MAX_BALANCED_ITEMS: Final = 100_000
"""`count` and `balance_by` see all items at once, so their number is limited."""

MAX_BALANCED_BYTES: Final = 64 << 20
"""And so is their text in all."""

MAX_WEIGHT: Final = 10**18
"""The largest weight of an item; sums of such weights stay exact enough and finite."""


class CannotPlan(InvalidItems):
    """These items cannot be cut into chunks as the job says."""


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """One slice of a batch's items."""

    index: int
    """From 0, in the order of each chunk's first item."""

    items: str
    """The text of one JSON array, as `join_items` makes it."""

    count: int
    bytes: int
    """The length of `items` in UTF-8."""

    weight: float | None = None
    """The sum of its items' `balance_by`, if the job has that."""


def plan_chunks(
    items: Iterable[str], chunking: Chunking, *, max_payload_bytes: int
) -> Iterator[PlannedChunk]:
    """Cut items into chunks, in order, each item into exactly one.

    - `size: n`, and `max_items: n` alone: n items a chunk, the last one shorter. Streams: only one
      chunk is in memory.
    - `count: k`: k chunks whose sizes differ by one at most; fewer if there are fewer items.
    - `max_items: n, balance_by: f`: as few chunks as n allows, their sums of f made even.
    - `count: k, balance_by: f`: k chunks, their sums of f made even.

    `balance_by` names a field of each item; the same items always give the same chunks.

    Args:
        items: the JSON text of each item.
        chunking: how.
        max_payload_bytes: what the items of one chunk may take, as JSON in UTF-8.

    Raises:
        CannotPlan: a chunk is too large; there are too many items to see at once; an item has no
            usable weight. Naming the chunk or item and what to change.
    """
    if chunking.balance_by is not None:
        texts = _all_items(items)
        yield from _balanced(texts, chunking, chunking.balance_by, max_payload_bytes)
    elif chunking.count is not None:
        texts = _all_items(items)
        start = 0
        for index, size in enumerate(_even(len(texts), min(chunking.count, len(texts)))):
            yield _chunk(index, texts[start : start + size], max_payload_bytes)
            start += size
    else:
        yield from _slices(items, chunking.size or chunking.max_items or 1, max_payload_bytes)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A batch that has chunks to launch on some target."""

    batch_id: str
    priority: int
    """The higher goes first."""

    due: int
    """Chunks that could be launched now."""

    running: int
    """Slots that it holds now."""

    room: int | None = None
    """Slots that its own limits still allow; None for no limit."""


def fair_shares(waiting: Sequence[Waiting], free: int) -> dict[str, int]:
    """Share the free slots of a target among the batches that wait for them.

    A higher priority takes all it can use before a lower one gets any. Among equals the batch that
    holds the fewest slots gets the next one, ties in the order given, so a small batch starts at
    once however much waits in a large one. No slot that somebody can use stays free.

    Returns:
        The slots for each batch that gets any; their sum is at most `free`.
    """
    shares: dict[str, int] = {}
    by_priority = sorted(waiting, key=lambda one: -one.priority)
    for _, group in groupby(by_priority, key=lambda one: one.priority):
        free -= _fill(list(group), free, shares)
    return shares


def pack(count: int, max_tasks: int) -> list[int]:
    """Say how many chunks each execution gets: as few executions as possible, evenly filled.

    Never more tasks than chunks, never an execution without a task.
    """
    return _even(count, math.ceil(count / max_tasks))


def _even(total: int, parts: int) -> list[int]:
    """Cut a number into parts that differ by one at most, the larger ones first."""
    if parts <= 0:
        return []
    base, larger = divmod(total, parts)
    return [base + 1] * larger + [base] * (parts - larger)


def _slices(items: Iterable[str], size: int, max_payload_bytes: int) -> Iterator[PlannedChunk]:
    texts: list[str] = []
    index = 0
    characters = 0
    for text in items:
        texts.append(text)
        characters += len(text)
        # A chunk that is far too large is refused before it fills the memory.
        if len(texts) == size or characters > max_payload_bytes:
            yield _chunk(index, texts, max_payload_bytes)
            index += 1
            texts = []
            characters = 0
    if texts:
        yield _chunk(index, texts, max_payload_bytes)


def _chunk(
    index: int, texts: Sequence[str], max_payload_bytes: int, weight: float | None = None
) -> PlannedChunk:
    joined = join_items(texts)
    size = len(joined) if joined.isascii() else len(joined.encode())
    if size > max_payload_bytes:
        change = (
            "put the data into storage and let the item name it"
            if len(texts) == 1
            else "give the job fewer items a chunk (`chunk`: a smaller `size` or `max_items`, or a "
            "larger `count`)"
        )
        raise CannotPlan(
            f"chunk {index} would be too large: {size:,} bytes with its first {len(texts):,} "
            f"item{'s' if len(texts) > 1 else ''}, and the target takes {max_payload_bytes:,} for "
            f"one task; {change}"
        )
    return PlannedChunk(index, joined, len(texts), size, weight)


def _all_items(items: Iterable[str]) -> list[str]:
    texts: list[str] = []
    characters = 0
    for text in items:
        texts.append(text)
        characters += len(text)
        if len(texts) > MAX_BALANCED_ITEMS or characters > MAX_BALANCED_BYTES:
            raise CannotPlan(
                f"there are more than {MAX_BALANCED_ITEMS:,} items or {MAX_BALANCED_BYTES:,} "
                "bytes of them, and `count` and `balance_by` need to see all at once; use "
                "`chunk: {size: N}`, or enqueue several batches"
            )
    return texts


def _balanced(
    texts: Sequence[str], chunking: Chunking, field: str, max_payload_bytes: int
) -> Iterator[PlannedChunk]:
    """Give each item, the heaviest first, to the lightest chunk that has room."""
    total = len(texts)
    room = chunking.max_items or max(total, 1)
    parts = min(chunking.count or math.ceil(total / room), total)
    weights = [_weight(text, position, field) for position, text in enumerate(texts)]
    # Among chunks of equal weight the one with fewer items: without it, items of no weight would
    # all go to one chunk, and leave others empty.
    lightest: list[tuple[float, int, int]] = [(0, 0, part) for part in range(parts)]
    members: list[list[int]] = [[] for _ in range(parts)]
    for place in sorted(range(total), key=lambda place: -weights[place]):
        weight, count, part = lightest[0]
        members[part].append(place)
        if count + 1 < room:
            heapq.heapreplace(lightest, (weight + weights[place], count + 1, part))
        else:
            heapq.heappop(lightest)
    for index, places in enumerate(sorted(sorted(places) for places in members)):
        chosen = [texts[place] for place in places]
        weight = sum(weights[place] for place in places)
        yield _chunk(index, chosen, max_payload_bytes, weight)


def _weight(text: str, position: int, field: str) -> float:
    item = from_json(text)
    if not isinstance(item, dict):
        raise CannotPlan(
            f"item {position} is no object, so it has no {field!r} to balance by: {text[:60]}; "
            "`balance_by` needs items that are objects"
        )
    if field not in item:
        raise CannotPlan(
            f"item {position} has no {field!r}, by which the job balances: {text[:60]}; give each "
            "item one, or leave `balance_by` out"
        )
    weight = item[field]
    # CSV has no numbers, only their spelling.
    if isinstance(weight, str) and re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,18})?", weight):
        weight = float(weight) if "." in weight else int(weight)
    if (
        isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not 0 <= weight <= MAX_WEIGHT
    ):
        shown = to_json(weight, inf_nan_mode="constants").decode()[:60]
        raise CannotPlan(
            f"item {position} has {field!r} = {shown}, by which the job balances; it must be a "
            f"number from 0 to {MAX_WEIGHT:.0e}"
        )
    return weight


def _fill(equals: Sequence[Waiting], free: int, shares: dict[str, int]) -> int:
    """Share slots among batches of one priority, write them into `shares`, return how many."""
    wants = [max(0, one.due if one.room is None else min(one.due, one.room)) for one in equals]
    if free <= 0 or not any(wants):
        return 0

    def given(level: int) -> list[int]:
        """What each gets if all are filled up to holding `level` slots."""
        return [
            min(want, max(0, level - one.running)) for one, want in zip(equals, wants, strict=True)
        ]

    # The highest level that the free slots reach, by bisection.
    low, high = 0, max(one.running + want for one, want in zip(equals, wants, strict=True))
    while low < high:
        level = (low + high + 1) // 2
        if sum(given(level)) <= free:
            low = level
        else:
            high = level - 1
    gets = given(low)
    # What is left is less than one slot for each that stands at that level and wants more.
    left = free - sum(gets)
    for place, one in enumerate(equals):
        if left and gets[place] < wants[place] and one.running + gets[place] == low:
            gets[place] += 1
            left -= 1
    for one, share in zip(equals, gets, strict=True):
        if share:
            shares[one.batch_id] = share
    return sum(gets)
