"""What all transitions have in common: one edge each, one event each, nothing moved twice."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import timedelta
from threading import Barrier, Thread

import psycopg
import pytest
import sqlalchemy as sa
from lifecycle import EDGES, assert_invariants
from workbench import HERE, Bench, job

from dispatcher import schema
from dispatcher.backends.base import Launched
from dispatcher.errors import NotAllowed, SchemaMismatch, Unreachable
from dispatcher.states import BatchState, CancelKind, Outcome
from dispatcher.store import Conflict, Store, again, new_batch_id
from dispatcher.testing import Ending, Fault

MakeBench = Callable[..., Bench]


def test_a_broad_life_moves_along_the_edges_only_and_along_nearly_all_of_them(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(
        job(start_timeout="1m", retry={"attempts": 2}),
        job("packed", options={"max_tasks": 5, "parallelism": 2}, deadline="1h"),
        limits={"max_running": 6},
    )

    def script(_batch: str, chunk: int, attempt: int) -> Ending:
        if attempt == 1 and chunk % 4 == 1:
            return Ending(Outcome.FAILED, seconds=3)
        if attempt <= 2 and chunk % 7 == 3:
            return Ending(Outcome.PREEMPTED, seconds=5)
        return Ending(seconds=7)

    bench.world.script = script
    for fault in (Fault.REPLY_LOST, Fault.THROTTLED, Fault.REJECTED, Fault.UNAVAILABLE):
        bench.world.fail_next("launch", fault)
    first = bench.enqueue(range(12))
    second = bench.enqueue(range(12), "packed")
    never = bench.enqueue([1]).cancel()
    bench.dispatcher.retry(never.id)
    bench.enqueue([])
    broken = bench.enqueue("file:///nowhere/items.jsonl")
    for _ in range(12):
        bench.turn(3)
        bench.check()
    second.cancel()
    found = Launched(handle="h", key="d-nobody")
    alive = "SELECT count(*) FROM dispatcher.execution WHERE stray AND state <> 'ended'"
    for _ in range(2):
        bench.store.record_stray(HERE, found, "it runs")
        bench.until(lambda: bench.sql(alive) == [0], "the stray ended", step=3)
    bench.finish(first, step=5)
    bench.finish(second, step=5)
    late = bench.enqueue(range(25), "packed")
    bench.turn()
    bench.advance(3600)
    bench.finish(late, step=5)
    for batch in (first, second, late):
        bench.check()
        bench.dispatcher.retry(batch.id, failed_only=False)
    for batch in (first, second, late):
        bench.finish(batch, step=5)
    bench.finish(bench.dispatcher.retry(first.id, failed_only=False), step=5)
    assert bench.dispatcher.retry(broken.id).state == "planning"
    bench.turn()
    bench.check()
    walked = {
        (kind, old, new)
        for kind, old, new in bench.sql(
            "SELECT DISTINCT kind, old, new FROM dispatcher.event "
            "WHERE old IS NOT NULL OR new IS NOT NULL"
        )
    }
    edges = {(kind, *edge) for kind, pairs in EDGES.items() for edge in pairs}
    assert walked <= edges
    rare = {
        ("batch", "planning", "cancelled"),
        ("batch", "cancelled", "planning"),
        ("chunk", "launching", "pending"),
        ("chunk", "launching", "cancelled"),
        ("chunk", "launching", "split"),
        ("chunk", "running", "split"),
        ("chunk", "pending", "split"),
        ("chunk", None, "succeeded"),
        ("execution", "unknown", "ended"),
    }
    assert edges - walked <= rare, "those have tests of their own"


def test_the_invariants_see_what_is_wrong(bench: Bench) -> None:
    """A check that cannot fail would prove nothing."""
    bench.script(seconds=100)
    bench.enqueue([1])
    bench.turn()
    bench.check()
    lies = {
        "is no edge": "INSERT INTO dispatcher.event (at, actor, kind, batch_id, old, new) "
        "SELECT now(), 'x', 'batch', id, 'running', 'planning' FROM dispatcher.batch",
        "and was None": "INSERT INTO dispatcher.event "
        "(at, actor, kind, batch_id, chunk_index, old, new) "
        "SELECT now(), 'x', 'chunk', id, 9, 'running', 'pending' FROM dispatcher.batch",
        "its events end at running": "UPDATE dispatcher.batch SET state = 'planning'",
        "without an open attempt": "UPDATE dispatcher.attempt SET outcome = 'lost', "
        "settled_at = now()",
        "slots are not its open attempts": "UPDATE dispatcher.execution SET open_tasks = 0",
        "not numbered from 1": "UPDATE dispatcher.chunk SET attempts = 2",
        "a chunk of it is open": "UPDATE dispatcher.batch SET state = 'failed', "
        "finished_at = bench_now()",
        "chunks and items that it says": "UPDATE dispatcher.batch SET item_count = 5",
        "has no open chunk": "UPDATE dispatcher.chunk SET state = 'failed', finished_at = now()",
        "too early": "UPDATE dispatcher.batch SET state = 'failed', finished_at = '2001-01-01'",
        "is never looked for": "UPDATE dispatcher.execution SET state = 'unknown'",
        "waits for nothing": "UPDATE dispatcher.execution SET state = 'intended', call_by = NULL",
        "never sent": "UPDATE dispatcher.execution SET cancel_requested_at = now(), "
        "cancel_kind = 'timeout'",
    }
    for sentence, lie in lies.items():
        with bench.database.connect() as connection:
            connection.execute(sa.text(lie))
            with pytest.raises(AssertionError, match=sentence):
                assert_invariants(connection)
            connection.rollback()


# --- doubled and late steps -----------------------------------------------------------------------


def test_no_transition_moves_what_has_moved_already(bench: Bench) -> None:
    """Each step of a worker that comes late finds its old state gone, and writes nothing."""
    batch = bench.finish(bench.enqueue([1]))
    (execution,) = bench.sql("SELECT id FROM dispatcher.execution")
    tables = ("batch", "chunk", "execution", "attempt", "event")
    each = (f"SELECT t::text FROM dispatcher.{name} t" for name in tables)  # noqa: S608 - constants
    look = " UNION ALL ".join(each)
    before = sorted(bench.sql(look))
    store = bench.store
    bench.advance(5)
    store.record_unknown({execution: (1, "late")})
    store.postpone_calls({execution: (1, 1.0, "late")})
    moved = store.record_launched(
        [(execution, Launched(handle="other", key="k"))],
        start_timeouts={execution: (timedelta(1), timedelta(1))},
    )
    assert moved == set()
    for old in ("intended", "unknown"):
        window = timedelta(seconds=1)
        assert store.call_again(execution, old=old, calls=1, window=window, reason="late") is None
    store.looked(execution, 1.0)
    store.postpone_look(execution, 1.0)
    store.postpone_call(execution, 1.0)
    store.mark_started({execution: None})
    store.mark_absent([execution])
    store.mark_present([execution])
    store.cancel_executions([execution], CancelKind.TIMEOUT, "late")
    assert store.cancel_sent({execution: 1.0}) == set()
    store.postpone_plan(batch.id, timedelta(seconds=1), "late")
    assert not store.fail_plan(batch.id, "late")
    with store.transaction() as tx:
        assert store.claim(tx, batch.id, 10) == []
        assert store.lock_running(tx, [batch.id]) == set()
        assert store.lock_executions(tx, [execution]) == {}
        assert not store.end_batch(tx, batch.id, BatchState.FAILED, "late")
        cancelled = store.request_cancel(tx, batch.id, CancelKind.OPERATOR, "late")
        assert cancelled is BatchState.SUCCEEDED
        nobody = store.request_cancel(tx, "nobody", CancelKind.OPERATOR, "late")
        assert nobody is None
    with store.planning(batch.id) as planning:
        assert planning is None
    assert sorted(bench.sql(look)) == before


def test_two_launchers_never_claim_one_chunk(bench: Bench) -> None:
    batch = bench.enqueue(range(40))
    bench.plan()
    stores = [bench.store, bench.worker("worker-2").store]
    barrier = Barrier(2)
    claimed: list[int] = []

    def claim(store: Store) -> None:
        with store.transaction() as tx:
            barrier.wait(60)
            mine = [one.chunk_index for one in store.claim(tx, batch.id, 25)]
            barrier.wait(60)
            claimed.extend(mine)
            tx.rollback()

    threads = [Thread(target=claim, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(claimed) == len(set(claimed)) == 40


# --- transactions ---------------------------------------------------------------------------------


def test_a_deadlock_is_a_conflict_after_which_the_step_is_taken_again(bench: Bench) -> None:
    bench.sql("CREATE TABLE public.thing (id int PRIMARY KEY, n int)")
    bench.sql("INSERT INTO public.thing VALUES (1, 0), (2, 0)")
    barrier = Barrier(2)
    tries: list[int] = []

    def both(order: tuple[int, int]) -> None:
        first = True

        def step() -> None:
            nonlocal first
            tries.append(order[0])
            with bench.store.transaction() as tx:
                for place in order:
                    bench.store.run(tx, "UPDATE public.thing SET n = n + 1 WHERE id = :i", i=place)
                    if first:
                        first = False
                        barrier.wait(60)

        again(step, tries=20)

    threads = [Thread(target=both, args=(order,)) for order in ((1, 2), (2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert bench.sql("SELECT n FROM public.thing") == [2, 2]
    # Postgres ends one of the two, or both; and what is taken again may meet the other once more.
    assert len(tries) > len(threads), "what was ended was taken again"


def test_a_step_that_keeps_conflicting_is_given_up() -> None:
    tries: list[int] = []

    def step() -> None:
        tries.append(1)
        raise Conflict("deadlock detected")

    with pytest.raises(Conflict):
        again(step, tries=3)
    assert len(tries) == 3


def test_a_connection_that_is_cut_is_unreachable_and_the_next_one_works(bench: Bench) -> None:
    store = bench.store

    def cut() -> None:
        with store.transaction() as tx:
            pid = store.run(tx, "SELECT pg_backend_pid()").scalar_one()
            bench.sql("SELECT pg_terminate_backend(:pid)", pid=pid)
            store.run(tx, "SELECT 1")

    with pytest.raises(Unreachable, match=r"^cannot reach the database at "):
        cut()
    with store.transaction() as tx:
        assert store.run(tx, "SELECT 1").scalar_one() == 1


def test_the_time_is_the_databases_and_in_utc(bench: Bench) -> None:
    with bench.database.connect() as connection:
        assert connection.execute(sa.text("SHOW timezone")).scalar_one() == "UTC"
        raw = connection.connection.driver_connection
        assert isinstance(raw, psycopg.Connection)


def test_ids_of_batches_are_short_and_differ_from_the_first_letter() -> None:
    ids = {new_batch_id() for _ in range(2000)}
    assert len(ids) == 2000
    assert all(len(one) == 12 and one.isalnum() and one == one.lower() for one in ids)
    assert len({one[0] for one in ids}) > 20
    assert not set("".join(ids)) & set("lo01"), "letters that look alike are left out"


def test_a_database_without_our_tables_is_told_so(bench: Bench) -> None:
    with bench.store.engine.begin() as tx:
        tx.execute(sa.text("CREATE SCHEMA elsewhere"))
    with (
        pytest.raises(SchemaMismatch, match="run `dispatcher db upgrade`"),
        bench.store.transaction() as tx,
    ):
        bench.store.run(tx, "SELECT 1 FROM elsewhere.batch")


def test_a_user_without_rights_is_told_so(bench: Bench, database_url: str) -> None:
    role = f"poor_{uuid.uuid4().hex}"
    with bench.store.engine.begin() as tx:
        tx.execute(sa.text(f"CREATE ROLE {role} LOGIN"))
    poor = Store(schema.create_engine(sa.make_url(database_url).set(username=role)), actor="poor")
    try:
        with pytest.raises(NotAllowed, match=f"does not let user {role}"), poor.transaction() as tx:
            poor.run(tx, "SELECT 1 FROM dispatcher.batch")
    finally:
        poor.engine.dispose()
        with bench.store.engine.begin() as tx:
            tx.execute(sa.text(f"DROP ROLE {role}"))


def test_a_pool_that_is_used_up_is_told_so(database_url: str) -> None:
    engine = sa.create_engine(database_url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    store = Store(engine, actor="busy")
    try:
        with engine.connect(), pytest.raises(Unreachable, match="raise DISPATCHER_POOL_SIZE"):
            store.unplanned(1)
    finally:
        engine.dispose()
