"""jobs.yaml without Cloud Run: the same job, whose tasks are processes of the worker's machine.

    DISPATCHER_JOBS=examples.bigquery_export.here:everything

BigQuery and Cloud Storage are as real as GOOGLE_APPLICATION_CREDENTIALS makes them; DESTINATION
says where to export to.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import yaml

JOBS = Path(__file__).with_name("jobs.yaml")
PROGRAM = Path(__file__).parent / "image" / "export_tables.py"


def local(destination: str | None) -> dict[str, Any]:
    """Read jobs.yaml with a local target in place of Cloud Run."""
    read: dict[str, Any] = yaml.safe_load(JOBS.read_text())
    read["targets"] = {"exports": {"backend": "local", "max_running": 4}}
    for job in read["jobs"].values():
        del job["options"]
        job["command"] = [sys.executable, str(PROGRAM)]
        job["env"]["DESTINATION"] = destination or job["env"]["DESTINATION"]
    return read


everything = local(os.environ.get("DESTINATION"))
