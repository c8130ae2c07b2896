"""What tasks wrote, as Cloud Logging keeps it (clouds.md §3), in a ring of limited length.

Reading it by a filter is `logfilter.py`'s.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from threading import Lock

from dispatcher.emulators.cloud_run.records import ExecutionRecord
from dispatcher.emulators.cloud_run.tasks import Line

__all__ = ["Journal", "JournalEntry"]


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One line."""

    order: int
    at: float
    execution: ExecutionRecord
    task_index: int
    attempt: int
    line: Line

    @property
    def project(self) -> str:
        """The project whose log it is in."""
        return self.execution.name.split("/")[1]

    @property
    def log_name(self) -> str:
        """`projects/…/logs/run.googleapis.com%2Fstdout` or `…stderr`."""
        stream = "stderr" if self.line.error else "stdout"
        return f"projects/{self.project}/logs/run.googleapis.com%2F{stream}"

    @property
    def labels(self) -> dict[str, str]:
        """The entry's own labels."""
        return {
            "run.googleapis.com/execution_name": self.execution.id,
            "run.googleapis.com/task_index": str(self.task_index),
            "run.googleapis.com/task_attempt": str(self.attempt),
        }

    @property
    def resource_labels(self) -> dict[str, str]:
        """The labels of its resource, which is a `cloud_run_job`."""
        return {
            "project_id": self.project,
            "location": self.execution.location.rpartition("/")[2],
            "job_name": self.execution.job_id,
        }


class Journal:
    """The lines of all tasks, oldest first. May be used from any thread."""

    def __init__(self, max_lines: int) -> None:
        self._entries: deque[JournalEntry] = deque(maxlen=max_lines)
        self._order = itertools.count(1)
        self._lock = Lock()

    def write(
        self, execution: ExecutionRecord, index: int, attempt: int, line: Line, moment: float
    ) -> None:
        """Keep a line."""
        with self._lock:
            self._entries.append(
                JournalEntry(next(self._order), moment, execution, index, attempt, line)
            )

    def entries(self) -> list[JournalEntry]:
        """All lines that are kept."""
        with self._lock:
            return list(self._entries)
