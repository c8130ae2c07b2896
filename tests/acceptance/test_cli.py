"""The command line as people and scripts meet it: output, JSON shapes, messages and exit codes.

Most tests call the command in this process, which is the same and quicker; those about pipes,
terminals and signals start a real one. What a worker would do is done by an engine here.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
import pytest
import typer.main
from typer.testing import CliRunner
from waiting import until

from dispatcher import schema
from dispatcher.boottime import boottime
from dispatcher.cli import Scope, app, guarded
from dispatcher.config import load_config
from dispatcher.engine import Engine
from dispatcher.states import ChunkState, Outcome
from dispatcher.store import Store
from dispatcher.testing import Ending, Fault, NullWorld

LONG = 90.0
"""Seconds in which a command has ended, however busy the machine is."""

JOBS = """
targets:
  nowhere: {backend: "null", max_running: 100}
  here: {backend: local, spool: SPOOL, max_running: 4}
jobs:
  work:
    target: nowhere
    command: [work]
    retry: {attempts: 1}
  measured:
    target: nowhere
    command: [work]
    description: chunks of much the same weight
    args: ["{param:month}"]
    chunk: {max_items: 2, balance_by: bytes}
    params:
      type: object
      additionalProperties: false
      properties:
        month: {type: string, default: "2025-11"}
        days: {type: integer}
        rate: {type: [number, "null"]}
        password: {type: string}
        any: {}
    options: {max_tasks: 2, parallelism: 2}
    limits: {running: 5}
  shout:
    target: here
    command: [sh, -c, 'echo hello from $DISPATCH_ATTEMPT; echo woe >&2; exit 3']
    retry: {attempts: 1}
  missing:
    target: here
    command: [no-such-program]
"""


@dataclass(frozen=True)
class Ran:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


class Desk:
    """A folder with a jobs file and a database, at which somebody types commands."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self.folder = folder
        self.database_url = database_url
        self.jobs = folder / "jobs.yaml"
        self.jobs.write_text(JOBS.replace("SPOOL", str(folder / "spool")))
        self.settings: dict[str, str | None] = {
            **{name: None for name in os.environ if name.startswith("DISPATCHER_")},
            "DISPATCHER_DATABASE_URL": database_url,
            "DISPATCHER_JOBS": str(self.jobs),
            "DISPATCHER_ACTOR": "ann@desk",
        }
        self.world = NullWorld.named("nowhere")
        self._engine: Engine | None = None
        self._closing: list[Callable[[], None]] = []

    def run(self, *words: str, typed: str | None = None, **settings: str | None) -> Ran:
        """Run a command in this process."""
        ran = CliRunner(env={**self.settings, **settings}).invoke(app, words, input=typed)
        # A thread that still waits for the broker must not write to what is closed now.
        logging.getLogger().handlers[:] = [logging.NullHandler()]
        assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exc_info
        assert "Traceback" not in ran.output
        # What a tap of an earlier command says of the broker, from its own thread, is not ours.
        said = ran.stderr.splitlines(keepends=True)
        ours = (line for line in said if "the broker does not take taps" not in line)
        return Ran(ran.exit_code, ran.stdout, "".join(ours))

    def ok(self, *words: str, typed: str | None = None, **settings: str | None) -> Ran:
        """Run a command that must end well."""
        ran = self.run(*words, typed=typed, **settings)
        assert ran.code == 0, ran
        return ran

    def refused(self, *words: str, code: int = 2, typed: str | None = None, **settings: str) -> str:
        """Run a command that must be refused; what it says."""
        ran = self.run(*words, typed=typed, **settings)
        assert (ran.code, ran.out) == (code, ""), ran
        return ran.err.rstrip("\n")

    def environment(self) -> dict[str, str]:
        """The variables of a real process."""
        outer = {k: v for k, v in os.environ.items() if not k.startswith("DISPATCHER_")}
        return {**outer, **{k: v for k, v in self.settings.items() if v is not None}}

    def spawn(self, *words: str, **streams: Any) -> subprocess.Popen[bytes]:
        """Start a command as a real process."""
        command = [sys.executable, "-m", "dispatcher", *words]
        return subprocess.Popen(command, env=self.environment(), **streams)

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            database = schema.create_engine(self.database_url, pool_size=4)
            store = Store(database, actor="worker-1")
            # Its own clock runs fast: it looks at what it launched again after 0.1 s.
            self._engine = Engine(
                store,
                load_config(str(self.jobs)),
                # By its clock: a launch is called however long this process stood still before.
                call_window=timedelta(hours=1),
                roll=lambda: 0.0,
                monotonic=lambda: 10.0 * boottime(),
            )
            self._closing += [self._engine.close, database.dispose]
        return self._engine

    def lead(self) -> None:
        """Say, as a worker does, that one is alive on this host and leads the targets."""
        store = self.engine.store
        store.beat(host=socket.gethostname(), pid=1, version="0.1.0", problems={})
        for name, place in self.engine.places.items():
            store.lease(
                name,
                backend=place.target.backend,
                limits={"max_running": place.target.max_running},
                home=place.home,
                lease=timedelta(minutes=5),
            )

    def turn(self) -> None:
        """Do what a worker's clock does."""
        for batch_id in self.engine.sweep():
            self.engine.plan(batch_id)
        for name in self.engine.places:
            while self.engine.launch(name).more:
                pass
            self.engine.follow(name)

    def finish(self, batch_id: str) -> None:
        """Let a worker work until a batch has ended."""
        self.lead()

        def ended() -> bool:
            self.turn()
            return (
                self.sql(
                    "SELECT 1 FROM dispatcher.batch WHERE finished_at IS NOT NULL AND id = %s",
                    batch_id,
                )
                != []
            )

        until(ended, f"the end of {batch_id}")

    def enqueue(self, *words: str) -> str:
        """Enqueue; the id of the batch."""
        return self.ok("enqueue", *words).out.strip()

    def sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        url = self.database_url.replace("postgresql+psycopg:", "postgresql:", 1)
        with psycopg.connect(url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), values)
            return cursor.fetchall() if cursor.description else []

    def close(self) -> None:
        for close in self._closing:
            close()


@pytest.fixture
def desk(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.chdir(tmp_path)
    NullWorld.forget("nowhere")
    made = Desk(tmp_path, database_url)
    yield made
    made.close()
    NullWorld.forget("nowhere")


# --- help -----------------------------------------------------------------------------------------


def commands() -> list[list[str]]:
    group: Any = typer.main.get_command(app)
    found = []
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        found += [[name]] if inner is None else [[name, sub] for sub in inner]
    return found


def test_the_commands_are_those_that_are_promised() -> None:
    assert [" ".join(words) for words in commands()] == [
        *("enqueue", "batches", "show", "watch", "logs", "retry", "cancel", "explain", "audit"),
        *("jobs", "check", "apply", "standalone"),
        *("db upgrade", "db check", "db downgrade", "emulate cloud-run"),
    ]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help_and_says_the_shape_of_its_json(
    desk: Desk, words: list[str]
) -> None:
    shown = " ".join(desk.ok(*words, "--help").out.split())
    assert "With --json:" in shown
    assert "--debug" in shown
    assert "…" not in shown


def test_the_version_is_that_of_the_distribution(desk: Desk) -> None:
    assert desk.ok("--version").out == f"dispatcher {version('dispatcher')}\n"


def test_the_help_names_every_state_that_chunks_are_counted_by(desk: Desk) -> None:
    shown = " ".join(desk.ok("batches", "--help").out.split())
    assert f"counts: {{{', '.join(ChunkState)}}}" in shown


def test_help_answers_without_importing_what_the_commands_need(desk: Desk) -> None:
    script = (
        "import sys\n"
        "sys.argv = ['dispatcher', '--help']\n"
        "from dispatcher.cli import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    print(sorted({'sqlalchemy', 'pydantic', 'rich', 'celery'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], env=desk.environment(), capture_output=True, check=True
    )
    assert ran.stdout.decode().splitlines()[-1] == "[]"


def test_the_module_runs_as_the_command_does(desk: Desk) -> None:
    ran = desk.spawn("--help", stdout=subprocess.PIPE)
    out, _ = ran.communicate(timeout=LONG)
    assert ran.returncode == 0
    assert out.startswith(b"Usage: dispatcher [OPTIONS] COMMAND")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("words", [("batches",), ("--help",)])
def test_output_that_cannot_be_written_is_told_in_a_line(
    desk: Desk, words: tuple[str, ...]
) -> None:
    desk.enqueue("work", "--item", "a")
    with Path("/dev/full").open("wb") as full:
        ran = desk.spawn(*words, stdout=full, stderr=subprocess.PIPE)
        _, err = ran.communicate(timeout=LONG)
    said = b"error: the output cannot be written: No space left on device\n"
    assert (ran.returncode, err) == (1, said)


def test_an_interrupt_while_the_command_is_imported_ends_it_without_a_traceback(desk: Desk) -> None:
    (desk.folder / "typer.py").write_text("raise KeyboardInterrupt\n")
    desk.settings["PYTHONPATH"] = os.pathsep.join(
        [str(desk.folder), os.environ.get("PYTHONPATH", "")]
    )
    ran = desk.spawn("batches", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert ran.communicate(timeout=LONG) == (b"", b"")
    assert ran.returncode == 130


# --- enqueue --------------------------------------------------------------------------------------


def test_enqueue_prints_the_id_and_nothing_else(desk: Desk) -> None:
    ran = desk.ok("enqueue", "work", "--item", "a", "--item", "b")
    batch_id = ran.out.strip()
    assert ran.out == f"{batch_id}\n"
    assert ran.err == f"enqueued work; `dispatcher watch {batch_id}` follows it\n"
    assert desk.sql("SELECT id, actor FROM dispatcher.batch") == [(batch_id, "ann@desk")]


def test_a_key_that_has_its_batch_already_is_said_and_what_is_not_taken_of_the_call(
    desk: Desk,
) -> None:
    words = ("enqueue", "work", "--item", "a", "--key", "k")
    batch_id = desk.ok(*words, "--label", "team=blue").out.strip()
    again = desk.ok(*words)
    assert again.out == f"{batch_id}\n"
    told = f"batch {batch_id} of this key was there already, planning"
    follow = f"; `dispatcher watch {batch_id}` follows it\n"
    assert again.err == told + follow
    assert desk.ok(*words, "--label", "team=red", "--priority", "5").err == (
        f"{told}, and keeps its labels and its priority 0{follow}"
    )
    desk.finish(batch_id)
    waited = desk.run(*words, "--wait")
    assert waited.err.startswith(f"batch {batch_id} of this key was there already, ")


def test_the_hints_of_a_command_come_after_its_output_where_both_go_to_one_file(
    desk: Desk,
) -> None:
    ran = desk.spawn(
        *("enqueue", "work", "--item", "a"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    out, _ = ran.communicate(timeout=LONG)
    said = [line for line in out.decode().splitlines() if "broker" not in line]
    assert said[1] == f"enqueued work; `dispatcher watch {said[0]}` follows it"


def test_enqueue_gives_the_batch_as_json_before_or_after_the_command(desk: Desk) -> None:
    before = desk.ok("--json", "enqueue", "work", "--item", "a", "--key", "k").json
    after = desk.ok("enqueue", "work", "--item", "a", "--key", "k", "--json").json
    assert before == after
    assert list(before) == [
        *("id", "key", "job", "target", "state", "reason", "params", "labels", "priority"),
        *("actor", "created_at", "planned_at", "deadline", "cancel_requested_at", "finished_at"),
        *("items", "chunks_total", "counts", "progress"),
    ]
    assert before["state"] == "planning"
    assert before["created_at"].endswith("Z")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-1.5", -1.5),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ('{"id": 7}', {"id": 7}),
        ("abc", "abc"),
        ("007", "007"),
        ("NaN", "NaN"),
        ("2025-11-20", "2025-11-20"),
        ("", ""),
        ('"7"', "7"),
        ("{items", "{items"),
    ],
)
def test_an_item_is_json_if_it_is_that_and_else_text(desk: Desk, text: str, value: object) -> None:
    batch_id = desk.enqueue("work", "--item", text)
    desk.turn()
    [chunk] = desk.ok("show", batch_id, "--items", "--json").json["chunks"]
    assert chunk["items"] == [value]


def test_params_are_read_as_the_schema_types_them(desk: Desk) -> None:
    batch = desk.ok(
        *("enqueue", "measured", "--item", '{"bytes": 1}', "--json"),
        *("--param", "month=202511", "--param", "days=7", "--param", "rate=null"),
        *("--param", "any=[1]", "--param", "password=swordfish"),
    ).json
    assert batch["params"] == {
        "month": "202511",
        "days": 7,
        "rate": None,
        "any": [1],
        "password": "***",
    }


def test_a_param_of_the_wrong_type_is_told_by_the_schema(desk: Desk) -> None:
    said = desk.refused("enqueue", "measured", "--item", "{}", "--param", "days=many")
    assert said == (
        "error: the job 'measured' cannot run so: params.days is \"many\"; it must be of type "
        "integer"
    )


def test_items_come_from_a_file_or_from_standard_input(desk: Desk) -> None:
    (desk.folder / "items.jsonl").write_text('"a"\n"b"\n"c"\n')
    from_file = desk.enqueue("work", "--items", "items.jsonl", "--chunk-size", "2")
    ran = desk.ok("enqueue", "work", "--items", "-", "--priority", "-5", typed='"a"\n{"b": 1}\n')
    desk.turn()
    assert desk.ok("show", from_file, "--json").json["chunks_total"] == 2
    shown = desk.ok("show", ran.out.strip(), "--items", "--json").json
    assert [chunk["items"] for chunk in shown["chunks"]] == [["a"], [{"b": 1}]]
    assert shown["priority"] == -5


def test_labels_are_kept_and_found(desk: Desk) -> None:
    batch_id = desk.enqueue("work", "--item", "a", "--label", "team=blue=ish")
    desk.enqueue("work", "--item", "a")
    [found] = desk.ok("batches", "--label", "team=blue=ish", "--json").json
    assert found["id"] == batch_id
    assert found["labels"] == {"team": "blue=ish"}


def test_a_dry_run_prints_the_plan_and_writes_nothing(desk: Desk) -> None:
    words = ["enqueue", "measured", "--dry-run"]
    for weight in (5, 1, 4, 2, 3):
        words += ["--item", json.dumps({"bytes": weight})]
    # Not even a database is needed for it.
    nowhere = {"DISPATCHER_DATABASE_URL": None}
    assert desk.ok(*words, **nowhere).out == (
        "job          measured on target nowhere\n"
        "items        5\n"
        "chunks       3, of 1 to 2 items, sums of bytes 5 to 5, 26 bytes at most\n"
        "executions   2, of 1 to 2 tasks, 2 at once\n"
        "launch calls 2\n"
        "limits       max_running 100, running 5\n"
    )
    plan = desk.ok(*words, "--json", **nowhere).json
    assert plan["items_per_chunk"] == {"min": 1, "max": 2}
    assert plan["weight_per_chunk"] == {"min": 5, "max": 5}
    assert (plan["chunks"], plan["executions"], plan["launch_calls"]) == (3, 2, 2)
    assert plan["tasks_per_execution"] == {"min": 1, "max": 2}
    assert plan["params"] == {"month": "2025-11"}
    assert desk.sql("SELECT count(*) FROM dispatcher.batch") == [(0,)]


def test_a_dry_run_says_where_limits_let_only_some_run_at_once(desk: Desk) -> None:
    words = ("enqueue", "measured", "--dry-run", "--chunk-size", "1", "--items", "ids.jsonl")
    (desk.folder / "ids.jsonl").write_text("".join(f'{{"bytes": {n}}}\n' for n in range(12)))
    ran = desk.ok(*words)
    # Two executions of two have four of the five slots, and the next one begins with the fifth.
    assert "executions   6 or more, of 1 to 2 tasks, 2 at once\nlaunch calls 6 or more\n" in ran.out
    assert "running lets 5 tasks run at once: what waits is launched as tasks end" in ran.err
    plan = desk.ok(*words, "--json").json
    assert (plan["executions"], plan["exact"], plan["tasks_at_once"]) == (6, False, 5)
    # One task in each is as many as there are chunks, whatever runs at once.
    desk.jobs.write_text(desk.jobs.read_text().replace("max_tasks: 2", "max_tasks: 1"))
    plan = desk.ok(*words, "--json").json
    assert (plan["executions"], plan["exact"]) == (12, True)
    desk.jobs.write_text(desk.jobs.read_text().replace("max_tasks: 1", "max_tasks: 2"))
    # Fewer slots than an execution would have tasks: none is larger.
    desk.jobs.write_text(desk.jobs.read_text().replace("running: 5", "running: 1"))
    plan = desk.ok(*words, "--json").json
    assert (plan["executions"], plan["tasks_per_execution"]) == (12, {"min": 1, "max": 1})


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ('{"id": 1}', "{items:csv} takes text, numbers, true and false; item 0 of the chunk is"),
        ("a" * 200_000, "chunk 0 makes the job's env.IDS 200000 bytes long; target here"),
    ],
)
def test_a_dry_run_refuses_what_planning_would(desk: Desk, item: str, said: str) -> None:
    text = JOBS.replace("  missing:\n", '  missing:\n    env: {IDS: "{items:csv}"}\n')
    desk.jobs.write_text(text.replace("SPOOL", str(desk.folder / "spool")))
    dry = desk.refused("enqueue", "missing", "--dry-run", "--item", item)
    assert said in dry
    batch_id = desk.enqueue("missing", "--item", item)
    desk.finish(batch_id)
    reason = desk.ok("show", batch_id, "--json").json["reason"]
    assert f"error: {reason}" == dry


def test_a_dry_run_refuses_what_enqueueing_would(desk: Desk) -> None:
    for words in (("--key", "k" * 201), ("--label", f"team={'x' * 64}")):
        asked = ("enqueue", "work", "--item", "a", *words)
        assert desk.refused(*asked, "--dry-run") == desk.refused(*asked)


def test_a_dry_run_reads_files_sources_and_standard_input(desk: Desk) -> None:
    (desk.folder / "items.txt").write_text("a\nb\nc\n")
    (desk.folder / "listing.py").write_text("def numbers():\n    yield from range(7)\n")
    text = (
        JOBS.replace("SPOOL", "spool")
        .replace(
            "  work:\n",
            '  work:\n    items: {source: "listing:numbers"}\n    chunk: {size: 3}\n',
        )
        .replace("max_running: 100", "launches_per_minute: 60")
    )
    desk.jobs.write_text(text)
    words = ("enqueue", "work", "--dry-run", "--json")
    from_source = desk.ok(*words, PYTHONPATH=str(desk.folder)).json
    assert (from_source["items"], from_source["chunks"]) == (7, 3)
    assert from_source["launch_calls_seconds"] == 2.0
    assert "launch calls 3, over 2 s at the target's rate" in desk.ok(*words[:-1]).out
    assert desk.ok(*words, "--items", "items.txt").json["items"] == 3
    assert desk.ok(*words, "--items", (desk.folder / "items.txt").as_uri()).json["items"] == 3
    assert desk.ok(*words, "--items", "-", "--chunk-size", "1", typed="1\n2\n").json["chunks"] == 2


def test_a_dry_run_without_items_says_what_is_missing(desk: Desk) -> None:
    expected = (
        'error: job "work" has no item source: give --item or --items, or set items.source in '
        "the job"
    )
    assert desk.refused("enqueue", "work", "--dry-run") == expected
    assert desk.refused("enqueue", "work") == expected


# --- wait and watch -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "code", "state"),
    [(Outcome.SUCCEEDED, 0, "succeeded"), (Outcome.FAILED, 1, "failed")],
)
def test_waiting_ends_with_the_batch_and_its_exit_code(
    desk: Desk, outcome: Outcome, code: int, state: str
) -> None:
    desk.world.script = lambda *_: Ending(outcome)
    desk.lead()
    with working(desk):
        ran = desk.run("enqueue", "work", "--item", "a", "--wait")
    batch_id, *_, last = ran.out.splitlines()
    assert ran.code == code
    assert last.startswith(f"{batch_id} {state} after ")
    assert f": 1/1 chunks: 1 {state}" in last
    assert ("dispatcher retry --failed" in ran.err) == (code == 1)


def test_waiting_for_a_batch_that_is_cancelled_exits_with_3(desk: Desk) -> None:
    batch_id = desk.enqueue("work", "--item", "a")
    desk.ok("cancel", batch_id, "--reason", "not today")
    ran = desk.run("watch", batch_id)
    assert ran.code == 3
    assert ran.out.startswith(f"{batch_id} cancelled after ")
    assert ran.out.endswith(": not planned yet; not today\n") or "no chunks; not today" in ran.out


def test_watch_prints_a_line_for_each_change_where_there_is_no_terminal(desk: Desk) -> None:
    batch_id = desk.enqueue("work", "--item", "a")
    first, *_, last = watched(desk, batch_id[:6])
    assert first.endswith("Z  planning  not planned yet")
    assert last.startswith(f"{batch_id} succeeded after ")


def test_watch_gives_json_lines_and_the_last_is_the_end(desk: Desk) -> None:
    batch_id = desk.enqueue("work", "--item", "a")
    lines = [json.loads(line) for line in watched(desk, batch_id, "--json")]
    assert [lines[0]["state"], lines[-1]["state"]] == ["planning", "succeeded"]
    assert len({json.dumps(line) for line in lines}) == len(lines)


def watched(desk: Desk, *words: str) -> list[str]:
    """The lines of `watch`, while a worker begins to work after the first."""
    process = desk.spawn("watch", *words, stdout=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.readline()
    with working(desk):
        out, _ = process.communicate(timeout=LONG)
    assert process.returncode == 0
    return (first + out).decode().splitlines()


def test_waiting_with_json_gives_one_document(desk: Desk) -> None:
    with working(desk):
        batch = desk.ok("enqueue", "work", "--item", "a", "--wait", "--json").json
    assert batch["state"] == "succeeded"


def test_watch_says_what_failed_and_when_it_is_tried_again(desk: Desk) -> None:
    again = "retry: {attempts: 2, initial: 1h, max: 1h, jitter: false}"
    desk.jobs.write_text(desk.jobs.read_text().replace("retry: {attempts: 1}", again, 1))
    desk.world.script = lambda *_: Ending(Outcome.FAILED, exit_code=3, reason="no such table")
    batch_id = desk.enqueue("work", "--item", "a")
    desk.lead()
    waits = "SELECT 1 FROM dispatcher.chunk WHERE state = 'pending' AND outcome = 'failed'"
    until(lambda: (desk.turn(), desk.sql(waits))[1], "a chunk that failed")
    process = desk.spawn("watch", batch_id, stdout=subprocess.PIPE)
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LONG)
    assert "running  0/1 chunks: 1 pending; retry of chunk 0 at " in line
    assert line.endswith(
        "Z: failed with exit code 3; retry in 1h, 1 of 2 attempts used: no such table\n"
    )


def test_interrupting_watch_says_that_the_batch_goes_on(desk: Desk) -> None:
    batch_id = desk.enqueue("work", "--item", "a")
    process = desk.spawn("watch", batch_id, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().endswith(b"not planned yet\n")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 130
    assert err.decode() == (
        f"batch {batch_id} goes on; `dispatcher watch {batch_id}` follows it, "
        f"`dispatcher cancel {batch_id}` ends it\n"
    )


def test_interrupting_a_cancel_says_that_it_stands(desk: Desk) -> None:
    desk.world.script = lambda *_: Ending(seconds=600)
    batch_id = desk.enqueue("work", "--item", "a")
    desk.lead()
    until(lambda: (desk.turn(), desk.world.running())[1], "a running chunk")
    process = desk.spawn(
        *("cancel", batch_id, "--wait"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert b"1 running" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 130
    assert err.decode() == f"the cancel of batch {batch_id} stands and goes on\n"


class working:  # noqa: N801 - reads as a word
    """A worker at work in another thread."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        while not self._stop.wait(0.02):
            self._desk.turn()

    def __enter__(self) -> None:
        self._desk.lead()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


# --- reading --------------------------------------------------------------------------------------


def failed_batch(desk: Desk, *, chunks: int = 3, bad: int = 1) -> str:
    """A batch whose first chunks have failed, with the last lines of their output."""
    desk.world.script = lambda _batch, chunk, _attempt: (
        Ending(Outcome.FAILED, exit_code=9, seconds=0.0, output=("one", "the table is locked"))
        if chunk < bad
        else Ending()
    )
    words = [word for number in range(chunks) for word in ("--item", str(number))]
    batch_id = desk.enqueue("work", *words, "--key", "nightly", "--label", "team=blue")
    desk.finish(batch_id)
    return batch_id


def test_batches_are_listed_newest_first_and_filtered(desk: Desk) -> None:
    old = desk.enqueue("work", "--item", "a")
    new = desk.enqueue("measured", "--item", '{"bytes": 1}')
    out = desk.ok("batches").out.splitlines()
    assert out[0].split() == ["BATCH", "JOB", "STATE", "PROGRESS", "ENQUEUED", "BY", "REASON"]
    assert [line.split()[0] for line in out[1:]] == [new, old]
    assert "ann@desk" in out[1]

    def ids(*words: str) -> list[str]:
        return [batch["id"] for batch in desk.ok("batches", *words, "--json").json]

    assert ids("--job", "work") == [old]
    assert ids("--limit", "1") == [new]
    assert ids("--since", "1h") == [new, old]
    assert ids("--since", "2999-01-01") == []
    assert ids("--state", "planning") == [new, old]
    assert desk.ok("batches", "--state", "failed").err == "no batches\n"


def test_show_names_what_failed_with_its_log_and_where_it_ran(desk: Desk) -> None:
    batch_id = failed_batch(desk)
    ran = desk.ok("show", batch_id[:5])
    head, table, log = ran.out.split("\n\n")
    assert f"batch     {batch_id} (key nightly)\n" in head
    assert "job       work on target nowhere\n" in head
    assert "reason    1 of 3 chunks failed: failed with exit code 9; 1 of 1 attempts used" in head
    assert "progress  3/3 chunks: 2 succeeded, 1 failed\n" in head
    assert " by ann@desk\n" in head
    assert "labels    team=blue" in head
    titles, first, *_ = table.splitlines()
    assert titles.split() == [
        *("CHUNK", "STATE", "ITEMS", "ATTEMPT", "OUTCOME", "EXIT", "TOOK", "WHERE", "REASON")
    ]
    handle = desk.world.handles()[0]
    assert first.split()[:6] == ["0", "failed", "1", "1", "failed", "9"]
    assert f"  {handle}  failed with exit code 9; 1 of 1 attempts used" in first
    assert log == "chunk 0, attempt 1, last lines:\n  | one\n  | the table is locked\n"
    assert ran.err == f"`dispatcher logs {batch_id}/CHUNK` shows more\n"


def test_show_gives_all_of_it_as_one_document(desk: Desk) -> None:
    batch_id = failed_batch(desk)
    shown = desk.ok("show", batch_id, "--json").json
    assert shown["counts"]["failed"] == 1
    first, second, _ = shown["chunks"]
    assert list(first) == [
        *("index", "state", "size", "weight", "due_at", "outcome", "reason", "finished_at"),
        "items_ok",
        "parent",
        "attempts",
    ]
    assert first["attempts"][0]["exit_code"] == 9
    assert first["attempts"][0]["log_tail"] == ["one", "the table is locked"]
    assert second["attempts"][0]["outcome"] == "succeeded"
    only = desk.ok("show", batch_id, "--failed", "--json").json
    assert [chunk["index"] for chunk in only["chunks"]] == [0]


def test_show_lists_failures_of_a_big_batch_first(desk: Desk) -> None:
    desk.world.script = lambda _batch, chunk, _attempt: Ending(
        Outcome.FAILED if chunk in {57, 58} else Outcome.SUCCEEDED
    )
    (desk.folder / "items.txt").write_text("x\n" * 60)
    batch_id = desk.enqueue("work", "--items", "items.txt")
    desk.finish(batch_id)
    ran = desk.ok("show", batch_id)
    rows = ran.out.split("\n\n")[1].splitlines()[1:]
    assert [row.split()[0] for row in rows[:3]] == ["57", "58", "0"]
    assert len(rows) == 50
    assert "50 of 60 chunks are shown, troubled ones first; --all shows all\n" in ran.err
    assert len(desk.ok("show", batch_id, "--all").out.split("\n\n")[1].splitlines()) == 61
    assert len(desk.ok("show", batch_id, "--failed").out.split("\n\n")[1].splitlines()) == 3


def test_show_says_so_where_nothing_failed(desk: Desk) -> None:
    batch_id = desk.enqueue("work", "--item", "a")
    desk.finish(batch_id)
    assert desk.ok("show", batch_id, "--failed").err == "no chunk has failed\n"
    shown = desk.ok("show", batch_id, "--items").out.splitlines()[-2:]
    assert [line.split() for line in shown] == [
        ["CHUNK", "ITEM", "STATE", "ATTEMPT", "VALUE", "OUTPUT", "OR", "ERROR"],
        ["0", "0", "succeeded", "1", '"a"'],
    ]


def test_a_chunk_that_waits_for_its_retry_counts_as_troubled(desk: Desk) -> None:
    desk.jobs.write_text(
        JOBS.replace("SPOOL", "spool").replace(
            "{attempts: 1}", "{attempts: 2, initial: 99s, max: 99s, jitter: false}", 1
        )
    )
    desk.world.script = lambda *_: Ending(Outcome.FAILED)
    batch_id = desk.enqueue("work", "--item", "a")
    desk.lead()
    until(
        lambda: (desk.turn(), desk.sql("SELECT 1 FROM dispatcher.chunk WHERE outcome = 'failed'"))[
            1
        ],
        "a first failure",
    )
    [chunk] = desk.ok("show", batch_id, "--failed", "--json").json["chunks"]
    assert chunk["state"] == "pending"
    due = re.search(r"A retry of chunk 0 is due in (\d+) s ", desk.ok("explain", batch_id).out)
    assert due is not None
    assert 0 < int(due[1]) <= 99


def test_what_a_container_wrote_cannot_move_the_cursor(desk: Desk) -> None:
    desk.world.script = lambda *_: Ending(Outcome.FAILED, output=("\x1b[2Jgone\ttab",))
    batch_id = desk.enqueue("work", "--item", "a")
    desk.finish(batch_id)
    out = desk.ok("show", batch_id).out
    assert "\x1b" not in out
    assert "| \\x1b[2Jgone    tab\n" in out


def test_logs_are_read_where_the_chunk_ran(desk: Desk) -> None:
    batch_id = desk.enqueue("shout", "--item", "a")
    desk.finish(batch_id)
    assert desk.ok("logs", f"{batch_id}/0").out == "hello from 1\n--- stderr ---\nwoe\n"
    told = desk.ok("logs", f"{batch_id}/0", "--attempt", "1", "--tail", "1", "--json").json
    assert list(told) == [
        *("batch", "chunk", "attempt", "handle", "console_url", "logs_url", "source", "problem"),
        "lines",
    ]
    assert (told["source"], told["lines"][-1]) == ("backend", "woe")


def test_logs_on_another_host_are_what_was_kept(desk: Desk) -> None:
    batch_id = desk.enqueue("shout", "--item", "a")
    desk.finish(batch_id)
    desk.sql("""UPDATE dispatcher.target SET home = '{"host": "far"}' WHERE name = 'here'""")
    ran = desk.ok("logs", f"{batch_id}/0")
    assert "hello from 1\n" in ran.out
    assert ran.err == (
        f"the output is on host far and this is {socket.gethostname()}: run this command there; "
        "above is what was kept when it failed\n"
    )
    desk.sql("UPDATE dispatcher.attempt SET log_tail = NULL")
    assert desk.run("logs", f"{batch_id}/0").code == 1


def test_logs_of_a_target_that_is_not_configured_are_what_was_kept(desk: Desk) -> None:
    batch_id = failed_batch(desk)
    desk.jobs.write_text("targets: {}\n")
    ran = desk.ok("logs", f"{batch_id}/0")
    assert ran.out == "one\nthe table is locked\n"
    assert ran.err.startswith(f"target nowhere is not configured in {desk.jobs}; above is")
    ran = desk.ok("logs", f"{batch_id}/0", DISPATCHER_JOBS=None)
    assert ran.err.startswith("the target cannot be asked: no jobs are configured")


def test_logs_of_a_chunk_that_wrote_nothing_say_so(desk: Desk) -> None:
    batch_id = desk.enqueue("work", "--item", "a")
    desk.finish(batch_id)
    ran = desk.ok("logs", f"{batch_id}/0")
    assert (ran.out, ran.err) == ("", f"attempt 1 of chunk {batch_id}/0 has written nothing\n")


def test_logs_that_the_provider_does_not_give_now_exit_with_4(desk: Desk) -> None:
    batch_id = desk.enqueue("work", "--item", "a")
    desk.finish(batch_id)
    desk.world.fail_next("logs", Fault.UNAVAILABLE)
    ran = desk.run("logs", f"{batch_id}/0")
    assert (ran.code, ran.err) == (
        4,
        "the output cannot be read: scripted fault of logs: unavailable\n",
    )


def test_explain_says_why_in_words_and_as_json(desk: Desk) -> None:
    batch_id = desk.enqueue("work", "--item", "a")
    ran = desk.ok("explain", batch_id)
    assert ran.out.startswith("Nothing moves: no worker has ever been alive; start one. ")
    told = desk.ok("explain", batch_id, "--json").json
    assert list(told) == ["text", "batch", "chunk", "state", "at", "reasons"]
    assert told["reasons"][0]["code"] == "no_worker"
    desk.finish(batch_id)
    assert desk.ok("explain", f"{batch_id[:8]}/0").out.startswith("Chunk 0 succeeded ")


def test_audit_tells_who_ran_what_with_which_params(desk: Desk) -> None:
    batch_id = desk.enqueue(
        "measured", "--item", '{"bytes": 1}', "--param", "month=May", "--param", "password=xyzzy"
    )
    desk.finish(batch_id)
    lines = desk.ok("audit", batch_id, "--json").lines
    assert list(lines[0]) == [
        *("id", "at", "actor", "kind", "batch", "chunk", "attempt", "execution", "old", "new"),
        *("reason", "subject"),
    ]
    assert lines[0]["subject"] == {
        "job": "measured",
        "target": "nowhere",
        "params": {"month": "May", "password": "***"},
        "labels": {},
        "key": None,
    }
    intent = next(line for line in lines if line["new"] == "intended")
    assert intent["subject"]["request"]["command"] == ["work"]
    assert intent["subject"]["request"]["args"] == ["May"]
    launched = next(line for line in lines if line["new"] == "launched")
    assert launched["subject"]["handle"] == desk.world.handles()[0]
    text = desk.ok("audit").out
    assert f"  ann@desk  batch {batch_id}  new → planning  job=measured target=nowhere" in text
    assert f"  worker-1  chunk {batch_id}/0 attempt 1  running → succeeded" in text
    assert f"  execution {intent['execution']} of {batch_id}  new → intended  " in text
    assert "xyzzy" not in text
    assert desk.ok("audit", "--since", "2999-01-01").out == ""
    assert desk.ok("audit", "--until", "1h").out == ""


def test_jobs_are_listed_with_how_they_run(desk: Desk) -> None:
    out = desk.ok("jobs").out
    line = next(line for line in out.splitlines() if line.startswith("measured"))
    assert line.split("  ")[0] == "measured"
    assert "max_items 2, balance_by bytes" in line
    assert line.endswith("chunks of much the same weight")
    listed = desk.ok("jobs", "--json").json
    assert [job["name"] for job in listed] == ["work", "measured", "shout", "missing"]
    assert listed[1]["timeout"] == "1h"
    # No database is needed to read a file.
    assert desk.ok("jobs", "--jobs", str(desk.jobs), DISPATCHER_DATABASE_URL=None).out == out


def test_an_installation_without_jobs_says_so(desk: Desk) -> None:
    desk.jobs.write_text("targets: {}\n")
    assert desk.ok("jobs").err == f"no jobs in {desk.jobs}\n"
    assert desk.refused("jobs", DISPATCHER_JOBS="").startswith("error: no jobs are configured: ")


# --- acting ---------------------------------------------------------------------------------------


def test_retry_runs_again_what_failed_or_everything(desk: Desk) -> None:
    batch_id = failed_batch(desk)
    ran = desk.ok("retry", batch_id)
    assert ran.out == f"{batch_id} running: 1 chunk due again\n"
    desk.finish(batch_id)
    assert desk.ok("retry", batch_id, "--all", "--json").json["counts"]["pending"] == 3


def test_a_batch_that_was_never_planned_is_planned_again(desk: Desk) -> None:
    batch_id = desk.enqueue("measured", "--item", "7")
    desk.turn()
    assert desk.ok("retry", batch_id).out == f"{batch_id} planning: to be planned again\n"


def test_a_running_batch_is_not_retried(desk: Desk) -> None:
    batch_id = desk.enqueue("work", "--item", "a")
    assert desk.refused("retry", batch_id, code=1) == (
        f"error: batch {batch_id} is planning: failed chunks are retried by its policy while it "
        "runs; wait for its end, or cancel it first"
    )


def test_cancel_asks_and_with_wait_sees_it_done(desk: Desk) -> None:
    desk.world.script = lambda *_: Ending(seconds=600)
    batch_id = desk.enqueue("work", "--item", "a")
    desk.lead()
    until(lambda: (desk.turn(), desk.world.running())[1], "a running chunk")
    ran = desk.ok("cancel", batch_id, "--reason", "wrong month")
    assert ran.out == (
        f"{batch_id} running: its cancel is asked for; 1 chunk still runs and is being stopped\n"
    )
    with working(desk):
        ran = desk.ok("cancel", batch_id, "--wait")
    assert f"{batch_id} cancelled after " in ran.out
    assert ran.out.endswith("1/1 chunks: 1 cancelled; wrong month\n")
    assert desk.ok("cancel", batch_id, "--json").json["state"] == "cancelled"


def test_a_cancel_that_came_too_late_exits_with_1(desk: Desk) -> None:
    batch_id = desk.enqueue("work", "--item", "a")
    desk.finish(batch_id)
    ran = desk.run("cancel", batch_id)
    assert (ran.code, ran.err) == (
        1,
        f"batch {batch_id} had succeeded before it could be cancelled\n",
    )


# --- check ----------------------------------------------------------------------------------------


def test_check_says_what_is_wrong_and_what_to_do(desk: Desk) -> None:
    ran = desk.run("check")
    assert ran.code == 1
    lines = ran.out.splitlines()
    assert lines[0] == "ok    settings  events will name ann@desk"
    assert lines[1].endswith(f"answers, at revision {schema.REVISION}")
    assert lines[2].startswith("warn  broker    DISPATCHER_BROKER_URL is not set: ")
    assert "ok    job work  can run on target nowhere" in lines
    missing = next(line for line in lines if "no-such-program" in line)
    assert missing.startswith("fail  job missing")
    assert "fail  workers   none has been alive for 60 s: nothing moves" in lines
    assert any(
        line.startswith("                → start one, as the Procfile says") for line in lines
    )


def test_check_is_content_with_an_installation_that_works(desk: Desk, valkey: str) -> None:
    desk.jobs.write_text(desk.jobs.read_text().split("  missing:")[0])
    desk.lead()
    # The worker counts as heard of for as long as its lease would last.
    told = desk.ok("check", "--json", DISPATCHER_BROKER_URL=valkey, DISPATCHER_LEASE="59s").json
    assert told["ok"]
    assert {check["level"] for check in told["checks"]} == {"ok"}
    assert [check["name"] for check in told["checks"]] == [
        *(
            "settings",
            "database",
            "broker",
            "storage",
            "jobs",
            "job work",
            "job measured",
            "job shout",
        ),
        *("workers", "target nowhere", "target here"),
    ]
    assert list(told["checks"][0]) == ["name", "level", "text", "todo", "unreachable"]


def test_check_names_targets_that_nobody_serves_or_that_are_down(desk: Desk) -> None:
    no_job = '  far: {backend: "null"}\njobs:\n'
    desk.jobs.write_text(desk.jobs.read_text().replace("jobs:\n", no_job))
    desk.lead()
    store = desk.engine.store
    store.target_down("far", "connection refused", resume_in=None)
    desk.sql(
        "UPDATE dispatcher.target SET lease_until = now(), lease_owner = NULL WHERE name = 'here'"
    )
    ran = desk.run("check")
    assert ran.code == 4
    assert "does not answer since 20" in ran.out
    assert "nobody serves it: no worker that is alive has it in its jobs file\n" in ran.out


def test_check_says_what_it_saw_of_a_target_that_did_not_answer_the_workers(desk: Desk) -> None:
    desk.jobs.write_text(desk.jobs.read_text().split("  missing:")[0])
    desk.lead()
    desk.engine.store.target_down("nowhere", "connection refused", resume_in=None)
    said = desk.ok("check").out
    assert (
        "warn  target nowhere answers this check; the workers have had no answer since 20" in said
    )
    assert "→ they say so until their next call there is answered" in said


def test_a_worker_that_fell_silent_is_the_reason_that_nobody_serves_its_targets(
    desk: Desk,
) -> None:
    batch_id = desk.enqueue("work", "--item", "a")
    desk.lead()
    desk.sql("UPDATE dispatcher.worker SET heartbeat_at = now() - interval '30 s'")
    desk.sql("UPDATE dispatcher.target SET lease_until = now() - interval '15 s'")
    said = desk.run("check").out
    assert "warn  workers   1 may be alive: worker-1 (not heard of for 3" in said
    assert "target nowhere nobody serves it now: its worker worker-1 has not been heard of" in said
    assert "jobs file of" not in said
    assert "the same DISPATCHER_JOBS" not in said
    told = desk.ok("explain", batch_id).out
    assert "Nobody serves target nowhere now: its worker worker-1 has not been heard of" in told
    assert "takes over within seconds" in told


SCHEDULE = """
schedules:
  nightly: {cron: "0 HOUR * * *", job: work, items: nightly.txt}
"""


def test_check_tells_of_a_schedule_that_cannot_be_fired_and_of_its_last_time(desk: Desk) -> None:
    # Half a day from now: it is not due while this test runs.
    schedule = SCHEDULE.replace("HOUR", str((datetime.now(UTC).hour + 12) % 24))
    desk.jobs.write_text(desk.jobs.read_text().split("  missing:")[0] + schedule)
    desk.lead()

    def said() -> str:
        lines = desk.run("check").out.splitlines()
        [place] = [at for at, line in enumerate(lines) if "schedule nightly" in line]
        return "\n".join(lines[place : place + 2])

    assert "fail  schedule nightly cannot be fired: cannot read items from nightly.txt: " in said()
    assert "; no worker has met it yet; next due in " in said()
    assert desk.run("check").code == 1
    desk.engine.fire()
    assert "; not due yet since workers met it " in said()
    # As if it had been due in between.
    desk.sql(
        "UPDATE dispatcher.schedule_firing SET due_at = now() - interval '2 days 1 minute 30 s'"
    )
    desk.engine.fire()
    assert ", and no batch: cannot read items from nightly.txt: No such file" in said()
    # Where the workers are elsewhere, so may the file be.
    desk.sql("UPDATE dispatcher.worker SET host = 'far'")
    assert said().startswith("warn  schedule nightly cannot be fired: ")
    desk.lead()
    (desk.folder / "nightly.txt").write_text("a\n")
    assert said().startswith("warn  schedule nightly last due ")
    assert desk.run("check").code == 0
    desk.sql("UPDATE dispatcher.schedule_firing SET due_at = due_at - interval '40 days'")
    [batch_id] = desk.engine.fire()
    assert said().startswith("ok    schedule nightly last due ")
    assert f": batch {batch_id}; next due in " in said()


def test_check_leaves_a_job_to_the_only_host_that_can_run_it(desk: Desk) -> None:
    desk.lead()
    desk.sql("""UPDATE dispatcher.target SET home = '{"host": "far"}' WHERE name = 'here'""")
    assert "not looked at: only host far can serve target here" in desk.run("check").out


def test_check_of_wrong_settings_and_of_a_wrong_file(desk: Desk) -> None:
    ran = desk.run("check", DISPATCHER_LEASE="soon")
    assert (ran.code, ran.out.split("  ")[0]) == (1, "fail")
    desk.jobs.write_text("jobs: 7\n")
    assert "fail  jobs" in desk.run("check").out
    assert "warn  jobs      DISPATCHER_JOBS is not set" in desk.run("check", DISPATCHER_JOBS="").out


def test_check_of_servers_that_do_not_answer_exits_with_4(desk: Desk, dead_port: int) -> None:
    port = dead_port
    ran = desk.run(
        "check",
        DISPATCHER_DATABASE_URL=f"postgresql://u:secret@127.0.0.1:{port}/x",
        DISPATCHER_BROKER_URL=f"redis://:secret@127.0.0.1:{port}/0",
    )
    assert ran.code == 4
    assert "cannot reach the database at postgresql+psycopg://u:***@127.0.0.1:" in ran.out
    assert "cannot reach the broker at redis://:***@127.0.0.1:" in ran.out
    assert "secret" not in ran.out
    # One of them is enough.
    assert desk.run("check", DISPATCHER_BROKER_URL=f"redis://127.0.0.1:{port}/0").code == 4


def test_the_health_check_of_a_container_looks_for_a_worker_of_this_host(
    desk: Desk, dead_port: int
) -> None:
    ran = desk.run("check", "--worker")
    assert ran.code == 1
    assert f"no worker on host {socket.gethostname()} has been alive for 60 s" in ran.out
    far = Store(desk.engine.store.engine, actor="worker-2")
    far.beat(host="elsewhere", pid=1, version="0.1.0", problems={})
    assert desk.run("check", "--worker").code == 1
    desk.lead()
    assert desk.ok("check", "--worker").out == "ok    worker    worker-1 is alive\n"
    assert desk.run("check", "--worker", DISPATCHER_LEASE="soon").code == 1
    nowhere = f"postgresql://127.0.0.1:{dead_port}/x"
    assert desk.run("check", "--worker", "--database-url", nowhere).code == 4


def test_a_standalone_without_its_jobs_file_is_refused(desk: Desk) -> None:
    said = desk.refused("standalone", "--dir", "place", "--jobs", "gone.yaml")
    assert said.startswith("error: ")
    assert "gone.yaml" in said
    assert not (desk.folder / "place").exists()


@pytest.mark.parametrize("words", [("batches",), ("check",)])
def test_a_misspelt_setting_is_told_beside_the_output(desk: Desk, words: tuple[str, ...]) -> None:
    ran = desk.run(*words, "--json", DISPATCHER_LAESE="3s")
    assert json.loads(ran.out) is not None
    assert ran.err.startswith(
        "warning: DISPATCHER_LAESE is no setting and is ignored: did you mean DISPATCHER_LEASE?\n"
    )


def test_a_standalone_without_jobs_is_refused_in_a_line(desk: Desk) -> None:
    desk.settings["DISPATCHER_JOBS"] = None
    assert desk.refused("standalone", "--dir", "place") == (
        "error: no jobs are configured: give --jobs or set DISPATCHER_JOBS, to a YAML file or a "
        "Python module"
    )
    assert not (desk.folder / "place").exists()


# --- the tables -----------------------------------------------------------------------------------


def test_the_tables_go_up_and_down(desk: Desk) -> None:
    assert (
        desk.ok("db", "check").out
        == f"the database is at revision {schema.REVISION}, which fits this code\n"
    )
    assert (
        desk.ok("db", "upgrade").out == f"the database was at revision {schema.REVISION} already\n"
    )
    assert desk.ok("db", "downgrade", "base", "--yes").out == (
        f"the database is at revision none; it was at {schema.REVISION}\n"
    )
    told = desk.run("db", "check", "--json")
    assert told.code == 1
    assert told.json == {
        "ok": False,
        "revision": None,
        "needed": schema.REVISION,
        "problem": f"the database is at revision none and this code needs {schema.REVISION}: run "
        "`dispatcher db upgrade`",
    }
    assert desk.ok("db", "upgrade", "--json").json == {"revision": schema.REVISION, "was": None}
    assert desk.ok("db", "check", "--json").json["ok"]


def test_a_downgrade_asks_somebody_or_does_nothing(desk: Desk) -> None:
    said = desk.refused("db", "downgrade", "base")
    assert said.endswith("Nobody is there to ask: give --yes to say so")
    assert desk.ok("db", "check").code == 0
    assert desk.refused("db", "downgrade", "0099", "--yes") == (
        'error: "0099" is no revision of this code; known: base (no tables at all), '
        "0001, 0002, 0003, 0004, 0005"
    )


def test_a_database_of_newer_code_is_left_alone(desk: Desk) -> None:
    desk.sql("UPDATE dispatcher.alembic_version SET version_num = '0099'")
    for words in (("db", "upgrade"), ("db", "downgrade", "0001", "--yes")):
        assert desk.refused(*words, code=1) == (
            f"error: the database is at revision 0099 and this code knows {schema.REVISION} at "
            "most: use the "
            "newer dispatcher that brought it there"
        )


# --- bad input, word by word ----------------------------------------------------------------------


def test_an_unknown_job(desk: Desk) -> None:
    assert desk.refused("enqueue", "wrok", "--item", "a") == (
        f'error: no job "wrok" is configured in {desk.jobs}; configured: measured, missing, shout, '
        'work (did you mean "work"?)'
    )


def test_an_unknown_key_in_the_jobs_file(desk: Desk) -> None:
    desk.jobs.write_text(JOBS.replace("SPOOL", "spool").replace("description:", "descripton:"))
    said = desk.refused("enqueue", "work", "--item", "a")
    assert said.startswith(
        f"error: {desk.jobs}: jobs.measured.descripton is not a known key; allowed: args, "
    )
    assert said.endswith('(did you mean "description"?)')


def test_a_wrong_type_in_the_jobs_file(desk: Desk) -> None:
    desk.jobs.write_text(
        JOBS.replace("SPOOL", "spool").replace("max_running: 100", "max_running: x")
    )
    assert desk.refused("jobs") == (
        f'error: {desk.jobs}: targets.nowhere.max_running is "x"; it must be an integer'
    )


def test_a_key_of_another_request(desk: Desk) -> None:
    batch_id = desk.enqueue("work", "--item", "a", "--key", "nightly")
    assert desk.enqueue("work", "--item", "a", "--key", "nightly") == batch_id
    said = desk.refused("enqueue", "work", "--item", "b", "--key", "nightly")
    assert said == (
        f'error: key "nightly" belongs to batch {batch_id}, a different request: items: 1 item '
        "there and here, but not the same in the same order. Use another key for another request"
    )


def test_a_file_of_items_that_there_is_not(desk: Desk) -> None:
    assert desk.refused("enqueue", "work", "--items", "gone.jsonl") == (
        "error: cannot read items from gone.jsonl: No such file or directory"
    )


def test_an_item_that_is_given_as_a_file(desk: Desk) -> None:
    said = (
        "error: --items 'order-7' does not say what it holds: a file of items ends in one of "
        ".jsonl, .ndjson, .csv, .txt, .lines, and .gz may follow. An item itself is given with "
        "--item"
    )
    assert desk.refused("enqueue", "work", "--items", "order-7") == said
    assert desk.refused("enqueue", "work", "--items", "order-7", "--dry-run") == said


def test_a_file_of_items_that_is_not_jsonl(desk: Desk) -> None:
    (desk.folder / "items.jsonl").write_text('{"a": 1}\n{broken\n')
    assert desk.refused("enqueue", "work", "--items", "items.jsonl") == (
        "error: items.jsonl:2 is not JSON: key must be a string at column 2; it starts with "
        "'{broken'. Each line must hold one JSON value"
    )
    assert desk.refused("enqueue", "work", "--items", "-", typed='"a"\nb\n').startswith(
        "error: standard input:2 is not JSON: expected value at column 1; it starts with 'b'."
    )


def test_an_empty_file_of_items(desk: Desk) -> None:
    (desk.folder / "items.jsonl").write_text("\n")
    assert desk.refused("enqueue", "work", "--items", "items.jsonl") == (
        "error: items.jsonl has no items; a batch of none can be enqueued from Python only, with "
        "an empty list"
    )


def test_an_item_that_is_too_large(desk: Desk) -> None:
    (desk.folder / "items.txt").write_text("x" * (1 << 20) + "x")
    assert desk.refused("enqueue", "work", "--items", "items.txt") == (
        "error: items.txt:1 is longer than 1,048,576 bytes, the limit for an item: put the data "
        "into storage and let the item name it"
    )
    assert desk.refused("enqueue", "work", "--item", "y" * (1 << 20)) == (
        "error: item 0 is 1,048,578 bytes as JSON and an item may have 1,048,576: put the data "
        "into storage and let the item name it"
    )


def test_a_command_that_is_not_there_or_not_executable(desk: Desk) -> None:
    batch_id = desk.enqueue("missing", "--item", "a")
    desk.finish(batch_id)
    [chunk] = desk.ok("show", batch_id, "--json").json["chunks"]
    assert chunk["outcome"] == "rejected"
    assert "no-such-program" in chunk["reason"]
    (desk.folder / "plain").write_text("")
    desk.jobs.write_text(
        JOBS.replace("SPOOL", str(desk.folder / "spool")).replace(
            "no-such-program", str(desk.folder / "plain")
        )
    )
    batch_id = desk.enqueue("missing", "--item", "a")
    desk.finish(batch_id)
    assert "not executable" in desk.ok("show", batch_id, "--json").json["chunks"][0]["reason"]


def test_a_database_that_is_down(desk: Desk, dead_port: int) -> None:
    url = f"postgresql://ann:secret@127.0.0.1:{dead_port}/shop"
    for words in (
        ("enqueue", "work", "--item", "a"),
        ("batches",),
        ("explain", "abc"),
        ("db", "upgrade"),
        ("db", "check"),
    ):
        said = desk.refused(*words, "--database-url", url, code=4)
        assert said.startswith(
            "error: cannot reach the database at "
            f"postgresql+psycopg://ann:***@127.0.0.1:{dead_port}/shop"
            ": "
        )
        assert said.endswith("Is Postgres running, and is DISPATCHER_DATABASE_URL right?")
        assert "secret" not in said


def test_a_broker_that_is_down_is_in_nobodys_way(desk: Desk, dead_port: int) -> None:
    broker = f"redis://127.0.0.1:{dead_port}/0"
    ran = desk.ok("enqueue", "work", "--item", "a", DISPATCHER_BROKER_URL=broker)
    desk.finish(ran.out.strip())
    assert desk.ok("show", ran.out.strip(), "--json").json["state"] == "succeeded"


def test_a_database_that_was_never_migrated_or_is_behind(desk: Desk) -> None:
    desk.ok("db", "downgrade", "base", "--yes")
    for words in (("enqueue", "work", "--item", "a"), ("batches",), ("check", "--worker")):
        ran = desk.run(*words)
        assert ran.code == 1
        assert (
            f"the database is at revision none and this code needs {schema.REVISION}: run "
            "`dispatcher db upgrade`" in ran.out + ran.err
        )


def test_a_database_ahead_that_still_supports_this_code_is_used(desk: Desk) -> None:
    desk.sql("UPDATE dispatcher.alembic_version SET version_num = '0099'")
    assert desk.enqueue("work", "--item", "a")
    assert f"newer than this code's {schema.REVISION}" in desk.run("check").out
    desk.sql("UPDATE dispatcher.installation SET oldest_code = 99")
    assert desk.refused("enqueue", "work", "--item", "a", code=1) == (
        "error: the database is at revision 0099 and supports code version 99 or newer; this is "
        f"version {schema.CODE_VERSION}: install a newer dispatcher here"
    )


def test_settings_that_are_missing_or_wrong(desk: Desk) -> None:
    assert desk.refused("batches", DISPATCHER_DATABASE_URL="").startswith(
        "error: DISPATCHER_DATABASE_URL is not set, and no standalone is running here (no "
    )
    assert desk.refused("batches", "--database-url", "mysql://x").startswith(
        "error: the argument database_url is "
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("show", "zzz"), 'no batch "zzz"; `dispatcher batches` lists them'),
        (
            ("explain", "abc/x"),
            (
                '"abc/x" names no chunk; write BATCH/CHUNK with the chunk\'s number from 0, such '
                "as abc/0"
            ),
        ),
        (("logs", "abc"), '"abc" is a batch; name one of its chunks, such as abc/0'),
        (("batches", "--label", "team"), '--label is "team"; it must be NAME=VALUE'),
        (
            ("enqueue", "measured", "--param", "month=1", "--param", "month=2"),
            "--param month is given twice; leave one out",
        ),
        (
            ("enqueue", "work", "--item", "a", "--items", "b.txt"),
            "--items and --item are both given; use one of them",
        ),
        (
            ("audit", "--since", "yesterday"),
            (
                '"yesterday" is not a time; write a date or time such as 2025-11-20 or '
                "2025-11-20T06:00:00Z (UTC if no zone is given), or how long ago, such as 90m or 2d"
            ),
        ),
        (
            ("batches", "--state", "done"),
            'state is "done"; it must be one of planning, running, succeeded, failed, cancelled',
        ),
    ],
)
def test_what_is_asked_for_wrongly(desk: Desk, words: tuple[str, ...], said: str) -> None:
    assert desk.refused(*words) == f"error: {said}"


def test_a_prefix_of_two_batches_names_both(desk: Desk) -> None:
    for letter in "ab":
        made = desk.enqueue("work", "--item", letter)
        desk.sql("DELETE FROM dispatcher.item_page")
        desk.sql("UPDATE dispatcher.batch SET id = %s WHERE id = %s", f"qq{letter}", made)
    assert desk.refused("show", "qq") == (
        'error: more than one batch begins with "qq": qqa, qqb; give more of the id'
    )


def test_chunks_and_attempts_that_there_are_not(desk: Desk) -> None:
    batch_id = desk.enqueue("work", "--item", "a")
    assert desk.refused("logs", f"{batch_id}/0") == (
        f"error: batch {batch_id} has no chunk 0: it has none, and is planning"
    )
    desk.engine.plan(batch_id)
    assert desk.refused("logs", f"{batch_id}/0") == (
        f"error: chunk {batch_id}/0 is pending and has no attempt yet; "
        f"`dispatcher explain {batch_id}/0` says why"
    )
    desk.finish(batch_id)
    assert desk.refused("logs", f"{batch_id}/0", "--attempt", "4") == (
        f"error: chunk {batch_id}/0 has no attempt 4; it has 1 to 1"
    )


def test_unknown_words_are_refused_with_usage(desk: Desk) -> None:
    ran = desk.run("enqeue")
    assert ran.code == 2
    assert "No such command 'enqeue'" in ran.err
    assert desk.run("show").code == 2
    assert desk.run("enqueue", "work", "--chunk-size", "0").code == 2


# --- errors of our own ----------------------------------------------------------------------------


def test_no_traceback_reaches_a_user_unless_it_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken() -> int:
        raise RuntimeError("first line\nsecond line")

    assert guarded(Scope(), broken) == 1
    assert capsys.readouterr().err == (
        "internal error: RuntimeError: first line (run again with --debug)\n"
    )
    assert guarded(Scope(debug=True), broken) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):")
    assert said.endswith("internal error: RuntimeError: first line\n")


def test_debug_shows_where_an_error_came_from(desk: Desk) -> None:
    process = desk.spawn("show", "zzz", "--debug", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said, errors = (stream.decode() for stream in process.communicate(timeout=LONG))
    assert (process.returncode, said) == (2, "")
    assert errors.startswith("Traceback (most recent call last):")
    assert errors.endswith('error: no batch "zzz"; `dispatcher batches` lists them\n')


def test_a_reader_that_goes_away_is_no_error(desk: Desk) -> None:
    (desk.folder / "items.txt").write_text("x\n" * 20_000)
    batch_id = desk.enqueue("work", "--items", "items.txt")
    desk.engine.plan(batch_id)
    process = desk.spawn("audit", batch_id, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(timeout=LONG) == 0
    process.stderr.close()


# --- terminals ------------------------------------------------------------------------------------


def on_a_terminal(
    desk: Desk, *words: str, width: int = 80, then: Callable[[], None] | None = None, **more: str
) -> tuple[int, str]:
    """Run a command on a terminal of some width; its exit code and all that it showed.

    `then` is called once it shows a batch, with `more` as further variables of the environment.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "dispatcher", *words],
        env={**desk.environment(), "TERM": "xterm-256color", **more},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 65536):
            shown += block
            if then is not None and b"planning" in shown:
                then()
                then = None
    except OSError:  # Linux says so that the other end is closed
        pass
    os.close(ours)
    return process.wait(timeout=LONG), shown.decode().replace("\r\n", "\n")


def test_a_terminal_gets_colour_and_a_bar_and_no_id_is_cut(desk: Desk) -> None:
    batch_id = failed_batch(desk)
    code, shown = on_a_terminal(desk, "show", batch_id, width=40)
    assert code == 0
    assert "\x1b[31mfailed" in shown
    assert desk.world.handles()[0] in shown
    _, plain = on_a_terminal(desk, "show", batch_id, NO_COLOR="1")
    assert "\x1b[31m" not in plain
    desk.world.script = None
    waiting = desk.enqueue("work", "--item", "a")
    worker = working(desk)
    code, shown = on_a_terminal(desk, "watch", waiting, then=worker.__enter__)
    worker.__exit__()
    assert code == 0
    assert f"{waiting} planning" in shown
    assert "━" in shown
    assert f"{waiting} succeeded after " in shown.splitlines()[-1]


def test_a_downgrade_on_a_terminal_is_confirmed_by_typing(desk: Desk) -> None:
    for typed, code in ((b"n\n", 2), (b"y\n", 0)):
        ours, theirs = pty.openpty()
        process = desk.spawn(
            *("db", "downgrade", "base"),
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        os.close(theirs)
        os.write(ours, typed)
        _, err = process.communicate(timeout=LONG)
        os.close(ours)
        assert process.returncode == code
        assert b"What the newer tables and columns hold is lost. [y/N] " in err
        assert (b"error: nothing was changed, as the answer was not yes\n" in err) == bool(code)


# --- all of it at once ----------------------------------------------------------------------------


def test_the_operator_at_half_past_seven(desk: Desk) -> None:
    """One of thirty tables is late: she finds out which, why, and mends it (story S8)."""
    desk.world.script = lambda _batch, chunk, attempt: (
        Ending(Outcome.FAILED, exit_code=1, output=("relation orders is locked",))
        if (chunk, attempt) == (17, 1)
        else Ending()
    )
    (desk.folder / "tables.txt").write_text("".join(f"table{n}\n" for n in range(30)))
    batch_id = desk.enqueue("work", "--items", "tables.txt")
    desk.finish(batch_id)
    assert "30/30 chunks: 29 succeeded, 1 failed" in desk.ok("batches").out
    shown = desk.ok("show", batch_id, "--failed").out
    assert "  | relation orders is locked\n" in shown
    assert f"`dispatcher retry --failed {batch_id}` runs 1 chunk again" in (
        desk.ok("explain", batch_id).out
    )
    desk.ok("retry", "--failed", batch_id)
    with working(desk):
        assert desk.ok("watch", batch_id).code == 0
    assert "  ann@desk  batch " in desk.ok("audit", batch_id).out
