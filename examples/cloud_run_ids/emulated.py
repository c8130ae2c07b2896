"""jobs.yaml for a laptop: the same jobs on the emulator, with shorter waits.

    DISPATCHER_JOBS=examples.cloud_run_ids.emulated:everything

EMULATOR says where it listens for gRPC, and DATA where the numbers lie.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

JOBS = Path(__file__).with_name("jobs.yaml")
WAIT = "1s"


def emulated(endpoint: str, data: Path) -> dict[str, Any]:
    """Read jobs.yaml with the emulator in place of Google, and a folder in place of the volume."""
    read: dict[str, Any] = yaml.safe_load(JOBS.read_text())
    for target in read["targets"].values():
        target |= {"endpoint": endpoint, "insecure": True}
        # Its lists do not lag and its quotas are off, unless it is told otherwise.
        target |= {"find_grace": WAIT, "poll_interval": WAIT, "tasks_interval": WAIT}
    for job in read["jobs"].values():
        job["env"]["DATA"] = str(data)
        job["retry"] |= {"initial": WAIT, "pack_wait": WAIT}
        definition = job["options"]["definition"]
        # The emulator knows images by the names that it is given: without registry and tag.
        definition["image"] = definition["image"].rpartition("/")[2].partition(":")[0]
    for schedule in read["schedules"].values():
        schedule["items"] = (data / "ids.txt").as_uri()
    return read


everything = emulated(
    os.environ.get("EMULATOR", "127.0.0.1:8123"),
    Path(os.environ.get("DATA", ".dispatcher/ids")).absolute(),
)
