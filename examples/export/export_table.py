"""The program of `nightly-export`: exports the tables of one chunk to CSV and gzip.

Its tables come, and how each of them ended goes, through `dispatcher.container`. Beside that it is
told by variables: OUT (the folder), SHOP_DATABASE_URL, and FAIL_ONCE (a table whose first attempt
fails on purpose). A file gets its name when it is complete: half a file never looks whole.
"""

from __future__ import annotations

import gzip
import os
import sys
import time
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from dispatcher import container
from examples.export.shop import SCHEMA, connect

BAD_INPUT = 65
"""The exit code that says: trying again will not help; `exit_codes` in jobs.yaml knows it."""


class FailedOnPurpose(Exception):
    """What FAIL_ONCE asks for."""


def export(
    connection: psycopg.Connection, table: str, out: Path, *, fail: bool = False
) -> dict[str, Any]:
    """Write OUT/<table>.csv.gz; return its name, its rows, and the bytes of CSV in it.

    Raises:
        FailedOnPurpose: when asked to, with the first part of the file written.
    """
    path = out / f"{table}.csv.gz"
    draft = out / f".{path.name}.{os.getpid()}.part"
    copy = sql.SQL("COPY {} TO STDOUT (FORMAT csv, HEADER)").format(sql.Identifier(SCHEMA, table))
    size = 0
    try:
        with gzip.open(draft, "wb", compresslevel=4) as sink, connection.cursor() as cursor:
            with cursor.copy(copy) as blocks:
                for block in blocks:
                    sink.write(block)
                    size += len(block)
                    if fail:
                        raise FailedOnPurpose(f"failed on purpose: {table} is FAIL_ONCE")
            rows = cursor.rowcount  # Postgres counted what it sent
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return {"file": path.name, "rows": rows, "bytes": size}


def export_all(task: container.Task, out: Path) -> None:
    """Export every table of the task, and report each: one that fails holds up no other."""
    to_fail = os.environ.get("FAIL_ONCE") if task.attempt == 1 else None
    with connect() as connection:
        # A scan of a big table may begin in its middle to share reads with another one; a file
        # with its rows in table order can be compared.
        connection.execute("SET synchronize_seqscans = off")
        for item in task.items:
            table = item["table"]
            began = time.monotonic()
            try:
                done = export(connection, table, out, fail=table == to_fail)
            except (FailedOnPurpose, psycopg.Error) as error:
                sys.stderr.write(f"{table}: {error}\n")
                task.report(item, ok=False, error=error)
                continue
            task.report(item, ok=True, output=done)
            seconds = time.monotonic() - began
            print(f"{table}: {done['rows']:,} rows in {seconds:.2f} s", flush=True)


def main() -> int:
    """Export every table of the chunk; return the exit code."""
    out = Path(os.environ.get("OUT", "demo-out"))
    out.mkdir(parents=True, exist_ok=True)
    try:
        with container.run() as task:
            export_all(task, out)
    except container.InputError as error:
        sys.stderr.write(f"{error}\n")
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
