"""How executions and jobs are named, and where people find them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from dispatcher.backends.base import Handle

__all__ = [
    "ANY_JOB",
    "RESERVED_NAMES",
    "RESERVED_PREFIXES",
    "ExecutionName",
    "job_name",
    "log_filter",
    "read_handle",
    "same_place",
]

RESERVED_NAMES: Final = ("PORT", "K_SERVICE", "K_REVISION", "K_CONFIGURATION")
RESERVED_PREFIXES: Final = ("CLOUD_RUN_", "X_GOOGLE_")
"""Variables that Cloud Run sets itself [D: container contract]; that a job may not set them is
documented for the CLOUD_RUN_ ones alone. The emulator refuses the same."""

ANY_JOB: Final = "-"
"""Stands for every job of a region in a listing [C: ListExecutionsRequest.parent]."""

_ID: Final = "[a-z0-9](?:[a-z0-9-]{0,98}[a-z0-9])?"
_EXECUTION: Final = re.compile(
    rf"projects/([a-z0-9][a-z0-9.:-]{{0,98}})/locations/({_ID})/jobs/({_ID})/executions/({_ID})"
)


@dataclass(frozen=True, slots=True)
class ExecutionName:
    """The full name of an execution, taken apart."""

    project: str
    region: str
    job: str
    execution: str

    @property
    def parent(self) -> str:
        """Name its job in full."""
        return job_name(self.project, self.region, self.job)

    @property
    def handle(self) -> Handle:
        """Name it in full."""
        return f"{self.parent}/executions/{self.execution}"

    @property
    def console_url(self) -> str:
        """Say where the console shows it."""
        return (
            "https://console.cloud.google.com/run/jobs/executions/details/"
            f"{self.region}/{self.execution}/tasks?project={self.project}"
        )

    @property
    def logs_url(self) -> str:
        """Say where the console shows its output."""
        query = quote(log_filter(self), safe="")
        return f"https://console.cloud.google.com/logs/query;query={query}?project={self.project}"


def job_name(project: str, region: str, job: str) -> str:
    """Name a job in full."""
    return f"projects/{project}/locations/{region}/jobs/{job}"


def read_handle(handle: str) -> ExecutionName | None:
    """Take the full name of an execution apart; None if it is none."""
    match = _EXECUTION.fullmatch(handle)
    return None if match is None else ExecutionName(*match.groups())


def same_place(name: str, parent: str) -> ExecutionName | None:
    """Read a name that the provider gave, under the project by which it was asked.

    It may answer with the project's number where it was asked by its id [C]: a handle must be
    the same whichever way it came.
    """
    read = read_handle(name)
    if read is None:
        return None
    return ExecutionName(parent.split("/")[1], read.region, read.job, read.execution)


def log_filter(name: ExecutionName, task_index: int | None = None) -> str:
    """Write the filter of Cloud Logging for what an execution, or one of its tasks, wrote.

    The labels are those that facts/clouds.md §3 names [C: logging library].
    """
    lines = [
        'resource.type="cloud_run_job"',
        f'resource.labels.job_name="{name.job}"',
        f'resource.labels.location="{name.region}"',
        f'labels."run.googleapis.com/execution_name"="{name.execution}"',
    ]
    if task_index is not None:
        lines.append(f'labels."run.googleapis.com/task_index"="{task_index}"')
    return "\n".join(lines)
