"""The API of examples/compute_api: what a request waits for that starts a long computation.

The application runs in this process over an event loop of its own, as under a server; the network
and the parsing of HTTP are not in the figure.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import sqlalchemy as sa
from anyio.from_thread import start_blocking_portal

from benchmarks.figures import Figure
from benchmarks.stack import Stack
from dispatcher import Dispatcher
from examples.compute_api.app import create_app
from examples.compute_api.computations import tables

WARM_UP = 30
REQUESTS = 300
ORDER = {
    "upto": 10_000_000,
    "args": ["--gap=2"],
    "env": {"LOG_LEVEL": "info"},
    "tasks": 8,
    "timeout_seconds": 1800,
}


def api(stack: Stack) -> Iterator[Figure]:
    """POST computations, each an application's row and a batch, beside the row alone."""
    url = stack.database()
    jobs = stack.folder / "jobs.yaml"
    shutil.copy(Path("examples/compute_api/jobs.yaml"), jobs)
    engine = sa.create_engine(url)
    tables.create_all(engine)
    ours, bare = [], []
    with (
        Dispatcher(database_url=url, broker_url=stack.valkey.url, jobs=str(jobs)) as dispatcher,
        start_blocking_portal() as portal,
    ):
        app = create_app(dispatcher, engine, {"token": "bench"})
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://bench")

        def post(key: str) -> httpx.Response:
            headers = {"Authorization": "Bearer token", "Idempotency-Key": key}
            return portal.call(lambda: client.post("/computations", json=ORDER, headers=headers))

        for turn in range(WARM_UP + REQUESTS):
            began = time.perf_counter()
            with engine.begin() as connection:
                connection.execute(
                    sa.text("INSERT INTO computation (id, tenant, upto) VALUES (:id, 'bench', 1)"),
                    {"id": f"bare{turn}"},
                )
            middle = time.perf_counter()
            answer = post(f"order-{turn}")
            ended = time.perf_counter()
            assert answer.status_code == 202, answer.text
            if turn >= WARM_UP:
                bare.append((middle - began) * 1e3)
                ours.append((ended - middle) * 1e3)
        portal.call(client.aclose)
    engine.dispose()
    p95 = statistics.quantiles(ours, n=20)[-1]
    note = f"p95 {p95:.2f} ms, its own row alone {statistics.median(bare):.2f} ms"
    yield Figure("POST of a computation, p50", statistics.median(ours), "ms", 20.0, note=note)
