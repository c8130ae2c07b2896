"""The parts of `make demo`, and the files by which others run what it runs."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import yaml
from psycopg import sql
from waiting import until

from dispatcher import ChunkState, Dispatcher, load_config
from dispatcher.standalone import Ports, Standalone
from examples.export import demo, make_shop, shop, tables

ROOT = Path(__file__).parents[2]
ROWS = 3000
LONG = 120.0
"""Seconds in which a whole installation starts or stops, however busy the machine is."""


# --- the shop and its export ---


@pytest.fixture
def shop_url(database_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small shop with all its tables, in SHOP_DATABASE_URL."""
    monkeypatch.setenv("SHOP_DATABASE_URL", database_url)
    with shop.connect() as connection:
        assert make_shop.make_shop(connection, rows=ROWS)
    return database_url


def export(
    items: Sequence[Any] | None, out: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    told = {} if items is None else {"DISPATCH_ITEMS": json.dumps(items)}
    return subprocess.run(
        [sys.executable, "-m", "examples.export.export_table"],
        env={**os.environ, "OUT": str(out), **told, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def fingerprint() -> list[tuple[Any, ...]]:
    with shop.connect() as connection:
        return [
            connection.execute(
                sql.SQL(
                    "SELECT count(*), md5(string_agg(t::text, '|' ORDER BY id)) FROM shop.{} t"
                ).format(sql.Identifier(name))
            ).fetchall()[0]
            for name in make_shop.TABLES
        ]


def test_the_shop_has_a_million_rows_in_30_tables_of_which_one_is_1000_times_another() -> None:
    counts = make_shop.row_counts(make_shop.ROWS)
    assert len(counts) == 30
    assert sum(counts.values()) == pytest.approx(1_000_000, abs=30)
    assert max(counts.values()) / min(counts.values()) == pytest.approx(1000, rel=0.01)


@pytest.mark.usefixtures("shop_url")
def test_the_same_seed_makes_the_same_shop_and_another_seed_another() -> None:
    first = fingerprint()
    with shop.connect() as connection:
        assert not make_shop.make_shop(connection, rows=ROWS)
        assert make_shop.make_shop(connection, rows=ROWS, seed=2)
        assert fingerprint() != first
        assert make_shop.make_shop(connection, rows=ROWS)
    assert fingerprint() == first


@pytest.mark.usefixtures("shop_url")
def test_the_shop_holds_every_awkward_text_and_null() -> None:
    with shop.connect() as connection:
        notes = {note for (note,) in connection.execute("SELECT note FROM shop.page_views")}
    assert notes == {None, *make_shop.AWKWARD}


@pytest.mark.usefixtures("shop_url")
def test_the_item_source_names_every_table_with_its_bytes() -> None:
    items = list(tables.list_tables())
    assert {item["table"] for item in items} == set(make_shop.TABLES)
    assert all(item["bytes"] > 0 for item in items)


def receipts(path: Path) -> dict[str, Any]:
    """What a receipt tells of its tables: outputs of those that succeeded, else errors."""
    told: dict[str, Any] = json.loads(path.read_text())
    assert told["complete"]
    return {one["i"]: one.get("output") or one["error"] for one in told["items"]}


def test_every_table_is_exported_as_it_is_and_told_of_in_the_receipt(
    shop_url: str, tmp_path: Path
) -> None:
    items = list(tables.list_tables())
    result = tmp_path / "0.json"
    done = export(items, tmp_path / "out", DISPATCH_RESULT_URI=result.as_uri())
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 30
    told = {items[position]["table"]: output for position, output in receipts(result).items()}
    assert sum(output["rows"] for output in told.values()) == sum(
        make_shop.row_counts(ROWS).values()
    )
    assert demo.check_files(shop_url, tmp_path / "out", told) == []


def test_items_can_come_from_a_file(shop_url: str, tmp_path: Path) -> None:
    (tmp_path / "the items.json").write_text('[{"table": "shops"}]')
    uri = (tmp_path / "the items.json").as_uri()
    done = export(None, tmp_path / "out", DISPATCH_INPUT_URI=uri, SHOP_DATABASE_URL=shop_url)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shops.csv.gz"]


@pytest.mark.usefixtures("shop_url")
def test_without_items_it_fails_for_good(tmp_path: Path) -> None:
    done = export(None, tmp_path)
    assert done.returncode == 65
    assert "none of DISPATCH_ITEMS, DISPATCH_INPUT and DISPATCH_INPUT_URI is set" in done.stderr


def test_without_a_database_it_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHOP_DATABASE_URL", raising=False)
    done = export([{"table": "shops"}], tmp_path)
    assert done.returncode == 1
    assert "SHOP_DATABASE_URL is not set" in done.stderr


@pytest.mark.usefixtures("shop_url")
def test_a_planned_failure_leaves_no_file_holds_up_no_table_and_happens_once(
    tmp_path: Path,
) -> None:
    items = [{"table": "shops"}, {"table": "refunds"}, {"table": "orders"}]
    out, result = tmp_path / "out", tmp_path / "0.json"
    first = export(items, out, FAIL_ONCE="refunds", DISPATCH_RESULT_URI=result.as_uri())
    assert first.returncode == 0  # the receipt tells of it
    assert first.stderr == "refunds: failed on purpose: refunds is FAIL_ONCE\n"
    assert receipts(result)[1] == "FailedOnPurpose: failed on purpose: refunds is FAIL_ONCE"
    assert {path.name for path in out.iterdir()} == {"shops.csv.gz", "orders.csv.gz"}
    second = export(items[1:2], out, FAIL_ONCE="refunds", DISPATCH_ATTEMPT="2")
    assert second.returncode == 0
    assert len(list(out.iterdir())) == 3


@pytest.mark.usefixtures("shop_url")
def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = export([{"table": "unicorns"}], tmp_path)
    assert done.returncode == 1  # there is no receipt to tell of it
    assert done.stderr.startswith('unicorns: relation "shop.unicorns" does not exist')
    assert list(tmp_path.iterdir()) == []


def test_the_check_finds_a_file_that_is_missing_changed_too_many_or_not_as_told(
    shop_url: str, tmp_path: Path
) -> None:
    items = list(tables.list_tables())
    out, result = tmp_path / "out", tmp_path / "0.json"
    export(items, out, DISPATCH_RESULT_URI=result.as_uri())
    told = {items[position]["table"]: output for position, output in receipts(result).items()}
    (out / "shops.csv.gz").unlink()
    (out / "cats.csv.gz").touch()
    path = out / "orders.csv.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content.replace(b"true", b"false").replace(b",t,", b",f,", 1)))
    told["refunds"]["rows"] += 1
    problems = demo.check_files(shop_url, out, told)
    assert problems[0] == f"cats.csv.gz is in {out} and belongs to no table"
    assert problems[1].startswith(f"{path} holds Content(rows=")
    assert "and the receipt tells of" in problems[2]
    assert "refunds.csv.gz" in problems[2]
    assert problems[3] == f"{out / 'shops.csv.gz'} is missing"


def test_the_jobs_file_is_valid_and_has_the_names_of_the_readme() -> None:
    config = load_config(str(ROOT / "examples" / "export" / "jobs.yaml"))
    assert list(config.targets) == ["here"]
    job = config.job("nightly-export")
    assert job.check_params(None) == {"fail_once": ""}


# --- the files by which others run it ---


def procfile() -> dict[str, list[str]]:
    lines = (ROOT / "Procfile").read_text().splitlines()
    return {name: shlex.split(line) for name, line in (entry.split(": ", 1) for entry in lines)}


def from_celery(command: Sequence[str]) -> list[str]:
    """What follows the program, with the places that differ from machine to machine left out."""
    words = list(command)[list(command).index("-A") :]
    return [
        re.sub(r"(--port|--address)=.*", r"\1", word)
        for word, before in zip(words, ["", *words], strict=False)
        if before != "--schedule"
    ]


@pytest.mark.parametrize("name", ["worker", "beat", "flower"])
def test_standalone_procfile_and_compose_start_the_same(name: str, tmp_path: Path) -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())["services"]
    own = from_celery(Standalone(tmp_path)._commands(Ports())[name])
    assert from_celery(procfile()[name]) == own
    assert from_celery(compose[name]["command"]) == own


def test_the_image_starts_a_worker_and_takes_the_same_uv() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    command = re.search(r"^CMD (\[.*\])", dockerfile.replace("\\\n", ""), re.MULTILINE)
    assert command
    assert json.loads(command[1]) == procfile()["worker"]
    uv = re.search(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert uv
    assert f"ARG UV_VERSION={uv[1]}\n" in dockerfile


def test_every_service_of_compose_tells_its_health_and_waits_for_what_it_needs() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())["services"]
    lasting = services.keys() - {"release"}
    assert lasting == {"postgres", "redis", "worker", "beat", "flower"}
    assert all("healthcheck" in services[name] for name in lasting)
    assert services["release"]["command"] == procfile()["release"]
    for name in ("worker", "beat", "flower"):
        assert services[name]["depends_on"] == {
            "release": {"condition": "service_completed_successfully"},
            "redis": {"condition": "service_healthy"},
        }


# --- the standalone ---


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of its own with a job that says hello, and none of our variables set."""
    for name in list(os.environ):
        if name.startswith("DISPATCHER_"):
            monkeypatch.delenv(name)
    path = Path(tempfile.mkdtemp(prefix="home-"))
    (path / "jobs.yaml").write_text(
        "targets: {here: {backend: local}}\njobs: {hello: {target: here, command: [echo, hello]},"
        " wait: {target: here, env: {FILE: '{items:csv}'}, command: [sh, -c,"
        " 'until [ -e \"$FILE\" ]; do sleep 0.1; done']}}\n"
    )
    yield path
    # What a test that failed has left, and shims that are through but for their last line.
    for pid in children_of(path):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    nothing_runs(path)
    shutil.rmtree(path)


def start(home: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "dispatcher", "standalone", "--dir", ".dispatcher"),
            *("--jobs", "jobs.yaml", *options),
        ],
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(home: Path, process: subprocess.Popen[str]) -> dict[str, Any]:
    path = home / ".dispatcher" / "standalone.json"

    def read() -> dict[str, Any]:
        assert process.poll() is None, process.communicate()
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        # One that was killed leaves its file until the next one starts.
        return found if found.get("pid") == process.pid else {}

    return until(read, "the standalone to be ready", LONG)


def children_of(home: Path) -> dict[int, str]:
    """What runs on this directory, by process id."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = entry.joinpath("cmdline").read_bytes().decode().split("\0")
            variables = entry.joinpath("environ").read_bytes().decode(errors="replace")
            cwd = entry.joinpath("cwd").resolve()
        except (OSError, UnicodeDecodeError):
            continue
        if str(home) in variables or str(home) in " ".join(words) or home in (cwd, *cwd.parents):
            found[int(entry.name)] = " ".join(words)
    found.pop(os.getpid(), None)
    return found


def pids_of(home: Path, pattern: str) -> set[int]:
    """The processes whose command line has a match."""
    return {pid for pid, line in children_of(home).items() if re.search(pattern, line)}


def nothing_runs(home: Path) -> None:
    """Wait for what was told to end: its end is not its parent's."""
    until(lambda: not children_of(home), "all that runs here to end", LONG)


def address(url: str) -> str:
    """The URL of a database as psycopg takes it."""
    return url.replace("+psycopg", "", 1)


def answers(url: str) -> bool:
    try:
        psycopg.connect(address(url), connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True


def run_hello(addresses: dict[str, Any]) -> str:
    options = {name: addresses[name] for name in ("database_url", "broker_url", "jobs")}
    with Dispatcher(**options) as dispatcher:
        return str(dispatcher.enqueue("hello", ["a", "b", "c"]).wait(timeout=LONG).state)


def begin_waiting(addresses: dict[str, Any], until_there: Path) -> None:
    """Have one task run until a file is there."""
    options = {name: addresses[name] for name in ("database_url", "broker_url", "jobs")}
    with Dispatcher(**options) as dispatcher:
        batch = dispatcher.enqueue("wait", [str(until_there)])
        until(lambda: batch.refresh().counts.get(ChunkState.RUNNING) == 1, "it to run", LONG)


only_linux = pytest.mark.skipif(sys.platform != "linux", reason="the test reads /proc")


@pytest.mark.long
@only_linux
def test_a_standalone_runs_work_restarts_what_dies_and_leaves_nothing(home: Path) -> None:
    process = start(home, "--no-flower", "--database", "shop", "--workers", "2")
    try:
        addresses = told(home, process)
        assert addresses["pid"] == process.pid
        assert addresses["flower_url"] is None
        with psycopg.connect(address(addresses["databases"]["shop"])) as database:
            assert database.info.dbname == "shop"
        assert run_hello(addresses) == "succeeded"

        second = start(home, "--no-flower")
        _, refusal = second.communicate(timeout=LONG)
        assert second.returncode == 2
        assert f"is in use by the standalone process {process.pid}" in refusal

        for name in ("workers.app worker (?!.*worker2@)", "bin/postgres -D", "valkey-server"):
            before = pids_of(home, name)
            killed = min(before)
            os.kill(killed, signal.SIGKILL)

            def another(name: str = name, others: set[int] = before - {killed}) -> bool:
                return bool(pids_of(home, name) - others - {killed})  # noqa: B023 - ends here

            until(another, f"another {name}", LONG)
        until(lambda: answers(addresses["database_url"]), "Postgres to answer again", LONG)
        assert run_hello(addresses) == "succeeded"
        begin_waiting(addresses, until_there=home / "go")
    finally:
        process.terminate()
        output, errors = process.communicate(timeout=LONG)
        (home / "go").touch()
    assert (process.returncode, errors) == (0, "")
    for title in ("worker", "Postgres", "Valkey"):
        assert f"{title} has died; starting it again in 1 s\n" in output
        assert f"{title} was started again\n" in output
    assert output.endswith(
        "stopping\n1 chunk still runs and goes on without the servers; the next start follows it "
        "to the end\nstopped\n"
    )
    nothing_runs(home)
    assert not (home / ".dispatcher" / "standalone.json").exists()


@pytest.mark.long
@only_linux
def test_all_that_a_standalone_started_dies_with_it_and_the_next_one_goes_on(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISPATCHER_STORAGE_URL", f"file://{home}/storage")
    process = start(home)
    addresses = told(home, process)
    assert addresses["storage_url"] == f"file://{home}/storage"
    flower = HTTPConnection(urlsplit(addresses["flower_url"]).netloc, timeout=LONG)
    flower.request("GET", "/healthcheck")
    assert flower.getresponse().read() == b"OK"
    flower.close()
    process.kill()
    process.communicate()
    nothing_runs(home)
    process = start(home, "--no-flower")
    try:
        assert run_hello(told(home, process)) == "succeeded"
    finally:
        process.terminate()
        process.communicate(timeout=LONG)


@only_linux
def test_a_standalone_that_is_stopped_while_it_starts_leaves_nothing(home: Path) -> None:
    # What it prepares takes longer than any test: it is never ready, however late the signal comes.
    process = start(home, "--no-flower", "--prepare", "sleep 600")
    until(lambda: pids_of(home, "bin/postgres -D"), "Postgres to be started", LONG)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=LONG)
    assert process.returncode == 0
    assert output == "stopped before it was ready\n"
    nothing_runs(home)


def test_a_wrong_jobs_file_is_refused_before_anything_is_started(home: Path) -> None:
    (home / "jobs.yaml").write_text("jobs: {hello: {target: nowhere, command: [echo]}}\n")
    process = start(home, "--no-flower")
    output, errors = process.communicate(timeout=LONG)
    assert (process.returncode, output) == (2, "")
    assert "nowhere" in errors
    assert "Traceback" not in errors
    assert not (home / ".dispatcher").exists()


def make_up() -> list[str]:
    """The command of `make up`, word by word."""
    recipe = re.search(r"^up:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    return shlex.split(recipe[1].replace("\\\n", " "))


def test_make_up_starts_servers_and_a_preparation_that_fails_stops_the_start(home: Path) -> None:
    """All of its command, with jobs and a preparation that take no time."""
    program, command, *options = make_up()
    assert (program, command) == ("$(BIN)/dispatcher", "standalone")
    python, switch, module = shlex.split(options[options.index("--prepare") + 1])
    assert (python, switch) == ("python3", "-m")
    assert importlib.util.find_spec(module)
    given = options[options.index("--jobs") + 1]
    assert (ROOT / given).is_file()
    options[options.index("--jobs") + 1] = "jobs.yaml"
    options[options.index("--prepare") + 1] = "sh -c 'echo $SHOP_DATABASE_URL; exit 3'"
    process = start(home, *options)
    output, errors = process.communicate(timeout=LONG)
    assert process.returncode == 2
    said = [line for line in output.splitlines() if " is taken: using " not in line]  # of a port
    assert len(said) == 1
    assert re.fullmatch(r"postgresql\+psycopg://dispatcher@/shop\?\S+", said[0])
    assert errors == "error: sh -c 'echo $SHOP_DATABASE_URL; exit 3' ended with 3: nothing runs\n"
    nothing_runs(home)


def test_a_worker_that_cannot_start_is_reported_with_its_last_words(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISPATCHER_LOG_LEVEL", "LOUD")
    process = start(home, "--no-flower")
    _, errors = process.communicate(timeout=LONG)
    assert process.returncode == 4
    assert "ended at once" in errors
    assert "DISPATCHER_LOG_LEVEL" in errors
    assert "Traceback" not in errors
    nothing_runs(home)
