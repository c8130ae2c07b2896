"""The item source of `bigquery-export`: which tables a dataset has when the batch is planned.

It asks for metadata alone (tables.list and tables.get), so the identity of the workers needs no
right to read a row or to run a job. Sizes are BigQuery's own count, by which chunks are balanced.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from google.api_core.exceptions import NotFound
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery

THREADS = 8
"""Calls of tables.get at once, far below BigQuery's 100 in a second."""

CALL_SECONDS = 60.0

# What has no rows of its own, a view or an external table, is no source of an extract job.
EXPORTED = frozenset({"TABLE"})


def list_tables(
    dataset: str, night: str | None = None, timezone: str = "UTC", starts: str = "00:00"
) -> Iterator[dict[str, Any]]:
    """Yield each table of a dataset with its size, where it lies, and the night of this export.

    Args:
        dataset: as `project.dataset`.
        night: which export this is, such as 2026-11-21; none: that of now.
        timezone: in which a day is read.
        starts: as HH:MM, when a night's export is due; before it, it is still the night before.
    """
    if night is None:
        night = night_of(datetime.now(UTC), timezone, starts)
    project, _, name = dataset.partition(".")
    listed = list(_client(project).list_tables(f"{project}.{name}", timeout=CALL_SECONDS))
    tables = [one.reference for one in listed if one.table_type in EXPORTED]
    if len(tables) < len(listed):
        sys.stderr.write(f"{len(listed) - len(tables)} of {len(listed)} are no plain tables\n")
    own = threading.local()

    def prepare() -> None:
        own.client = _client(project)  # a session of HTTP is not made for several threads

    def look(table: bigquery.TableReference) -> bigquery.Table | None:
        try:
            found: bigquery.Table = own.client.get_table(table, timeout=CALL_SECONDS)
        except NotFound:  # dropped since it was listed
            return None
        return found

    with ThreadPoolExecutor(THREADS, initializer=prepare) as pool:
        for found in pool.map(look, tables):
            if found is not None:
                yield {
                    "table": found.table_id,
                    "bytes": found.num_bytes or 0,
                    "rows": found.num_rows or 0,
                    "location": found.location,
                    "night": night,
                }


def night_of(now: datetime, timezone: str, starts: str) -> str:
    """Name the night that a moment belongs to, by the day on which its export is due.

    Raises:
        ValueError: `starts` is no time of day.
    """
    told = re.fullmatch(r"([01]\d|2[0-3]):([0-5]\d)", starts)
    if told is None:
        raise ValueError(f"starts is {starts!r}, and must be a time of day such as 01:30")
    late = timedelta(hours=int(told[1]), minutes=int(told[2]))
    # Of wall clocks: a change of the clocks moves no night.
    return (now.astimezone(ZoneInfo(timezone)).replace(tzinfo=None) - late).date().isoformat()


def _client(project: str) -> bigquery.Client:
    fake = os.environ.get("BIGQUERY_EMULATOR_HOST")
    return bigquery.Client(project, credentials=AnonymousCredentials() if fake else None)  # type: ignore[no-untyped-call]  # google.auth tells no types
