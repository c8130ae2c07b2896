"""Everything is killed, everywhere, for half a minute; at the end each chunk has run once."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import until

from dispatcher import BatchState, schema
from dispatcher.servers import EmbeddedPostgres, EmbeddedValkey
from installation import Nursery, Site

JOBS = """
targets:
  here: {backend: local, spool: SPOOL, max_running: 24}
jobs:
  note:
    target: here
    command:
      - sh
      - -c
      - |
        sleep 0.$((ITEM % 5 + 2)); echo "$ITEM" >> "$OUT"
        exit $((ITEM % 50 == 7 && DISPATCH_ATTEMPT == 1))
    env: {ITEM: "{items:csv}", OUT: "{param:out}"}
    params: {type: object, properties: {out: {type: string}}}
    retry: {attempts: 2, initial: 1s, infrastructure_attempts: 1}
"""
CHUNKS = 300
SECONDS = 30


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[EmbeddedPostgres, EmbeddedValkey]]:
    """Servers of this test's own, as it restarts them. With fsync, as a crash is the point."""
    with (
        EmbeddedPostgres(tmp_path / "postgres") as postgres,
        EmbeddedValkey(tmp_path / "valkey") as valkey,
    ):
        postgres.create_database("d")
        schema.upgrade(postgres.url("d"))
        yield postgres, valkey


def lose_everything(valkey: EmbeddedValkey) -> None:
    with valkey.connect() as client:
        client.flushall()
    valkey.stop()
    valkey.start()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_kills_of_workers_broker_and_database_lose_nothing_and_double_nothing(
    tmp_path: Path, servers: tuple[EmbeddedPostgres, EmbeddedValkey]
) -> None:
    postgres, valkey = servers
    site = Site(tmp_path, postgres.url("d"), valkey.url)
    site.write_jobs(JOBS)
    # Shorter than in production, so that the test is: what they guard stays the same.
    site.environment |= {
        "DISPATCHER_LEASE": "6s",
        "DISPATCHER_HEARTBEAT": "3s",
        "DISPATCHER_CALL_WINDOW": "5s",
    }
    chance = random.Random(4)  # noqa: S311 - picks victims
    beats = [site.start("beat"), site.start("beat")]
    # A worker that begins within a blink is at work for most of its second.
    nursery = Nursery(site)
    try:
        workers = [nursery.start(), nursery.start()]
        until(lambda: nursery.alive(workers), "the workers' heartbeats")
        with site.dispatcher() as dispatcher:
            batch_id = dispatcher.enqueue(
                "note", range(CHUNKS), params={"out": str(tmp_path / "out")}
            ).id
        kills = 0
        began = time.monotonic()
        for second in range(SECONDS):
            # The one place where a test may wait for a time: the kills come once a second.
            threading.Event().wait(max(0.0, began + second + 1 - time.monotonic()))
            victim = chance.randrange(2)
            nursery.kill(workers[victim])
            kills += 1
            workers[victim] = nursery.start()
            if second == SECONDS // 3:
                lose_everything(valkey)
            if second == SECONDS // 2:
                postgres.stop()
                postgres.start()
        with site.dispatcher() as dispatcher:
            batch = dispatcher.wait(batch_id, 400)
            chunks = list(dispatcher.chunks(batch_id))
    except BaseException:
        print(site.logs())  # noqa: T201 - shown by pytest where it failed
        raise
    finally:
        nursery.close()
        for beat in beats:
            beat.terminate()
        site.stop()

    attempts = [attempt for chunk in chunks for attempt in chunk.attempts]
    written = Counter((tmp_path / "out").read_text().split())
    expected = {str(item): 2 if item % 50 == 7 else 1 for item in range(CHUNKS)}
    assert kills == SECONDS
    assert batch.state is BatchState.SUCCEEDED
    assert batch.counts == {"succeeded": CHUNKS}, "0 chunks lost"
    assert written == expected, "each attempt ran once, 0 doubled"
    assert len(attempts) == sum(expected.values())
    started = {path.parent.name for path in (tmp_path / "spool").glob("*/started.json")}
    recorded = {attempt.execution_key for attempt in attempts}
    assert started == recorded
    left = site.sql("SELECT key FROM dispatcher.execution WHERE stray OR state <> 'ended'")
    assert left == []
