"""What a worker does when it is started, killed, stopped and left alone."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from waiting import until

from dispatcher import BatchState
from installation import Site

JOBS = """
targets:
  here: {backend: local, spool: SPOOL, max_running: 8}
  slow: {backend: "null", call_seconds: 30}
jobs:
  note:
    target: here
    command: [sh, -c, 'sleep $SECONDS_EACH; echo "$ITEM" >> "$OUT"']
    env: {ITEM: "{items:csv}", OUT: "{param:out}", SECONDS_EACH: "{param:seconds}"}
    params: {type: object, properties: {out: {type: string}, seconds: {type: string}}}
    retry: {initial: 1s}
  hang: {target: slow, command: [x]}
  listed:
    target: here
    command: ["true"]
    items: {source: "slow_source:rows"}
"""


def params(site: Site, seconds: float = 0) -> dict[str, str]:
    return {"out": str(site.folder / "out"), "seconds": str(seconds)}


def written(site: Site) -> list[str]:
    out = site.folder / "out"
    return out.read_text().split() if out.exists() else []


def test_a_worker_runs_a_batch_to_its_end(site: Site) -> None:
    site.write_jobs(JOBS)
    site.worker()
    with site.dispatcher() as dispatcher:
        batch = dispatcher.enqueue("note", range(5), params=params(site)).wait(30)
    assert batch.state is BatchState.SUCCEEDED
    assert sorted(written(site)) == list("01234")


@pytest.mark.long
def test_a_killed_worker_loses_nothing_and_another_ends_every_chunk_once(site: Site) -> None:
    site.write_jobs(JOBS)
    first = site.worker()
    with site.dispatcher() as dispatcher:
        batch = dispatcher.enqueue("note", range(40), params=params(site, 0.3))
        until(lambda: len(written(site)) >= 8, "the first chunks to end")
        first.kill()
        first.wait()
        done = written(site)
        site.worker()
        batch = batch.wait(60)
        chunks = list(dispatcher.chunks(batch.id))
    assert batch.state is BatchState.SUCCEEDED
    assert len(done) < 40, "the kill must come in the middle"
    assert Counter(written(site)) == Counter(map(str, range(40)))
    assert {len(chunk.attempts) for chunk in chunks} == {1}


def test_a_batch_runs_by_the_clock_alone_when_the_broker_is_gone(
    site: Site, valkey_server: object
) -> None:
    site.write_jobs(JOBS)
    site.worker()
    valkey_server.stop()  # type: ignore[attr-defined]  # a server of the session
    with site.dispatcher() as dispatcher:
        began = time.monotonic()
        batch = dispatcher.enqueue("note", [1, 2], params=params(site))
        assert time.monotonic() - began < 2, "an enqueue does not wait for the broker"
        assert batch.wait(30).state is BatchState.SUCCEEDED


@pytest.mark.parametrize("what", ["idle", "a backend call of 30 s open", "planning", "launching"])
def test_sigterm_ends_a_worker_within_five_seconds(site: Site, what: str) -> None:
    site.write_jobs(JOBS)
    (site.folder / "slow_source.py").write_text(
        "import time\ndef rows():\n    yield 1\n    time.sleep(60)\n"
    )
    worker = site.worker()
    with site.dispatcher() as dispatcher:
        if what == "a backend call of 30 s open":
            dispatcher.enqueue("hang", [1])
            until(
                lambda: site.sql("SELECT 1 FROM dispatcher.execution WHERE state = 'intended'"),
                "the call to begin",
            )
        elif what == "planning":
            dispatcher.enqueue("listed")
            until(
                lambda: site.sql(
                    "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND granted"
                    " AND database = (SELECT oid FROM pg_database"
                    " WHERE datname = current_database())"
                ),
                "the planner to hold the batch",
            )
        elif what == "launching":
            dispatcher.enqueue("note", range(200), params=params(site, 0.1))
            until(lambda: written(site), "the first chunk to end")
    began = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    worker.wait(10)
    assert time.monotonic() - began < 5
    assert worker.returncode == 0, site.logs()


def test_a_stopped_worker_leaves_the_jobs_alone_and_the_next_one_takes_them_over(
    site: Site,
) -> None:
    site.write_jobs(JOBS)
    first = site.worker()
    with site.dispatcher() as dispatcher:
        batch = dispatcher.enqueue("note", range(4), params=params(site, 4))
        until(lambda: batch.refresh().counts.get("running") == 4, "all four to run")
        first.send_signal(signal.SIGTERM)
        first.wait(10)
        site.worker()
        batch = batch.wait(30)
        attempts = [chunk.attempts for chunk in dispatcher.chunks(batch.id)]
    assert batch.state is BatchState.SUCCEEDED
    assert [len(each) for each in attempts] == [1, 1, 1, 1]
    assert sorted(written(site)) == list("0123")


def test_a_worker_without_a_setting_ends_with_a_sentence(site: Site) -> None:
    site.write_jobs("targets: {}\njobs: {x: {target: gone, command: [x]}}")
    worker = site.start("worker")
    worker.wait(20)
    assert worker.returncode == 78
    assert "it must be a configured target" in site.logs()
    assert "Traceback" not in site.logs()


def test_a_cancel_stops_what_runs_and_is_said_only_when_it_is_true(site: Site) -> None:
    site.write_jobs(JOBS)
    site.worker()
    with site.dispatcher() as dispatcher:
        batch = dispatcher.enqueue("note", range(12), params=params(site, 60))
        until(lambda: batch.refresh().counts.get("running") == 8, "eight to run")
        found = site.folder.rglob("process.json")
        pids = [json.loads(path.read_text())["pid"] for path in found]
        assert len(pids) >= 8
        assert batch.cancel().state is BatchState.RUNNING
        batch = batch.wait(30)
    assert batch.state is BatchState.CANCELLED
    assert batch.counts == {"cancelled": 12}
    assert written(site) == []
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists() and os.getpgid(pid) == pid]
