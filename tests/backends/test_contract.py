"""The contract that every backend passes, on the two that need no provider."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dispatcher.backends.base import Backend, LaunchRequest, TaskInput
from dispatcher.backends.local import LocalBackend, LocalOptions, LocalSettings
from dispatcher.states import Outcome
from dispatcher.testing import (
    BackendContract,
    Behaviour,
    Ending,
    NullBackend,
    NullOptions,
    NullSettings,
    NullWorld,
)

SCRIPT = """
echo "$DISPATCH_TASK_INDEX" >> "$RUNS"
seconds=$1 code=$2; shift 2
for line in "$@"; do echo "$line"; done
[ "$seconds" = 0.0 ] || sleep "$seconds"
exit "$code"
"""


class TestLocal(BackendContract):
    folder: Path

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Iterator[Backend]:
        self.folder = tmp_path
        backend = LocalBackend("here", LocalSettings(spool=tmp_path / "spool", stop_grace=60))
        yield backend
        for stray in backend.strays("test", datetime.fromtimestamp(0, UTC)):
            backend.cancel(stray.handle)
            self.ended(backend, stray.handle)

    def request(
        self, key: str, tasks: Sequence[Behaviour], timeout: timedelta = timedelta(minutes=5)
    ) -> LaunchRequest:
        env = {"RUNS": str(self.folder / f"{key}.runs")}
        return LaunchRequest(
            key=key,
            instance="test",
            batch_id="b-1",
            job="contract",
            command=("sh", "-c", SCRIPT, "task"),
            tasks=tuple(
                TaskInput(
                    index,
                    index,
                    1,
                    "[]",
                    (str(task.seconds), str(task.exit_code), *task.lines),
                    env,
                )
                for index, task in enumerate(tasks)
            ),
            options=LocalOptions(),
            timeout=timeout,
            parallelism=len(tasks),
        )

    def runs(self, key: str) -> int:
        return (self.folder / f"{key}.runs").read_text().split().count("0")


class TestNull(BackendContract):
    world: NullWorld

    @pytest.fixture
    def settings(self) -> NullSettings:
        return NullSettings()

    @pytest.fixture
    def backend(self, settings: NullSettings, request: Any) -> Iterator[Backend]:
        name = request.node.nodeid
        backend = NullBackend(name, settings)
        self.world = backend.world
        self.endings: dict[tuple[str, int], Ending] = {}
        self.world.script = lambda batch_id, chunk, _attempt: self.endings[batch_id, chunk]
        yield backend
        NullWorld.forget(name)

    def request(
        self, key: str, tasks: Sequence[Behaviour], timeout: timedelta = timedelta(minutes=5)
    ) -> LaunchRequest:
        for index, task in enumerate(tasks):
            outcome = Outcome.FAILED if task.exit_code else Outcome.SUCCEEDED
            self.endings[key, index] = Ending(
                outcome, exit_code=task.exit_code, seconds=task.seconds, output=task.lines
            )
        return LaunchRequest(
            key=key,
            instance="test",
            batch_id=key,
            job="contract",
            command=(),
            tasks=tuple(TaskInput(index, index, 1, "[]") for index in range(len(tasks))),
            options=NullOptions(),
            timeout=timeout,
            parallelism=len(tasks),
        )

    def runs(self, key: str) -> int:
        return self.world.runs[key, 0, 1]


class TestNullThatForgetsKeysAndRunsOneTask(TestNull):
    @pytest.fixture
    def settings(self) -> NullSettings:
        return NullSettings(relaunch_safe=False, max_tasks=1)
