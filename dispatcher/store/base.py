"""One engine, one transaction at a time, one clock; and what the statements share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn, TypeVar

import psycopg
import sqlalchemy as sa
import structlog

from dispatcher import schema
from dispatcher.errors import DispatcherError, NotAllowed, SchemaMismatch, Unreachable

__all__ = ["DUE", "EXECUTION_COLUMNS", "LIVE", "OPEN", "BaseStore", "Conflict", "again"]

log = structlog.get_logger(__name__)

LIVE: Final = "('intended', 'unknown', 'launched')"
OPEN: Final = "('pending', 'launching', 'running')"
DUE: Final = (
    "c.state = 'pending' AND c.due_at <= now()"
    " AND (c.hold_until IS NULL OR c.hold_until <= now()) AND c.awaits_split IS NULL"
)
"""Chunks, as `c`, that could be launched now."""

NO_TABLES: Final = frozenset({"3F000", "42P01", "42703"})
"""No such schema, table or column."""

NO_RIGHT: Final = "42501"
MET_ANOTHER: Final = frozenset({"40P01", "40001", "55P03"})
"""A deadlock, a serialization failure, a lock that was not to be had in time."""

GONE: Final = frozenset({schema.READ_ONLY, "25P03", "57P01", "57P02", "57P03"})
"""The server lets nobody write or is going away, or it ended our connection; and class 08."""

EXECUTION_COLUMNS: Final = """
    e.id, e.key, e.batch_id, e.job_name, e.state, e.stray, e.tasks, e.open_tasks, e.parallelism,
    e.handle, e.calls, e.looks, e.cancel_kind, e.cancel_sent_at, e.cancel_calls,
    extract(epoch FROM now() - e.launched_at)::float8, e.started_at IS NOT NULL,
    extract(epoch FROM now() - e.absent_since)::float8,
    extract(epoch FROM now() - e.call_by)::float8, e.intent_at
"""

_T = TypeVar("_T")


class Conflict(DispatcherError):
    """Two transactions met in the wrong order; nothing was written and the step may be repeated."""


class BaseStore:
    """The tables behind one SQLAlchemy engine.

    `now` is the SQL expression of the current time; only tests with a clock of their own give
    another one than the database's `now()`.
    """

    def __init__(self, engine: sa.Engine, *, actor: str, now: str = "now()") -> None:
        self.engine = engine
        self.actor = actor
        self._now = now
        self._instance: str | None = None
        self.sql = functools.cache(self._compile)

    def _compile(self, sql: str) -> sa.TextClause:
        return sa.text(sql.replace("now()", self._now) if self._now != "now()" else sql)

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Open a transaction that commits at the end of the block.

        Raises:
            Unreachable: the database does not answer, or lets nobody write; connect again.
            Conflict: a deadlock, a serialization failure, or a lock that another session has kept
                for too long; nothing was written.
        """
        try:
            with self.engine.begin() as tx:
                yield tx
        except sa.exc.TimeoutError as error:
            raise Unreachable(
                f"every database connection of this process is in use: {error}; "
                "raise DISPATCHER_POOL_SIZE, or use fewer threads"
            ) from error
        except (sa.exc.DBAPIError, psycopg.Error) as error:
            self._raise_as_ours(error)

    def _raise_as_ours(self, error: sa.exc.DBAPIError | psycopg.Error) -> NoReturn:
        """Raise what a caller can act on; an error that only a bug can cause stays as it is.

        COPY bypasses SQLAlchemy, so the driver's own errors come here too.
        """
        cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        code = getattr(cause, "sqlstate", None) or ""
        if code in MET_ANOTHER:
            raise Conflict(str(cause)) from error
        if code in NO_TABLES:
            raise SchemaMismatch(
                f"the database lacks what this code needs ({cause}): run `dispatcher db upgrade`"
            ) from error
        if code == NO_RIGHT:
            raise NotAllowed(
                f"the database does not let user {self.engine.url.username} do this: {cause}"
            ) from error
        if (
            isinstance(cause, psycopg.OperationalError)
            or (isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated)
            or code in GONE
            or code.startswith("08")
        ):
            url = self.engine.url.render_as_string(hide_password=False)
            raise Unreachable(schema.unreachable(url, error)) from error
        raise error

    def run(
        self, tx: sa.Connection, sql: str, /, **params: Any
    ) -> sa.CursorResult[*tuple[Any, ...]]:
        """Execute one statement of this module or of `queries.py`."""
        return tx.execute(self.sql(sql), params)

    def instance(self, tx: sa.Connection) -> str:
        """Read the name of this installation, by which providers know what is ours."""
        if self._instance is None:
            self._instance = self.run(
                tx, "SELECT instance FROM dispatcher.installation"
            ).scalar_one()
        return self._instance


def again(step: Callable[[], _T], tries: int = 5) -> _T:
    """Take a step again that met another transaction; it has written nothing."""
    for _ in range(tries - 1):
        try:
            return step()
        except Conflict as error:
            log.info("met another transaction; again", why=str(error))
    return step()
