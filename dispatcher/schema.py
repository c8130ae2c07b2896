"""The tables, their constraints, and the version of the database.

What a row means is said here, beside its column; how rows move is in `store.py`. The database
itself refuses nonsense: states and outcomes are the words of `states.py`, a finishing time is there
exactly in final states, a chunk has at most one open attempt, and an event can be neither changed
nor deleted. `migrations/` builds the same tables step by step; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSON

from dispatcher.errors import SchemaMismatch, Unreachable
from dispatcher.states import (
    FINAL_BATCH,
    FINAL_CHUNK,
    LIVE_EXECUTION,
    BatchState,
    CancelKind,
    ChunkState,
    Cut,
    ExecutionState,
    Outcome,
)

if TYPE_CHECKING:
    from alembic.config import Config as AlembicConfig

__all__ = [
    "CODE_VERSION",
    "READ_ONLY",
    "REVISION",
    "SCHEMA",
    "check",
    "create_engine",
    "downgrade",
    "metadata",
    "revision",
    "upgrade",
]

SCHEMA: Final = "dispatcher"
"""All tables live in a Postgres schema of their own, so that none meets an application's table."""

CODE_VERSION: Final = 3
"""Raised when rows change their meaning. A worker of an older version than the database's
`installation.oldest_code` refuses to start, and one leaves rows of a newer version alone."""

REVISION: Final = "0005"
"""The newest migration; they are numbered, so a database's is older or newer by its number."""

READ_ONLY: Final = "25006"
"""The error code of a write to a server that is a standby, or was made one."""

OPEN_CHUNK: Final = tuple(s for s in ChunkState if s not in FINAL_CHUNK)

metadata = sa.MetaData(
    schema=SCHEMA,
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "ck": "%(table_name)s_%(constraint_name)s",
        "uq": "%(table_name)s_%(column_0_name)s_key",
    },
)


def _words(values: Iterable[StrEnum]) -> str:
    return ", ".join(f"'{value}'" for value in sorted(values))


def _one_of(column: str, values: Iterable[StrEnum]) -> sa.CheckConstraint:
    return sa.CheckConstraint(f"{column} IN ({_words(values)})", name=column)


def _finished(states: Iterable[StrEnum]) -> sa.CheckConstraint:
    return sa.CheckConstraint(
        f"(finished_at IS NOT NULL) = (state IN ({_words(states)}))", name="finished"
    )


def _time(name: str, *, nullable: bool = True) -> sa.Column[object]:
    return sa.Column(name, sa.TIMESTAMP(timezone=True), nullable=nullable)


installation = sa.Table(
    "installation",
    metadata,
    sa.Column("one", sa.Boolean, primary_key=True, server_default=sa.text("true")),
    sa.Column("instance", sa.Text, nullable=False, comment="names this installation at providers"),
    sa.Column("oldest_code", sa.Integer, nullable=False, comment="the oldest code it supports"),
    sa.CheckConstraint("one", name="single_row"),
)

batch = sa.Table(
    "batch",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, unique=True, comment="the caller's idempotency key"),
    sa.Column("request", JSON, nullable=False, comment="what a second use of the key must match"),
    sa.Column("job_name", sa.Text, nullable=False),
    sa.Column("job", JSON, nullable=False, comment="the job as it was when enqueued"),
    sa.Column("code_version", sa.Integer, nullable=False, comment="the code that wrote the job"),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("params", JSON, nullable=False),
    sa.Column("labels", JSON, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False, comment="higher is launched first"),
    sa.Column("items_from", sa.Text, nullable=False, comment="pages, source or a URI"),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, comment="why it ended as it did"),
    sa.Column("actor", sa.Text, nullable=False, comment="who enqueued it"),
    _time("created_at", nullable=False),
    _time("planned_at"),
    _time("deadline", nullable=False),
    _time("finished_at"),
    sa.Column("item_count", sa.BigInteger),
    sa.Column("chunk_count", sa.Integer),
    sa.Column("largest_chunk", sa.BigInteger, comment="bytes of the items of its largest chunk"),
    sa.Column("max_failed_chunks", sa.Integer, comment="null where another bound is given"),
    sa.Column("max_failed_items", sa.BigInteger),
    sa.Column("min_ratio", sa.Double, comment="of the items that must succeed"),
    sa.Column("stop_early", sa.Boolean, nullable=False, server_default=sa.text("false")),
    _time("cancel_requested_at"),
    sa.Column("cancel_kind", sa.Text, comment="what asked for its end"),
    sa.Column("cancel_reason", sa.Text),
    sa.Column("plan_tries", sa.Integer, nullable=False, server_default=sa.text("0")),
    _time("plan_after"),
    _one_of("state", BatchState),
    _finished(FINAL_BATCH),
    sa.CheckConstraint(
        "(cancel_requested_at IS NULL) = (cancel_kind IS NULL)", name="cancel_has_kind"
    ),
    sa.CheckConstraint(
        "cancel_kind IN ('batch_deadline', 'invalid', 'operator', 'success_policy')",
        name="cancel_kind",
    ),
    sa.Index(
        "batch_live",
        "target",
        sa.text("priority DESC"),
        "created_at",
        postgresql_where=sa.text("state = 'running'"),
    ),
    sa.Index("batch_unplanned", "created_at", postgresql_where=sa.text("state = 'planning'")),
    sa.Index("batch_recent", sa.text("created_at DESC"), "id"),
    sa.Index(
        "batch_deadline",
        "deadline",
        postgresql_where=sa.text(
            "state IN ('planning', 'running') AND cancel_requested_at IS NULL"
        ),
    ),
)

item_page = sa.Table(
    "item_page",
    metadata,
    sa.Column(
        "batch_id",
        sa.Text,
        sa.ForeignKey("dispatcher.batch.id", ondelete="CASCADE"),
        nullable=False,
    ),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("items", JSON, nullable=False, comment="one JSON array, see items.join_items"),
    sa.PrimaryKeyConstraint("batch_id", "number"),
    comment="what the caller of enqueue gave, until it is planned",
)

chunk = sa.Table(
    "chunk",
    metadata,
    sa.Column(
        "batch_id",
        sa.Text,
        sa.ForeignKey("dispatcher.batch.id", ondelete="CASCADE"),
        nullable=False,
    ),
    sa.Column("index", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("size", sa.Integer, nullable=False, comment="items in it"),
    sa.Column("weight", sa.Double, comment="sum of the field it was balanced by"),
    sa.Column(
        "items_ok",
        sa.Integer,
        nullable=False,
        server_default=sa.text("0"),
        comment="items that succeeded, as receipts say; all of them where it succeeded without",
    ),
    sa.Column("parent", sa.Integer, comment="the chunk that it was split from"),
    sa.Column(
        "depth", sa.Integer, nullable=False, server_default=sa.text("0"), comment="of splits"
    ),
    sa.Column(
        "attempts", sa.Integer, nullable=False, server_default=sa.text("0"), comment="last number"
    ),
    sa.Column(
        "budget_from",
        sa.Integer,
        nullable=False,
        server_default=sa.text("0"),
        comment="attempts up to this number cost nothing: an operator's retry forgave them",
    ),
    _time("due_at", nullable=False),
    _time("hold_until"),
    sa.Column(
        "awaits_split",
        sa.Text,
        comment="it waits, undue, until successes of its batch pay for this cut of it",
    ),
    sa.Column("outcome", sa.Text, comment="of its last ended attempt"),
    sa.Column("reason", sa.Text, comment="why it is where it is"),
    _time("finished_at"),
    sa.PrimaryKeyConstraint("batch_id", "index"),
    _one_of("state", ChunkState),
    _one_of("outcome", Outcome),
    _finished(FINAL_CHUNK),
    sa.CheckConstraint("items_ok BETWEEN 0 AND size", name="items_ok"),
    sa.CheckConstraint("(parent IS NULL) = (depth = 0)", name="parent"),
    sa.CheckConstraint(
        f"awaits_split IS NULL OR (awaits_split IN ({_words(Cut)}) AND state = 'pending')",
        name="awaits_split",
    ),
    sa.Index(
        "chunk_due",
        "batch_id",
        "due_at",
        "index",
        postgresql_where=sa.text("state = 'pending'"),
    ),
    sa.Index(
        "chunk_waits_for_split",
        "batch_id",
        "index",
        postgresql_where=sa.text("awaits_split IS NOT NULL"),
    ),
    sa.Index(
        "chunk_open",
        "batch_id",
        postgresql_where=sa.text(f"state IN ({_words(OPEN_CHUNK)})"),
    ),
)

chunk_items = sa.Table(
    "chunk_items",
    metadata,
    sa.Column(
        "batch_id",
        sa.Text,
        sa.ForeignKey("dispatcher.batch.id", ondelete="CASCADE"),
        nullable=False,
    ),
    sa.Column("chunk_index", sa.Integer, nullable=False),
    sa.Column("items", JSON, nullable=False, comment="one JSON array, see items.join_items"),
    sa.PrimaryKeyConstraint("batch_id", "chunk_index"),
    comment="apart from chunk, whose rows are rewritten at each move",
)

item_result = sa.Table(
    "item_result",
    metadata,
    sa.Column(
        "batch_id",
        sa.Text,
        sa.ForeignKey("dispatcher.batch.id", ondelete="CASCADE"),
        nullable=False,
    ),
    sa.Column("chunk_index", sa.Integer, nullable=False),
    sa.Column("position", sa.Integer, nullable=False, comment="in its chunk, from 0"),
    sa.Column("attempt", sa.Integer, nullable=False, comment="the number of the one that told it"),
    sa.Column("ok", sa.Boolean, nullable=False),
    sa.Column("output", JSON, comment="small ones; larger ones lie at output_uri"),
    sa.Column("output_uri", sa.Text),
    sa.Column("error", sa.Text),
    sa.PrimaryKeyConstraint("batch_id", "chunk_index", "position"),
    sa.Index(
        "item_result_failed",
        "batch_id",
        "chunk_index",
        "position",
        postgresql_where=sa.text("NOT ok"),
    ),
    comment="how items ended, as the receipts of their tasks say; the last word on each",
)

execution = sa.Table(
    "execution",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("key", sa.Text, nullable=False, unique=True, comment="its name at the provider"),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("batch_id", sa.Text, comment="null for a stray of an unknown batch"),
    sa.Column("job_name", sa.Text),
    sa.Column(
        "code_version",
        sa.Integer,
        nullable=False,
        server_default=sa.text("1"),
        comment="the code that wrote its job; older workers leave it alone",
    ),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("stray", sa.Boolean, nullable=False, server_default=sa.text("false")),
    sa.Column("tasks", sa.Integer, nullable=False),
    sa.Column("open_tasks", sa.Integer, nullable=False),
    sa.Column("parallelism", sa.Integer, nullable=False),
    sa.Column("request", JSON, comment="what was asked of the provider; secrets redacted"),
    sa.Column("worker", sa.Text, comment="who made the last launch call"),
    sa.Column("handle", sa.Text),
    sa.Column("console_url", sa.Text),
    sa.Column("logs_url", sa.Text),
    _time("intent_at", nullable=False),
    sa.Column(
        "calls", sa.Integer, nullable=False, server_default=sa.text("0"), comment="launch calls"
    ),
    _time("call_by"),
    _time("next_call_at"),
    sa.Column(
        "looks", sa.Integer, nullable=False, server_default=sa.text("0"), comment="finds in a row"
    ),
    _time("next_look_at"),
    _time("launched_at"),
    _time("start_deadline"),
    _time("started_at"),
    _time("deadline"),
    _time("absent_since"),
    _time("cancel_requested_at"),
    sa.Column("cancel_kind", sa.Text, comment="what asked for its end; beats the provider's word"),
    _time("cancel_sent_at"),
    _time("next_cancel_at"),
    sa.Column("cancel_calls", sa.Integer, nullable=False, server_default=sa.text("0")),
    _time("finished_at"),
    sa.Column("reason", sa.Text),
    _one_of("state", ExecutionState),
    sa.Column(
        "unread_since",
        sa.DateTime(timezone=True),
        comment="tasks have ended whose receipts cannot be read",
    ),
    _finished([ExecutionState.ENDED]),
    sa.CheckConstraint("open_tasks BETWEEN 0 AND tasks", name="open_tasks"),
    sa.CheckConstraint("state <> 'launched' OR handle IS NOT NULL", name="launched_has_handle"),
    sa.CheckConstraint("state <> 'ended' OR open_tasks = 0", name="ended_is_settled"),
    sa.CheckConstraint(
        f"cancel_kind IN ({_words(CancelKind)})",
        name="cancel_kind",
    ),
    sa.CheckConstraint(
        "(cancel_requested_at IS NULL) = (cancel_kind IS NULL)", name="cancel_has_kind"
    ),
    sa.Index(
        "execution_live",
        "target",
        "state",
        "id",
        postgresql_where=sa.text(f"state IN ({_words(LIVE_EXECUTION)})"),
    ),
    sa.Index(
        "execution_live_batch",
        "batch_id",
        postgresql_where=sa.text(f"state IN ({_words(LIVE_EXECUTION)})"),
    ),
    sa.Index(
        "execution_live_job",
        "job_name",
        postgresql_where=sa.text(f"state IN ({_words(LIVE_EXECUTION)})"),
    ),
    sa.Index("execution_batch", "batch_id", "id"),
)

attempt = sa.Table(
    "attempt",
    metadata,
    sa.Column("batch_id", sa.Text, nullable=False),
    sa.Column("chunk_index", sa.Integer, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column(
        "execution_id",
        sa.BigInteger,
        sa.ForeignKey("dispatcher.execution.id", ondelete="CASCADE"),
        nullable=False,
    ),
    sa.Column("task_index", sa.Integer, nullable=False),
    sa.Column(
        "positions",
        sa.ARRAY(sa.Integer),
        comment="the items of its chunk that it was given; null: all of them",
    ),
    sa.Column("progress_done", sa.BigInteger, comment="as its task last said while it ran"),
    sa.Column("progress_total", sa.BigInteger),
    _time("progress_at"),
    sa.Column("outcome", sa.Text, comment="null while it is open"),
    sa.Column("exit_code", sa.Integer),
    sa.Column("reason", sa.Text),
    sa.Column("result_uri", sa.Text, comment="where the task says that its result lies"),
    sa.Column("log_tail", sa.Text, comment="last lines of a task that ended badly"),
    _time("opened_at", nullable=False),
    _time("started_at"),
    _time("ended_at"),
    _time("settled_at"),
    sa.PrimaryKeyConstraint("batch_id", "chunk_index", "number"),
    _one_of("outcome", Outcome),
    sa.CheckConstraint("(outcome IS NULL) = (settled_at IS NULL)", name="settled"),
    sa.UniqueConstraint("execution_id", "task_index"),
    sa.Index(
        "attempt_open",
        "batch_id",
        "chunk_index",
        unique=True,
        postgresql_where=sa.text("outcome IS NULL"),
    ),
)

event = sa.Table(
    "event",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    _time("at", nullable=False),
    sa.Column("actor", sa.Text, nullable=False, comment="a person, an application or a worker"),
    sa.Column("kind", sa.Text, nullable=False, comment="what it is about"),
    sa.Column("batch_id", sa.Text),
    sa.Column("chunk_index", sa.Integer),
    sa.Column("attempt", sa.Integer),
    sa.Column("execution_id", sa.BigInteger),
    sa.Column("old", sa.Text, comment="null where nothing moved"),
    sa.Column("new", sa.Text, comment="null where nothing moved"),
    sa.Column("reason", sa.Text),
    sa.CheckConstraint(
        "kind IN ('attempt', 'batch', 'chunk', 'execution', 'schedule', 'target')", name="kind"
    ),
    sa.Index("event_batch", "batch_id", "id"),
    sa.Index("event_at", "at", postgresql_using="brin"),
    comment="append-only: triggers refuse UPDATE, DELETE and TRUNCATE; no foreign keys (retention)",
)

target = sa.Table(
    "target",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("backend", sa.Text, nullable=False),
    sa.Column("limits", JSON, nullable=False, comment="as its last leaseholder was configured"),
    sa.Column("home", JSON, comment="the only machine that can serve it"),
    sa.Column("lease_owner", sa.Text),
    sa.Column("lease_token", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    _time("lease_until"),
    _time("down_since"),
    sa.Column("down_reason", sa.Text),
    sa.Column("down_calls", sa.Integer, nullable=False, server_default=sa.text("0")),
    _time("resume_at"),
)

bucket = sa.Table(
    "bucket",
    metadata,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True, comment="of call"),
    sa.Column("tokens", sa.Double, comment="left when one was last taken"),
    _time("taken_at"),
    sa.Column(
        "pace",
        sa.Double,
        nullable=False,
        server_default=sa.text("1"),
        comment="the part of the full rate that it was slowed to",
    ),
    _time("slowed_at"),
    sa.CheckConstraint("kind IN ('launch', 'logs', 'read', 'write')", name="kind"),
    sa.CheckConstraint("pace > 0 AND pace <= 1", name="pace"),
    sa.CheckConstraint("(tokens IS NULL) = (taken_at IS NULL)", name="taken"),
    comment="budgets of calls to a provider, taken from by all workers",
)

worker = sa.Table(
    "worker",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("code_version", sa.Integer, nullable=False),
    sa.Column("problems", JSON, nullable=False, comment="targets it cannot serve, and why"),
    _time("started_at", nullable=False),
    _time("heartbeat_at", nullable=False),
    _time("stopped_at"),
)

schedule_firing = sa.Table(
    "schedule_firing",
    metadata,
    sa.Column("schedule", sa.Text, nullable=False),
    _time("due_at", nullable=False),
    sa.Column("batch_id", sa.Text, comment="null where the firing was skipped"),
    _time("fired_at", nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("reason", sa.Text),
    sa.PrimaryKeyConstraint("schedule", "due_at"),
)

APPEND_ONLY: Final = (
    """
    CREATE FUNCTION dispatcher.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'events are append-only: % of dispatcher.event is refused', TG_OP
            USING ERRCODE = 'restrict_violation';
    END $$
    """,
    """
    CREATE TRIGGER event_append_only BEFORE UPDATE OR DELETE ON dispatcher.event
    FOR EACH ROW EXECUTE FUNCTION dispatcher.refuse_change()
    """,
    """
    CREATE TRIGGER event_no_truncate BEFORE TRUNCATE ON dispatcher.event
    FOR EACH STATEMENT EXECUTE FUNCTION dispatcher.refuse_change()
    """,
)
"""What SQLAlchemy has no words for; the first migration runs it."""


def create_engine(
    url: str, *, pool_size: int = 8, ping: bool = False, worker: bool = False
) -> sa.Engine:
    """Make the engine that everything of ours uses: UTC, and a server that vanished is noticed.

    With `ping`, a pooled connection is tried before it is used, so that a restart of Postgres is
    not seen by callers. Workers do without: they try again anyway.

    A `worker` waits 10 s for a lock, and a transaction in which it does nothing for 20 s is ended
    by the server: so a process that is stopped with a row in its hand does not hold up the others.
    An application may take 10 minutes between two items that it enqueues.
    """
    options = {"timezone": "UTC", "idle_in_transaction_session_timeout": "600000"}
    if worker:
        options |= {"idle_in_transaction_session_timeout": "20000", "lock_timeout": "10000"}
    engine = sa.create_engine(
        url,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_timeout=30,
        pool_pre_ping=ping,
        pool_use_lifo=True,
        connect_args={
            "connect_timeout": 5,
            "application_name": "dispatcher",
            "options": " ".join(f"-c {name}={value}" for name, value in options.items()),
            "keepalives_idle": 10,  # seconds, as the interval; the last is in milliseconds
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
        },
    )
    sa.event.listen(engine, "handle_error", _leave_a_demoted_server)
    return engine


def _leave_a_demoted_server(context: sa.engine.ExceptionContext) -> None:
    """Take a server that lets nobody write for one that is gone.

    After a failover the connections to it are sound, and nothing else would make us connect again.
    """
    if getattr(context.original_exception, "sqlstate", None) == READ_ONLY:
        context.is_disconnect = True


_MIGRATING: Final = Lock()
"""Alembic keeps what it is doing in a global; among processes the database has a lock for it."""


def _alembic(url: str) -> AlembicConfig:
    """Point Alembic at the migrations: inside an installed package, beside it in a checkout."""
    # Imported where it is used: it costs a tenth of a second and 15 MB that no worker needs.
    from alembic.config import Config  # noqa: PLC0415 - as said above

    installed = Path(__file__).parent / "_migrations"
    beside = Path(__file__).parent.parent / "migrations"
    config = Config()
    config.set_main_option("script_location", str(installed if installed.is_dir() else beside))
    config.attributes["url"] = url
    return config


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database to this code's revision. Safe to repeat, and from two places at once.

    Raises:
        Unreachable: the database does not answer.
    """
    from alembic import command  # noqa: PLC0415 - see _alembic

    try:
        with _MIGRATING:
            command.upgrade(_alembic(url), revision)
    except sa.exc.OperationalError as error:
        raise Unreachable(unreachable(url, error)) from error


def downgrade(url: str, revision: str) -> None:
    """Bring the database back to an older revision.

    Raises:
        Unreachable: the database does not answer.
    """
    from alembic import command  # noqa: PLC0415 - see _alembic

    try:
        with _MIGRATING:
            command.downgrade(_alembic(url), revision)
    except sa.exc.OperationalError as error:
        raise Unreachable(unreachable(url, error)) from error


def unreachable(url: str, error: BaseException) -> str:
    """Say that the database does not answer, without its password."""
    shown = sa.make_url(url).render_as_string(hide_password=True)
    cause = str(getattr(error, "orig", error)).strip().splitlines() or ["no reason given"]
    return (
        f"cannot reach the database at {shown}: {cause[0]}. "
        "Is Postgres running, and is DISPATCHER_DATABASE_URL right?"
    )


def revision(connection: sa.Connection) -> str | None:
    """Name the database's revision; None where nothing was ever migrated."""
    known = connection.execute(
        sa.text("SELECT to_regclass('dispatcher.alembic_version') IS NOT NULL")
    ).scalar_one()
    if not known:
        return None
    return connection.execute(
        sa.text("SELECT version_num FROM dispatcher.alembic_version")
    ).scalar_one_or_none()


def check(connection: sa.Connection) -> None:
    """Refuse to work on tables that this code does not understand.

    A database ahead of the code is fine as long as it says that it still supports this code: so
    workers of two versions run side by side during a deployment.

    Raises:
        SchemaMismatch: it is behind, or ahead and no longer supports this code.
    """
    found = revision(connection)
    if found == REVISION:
        return
    if found is None or found < REVISION:
        raise SchemaMismatch(
            f"the database is at revision {found or 'none'} and this code needs {REVISION}: "
            "run `dispatcher db upgrade`"
        )
    oldest = connection.execute(sa.select(installation.c.oldest_code)).scalar_one()
    if oldest > CODE_VERSION:
        raise SchemaMismatch(
            f"the database is at revision {found} and supports code version {oldest} or newer; "
            f"this is version {CODE_VERSION}: install a newer dispatcher here"
        )
