"""A database that is lent again is as a new copy; one that cannot be made so is not lent again."""

from __future__ import annotations

import psycopg
import pytest
from databases import Databases, connect
from workbench import Bench, job

TRIGGER = """
    CREATE FUNCTION public.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
    CREATE TRIGGER t BEFORE INSERT ON dispatcher.batch EXECUTE FUNCTION public.f()
"""


def number(databases: Databases, name: str) -> list[tuple[int, ...]]:
    """What tells a database for as long as it lives; a name may change."""
    statement = "SELECT oid FROM pg_database WHERE datname = %s"
    return databases.administrator.execute(statement, [name]).fetchall()


def contents(databases: Databases, name: str) -> dict[str, object]:
    """Each table with its rows, each sequence with its value, and the functions of `public`."""
    found: dict[str, object] = {}
    with connect(databases.server, name) as connection:
        # Found without their schema: it has the name of the role.
        for relation, what in connection.execute(
            """
            SELECT relname, CASE relkind WHEN 'r' THEN 'json_agg(t)'
                ELSE 'json_agg(json_build_array(last_value, is_called))' END
            FROM pg_class WHERE relkind IN ('r', 'S') AND
                relnamespace IN ('dispatcher'::regnamespace, 'public'::regnamespace)
            """
        ).fetchall():
            statement = f"SELECT {what} FROM {relation} AS t"  # noqa: S608
            found[relation] = connection.execute(statement).fetchall()
        found["functions"] = connection.execute(
            "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        ).fetchall()
    return found


def test_a_database_that_is_lent_again_holds_what_a_new_copy_does(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("databases.MOST_USES", 10_000)
    monkeypatch.setattr("databases.GONE_WITHIN", 60.0)
    new = contents(databases, databases.template)
    with databases.lend() as name:
        assert contents(databases, name) == new
        bench = Bench(databases.url(name), [job()])
        batch = bench.finish(bench.enqueue(range(3)))
        bench.sql("UPDATE dispatcher.installation SET instance = 'changed'")
        bench.close()
        used = contents(databases, name)
        assert batch.id in str(used["batch"])
        assert {relation for relation in new if used[relation] != new[relation]} > {
            *("installation", "event", "event_id_seq", "functions")
        }
        was = number(databases, name)
    with databases.lend() as again:
        assert number(databases, again) == was
        assert contents(databases, again) == new
        assert number(databases, name) == []  # it has another name


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE dispatcher.batch ADD COLUMN extra int",
        "ALTER TABLE dispatcher.event DISABLE TRIGGER event_append_only",
        "ALTER TABLE dispatcher.batch DROP CONSTRAINT batch_finished",
        "CREATE INDEX ON dispatcher.chunk (state)",
        "CREATE TABLE dispatcher.extra ()",
        "CREATE TYPE public.extra AS ENUM ('one')",
        "CREATE SCHEMA extra",
        "GRANT SELECT ON dispatcher.batch TO PUBLIC",
        "ANALYZE",
        TRIGGER,
        "ALTER DATABASE {} SET work_mem = 64",
        "ALTER DATABASE {} CONNECTION LIMIT 3",
    ],
)
def test_a_database_that_a_test_has_changed_is_dropped(databases: Databases, change: str) -> None:
    with databases.lend() as name:
        with connect(databases.server, name) as connection:
            connection.execute(change.replace("{}", name))
        (was,) = number(databases, name)
    statement = "SELECT 1 FROM pg_database WHERE oid = %s"
    assert databases.administrator.execute(statement, was).fetchall() == []


def test_a_database_that_somebody_is_connected_to_is_dropped(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("databases.GONE_WITHIN", 0.0)
    with databases.lend() as name:
        connection = connect(databases.server, name)
    assert number(databases, name) == []
    with pytest.raises(psycopg.OperationalError), connection:
        connection.execute("SELECT 1")


def test_a_database_that_a_test_drops_itself_is_missed_by_nobody(databases: Databases) -> None:
    with databases.lend() as name:
        databases.administrator.execute(f"DROP DATABASE {name}")
    with databases.lend() as other:
        assert contents(databases, other)


def test_a_database_wears_out(databases: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emptying its tables leaves something behind in the catalogues."""
    monkeypatch.setattr("databases.MOST_USES", 0)
    with databases.lend() as name:
        pass
    assert number(databases, name) == []
