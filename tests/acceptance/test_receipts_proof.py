"""What receipts are for, proved from outside: real workers and Postgres, real and scripted tasks.

Ten thousand items of which seven kill their container; receipts that nobody should believe; a
container that is told to stop; a storage that cannot be used.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from buckets import serve_gcs
from typer.testing import CliRunner

from dispatcher import Batch, container
from dispatcher.cli import app
from dispatcher.emulators.cloud_run import CloudRunEmulator, TaskEnd, TaskStart
from dispatcher.errors import InvalidInput
from dispatcher.storage import Storage
from installation import ROOT, Site, until

POISON: Final = frozenset({0, 199, 250, 251, 4_999, 7_777, 9_999})
"""At both ends, two in one chunk, and in the middle."""

ITEMS, CHUNK, ATTEMPTS = 10_000, 100, 3

PROGRAM: Final = f"""
import os, signal, sys, time
import container

POISON = {set(POISON)}
with container.run() as task:
    for item in task.items:
        if item in POISON:
            time.sleep(0.25)  # what kills takes its time: a query that hangs, memory that fills
            if item % 2:
                os._exit(3)
            os.kill(os.getpid(), signal.SIGKILL)
        task.report(item, ok=True, output=-item)
"""

JOB: Final = {
    "chunk": {"size": CHUNK},
    "receipt": "required",
    "success": {"max_failed_items": len(POISON)},
    "retry": {
        "attempts": ATTEMPTS,
        "on_failure": "split",
        "initial": "0.1s",
        "max": "0.1s",
        "pack_wait": "0.5s",
    },
}

CLOUD: Final = {
    "backend": "cloud_run",
    "project": "project-1",
    "region": "europe-west1",
    "insecure": True,
    "launches_per_minute": 6000,
    "reads_per_minute": 6000,
    "find_grace": "1s",
    "poll_interval": "0.5s",
    "tasks_interval": "0.5s",
}


def install(site: Site, target: dict[str, Any], job: dict[str, Any]) -> Storage:
    """Write the jobs file, and give the workers a storage."""
    jobs = {"targets": {"here": target}, "jobs": {"work": {"target": "here", **job}}}
    site.write_jobs(yaml.safe_dump(jobs))
    storage = Storage((site.folder / "storage").as_uri())
    site.environment["DISPATCHER_STORAGE_URL"] = storage.url
    return storage


def image(site: Site, program: str) -> list[str]:
    """Make an image with the helper copied in; gives its command."""
    folder = site.folder / "image"
    folder.mkdir()
    shutil.copy(ROOT / "dispatcher" / "container.py", folder)
    (folder / "work.py").write_text(program)
    return [sys.executable, "-S", str(folder / "work.py")]


def command(site: Site, *words: str) -> tuple[int, str]:
    ran = CliRunner().invoke(app, list(words), env=site.environment)
    return ran.exit_code, ran.stdout


def ended(batch: Batch, seconds: float = 100) -> Batch:
    until(lambda: batch.refresh().finished, f"{batch.job} to end", seconds)
    return batch.refresh()


# --- ten thousand items, seven that kill ----------------------------------------------------------


class Remains:
    """What a killed process leaves of a helper that ran in this one: its threads end."""

    @staticmethod
    def of(task: container.Task) -> None:
        task._stop.set()


def contain(start: TaskStart) -> TaskEnd:
    """Do what PROGRAM does, with the same helper and without a process."""
    try:
        container.claim(start.environment)
    except SystemExit as lost:
        return TaskEnd(exit_code=int(str(lost.code)))
    task = container.Task(start.environment)
    task.flush()
    task._start_writer = lambda: None  # type: ignore[method-assign]  # flushed below
    for item in task.items:
        if item in POISON:
            task.flush()
            if item % 2:
                return TaskEnd(exit_code=3)
            return TaskEnd(term_signal=9)
        task.report(item, ok=True, output=-item)
    task.close()
    return TaskEnd(seconds=0.01)


@contextmanager
def local(site: Site) -> Iterator[Storage]:
    yield install(
        site,
        {"backend": "local", "spool": str(site.folder / "spool"), "max_running": 4},
        {
            **JOB,
            "command": image(site, PROGRAM),
            "options": {"max_tasks": 25, "parallelism": 2},
        },
    )


@contextmanager
def cloud(site: Site) -> Iterator[Storage]:
    with CloudRunEmulator(script=contain) as emulator:
        emulator.world.define("project-1", "europe-west1", "etl")
        yield install(
            site,
            {**CLOUD, "endpoint": emulator.grpc_address},
            {**JOB, "options": {"job": "etl", "max_tasks": 100}},
        )
        assert not emulator.refused
        by_key = [one.env["DISPATCH_KEY"] for one in emulator.world.executed]
        assert len(set(by_key)) == len(by_key), "nothing was launched twice"


@pytest.mark.parametrize("place", [local, cloud])
def test_ten_thousand_items_of_which_seven_kill_their_container_end_with_the_seven_named(
    site: Site, place: Any
) -> None:
    with place(site), site.dispatcher() as dispatcher:
        site.worker()
        began = time.monotonic()
        batch = ended(dispatcher.enqueue("work", range(ITEMS)))
        took = time.monotonic() - began
        assert (batch.state, batch.reason) == (
            "succeeded",
            "7 of 10000 items failed, allowed",
        ), site.logs()
        items = list(dispatcher.items(batch.id))
        failed = [one.item for one in dispatcher.items(batch.id, failed=True)]
        chunks = list(dispatcher.chunks(batch.id))
        code, shown = command(site, "--json", "show", "--items", "--failed", batch.id)
    outputs = {one.item: one.output for one in items if one.state == "succeeded"}
    assert outputs == {item: -item for item in range(ITEMS) if item not in POISON}
    assert sorted(failed) == sorted(POISON)
    assert len(items) == ITEMS
    # Each says why, and each stands alone: `show` names them and nothing else.
    whys = {one.item: one.error for one in items if one.state == "failed"}
    for item, why in whys.items():
        assert f"exit code {3 if item % 2 else 137}; 3 of 3 attempts used" in str(why)
    assert code == 0
    named = [
        chunk["items"][one["position"]]
        for chunk in json.loads(shown)["chunks"]
        for one in chunk["results"]
        if one["state"] == "failed"
    ]
    assert sorted(named) == sorted(POISON)
    # Parents and children are in the audit, and the extra attempts are few.
    attempts = sum(len(chunk.attempts) for chunk in chunks)
    extra = attempts - ITEMS // CHUNK
    most = len(POISON) * (math.log2(CHUNK) + ATTEMPTS - 1)
    split = {chunk.index for chunk in chunks if chunk.state == "split"}
    assert split == {chunk.parent for chunk in chunks if chunk.parent is not None}
    assert extra <= most
    print(f"{took:.1f} s, {extra} extra attempts of {most:.0f} allowed, {len(split)} splits")  # noqa: T201
