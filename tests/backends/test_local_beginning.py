"""What is asked of a local execution after its mark and before its task has a process.

The record says "running" in that time, as a shim has the execution. Here a task's stderr is a named
pipe, which the shim cannot open before somebody reads it: so the time lasts while a test looks.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from waiting import until

from dispatcher.backends import local_shim
from dispatcher.backends.base import LaunchRequest, Phase, TaskInput, TaskReport
from dispatcher.backends.local import LocalBackend, LocalOptions, LocalSettings
from dispatcher.states import Outcome


class Beginning:
    """An execution whose task would run for ever, and whose shim is about to start it."""

    def __init__(self, folder: Path) -> None:
        # Time enough between the signals: what ends here has ended by the first one.
        settings = LocalSettings(spool=folder / "spool", stop_grace=300)
        self.backend = LocalBackend("here", settings)
        self.directory = folder / "spool" / "k"
        self.evidence = folder / "out"
        self._readers: list[int] = []
        request = LaunchRequest(
            key="k",
            instance="test",
            batch_id="b-1",
            job="job",
            command=("sh", "-c", 'echo up >> "$OUT"; while :; do sleep 0.1; done'),
            tasks=(TaskInput(0, 0, 1, "[0]", env={"OUT": str(self.evidence)}),),
            options=LocalOptions(),
            timeout=timedelta(minutes=5),
            parallelism=1,
        )
        self.backend._declare(request, self.directory)
        task = self.directory / "0"
        task.mkdir()
        os.mkfifo(task / local_shim.STDERR)
        self.backend.launch(request)
        until((task / local_shim.STDOUT).exists, "the shim to begin with the task")

    def let_go(self) -> None:
        """Let the shim start the task now."""
        path = self.directory / "0" / local_shim.STDERR
        self._readers.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))

    def record(self, name: str) -> dict[str, object] | None:
        return local_shim.read_json(str(self.directory / name))

    def phase(self) -> Phase:
        return self.backend.poll(["k"])["k"].phase

    def end(self) -> TaskReport:
        until(lambda: self.phase() is Phase.ENDED, "its end")
        (task,) = self.backend.poll(["k"])["k"].tasks
        return task

    def close(self) -> None:
        self.backend.cancel("k")
        self.let_go()
        self.end()
        for reader in self._readers:
            os.close(reader)


@pytest.fixture
def beginning(tmp_path: Path) -> Iterator[Beginning]:
    made = Beginning(tmp_path)
    yield made
    made.close()


def test_it_counts_as_running(beginning: Beginning) -> None:
    assert beginning.phase() is Phase.RUNNING
    assert beginning.record(f"0/{local_shim.PROCESS}") is None


def test_a_cancel_ends_the_task_that_begins_after_it(beginning: Beginning) -> None:
    beginning.backend.cancel("k")
    beginning.let_go()
    assert beginning.end().outcome is Outcome.CANCELLED
    process = beginning.record(f"0/{local_shim.PROCESS}")
    assert process is not None, "it had looked for a cancel before"
    assert local_shim.process_start(int(str(process["pid"]))) is None


def test_a_shim_that_is_killed_starts_nothing_and_the_task_is_lost(beginning: Beginning) -> None:
    started = beginning.record(local_shim.STARTED)
    assert started is not None
    os.kill(int(str(started["pid"])), signal.SIGKILL)
    assert beginning.end().outcome is Outcome.LOST
    beginning.let_go()
    assert not beginning.evidence.exists()
