"""What a worker does when it is started, killed, stopped and left alone."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Iterator

import pytest
from waiting import until

from dispatcher import BatchState
from dispatcher.backends import local_shim
from installation import ROOT, Site

JOBS = """
targets:
  here: {backend: local, spool: SPOOL, max_running: 8, stop_grace: 300}
  slow: {backend: "null", call_seconds: 600}
jobs:
  note: &note
    target: here
    command:
      - sh
      - -c
      - |
        until [ "$ITEM" -lt "$FREE" ] || [ -e "$OUT.go" ]; do sleep 0.1; done
        echo "$ITEM" >> "$OUT"
    env: {ITEM: "{items:csv}", OUT: "{param:out}", FREE: "{param:free}"}
    params: {type: object, properties: {out: {type: string}, free: {type: string}}}
    retry: {initial: 1s}
  defy:
    <<: *note
    command:
      - sh
      - -c
      - |
        [ $((ITEM % 2)) = 0 ] && trap 'echo "$ITEM" >> "$OUT.told"' TERM
        echo "$ITEM" >> "$OUT.up"
        until [ -e "$OUT.go" ]; do sleep 0.1; done
  hang: {target: slow, command: [x]}
  listed:
    target: here
    command: ["true"]
    items: {source: "slow_source:rows"}
"""


@pytest.fixture
def site(site: Site) -> Iterator[Site]:
    """An installation whose tasks do not outlive a test that fails."""
    yield site
    let_go(site)


def params(site: Site, free: int = 1000) -> dict[str, str]:
    """Tasks of items below `free` end at once, and the others when they are let go."""
    return {"out": str(site.folder / "out"), "free": str(free)}


def let_go(site: Site) -> None:
    (site.folder / "out.go").touch()


def written(site: Site, name: str = "out") -> list[str]:
    out = site.folder / name
    return out.read_text().split() if out.exists() else []


def processes(site: Site) -> list[tuple[int, str]]:
    """The tasks' processes that there are or were: their numbers, and when they started."""
    found = map(
        local_shim.read_json, map(str, (site.folder / "spool").glob("*/0/" + local_shim.PROCESS))
    )
    return [(record["pid"], record["start"]) for record in found if record is not None]


def test_a_worker_runs_a_batch_to_its_end(site: Site) -> None:
    site.write_jobs(JOBS)
    site.worker()
    with site.dispatcher() as dispatcher:
        batch = dispatcher.enqueue("note", range(5), params=params(site)).wait(120)
    assert batch.state is BatchState.SUCCEEDED
    assert sorted(written(site)) == list("01234")


@pytest.mark.long
def test_a_killed_worker_loses_nothing_and_another_ends_every_chunk_once(site: Site) -> None:
    site.write_jobs(JOBS)
    first = site.worker()
    with site.dispatcher() as dispatcher:
        batch = dispatcher.enqueue("note", range(40), params=params(site, free=8))
        until(lambda: len(written(site)) == 8, "the first chunks to end")
        # It settles these now, and launches others.
        first.kill()
        first.wait()
        let_go(site)  # they end while no worker is there
        site.worker()
        batch = batch.wait(120)
        chunks = list(dispatcher.chunks(batch.id))
    assert batch.state is BatchState.SUCCEEDED
    assert Counter(written(site)) == Counter(map(str, range(40)))
    assert {len(chunk.attempts) for chunk in chunks} == {1}


def test_a_batch_runs_by_the_clock_alone_when_the_broker_is_gone(
    site: Site, valkey_server: object
) -> None:
    site.write_jobs(JOBS)
    site.worker()
    valkey_server.stop()  # type: ignore[attr-defined]  # a server of the session
    with site.dispatcher() as dispatcher:
        # An enqueue that waits for the broker, gone as long as this lasts, would never return. One
        # that hangs is in tests/postgres/test_enqueue.py.
        batch = dispatcher.enqueue("note", [1, 2], params=params(site))
        assert batch.wait(120).state is BatchState.SUCCEEDED


@pytest.mark.parametrize("what", ["idle", "a backend call open", "planning", "launching"])
def test_sigterm_ends_a_worker_within_five_seconds(site: Site, what: str) -> None:
    site.write_jobs(JOBS)
    (site.folder / "slow_source.py").write_text(
        "import time\ndef rows():\n    yield 1\n    time.sleep(600)\n"
    )
    worker = site.worker()
    with site.dispatcher() as dispatcher:
        if what == "a backend call open":
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
            dispatcher.enqueue("note", range(200), params=params(site))
            until(lambda: written(site), "the first chunk to end")
    worker.send_signal(signal.SIGTERM)
    # What is open lasts for ten minutes. The rest is a timer, to which a busy machine adds.
    worker.wait(60)
    assert worker.returncode == 0, site.logs()
    source = (ROOT / "workers" / "app.py").read_text()
    timer = re.search(r"^HARD_EXIT_AFTER: Final = (.+)$", source, re.MULTILINE)
    assert timer is not None
    assert float(timer[1]) <= 4


def test_a_stopped_worker_leaves_the_jobs_alone_and_the_next_one_takes_them_over(
    site: Site,
) -> None:
    site.write_jobs(JOBS)
    first = site.worker()
    with site.dispatcher() as dispatcher:
        batch = dispatcher.enqueue("note", range(4), params=params(site, free=0))
        until(lambda: batch.refresh().counts.get("running") == 4, "all four to run")
        first.send_signal(signal.SIGTERM)
        first.wait(60)
        site.worker()
        let_go(site)
        batch = batch.wait(120)
        attempts = [chunk.attempts for chunk in dispatcher.chunks(batch.id)]
    assert batch.state is BatchState.SUCCEEDED
    assert [len(each) for each in attempts] == [1, 1, 1, 1]
    assert sorted(written(site)) == list("0123")


def test_a_worker_without_a_setting_ends_with_a_sentence(site: Site) -> None:
    site.write_jobs("targets: {}\njobs: {x: {target: gone, command: [x]}}")
    worker = site.start("worker")
    worker.wait(120)
    assert worker.returncode == 78
    assert "it must be a configured target" in site.logs()
    assert "Traceback" not in site.logs()


def test_a_cancel_stops_what_runs_and_is_said_only_when_it_is_true(site: Site) -> None:
    site.write_jobs(JOBS)
    site.worker()
    with site.dispatcher() as dispatcher:
        batch = dispatcher.enqueue("defy", range(12), params=params(site))
        until(lambda: len(written(site, "out.up")) == 8, "eight to be at work")
        until(lambda: batch.refresh().counts.get("running") == 8, "the record of the eight")
        at_work = processes(site)
        assert len(at_work) == 8
        batch.cancel()
        # Half of them end by the signal, and half of them go on for as long as they like.
        until(lambda: len(written(site, "out.told")) == 4, "four to hear of it")
        until(lambda: batch.refresh().counts == {"cancelled": 8, "running": 4}, "four to end")
        assert batch.refresh().state is BatchState.RUNNING
        let_go(site)
        batch = batch.wait(120)
    assert batch.state is BatchState.CANCELLED
    assert batch.counts == {"cancelled": 12}
    assert processes(site) == at_work, "the other four never began"
    assert not [pid for pid, start in at_work if local_shim.process_start(pid) == start]
