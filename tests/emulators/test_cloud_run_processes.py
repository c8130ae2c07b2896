"""Tasks that are real processes of this machine, and the command that serves them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import grpc
import pytest
from emulators.cloud import JOB, Cloud, Clouds, eventually
from google.cloud.logging_v2.services.logging_service_v2 import LoggingServiceV2Client
from google.cloud.logging_v2.services.logging_service_v2.transports import (
    LoggingServiceV2GrpcTransport,
)
from processes import is_alive
from typer.testing import CliRunner

from dispatcher.cli import app
from dispatcher.emulators.cloud_run import CloudRunEmulator, process_guard
from dispatcher.emulators.cloud_run.following import pass_on_lines
from dispatcher.emulators.cloud_run.processes import ProcessRunner

SH = ["/bin/sh", "-c"]


@pytest.fixture
def emulated(clients: Clouds) -> Iterator[Callable[..., Cloud]]:
    """Open an emulator whose image `app` is a shell script."""
    with ExitStack() as stack:

        def make(script: str, *, stop_grace: float = 10, limit: int = 16, **job: Any) -> Cloud:
            runner = ProcessRunner({"app": [*SH, script]}, stop_grace=stop_grace, limit=limit)
            emulator = stack.enter_context(CloudRunEmulator(runner=runner))
            emulator.world.define("p", "r", "job", image="app", **job)
            return clients(emulator)

        yield make


def lines(cloud: Cloud) -> list[tuple[int, str, bool]]:
    entries = cloud.emulator.world.journal.entries()
    return sorted((one.task_index, one.line.text, one.line.error) for one in entries)


def test_a_process_gets_its_variables_and_its_lines_are_kept(
    emulated: Callable[..., Cloud],
) -> None:
    cloud = emulated(
        'echo "$CLOUD_RUN_TASK_INDEX/$CLOUD_RUN_TASK_COUNT $A $CLOUD_RUN_JOB"; echo odd >&2; '
        'printf end; exit "$CLOUD_RUN_TASK_INDEX"',
        env={"A": "1"},
    )
    execution = cloud.finished(cloud.run(task_count=2, env={"A": "2"}))
    assert (execution.succeeded_count, execution.failed_count) == (1, 1)
    assert cloud.results(execution)[1].last_attempt_result.exit_code == 1
    assert lines(cloud) == [
        (0, "0/2 2 job", False),
        (0, "end", False),
        (0, "odd", True),
        (1, "1/2 2 job", False),
        (1, "end", False),
        (1, "odd", True),
    ]
    assert "PYTEST_CURRENT_TEST" not in cloud.emulator.world.starts[0].environment


def test_a_jobs_own_command_goes_before_the_images(emulated: Callable[..., Cloud]) -> None:
    cloud = emulated("exit 9", command=["/bin/echo"], args=["own"])
    assert cloud.finished(cloud.run()).succeeded_count == 1
    cloud.finished(cloud.run(args=["over", "ridden"]))
    assert [text for _, text, _ in lines(cloud)] == ["over ridden", "own"]
    cloud.emulator.world.define("p", "r", "job", image="app", command=["/no/such/program"])
    (task,) = cloud.results(cloud.finished(cloud.run()))
    assert task.last_attempt_result.status.code == 13
    assert "/no/such/program" in task.last_attempt_result.status.message


def test_a_process_that_a_signal_ends_has_no_exit_code(emulated: Callable[..., Cloud]) -> None:
    cloud = emulated("kill -9 $$")
    (task,) = cloud.results(cloud.finished(cloud.run()))
    assert task.last_attempt_result.term_signal == 9


def test_a_cancel_sends_sigterm_and_ends_the_whole_group(emulated: Callable[..., Cloud]) -> None:
    cloud = emulated("trap 'echo stopped; exit 3' TERM; sleep 600 & echo $!; wait", stop_grace=60)
    execution = cloud.run()
    ((_, child, _),) = eventually(lambda: lines(cloud))
    cloud.executions.cancel_execution(name=execution.name)
    execution = cloud.finished(execution)
    assert execution.cancelled_count == 1
    assert (0, "stopped", False) in lines(cloud)
    assert cloud.results(execution)[0].last_attempt_result.exit_code == 3
    eventually(lambda: not is_alive(int(child)))


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace(
    emulated: Callable[..., Cloud],
) -> None:
    cloud = emulated("trap '' TERM; echo up; while :; do sleep 600; done", stop_grace=0.1)
    execution = cloud.run()
    eventually(lambda: lines(cloud))
    cloud.emulator.world.advance(601)
    (task,) = cloud.results(cloud.finished(execution))
    assert task.last_attempt_result.term_signal == 9
    assert task.last_attempt_result.status.message == "The configured timeout was reached."


def test_no_more_processes_run_at_once_than_allowed(emulated: Callable[..., Cloud]) -> None:
    cloud = emulated("sleep 0.02", limit=2)
    assert cloud.finished(cloud.run(task_count=8)).succeeded_count == 8
    assert cloud.emulator.world.most_busy == 2


def test_processes_end_with_the_emulator(clients: Clouds) -> None:
    runner = ProcessRunner({"app": [*SH, "echo $$; sleep 600"]})
    with CloudRunEmulator(runner=runner) as emulator:
        emulator.world.define("p", "r", "job", image="app")
        cloud = clients(emulator)
        cloud.run(task_count=3)
        pids = [int(text) for _, text, _ in eventually(lambda: lines(cloud), lambda s: len(s) == 3)]
    assert not any(is_alive(pid) for pid in pids)


def test_what_a_process_writes_at_its_very_end_is_kept() -> None:
    """Also if it comes after a look that found nothing, while something else holds the output."""
    script = "sleep 600 & echo $!; read -r line; echo last words"
    kept: list[str] = []
    with subprocess.Popen([*SH, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:

        def is_over() -> bool:
            if kept and process.stdin is not None and not process.stdin.closed:
                process.stdin.close()
                process.wait()
            return process.returncode is not None

        pass_on_lines(process, lambda line: kept.append(line.text), is_over)
    os.kill(int(kept[0]), signal.SIGKILL)
    assert kept[1:] == ["last words"]


# --- the command ----------------------------------------------------------------------------------


class Served:
    """The command as a process, and where it serves."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        output: IO[str] = process.stdout
        self.facts = json.loads(output.readline())

    @property
    def grpc_address(self) -> str:
        return str(self.facts["grpc"])


@contextmanager
def served(*options: str) -> Iterator[Served]:
    process = subprocess.Popen(
        [sys.executable, "-m", "dispatcher", "emulate", "cloud-run", "--json", *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Served(process)
    finally:
        process.kill()
        process.communicate()


def test_the_command_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    definitions = tmp_path / "jobs.yaml"
    definitions.write_text(f"{JOB}:\n  image: app\n  task_count: 2\n")
    faults = tmp_path / "faults.json"
    faults.write_text('[{"fault": "refuse", "on": "Jobs.GetJob"}]')
    pids = tmp_path / "pids"
    image = f"app=/bin/sh -c 'echo $$ >> {pids}; exec sleep 600'"
    with served(
        "--image", image, "--definitions", str(definitions), "--faults", str(faults)
    ) as one:
        assert one.facts["jobs"] == [JOB]
        with grpc.insecure_channel(one.grpc_address) as channel:
            cloud = Cloud(one, "grpc", channel)  # type: ignore[arg-type]  # only its address is used
            cloud.run()
            with pytest.raises(Exception, match="unavailable"):
                cloud.jobs.get_job(name=JOB)
        found = eventually(
            lambda: pids.read_text().split() if pids.exists() else [], lambda seen: len(seen) == 2
        )
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(60) == 0
        assert not any(is_alive(int(pid)) for pid in found)


def test_no_process_outlives_an_emulator_that_was_killed(tmp_path: Path) -> None:
    definitions = tmp_path / "jobs.yaml"
    definitions.write_text(f"{JOB}:\n  image: app\n")
    # The second process is one that the first has started, and does not wait for.
    image = "app=/bin/sh -c 'sleep 600 & echo $$ $!; exec sleep 600'"
    with served("--image", image, "--definitions", str(definitions)) as one:
        with grpc.insecure_channel(one.grpc_address) as channel:
            Cloud(one, "grpc", channel).run()  # type: ignore[arg-type]  # only its address is used
            logging = LoggingServiceV2Client(
                transport=LoggingServiceV2GrpcTransport(channel=channel)
            )
            # What has been logged is known to the guard, too.
            (line,) = eventually(
                lambda: list(logging.list_log_entries(resource_names=["projects/p"])), bool
            )
        found = line.text_payload.split()
        assert all(is_alive(int(pid)) for pid in found)
        os.kill(one.process.pid, signal.SIGKILL)
        eventually(lambda: not any(is_alive(int(pid)) for pid in found))


def test_an_engine_that_removes_nothing_keeps_the_guard_for_a_while_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "engine"
    engine.write_text(
        "#!/bin/sh\n[ $1 = ps ] && { echo c1; exit; }\necho device busy >&2; exit 1\n"
    )
    engine.chmod(0o755)
    process_guard.remove(str(engine), "label=x", settle=0.0, patience=0.5)
    assert "containers of the emulator may be left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give either --image NAME=COMMAND"),
        (["--pretend", "1", "--image", "a=b"], "give either --image NAME=COMMAND"),
        (["--image", "app"], "--image app: expected NAME=COMMAND"),
        (["--image", "app='"], "cannot be read"),
        (["--pretend", "1", "--faults", "/nowhere"], "/nowhere: the faults cannot be read"),
        (["--pretend", "1", "--definitions", "/nowhere"], "/nowhere: the jobs cannot be read"),
    ],
)
def test_the_command_says_what_is_wrong_with_its_options(options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["emulate", "cloud-run", *options])
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a", "expected projects/P"),
        ("jobs/J: {image: a}", "'jobs/J' is not projects/P/locations/R/jobs/J"),
        (f"{JOB}: {{imgae: a}}", "imgae is not a known key; allowed: args"),
        (f"{JOB}: 3", "is 3; it must be a mapping, such as {image: app}; allowed: image"),
        (f"{JOB}:", "is null; it must be a mapping"),
        (f"{JOB}: {{task_count: 20000}}", "20000 must be between 1 and 10000"),
        (f"{JOB}: {{timeout: 10m}}", 'timeout is "10m"; it must be a number'),
        (f"{JOB}: {{timeout: -1}}", "timeout is -1; it must be greater than 0"),
        (f"{JOB}: {{env: {{A: 1}}}}", "env.A is 1; it must be text: put it in quotes"),
        (f"{JOB}: {{env: {{1: a}}}}", "env.1 is 1; it must be text"),
        (f"{JOB}: {{parallelism: many}}", 'parallelism is "many"; it must be an integer'),
        (f"{JOB}: {{command: sh -c}}", 'command is "sh -c"; it must be a list'),
        (f"{JOB}: {{limits: {{disk: 1Gi}}}}", "must be 'cpu' or 'memory'"),
        (f"{JOB}: {{limits: {{memory: 640Gi}}}}", "'640Gi' is more than 32Gi"),
        (f"{JOB}: {{args: [1], timeout: []}}", "args.0 is 1; it must be text: put it in quotes; "),
    ],
)
def test_definitions_that_are_wrong_are_refused_in_words(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(text)
    result = CliRunner().invoke(
        app, ["emulate", "cloud-run", "--pretend", "1", "--definitions", str(path)]
    )
    assert result.exit_code == 2
    assert said in result.stderr
    assert str(path) in result.stderr


def test_a_port_that_is_taken_is_told() -> None:
    with CloudRunEmulator() as emulator:
        ports = {
            "--rest-port": emulator.rest_url.rpartition(":")[2],
            "--grpc-port": emulator.grpc_address.rpartition(":")[2],
        }
        for option, port in ports.items():
            result = CliRunner().invoke(
                app, ["emulate", "cloud-run", "--pretend", "1", option, port]
            )
            assert result.exit_code == 2
            assert result.stderr == (
                f"error: {option} {port}: port {port} is taken; give another one, or leave it out "
                "to get a free one\n"
            )


def test_without_the_extra_the_command_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google.cloud.run_v2", None)
    result = CliRunner().invoke(app, ["emulate", "cloud-run", "--pretend", "1"])
    assert result.exit_code == 2
    assert "in a checkout of dispatcher, pip install '.[cloud-run]'" in result.stderr


def test_the_command_line_imports_nothing_of_google() -> None:
    code = (
        "import sys, dispatcher.cli; "
        "sys.exit(any(name.startswith(('google', 'grpc')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
