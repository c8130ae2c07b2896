"""The hot statements find their rows by an index, in tables of a hundred thousand rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from workbench import HERE, Bench, job

from dispatcher import queries

# 100,000 chunks in 20 batches of which 15 are final, and the names of 20,000 older batches.
FILL = """
    INSERT INTO dispatcher.batch (
        id, request, job_name, job, code_version, target, params, labels, priority, items_from,
        state, actor, created_at, planned_at, deadline, finished_at, item_count, chunk_count,
        max_failed_chunks
    )
    SELECT 'batch' || n, '{}', 'job' || n % 5, '{}', 1, 'here', '{}', '{}', 0, 'pages',
        CASE WHEN n < 15 THEN 'succeeded' WHEN n < 20 THEN 'running' ELSE 'succeeded' END, 'test',
        bench_now() - n * interval '1 minute', bench_now(), bench_now() + interval '1 day',
        CASE WHEN n < 15 OR n >= 20 THEN bench_now() END, 5000, 5000, 0
    FROM generate_series(0, 20019) AS n;

    INSERT INTO dispatcher.chunk (
        batch_id, index, state, size, attempts, due_at, finished_at, outcome
    )
    SELECT 'batch' || n % 20, n / 20,
        CASE WHEN n % 20 < 15 THEN 'succeeded'
            WHEN n < 2000 THEN 'running' WHEN n < 60000 THEN 'succeeded' ELSE 'pending' END,
        1, CASE WHEN n % 20 < 15 OR n < 60000 THEN 1 ELSE 0 END, bench_now(),
        CASE WHEN n % 20 < 15 OR (n >= 2000 AND n < 60000) THEN bench_now() END,
        CASE WHEN n % 20 < 15 OR (n >= 2000 AND n < 60000) THEN 'succeeded' END
    FROM generate_series(0, 99999) AS n;

    INSERT INTO dispatcher.execution (
        key, target, batch_id, job_name, state, tasks, open_tasks, parallelism, handle, intent_at,
        launched_at, started_at, start_deadline, deadline, finished_at
    )
    SELECT 'key' || n, 'here', 'batch' || n % 20, 'job' || n % 5,
        CASE WHEN n % 20 >= 15 AND n < 2000 THEN 'launched' ELSE 'ended' END, 1,
        CASE WHEN n % 20 >= 15 AND n < 2000 THEN 1 ELSE 0 END, 1, 'handle' || n, bench_now(),
        bench_now(), bench_now(), bench_now() + interval '1 hour', bench_now() + interval '2 hours',
        CASE WHEN n % 20 >= 15 AND n < 2000 THEN NULL ELSE bench_now() END
    FROM generate_series(0, 99999) AS n WHERE n % 20 < 15 OR n < 60000;

    INSERT INTO dispatcher.attempt (
        batch_id, chunk_index, number, execution_id, task_index, outcome, opened_at, settled_at
    )
    SELECT c.batch_id, c.index, 1, e.id, 0, c.outcome, bench_now(), c.finished_at
    FROM dispatcher.chunk c JOIN dispatcher.execution e
        ON e.key = 'key' || (c.index * 20 + substr(c.batch_id, 6)::int)
    WHERE c.attempts = 1;

    INSERT INTO dispatcher.event (at, actor, kind, batch_id, chunk_index, old, new)
    SELECT bench_now(), 'test', 'chunk', batch_id, index, NULL, 'pending' FROM dispatcher.chunk;

    INSERT INTO dispatcher.chunk_items SELECT batch_id, index, '[1]' FROM dispatcher.chunk;

    ANALYZE;
"""


class Explained:
    """Runs what the store runs, and asks Postgres how it would."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.plans: list[tuple[str, dict[str, Any]]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the plan of each statement that the engine executes meanwhile."""
        engine = self.bench.store.engine

        def before(connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
            if "dispatcher." not in statement:
                return
            with connection.connection.driver_connection.cursor() as own:
                own.execute("EXPLAIN (FORMAT JSON) " + statement, values)
                ((found,),) = own.fetchall()
            self.plans.append((" ".join(statement.split())[:90], found[0]["Plan"]))

        sa.event.listen(engine, "before_cursor_execute", before)
        try:
            yield
        finally:
            sa.event.remove(engine, "before_cursor_execute", before)


LARGE_TABLES = {"chunk", "execution", "attempt", "event", "chunk_items", "batch"}


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def statements(bench: Bench) -> dict[str, Callable[[sa.Connection], object]]:
    store = bench.store
    ids = bench.sql("SELECT id FROM dispatcher.execution WHERE state = 'launched' LIMIT 100")
    handles = [str(i) for i in ids]
    return {
        "lock_target": lambda tx: store.lock_target(tx, HERE),
        "waiting": lambda tx: store.waiting(tx, HERE),
        "count_due": lambda tx: store.count_due(tx, {"batch15": 16, "batch16": 16}),
        "held_by_target": lambda tx: store.held_by_target(tx, HERE, telling=3),
        "held_by_job": lambda tx: store.held_by_job(tx, "job0"),
        "jobs": lambda tx: store.jobs(tx, ["batch15", "batch16"]),
        "lock_running": lambda tx: store.lock_running(tx, ["batch15", "batch16"]),
        "claim": lambda tx: store.claim(tx, "batch15", 16),
        "items_of": lambda tx: store.items_of(tx, "batch15", list(range(3000, 3016))),
        "chunks_of": lambda tx: store.chunks_of(tx, ids[0]),
        "anything_due": lambda _tx: store.anything_due(HERE),
        "live_ids": lambda _tx: store.live_ids(HERE),
        "executions": lambda _tx: store.executions(ids),
        "settled_tasks": lambda _tx: store.settled_tasks(ids),
        "mark_started": lambda _tx: store.mark_started(dict.fromkeys(ids)),
        "due": lambda _tx: store.due(HERE),
        "expire_calls": lambda _tx: store.expire_calls(HERE),
        "known_keys": lambda _tx: store.known_keys(handles),
        "lock_batches_of": lambda tx: store.lock_batches_of(tx, ids),
        "lock_executions": lambda tx: store.lock_executions(tx, ids),
        "open_attempts": lambda tx: store.open_attempts(tx, ids),
        "tallies": lambda tx: store.tallies(tx, list(store.open_attempts(tx, ids).values())),
        "release_packs": lambda tx: store.release_packs(tx, ids[:5]),
        "finished_batches": lambda tx: store.finished_batches(tx, ["batch15", "batch16"]),
        "unplanned": lambda _tx: store.unplanned(20),
        "overdue_batches": lambda _tx: store.overdue_batches(),
        "stalled_batches": lambda _tx: store.stalled_batches(),
        "get_state": lambda _tx: queries.get_state(store, "batch15"),
        "batches": lambda _tx: queries.batches(store, limit=20),
        "one chunk": lambda _tx: next(queries.chunks(store, "batch15", index=7)),
        "a page of events": lambda _tx: next(queries.events(store, batch_id="batch15")),
    }


def test_the_hot_statements_read_no_large_table_from_end_to_end(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(job())
    with bench.database.begin() as tx:
        tx.connection.driver_connection.execute(FILL)  # type: ignore[union-attr]  # open, as tx is
    explained = Explained(bench)
    scans: list[str] = []
    for name, step in statements(bench).items():
        explained.plans.clear()
        with explained.watching(), bench.store.transaction() as tx:
            step(tx)
            tx.rollback()
        assert explained.plans, f"{name} executed nothing that was seen"
        scans += [
            f"{name}: {node['Node Type']} on {node['Relation Name']}: {text}"
            for text, plan in explained.plans
            for node in nodes(plan)
            if node["Node Type"] == "Seq Scan" and node["Relation Name"] in LARGE_TABLES
        ]
    bench.sql("TRUNCATE dispatcher.batch, dispatcher.chunk, dispatcher.execution CASCADE")
    bench.sql("ALTER TABLE dispatcher.event DISABLE TRIGGER USER")
    bench.sql("TRUNCATE dispatcher.event")
    assert scans == []
