"""Storage for tasks on Cloud Run: signed URLs from launch to outcome, and what `check` sees."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from buckets import s3_platform, serve_s3
from typer.testing import CliRunner
from waiting import until

from dispatcher import container, schema
from dispatcher.backends.cloud_run import CloudRunBackend
from dispatcher.cli import app
from dispatcher.client import Batch, Dispatcher
from dispatcher.config import load_config
from dispatcher.emulators.cloud_run import CloudRunEmulator
from dispatcher.emulators.cloud_run.processes import ProcessRunner
from dispatcher.engine import Engine
from dispatcher.storage import Storage, StorageRefused
from dispatcher.store import Store

PROJECT, REGION = "project-1", "europe-west1"
RECEIPT_SH = Path(__file__).parents[2] / "examples" / "container" / "receipt.sh"

HELPER = [
    *(sys.executable, "-I", container.__file__, "exec", "--each", "--"),
    *("sh", "-c", 'test "$ITEM" != bad'),
]
SHELL = ["sh", "-c", f". {RECEIPT_SH}\ndispatch_each sh -c 'test \"$ITEM\" != bad'"]

IMAGES = [
    pytest.param(HELPER, id="helper"),
    pytest.param(
        SHELL,
        id="curl",
        marks=pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl"),
    ),
]


def jobs_file(
    folder: Path, target: Mapping[str, Any], options: Mapping[str, Any] | None = None, **job: Any
) -> str:
    place = folder / "jobs.json"
    cloud = {"backend": "cloud_run", "project": PROJECT, "region": REGION, **target}
    work = {"target": "cloud", "options": {"job": "etl", **(options or {})}, **job}
    place.write_text(json.dumps({"targets": {"cloud": cloud}, "jobs": {"work": work}}))
    return str(place)


@pytest.fixture(scope="module")
def s3_bucket() -> Iterator[tuple[str, Any]]:
    """One server for this file: starting one takes a second."""
    with serve_s3() as made:
        yield made


# --- a launch with signed URLs --------------------------------------------------------------------


class Site:
    """A worker's engine over a bucket; the tasks have no credentials for it."""

    def __init__(self, folder: Path, url: str, emulator: CloudRunEmulator, **job: Any) -> None:
        emulator.world.define(PROJECT, REGION, "etl", image="app")
        endpoint = {"endpoint": emulator.grpc_address, "insecure": True, "poll_interval": "1s"}
        config = load_config(jobs_file(folder, endpoint, **job))
        self.database = schema.create_engine(url)
        store = Store(self.database, actor="worker")
        lease = timedelta(hours=1)
        store.lease("cloud", backend="cloud_run", limits={}, home=None, lease=lease)
        self.storage = Storage("s3://bucket/signed-launch")
        self.engine = Engine(store, config, storage=self.storage)
        self.app = Dispatcher(database_url=url, config=config, actor="app", pool_size=2)

    def run(self, items: list[Any]) -> Batch:
        batch = self.app.enqueue("work", items)

        def turn() -> bool:
            for batch_id in self.engine.sweep():
                self.engine.plan(batch_id)
            self.engine.launch("cloud")
            self.engine.follow("cloud")
            return batch.refresh().finished

        until(turn, "the batch ended")
        return batch.refresh()

    def close(self) -> None:
        self.engine.close()
        self.app.close()
        self.database.dispose()


@pytest.fixture
def make_site(
    tmp_path: Path, database_url: str, s3_bucket: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Site]]:
    for name, value in s3_platform(s3_bucket[0]).items():
        monkeypatch.setenv(name, value)
    with ExitStack() as closing:

        def make(image: list[str], **job: Any) -> Site:
            runner = ProcessRunner({"app": image}, limit=2)
            emulator = closing.enter_context(CloudRunEmulator(runner=runner))
            made = Site(tmp_path, database_url, emulator, **job)
            closing.callback(made.close)
            return made

        yield make


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("max_tasks", [1, 2])
def test_tasks_without_credentials_tell_how_each_item_ended_by_signed_urls(
    image: list[str], max_tasks: int, make_site: Callable[..., Site]
) -> None:
    site = make_site(
        image,
        options={"signed_urls": True, "max_tasks": max_tasks},
        chunk={"size": 2},
        receipt="required",
        retry={"attempts": 1},
    )
    batch = site.run(["a", "bad", "b", "c"])
    assert [(one.item, one.state) for one in site.app.items(batch.id)] == [
        ("a", "succeeded"),
        ("bad", "failed"),
        ("b", "succeeded"),
        ("c", "succeeded"),
    ]
    outcomes = [[a.outcome for a in chunk.attempts] for chunk in site.app.chunks(batch.id)]
    assert outcomes == [["failed"], ["succeeded"]]
    with site.database.begin() as tx:
        for table in ("execution", "attempt", "event", "item_result", "batch"):
            rows = tx.execute(sa.text(f"SELECT t::text FROM dispatcher.{table} t")).scalars().all()  # noqa: S608 - of the line above
            assert rows
            assert not [row for row in rows if "X-Amz-Signature" in row]


# --- check ----------------------------------------------------------------------------------------


Check = Callable[..., list[str]]


@pytest.fixture
def check(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Check:
    """What `dispatcher check` says of the job; of Cloud Run itself nothing is asked."""
    monkeypatch.setattr(CloudRunBackend, "check", lambda *_: ())

    def checked(storage: str | None, target: Mapping[str, Any] | None = None, **job: Any) -> Any:
        environment: dict[str, str | None] = {
            **{name: None for name in os.environ if name.startswith("DISPATCHER_")},
            "DISPATCHER_DATABASE_URL": database_url,
            "DISPATCHER_JOBS": jobs_file(tmp_path, target or {}, **job),
            "DISPATCHER_STORAGE_URL": storage,
        }
        ran = CliRunner(env=environment).invoke(app, ["check", "--json"])
        assert "Traceback" not in ran.output
        found = [one for one in json.loads(ran.stdout)["checks"] if one["name"] == "job work"]
        return [f"{one['level']}: {one['text']}; {one['todo']}" for one in found]

    return checked


def test_check_warns_of_a_directory_that_tasks_elsewhere_cannot_reach(
    check: Check, tmp_path: Path
) -> None:
    place = (tmp_path / "store").as_uri()
    (said,) = check(place, receipt="required")
    assert said == (
        f"warn: requires receipts, and the storage is the directory {place} of this machine: the "
        "tasks of target cloud run elsewhere and cannot reach it; set DISPATCHER_STORAGE_URL to a "
        "bucket, s3:// or gs://; leave it only if the tasks have the same directory mounted at the "
        "same path"
    )
    assert check(place)[0].startswith("warn: may write receipts, and the storage is the directory")
    assert check(place, receipt="ignored") == ["ok: can run on target cloud; None"]
    emulated = {"endpoint": "127.0.0.1:8080", "insecure": True}
    assert check(place, emulated, receipt="required") == ["ok: can run on target cloud; None"]


def test_check_says_what_of_a_job_needs_a_storage_where_there_is_none(check: Check) -> None:
    (said,) = check(None, options={"signed_urls": True})
    assert said.startswith("warn: gives its tasks signed URLs, and there is no storage; set DISP")
    assert check(None, receipt="required")[0].startswith("fail: requires receipts, and tasks on")
    assert check(None, options={"wrapped": True}) == ["ok: can run on target cloud; None"]


def test_check_says_that_a_task_may_take_longer_than_urls_can_be_signed_for(
    check: Check, tmp_path: Path
) -> None:
    target = {"endpoint": "127.0.0.1:8080", "insecure": True}
    place = (tmp_path / "store").as_uri()
    (said,) = check(place, target, timeout="7d", options={"signed_urls": True})
    assert said.startswith("fail: gives its tasks signed URLs, which live 7d at most, and a task")


def test_check_signs_urls_and_uses_them_where_a_job_gives_them_to_its_tasks(
    check: Check, s3_bucket: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_platform(s3_bucket[0]).items():
        monkeypatch.setenv(name, value)
    signed = {"options": {"signed_urls": True}}
    assert check("s3://bucket/checked", **signed) == ["ok: can run on target cloud; None"]

    def refuse(_storage: Storage) -> None:
        raise StorageRefused("a URL is answered 403 Forbidden: Request is not valid yet")

    monkeypatch.setattr(Storage, "check_signing", refuse)
    (said,) = check("s3://bucket/checked", **signed)
    assert said == (
        "fail: gives its tasks signed URLs, and these do not work: a URL is answered 403 "
        "Forbidden: Request is not valid yet; set this machine's clock; on Google Cloud grant "
        "iam.serviceAccounts.signBlob on the workers' own account; or do without "
        "options.signed_urls"
    )
    assert check("s3://bucket/checked") == ["ok: can run on target cloud; None"]
