"""The public door for applications: enqueue a batch, watch it, wait for it, cancel or retry it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Self

import sqlalchemy as sa
from pydantic import ValidationError

from dispatcher import queries, results, schema
from dispatcher.config import Config, Settings, load_config, load_settings
from dispatcher.engine.settler import end_finished_batches
from dispatcher.enqueueing import BatchRequest
from dispatcher.errors import (
    ConfigurationError,
    InvalidInput,
    NotAllowed,
    UnknownBatch,
    WaitTimeout,
)
from dispatcher.job import PRIORITIES, Chunking, Job
from dispatcher.queries import BatchView, Chunk, Event
from dispatcher.results import Item, Output
from dispatcher.states import BatchState, CancelKind, ChunkState
from dispatcher.store import Store, again
from dispatcher.wake import PLAN, Waker

__all__ = ["Batch", "Dispatcher"]


@dataclass(frozen=True, slots=True)
class Batch(BatchView):
    """A batch as it was when it was read, and the verbs for it."""

    dispatcher: Dispatcher = field(kw_only=True, repr=False, compare=False)
    existed: bool = field(default=False, kw_only=True, compare=False)
    """Of what `enqueue` returned: the key had this batch already, and nothing was written."""

    def refresh(self) -> Batch:
        """Read it again."""
        return self.dispatcher.get(self.id)

    def wait(self, timeout: float | timedelta | None = None) -> Batch:
        """Wait until it is in a final state. See `Dispatcher.wait`."""
        return self.dispatcher.wait(self.id, timeout)

    def cancel(self, reason: str = "cancelled by the application") -> Batch:
        """Ask for its end. See `Dispatcher.cancel`."""
        return self.dispatcher.cancel(self.id, reason)


class Dispatcher:
    """The queue, as an application sees it.

    Works from any thread, in a script, in a web process and inside other Celery tasks; it holds a
    small connection pool and keeps no other state. After a fork it opens connections of its own.

    Args:
        settings: Read from `DISPATCHER_*` where not given.
        config: The jobs and targets; read from the settings' `jobs` where not given.
        overrides: Single settings, such as `database_url=…`, over the environment's.

    Raises:
        ConfigurationError: a setting is missing or wrong.
    """

    def __init__(
        self, settings: Settings | None = None, *, config: Config | None = None, **overrides: Any
    ) -> None:
        self.settings = settings or load_settings(**overrides)
        self._config = config
        self._pid = os.getpid()
        self._checked = False
        self._engine = schema.create_engine(
            self.settings.database_url, pool_size=self.settings.pool_size, ping=True
        )
        self._store = Store(self._engine, actor=self.settings.actor)
        self._waker = Waker(self.settings.broker_url)

    def close(self) -> None:
        """Send the last taps and close the connections."""
        self._waker.close()
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def store(self) -> Store:
        """The tables, checked once to be of a version that this code understands."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._engine.dispose(close=False)
            self._waker = Waker(self.settings.broker_url)
        if not self._checked:
            with self._store.transaction() as tx:
                schema.check(tx)
            self._checked = True
        return self._store

    @property
    def config(self) -> Config:
        """The jobs and targets.

        Raises:
            ConfigurationError: there is no source for them, or something in it is wrong.
        """
        if self._config is None:
            if self.settings.jobs is None:
                raise ConfigurationError(
                    "no jobs are configured: set DISPATCHER_JOBS to a YAML file or a Python module"
                )
            self._config = load_config(self.settings.jobs)
        return self._config

    # ---------------------------------------------------------------- enqueue

    def enqueue(
        self,
        job: str | Job,
        items: Iterable[Any] | str | os.PathLike[str] | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        key: str | None = None,
        priority: int | None = None,
        chunk_size: int | None = None,
        connection: sa.Connection | None = None,
        labels: Mapping[str, str] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Batch:
        """Ask for a job to be run over items.

        Args:
            job: The name of a configured job, or a job.
            items: A list or any iterable of JSON values (streamed), the path of a `.jsonl`, `.csv`
                or `.txt` file (copied now), a `file://`, `s3://` or `gs://` URI (read when the
                batch is planned), or None where the job has an item source.
            params: Checked against the job's schema.
            key: Idempotency key: the same key and request give the same batch, however often.
            priority: Over the job's own; the higher is launched first.
            chunk_size: Items a chunk, over the job's own chunking.
            connection: A SQLAlchemy connection in a transaction of the caller's: the batch exists
                exactly if the caller commits. It is written behind a savepoint, so that a call that
                raises leaves nothing of it there.
            labels: Added to the job's.
            overrides: What this batch sets over the job, within what the job's own `overrides`
                allow: `args` (a list, in place of the job's), `env` (a mapping, over the job's),
                `timeout` ("30m", seconds or a timedelta) and `tasks` (the number of chunks). The
                values are taken as they are: braces in them are no templates.

        Returns:
            The batch, or the one that the key already has, with `existed` true and the labels and
            the priority of the call that wrote it.

        Raises:
            InvalidInput: with the class that says what is wrong: UnknownJob, InvalidItems,
                IdempotencyConflict, ConfigurationError.
            Unreachable: the database does not answer; nothing was written.
        """
        job = self._job(job, priority, chunk_size)
        if chunk_size is not None and isinstance(overrides, Mapping) and overrides.get("tasks"):
            raise InvalidInput("chunk_size and overrides.tasks are both given; leave one out")
        if connection is not None and not isinstance(connection, sa.Connection):
            raise InvalidInput(
                f"connection is a {type(connection).__name__}; it must be a sqlalchemy.Connection: "
                "of a Session, pass session.connection()"
            )
        if connection is not None and _commits_by_itself(connection):
            raise InvalidInput(
                "connection is in autocommit, so it has no transaction to write the batch in: open "
                "it with another isolation_level than AUTOCOMMIT, or leave connection out"
            )
        store = self.store
        with BatchRequest(
            job,
            items,
            params=params,
            key=key,
            labels=labels,
            actor=self.settings.actor,
            overrides=overrides,
        ) as request:
            if connection is not None:
                with connection.begin_nested():
                    batch_id = request.write(store, connection)
                view = queries.read_batch(store, connection, batch_id)
                return self._batch(view, existed=batch_id != request.id)
            with store.transaction() as tx:
                batch_id = request.write(store, tx)
                view = queries.read_batch(store, tx, batch_id)
        self._waker.tap(PLAN, batch_id=batch_id)
        return self._batch(view, existed=batch_id != request.id)

    def _job(self, job: str | Job, priority: int | None, chunk_size: int | None) -> Job:
        """Find the job, with what this call changes of it."""
        found = self.config.job(job) if isinstance(job, str) else job
        changes: dict[str, Any] = {}
        if priority is not None:
            least, most = PRIORITIES
            if isinstance(priority, bool) or not isinstance(priority, int):
                raise InvalidInput(f"priority is {priority!r}; it must be an integer")
            if not least <= priority <= most:
                raise InvalidInput(f"priority is {priority}; it must be from {least} to {most}")
            changes["priority"] = priority
        if chunk_size is not None:
            if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
                raise InvalidInput(f"chunk_size is {chunk_size!r}; it must be a number from 1 up")
            changes["chunk"] = Chunking(size=chunk_size)
        return found.model_copy(update=changes) if changes else found

    # ---------------------------------------------------------------- watch

    def _batch(self, view: BatchView, *, existed: bool = False) -> Batch:
        fields = {name: getattr(view, name) for name in BatchView.__dataclass_fields__}
        return Batch(**fields, dispatcher=self, existed=existed)

    def find(self, prefix: str) -> str:
        """Complete a shortened batch id.

        Raises:
            UnknownBatch: none, or more than one, begins with it.
        """
        return queries.find_batch(self.store, prefix)

    def get(self, batch_id: str) -> Batch:
        """Read a batch.

        Raises:
            UnknownBatch: there is none.
        """
        return self._batch(queries.get_batch(self.store, batch_id))

    def batches(
        self,
        *,
        job: str | None = None,
        state: BatchState | str | None = None,
        since: datetime | None = None,
        label: tuple[str, str] | None = None,
        limit: int = 20,
    ) -> list[Batch]:
        """List batches, newest first."""
        try:
            wanted = None if state is None else BatchState(state)
        except ValueError:
            allowed = ", ".join(BatchState)
            raise InvalidInput(f'state is "{state}"; it must be one of {allowed}') from None
        found = queries.batches(
            self.store, job=job, state=wanted, since=since, label=label, limit=limit
        )
        return [self._batch(view) for view in found]

    def chunks(
        self, batch_id: str, *, states: Iterable[ChunkState] | None = None, items: bool = False
    ) -> Iterator[Chunk]:
        """Read the chunks of a batch with their attempts, by index."""
        wanted = None if states is None else list(states)
        return queries.chunks(self.store, batch_id, states=wanted, items=items)

    def events(self, batch_id: str, chunk_index: int | None = None) -> Iterator[Event]:
        """Read the audit of a batch, or of one of its chunks, in order."""
        return queries.events(self.store, batch_id=batch_id, chunk_index=chunk_index)

    def items(self, batch_id: str, *, failed: bool = False) -> Iterator[Item]:
        """Read the items of a batch with how each ended, in order; or only those that failed."""
        return results.items(self.store, batch_id, failed=failed)

    def outputs(self, batch_id: str) -> Iterator[Output]:
        """Stream what came of a batch, in order: of each item whose receipt gives an output.

        Of a chunk whose items no receipt tells of, where it left its result, if it did.
        """
        return results.outputs(self.store, batch_id)

    def wait(self, batch_id: str, timeout: float | timedelta | None = None) -> Batch:
        """Wait until a batch is in a final state.

        Args:
            batch_id: The batch.
            timeout: Seconds; None waits as long as it takes. Every batch ends at its deadline.

        Raises:
            WaitTimeout: it was not final in time; it goes on.
            UnknownBatch: there is none.
        """
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        end = None if seconds is None else time.monotonic() + seconds
        pause = 0.05
        while True:
            state = queries.get_state(self.store, batch_id)
            if state not in (BatchState.PLANNING, BatchState.RUNNING):
                return self.get(batch_id)
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise WaitTimeout(f"batch {batch_id} is still {state} after {seconds:g} s")
            time.sleep(pause if left is None else min(pause, left))
            pause = min(1.0, pause * 1.5)

    # ---------------------------------------------------------------- cancel and retry

    def cancel(self, batch_id: str, reason: str = "cancelled by the application") -> Batch:
        """Ask for the end of a batch.

        What waits ends at once; what runs is stopped at the provider again and again until that is
        confirmed, and only then the batch is `cancelled`. A batch that is final stays as it is.

        Raises:
            UnknownBatch: there is none.
        """
        store = self.store

        def step() -> BatchState | None:
            with store.transaction() as tx:
                state = store.request_cancel(tx, batch_id, CancelKind.OPERATOR, reason)
                if state is BatchState.RUNNING:
                    end_finished_batches(store, tx, [batch_id])
                return state

        if again(step) is None:
            raise UnknownBatch(f'no batch "{batch_id}"; `dispatcher batches` lists them')
        return self.get(batch_id)

    def retry(self, batch_id: str, *, failed_only: bool = True) -> Batch:
        """Reopen a final batch: what did not succeed is due again, with fresh budgets.

        Args:
            batch_id: The batch.
            failed_only: False runs every chunk again.

        Raises:
            UnknownBatch: there is none.
            NotAllowed: it is not final, or there is nothing to retry.
        """
        store = self.store

        def step() -> tuple[BatchState, int] | None:
            with store.transaction() as tx:
                kept = store.jobs(tx, [batch_id]).get(batch_id)
                if kept is None:
                    return None
                return store.retry(
                    tx,
                    batch_id,
                    failed_only=failed_only,
                    actor=self.settings.actor,
                    deadline=_deadline_of(batch_id, kept[0]),
                )

        found = again(step)
        if found is None:
            raise UnknownBatch(f'no batch "{batch_id}"; `dispatcher batches` lists them')
        state, count = found
        if state in (BatchState.PLANNING, BatchState.RUNNING):
            raise NotAllowed(
                f"batch {batch_id} is {state}: failed chunks are retried by its policy while it "
                "runs; wait for its end, or cancel it first"
            )
        if not count:
            raise NotAllowed(f"batch {batch_id} is {state} and has no chunk to retry")
        self._waker.tap(PLAN, batch_id=batch_id)
        return self.get(batch_id)


def _commits_by_itself(connection: sa.Connection) -> bool:
    """Whether each statement is committed as it ends, as the driver's own connection says."""
    return bool(getattr(connection.connection.dbapi_connection, "autocommit", False))


def _deadline_of(batch_id: str, job: dict[str, Any]) -> timedelta:
    """Read the deadline of the job that a batch keeps."""
    try:
        return Job.model_validate(job).deadline
    except ValidationError as error:
        raise NotAllowed(
            f"batch {batch_id} cannot be retried: this version cannot read its job: {error}"
        ) from error
