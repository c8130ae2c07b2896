"""One engine on a real database, over a provider in memory, at a time that only the test moves.

The three clocks (the database's, the provider's, the engine's own) show the same time and stand
still until `advance`, so that a test says exactly when what is due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa
from lifecycle import assert_invariants

from dispatcher import schema
from dispatcher.backends.base import Backend
from dispatcher.client import Batch, Dispatcher
from dispatcher.config import Config, Target
from dispatcher.engine import Engine
from dispatcher.engine.place import Call
from dispatcher.job import Job
from dispatcher.storage import Storage
from dispatcher.store import Store
from dispatcher.testing import Ending, NullSettings, NullWorld

HERE: Final = "here"
NOW: Final = "public.bench_now()"
LEASE: Final = timedelta(days=3650)

CLOCK: Final = (
    "CREATE TABLE public.bench_clock (at timestamptz NOT NULL)",
    "INSERT INTO public.bench_clock VALUES (date_trunc('second', now()))",
    """
    CREATE FUNCTION public.bench_now() RETURNS timestamptz LANGUAGE sql STABLE
    AS 'SELECT at FROM public.bench_clock'
    """,
)


def job(name: str = "work", **fields: Any) -> Job:
    """A job that does not wait long and does not leave its delays to chance."""
    retry = {"initial": "10s", "jitter": False, **fields.pop("retry", {})}
    return Job.model_validate(
        {"name": name, "target": HERE, "command": ["work"], "retry": retry, **fields}
    )


class Bench:
    """What a test drives: applications' `dispatcher`, a worker's `engine`, the provider `world`."""

    def __init__(
        self,
        database_url: str,
        jobs: Iterable[Job],
        *,
        limits: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        wrap: Callable[[Backend], Backend] | None = None,
        concurrency: int = 16,
        storage: Storage | None = None,
    ) -> None:
        NullWorld.forget(HERE)
        self.world = NullWorld.named(HERE)
        self.world.clock = lambda: self.at
        self.database_url = database_url
        target = Target(
            name=HERE, backend="null", settings=NullSettings(**(settings or {})), **(limits or {})
        )
        self.config = Config({HERE: target}, {one.name: one for one in jobs}, "test")
        self.roll = 0.5
        self._engines: list[sa.Engine] = []
        self._closing: list[Callable[[], None]] = []
        self._concurrency = concurrency
        self._wrap = wrap
        self.storage = storage
        self.database = self._connect()
        with self.database.begin() as tx:
            for statement in CLOCK:
                tx.execute(sa.text(statement))
            self.at: datetime = tx.execute(sa.text("SELECT bench_now()")).scalar_one()
        self._began = self.at
        self.dispatcher = Dispatcher(
            database_url=database_url, config=self.config, actor="app", pool_size=4
        )
        self._closing.append(self.dispatcher.close)
        self.dispatcher._store = Store(self.dispatcher._engine, actor="app", now=NOW)
        self.engine = self.worker("worker-1")
        self.store = self.engine.store
        self.lease(self.store)

    # --- parts ------------------------------------------------------------------------------------

    def _connect(self) -> sa.Engine:
        engine = schema.create_engine(self.database_url)
        self._engines.append(engine)
        return engine

    def worker(self, name: str) -> Engine:
        """Another process's engine: connections and memory of its own, the same clocks."""
        store = Store(self._connect(), actor=name, now=NOW)
        given = None
        if self._wrap is not None:
            from dispatcher.backends.registry import make_backend  # noqa: PLC0415 - rarely needed

            given = {HERE: self._wrap(make_backend(self.config.targets[HERE]))}
        engine = Engine(
            store,
            self.config,
            monotonic=self.monotonic,
            roll=lambda: self.roll,
            backends=given,
            launch_concurrency=self._concurrency,
            storage=self.storage,
        )
        self._closing.append(engine.close)
        return engine

    def intend(self) -> list[Call]:
        """Commit what a round of launches would ask for, and stop there, as a launcher that dies.

        The definitions were read in a round before it.
        """
        launcher, place = self.engine._launcher, self.engine.places[HERE]
        assert launcher._intend(place) == []
        place.definitions.read()
        return launcher._intend(place)

    def lease(self, store: Store, lease: timedelta = LEASE) -> str | None:
        return store.lease(HERE, backend="null", limits={}, home=None, lease=lease)

    def close(self) -> None:
        """Check once more that nothing became nonsense, and let go of everything."""
        try:
            with self.database.connect() as connection:
                assert_invariants(connection)
        finally:
            for close in self._closing:
                close()
            for engine in self._engines:
                engine.dispose()
            NullWorld.forget(HERE)

    # --- time -------------------------------------------------------------------------------------

    def monotonic(self) -> float:
        return 1000.0 + (self.at - self._began).total_seconds()

    def advance(self, seconds: float) -> None:
        """Let time pass everywhere; nothing is done in it."""
        self.at += timedelta(seconds=seconds)
        with self.database.begin() as tx:
            tx.execute(sa.text("UPDATE public.bench_clock SET at = :at"), {"at": self.at})

    # --- what a worker's clock does ---------------------------------------------------------------

    def plan(self) -> None:
        for batch_id in self.engine.sweep():
            self.engine.plan(batch_id)

    def launch(self) -> int:
        calls = 0
        while (done := self.engine.launch(HERE)).more:
            calls += done.calls
        return calls

    def follow(self) -> None:
        self.engine.follow(HERE)

    def turn(self, seconds: float = 0.0) -> None:
        """One turn of the worker's clock, after some time."""
        if seconds:
            self.advance(seconds)
        self.plan()
        self.launch()
        self.follow()

    def until(
        self, done: Callable[[], bool], what: str, *, step: float = 2.0, turns: int = 200
    ) -> None:
        """Turn, with time between, until something is true."""
        for _ in range(turns):
            self.turn()
            if done():
                return
            self.advance(step)
        raise AssertionError(f"not within {turns} turns of {step:g} s: {what}")

    def finish(self, batch: Batch, *, step: float = 2.0, turns: int = 200) -> Batch:
        """Turn until the batch is final."""
        self.until(lambda: batch.refresh().finished, f"{batch.id} ended", step=step, turns=turns)
        return batch.refresh()

    # --- what a test says and sees ----------------------------------------------------------------

    def enqueue(self, items: Any, name: str = "work", **named: Any) -> Batch:
        return self.dispatcher.enqueue(name, items, **named)

    def script(self, *endings: Ending, seconds: float = 0.0) -> None:
        """Let the attempts of every chunk end like this, one after the other; then succeed."""

        def tell(_batch: str, _chunk: int, attempt: int) -> Ending:
            return endings[attempt - 1] if attempt <= len(endings) else Ending(seconds=seconds)

        self.world.script = tell

    def sql(self, statement: str, **values: Any) -> list[Any]:
        """The rows of a statement; of single values where there is one column."""
        with self.database.begin() as tx:
            rows = tx.execute(sa.text(statement), values)
            if not rows.returns_rows:
                return []
            return [row[0] if len(row) == 1 else tuple(row) for row in rows]

    def states(self, batch: Batch) -> list[str]:
        """The states of the chunks, by index."""
        return self.sql(
            "SELECT state FROM dispatcher.chunk WHERE batch_id = :id ORDER BY index", id=batch.id
        )

    def outcomes(self, batch: Batch, index: int = 0) -> list[str | None]:
        """The outcomes of a chunk's attempts, by number."""
        return self.sql(
            "SELECT outcome FROM dispatcher.attempt WHERE batch_id = :id AND chunk_index = :index "
            "ORDER BY number",
            id=batch.id,
            index=index,
        )

    def executions(self) -> list[str]:
        """The states of all executions, in the order of their intents."""
        return self.sql("SELECT state FROM dispatcher.execution ORDER BY id")

    def waiting_for_locks(self) -> int:
        """How many sessions in this database wait for a lock of another one now."""
        (count,) = self.sql(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND wait_event_type = 'Lock'"
        )
        return int(count)

    def check(self) -> None:
        with self.database.connect() as connection:
            assert_invariants(connection)


def utc(seconds: float = 0.0) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)
