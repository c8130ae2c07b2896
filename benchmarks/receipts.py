"""Receipts: how long it takes until what tasks have written of their items is in Postgres.

The backend is the null one, but each launch writes the receipts of its tasks at once, so that all
of them lie there when the tasks end, all at the same moment.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

from benchmarks.figures import Figure, insist, plain
from benchmarks.stack import Meter, Stack, cpu_seconds, family
from dispatcher import BatchState
from dispatcher.backends.base import Launched, LaunchRequest
from dispatcher.testing import NullBackend

__all__ = ["ReceiptBackend", "receipts"]

CHUNKS, ITEMS = 1_000, 100
PACK = 1_000
RUN_SECONDS = 10

JOBS = """
targets:
  fake: {backend: "benchmarks.receipts:ReceiptBackend", task_seconds: [%(seconds)d, %(seconds)d]}
jobs:
  work:
    target: fake
    command: [x]
    chunk: {size: %(items)d}
    receipt: required
    options: {max_tasks: %(pack)d, parallelism: %(pack)d}
"""

RESULTS = """
CREATE TABLE bare (
    batch_id text, chunk_index int, position int, attempt int, ok bool, output json,
    output_uri text, error text, PRIMARY KEY (batch_id, chunk_index, position)
)
"""


class ReceiptBackend(NullBackend):
    """A null backend whose tasks have written complete receipts when they end."""

    def launch(self, request: LaunchRequest) -> Launched:
        """Write the receipts, then start the scripted execution."""
        assert request.result_uri is not None
        folder = Path(request.result_uri.removeprefix("file://"))
        folder.mkdir(parents=True, exist_ok=True)
        for task in request.tasks:
            items = [
                {"i": i, "ok": True, "output": {"id": item, "rows": item * 7}}
                for i, item in enumerate(json.loads(task.items))
            ]
            receipt = {
                "version": 1,
                "key": request.key,
                "task": task.index,
                "chunk": task.chunk_index,
                "attempt": task.attempt,
                "complete": True,
                "items": items,
            }
            (folder / f"{task.index}.json").write_text(json.dumps(receipt))
        return super().launch(request)


def receipts(stack: Stack) -> Iterator[Figure]:
    """Settle 100,000 items from 1,000 receipts, beside reading and COPYing the same bare."""
    storage = stack.folder / "storage"
    storage.mkdir()
    jobs = JOBS % {"seconds": RUN_SECONDS, "items": ITEMS, "pack": PACK}
    dispatcher, processes = stack.installation(jobs, DISPATCHER_STORAGE_URL=f"file://{storage}")
    url, postgres = dispatcher.settings.database_url, stack.postgres.process
    assert postgres is not None
    batch = dispatcher.enqueue("work", range(CHUNKS * ITEMS))
    while not batch.refresh().counts.get("running"):  # type: ignore[call-overload]  # states are text
        insist(not batch.finished, batch)
        time.sleep(0.1)
    meter = Meter([processes[0].pid])
    before = cpu_seconds(family(postgres.pid))
    batch = batch.wait(120)
    insist(batch.state is BatchState.SUCCEEDED, batch)
    cost = meter.close()
    spent = cpu_seconds(family(postgres.pid)) - before
    ((seconds, attempts),) = stack.sql(
        url,
        "SELECT extract(epoch FROM max(pg_xact_commit_timestamp(xmin)) - min(ended_at))::float8,"
        " count(*)"
        " FROM dispatcher.attempt",
    )
    ((results,),) = stack.sql(url, "SELECT count(*) FROM dispatcher.item_result WHERE ok")
    insist((attempts, results) == (CHUNKS, CHUNKS * ITEMS), (attempts, results))
    stack.stop(*processes)
    dispatcher.close()
    files = sorted(storage.rglob("results/**/*.json"))
    insist(len(files) == CHUNKS, files[:3])
    with psycopg.connect(plain(url)) as connection:
        connection.execute(RESULTS)
        connection.commit()
        read, copied, inserted = _bare(connection, files)
    ours, bare = float(str(seconds)), read + copied
    note = (
        f"bare: read {read:.2f} + COPY {copied:.2f} s = {bare:.2f} s, or INSERT {inserted:.2f} s; "
        f"worker CPU {cost.cpu:.1f} s, PSS {cost.pss:.0f} MB; Postgres CPU {spent:.1f} s"
    )
    yield Figure("100,000 item results: from end to settled", ours, "s", 5.0, note=note)
    yield Figure("  the same", ours / bare, "x bare", 10.0)


def _bare(connection: psycopg.Connection, files: list[Path]) -> tuple[float, float, float]:
    """Read the receipts, COPY their items, and INSERT them by unnest; the seconds of each."""
    began = time.perf_counter()
    told = [json.loads(file.read_bytes()) for file in files]
    rows = [
        ("b", r["chunk"], i["i"], r["attempt"], i["ok"], json.dumps(i["output"]), None, None)
        for r in told
        for i in r["items"]
    ]
    read = time.perf_counter() - began
    began = time.perf_counter()
    with connection.cursor() as cursor, cursor.copy("COPY bare FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)
    connection.commit()
    copied = time.perf_counter() - began
    connection.execute("TRUNCATE bare")
    connection.commit()
    began = time.perf_counter()
    connection.execute(
        "INSERT INTO bare SELECT b, c, p, a, ok, o::json, u, e FROM unnest("
        "%s::text[], %s::int[], %s::int[], %s::int[], %s::bool[], %s::text[], %s::text[],"
        " %s::text[]) AS n (b, c, p, a, ok, o, u, e)",
        [list(column) for column in zip(*rows, strict=True)],
    )
    connection.commit()
    return read, copied, time.perf_counter() - began
