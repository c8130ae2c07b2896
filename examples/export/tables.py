"""The item source of `nightly-export`: which tables there are when a batch is planned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from examples.export.shop import SCHEMA, connect


def list_tables() -> Iterator[dict[str, Any]]:
    """Yield each table of the shop with its size on disk, by which chunks are balanced."""
    with connect() as connection:
        yield from (
            {"table": name, "bytes": size}
            for name, size in connection.execute(
                """
                SELECT c.relname, pg_total_relation_size(c.oid)
                FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                WHERE n.nspname = %s AND c.relkind IN ('r', 'm')
                ORDER BY c.relname
                """,
                [SCHEMA],
            )
        )
