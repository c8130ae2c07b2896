"""jobs.yaml without Cloud Run: the same job, whose tasks are processes of the worker's machine.

    DISPATCHER_JOBS=examples.bigquery_export.here:everything

BigQuery and Cloud Storage are as real as GOOGLE_APPLICATION_CREDENTIALS makes them; DESTINATION
says where to export to. A batch keeps the job as it is where it is enqueued, so DESTINATION is
demanded there too, and has no default that could be another's bucket.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import yaml

from dispatcher import ConfigurationError

JOBS = Path(__file__).with_name("jobs.yaml")
PROGRAM = Path(__file__).parent / "image" / "export_tables.py"


def local(destination: str) -> dict[str, Any]:
    """Read jobs.yaml with a local target in place of Cloud Run."""
    read: dict[str, Any] = yaml.safe_load(JOBS.read_text())
    read["targets"] = {"exports": {"backend": "local", "max_running": 4}}
    for job in read["jobs"].values():
        del job["options"]
        job["command"] = [sys.executable, str(PROGRAM)]
        job["env"]["DESTINATION"] = destination
    return read


def __getattr__(name: str) -> dict[str, Any]:
    """Make `everything` when it is asked for: `local` can be used without a DESTINATION."""
    if name != "everything":
        raise AttributeError(name)
    destination = os.environ.get("DESTINATION")
    if not destination:
        raise ConfigurationError(
            "DESTINATION is not set; set it here too, to where the tables are to be exported, such "
            "as gs://my-project-exports/bigquery: a batch takes it from the shell that enqueues"
        )
    return local(destination)
