"""The program of `nightly-export`: exports the tables of one chunk to CSV and gzip.

It is told by variables alone, as any container is: DISPATCH_ITEMS or DISPATCH_INPUT_URI (which
tables), DISPATCH_ATTEMPT, OUT (the folder), SHOP_DATABASE_URL, and FAIL_ONCE (a table whose first
attempt fails on purpose). A file gets its name when it is complete: half a file never looks whole.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import psycopg
from psycopg import sql

from examples.export.shop import SCHEMA, connect

BAD_INPUT = 65
"""The exit code that says: trying again will not help; `exit_codes` in jobs.yaml knows it."""


class FailedOnPurpose(Exception):
    """What FAIL_ONCE asks for."""


def read_items() -> list[dict[str, Any]]:
    """Return the items of this chunk, from the variable or from the file that another names."""
    text = os.environ.get("DISPATCH_ITEMS")
    if text is None:
        place = urlsplit(os.environ.get("DISPATCH_INPUT_URI", ""))
        if place.scheme != "file":
            sys.stderr.write(
                f"no items: neither DISPATCH_ITEMS nor a file:// DISPATCH_INPUT_URI is set "
                f"(it is {place.geturl()!r})\n"
            )
            sys.exit(BAD_INPUT)
        text = Path(unquote(place.path)).read_text()
    items: list[dict[str, Any]] = json.loads(text)
    return items


def export(connection: psycopg.Connection, table: str, out: Path, *, fail: bool) -> int:
    """Write OUT/<table>.csv.gz and return the bytes of CSV in it.

    Raises:
        FailedOnPurpose: when asked to, with the first part of the file written.
    """
    draft = out / f".{table}.csv.gz.{os.getpid()}.part"
    copy = sql.SQL("COPY {} TO STDOUT (FORMAT csv, HEADER)").format(sql.Identifier(SCHEMA, table))
    size = 0
    try:
        with (
            gzip.open(draft, "wb", compresslevel=4) as sink,
            connection.cursor() as cursor,
            cursor.copy(copy) as rows,
        ):
            for block in rows:
                sink.write(block)
                size += len(block)
                if fail:
                    raise FailedOnPurpose(f"failed on purpose: {table} is FAIL_ONCE")
        draft.replace(out / f"{table}.csv.gz")
    finally:
        draft.unlink(missing_ok=True)
    return size


def main() -> int:
    """Export every table of the chunk; return the exit code."""
    out = Path(os.environ.get("OUT", "demo-out"))
    out.mkdir(parents=True, exist_ok=True)
    attempt = int(os.environ.get("DISPATCH_ATTEMPT", "1"))
    to_fail = os.environ.get("FAIL_ONCE") if attempt == 1 else None
    with connect() as connection:
        # A scan of a big table may begin in its middle to share reads with another one; a file
        # with its rows in table order can be compared.
        connection.execute("SET synchronize_seqscans = off")
        for item in read_items():
            table = item["table"]
            began = time.monotonic()
            try:
                size = export(connection, table, out, fail=table == to_fail)
            except (FailedOnPurpose, psycopg.Error) as error:
                sys.stderr.write(f"{table}: {error}\n")
                return 1
            print(f"{table}: {size:,} bytes of CSV in {time.monotonic() - began:.2f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
