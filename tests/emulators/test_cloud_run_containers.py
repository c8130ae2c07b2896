"""Tasks that are real containers, of a real engine that only these tests use."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import grpc
import pytest
from containers import Docker, private_docker, processes_with, registry
from emulators.cloud import JOB, Cloud, Clouds, eventually
from google.cloud import run_v2
from typer.testing import CliRunner

from dispatcher.backends.base import LaunchRequest, Phase, TaskInput
from dispatcher.backends.cloud_run import CloudRunBackend, CloudRunOptions, CloudRunSettings
from dispatcher.cli import app
from dispatcher.emulators.cloud_run import CloudRunEmulator, containers
from dispatcher.emulators.cloud_run import engines as engines_module
from dispatcher.emulators.cloud_run.containers import LABEL, ContainerRunner
from dispatcher.emulators.cloud_run.engines import Engine, EngineName
from dispatcher.states import Outcome

SH = ["/bin/sh", "-c"]
STEP = "until [ -e {} ]; do sleep 0.02; done; "


class Greed:
    """A program that runs out of memory, but neither in its first moment nor in its last.

    Docker 20.10 begins to watch just after the start, and looks no more just after the end: so the
    program waits until the engine says that it runs, and then until it has heard of the memory.
    """

    def __init__(self, docker: Docker, folder: Path) -> None:
        self.docker = docker
        self.began, self.known = folder / "began", folder / "known"
        self.mounts = [folder]
        self.script = (
            f"{STEP.format(self.began)} tail /dev/zero || "
            f"{{ code=$?; {STEP.format(self.known)} exit $code; }}"
        )

    def happens(self, **filters: str) -> None:
        """Let it happen in the one container that runs."""
        (name,) = eventually(lambda: self.docker.containers(status="running", **filters))
        self.began.touch()
        asked = ("events", "--since=0", "--filter=event=oom", f"--filter=container={name}")
        eventually(lambda: self.docker(*asked, f"--until={time.time():.3f}"))
        self.known.touch()


MISSING = run_v2.Condition.CommonReason.CONTAINER_MISSING


def reached(docker: Docker, monkeypatch: pytest.MonkeyPatch) -> Engine:
    for name, value in docker.environment.items():
        monkeypatch.setenv(name, value)
    return Engine.reach(EngineName.DOCKER)


@pytest.fixture
def engine(docker: Docker, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """The engine; a test that leaves a container in it has failed."""
    yield reached(docker, monkeypatch)
    assert docker.containers() == []


Emulated = Callable[..., Cloud]


@pytest.fixture
def emulated(engine: Engine, clients: Clouds) -> Iterator[Emulated]:
    """Open an emulator whose job runs a shell script in a container."""
    with ExitStack() as stack:

        def make(
            script: str | None = None,
            *,
            on: Engine | None = None,
            runner: dict[str, Any] | None = None,
            **job: Any,
        ) -> Cloud:
            emulator = stack.enter_context(
                CloudRunEmulator(runner=ContainerRunner(on or engine, **(runner or {})))
            )
            if script is not None:
                job |= {"command": SH, "args": [script]}
            emulator.world.define("p", "r", "job", **{"image": Docker.image, **job})
            return clients(emulator)

        yield make


def lines(cloud: Cloud) -> list[tuple[int, str, bool]]:
    entries = cloud.emulator.world.journal.entries()
    return sorted((one.task_index, one.line.text, one.line.error) for one in entries)


def written(cloud: Cloud) -> list[str]:
    return [entry.line.text for entry in cloud.emulator.world.journal.entries()]


def result(cloud: Cloud, execution: run_v2.Execution) -> Any:
    """How the one task of an execution ended."""
    (task,) = cloud.results(cloud.finished(execution))
    return task.last_attempt_result


# --- what a container gets, and how it ends -------------------------------------------------------


def test_a_container_gets_its_variables_and_its_lines_are_kept(emulated: Emulated) -> None:
    cloud = emulated(
        'echo "$CLOUD_RUN_TASK_INDEX/$CLOUD_RUN_TASK_COUNT $A"; echo odd >&2; printf end; '
        'exit "$CLOUD_RUN_TASK_INDEX"',
        env={"A": "1"},
    )
    execution = cloud.finished(cloud.run(task_count=2, env={"A": "2"}))
    assert (execution.succeeded_count, execution.failed_count) == (1, 1)
    assert cloud.results(execution)[1].last_attempt_result.exit_code == 1
    assert lines(cloud) == [
        (0, "0/2 2", False),
        (0, "end", False),
        (0, "odd", True),
        (1, "1/2 2", False),
        (1, "end", False),
        (1, "odd", True),
    ]


def test_values_arrive_as_they_are_and_never_on_a_command_line(
    emulated: Emulated, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A docker before the real one that notes each word with which it is called.
    seen = tmp_path / "seen"
    spy = tmp_path / "docker"
    spy.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {seen}\nexec {engine.path} "$@"\n')
    spy.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    values = {
        "TEXT": '{"items":["a secret"]}\n{"items":[" b "]}\n',
        "PADDED": "  two  'a secret' ",
        "HASH": '# "no" $comment \\n',
        "EMPTY": "",
        # These are the engine's command's own, and it must go on without noticing.
        "HOME": "/nowhere",
        "DOCKER_HOST": "tcp://192.0.2.1:1",
    }
    spied = Engine.reach(EngineName.DOCKER)
    cloud = emulated(on=spied, command=["env"], args=["-0"], env=values)
    cloud.finished(cloud.run())
    got = dict(one.partition("=")[::2] for one in "\n".join(written(cloud)).split("\0"))
    assert {name: got[name] for name in values} == values
    assert "create" in seen.read_text()
    assert "a secret" not in seen.read_text()


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (
            {"env": {"HOME": "two\nlines"}},
            "The container engine failed: the variable HOME has several lines",
        ),
        ({"env": {"A": "nul\0"}}, "The container failed to start: "),
        ({"args": ["nul\0"]}, "null byte"),
    ],
)
def test_what_cannot_be_passed_on_ends_the_task_and_nothing_else(
    emulated: Emulated, job: dict[str, Any], said: str
) -> None:
    cloud = emulated(**{"command": ["true"], **job})
    told = result(cloud, cloud.run())
    assert told.status.code == 13
    assert said in told.status.message


def test_the_images_entrypoint_runs_unless_the_job_has_a_command(
    emulated: Emulated, docker: Docker
) -> None:
    docker.load("greeter:1", 'ENTRYPOINT ["echo", "image"]', 'CMD ["default"]')
    cloud = emulated(image="greeter:1")
    assert cloud.finished(cloud.run()).succeeded_count == 1
    cloud.finished(cloud.run(args=["--own", "args"]))
    cloud.emulator.world.define("p", "r", "job", image="greeter:1", command=["echo", "job"])
    cloud.finished(cloud.run())
    assert written(cloud) == ["image default", "image --own args", "job"]


def test_a_container_starts_where_the_job_says_and_sees_what_is_mounted(
    emulated: Emulated, tmp_path: Path
) -> None:
    folder = tmp_path / 'with, a comma and "quotes"'
    folder.mkdir()
    (folder / "in").write_text("from outside")
    script = f"pwd; ls /sys/class/net; cd '{folder}'; cat in; echo from inside > out"
    cloud = emulated(script, runner={"mounts": [folder], "network": "none"})
    job = cloud.jobs.get_job(name=JOB)
    job.template.template.containers[0].working_dir = "/work"
    cloud.jobs.update_job(job=job)
    assert cloud.finished(cloud.run()).succeeded_count == 1
    assert written(cloud) == ["/work", "lo", "from outside"]
    assert (folder / "out").read_text() == "from inside\n"


def test_a_program_that_is_not_in_the_image_is_told_as_not_started(emulated: Emulated) -> None:
    cloud = emulated(command=["/no/such/program"])
    told = result(cloud, cloud.run())
    assert told.status.code == 13
    assert told.status.message.startswith("The container failed to start: exec /no/such/program")


def test_a_container_that_runs_out_of_memory_is_told_so(
    emulated: Emulated, docker: Docker, tmp_path: Path
) -> None:
    greed = Greed(docker, tmp_path)
    cloud = emulated(
        greed.script, runner={"mounts": greed.mounts}, limits={"memory": "16Mi", "cpu": "8"}
    )
    execution = cloud.run()
    greed.happens()
    told = result(cloud, execution)
    assert (told.status.code, told.term_signal) == (8, 9)
    assert told.status.message.startswith("Memory limit of 16Mi exceeded.")


def test_a_program_that_outlives_what_ran_out_of_memory_ends_by_its_own_code(
    emulated: Emulated,
) -> None:
    cloud = emulated("tail /dev/zero; exit 4", limits={"memory": "16Mi"})
    assert result(cloud, cloud.run()).exit_code == 4


def test_a_program_that_kills_itself_has_not_run_out_of_memory(emulated: Emulated) -> None:
    cloud = emulated("kill -9 $$")
    told = result(cloud, cloud.run())
    assert (told.status.code, told.exit_code) == (10, 137)


def test_an_attempt_that_cloud_run_repeats_is_a_container_of_its_own(emulated: Emulated) -> None:
    cloud = emulated('echo "$CLOUD_RUN_TASK_ATTEMPT"; exit 7', max_retries=1)
    assert result(cloud, cloud.run()).exit_code == 7
    assert written(cloud) == ["0", "1"]


# --- stopping -------------------------------------------------------------------------------------


def test_a_cancel_sends_sigterm_and_ends_what_the_program_has_started(emulated: Emulated) -> None:
    cloud = emulated(
        "trap 'echo stopped; exit 3' TERM; sleep 600 & echo up; wait", runner={"stop_grace": 60}
    )
    execution = cloud.run()
    eventually(lambda: lines(cloud))
    cloud.executions.cancel_execution(name=execution.name)
    assert cloud.finished(execution).cancelled_count == 1
    assert written(cloud) == ["up", "stopped"]
    assert result(cloud, execution).exit_code == 3


def test_a_program_without_a_handler_ends_at_once_by_sigterm(emulated: Emulated) -> None:
    cloud = emulated("echo up; exec sleep 600", runner={"stop_grace": 60})
    execution = cloud.run()
    eventually(lambda: lines(cloud))
    cloud.executions.cancel_execution(name=execution.name)
    assert result(cloud, execution).term_signal == 15


def test_a_container_that_ignores_sigterm_is_killed_after_the_grace(emulated: Emulated) -> None:
    cloud = emulated(
        "trap '' TERM; echo up; while :; do sleep 600; done", runner={"stop_grace": 0.1}
    )
    execution = cloud.run()
    eventually(lambda: lines(cloud))
    cloud.emulator.world.advance(601)
    told = result(cloud, execution)
    assert told.term_signal == 9
    assert told.status.message == "The configured timeout was reached."


def test_a_cancel_before_the_container_runs_is_not_lost(emulated: Emulated) -> None:
    cloud = emulated("trap '' TERM; while :; do sleep 600; done", runner={"stop_grace": 0.1})
    for _ in range(3):
        execution = cloud.run(task_count=2)
        cloud.executions.cancel_execution(name=execution.name)
        assert cloud.finished(execution).cancelled_count == 2


def test_no_more_containers_run_at_once_than_allowed(emulated: Emulated) -> None:
    cloud = emulated("true", runner={"limit": 2})
    assert cloud.finished(cloud.run(task_count=4)).succeeded_count == 4
    assert cloud.emulator.world.most_busy == 2


# --- images ---------------------------------------------------------------------------------------


def test_an_image_that_is_not_there_is_pulled_and_the_log_says_so(
    emulated: Emulated, docker: Docker
) -> None:
    with registry() as host:
        image = f"{host}/repository:1"
        cloud = emulated(image=image)
        assert cloud.finished(cloud.run()).succeeded_count == 1
        assert cloud.finished(cloud.run()).succeeded_count == 1
    docker("rmi", image)
    assert written(cloud) == [f"Pulling image '{image}'.", "pulled", "pulled"]


def test_an_image_that_nobody_has_fails_the_execution_as_on_cloud_run(emulated: Emulated) -> None:
    with registry() as host:
        cloud = emulated(image=f"{host}/other:1", max_retries=3, parallelism=1, task_count=3)
        ended = cloud.finished(cloud.run())
    assert (ended.failed_count, ended.retried_count) == (3, 0)
    assert ended.conditions[-1].reason == MISSING
    for task in cloud.results(ended):
        assert task.conditions[-1].reason == MISSING
        assert task.conditions[-1].message.startswith(f"Image '{host}/other:1' not found. Error")


def test_a_name_that_no_image_can_have_is_a_missing_image(emulated: Emulated) -> None:
    cloud = emulated(image="--Not a name")
    assert cloud.finished(cloud.run()).conditions[-1].reason == MISSING


def test_a_cancel_does_not_wait_for_a_pull(emulated: Emulated) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        asked.set()
        go_on.wait(100)  # longer than anybody here waits for the cancel

    with registry(hold) as host:
        cloud = emulated(image=f"{host}/repository:1")
        execution = cloud.run()
        try:
            assert asked.wait(60)
            cloud.executions.cancel_execution(name=execution.name)
            assert cloud.finished(execution).cancelled_count == 1
        finally:
            go_on.set()


# --- an engine that fails -------------------------------------------------------------------------


def test_an_engine_that_dies_ends_its_tasks_as_a_failure_of_the_infrastructure(
    monkeypatch: pytest.MonkeyPatch, clients: Clouds, capfd: pytest.CaptureFixture[str]
) -> None:
    with private_docker() as docker:
        runner = ContainerRunner(reached(docker, monkeypatch))
        with CloudRunEmulator(runner=runner) as emulator:
            emulator.world.define(
                "p", "r", "job", image=Docker.image, command=SH, args=["echo up; sleep 600"]
            )
            cloud = clients(emulator)
            execution = cloud.run()
            eventually(lambda: lines(cloud))
            docker.daemon.kill()
            docker.daemon.wait()
            for told in (result(cloud, execution), result(cloud, cloud.run())):
                assert told.status.code == 13
                assert told.status.message.startswith("The container engine failed: ")
                assert not told.exit_code
    assert "containers of the emulator may be left" in capfd.readouterr().err


def test_an_engine_that_answers_no_more_does_not_hold_up_a_cancel(
    emulated: Emulated, docker: Docker, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = emulated("echo up; sleep 600", runner={"stop_grace": 0.1})
    execution = cloud.run()
    eventually(lambda: lines(cloud))
    # Only now: what is called before this is answered, however long a busy engine takes.
    monkeypatch.setattr(engines_module, "CALL_SECONDS", 0.5)
    monkeypatch.setattr(containers, "SIGNAL_SECONDS", 0.5)
    docker.daemon.send_signal(signal.SIGSTOP)
    try:
        cloud.executions.cancel_execution(name=execution.name)
        assert cloud.finished(execution).cancelled_count == 1
    finally:
        docker.daemon.send_signal(signal.SIGCONT)


def test_a_container_that_somebody_removes_is_a_failure_of_the_infrastructure(
    emulated: Emulated, docker: Docker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From its end to its removal a busy engine may take longer than the second that is waited for
    # the reason of a SIGKILL.
    monkeypatch.setattr(containers, "KILLED_SECONDS", 60.0)
    cloud = emulated("echo up; sleep 600")
    execution = cloud.run()
    eventually(lambda: lines(cloud))
    (name,) = docker.containers()
    docker("rm", "--force", name)
    assert result(cloud, execution).status.code == 13


# --- what an emulator leaves behind ---------------------------------------------------------------


@contextmanager
def served(*options: str) -> Iterator[tuple[subprocess.Popen[str], Cloud]]:
    """The command as a process, and clients of it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dispatcher", "emulate", "cloud-run", "--json", *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        output: IO[str] = process.stdout
        address = json.loads(output.readline())["grpc"]
        with grpc.insecure_channel(address) as channel:
            yield process, Cloud(None, "grpc", channel)  # type: ignore[arg-type]  # gRPC needs no address
    finally:
        process.kill()
        process.communicate()


def test_no_container_outlives_an_emulator_that_was_killed_and_others_keep_theirs(
    emulated: Emulated, docker: Docker, tmp_path: Path
) -> None:
    other = emulated("echo up; sleep 600")
    other.run()
    eventually(lambda: lines(other))
    (kept,) = docker.containers()
    definitions = tmp_path / "jobs.yaml"
    definitions.write_text(
        f"{JOB}: {{image: {Docker.image}, command: [sleep], args: ['600'], task_count: 2}}\n"
    )
    with served("--engine", "docker", "--definitions", str(definitions)) as (process, cloud):
        cloud.run()
        running = eventually(
            lambda: docker.containers(status="running", label=LABEL), lambda seen: len(seen) == 3
        )
        (mine, *_) = [name for name in running if name != kept]
        label = docker("inspect", "--format", f'{{{{index .Config.Labels "{LABEL}"}}}}', mine)
        # One that is just being started, or not: it is in the way of the guard at any moment.
        cloud.run()
        os.kill(process.pid, signal.SIGKILL)
        # The guard has the label in its command line, and looks until nothing more can come.
        eventually(lambda: not processes_with(f"{LABEL}={label}"))
    assert docker.containers() == [kept]


SLOW_ENGINE = """#!/bin/sh
case $1 in
    info) echo '{"cpus": 1, "memory": false, "cpu": false}' ;;
    create) touch asked; until [ -e go ]; do sleep 0.3; done; echo made >> said ;;
    ps) echo looked >> said ;;
esac
"""


def test_containers_that_are_made_after_the_emulators_death_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "docker"
    engine.write_text(SLOW_ENGINE)
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.yaml").write_text(f"{JOB}: {{image: any}}\n")
    with served("--engine", "docker", "--definitions", "jobs.yaml") as (process, cloud):
        cloud.run()
        eventually((tmp_path / "asked").exists)
        process.kill()
        process.wait()
        (tmp_path / "go").touch()
        said = eventually(
            lambda: (tmp_path / "said").read_text() if (tmp_path / "said").exists() else "",
            lambda text: "looked" in text,
        )
    assert said.startswith("made\nlooked\n")


def test_containers_end_with_the_command_that_is_told_to_end(
    engine: Engine, docker: Docker, tmp_path: Path
) -> None:
    assert engine.cpus
    definitions = tmp_path / "jobs.yaml"
    definitions.write_text(
        f"{JOB}: {{image: {Docker.image}, command: [sleep], args: ['600'], task_count: 3}}\n"
    )
    with served("--engine", "docker", "--definitions", str(definitions)) as (process, cloud):
        cloud.run()
        eventually(lambda: docker.containers(status="running"), lambda seen: len(seen) == 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert docker.containers() == []


# --- the backend against it -----------------------------------------------------------------------


class Laptop:
    """A target for an emulator, and executions on it."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        settings = {
            "project": "my-project",
            "region": "europe-west1",
            "endpoint": cloud.emulator.grpc_address,
            "insecure": True,
            "tasks_interval": "1s",
        }
        self.backend = CloudRunBackend("laptop", CloudRunSettings.model_validate(settings))

    def launch(self, *items: str, **job: Any) -> str:
        """Run a job of that definition, with a task for each items; returns the handle."""
        self.cloud.emulator.world.define("my-project", "europe-west1", "job", **job)
        tasks = tuple(TaskInput(index, index + 4, 1, one) for index, one in enumerate(items))
        request = LaunchRequest(
            key=f"d-b-{len(self.cloud.emulator.world.executed)}",
            instance="inst1",
            batch_id="b",
            job="etl",
            command=(),
            tasks=tasks,
            options=CloudRunOptions(job="job", max_tasks=10),
            timeout=timedelta(minutes=1),
            parallelism=len(tasks),
        )
        return self.backend.launch(request).handle

    def ended(self, handle: str) -> list[tuple[int, Outcome, int | None]]:
        """Wait for its end; returns how its tasks ended."""
        report = eventually(
            lambda: self.backend.poll([handle])[handle], lambda seen: seen.phase is Phase.ENDED
        )
        return sorted((one.index, one.outcome, one.exit_code) for one in report.tasks)


def test_two_chunks_run_in_containers_and_are_told_of_by_the_backend(
    emulated: Emulated, tmp_path: Path
) -> None:
    laptop = Laptop(emulated(runner={"mounts": [tmp_path]}))
    script = (
        'at=$((CLOUD_RUN_TASK_INDEX + 1)); line=$(echo "$DISPATCH_INPUT" | sed -n "${at}p"); '
        'echo "$DISPATCH_BATCH_ID $DISPATCH_TASK_COUNT $line"; '
        f'echo "$line" > {tmp_path}/$CLOUD_RUN_TASK_INDEX; exit $((CLOUD_RUN_TASK_INDEX * 3))'
    )
    items = ('["a b", "it\'s"]', '["c"]')
    handle = laptop.launch(*items, image=Docker.image, command=SH, args=[script])
    assert laptop.ended(handle) == [(0, Outcome.SUCCEEDED, 0), (1, Outcome.FAILED, 3)]
    for index, given in enumerate(items):
        (line,) = laptop.backend.logs(handle, index, 10)
        assert line.startswith("b 2 {")
        read = json.loads((tmp_path / str(index)).read_text())
        assert (read["chunk"], read["items"]) == (index + 4, json.loads(given))


def test_what_goes_wrong_with_a_container_has_its_outcome_at_the_backend(
    emulated: Emulated, docker: Docker, tmp_path: Path
) -> None:
    greed = Greed(docker, tmp_path)
    laptop = Laptop(emulated(runner={"stop_grace": 0.1, "mounts": greed.mounts}))
    here = {"image": Docker.image, "command": SH, "limits": {"memory": "16Mi"}}
    missing = laptop.launch("[]", image="127.0.0.1:1/none:1")
    greedy = laptop.launch("[]", **here, args=[greed.script])
    greed.happens()
    wrong = laptop.launch("[]", image=Docker.image, command=["/no/such"])
    endless = laptop.launch("[]", **here, args=["sleep 600"])
    laptop.backend.cancel(endless)
    assert laptop.ended(missing) == [(0, Outcome.REJECTED, None)]
    assert laptop.ended(greedy) == [(0, Outcome.OUT_OF_MEMORY, 137)]
    assert laptop.ended(wrong) == [(0, Outcome.LOST, None)]
    assert [outcome for _, outcome, _ in laptop.ended(endless)] == [Outcome.CANCELLED]


# --- what the command says ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--engine", "docker", "--pretend", "1"], 2, "give either --image NAME=COMMAND"),
        (["--engine", "rkt"], 2, "--engine rkt: allowed: docker, podman"),
        (["--pretend", "1", "--mount", "."], 2, "--network and --mount are about containers"),
        (["--pretend", "1", "--network", "host"], 2, "--network and --mount are about containers"),
        (["--engine", "docker", "--mount", "/no/such"], 2, "--mount /no/such: there is no such"),
        (["--engine", "podman"], 2, "the engine podman is not installed: there is no command"),
        (["--engine", "docker"], 4, "the engine docker does not answer: Cannot connect"),
    ],
)
def test_the_command_says_what_is_wrong_with_an_engine(
    options: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On PATH is a docker alone, which says what a docker without its daemon says.
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\necho 0\necho 'Cannot connect to the Docker daemon' >&2\nexit 1\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = CliRunner().invoke(app, ["emulate", "cloud-run", *options])
    assert outcome.exit_code == code
    assert said in outcome.stderr


@pytest.mark.parametrize(
    ("name", "says", "cpus", "limits"),
    [
        ("docker", '{"cpus": 4, "memory": true, "cpu": false}', 4, {"memory"}),
        ("podman", '{"cpus": 2, "controllers": ["cpu", "pids"]}', 2, {"cpu"}),
        ("podman", '{"cpus": 2, "controllers": null}', 2, set()),
    ],
)
def test_an_engine_is_asked_what_it_can_limit(
    name: str,
    says: str,
    cpus: int,
    limits: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = tmp_path / name
    command.write_text(f"#!/bin/sh\necho '{says}'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = Engine.reach(EngineName(name))
    assert (found.cpus, found.limits) == (cpus, limits)
    assert found.path == shutil.which(name)
    # The command says it too, and then that it cannot go on.
    said = CliRunner().invoke(
        app, ["emulate", "cloud-run", "--engine", name, "--definitions", "/nowhere"]
    )
    assert said.exit_code == 2
    for kind in ("cpu", "memory"):
        told = f"{name} cannot limit the {kind} of a container here" in said.stderr
        assert told is (kind not in limits)
