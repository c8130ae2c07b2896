"""Run the migrations: short timeouts, one at a time, each committed on its own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context

from dispatcher.schema import SCHEMA, create_engine, metadata

ADVISORY_LOCK = 0x64697370  # "disp": two deployments must not migrate at once


def include(name: str | None, kind: str, _parents: object) -> bool:
    """Look at our own schema only."""
    return kind != "schema" or name == SCHEMA


def run() -> None:
    """Migrate the database whose URL `dispatcher.schema` put into the configuration."""
    engine = create_engine(context.config.attributes["url"])
    try:
        with engine.connect() as connection:
            migrate(connection)
    finally:
        engine.dispose()


def migrate(connection: sa.Connection) -> None:
    """Run what is missing, while nobody else does."""
    # Before the timeouts: a second deployment waits as long as the first one takes.
    connection.execute(sa.text(f"SELECT pg_advisory_lock({ADVISORY_LOCK})"))
    connection.execute(sa.text("SET lock_timeout = '4s'"))
    connection.execute(sa.text("SET statement_timeout = '60s'"))
    connection.execute(sa.text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
    connection.commit()
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table_schema=SCHEMA,
        include_schemas=True,
        include_name=include,
        transaction_per_migration=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()
    connection.execute(sa.text(f"SELECT pg_advisory_unlock({ADVISORY_LOCK})"))
    connection.commit()


run()
