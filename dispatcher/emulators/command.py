"""`dispatcher emulate`: emulators of clouds from the command line.

Options and help are here. An emulator and Google's packages are imported only when it is started,
so that other commands stay quick and work without the extra.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from dispatcher.errors import ConfigurationError, Unreachable
from dispatcher.ports import HIGHEST_PORT, is_free

if TYPE_CHECKING:
    from dispatcher.emulators.cloud_run import CloudRunEmulator
    from dispatcher.emulators.cloud_run.tasks import Runner

__all__ = ["register"]

Quota = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Calls a minute before a 429; else any."),
]

SAID: Final = """\
Cloud Run Jobs, emulated on this machine only:
  gRPC {grpc}
  REST {rest}

A target for it in the jobs file:
  targets:
    emulated:
      backend: cloud_run
      project: my-project
      region: europe-west1
      transport: grpc        # or rest, with the other address
      endpoint: {grpc}
      insecure: true
      find_grace: 1s         # its lists do not lag

{jobs}
It runs until ^C.
"""


def _port_option(api: str) -> Any:
    return typer.Option(
        min=0,
        max=HIGHEST_PORT,
        metavar="PORT",
        help=f"Loopback port of {api}.",
        show_default="a free one",
    )


def cloud_run(
    scope: Any,
    *,
    image: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=COMMAND",
            help="A container image, and the local command that stands for its entrypoint; may be "
            "repeated. Other images do not exist.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    pretend: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Run nothing: every image exists, and each task succeeds after so long.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="docker|podman",
            help="Run each task as a container of this engine, from the job's own image; one that "
            "is not there is pulled.",
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default="host",
            help="With --engine: the containers' network. That of the machine reaches what listens "
            "on 127.0.0.1.",
        ),
    ] = None,
    mount: Annotated[
        list[Path],
        typer.Option(
            metavar="DIR",
            help="With --engine: a directory that containers have at the same path, such as that "
            "of a file:// storage; may be repeated.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    definitions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Cloud Run jobs that exist from the start, as YAML: "
            "projects/P/locations/R/jobs/J: {image, container, command, args, env, limits, "
            "parallelism, max_retries, timeout (seconds), task_count}.",
        ),
    ] = None,
    faults: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='What goes wrong, as JSON: [{"fault": "lose_reply", "on": "Jobs.RunJob", '
            '"share": 0.3}].',
        ),
    ] = None,
    grpc_port: Annotated[int, _port_option("gRPC")] = 0,
    rest_port: Annotated[int, _port_option("REST")] = 0,
    latency: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long each call takes.")
    ] = 0.0,
    parallel: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Processes or containers at once, over all executions."
        ),
    ] = 16,
    stop_grace: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="From SIGTERM to SIGKILL.")
    ] = 10.0,
    retention: Annotated[
        int, typer.Option(min=1, metavar="N", help="Completed executions kept per job.")
    ] = 1000,
    run_per_minute: Quota = None,
    read_per_minute: Quota = None,
    write_per_minute: Quota = None,
    logs_per_minute: Quota = None,
    max_running: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Executions at once per region; off if not given."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of names and faults, for the same ones again.")
    ] = None,
) -> int:
    """Serve Cloud Run Jobs on this machine until ^C.

    The real client library works against it, over gRPC and REST; tasks are local processes, or
    containers of a local engine. Nothing is kept when it ends. Needs the extra `cloud-run`.

    With --json: {grpc, rest, jobs} in one line, once it serves.
    """
    _check_extra()
    from dispatcher.emulators.cloud_run import CloudRunEmulator, EmulatorOptions  # noqa: PLC0415 - needs the extra, and is slow to import
    from dispatcher.emulators.cloud_run.faults import from_json  # noqa: PLC0415 - as above
    from dispatcher.emulators.cloud_run.processes import ProcessRunner  # noqa: PLC0415 - as above
    from dispatcher.emulators.cloud_run.scripted import ScriptRunner  # noqa: PLC0415 - as above

    if [bool(image), pretend is not None, engine is not None].count(True) != 1:
        raise ConfigurationError(
            "give either --image NAME=COMMAND, to run tasks as processes, or --engine docker or "
            "podman, to run them as containers, or --pretend SECONDS"
        )
    if engine is None and (network is not None or mount):
        raise ConfigurationError("--network and --mount are about containers: give --engine too")
    for option, port in (("--grpc-port", grpc_port), ("--rest-port", rest_port)):
        # Else gRPC's own log says it, and more than that.
        if port and not is_free(port):
            raise ConfigurationError(
                f"{option} {port}: port {port} is taken; give another one, or leave it out to get "
                "a free one"
            )
    options = EmulatorOptions(
        grpc_port=grpc_port,
        rest_port=rest_port,
        latency=latency,
        retention=retention,
        max_running=max_running,
        run_per_minute=run_per_minute,
        read_per_minute=read_per_minute,
        write_per_minute=write_per_minute,
        logs_per_minute=logs_per_minute,
        seed=seed,
    )
    runner: Runner
    if pretend is not None:
        seconds = pretend
        runner = ScriptRunner(lambda _: seconds)
    elif engine is not None:
        runner = _containers(engine, network or "host", mount, stop_grace, parallel)
    else:
        runner = ProcessRunner(_images(image), stop_grace=stop_grace, limit=parallel)
    emulator = CloudRunEmulator(
        runner=runner, faults=from_json(faults) if faults else (), options=options
    )
    jobs = [
        _define(emulator, definitions, name, given) for name, given in _read(definitions).items()
    ]
    with _until_signalled() as wait, _opened(emulator):
        _announce(emulator, jobs, as_json=scope.as_json)
        wait()
    return 0


def register(
    command: Callable[[typer.Typer, str], Callable[[Callable[..., int]], object]],
) -> typer.Typer:
    """Make the group `emulate`; `command` is that of `dispatcher.cli`, which imports this."""
    group = typer.Typer(
        name="emulate",
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Serve an emulator of a cloud on this machine.",
    )
    # A group of one command would take that command's place without a callback of its own.
    group.callback()(_group)
    command(group, "cloud-run")(cloud_run)
    return group


def _group() -> None:
    """Serve an emulator of a cloud on this machine."""


def _check_extra() -> None:
    try:
        import google.cloud.logging_v2  # noqa: PLC0415 - only looked for
        import google.cloud.run_v2  # noqa: F401, PLC0415 - only looked for
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the emulator of Cloud Run needs Google's client library ({error.name} is missing): "
            "in a checkout of dispatcher, pip install '.[cloud-run]'"
        ) from error


def _images(given: Sequence[str]) -> dict[str, list[str]]:
    images = {}
    for one in given:
        name, found, command = one.partition("=")
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ConfigurationError(
                f"--image {one}: the command cannot be read: {error}"
            ) from error
        if not (name and found and words):
            raise ConfigurationError(f"--image {one}: expected NAME=COMMAND, such as app=./main.py")
        images[name] = words
    return images


def _containers(
    name: str, network: str, mounts: Sequence[Path], stop_grace: float, limit: int
) -> Runner:
    """Make what runs tasks as containers.

    Raises:
        ConfigurationError: there is no such engine or directory.
        Unreachable: the engine does not answer.
    """
    from dispatcher.emulators.cloud_run.containers import ContainerRunner  # noqa: PLC0415 - needs the extra
    from dispatcher.emulators.cloud_run.engines import Engine, EngineName  # noqa: PLC0415 - as above

    if name not in list(EngineName):
        raise ConfigurationError(f"--engine {name}: allowed: {', '.join(EngineName)}")
    for path in mounts:
        if not path.is_dir():
            raise ConfigurationError(f"--mount {path}: there is no such directory")
    engine = Engine.reach(EngineName(name))
    for kind in sorted({"cpu", "memory"} - engine.limits):
        sys.stderr.write(f"{name} cannot limit the {kind} of a container here: tasks get it all\n")
    return ContainerRunner(
        engine, network=network, mounts=mounts, stop_grace=stop_grace, limit=limit
    )


def _read(path: Path | None) -> Mapping[str, Mapping[str, Any]]:
    if path is None:
        return {}
    from dispatcher.emulators.definition_file import read_definitions  # noqa: PLC0415 - is slow

    return read_definitions(path)


def _define(
    emulator: CloudRunEmulator, path: Path | None, name: str, given: Mapping[str, Any]
) -> str:
    from dispatcher.emulators.cloud_run import Refused  # noqa: PLC0415 - needs the extra

    _, project, _, region, _, job = name.split("/")
    try:
        return emulator.world.define(project, region, job, **given)
    except (Refused, ValueError) as error:
        raise ConfigurationError(f"{path}: {name} cannot be: {error}") from error


@contextmanager
def _opened(emulator: CloudRunEmulator) -> Iterator[None]:
    try:
        emulator.__enter__()
    except (OSError, RuntimeError) as error:
        raise Unreachable(f"the emulator cannot listen: {error}") from error
    try:
        yield
    finally:
        emulator.__exit__(None, None, None)


@contextmanager
def _until_signalled() -> Iterator[Callable[[], None]]:
    """Give a function that returns when SIGINT or SIGTERM has come, now or before."""
    # By a pipe that the signal itself writes to. A handler that sets an Event would run only when
    # the main thread moves, and a signal that comes just before it begins to wait does not move it.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {
        number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)
    }
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def wait() -> None:
        while not {*os.read(reading, 64)} & before.keys():
            pass  # another signal, which is none of ours

    try:
        yield wait
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)


def _announce(emulator: CloudRunEmulator, jobs: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        facts = {"grpc": emulator.grpc_address, "rest": emulator.rest_url, "jobs": list(jobs)}
        text = json.dumps(facts) + "\n"
    else:
        text = SAID.format(
            grpc=emulator.grpc_address,
            rest=emulator.rest_url,
            jobs="".join(f"  {name}\n" for name in jobs)
            and "Jobs:\n" + "".join(f"  {name}\n" for name in jobs),
        )
    sys.stdout.write(text)
    sys.stdout.flush()
