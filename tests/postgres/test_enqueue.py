"""How batches come in: every form of items, idempotency keys, the caller's own transaction."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from waiting import until
from workbench import Bench, job

from dispatcher import Dispatcher
from dispatcher.errors import (
    IdempotencyConflict,
    InvalidInput,
    InvalidItems,
    UnknownBatch,
    UnknownJob,
    Unreachable,
    WaitTimeout,
)
from dispatcher.testing import Ending

MakeBench = Callable[..., Bench]


def items_of(bench: Bench, batch_id: str) -> list[Any]:
    """All items of a batch, in order, out of its chunks."""
    return [
        item
        for chunk in bench.dispatcher.chunks(batch_id, items=True)
        for item in json.loads(chunk.items or "")
    ]


def counts(bench: Bench) -> tuple[int, int]:
    (found,) = bench.sql(
        "SELECT (SELECT count(*) FROM dispatcher.batch), "
        "(SELECT count(*) FROM dispatcher.item_page)"
    )
    return found  # type: ignore[no-any-return]  # a row


# --- items ----------------------------------------------------------------------------------------

AWKWARD: list[Any] = [
    "plain",
    "quote ' and \" and \\ and \t and \n and \r\n",
    "NUL \0 in the middle",
    "\u2028 \u2029 \ufeff \U0001f600 ä é é",
    "literally \\u0000 and %s and {items:csv} and \\N",
    "",
    None,
    True,
    0,
    -1.5e300,
    12345678901234567890123,
    {"b": [1, {"a": "\0"}], "ä": None, "": ""},
    [[], {}],
]


@pytest.mark.parametrize("size", [1, 5, 100])
def test_every_json_value_comes_through_unchanged(make_bench: MakeBench, size: int) -> None:
    bench = make_bench(job(chunk={"size": size}))
    batch = bench.enqueue(AWKWARD)
    bench.plan()
    assert items_of(bench, batch.id) == AWKWARD
    assert batch.refresh().item_count == len(AWKWARD)
    bench.finish(batch)
    launched = [t.items for r in bench.world.requests() for t in r.tasks]
    assert sum(len(json.loads(text)) for text in launched) == len(AWKWARD)


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 2000, 2001, 2500])
def test_no_item_is_lost_at_the_edge_of_a_page(make_bench: MakeBench, count: int) -> None:
    bench = make_bench(job(chunk={"size": 100}))
    batch = bench.enqueue(iter(range(count)))
    bench.plan()
    assert items_of(bench, batch.id) == list(range(count))
    assert bench.sql("SELECT count(*) FROM dispatcher.item_page") == [0], "they moved to the chunks"


def test_an_iterable_is_streamed_in_bounded_memory(make_bench: MakeBench) -> None:
    bench = make_bench(job(chunk={"size": 20}))
    bench.enqueue([1])  # all that is imported late has been
    bench.plan()
    count = 30_000

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(count):
            yield {"id": number, "name": f"customer number {number} " + "x" * 1000}

    tracemalloc.start()
    try:
        batch = bench.enqueue(rows())
        _, enqueued = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        bench.plan()
        _, planned = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # As one list of texts they would take more than 30 MB; what other threads take counts too.
    assert enqueued < 15_000_000
    assert planned < 15_000_000
    batch = batch.refresh()
    assert (batch.item_count, batch.chunk_count) == (count, count // 20)
    batch.cancel()


FILES = {
    "items.jsonl": ('{"a": 1}\n\n"two"\n', [{"a": 1}, "two"]),
    "items.csv": ('a,b\n1,"x, y"\n2,z\n', [{"a": "1", "b": "x, y"}, {"a": "2", "b": "z"}]),
    "items.txt": ("one\ntwo\n", ["one", "two"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_copied_when_it_is_enqueued(bench: Bench, tmp_path: Path, name: str) -> None:
    text, expected = FILES[name]
    path = tmp_path / name
    path.write_text(text)
    batch = bench.enqueue(path)
    path.unlink()
    bench.plan()
    assert items_of(bench, batch.id) == expected


def test_a_uri_is_read_when_it_is_planned(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    batch = bench.enqueue(f"file://{path}")
    path.write_text('"late"\n')
    bench.plan()
    assert items_of(bench, batch.id) == ["late"]


def test_an_item_source_is_asked_when_it_is_planned(
    make_bench: MakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop_tables.py").write_text(
        "def list_tables(prefix):\n    return [prefix + name for name in 'abc']\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    bench = make_bench(
        job(
            items={"source": "shop_tables:list_tables"},
            params={"type": "object", "properties": {"prefix": {"type": "string"}}},
        )
    )
    batch = bench.enqueue(None, params={"prefix": "t_"})
    bench.plan()
    assert (batch.refresh().reason, items_of(bench, batch.id)) == (None, ["t_a", "t_b", "t_c"])


def test_items_that_cannot_be_used_leave_nothing_behind(bench: Bench, tmp_path: Path) -> None:
    def broken() -> Iterator[int]:
        yield from range(5000)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bench.enqueue(broken())
    with pytest.raises(InvalidItems, match=r"^item 3000 is an? object, which is not a JSON value"):
        bench.enqueue([*range(3000), object()])
    with pytest.raises(InvalidItems, match="half of a surrogate pair"):
        bench.enqueue(["\ud800"])
    with pytest.raises(InvalidItems):
        bench.enqueue(tmp_path / "nowhere.jsonl")
    with pytest.raises(InvalidItems, match=r'^job "work" has no item source: give items, or set'):
        bench.enqueue(None)
    assert counts(bench) == (0, 0)


# --- what else is said ----------------------------------------------------------------------------


def test_what_is_asked_for_is_kept(make_bench: MakeBench) -> None:
    bench = make_bench(
        job(labels={"team": "a", "env": "test"}, params={"properties": {"day": {"default": "x"}}})
    )
    batch = bench.enqueue([1], key="k", params={"more": [1]}, priority=7, labels={"env": "prod"})
    read = bench.dispatcher.get(batch.id)
    assert read == batch
    assert (read.key, read.job, read.target, read.state) == ("k", "work", "here", "planning")
    assert read.params == {"day": "x", "more": [1]}
    assert read.labels == {"team": "a", "env": "prod"}
    assert (read.priority, read.actor, read.progress) == (7, "app", 0.0)
    assert read.deadline - read.created_at == timedelta(hours=24)
    assert [b.id for b in bench.dispatcher.batches(label=("env", "prod"))] == [batch.id]
    assert bench.dispatcher.batches(label=("env", "test")) == []


def test_a_chunk_size_goes_over_the_jobs_own_chunking(make_bench: MakeBench) -> None:
    bench = make_bench(job(chunk={"count": 2}))
    batch = bench.enqueue(range(10), chunk_size=3)
    bench.plan()
    assert [c.size for c in bench.dispatcher.chunks(batch.id)] == [3, 3, 3, 1]


def test_an_unknown_job_is_refused_by_name(bench: Bench) -> None:
    with pytest.raises(UnknownJob) as told:
        bench.enqueue([1], "wrok")
    assert str(told.value).startswith('no job "wrok" is configured in test; configured: ')
    assert '"work"' in str(told.value) or "work" in str(told.value)
    assert counts(bench) == (0, 0)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"key": ""}, "key is ''; it must be a text of 1 to 200 characters, none of them NUL"),
        (
            {"key": "a\0b"},
            "key is 'a\\x00b'; it must be a text of 1 to 200 characters, none of them NUL",
        ),
        ({"key": 5}, "key is '5'; it must be a text of 1 to 200 characters, none of them NUL"),
        (
            {"key": "k" * 201},
            f"key is 201 characters long, '{'k' * 40}'…; it must be a text of 1 to 200 characters",
        ),
        ({"chunk_size": 0}, "chunk_size is 0; it must be a number from 1 up"),
        ({"chunk_size": True}, "chunk_size is True; it must be a number from 1 up"),
        ({"priority": 1000}, "priority is 1000; it must be from -100 to 100"),
        ({"priority": -101}, "priority is -101; it must be from -100 to 100"),
        ({"priority": True}, "priority is True; it must be an integer"),
        ({"priority": "high"}, "priority is 'high'; it must be an integer"),
        (
            {"labels": {"a": "x" * 64}},
            f"label 'a' is '{'x' * 64}'; names and values must be texts of at most 63 characters",
        ),
        (
            {"connection": "postgres://"},
            (
                "connection is a str; it must be a sqlalchemy.Connection: of a Session, pass "
                "session.connection()"
            ),
        ),
    ],
)
def test_a_wrong_argument_is_refused(bench: Bench, named: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as told:
        bench.enqueue([1], **named)
    assert str(told.value) == message
    assert counts(bench) == (0, 0)


# --- idempotency keys -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 3, 2500])
def test_the_same_key_and_request_give_the_same_batch(bench: Bench, count: int) -> None:
    first = bench.enqueue(range(count), key="nightly")
    again = bench.enqueue(iter(range(count)), key="nightly")
    assert (again.id, again.existed, first.existed) == (first.id, True, False)
    assert bench.enqueue([*range(count)], key="other").id != first.id
    bench.plan()
    assert bench.enqueue(range(count), key="nightly").id == first.id, "however far it is"
    assert counts(bench)[0] == 2
    events = [e for e in bench.dispatcher.events(first.id) if e.new == "planning"]
    assert len(events) == 1


def test_the_same_key_and_another_request_are_an_error_that_names_the_difference(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(job(params={"properties": {"day": {}}}), job("other"))
    first = bench.enqueue([1, 2], key="k", params={"day": "mon"})
    with pytest.raises(IdempotencyConflict) as told:
        bench.enqueue([1, 2, 3], key="k", params={"day": "tue"}, chunk_size=2)
    text = str(told.value)
    assert text.startswith(
        f'key "k" belongs to batch {first.id}, a different request: items: there 2 '
        "items, here 3 items; params.day there is mon, here tue; chunk.size there is 1, here 2. "
        "Use another key for another request"
    )
    with pytest.raises(IdempotencyConflict) as told:
        bench.enqueue([2, 1], key="k", params={"day": "mon"})
    assert ("request: items: 2 items there and here, but not the same in the same order. ") in str(
        told.value
    )
    with pytest.raises(IdempotencyConflict, match="job there is work, here other"):
        bench.enqueue([1, 2], "other", key="k")
    with pytest.raises(IdempotencyConflict, match="items: there 2 items, here 2,500 items"):
        bench.enqueue([1, *range(2499)], key="k", params={"day": "mon"})
    assert counts(bench)[0] == 1


def test_a_key_in_use_makes_the_second_caller_wait_for_the_first_ones_commit(bench: Bench) -> None:
    answers: list[str] = []
    with bench.database.begin() as tx:
        first = bench.enqueue([1], key="k", connection=tx)
        second = threading.Thread(
            target=lambda: answers.append(bench.enqueue([1], key="k").id), daemon=True
        )
        second.start()
        until(bench.waiting_for_locks, "the second caller waits")
        assert answers == []
    second.join(60)
    assert answers == [first.id]


def test_a_key_whose_first_caller_rolls_back_is_the_second_ones(bench: Bench) -> None:
    answers: list[str] = []
    with bench.database.connect() as connection:
        transaction = connection.begin()
        first = bench.enqueue([1], key="k", connection=connection)
        second = threading.Thread(
            target=lambda: answers.append(bench.enqueue([1, 2], key="k").id), daemon=True
        )
        second.start()
        until(bench.waiting_for_locks, "the second caller waits")
        transaction.rollback()
    second.join(60)
    assert len(answers) == 1
    assert answers != [first.id]
    assert counts(bench)[0] == 1


def test_many_callers_of_one_key_make_one_batch(bench: Bench) -> None:
    answers: list[str] = []
    barrier = threading.Barrier(6)

    def ask() -> None:
        barrier.wait(60)
        answers.append(bench.enqueue(range(1500), key="k").id)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 6
    assert len(set(answers)) == 1
    assert counts(bench) == (1, 2)


# --- the caller's transaction ---------------------------------------------------------------------


def test_in_a_callers_transaction_the_batch_exists_exactly_if_it_commits(bench: Bench) -> None:
    with bench.database.connect() as connection:
        with connection.begin() as transaction:
            gone = bench.enqueue(range(2500), connection=connection)
            assert gone.state == "planning"
            assert counts(bench) == (0, 0)
            transaction.rollback()
        with connection.begin():
            kept = bench.enqueue(range(2500), connection=connection)
            assert (
                connection.execute(sa.text("SELECT count(*) FROM dispatcher.batch")).scalar_one()
                == 1
            )
    with pytest.raises(UnknownBatch):
        bench.dispatcher.get(gone.id)
    assert bench.dispatcher.get(kept.id).id == kept.id
    bench.plan()
    assert bench.dispatcher.get(kept.id).chunk_count == 2500


def test_a_call_that_raises_leaves_nothing_in_the_callers_transaction(bench: Bench) -> None:
    def broken() -> Iterator[int]:
        yield from range(5000)
        raise ZeroDivisionError

    with bench.database.begin() as connection:
        with pytest.raises(ZeroDivisionError):
            bench.enqueue(broken(), key="k", connection=connection)
        with pytest.raises(InvalidItems):
            bench.enqueue([*range(3000), object()], connection=connection)
        kept = bench.enqueue([1, 2], key="k", connection=connection)
    assert counts(bench) == (1, 1)
    bench.finish(kept)
    assert items_of(bench, kept.id) == [1, 2]


def test_a_connection_without_a_transaction_is_refused(bench: Bench) -> None:
    with (
        bench.database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        pytest.raises(InvalidInput, match=r"^connection is in autocommit, so it has no transacti"),
    ):
        bench.enqueue([1], connection=connection)
    assert counts(bench) == (0, 0)


def test_a_restored_copy_gets_another_name_and_nothing_open_by_what_operations_md_says(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(job(), limits={"max_running": 2})
    ended = bench.enqueue([1])
    bench.finish(ended)
    bench.enqueue([1])
    running = bench.enqueue([1, 2, 3])
    bench.plan()
    bench.launch()
    assert bench.sql("SELECT count(*) FROM dispatcher.execution WHERE state <> 'ended'") == [2]
    (before,) = bench.sql("SELECT instance FROM dispatcher.installation")
    page = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()
    block = page.partition("## Restoring a dump beside the original")[2].partition("```sql\n")[2]
    for statement in block.partition("```")[0].strip().removesuffix(";").split(";"):
        bench.sql(statement)
    (after,) = bench.sql("SELECT instance FROM dispatcher.installation")
    assert after != before
    assert re.fullmatch("[a-z0-9]{12}", after)
    assert [b.id for b in bench.dispatcher.batches()] == [ended.id]
    with pytest.raises(UnknownBatch):
        bench.dispatcher.get(running.id)
    assert bench.sql(
        "SELECT (SELECT count(*) FROM dispatcher.chunk), (SELECT count(*) FROM dispatcher.attempt)"
    ) == [(1, 1)]


# --- waiting, reading -----------------------------------------------------------------------------


def test_wait_gives_up_after_its_time_and_the_batch_goes_on(bench: Bench) -> None:
    batch = bench.enqueue([1])
    with pytest.raises(WaitTimeout) as told:
        batch.wait(0.1)
    assert str(told.value) == f"batch {batch.id} is still planning after 0.1 s"
    with pytest.raises(WaitTimeout):
        batch.wait(timedelta(0))
    bench.finish(batch)
    assert batch.wait(0).state == "succeeded"


def test_wait_returns_when_another_process_ends_it(bench: Bench) -> None:
    batch = bench.enqueue([1])
    waiting = threading.Thread(target=batch.wait, args=(100,))
    waiting.start()
    bench.finish(batch)
    waiting.join(60)
    assert not waiting.is_alive()


def test_an_id_may_be_shortened_as_long_as_it_is_one_batchs(bench: Bench) -> None:
    batch = bench.enqueue([1])
    assert bench.dispatcher.find(batch.id[:4]) == batch.id
    bench.sql(
        "INSERT INTO dispatcher.batch SELECT (jsonb_populate_record(b, "
        "jsonb_build_object('id', CAST(:other AS text)))).* FROM dispatcher.batch b",
        other=batch.id[:4] + "zzzzzzzz",
    )
    bench.sql(
        "INSERT INTO dispatcher.event (at, actor, kind, batch_id, new) "
        "VALUES (now(), 'test', 'batch', :other, 'planning')",
        other=batch.id[:4] + "zzzzzzzz",
    )
    with pytest.raises(UnknownBatch, match=f'^more than one batch begins with "{batch.id[:4]}": '):
        bench.dispatcher.find(batch.id[:4])
    for prefix in ("", "no-such", "%"):
        with pytest.raises(UnknownBatch, match=r"^no batch "):
            bench.dispatcher.find(prefix)


def test_batches_are_listed_newest_first(make_bench: MakeBench) -> None:
    bench = make_bench(job(), job("other"))
    made = []
    for name in ("work", "other", "work"):
        made.append(bench.enqueue([1], name))
        bench.advance(10)
    listed = bench.dispatcher.batches
    assert [b.id for b in listed()] == [b.id for b in reversed(made)]
    assert [b.id for b in listed(limit=1)] == [made[2].id]
    assert [b.id for b in listed(job="other")] == [made[1].id]
    assert [b.id for b in listed(since=made[1].created_at)] == [made[2].id, made[1].id]
    bench.finish(made[0])
    assert {b.id for b in listed(state="succeeded")} == {b.id for b in made}
    with pytest.raises(InvalidInput, match=r'^state is "done"; it must be one of planning, '):
        listed(state="done")


def test_the_chunks_and_the_audit_are_read_a_page_at_a_time(bench: Bench) -> None:
    batch = bench.enqueue(range(2500))
    bench.plan()
    assert [c.index for c in bench.dispatcher.chunks(batch.id)] == list(range(2500))
    ids = [e.id for e in bench.dispatcher.events(batch.id)]
    assert ids == sorted(ids)
    assert len(ids) == 2502
    assert [e.chunk_index for e in bench.dispatcher.events(batch.id, 7)] == [7]
    batch.cancel()


def test_a_database_that_is_down_is_told_and_nothing_was_written() -> None:
    with (
        Dispatcher(database_url="postgresql://me:pw@127.0.0.1:1/x") as dispatcher,
        pytest.raises(
            Unreachable, match=r"^cannot reach the database at .*me:\*\*\*@127\.0\.0\.1:1/x"
        ),
    ):
        dispatcher.enqueue(job(), [1])


FORKING = """
    import os, sys
    from dispatcher import Dispatcher, Job
    job = Job(name="work", target="here", command=("work",))
    dispatcher = Dispatcher(database_url=sys.argv[1], actor="parent")
    dispatcher.enqueue(job, [1])
    children = []
    for number in range(3):
        child = os.fork()
        if child == 0:
            for _ in range(20):
                dispatcher.enqueue(job, [number])
            dispatcher.close()
            os._exit(0)
        children.append(child)
    for _ in range(20):
        dispatcher.enqueue(job, ["parent"])
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert len(dispatcher.batches(limit=1000)) == 81
    dispatcher.close()
"""


def test_after_a_fork_each_process_has_connections_of_its_own(database_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKING), database_url],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore::DeprecationWarning"},
    )
    assert done.returncode == 0, done.stderr


def test_a_batch_says_how_far_it_is(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.world.script = lambda _batch, chunk, _attempt: Ending(seconds=1 if chunk < 3 else 50)
    batch = bench.enqueue(range(4))
    bench.turn()
    bench.turn(2)
    batch = batch.refresh()
    assert (batch.progress, batch.finished) == (0.75, False)
    assert batch.counts == {"succeeded": 3, "running": 1}


def test_a_broker_that_hangs_does_not_delay_an_enqueue(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = textwrap.dedent(
            """
            import sys, time
            from dispatcher import Dispatcher, Job
            job = Job(name="work", target="here", command=("work",))
            with Dispatcher(database_url=sys.argv[1], broker_url=sys.argv[2]) as dispatcher:
                dispatcher.enqueue(job, [1])
                sys.stdin.readline()
                began = time.perf_counter()
                for _ in range(30):
                    dispatcher.enqueue(job, [1])
                print((time.perf_counter() - began) / 30)
            """
        )
        with subprocess.Popen(
            [sys.executable, "-c", program, bench.database_url, f"redis://127.0.0.1:{port}/0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            server.settimeout(60)
            connection, _ = server.accept()  # the first tap is on its way, and hangs
            with connection:
                told, _ = process.communicate("go on\n", timeout=60)
    assert process.returncode == 0
    # An enqueue that waited for the broker would take the ten seconds after which a call gives up.
    assert float(told.splitlines()[-1]) < 2
    assert counts(bench)[0] == 31
