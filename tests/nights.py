"""The nightly export of examples/bigquery_export as an installation of a test runs it.

What BigQuery and Cloud Storage are, is for the test to say: by BIGQUERY_EMULATOR_HOST and
STORAGE_EMULATOR_HOST, which are passed on to the image's program.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from waiting import until

from dispatcher import Batch, BatchState, Dispatcher
from examples.bigquery_export.here import local
from examples.bigquery_export.image.export_tables import Place
from installation import ROOT, Site

HERE = ROOT / "examples" / "bigquery_export"
DESTINATION = "gs://bucket/nightly"
PLACE = Place("my-project", "shop", "bucket", "nightly/", "csv")
SHOP = "nightly/shop/"
MONDAY, TUESDAY = "2026-11-23", "2026-11-24"


class Story:
    """An installation with a worker, and the image unpacked in its folder."""

    def __init__(self, site: Site) -> None:
        self.site = site
        jobs = local(DESTINATION)
        job = jobs["jobs"]["bigquery-export"]
        job["command"] = unpacked(site.folder)
        job["env"]["PYTHONPATH"] = ""  # only what is in the image
        install(site, jobs)
        site.worker()
        self.dispatcher: Dispatcher = site.dispatcher()

    @classmethod
    @contextmanager
    def begun(cls, site: Site) -> Iterator[Story]:
        made = cls(site)
        with made.dispatcher:
            yield made

    def begin(self, night: str, tasks: int) -> Batch:
        return self.dispatcher.enqueue(
            "bigquery-export", params={"night": night}, overrides={"tasks": tasks}
        )

    def ended(self, batch: Batch) -> Batch:
        until(lambda: batch.refresh().finished, "the night to end", 300)
        return batch.refresh()

    def export(self, night: str, tasks: int) -> Batch:
        batch = self.ended(self.begin(night, tasks))
        assert batch.state == BatchState.SUCCEEDED, f"{batch.reason}\n{self.site.logs()}"
        return batch

    def attempts(self, batch: Batch) -> dict[str, int | None]:
        """Which attempt exported each table."""
        return {one.item["table"]: one.attempt for one in self.dispatcher.items(batch.id)}

    def outputs(self, batch: Batch) -> dict[str, Any]:
        return {one.item["table"]: one.value for one in self.dispatcher.outputs(batch.id)}


def install(site: Site, jobs: dict[str, Any]) -> None:
    """Write the jobs file with shorter waits, and lead Google's clients to the fake."""
    del jobs["schedules"]  # it may be half past one in Tokyo while the test runs
    jobs["jobs"]["bigquery-export"]["retry"]["initial"] = "1s"
    site.jobs.write_text(yaml.safe_dump(jobs))
    site.environment.update(addresses())


def addresses() -> dict[str, str]:
    """Where the fake is, as Google's clients are told."""
    return {name: os.environ[name] for name in os.environ if name.endswith("_EMULATOR_HOST")}


def unpacked(folder: Path) -> list[str]:
    """Put the image's own files into a folder; what its entrypoint is there."""
    image = folder / "image"
    image.mkdir()
    for source in files_of_the_image():
        shutil.copy(ROOT / source, image)
    return [sys.executable, *(word.replace("/app/", f"{image}/") for word in entrypoint()[1:])]


def dockerfile() -> str:
    return (HERE / "image" / "Dockerfile").read_text()


def files_of_the_image() -> list[str]:
    lines = re.findall(r"^COPY (.+) /app/$", dockerfile(), re.MULTILINE)
    return [source for line in lines for source in line.split()]


def entrypoint() -> list[str]:
    found = re.search(r"^ENTRYPOINT (\[.*\])$", dockerfile(), re.MULTILINE)
    assert found
    words: list[str] = json.loads(found[1])
    return words


def kill_container(batch: Batch) -> None:
    """Kill the program of a batch as a machine that dies does; there is one."""
    mark = f"DISPATCH_BATCH_ID={batch.id}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
            if b"export_tables.py" in words and mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended, or is not ours
    (pid,) = found
    os.kill(pid, signal.SIGKILL)
