"""The contract on Cloud Run: over gRPC and REST against the emulator, and on a real project.

Set DISPATCHER_TEST_CLOUD_RUN to "project/region/job" to run it for real. The job's image needs a
shell as its entrypoint and nothing else, such as

    gcloud run jobs create contract --image=docker.io/library/busybox --command=sh --max-retries=0

DISPATCHER_TEST_CLOUD_RUN_ENDPOINT is the host:port of an emulator that stands in for Google there,
as the last test here has it.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from dispatcher.backends.base import Backend, Handle, LaunchRequest, TaskInput
from dispatcher.backends.cloud_run import CloudRunBackend, CloudRunOptions, CloudRunSettings
from dispatcher.emulators.cloud_run import CloudRunEmulator, TaskEnd, TaskStart
from dispatcher.emulators.cloud_run.faults import clock_skew, stale_lists
from dispatcher.emulators.cloud_run.options import EmulatorOptions
from dispatcher.testing import BackendContract, Behaviour

REAL = os.environ.get("DISPATCHER_TEST_CLOUD_RUN")
ENDPOINT = os.environ.get("DISPATCHER_TEST_CLOUD_RUN_ENDPOINT")
ROOT = Path(__file__).parents[2]

# One line a task: how long, which exit code, and what to print, parted by "|".
SCRIPT = """
line=$(echo "$BEHAVIOURS" | sed -n "$((CLOUD_RUN_TASK_INDEX + 1))p")
seconds=${line%% *} rest=${line#* }
code=${rest%% *} text=${rest#* }
[ -z "$text" ] || echo "$text" | tr '|' '\\n'
[ "$seconds" = 0.0 ] || sleep "$seconds"
exit "$code"
"""


def behave(start: TaskStart) -> TaskEnd:
    seconds, code, text = start.env["BEHAVIOURS"].split("\n")[start.index].split(" ", 2)
    return TaskEnd(
        seconds=float(seconds),
        exit_code=int(code),
        lines=tuple(text.split("|")) if text else (),
    )


class CloudRunContract(BackendContract):
    job: ClassVar[str] = "contract"
    mode: ClassVar[Literal["shared", "strict"]] = "shared"
    instance: str = "test"

    def request(
        self, key: str, tasks: Sequence[Behaviour], timeout: timedelta = timedelta(minutes=5)
    ) -> LaunchRequest:
        lines = "\n".join(f"{t.seconds} {t.exit_code} {'|'.join(t.lines)}" for t in tasks)
        return LaunchRequest(
            key=key,
            instance=self.instance,
            batch_id="b-1",
            job="contract",
            command=(),
            tasks=tuple(
                TaskInput(index, index, 1, "[]", ("-c", SCRIPT), {"BEHAVIOURS": lines})
                for index in range(len(tasks))
            ),
            options=CloudRunOptions(job=self.job, max_tasks=10, mode=self.mode),
            timeout=timeout,
            parallelism=len(tasks),
            intended_at=datetime.now(UTC),
        )

    def unknown(self, handle: Handle) -> Handle:
        return f"{handle}no"

    def test_another_instance_finds_what_it_did_not_launch(self, backend: Backend) -> None:
        """What launching once rests on: lists show the variables that a launch gave."""
        request = self.request(self.new_key(), [Behaviour(seconds=self.LONG)])
        launched = backend.launch(request)
        other = self.twin(backend)
        found = self.until(lambda: other.find(request), "found by its key")
        assert (found.handle, found.key) == (launched.handle, request.key)
        scanner = self.twin(backend)
        since = datetime.now(UTC) - timedelta(hours=1)

        def strays() -> dict[Handle, str]:
            return {one.handle: one.key for one in scanner.strays(self.instance, since)}

        self.until(lambda: launched.handle in strays(), "it is listed")
        assert strays()[launched.handle] == request.key
        backend.cancel(launched.handle)
        self.ended(backend, launched.handle)


class TestGrpc(CloudRunContract):
    transport: ClassVar[Literal["grpc", "rest"]] = "grpc"
    emulator: CloudRunEmulator

    def prepare(self) -> None:
        self.emulator.world.define("project-1", "europe-west1", self.job, container="main")

    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        options = EmulatorOptions(page_size=2)
        with CloudRunEmulator(script=behave, options=options) as self.emulator:
            self.prepare()
            address = {"grpc": self.emulator.grpc_address, "rest": self.emulator.rest_url}
            yield CloudRunBackend(
                "cloud",
                CloudRunSettings(
                    project="project-1",
                    region="europe-west1",
                    endpoint=address[self.transport],
                    transport=self.transport,
                    insecure=True,
                    tasks_interval=timedelta(milliseconds=20),
                ),
            )

    def runs(self, key: str) -> int:
        starts = self.emulator.world.starts
        return sum(s.env["DISPATCH_KEY"] == key and s.index == 0 for s in starts)


class TestRest(TestGrpc):
    transport = "rest"


class TestStrict(TestGrpc):
    mode = "strict"


class TestListsThatLag(TestGrpc):
    def prepare(self) -> None:
        super().prepare()
        self.emulator.faults.add(stale_lists(0.5))


class TestAClockThatIsFiveMinutesBehind(TestGrpc):
    def prepare(self) -> None:
        super().prepare()
        self.emulator.faults.add(clock_skew(-300))


@pytest.fixture(scope="class")
def said_beforehand(request: pytest.FixtureRequest) -> None:
    """Say what the contract will create and cost, past what pytest captures of output."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        sys.stderr.write(
            f"\nThis runs the contract on Cloud Run, {REAL}: about 20 executions with 1 to 3 "
            "tasks, half of them cancelled while they sleep, some 40 minutes in all. No job is "
            "created or changed. At 1 vCPU and 512 MiB that is less than 0.10 USD, or within the "
            "free tier.\n"
        )
        sys.stderr.flush()


@pytest.fixture(scope="class")
def real() -> CloudRunBackend:
    """One backend for the class: its clients and its token are made once."""
    project, region, _ = (REAL or "").split("/")
    place = {"project": project, "region": region}
    if ENDPOINT:
        return CloudRunBackend("real", CloudRunSettings(**place, endpoint=ENDPOINT, insecure=True))
    return CloudRunBackend("real", CloudRunSettings(**place))


@pytest.mark.skipif(not REAL, reason="DISPATCHER_TEST_CLOUD_RUN names no project/region/job")
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("said_beforehand")
class TestARealProject(CloudRunContract):
    patience = timedelta(minutes=15)
    job = (REAL or "").rpartition("/")[2]
    instance = f"test{uuid.uuid4().hex[:8]}"

    def step(self) -> None:
        time.sleep(0.05 if ENDPOINT else 5)

    @pytest.fixture
    def backend(self, real: CloudRunBackend) -> Iterator[Backend]:
        yield real
        for stray in real.strays(self.instance, datetime.now(UTC) - timedelta(hours=1)):
            real.cancel(stray.handle)


@pytest.mark.timeout(600)
def test_the_run_on_a_real_project_says_what_it_costs_and_passes() -> None:
    """In a process of its own, as it is run: only Google is an emulator."""
    with CloudRunEmulator(script=behave) as emulator:
        emulator.world.define("project-1", "europe-west1", "contract", container="main")
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__),
                *("-k", "TestARealProject and (by_its_key or did_not_launch or exit_code)"),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "DISPATCHER_TEST_CLOUD_RUN": "project-1/europe-west1/contract",
                "DISPATCHER_TEST_CLOUD_RUN_ENDPOINT": emulator.grpc_address,
            },
            check=False,
            capture_output=True,
            text=True,
        )
        launched = emulator.calls["Jobs.RunJob"]
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "3 passed" in ran.stdout
    assert ran.stderr.count("project-1/europe-west1/contract: about 20 executions") == 1
    assert "less than 0.10 USD" in ran.stderr
    assert launched >= 3


def test_behaviours_are_read_as_they_are_written() -> None:
    request = TestGrpc().request("k", [Behaviour(), Behaviour(3, math.pi, ("a b", "c"))])
    start = TaskStart("e", "j", 1, 2, 0, "i", (), (), request.tasks[0].env, 0.0)
    assert behave(start) == TaskEnd(seconds=math.pi, exit_code=3, lines=("a b", "c"))
