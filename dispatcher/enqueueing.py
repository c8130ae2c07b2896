"""A request for a batch: checked, then written in the transaction of whoever makes it.

An application makes one through `Dispatcher.enqueue`, a schedule through `engine/firer.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from itertools import chain, islice
from typing import Any, Final, Self

import sqlalchemy as sa

from dispatcher.counting import counted
from dispatcher.errors import IdempotencyConflict, InvalidInput, InvalidItems, NotAllowed
from dispatcher.items import ItemsDigest, ItemStream, Page, is_uri, open_items, pages
from dispatcher.job import Job
from dispatcher.overriding import overridden
from dispatcher.redaction import redact
from dispatcher.schedule import Schedule
from dispatcher.storage import check_uri
from dispatcher.store import Store, new_batch_id
from dispatcher.store.rows import NewBatch
from dispatcher.storing import signs_too_long, storage_need, storage_trouble

__all__ = ["BatchRequest", "scheduled"]

LONGEST_KEY: Final = 200
LONGEST_LABEL: Final = 63
SHOWN: Final = 100


class BatchRequest:
    """What somebody asks for; made once, written once. A context manager, as it may hold a file.

    Args:
        job: The job, with what this request changes of it.
        items: As `Dispatcher.enqueue` takes them.
        params: Checked against the job's schema.
        key: Idempotency key.
        labels: Added to the job's.
        actor: Who asks.
        overrides: What the batch sets over the job, within what the job allows.

    Raises:
        InvalidInput: with the class that says what is wrong.
    """

    def __init__(
        self,
        job: Job,
        items: object,
        *,
        params: Mapping[str, Any] | None,
        key: str | None,
        labels: Mapping[str, str] | None,
        actor: str,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        _check_key(key)
        # As the job has it: of an override only what was asked for is compared, and not its result.
        chunk = job.chunk.model_dump(mode="json", exclude_none=True)
        job, given = overridden(job, overrides)
        checked = job.check_params(params)
        merged = _check_labels({**job.labels, **(labels or {})})
        source, self._stream = _items_from(job, items)
        self._asked = {
            "job": job.name,
            "items": source,
            "params": checked,
            "chunk": chunk,
            **{f"overrides.{name}": value for name, value in given.items()},
        }
        self._job = job
        too_long = signs_too_long(job)
        if too_long is not None:
            raise InvalidInput(f"job {job.name} {too_long}")
        self._new = NewBatch(
            id=new_batch_id(),
            key=key,
            request="{}",
            job_name=job.name,
            # What was allowed has been used: what is kept is what runs.
            job=job.model_dump_json(exclude_defaults=True, exclude={"overrides"}),
            target=job.target,
            params=json.dumps(checked),
            labels=json.dumps(merged),
            priority=job.priority,
            items_from="pages" if source is None else source,
            actor=actor,
            deadline=job.deadline,
            max_failed_chunks=job.success.max_failed_chunks,
            max_failed_items=job.success.max_failed_items,
            min_ratio=job.success.min_ratio,
            stop_early=job.success.stops_early,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    @property
    def id(self) -> str:
        """The id of the batch, if `write` does write it."""
        return self._new.id

    def _check_storage(self, store: Store, tx: sa.Connection, *, patient: bool) -> None:
        """Refuse what could not run, as soon as it can be known: who leads the target told."""
        job, target = self._job, self._new.target
        if storage_need(job, claims=True) is None:
            return
        told, leads = store.told_by_leader(tx, target)
        if job.receipt == "required" and told.get("results") is False:
            raise InvalidInput(
                f"job {job.name} requires receipts, and the workers of target "
                f"{target} have no storage for them: set DISPATCHER_STORAGE_URL for the "
                "workers, to a place that the containers can write, and restart them"
            )
        trouble = storage_trouble(job, told if leads else None)
        if trouble is None or patient:
            return
        key = self._new.key
        if key is not None and store.request_of_key(tx, key) is not None:
            return  # it is there already, and waits
        raise InvalidInput(
            f"job {job.name} {trouble.need}, and the workers of target {target} cannot use their "
            f"storage: {trouble.problem}. Mend DISPATCHER_STORAGE_URL of the workers, or what they "
            "may do there, and enqueue again: they look every half minute. What does not need the "
            "storage can be enqueued meanwhile"
        )

    def write(self, store: Store, tx: sa.Connection, *, patient: bool = False) -> str:
        """Write the batch, or find the one that has its key; the id of either.

        Args:
            store: The tables.
            tx: The transaction of whoever asks.
            patient: The batch is to wait if the storage has to be mended first, as nobody is there
                to ask for it again.

        Raises:
            InvalidItems: an item cannot be used; the transaction must be rolled back.
            IdempotencyConflict: the key belongs to another request.
            InvalidInput: it needs a storage, and there is none that can be used.
        """
        self._check_storage(store, tx, patient=patient)
        paged = pages(self._stream)
        head = list(islice(paged, 2))
        if len(head) <= 1:
            return self._write_small(store, tx, head)
        return self._write_paged(store, tx, chain(head, paged))

    def _write_small(self, store: Store, tx: sa.Connection, head: list[Page]) -> str:
        """Write a batch of one page at most, in one statement."""
        digest = ItemsDigest()
        for page in head:
            digest.update(page)
        asked = self._with(digest)
        new = replace(self._new, request=json.dumps(asked))
        count, items = (head[0].count, head[0].json) if head else (0, None)
        if store.insert_batch(tx, new, count, items):
            return new.id
        return _match(store, tx, new.key or "", asked)

    def _write_paged(self, store: Store, tx: sa.Connection, paged: Iterator[Page]) -> str:
        """Write a batch page by page; what it asked for is known only at the end."""
        digest = ItemsDigest()
        first = next(paged)
        digest.update(first)
        inserted = store.insert_batch(tx, self._new, first.count, first.json)
        for number, page in enumerate(paged, start=1):
            digest.update(page)
            if inserted:
                store.insert_page(tx, self._new.id, number, page.count, page.json)
        asked = self._with(digest)
        if not inserted:
            return _match(store, tx, self._new.key or "", asked)
        store.set_request(tx, self._new.id, json.dumps(asked))
        return self._new.id

    def _with(self, digest: ItemsDigest) -> dict[str, Any]:
        if self._asked["items"] is not None:
            return self._asked
        return {**self._asked, "items": f"{digest.count} items, sha256 {digest.hexdigest()}"}


def scheduled(job: Job, schedule: Schedule, due_at: datetime) -> BatchRequest:
    """Make the request of a schedule's due time; its key keeps it from being written twice.

    Raises:
        InvalidInput: as making any `BatchRequest`.
    """
    return BatchRequest(
        job,
        schedule.items,
        params=schedule.params,
        key=f"schedule/{schedule.name}/{due_at.isoformat()}",
        labels={"schedule": schedule.name},
        actor=f"schedule {schedule.name}",
    )


def _match(store: Store, tx: sa.Connection, key: str, asked: dict[str, Any]) -> str:
    """Find the batch that has a key, and insist that it was the same request."""
    found = store.request_of_key(tx, key)
    if found is None:
        raise NotAllowed(f'the batch of key "{key}" was removed at this moment; try again')
    batch_id, theirs = found
    differing = [
        text
        for name in {**asked, **theirs}
        if asked.get(name) != theirs.get(name)
        for text in _difference(name, theirs.get(name), asked.get(name))
    ]
    if differing:
        raise IdempotencyConflict(
            f'key "{key}" belongs to batch {batch_id}, a different request: '
            f"{'; '.join(differing)}. Use another key for another request"
        )
    return batch_id


def _difference(name: str, theirs: object, ours: object) -> Iterator[str]:
    """Say how one part of two requests differs, in words."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in {**theirs, **ours}:
            if theirs.get(key) != ours.get(key):
                yield from _difference(f"{name}.{key}", theirs.get(key), ours.get(key))
        return
    there, here = _shown(theirs), _shown(ours)
    if name == "items":
        there, here = _items_in_words(there), _items_in_words(here)
        if there == here:
            yield f"items: {there} there and here, but not the same in the same order"
        else:
            yield f"items: there {there}, here {here}"
        return
    yield f"{name} there is {there}, here {here}"


def _items_in_words(asked: str) -> str:
    """Word where the items of a request come from, as it is kept: the digest tells nobody much."""
    if asked == "source":
        return "those of the job's item source"
    count, digest, _ = asked.partition(" items, sha256 ")
    if not digest:
        return f"those in {asked}"
    return counted(int(count), "item")


def _items_from(job: Job, items: object) -> tuple[str | None, ItemStream]:
    """Say where the items come from: pages (None) with their stream, a source, or a URI."""
    if items is None:
        if job.items is None:
            raise InvalidItems(
                f'job "{job.name}" has no item source: give items, or set items.source in the job'
            )
        return "source", open_items([])
    if isinstance(items, str) and is_uri(items):
        check_uri(items)
        return items, open_items([])
    return None, open_items(items)


def _check_key(key: str | None) -> None:
    if key is None:
        return
    if isinstance(key, str) and len(key) > LONGEST_KEY:
        raise InvalidInput(
            f"key is {len(key):,} characters long, {key[:40]!r}…; it must be a text of 1 to "
            f"{LONGEST_KEY} characters"
        )
    if not isinstance(key, str) or not key or "\0" in key:
        raise InvalidInput(
            f"key is {str(key)[:40]!r}; it must be a text of 1 to {LONGEST_KEY} characters, none "
            "of them NUL"
        )


def _check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    for name, value in labels.items():
        for text in (name, value):
            if not isinstance(text, str) or len(text) > LONGEST_LABEL or "\0" in text:
                raise InvalidInput(
                    f"label {name!r} is {value!r}; names and values must be texts of at most "
                    f"{LONGEST_LABEL} characters"
                )
    return dict(labels)


def _shown(value: object) -> str:
    if value is None:
        return "not given"
    text = value if isinstance(value, str) else json.dumps(redact(value), ensure_ascii=False)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
