"""The two systems beside which the makespan is measured: what a user would write, and the floor.

(a) a Celery task per chunk that launches and polls itself with `retry(countdown=10)`, prefork 8;
(b) a bare asyncio script that launches all at once and lists once a second. It records nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from typing import Any

from celery import Celery

from benchmarks.provider import Client

app = Celery(
    "peers", broker=os.environ.get("PEERS_BROKER"), backend=os.environ.get("PEERS_RESULTS")
)
app.conf.update(task_serializer="json", accept_content=["json"])


@app.task(bind=True, max_retries=None)  # type: ignore[untyped-decorator]  # celery ships no types
def chunk(self: Any, port: str, key: str, launched: bool = False) -> tuple[str, float]:
    """Launch, then come back every 10 s until it has ended; answers when that was noticed."""
    client = _client(port)
    if not launched:
        client.call(verb="launch", key=key)
        raise self.retry(args=(port, key, True), countdown=10)
    ((_, end),) = client.call(verb="list", keys=[key]).values()
    if end > time.time():
        raise self.retry(args=(port, key, True), countdown=10)
    return key, time.time()


_clients: dict[tuple[int, str], Client] = {}


def _client(port: str) -> Client:
    return _clients.setdefault((os.getpid(), port), Client(int(port)))


async def floor(port: int, chunks: int) -> dict[str, float]:
    """Launch all at once, list once a second; the time at which each end was noticed."""

    async def call(**what: Any) -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        writer.write(json.dumps(what).encode() + b"\n")
        answer = json.loads(await reader.readline())
        writer.close()
        return answer

    keys = [uuid.uuid4().hex for _ in range(chunks)]
    await asyncio.gather(*(call(verb="launch", key=key) for key in keys))
    noticed: dict[str, float] = {}
    while len(noticed) < chunks:
        await asyncio.sleep(1)
        runs = await call(verb="list")
        now = time.time()
        for key, (_, end) in runs.items():
            if end <= now:
                noticed.setdefault(key, now)
    return noticed


if __name__ == "__main__":
    began, cpu = time.time(), time.process_time()
    seen = asyncio.run(floor(int(sys.argv[1]), int(sys.argv[2])))
    spent = time.process_time() - cpu
    print(json.dumps({"began": began, "noticed": seen, "cpu": spent}))
