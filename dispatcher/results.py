"""Reads how the items of a batch ended, and what they gave: for people and applications.

What a receipt told of an item is in `item_result`. Of items that no receipt tells of, their chunk's
state is the answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from dispatcher import queries
from dispatcher.items import split_items
from dispatcher.states import ChunkState
from dispatcher.store import Store

__all__ = ["Item", "ItemState", "Output", "items", "of_chunk", "outputs"]

CHUNKS: Final = 100
"""Chunks read at once: each may hold many items."""


class ItemState(StrEnum):
    """Where an item stands."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """Its chunk is final and it did not succeed."""

    CANCELLED = "cancelled"
    OPEN = "open"
    """It waits or is worked on, perhaps once more."""


@dataclass(frozen=True, slots=True)
class Item:
    """An item, and how it ended."""

    chunk_index: int
    position: int
    """In its chunk, from 0."""

    item: Any
    state: ItemState
    attempt: int | None
    """The number of the attempt that told of it, or else the last of its chunk."""

    output: Any = None
    output_uri: str | None = None
    error: str | None = None
    """What its receipt says; else why its chunk failed."""

    told: bool = False
    """Whether a receipt tells of it."""


@dataclass(frozen=True, slots=True)
class Output:
    """What came of an item; or, where no receipt tells of items, of a chunk."""

    chunk_index: int
    attempt: int
    uri: str | None
    """Where it lies; None where `value` is all of it."""

    position: int | None = None
    """Of the item in its chunk; None where it is the output of the whole chunk."""

    item: Any = None
    value: Any = None


def items(
    store: Store, batch_id: str, *, failed: bool = False, chunk: int | None = None
) -> Iterator[Item]:
    """Read the items of a batch, by chunk and position; or only those that failed."""
    after = -1
    while True:
        with store.transaction() as tx:
            chunks = list(
                store.run(
                    tx,
                    """
                    SELECT c.index, c.state, c.reason, c.attempts, i.items::text
                    FROM dispatcher.chunk c JOIN dispatcher.chunk_items i
                        ON i.batch_id = c.batch_id AND i.chunk_index = c.index
                    WHERE c.batch_id = :id AND c.index > :after AND c.state <> 'split'
                        AND (NOT :failed OR c.state IN ('failed', 'cancelled'))
                        AND (CAST(:chunk AS int) IS NULL OR c.index = :chunk)
                    ORDER BY c.index LIMIT :page
                    """,
                    id=batch_id,
                    after=after,
                    failed=failed,
                    chunk=chunk,
                    page=CHUNKS,
                )
            )
            told = {
                (row[0], row[1]): row
                for row in store.run(
                    tx,
                    """
                    SELECT chunk_index, position, attempt, ok, output::text, output_uri, error
                    FROM dispatcher.item_result
                    WHERE batch_id = :id AND chunk_index = ANY(:indexes)
                    """,
                    id=batch_id,
                    indexes=[row[0] for row in chunks],
                )
            }
        for row in chunks:
            for position, text in enumerate(split_items(row[4])):
                one = _item(row, position, text, told.get((row[0], position)))
                if not failed or one.state is ItemState.FAILED:
                    yield one
        if len(chunks) < CHUNKS:
            return
        after = chunks[-1][0]


def of_chunk(store: Store, batch_id: str, index: int) -> list[Item]:
    """Read the items of one chunk."""
    return list(items(store, batch_id, chunk=index))


def outputs(store: Store, batch_id: str) -> Iterator[Output]:
    """Read what came of a batch: of each item that gave something, else of each chunk.

    A chunk gives its result's URI if none of its items was told of by a receipt.
    """
    results = (one for one in items(store, batch_id) if one.state is ItemState.SUCCEEDED)
    waiting = next(results, None)
    for chunk in queries.chunks(store, batch_id):
        told = False
        while waiting is not None and waiting.chunk_index == chunk.index:
            told = told or waiting.told
            if waiting.output is not None or waiting.output_uri is not None:
                yield Output(
                    waiting.chunk_index,
                    waiting.attempt or 0,
                    waiting.output_uri,
                    waiting.position,
                    waiting.item,
                    waiting.output,
                )
            waiting = next(results, None)
        last = chunk.attempts[-1] if chunk.attempts else None
        if (
            not told
            and chunk.state is ChunkState.SUCCEEDED
            and last is not None
            and last.result_uri is not None
        ):
            yield Output(chunk.index, last.number, last.result_uri)


def _item(chunk: Any, position: int, text: str, told: Any) -> Item:
    index, state, reason, attempts, _ = chunk
    ok = told is not None and told[3]
    if ok or state == ChunkState.SUCCEEDED:
        standing = ItemState.SUCCEEDED
    elif state == ChunkState.FAILED or (state == ChunkState.CANCELLED and told is not None):
        standing = ItemState.FAILED  # of a cancelled chunk what was told to have failed has
    elif state == ChunkState.CANCELLED:
        standing = ItemState.CANCELLED
    else:
        standing = ItemState.OPEN
    item = json.loads(text)
    if told is None:
        error = reason if standing is ItemState.FAILED else None
        return Item(index, position, item, standing, attempts or None, error=error)
    if standing is ItemState.SUCCEEDED and not ok:  # later, and without a word
        return Item(index, position, item, standing, attempts or None)
    output = None if told[4] is None else json.loads(told[4])
    return Item(index, position, item, standing, told[2], output, told[5], told[6], told=True)
