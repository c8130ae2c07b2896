"""What receipts are for, proved from outside: real workers and Postgres, real and scripted tasks.

Ten thousand items of which seven kill their container; receipts that nobody should believe; a
container that is told to stop; a storage that cannot be used.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final, TypeAlias

import pytest
import yaml
from buckets import gcs_account, s3_platform, serve_gcs, serve_s3
from serving import Prompt, Server
from typer.testing import CliRunner
from waiting import until

from dispatcher import Batch, container
from dispatcher.cli import app
from dispatcher.emulators.cloud_run import CloudRunEmulator, TaskEnd, TaskStart
from dispatcher.emulators.cloud_run.processes import ProcessRunner
from dispatcher.errors import InvalidInput
from dispatcher.storage import Storage
from installation import ROOT, Site

Spoil: TypeAlias = Callable[[dict[str, Any]], bytes]
"""Makes something else of a receipt."""

POISON: Final = frozenset({0, 199, 250, 251, 4_999, 7_777, 9_999})
"""At both ends, two in one chunk, and in the middle."""

ITEMS, CHUNK, ATTEMPTS = 10_000, 100, 3

PROGRAM: Final = f"""
import os, signal, sys, time
import container

POISON = {set(POISON)}
with container.run() as task:
    # Into files, and in a later attempt, what is done so far is written within a blink.
    written_soon = task.attempt > 1 or task.result_uri.startswith("file://")
    for item in task.items:
        if item in POISON:
            # What kills takes its time (a query that hangs, memory that fills): long enough for
            # what was done before to be written, where that is done soon.
            end = time.monotonic() + (300 if written_soon else 0.25)
            while task._kept != task._changes and time.monotonic() < end:
                time.sleep(0.01)
            if item % 2:
                os._exit(3)
            os.kill(os.getpid(), signal.SIGKILL)
        task.report(item, ok=True, output=-item)
"""

JOB: Final = {
    "chunk": {"size": CHUNK},
    "receipt": "required",
    "success": {"max_failed_items": len(POISON)},
    "retry": {
        "attempts": ATTEMPTS,
        "on_failure": "split",
        "initial": "0.1s",
        "max": "0.1s",
        "pack_wait": "0.5s",
    },
}

CLOUD: Final = {
    "backend": "cloud_run",
    "project": "project-1",
    "region": "europe-west1",
    "insecure": True,
    "launches_per_minute": 6000,
    "reads_per_minute": 6000,
    "find_grace": "1s",
    "poll_interval": "0.5s",
    "tasks_interval": "0.5s",
}


def install(
    site: Site, target: dict[str, Any], job: dict[str, Any], url: str | None = None
) -> Storage:
    """Write the jobs file, and give the workers a storage."""
    jobs = {"targets": {"here": target}, "jobs": {"work": {"target": "here", **job}}}
    site.write_jobs(yaml.safe_dump(jobs))
    storage = Storage(url or (site.folder / "storage").as_uri())
    site.environment["DISPATCHER_STORAGE_URL"] = storage.url
    return storage


def image(site: Site, program: str) -> list[str]:
    """Make an image with the helper copied in; gives its command."""
    folder = site.folder / "image"
    folder.mkdir()
    shutil.copy(ROOT / "dispatcher" / "container.py", folder)
    (folder / "work.py").write_text(program)
    return [sys.executable, "-S", str(folder / "work.py")]


def command(site: Site, *words: str) -> tuple[int, str]:
    ran = CliRunner().invoke(app, list(words), env=site.environment)
    return ran.exit_code, ran.stdout


def ended(batch: Batch) -> Batch:
    until(lambda: batch.refresh().finished, f"{batch.job} to end", 300)
    return batch.refresh()


# --- ten thousand items, seven that kill ----------------------------------------------------------


def helped(start: TaskStart) -> container.Task:
    """Give the helper of a task that runs in this process; what it writes is written when told."""
    task = container.Task(start.environment)
    task._start_writer = lambda: None  # type: ignore[method-assign]  # no thread outlives its task
    return task


@contextmanager
def local(site: Site) -> Iterator[Storage]:
    """Processes of this machine, with receipts in a bucket."""
    with serve_s3() as (url, _), pytest.MonkeyPatch.context() as patch:
        platform = s3_platform(url)
        for name, value in platform.items():
            patch.setenv(name, value)
        site.environment.update(platform)
        job = {
            **JOB,
            "command": image(site, PROGRAM),
            "env": platform,
            "options": {"max_tasks": 25, "parallelism": 2},
        }
        spool = str(site.folder / "spool")
        target = {"backend": "local", "spool": spool, "max_running": 4}
        yield install(site, target, job, "s3://bucket/here")


@contextmanager
def cloud(site: Site) -> Iterator[Storage]:
    """Processes of the emulator, with receipts in files."""
    runner = ProcessRunner({"image": image(site, PROGRAM)}, limit=4)
    with CloudRunEmulator(runner=runner) as emulator:
        emulator.world.define("project-1", "europe-west1", "etl")
        yield install(
            site,
            {**CLOUD, "endpoint": emulator.grpc_address},
            {**JOB, "options": {"job": "etl", "max_tasks": 100}},
        )
        assert not emulator.refused
        by_key = [one.env["DISPATCH_KEY"] for one in emulator.world.executed]
        assert len(set(by_key)) == len(by_key), "nothing was launched twice"


@pytest.mark.long
@pytest.mark.parametrize("place", [local, cloud])
def test_ten_thousand_items_of_which_seven_kill_their_container_end_with_the_seven_named(
    site: Site, place: Any
) -> None:
    with place(site), site.dispatcher() as dispatcher:
        site.worker()
        began = time.monotonic()
        batch = ended(dispatcher.enqueue("work", range(ITEMS)))
        took = time.monotonic() - began
        assert (batch.state, batch.reason) == (
            "succeeded",
            "7 of 10,000 items failed, allowed",
        ), site.logs()
        items = list(dispatcher.items(batch.id))
        failed = [one.item for one in dispatcher.items(batch.id, failed=True)]
        chunks = list(dispatcher.chunks(batch.id))
        code, shown = command(site, "--json", "show", "--items", "--failed", batch.id)
    outputs = {one.item: one.output for one in items if one.state == "succeeded"}
    assert outputs == {item: -item for item in range(ITEMS) if item not in POISON}
    assert sorted(failed) == sorted(POISON)
    assert len(items) == ITEMS
    # Each says why, and each stands alone: `show` names them and nothing else.
    whys = {one.item: one.error for one in items if one.state == "failed"}
    for item, why in whys.items():
        assert f"exit code {3 if item % 2 else 137}; 3 of 3 attempts used" in str(why)
    assert code == 0
    named = [
        chunk["items"][one["position"]]
        for chunk in json.loads(shown)["chunks"]
        for one in chunk["results"]
        if one["state"] == "failed"
    ]
    assert sorted(named) == sorted(POISON)
    # Parents and children are in the audit, and the extra attempts are few.
    attempts = sum(len(chunk.attempts) for chunk in chunks)
    extra = attempts - ITEMS // CHUNK
    most = len(POISON) * (math.log2(CHUNK) + ATTEMPTS - 1)
    split = {chunk.index for chunk in chunks if chunk.state == "split"}
    assert split == {chunk.parent for chunk in chunks if chunk.parent is not None}
    assert extra <= most
    print(f"{took:.1f} s, {extra} extra attempts of {most:.0f} allowed, {len(split)} splits")  # noqa: T201


# --- receipts that nobody should believe ----------------------------------------------------------


def whole(task: container.Task) -> dict[str, Any]:
    """The receipt that would be right."""
    for item in task.items:
        task.report(item, ok=True, output={"of": item})
    told: dict[str, Any] = json.loads(task._document(complete=True))
    return told


def changed(**fields: Any) -> Spoil:
    return lambda told: json.dumps({**told, **fields}).encode()


def entries(*positions: int) -> list[dict[str, Any]]:
    return [{"i": position, "ok": True} for position in positions]


BAD: Final[dict[str, tuple[Spoil, str]]] = {
    "cut": (lambda told: json.dumps(told).encode()[:-30], "it is no JSON"),
    "text": (lambda _: b"7 rows\n", "it is no JSON"),
    "old": (changed(attempt=0), "its attempt is 0, and this is 1"),
    "stolen": (changed(key="d-another"), "its key is 'd-another'"),
    "moved": (changed(task=99), "its task is 99"),
    "numbers": (changed(items=entries(1, 2)), "item 2 was not given: 0 to 1 were"),
    "twice": (changed(items=entries(0, 0)), "it tells of one item twice"),
    "nan": (
        changed(items=[{**entries(0)[0], "output": math.nan}, *entries(1)]),
        "the output of item 0 holds a number",
    ),
    "nonsense": (
        lambda _: b'{"version":1,"complete":true,"items":[' + b"[]," * 5_000 + b"[]]}",
        "it tells of 5001 items; 2 were given",
    ),
    "large": (
        lambda _: b'{"version":1,"complete":true,"items":[' + b"[]," * 2_000_000 + b"[]]}",
        "6,000,042 bytes, and may have 360,448; it was not read: the task was given 2 items",
    ),
    "enormous": (lambda _: b"{}", "104,857,600 bytes"),
}
GOOD: Final = ("doubled", "plain")


def tell(start: TaskStart) -> None:
    """Write the receipt of a task as its items say: `cut 0` has it cut short."""
    task = helped(start)
    name = task.items[0].split()[0]
    told = whole(task)
    if name in BAD:
        place = Path(str(task.result_uri).removeprefix("file://"))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(BAD[name][0](told))
        if name == "enormous":
            with place.open("r+b") as file:
                file.truncate(100 << 20)
        return
    task.close()
    if name == "doubled":  # another container of the same task, which says something else
        double = helped(start)
        for item in double.items:
            double.report(item, ok=False, error="late")
        double.close()


def memory(pid: int) -> int:
    """The most megabytes that a process ever had."""
    (line,) = [
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line
    ]
    return int(line.split()[1]) // 1024


def test_a_bad_receipt_costs_its_own_chunk_and_no_worker(site: Site) -> None:
    names = [*BAD, *GOOD]

    def script(start: TaskStart) -> TaskEnd:
        tell(start)
        return TaskEnd()

    job = {
        "chunk": {"size": 2},
        "receipt": "required",
        "retry": {"attempts": 1, "infrastructure_attempts": 1},
        "options": {"job": "etl", "max_tasks": len(names)},
    }
    with CloudRunEmulator(script=script) as emulator, site.dispatcher() as dispatcher:
        emulator.world.define("project-1", "europe-west1", "etl")
        install(site, {**CLOUD, "endpoint": emulator.grpc_address}, job)
        worker = site.worker()
        before = memory(worker.pid)
        batch = ended(dispatcher.enqueue("work", [f"{name} {n}" for name in names for n in (0, 1)]))
        chunks = {names[chunk.index]: chunk for chunk in dispatcher.chunks(batch.id)}
        outputs = {one.item: one.value for one in dispatcher.outputs(batch.id)}
        assert len(emulator.world.executed) == 1
    for name, (_, why) in BAD.items():
        (attempt,) = chunks[name].attempts
        assert (chunks[name].state, attempt.outcome) == ("failed", "suspect"), name
        assert "its receipt cannot be used: " in str(attempt.reason)
        assert why in str(attempt.reason)
    assert {str(chunks[name].state) for name in GOOD} == {"succeeded"}
    assert outputs == {f"{name} {n}": {"of": f"{name} {n}"} for name in GOOD for n in (0, 1)}
    assert worker.poll() is None
    assert "cannot be settled" not in site.logs()
    grown = memory(worker.pid) - before
    assert grown < 300
    print(f"the worker grew by {grown} MB")  # noqa: T201 - a figure of the proof


# --- told to stop ---------------------------------------------------------------------------------


def test_a_cancel_in_mid_chunk_keeps_the_finished_items_and_a_retry_runs_the_others(
    site: Site,
) -> None:
    program = f"""
import pathlib, time
import container

here = pathlib.Path({str(site.folder)!r})
with container.run() as task:
    with (here / "given").open("a") as file:
        print(task.items, file=file)
    for item in task.items:
        if item == 3 and not (here / "go on").exists():
            (here / "reached").touch()
            time.sleep(600)
        task.report(item, ok=True, output=item)
"""
    target = {"backend": "local", "spool": str(site.folder / "spool")}
    install(site, target, {"command": image(site, program), "chunk": {"size": 6}})
    site.worker()
    with site.dispatcher() as dispatcher:
        batch = dispatcher.enqueue("work", range(6))
        until((site.folder / "reached").exists, "it is at its fourth item")
        assert command(site, "cancel", batch.id)[0] == 0
        assert ended(batch).state == "cancelled"
        stopped = {one.item: str(one.state) for one in dispatcher.items(batch.id)}
        (attempt,) = next(dispatcher.chunks(batch.id)).attempts
        (site.folder / "go on").touch()
        assert command(site, "retry", "--failed", batch.id)[0] == 0
        assert ended(batch).state == "succeeded"
        outputs = [one.value for one in dispatcher.outputs(batch.id)]
    assert stopped == {
        **dict.fromkeys(range(3), "succeeded"),
        **dict.fromkeys((3, 4, 5), "cancelled"),
    }
    assert attempt.outcome == "cancelled"
    assert outputs == list(range(6))
    given = (site.folder / "given").read_text().splitlines()
    assert given == ["[0, 1, 2, 3, 4, 5]", "[3, 4, 5]"]


# --- a storage that cannot be used ----------------------------------------------------------------


class _Refusing(Server):
    """An S3 that refuses every read, in the words of S3's documentation."""

    def __init__(self) -> None:
        super().__init__(_Refusal)
        self.code = self.message = ""


class _Refusal(Prompt, BaseHTTPRequestHandler):
    server: _Refusing

    def do_GET(self) -> None:
        told = self.server
        text = f"<Error><Code>{told.code}</Code><Message>{told.message}</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def refusing() -> Iterator[_Refusing]:
    with _Refusing().serving() as server:
        yield server


def checked(site: Site, name: str) -> tuple[int, str, str]:
    """What `check` says of one thing: its exit code, the level, and the text with what to do."""
    code, shown = command(site, "--json", "check")
    (found,) = [one for one in json.loads(shown)["checks"] if one["name"] == name]
    return code, found["level"], f"{found['text']}; {found['todo']}"


class TestACheck:
    @pytest.fixture(autouse=True)
    def _jobs(self, site: Site) -> None:
        install(site, {"backend": "local", "spool": "SPOOL"}, {"command": ["true"]})

    def test_finds_a_storage_that_works(self, site: Site) -> None:
        _, level, said = checked(site, "storage")
        assert level == "ok"
        assert "can be written, create-only, and read" in said

    @pytest.mark.parametrize("url", ["/var/data", "ftp://host/x", "s3:///x", "file://relative/x"])
    def test_refuses_a_url_that_is_no_storage(self, site: Site, url: str) -> None:
        site.environment["DISPATCHER_STORAGE_URL"] = url
        code, level, said = checked(site, "settings")
        assert (code, level) == (1, "fail")
        assert "DISPATCHER_STORAGE_URL" in said
        assert (
            "must be a URL such as file:///absolute/path, s3://bucket/path or gs://bucket" in said
        )

    def test_finds_a_directory_that_cannot_be_one(self, site: Site) -> None:
        (site.folder / "file").touch()
        site.environment["DISPATCHER_STORAGE_URL"] = (site.folder / "file" / "x").as_uri()
        code, level, said = checked(site, "storage")
        assert (code, level) == (1, "fail")
        assert "mend DISPATCHER_STORAGE_URL, or what the credentials of this machine may do" in said

    def test_finds_that_a_bucket_is_missing(self, site: Site) -> None:
        with serve_gcs() as gcs:
            site.environment |= {
                "GOOGLE_SERVICE_ACCOUNT_KEY": gcs.account(),
                "GOOGLE_ALLOW_HTTP": "true",
                "DISPATCHER_STORAGE_URL": "gs://no-such/x",
            }
            code, level, said = checked(site, "storage")
        assert (code, level) == (1, "fail")
        assert "there is no such bucket; make it, or mend the storage URL" in said

    @pytest.mark.parametrize(
        ("method", "verb"), [("GET", "read"), ("PUT", "write"), ("DELETE", "delete")]
    )
    def test_finds_what_the_credentials_have_no_permission_for(
        self, site: Site, method: str, verb: str
    ) -> None:
        with serve_gcs() as gcs:
            gcs.forbidden = frozenset({method})
            site.environment |= {
                "GOOGLE_SERVICE_ACCOUNT_KEY": gcs.account(),
                "GOOGLE_ALLOW_HTTP": "true",
                "DISPATCHER_STORAGE_URL": "gs://bucket/x",
            }
            code, level, said = checked(site, "storage")
        assert (code, level) == (1, "fail")
        assert f"cannot {verb} gs://bucket/x/checks/" in said
        assert (
            ": no permission; the credentials are those that this process's platform gives it. "
            "The storage says: AccessDenied: No.; mend DISPATCHER_STORAGE_URL, or what the "
            "credentials of this machine may do there"
        ) in said

    def test_finds_that_nobody_answers(self, site: Site, dead_port: int) -> None:
        site.environment |= {
            "GOOGLE_SERVICE_ACCOUNT_KEY": gcs_account(f"http://127.0.0.1:{dead_port}"),
            "GOOGLE_ALLOW_HTTP": "true",
            "DISPATCHER_STORAGE_URL": "gs://bucket/x",
        }
        code, level, said = checked(site, "storage")
        assert (code, level) == (4, "fail")
        assert "cannot read gs://bucket/x/checks/" in said

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ("AccessDenied", "Access Denied"),
            (
                "RequestTimeTooSkewed",
                "The difference between the request time and the current time is too large.",
            ),
        ],
    )
    def test_gives_the_words_of_a_storage_that_refuses_these_credentials_or_this_clock(
        self, site: Site, refusing: _Refusing, code: str, message: str
    ) -> None:
        refusing.code, refusing.message = code, message
        site.environment |= {
            **s3_platform(refusing.url),
            "DISPATCHER_STORAGE_URL": "s3://bucket/x",
        }
        exit_code, level, said = checked(site, "storage")
        assert (exit_code, level) == (1, "fail")
        assert "cannot read s3://bucket/x/checks/" in said
        assert f"{code}: {message}" in said

    def test_finds_a_job_whose_receipts_would_have_no_place(self, site: Site) -> None:
        site.environment["DISPATCHER_STORAGE_URL"] = ""
        with CloudRunEmulator() as emulator:
            emulator.world.define("project-1", "europe-west1", "etl")
            target = {**CLOUD, "endpoint": emulator.grpc_address}
            install(site, target, {"receipt": "required", "options": {"job": "etl"}})
            site.environment["DISPATCHER_STORAGE_URL"] = ""
            code, shown = command(site, "--json", "check")
        found = {
            one["level"]: one for one in json.loads(shown)["checks"] if one["name"] == "job work"
        }
        assert code == 1
        assert found["fail"]["text"] == (
            "requires receipts, and tasks on target here have nowhere to write them"
        )
        assert "set DISPATCHER_STORAGE_URL" in found["fail"]["todo"]


def test_required_receipts_are_refused_where_the_workers_have_no_storage_for_them(
    site: Site,
) -> None:
    with CloudRunEmulator() as emulator, site.dispatcher() as dispatcher:
        emulator.world.define("project-1", "europe-west1", "etl")
        target = {**CLOUD, "endpoint": emulator.grpc_address}
        install(site, target, {"receipt": "required", "options": {"job": "etl"}})
        del site.environment["DISPATCHER_STORAGE_URL"]
        # Nobody knows yet what the workers have: it is refused when they plan it.
        early = dispatcher.enqueue("work", [1])
        site.worker()
        assert ended(early).state == "failed"
        until(
            lambda: site.sql("SELECT 1 FROM dispatcher.target WHERE limits->>'results' = 'false'"),
            "the worker to tell what it has",
        )
        assert "requires receipts" in str(early.refresh().reason)
        assert "set DISPATCHER_STORAGE_URL for the workers" in str(early.refresh().reason)
        with pytest.raises(InvalidInput, match="have no storage for them: set DISPATCHER_STORAGE"):
            dispatcher.enqueue("work", [1])
        assert emulator.calls["Jobs.RunJob"] == 0
