"""`make demo`: the nightly export of a shop, from nothing to files that were checked.

It starts a standalone with the sample shop, enqueues `nightly-export` as an application would,
shows its progress, its chunks and its audit trail, and compares every file with the database and
with what its receipt says. It ends with 0 only if all of that is right, and leaves nothing running;
the files are in demo-out/.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dispatcher import Batch, Dispatcher, Outcome
from dispatcher.servers import leashed
from examples.export.shop import SCHEMA

HERE = Path(__file__).parent
STATE = Path(".dispatcher/demo")
OUT = Path("demo-out")
FAIL_ONCE = "refunds"
READY_WITHIN = 120.0
DONE_WITHIN = 300.0
LOOK_EVERY = 0.2

console = Console(highlight=False)


@contextmanager
def standalone() -> Iterator[dict[str, Any]]:
    """Run the servers, a worker, beat and Flower; yield what the standalone tells of itself."""
    command = [
        *(sys.executable, "-m", "dispatcher", "standalone", "--dir", str(STATE)),
        *("--jobs", str(HERE / "jobs.yaml"), "--database", "shop"),
        *("--prepare", "python3 -m examples.export.make_shop"),
    ]
    told_in = STATE / "standalone.json"
    process = subprocess.Popen(
        leashed(command, at_death=signal.SIGTERM), start_new_session=True, stdin=subprocess.DEVNULL
    )
    try:
        yield wait_until_told(process, told_in)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def wait_until_told(process: subprocess.Popen[bytes], told_in: Path) -> dict[str, Any]:
    """Wait until the standalone says that it is ready."""
    deadline = time.monotonic() + READY_WITHIN
    while process.poll() is None and time.monotonic() < deadline:
        if told_in.exists():
            told: dict[str, Any] = json.loads(told_in.read_text())
            if told["pid"] == process.pid:
                return told
        time.sleep(LOOK_EVERY)
    sys.exit(f"the standalone is not ready; its logs are in {STATE / 'logs'}")


def follow(batch: Batch) -> None:
    """Show how far the batch is until it has ended: a bar on a terminal, lines elsewhere."""
    deadline = time.monotonic() + DONE_WITHIN
    said = ""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[counts]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("chunks", total=None, counts="")
        while time.monotonic() < deadline:
            batch = batch.refresh()
            line = ", ".join(f"{number} {state}" for state, number in sorted(batch.counts.items()))
            done = round(batch.progress * (batch.chunk_count or 0))
            progress.update(bar, total=batch.chunk_count, completed=done, counts=line)
            if not console.is_terminal and line != said:
                console.print(f"  {batch.state}: {line or 'no chunks yet'}")
                said = line
            if batch.finished:
                return
            time.sleep(LOOK_EVERY)
    sys.exit(f"the batch {batch.id} has not ended within {DONE_WITHIN:.0f} s")


def show_chunks(dispatcher: Dispatcher, batch: Batch) -> None:
    """Print what became of each chunk, and its tables with the rows that the receipts tell of."""
    table = Table("chunk", "tables", "outcome", "attempts", "duration", title=f"batch {batch.id}")
    told: dict[int, list[str]] = {}
    for item in dispatcher.items(batch.id):
        again = f" (attempt {item.attempt})" if item.attempt != 1 else ""
        rows = f" {item.output['rows']:,}" if item.output else ""
        told.setdefault(item.chunk_index, []).append(f"{item.item['table']}{rows}{again}")
    for chunk in dispatcher.chunks(batch.id):
        seconds = sum(
            (attempt.ended_at - attempt.started_at).total_seconds()
            for attempt in chunk.attempts
            if attempt.started_at and attempt.ended_at
        )
        words = ", ".join(f"{attempt.number}: {attempt.outcome}" for attempt in chunk.attempts)
        names = ", ".join(told.get(chunk.index, []))
        table.add_row(str(chunk.index), names, chunk.state, words, f"{seconds:.1f} s")
    console.print(table)


def check_retry(dispatcher: Dispatcher, batch: Batch) -> list[str]:
    """See that the planned failure was told of its table alone, and that alone exported again."""
    attempts = {one.item["table"]: one.attempt for one in dispatcher.items(batch.id)}
    again = [table for table, attempt in attempts.items() if attempt != 1]
    failed = [
        f"{attempt.outcome}: {attempt.reason}"
        for chunk in dispatcher.chunks(batch.id)
        for attempt in chunk.attempts
        if attempt.outcome != Outcome.SUCCEEDED
    ]
    problems = []
    if again != [FAIL_ONCE]:
        problems.append(f"{again} were exported again, and {FAIL_ONCE} alone should have been")
    if len(failed) != 1 or f"{FAIL_ONCE} is FAIL_ONCE" not in failed[0]:
        problems.append(f"one planned failure should have been seen, and these were: {failed}")
    return problems


def show_trail(dispatcher: Dispatcher, batch: Batch) -> int:
    """Print the audit trail; return how many events it has."""
    console.print("audit trail", style="bold")
    number = 0
    for number, event in enumerate(dispatcher.events(batch.id), start=1):  # noqa: B007 - it counts
        what = event.kind if event.chunk_index is None else f"{event.kind} {event.chunk_index}"
        edge = "" if event.new is None else f" {event.old or '·'} → {event.new}"
        reason = f"  {event.reason}" if event.reason else ""
        console.print(
            f"  {event.at:%H:%M:%S.%f} {event.actor} {what}{edge}{reason}",
            soft_wrap=True,
            markup=False,
        )
    return number


@dataclass(frozen=True)
class Content:
    """What a table holds: its rows, and the bytes and the MD5 of its CSV text."""

    rows: int
    size: int
    checksum: str


def in_database(connection: psycopg.Connection, table: str) -> Content:
    """Ask the database."""
    name = sql.Identifier(SCHEMA, table)
    row = connection.execute(sql.SQL("SELECT count(*) FROM {}").format(name)).fetchone()
    digest, size = hashlib.md5(usedforsecurity=False), 0
    copy = sql.SQL("COPY (TABLE {}) TO STDOUT (FORMAT csv, HEADER)").format(name)
    with connection.cursor() as cursor, cursor.copy(copy) as blocks:
        for block in blocks:
            digest.update(block)
            size += len(block)
    return Content(row[0] if row else 0, size, digest.hexdigest())


def in_file(path: Path) -> Content:
    """Read the file as any program would: rows by the csv module, not by lines."""
    digest, size = hashlib.md5(usedforsecurity=False), 0
    with gzip.open(path, "rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
            size += len(block)
    with gzip.open(path, "rt", encoding="utf-8", newline="") as text:
        rows = sum(1 for _ in csv.reader(text)) - 1
    return Content(rows, size, digest.hexdigest())


def check_files(address: str, out: Path, told: Mapping[str, Any]) -> list[str]:
    """Compare every file with its table, and with what was told of it; return what is wrong.

    Args:
        address: of the shop's database.
        out: where the files are.
        told: what the receipts say of each table.
    """
    problems = []
    rows = size = 0
    with psycopg.connect(address.replace("+psycopg", "", 1), autocommit=True) as connection:
        # Row order as it lies, for both sides; see export_table.py.
        connection.execute("SET synchronize_seqscans = off")
        names = [
            name
            for (name,) in connection.execute(
                "SELECT tablename FROM pg_tables WHERE schemaname = %s ORDER BY 1", [SCHEMA]
            )
        ]
        files = {path.name for path in out.iterdir()}
        problems += [
            f"{name} is in {out} and belongs to no table"
            for name in sorted(files - {f"{table}.csv.gz" for table in names})
        ]
        for table in names:
            path = out / f"{table}.csv.gz"
            if path.name not in files:
                problems.append(f"{path} is missing")
                continue
            expected, found = in_database(connection, table), in_file(path)
            if found != expected:
                problems.append(f"{path} holds {found}, and the table {expected}")
            receipt = {"file": path.name, "rows": found.rows, "bytes": found.size}
            if told.get(table) != receipt:
                problems.append(f"{path} is {receipt}, and the receipt tells of {told.get(table)}")
            rows += found.rows
            size += path.stat().st_size
    console.print(
        f"checked {len(names)} tables, {rows:,} rows, {size:,} bytes of gzip: "
        f"{'rows, checksums and receipts agree' if not problems else 'NOT right'}",
        soft_wrap=True,
    )
    return problems


def export_shop(told: dict[str, Any]) -> list[str]:
    """Export the shop through the public API and return what is wrong with the result."""
    # As an application is told in production; here the standalone has just chosen them.
    for name in ("database_url", "broker_url", "jobs"):
        os.environ[f"DISPATCHER_{name.upper()}"] = told[name]
    with Dispatcher() as dispatcher:
        batch = dispatcher.enqueue("nightly-export", params={"fail_once": FAIL_ONCE})
        console.print(
            f"enqueued nightly-export as batch {batch.id}; {FAIL_ONCE} fails once on purpose"
        )
        follow(batch)
        batch = batch.refresh()
        show_chunks(dispatcher, batch)
        problems = check_retry(dispatcher, batch)
        if batch.state != "succeeded":
            problems.append(f"the batch has {batch.state}, and should have succeeded")
        if show_trail(dispatcher, batch) == 0:
            problems.append("the audit trail is empty")
        receipts = {one.item["table"]: one.value for one in dispatcher.outputs(batch.id)}
    return problems + check_files(told["databases"]["shop"], OUT, receipts)


def main() -> int:
    """Run the demo; return the exit code."""
    began = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    # Before anything is checked: a ^C or SIGTERM must unwind through `standalone`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    with standalone() as told:
        problems = export_shop(told)
    for problem in problems:
        console.print(f"WRONG: {problem}", style="bold red", markup=False)
    console.print(
        f"{'all right' if not problems else 'not right'} after {time.monotonic() - began:.1f} s; "
        f"the files are in {OUT}/, the logs in {STATE}/logs/",
        soft_wrap=True,
    )
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped by ^C")
