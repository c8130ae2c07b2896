"""Story S2 as examples/bigquery_export tells it: each night all tables of a dataset to a bucket.

Postgres, the broker, the worker, the image's program and Google's clients are real; BigQuery and
Cloud Storage are the fake of warehouse.py.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from google.api_core.exceptions import GoogleAPIError, NotFound
from google.cloud import bigquery
from nights import (
    DESTINATION,
    HERE,
    MONDAY,
    PLACE,
    SHOP,
    TUESDAY,
    Story,
    addresses,
    install,
    kill_container,
    unpacked,
)
from terraform import granted, resources
from typer.testing import CliRunner
from waiting import until
from warehouse import Table, Warehouse, serve

from dispatcher import BatchState, ConfigurationError, container, load_config
from dispatcher.cli import app
from dispatcher.emulators.cloud_run import CloudRunEmulator
from dispatcher.emulators.cloud_run.processes import ProcessRunner
from dispatcher.planning import plan_chunks
from examples.bigquery_export import tables
from examples.bigquery_export.image import export_tables
from examples.bigquery_export.image.export_tables import ExportError, Exports, Extracts, Place, Run
from installation import Site


@pytest.fixture
def warehouse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Warehouse]:
    """A warehouse, to which Google's clients are led here and in all processes that follow."""
    made = Warehouse()
    with serve(made) as url:
        for name in ("BIGQUERY", "STORAGE"):
            monkeypatch.setenv(f"{name}_EMULATOR_HOST", url)
        yield made


@pytest.fixture
def story(site: Site, warehouse: Warehouse) -> Iterator[Story]:
    del warehouse  # it must be there before
    with Story.begun(site) as made:
        yield made


def visible(warehouse: Warehouse, table: str) -> dict[str, Any]:
    """What a reader of a table sees: its manifest, and the content of the files that it names."""
    manifest: dict[str, Any] = json.loads(warehouse.objects[f"{SHOP}{table}/manifest.json"].data)
    names = [file["uri"].removeprefix("gs://bucket/") for file in manifest["files"]]
    return {**manifest, "content": [warehouse.objects[name].data.decode() for name in names]}


# --- the story ------------------------------------------------------------------------------------


def test_every_table_is_exported_exactly_once_whatever_the_number_of_tables_and_tasks(
    story: Story, warehouse: Warehouse
) -> None:
    house = warehouse
    for count, tasks, chunks in ((0, 10, 0), (1, 10, 1), (10, 30, 10), (30, 10, 10)):
        with house.lock:
            house.jobs.clear()
            house.objects.clear()
            house.tables = {f"t{n:02}": Table(rows=n, size=1000 + n * n) for n in range(count)}
        batch = story.export(MONDAY, tasks)
        assert batch.chunk_count == chunks
        assert {name: house.extracted(name) for name in house.tables} == {
            name: [Run(PLACE, name, MONDAY, 1).job_id] for name in house.tables
        }
        outputs = story.outputs(batch)
        assert {name: told["rows"] for name, told in outputs.items()} == {
            name: table.rows for name, table in house.tables.items()
        }
        assert all(visible(house, name)["content"] == ["some rows 0"] for name in house.tables)
    assert house.refused == []


@pytest.mark.long
def test_a_thousand_tables_are_exported_and_published_exactly_once(
    story: Story, warehouse: Warehouse
) -> None:
    house = warehouse
    house.tables = {f"t{n:03}": Table(rows=n, size=n * 1000) for n in range(1000)}
    published = Counter[str]()
    house.before_write = lambda name: published.update([name])
    batch = story.export(MONDAY, tasks=4)
    assert {name: house.extracted(name) for name in house.tables} == {
        name: [Run(PLACE, name, MONDAY, 1).job_id] for name in house.tables
    }
    assert published == {f"{SHOP}{name}/manifest.json": 1 for name in house.tables}
    outputs = story.outputs(batch)
    assert {name: told["rows"] for name, told in outputs.items()} == {
        name: table.rows for name, table in house.tables.items()
    }
    for name in house.tables:
        shown = visible(house, name)
        assert (shown["night"], shown["content"]) == (MONDAY, ["some rows 0"])
    assert len(house.objects) == 2 * len(house.tables)
    assert house.refused == []


def test_a_night_runs_again_only_what_failed_and_shows_the_old_export_until_the_new_one_is_whole(
    story: Story, warehouse: Warehouse
) -> None:
    house = warehouse
    house.location = "EU"
    house.tables = {
        "orders": Table(rows=70, size=3 * 10**9, files=4, content="monday"),
        "refunds": Table(content="monday"),
        "a view": Table(kind="VIEW"),
        "größen 1": Table(content="monday"),
    }
    house.failing = {"refunds": 1}
    monday = story.export(MONDAY, tasks=1)
    assert story.attempts(monday) == {"orders": 1, "größen 1": 1, "refunds": 2}
    assert {name: len(house.extracted(name)) for name in house.tables} == {
        "orders": 1,
        "größen 1": 1,
        "refunds": 2,
        "a view": 0,
    }
    (first, _) = next(iter(story.dispatcher.chunks(monday.id))).attempts
    assert (first.outcome, first.exit_code) == ("failed", 0)
    assert "1 of 3 items failed: ExportError" in str(first.reason)
    assert "backendError: Error encountered during execution" in str(first.reason)
    assert story.outputs(monday)["orders"] == {
        "rows": 70,
        "bytes": len("monday 0") * 4,
        "files": 4,
        "job": Run(PLACE, "orders", MONDAY, 1).job_id,
        "manifest": "gs://bucket/nightly/shop/orders/manifest.json",
    }
    # What the failed job had written is gone as well.
    assert list(house.under(f"{SHOP}refunds/")) == [
        f"{MONDAY}-csv-2/part-000000000000.csv.gz",
        "manifest.json",
    ]

    # The second night: fewer files; and the container is killed before it can publish.
    house.tables["orders"] = Table(rows=7, size=10, files=1, content="tuesday")
    house.tables["refunds"].content = "tuesday"
    arrived, done = Event(), Event()

    def hold(name: str) -> None:
        if name == f"{SHOP}orders/manifest.json":
            arrived.set()
            assert done.wait(200)
            raise ConnectionError

    house.before_write = hold
    tuesday = story.begin(TUESDAY, tasks=1)
    assert arrived.wait(200), story.site.logs()
    house.before_write = lambda _: None
    assert house.under(f"{SHOP}orders/{TUESDAY}-csv-1/"), "the new files are there"
    old = visible(house, "orders")
    assert (old["night"], old["content"]) == (MONDAY, [f"monday {n}" for n in range(4)])
    kill_container(tuesday)
    done.set()
    tuesday = story.ended(tuesday)
    assert tuesday.state == BatchState.SUCCEEDED, tuesday.reason
    (killed, again) = next(iter(story.dispatcher.chunks(tuesday.id))).attempts
    assert (killed.exit_code, again.outcome) == (137, "succeeded")
    # No table was extracted twice, and nothing of Monday is left.
    assert len(house.extracted("orders")) == 2
    assert visible(house, "orders")["content"] == ["tuesday 0"]
    assert list(house.under(f"{SHOP}orders/")) == [
        f"{TUESDAY}-csv-1/part-000000000000.csv.gz",
        "manifest.json",
    ]

    # The same night once more, in another batch: it finds all of it done.
    jobs, objects = list(house.jobs), dict(house.objects)
    twice = story.export(TUESDAY, tasks=2)
    assert (list(house.jobs), house.objects) == (jobs, objects)
    assert story.outputs(twice) == story.outputs(tuesday)


def test_on_cloud_run_a_night_is_one_execution_and_a_retry_one_task_with_what_failed(
    site: Site, warehouse: Warehouse
) -> None:
    warehouse.tables = {f"t{n}": Table(size=1000 + n) for n in range(7)}
    warehouse.failing = {"t3": 1}
    runner = ProcessRunner({"export": unpacked(site.folder)}, env=addresses(), limit=3)
    with CloudRunEmulator(runner=runner) as cloud:
        jobs = yaml.safe_load((HERE / "jobs.yaml").read_text())
        # Its lists do not lag and its quotas are off.
        quick = dict.fromkeys(("find_grace", "poll_interval", "tasks_interval"), "1s")
        jobs["targets"]["exports"] |= {"endpoint": cloud.grpc_address, "insecure": True, **quick}
        job = jobs["jobs"]["bigquery-export"]
        job["env"]["DESTINATION"] = DESTINATION
        job["options"]["definition"] = {"image": "export"}
        job["retry"]["pack_wait"] = "1s"
        install(site, jobs)
        site.environment["DISPATCHER_STORAGE_URL"] = (site.folder / "storage").as_uri()
        applied = CliRunner().invoke(app, ["apply", "--yes"], env=site.environment)
        assert applied.exit_code == 0, applied.output
        # From here on with the permissions that the Terraform gives the workers, and no more.
        cloud.world.permissions = granted(HERE)
        site.worker()
        with site.dispatcher() as dispatcher:
            batch = dispatcher.enqueue("bigquery-export", overrides={"tasks": 3})
            until(lambda: batch.refresh().finished, "the night to end", 300)
            assert batch.refresh().state == BatchState.SUCCEEDED, site.logs()
            attempts = {one.item["table"]: one.attempt for one in dispatcher.items(batch.id)}
        assert [execution.task_count for execution in cloud.world.executed] == [3, 1]
    assert attempts == {name: 2 if name == "t3" else 1 for name in warehouse.tables}
    assert all(visible(warehouse, name)["content"] for name in warehouse.tables)
    assert len(warehouse.jobs) == 8


# --- what there is to export ----------------------------------------------------------------------


def test_a_thousand_tables_are_listed_and_balanced_and_each_is_in_one_task(
    warehouse: Warehouse,
) -> None:
    warehouse.tables = {f"t{n:03}": Table(size=n * 1000) for n in range(1000)}
    items = list(tables.list_tables("my-project.shop", night=MONDAY))
    job = load_config(str(HERE / "jobs.yaml")).job("bigquery-export")
    chunks = list(plan_chunks(map(json.dumps, items), job.chunk, max_payload_bytes=10**6))
    taken = Counter(item["table"] for chunk in chunks for item in json.loads(chunk.items))
    assert taken == dict.fromkeys(warehouse.tables, 1)
    weights = [chunk.weight or 0 for chunk in chunks]
    assert len(weights) == 10
    assert max(weights) / min(weights) < 1.01


def test_only_plain_tables_are_listed_with_size_place_and_night(warehouse: Warehouse) -> None:
    warehouse.page = 2
    warehouse.tables = {
        "a": Table(rows=3, size=30),
        "b": Table(kind="VIEW"),
        "c": Table(kind="EXTERNAL"),
        "d": Table(rows=0, size=0),
    }
    common = {"location": "europe-west1", "night": MONDAY}
    assert list(tables.list_tables("my-project.shop", MONDAY)) == [
        {"table": "a", "bytes": 30, "rows": 3, **common},
        {"table": "d", "bytes": 0, "rows": 0, **common},
    ]
    with pytest.raises(NotFound):
        list(tables.list_tables("my-project.nowhere", MONDAY))


def test_a_table_that_is_dropped_while_it_is_listed_is_left_out(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    warehouse.tables = {"a": Table(), "b": Table()}
    listed = warehouse.list_tables("")
    monkeypatch.setattr(warehouse, "list_tables", lambda _: listed)
    del warehouse.tables["a"]
    (left,) = tables.list_tables("my-project.shop", MONDAY)
    assert left["table"] == "b"


@pytest.mark.parametrize(
    ("now", "night"),
    [
        ("2026-11-21T01:29:59", "2026-11-20"),
        ("2026-11-21T01:30:00", "2026-11-21"),
        ("2026-11-22T01:00:00", "2026-11-21"),  # a firing that was caught up a day later
    ],
)
def test_a_night_lasts_until_the_next_one_is_due(now: str, night: str) -> None:
    moment = datetime.fromisoformat(now).replace(tzinfo=ZoneInfo("Asia/Tokyo"))
    assert tables.night_of(moment, "Asia/Tokyo", "01:30") == night
    with pytest.raises(ValueError, match="must be a time of day such as 01:30"):
        tables.night_of(moment, "Asia/Tokyo", "24:00")


# --- one task -------------------------------------------------------------------------------------


def run_task(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, items: Any, **variables: str
) -> tuple[int, dict[str, Any] | None]:
    """Run the program here; its exit code, and its receipt."""
    receipt = tmp_path / "0.json"
    told = {
        "DATASET": "my-project.shop",
        "DESTINATION": DESTINATION,
        "DISPATCH_ITEMS": json.dumps(items),
        "DISPATCH_RESULT_URI": receipt.as_uri(),
        **variables,
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    # The helper is made for one task a process.
    monkeypatch.setattr(container._Process, "task", None)
    code = export_tables.main()
    return code, json.loads(receipt.read_text()) if receipt.exists() else None


def item(table: str, night: str = MONDAY, **other: Any) -> dict[str, Any]:
    return {"table": table, "rows": 1, "location": "europe-west1", "night": night, **other}


def test_what_is_wrong_with_a_table_is_told_of_that_table_and_the_others_are_exported(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    warehouse.looks = 3
    warehouse.tables = {"good": Table(), "nested": Table(nested=True), "broken": Table(files=2)}
    warehouse.put(f"{SHOP}broken/manifest.json", b'{"of": "somebody else"}')
    items = [item("good"), item("gone"), item("nested"), item("broken"), item("far", location="US")]
    code, receipt = run_task(monkeypatch, tmp_path, items)
    assert (code, receipt is not None) == (0, True)
    assert receipt
    assert [one["ok"] for one in receipt["items"]] == [True, False, False, False, False]
    told = [one.get("error") for one in receipt["items"]]
    assert "Not found: Table my-project:shop.gone" in told[1]
    assert "Operation cannot be performed on a nested schema" in told[2]
    assert "broken/manifest.json is no manifest of this program: move it away" in told[3]
    assert "was not found in location US" in told[4]


def test_a_format_that_can_hold_the_table_is_a_variable_away(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    warehouse.tables = {"nested": Table(nested=True, files=2)}
    warehouse.page = 2  # and a listing of several pages
    code, receipt = run_task(monkeypatch, tmp_path, [item("nested")], FORMAT="parquet")
    assert (code, receipt and receipt["items"][0]["output"]["files"]) == (0, 2)
    assert list(warehouse.under(f"{SHOP}nested/{MONDAY}-parquet-1/")) == [
        "part-000000000000.parquet",
        "part-000000000001.parquet",
    ]


@pytest.mark.parametrize(
    ("variables", "code", "said"),
    [
        ({"DATASET": "shop"}, 64, "DATASET is 'shop', and must be project.dataset"),
        ({"DESTINATION": "gs://bucket//x"}, 64, "must be like gs://bucket/folder"),
        ({"FORMAT": "xml"}, 64, "FORMAT is 'xml'; allowed: csv, json, avro, parquet"),
        ({"DISPATCH_ITEMS": '["orders"]'}, 65, "'orders' must be an object with table"),
        ({"DISPATCH_ITEMS": json.dumps([item("a", "tonight")])}, 65, "night is 'tonight'"),
        ({"DISPATCH_ITEMS": "["}, 65, "DISPATCH_ITEMS is not JSON"),
    ],
)
def test_what_cannot_be_used_is_said_and_not_tried_again(
    variables: dict[str, str],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_task(monkeypatch, tmp_path, [], **variables) == (code, None)
    assert said in capsys.readouterr().err


# --- publishing -----------------------------------------------------------------------------------


def extracted(warehouse: Warehouse, night: str, table: str = "orders") -> Run:
    """Have a run's job write its files."""
    run, job = Extracts(PLACE, {}).begin(item(table, night))
    while job.state != "DONE":
        job.reload()
    assert warehouse.extracted(table)[-1] == run.job_id
    return run


def test_an_older_night_that_comes_late_takes_no_newer_ones_place(warehouse: Warehouse) -> None:
    warehouse.tables = {"orders": Table()}
    late = extracted(warehouse, MONDAY)
    exports = Exports(PLACE)
    newer = extracted(warehouse, TUESDAY)
    exports.publish(newer, 1, 1)
    assert exports.publish(late, 1, 1) == {"superseded_by": TUESDAY, "job": late.job_id}
    assert visible(warehouse, "orders")["night"] == TUESDAY
    assert exports.publish(newer, 1, 1)["files"] == 1  # again, as after a crash


def test_an_older_night_touches_nothing_of_a_newer_one_that_is_being_written(
    warehouse: Warehouse,
) -> None:
    warehouse.tables = {"orders": Table()}
    older, newer = extracted(warehouse, MONDAY), extracted(warehouse, TUESDAY)
    Exports(PLACE).publish(older, 1, 1)
    assert visible(warehouse, "orders")["night"] == MONDAY
    assert warehouse.under(newer.prefix)


def test_of_two_that_publish_at_once_the_newer_night_stands(warehouse: Warehouse) -> None:
    warehouse.tables = {"orders": Table()}
    older, newer = extracted(warehouse, MONDAY), extracted(warehouse, TUESDAY)
    waiting = [newer]

    def meanwhile(_: str) -> None:
        if waiting:
            Exports(PLACE).publish(waiting.pop(), 1, 1)

    warehouse.before_write = meanwhile
    assert "superseded_by" in Exports(PLACE).publish(older, 1, 1)
    assert visible(warehouse, "orders")["night"] == TUESDAY


def test_files_that_are_not_all_there_are_not_published(warehouse: Warehouse) -> None:
    warehouse.tables = {"orders": Table(files=3)}
    run = extracted(warehouse, MONDAY)
    del warehouse.objects[f"{run.prefix}part-000000000001.csv.gz"]
    with pytest.raises(ExportError, match="wrote 3 files, and 2 are there"):
        Exports(PLACE).publish(run, 3, 1)
    assert "manifest.json" not in warehouse.under(run.folder)


def test_a_job_that_runs_is_adopted_and_one_that_failed_gets_a_successor(
    warehouse: Warehouse,
) -> None:
    warehouse.looks = 2
    warehouse.tables = {"orders": Table()}
    warehouse.failing = {"orders": 1}
    extracts = Extracts(PLACE, {"dispatch-batch": "b"})
    first, running = extracts.begin(item("orders"))
    same, adopted = Extracts(PLACE, {}).begin(item("orders"))
    assert (same, adopted.job_id, adopted.state) == (first, running.job_id, "RUNNING")
    running.reload()
    assert running.error_result
    second, _ = extracts.begin(item("orders"))
    assert (first.number, second.number) == (1, 2)
    assert warehouse.extracted("orders") == [first.job_id, second.job_id]


def test_other_work_has_another_job_id_and_every_id_is_one_that_bigquery_takes() -> None:
    runs = [
        Run(place, table, night, number)
        for place in (PLACE, Place("my-project", "shop", "bucket", "", "csv"))
        for table in ("a", "A", "a b", "a-b", "größe", "g" * 1000)
        for night in (MONDAY, f"{MONDAY}b")
        for number in (1, 2)
    ]
    ids = {run.job_id for run in runs}
    assert len(ids) == len(runs)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,1024}", one) for one in ids)


# --- the fake is no softer than BigQuery where it matters -----------------------------------------


def test_the_fake_refuses_what_bigquery_refuses(warehouse: Warehouse) -> None:
    warehouse.tables = {"big": Table(size=10**9 + 1, files=2)}
    client = Extracts(PLACE, {})._client

    def extract(job_id: str, uri: str, location: str = "europe-west1") -> bigquery.ExtractJob:
        return client.extract_table("shop.big", uri, job_id=job_id, location=location)

    one_file = extract("one", "gs://bucket/big.csv")
    one_file.reload()
    assert "too large to be exported to a single file" in one_file.error_result["message"]
    for wrong in (
        lambda: extract("one", "gs://bucket/*.csv"),
        lambda: extract("two", "gs://bucket/*-*.csv"),
        lambda: extract("two", "gs://bucket/*.csv", "US"),
        lambda: extract("not an id", "gs://bucket/*.csv"),
        lambda: client.get_job("one"),
        lambda: client.get_job("one", location="EU"),
    ):
        with pytest.raises(GoogleAPIError):
            wrong()
    assert [status for status, _ in warehouse.refused] == [409, 400, 404, 400, 404, 404]


# --- what it takes in the cloud -------------------------------------------------------------------


def test_the_job_here_is_the_clouds_but_for_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = load_config(str(HERE / "jobs.yaml"))
    monkeypatch.setenv("DESTINATION", cloud.job("bigquery-export").env["DESTINATION"])
    here = load_config("examples.bigquery_export.here:everything")
    other = {"command", "options"}
    (job,) = cloud.jobs.values()
    assert job.model_dump(exclude=other) == here.job(job.name).model_dump(exclude=other)
    (schedule,) = cloud.schedules.values()
    params = job.check_params(None)
    assert (schedule.timezone, schedule.cron) == (params["timezone"], "30 1 * * *")
    assert params["starts"] == "01:30"


def test_the_job_here_has_no_bucket_that_nobody_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DESTINATION", raising=False)
    with pytest.raises(ConfigurationError, match="DESTINATION is not set; set it here too"):
        load_config("examples.bigquery_export.here:everything")
    monkeypatch.setenv("DESTINATION", "gs://ours/bigquery")
    here = load_config("examples.bigquery_export.here:everything")
    assert here.job("bigquery-export").env["DESTINATION"] == "gs://ours/bigquery"


def test_the_image_has_the_clients_that_these_tests_ran_with() -> None:
    pins = (HERE / "image" / "requirements.txt").read_text().splitlines()
    names = ("google-cloud-bigquery", "google-cloud-storage")
    assert pins == [f"{name}=={version(name)}" for name in names]


def test_the_cloud_has_the_job_and_the_bucket_of_the_jobs_file() -> None:
    job = load_config(str(HERE / "jobs.yaml")).job("bigquery-export")
    made = resources(HERE)
    export = made["google_cloud_run_v2_job.export"]
    assert export["name"] == job.options["job"]
    assert export["template"][0]["template"][0]["max_retries"] == 0
    bucket = made["google_storage_bucket.exports"]
    assert job.env["DESTINATION"].startswith(
        "gs://" + bucket["name"].replace("${var.project}", "my-project") + "/"
    )


def test_workers_read_no_row_and_containers_start_nothing_but_jobs_of_bigquery() -> None:
    grants: dict[str, set[tuple[str, str]]] = {"worker": set(), "task": set()}
    for name, body in resources(HERE).items():
        if "_iam_member." in name:
            who = body["member"].removeprefix("${google_service_account.").partition(".")[0]
            grants[who].add((name.partition("_iam_member.")[0], body["role"]))
    assert grants == {
        "worker": {
            ("google_bigquery_dataset", "roles/bigquery.metadataViewer"),
            ("google_cloud_run_v2_job", "${google_project_iam_custom_role.launcher.id}"),
            ("google_project", "${google_project_iam_custom_role.follower.id}"),
            ("google_storage_bucket", "roles/storage.objectUser"),
        },
        "task": {
            ("google_bigquery_dataset", "roles/bigquery.dataViewer"),
            ("google_project", "roles/bigquery.jobUser"),
            ("google_storage_bucket", "roles/storage.objectUser"),
            ("google_storage_bucket", "roles/storage.objectViewer"),
        },
    }
