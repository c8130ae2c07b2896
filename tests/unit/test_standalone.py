"""The supervisor's decisions: the clock is an argument, and the programs are cheap to start."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from waiting import until

from dispatcher import standalone
from dispatcher.errors import ConfigurationError, Unreachable
from dispatcher.standalone import Keeper, Ports, Program, Standalone


class Server:
    """Something that can be started, and whose death a test decides."""

    title = "server"

    def __init__(self) -> None:
        self.running = True
        self.broken = False
        self.starts = 0

    def start(self) -> None:
        self.starts += 1
        if self.broken:
            raise Unreachable("no room on the disk")
        self.running = True


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def keeper(server: Server, said: list[str]) -> Keeper:
    return Keeper(server, said.append, started_at=0.0)


def test_what_died_is_started_again_after_a_second(
    keeper: Keeper, server: Server, said: list[str]
) -> None:
    server.running = False
    keeper.turn(100.0)
    keeper.turn(100.9)
    assert server.starts == 0
    keeper.turn(101.0)
    assert server.starts == 1
    assert said == [
        "server has died; starting it again in 1 s",
        "server was started again",
    ]


def test_what_dies_again_and_again_is_started_ever_more_seldom(
    keeper: Keeper, server: Server
) -> None:
    waits = []
    now = 1.0
    for _ in range(7):
        server.running = False
        keeper.turn(now)
        assert keeper.due_at is not None
        waits.append(keeper.due_at - now)
        now = keeper.due_at
        keeper.turn(now)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_minute_up_makes_the_next_death_a_first_one(keeper: Keeper, server: Server) -> None:
    for now in (1.0, 10.0, 20.0):
        server.running = False
        keeper.turn(now)
        keeper.turn(now + 5)
    server.running = False
    keeper.turn(25 + standalone.STEADY_AFTER)
    assert keeper.due_at == 26 + standalone.STEADY_AFTER


def test_a_start_that_fails_is_said_and_tried_again(
    keeper: Keeper, server: Server, said: list[str]
) -> None:
    server.running, server.broken = False, True
    keeper.turn(0.0)
    keeper.turn(1.0)
    assert said[1:] == [
        "server could not be started: no room on the disk; starting it again in 2 s"
    ]
    server.broken = False
    keeper.turn(3.0)
    assert server.running


def a_program(tmp_path: Path, source: str) -> Program:
    return Program(
        "worker",
        [sys.executable, "-c", source],
        env=dict(os.environ),
        log_file=tmp_path / "worker.log",
    )


def test_a_program_that_does_not_stop_in_time_is_killed(tmp_path: Path) -> None:
    stubborn = a_program(
        tmp_path,
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('deaf', flush=True); time.sleep(60)",
    )
    stubborn.start()
    until(lambda: "deaf" in stubborn.last_words())
    stubborn.ask_to_stop()
    assert not stubborn.wait_or_kill(time.monotonic() + 0.1)
    assert stubborn.process
    assert stubborn.process.returncode == -signal.SIGKILL


def test_the_last_words_are_of_this_start_and_not_of_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "worker.log").write_text("yesterday\n")
    program = a_program(tmp_path, "print('today')")
    assert program.wait_or_kill(0.0)  # never started: nothing to wait for
    program.start()
    assert program.wait_or_kill(time.monotonic() + 60)
    assert program.last_words() == f"{tmp_path / 'worker.log'} says\ntoday"


def test_a_taken_port_is_replaced_and_said(tmp_path: Path, said: list[str]) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        taken = squatter.getsockname()[1]
        chosen = Standalone(tmp_path, ports=Ports(flower=taken), say=said.append)._free_ports()
    assert chosen.flower != taken
    assert said == [f"port {taken} for Flower is taken: using {chosen.flower} instead"]


PLAIN = "plain: {target: here, command: [echo]}"
LISTED = "listed: {target: here, command: [echo], items: {source: 'os:listdir'}}"


@pytest.mark.parametrize(
    ("jobs", "command"),
    [
        (PLAIN, "enqueue plain --item 1 --wait"),
        (f"{PLAIN}, {LISTED}", "enqueue listed --wait"),
    ],
)
def test_what_is_suggested_can_be_enqueued(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, jobs: str, command: str
) -> None:
    monkeypatch.setattr(Standalone, "database_url", "postgresql+psycopg://here/db")
    monkeypatch.setattr(Standalone, "broker_url", "redis://here/0")
    path = tmp_path / "jobs.yaml"
    path.write_text(f"targets: {{here: {{backend: local}}}}\njobs: {{{jobs}}}\n")
    shown = Standalone(tmp_path, jobs=str(path), say=said.append)
    shown._introduce(shown._example_job())
    assert said[-2] == "try this in another terminal:"
    assert said[-1].endswith(command)
    said.clear()
    # Not where another program started it, as the demo does.
    quiet = Standalone(tmp_path, jobs=str(path), say=said.append, suggest=False)
    quiet._introduce(quiet._example_job())
    assert "another terminal" not in "\n".join(said)


def test_a_directory_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text(f"targets: {{here: {{backend: local}}}}\njobs: {{{PLAIN}}}\n")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError) as told:
        Standalone(tmp_path / "file" / "x", jobs=str(jobs)).start()
    assert str(told.value) == (
        f"the directory {tmp_path}/file/x cannot be used: Not a directory; choose another one with "
        "--dir"
    )


@pytest.mark.parametrize(
    ("ports", "said"),
    [
        (Ports(flower=99999), "--flower-port is 99999; it must be from 1 to 65535"),
        (Ports(postgres=0), "--postgres-port is 0; it must be from 1 to 65535"),
        (Ports(valkey=-1), "--valkey-port is -1; it must be from 1 to 65535"),
    ],
)
def test_what_is_no_port_is_refused_by_name(tmp_path: Path, ports: Ports, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Standalone(tmp_path, ports=ports).start()


def test_no_workers_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="workers is 0; it must be at least 1"):
        Standalone(tmp_path, workers=0).start()


def test_it_has_no_addresses_before_it_is_started(tmp_path: Path) -> None:
    idle = Standalone(tmp_path)
    with pytest.raises(ConfigurationError, match="it has no database yet"):
        _ = idle.database_url
    with pytest.raises(ConfigurationError, match="it has no broker yet"):
        _ = idle.broker_url
    idle.stop()


def test_each_worker_of_several_has_a_name_of_its_own(tmp_path: Path) -> None:
    commands = Standalone(tmp_path, workers=3, flower=False)._commands(Ports())
    assert list(commands) == ["worker", "worker2", "worker3", "beat"]
    assert commands["worker3"][-2:] == ("--hostname", "worker3@%h")
