"""Databases for tests: copies of one that was migrated once, and used again when they are clean.

A copy is some 340 files. Where a file system is slow to give out again what was just removed, a
copy for each test that needs one costs more than the test. A database that comes back is emptied
instead. What is not undone so is looked for, and if something is found, the database is dropped. It
also gets another name, so that a process that outlived its test does not find it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import psycopg
import sqlalchemy
from psycopg import sql

# Each statement that changes what a database is made of leaves a new row in one of these, or one
# fewer.
CATALOGUES: Final = (
    *("pg_attrdef", "pg_attribute", "pg_class", "pg_constraint", "pg_default_acl", "pg_depend"),
    *("pg_description", "pg_enum", "pg_event_trigger", "pg_extension", "pg_index", "pg_inherits"),
    *("pg_largeobject_metadata", "pg_namespace", "pg_policy", "pg_proc", "pg_publication"),
    *("pg_rewrite", "pg_sequence", "pg_statistic", "pg_statistic_ext", "pg_trigger", "pg_type"),
)
COUNT: Final = " UNION ALL ".join(
    f"SELECT '{name}', count(*), count(*) FILTER (WHERE age(xmin) < age(since)) "  # noqa: S608
    f"FROM pg_catalog.{name}, (SELECT %(since)s::text::xid AS since) AS s"
    for name in CATALOGUES
)
PROPERTIES: Final = """
    SELECT datdba, datallowconn, datconnlimit, datistemplate, datacl::text,
        (SELECT count(*) FROM pg_db_role_setting WHERE setdatabase = d.oid),
        (SELECT count(*) FROM pg_prepared_xacts WHERE database = d.datname)
    FROM pg_database d WHERE datname = current_database()
"""
ADDED: Final = """
    SELECT 'DROP ' || CASE relkind WHEN 'v' THEN 'VIEW ' ELSE 'TABLE ' END || oid::regclass
        || ' CASCADE'
    FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')
    UNION ALL
    SELECT 'DROP FUNCTION ' || oid::regprocedure
    FROM pg_proc WHERE pronamespace = 'public'::regnamespace
"""
TABLES: Final = """
    SELECT oid::regclass::text FROM pg_class
    WHERE relnamespace = 'dispatcher'::regnamespace AND relkind = 'r' ORDER BY 1
"""
WRITTEN: Final = f"SELECT name FROM ({TABLES}) AS t (name) WHERE pg_relation_size(name) > 0"  # noqa: S608
SEQUENCES: Final = """
    SELECT seqrelid::regclass::text, seqstart FROM pg_sequence
    JOIN pg_class ON pg_class.oid = seqrelid WHERE relnamespace = 'dispatcher'::regnamespace
"""

MOST_USES: Final = 40
"""Emptying a table leaves dead rows in the catalogues, which make them slower to read."""

GONE_WITHIN: Final = 0.5
"""Seconds in which a connection that was closed has ended on the server too."""


def named(url: str, database: str) -> str:
    """The same server, another database."""
    parsed = sqlalchemy.make_url(url).set(drivername="postgresql+psycopg", database=database)
    return parsed.render_as_string(hide_password=False)


def connect(url: str, database: str, *, autocommit: bool = False) -> psycopg.Connection:
    dsn = named(url, database).replace("postgresql+psycopg:", "postgresql:", 1)
    return psycopg.connect(dsn, autocommit=autocommit)


@contextmanager
def administrator(url: str) -> Iterator[psycopg.Connection]:
    with connect(url, "postgres", autocommit=True) as connection:
        yield connection


class Databases:
    """Copies of a migrated database that nobody is connected to."""

    def __init__(
        self, server: str, template: str, administrator: psycopg.Connection, *, durable: bool
    ) -> None:
        """Look at the template, which is not to be changed from here on.

        Args:
            server: its URL; that of any database.
            template: the name of the migrated database.
            administrator: a superuser's connection to another database.
            durable: whether the server writes to disk what it says that it has written.
        """
        self.server = server
        self.template = template
        self.administrator = administrator
        # On a server without fsync a copy of the files takes 9 ms, and one through the log 42 ms.
        self._strategy = "" if durable else "STRATEGY FILE_COPY"
        self._clean: list[str] = []
        self._uses: dict[str, int] = {}
        self._since: dict[str, str] = {}
        with connect(server, template) as connection:
            self._made = self._newest(connection)
            self._properties = connection.execute(PROPERTIES).fetchall()
            self._counts = [row[:2] for row in self._count(connection, self._made)]
            self._sequences = connection.execute(SEQUENCES).fetchall()
            self._rows = self._contents(connection)

    def url(self, name: str) -> str:
        """Return the SQLAlchemy URL of a database."""
        return named(self.server, name)

    @contextmanager
    def lend(self) -> Iterator[str]:
        """Yield the name of a database that holds what the template does."""
        name = self._clean.pop() if self._clean else self._copy()
        try:
            yield name
        finally:
            self._take_back(name)

    def close(self) -> None:
        """Drop what is left."""
        while self._clean:
            self._drop(self._clean.pop())

    def _copy(self) -> str:
        name = f"test_{uuid.uuid4().hex}"
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} " + self._strategy)
        self.administrator.execute(
            statement.format(sql.Identifier(name), sql.Identifier(self.template))
        )
        self._uses[name] = 1
        self._since[name] = self._made
        return name

    def _drop(self, name: str) -> None:
        statement = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
        self.administrator.execute(statement.format(sql.Identifier(name)))

    def _take_back(self, name: str) -> None:
        uses, since = self._uses.pop(name), self._since.pop(name)
        if uses >= MOST_USES or not self._is_left(name):
            self._drop(name)
            return
        renamed = f"test_{uuid.uuid4().hex}"
        statement = sql.SQL("ALTER DATABASE {} RENAME TO {}")
        try:
            self.administrator.execute(
                statement.format(sql.Identifier(name), sql.Identifier(renamed))
            )
        except psycopg.errors.ObjectInUse:  # somebody came back meanwhile
            self._drop(name)
            return
        try:
            newest = self._clean_up(renamed, since)
        except psycopg.errors.DependentObjectsStillExist:  # such as a trigger, on a function
            newest = None
        if newest is None:
            self._drop(renamed)
            return
        self._clean.append(renamed)
        self._uses[renamed] = uses + 1
        self._since[renamed] = newest

    def _is_left(self, name: str) -> bool:
        """Whether the database is there still and everybody has gone from it."""
        deadline = time.monotonic() + GONE_WITHIN
        while True:
            found = self.administrator.execute(
                "SELECT count(pid) FROM pg_database d LEFT JOIN pg_stat_activity a "
                "ON a.datid = d.oid WHERE d.datname = %s GROUP BY d.oid",
                [name],
            ).fetchone()
            if found is None or found[0] == 0:
                return found is not None
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)

    def _clean_up(self, name: str, since: str) -> str | None:
        """Empty a database; say which of its transactions was the last, or None: it was changed."""
        with connect(self.server, name) as connection:
            if connection.execute(PROPERTIES).fetchall() != self._properties:
                return None
            for (statement,) in connection.execute(ADDED).fetchall():
                connection.execute(statement)
            if self._count(connection, since) != [(*row, 0) for row in self._counts]:
                return None
            # Events refuse to be removed, by a trigger; it rests in this one session.
            connection.execute("SET LOCAL session_replication_role = replica")
            written = [row[0] for row in connection.execute(WRITTEN).fetchall()]
            if written:
                connection.execute(f"TRUNCATE {', '.join(written)} CASCADE")
            for table, rows in self._rows.items():
                connection.execute(
                    f"INSERT INTO {table} OVERRIDING SYSTEM VALUE "  # noqa: S608
                    f"SELECT * FROM json_populate_recordset(NULL::{table}, %s)",
                    [rows],
                )
            for sequence, start in self._sequences:
                connection.execute("SELECT setval(%s::regclass, %s, false)", [sequence, start])
            # Of deadlocks, say.
            connection.execute("SELECT pg_stat_reset()")
            return self._newest(connection)

    @staticmethod
    def _newest(connection: psycopg.Connection) -> str:
        """The id of this transaction: what later ones write is newer."""
        (found,) = connection.execute("SELECT pg_current_xact_id()::xid::text").fetchall()
        return str(found[0])

    @staticmethod
    def _count(connection: psycopg.Connection, since: str) -> list[tuple[Any, ...]]:
        """Each catalogue, its rows, and how many of them are newer than a transaction."""
        return connection.execute(COUNT, {"since": since}).fetchall()

    @staticmethod
    def _contents(connection: psycopg.Connection) -> dict[str, str]:
        """The rows of each table that has some, as JSON."""
        found = {}
        for (table,) in connection.execute(TABLES).fetchall():
            statement = f"SELECT json_agg(t)::text FROM {table} AS t"  # noqa: S608
            ((rows,),) = connection.execute(statement).fetchall()
            if rows is not None:
                found[table] = rows
        return found
