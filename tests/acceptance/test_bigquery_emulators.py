"""Story S2 once more, on emulators that others wrote: bqemulator and gcp-storage-emulator.

The item source, the image's program, Google's clients, the worker and Postgres are real, and so are
rows, exported files and objects. What the emulators lack, the front of google_emulators.py does,
where it is marked FAKE; the last tests here hold it to that. What only a fake can do at will, such
as a job that fails, is in test_bigquery_export.py.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import requests
from google.api_core.exceptions import Conflict, GoogleAPIError, NotFound
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery, storage
from google.cloud.bigquery.retry import DEFAULT_RETRY
from google_emulators import INSTALLED, Emulators, Front, run_emulators, serve_front
from nights import MONDAY, PLACE, SHOP, TUESDAY, Story, kill_container

from dispatcher import BatchState
from examples.bigquery_export import tables
from examples.bigquery_export.image.export_tables import ExportError, Exports, Extracts, Run
from installation import Site

pytestmark = [
    pytest.mark.skipif(
        not (INSTALLED / "installed.lock").exists(),
        reason="no emulators of BigQuery and Cloud Storage here: run scripts/google-emulators.sh",
    ),
]

COLUMNS = ["id", "name"]
Rows = list[tuple[int, str]]


@pytest.fixture
def emulators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulators]:
    """Both emulators with an empty dataset and an empty bucket."""
    with run_emulators(tmp_path / "emulators") as running:
        monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", running.bigquery)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.storage)
        dataset = bigquery.Dataset("my-project.shop")
        dataset.location = "europe-west1"
        client().create_dataset(dataset)
        yield running


@pytest.fixture
def front(emulators: Emulators, monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    """The front, to which Google's clients are led here and in all processes that follow."""
    with serve_front(emulators) as (made, url):
        for name in ("BIGQUERY", "STORAGE"):
            monkeypatch.setenv(f"{name}_EMULATOR_HOST", url)
        yield made


def client() -> bigquery.Client:
    return bigquery.Client("my-project", credentials=AnonymousCredentials())


def fill(table: str, rows: Rows) -> Rows:
    """Have a table with these rows and no others."""
    fields = [bigquery.SchemaField("id", "INT64"), bigquery.SchemaField("name", "STRING")]
    there = client()
    there.delete_table(f"shop.{table}", not_found_ok=True)
    there.create_table(bigquery.Table(f"my-project.shop.{table}", schema=fields))
    if rows:
        told = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        assert there.insert_rows_json(f"my-project.shop.{table}", told) == []
    return rows


def view(name: str, of: str) -> None:
    made = bigquery.Table(f"my-project.shop.{name}")
    made.view_query = f"SELECT id FROM `my-project.shop.{of}`"  # noqa: S608 -- of a test's own table
    client().create_table(made)


def visible(emulators: Emulators, table: str) -> tuple[dict[str, Any], Rows]:
    """What a reader of a table sees: its manifest, and the rows of the files that it names."""
    manifest = json.loads(emulators.content(f"{SHOP}{table}/manifest.json"))
    rows = []
    for file in manifest["files"]:
        data = emulators.content(file["uri"].removeprefix("gs://bucket/"))
        assert len(data) == file["bytes"]
        head, *lines = csv.reader(gzip.decompress(data).decode().splitlines())
        assert head == COLUMNS
        rows += [(int(number), name) for number, name in lines]
    return manifest, sorted(rows)


def test_tables_are_listed_with_the_size_of_their_rows_and_the_place_of_their_dataset(
    front: Front,
) -> None:
    fill("orders", [(n, "é" * n) for n in range(4)])
    for name in ("empty", "refunds"):
        fill(name, [])
    view("a_view", of="orders")
    common = {"location": "europe-west1", "night": MONDAY}
    listed = list(tables.list_tables("my-project.shop", MONDAY))
    assert sorted(listed, key=lambda one: str(one["table"])) == [
        {"table": "empty", "bytes": 0, "rows": 0, **common},
        {"table": "orders", "bytes": 4 * (8 + 2) + 2 * (0 + 1 + 2 + 3), "rows": 4, **common},
        {"table": "refunds", "bytes": 0, "rows": 0, **common},
    ]
    with pytest.raises(NotFound):
        list(tables.list_tables("my-project.nowhere", MONDAY))
    assert [status for status, _ in front.refused] == [404]


@pytest.mark.long
def test_every_table_is_exported_exactly_once_whatever_the_number_of_tables_and_tasks(
    front: Front, site: Site
) -> None:
    there: dict[str, Rows] = {}
    with Story.begun(site) as story:
        for day, count, tasks, chunks in (
            (23, 0, 10, 0),
            (24, 1, 10, 1),
            (25, 10, 30, 10),
            (26, 30, 10, 10),
        ):
            night = f"2026-11-{day}"
            for number in range(len(there), count):
                name = f"t{number:02}"
                there[name] = fill(name, [(row, f"of {name}") for row in range(number % 3)])
            front.extracts.clear()
            batch = story.export(night, tasks)
            assert batch.chunk_count == chunks
            assert sorted(front.extracts) == sorted(
                Run(PLACE, name, night, 1).job_id for name in there
            )
            outputs = story.outputs(batch)
            assert {name: told["rows"] for name, told in outputs.items()} == {
                name: len(rows) for name, rows in there.items()
            }
            for name, rows in there.items():
                manifest, seen = visible(front.emulators, name)
                assert (manifest["night"], seen) == (night, rows)
    assert front.refused == []


def test_each_night_shows_its_rows_whole_and_nothing_of_the_night_before(
    front: Front, site: Site
) -> None:
    emulators = front.emulators
    orders = fill("orders", [(n, f"monday, {n}") for n in range(300)])
    refunds = fill("refunds", [(1, 'a "quoted" name'), (2, "größe")])
    fill("empty", [])
    view("a_view", of="orders")
    with Story.begun(site) as story:
        monday = story.export(MONDAY, tasks=2)
        told = story.outputs(monday)
        assert {name: (one["rows"], one["files"] > 1) for name, one in told.items()} == {
            "orders": (300, True),
            "refunds": (2, False),
            "empty": (0, False),
        }
        for name, rows in (("orders", orders), ("refunds", refunds), ("empty", [])):
            manifest, seen = visible(emulators, name)
            assert (manifest["night"], seen) == (MONDAY, rows)
        assert sorted(front.extracts) == sorted(Run(PLACE, name, MONDAY, 1).job_id for name in told)
        assert front.refused == []

        # The second night: fewer rows; and the container is killed before it can publish.
        fewer = fill("orders", [(n, "tuesday") for n in range(3)])
        arrived, done = Event(), Event()

        def hold(name: str) -> None:
            if name == f"{SHOP}orders/manifest.json":
                arrived.set()
                assert done.wait(200)
                raise ConnectionError

        front.before_write = hold
        tuesday = story.begin(TUESDAY, tasks=1)
        assert arrived.wait(200), site.logs()
        front.before_write = lambda _: None
        assert f"{TUESDAY}-csv-1/part-000000000000.csv.gz" in emulators.names(f"{SHOP}orders/")
        manifest, seen = visible(emulators, "orders")
        assert (manifest["night"], seen) == (MONDAY, orders)
        kill_container(tuesday)
        done.set()
        tuesday = story.ended(tuesday)
        assert tuesday.state == BatchState.SUCCEEDED, f"{tuesday.reason}\n{site.logs()}"
        (killed, again) = next(iter(story.dispatcher.chunks(tuesday.id))).attempts
        assert (killed.exit_code, again.outcome) == (137, "succeeded")
        # The second attempt was told that the jobs are there, and went on with them.
        assert len(front.extracts) == 6
        job = Run(PLACE, "orders", TUESDAY, 1).job_id
        assert (409, f"Already Exists: Job my-project:europe-west1.{job}") in front.refused
        manifest, seen = visible(emulators, "orders")
        assert (manifest["night"], seen) == (TUESDAY, fewer)
        assert emulators.names(f"{SHOP}orders/") == [
            f"{TUESDAY}-csv-1/part-000000000000.csv.gz",
            "manifest.json",
        ]

        # The same night once more, in another batch: it finds all of it done.
        before = emulators.object(f"{SHOP}orders/manifest.json")
        assert story.outputs(story.export(TUESDAY, tasks=3)) == story.outputs(tuesday)
        assert emulators.object(f"{SHOP}orders/manifest.json") == before
        assert len(front.extracts) == 6


def test_what_the_emulators_refuse_is_told_and_of_two_publications_the_newer_night_stands(
    front: Front,
) -> None:
    fill("orders", [(1, "a")])
    extracts = Extracts(PLACE, {"dispatch-batch": "b"})
    with pytest.raises(NotFound, match=r"Not found: table:my-project.shop.gone"):
        extracts.begin(item("gone", MONDAY))
    with pytest.raises(NotFound, match="was not found in location US"):
        extracts.begin({**item("orders", MONDAY), "location": "US"})
    older, newer = (extracted(night) for night in (MONDAY, TUESDAY))
    waiting = [newer]

    def meanwhile(_: str) -> None:
        if waiting:
            Exports(PLACE).publish(waiting.pop(), 1, 1)

    front.before_write = meanwhile
    assert "superseded_by" in Exports(PLACE).publish(older, 1, 1)
    manifest, rows = visible(front.emulators, "orders")
    assert (manifest["night"], rows) == (TUESDAY, [(1, "a")])
    assert [status for status, _ in front.refused] == [404, 404, 409, 409, 412]
    with pytest.raises(ExportError, match="wrote 2 files, and 1 are there"):
        Exports(PLACE).publish(newer, 2, 1)


def item(table: str, night: str) -> dict[str, Any]:
    return {"table": table, "rows": 1, "location": "europe-west1", "night": night}


def extracted(night: str) -> Run:
    run, job = Extracts(PLACE, {}).begin(item("orders", night))
    assert job.state == "RUNNING"
    same, adopted = Extracts(PLACE, {}).begin(item("orders", night))
    assert (same, adopted.job_id) == (run, job.job_id)
    while job.state != "DONE":
        job.reload()
    assert (job.error_result, job.destination_uri_file_counts) == (None, [1])
    return run


# --- what is faked is what they lack --------------------------------------------------------------


def test_each_fake_of_bigquery_is_of_something_that_bqemulator_lacks(emulators: Emulators) -> None:
    there = client()
    for name in ("one", "two"):
        fill(name, [(1, "a")])
    listed = [one.table_id for one in there.list_tables("shop", page_size=1)]
    assert listed == ["one"], "it has pages"
    assert list(there.list_tables("nowhere")) == [], "it misses a dataset"
    found = there.get_table("shop.one")
    assert (found.num_rows, found.num_bytes, found.location) == (1, 0, None)

    def extract(table: str, uri: str, seconds: float) -> bigquery.ExtractJob:
        return there.extract_table(
            bigquery.DatasetReference("my-project", "shop").table(table),
            uri,
            job_id="same",
            location="europe-west1",
            retry=DEFAULT_RETRY.with_timeout(seconds),
        )

    (emulators.folder / "bucket").mkdir()
    for _ in range(2):  # an id is not taken once
        done = extract("one", "gs://bucket/x-*.csv", 5)
        assert (done.state, done.location, done.destination_uri_file_counts) == ("DONE", "US", None)
    assert [path.name for path in emulators.folder.glob("bucket/*")] == ["x-*.csv"]
    assert emulators.names("") == []
    with pytest.raises(GoogleAPIError, match="500"):
        extract("gone", "gs://bucket/y-*.csv", 0.1)
    # What it does know of ids and names.
    with pytest.raises(Conflict):
        there.create_dataset("shop")
    with pytest.raises(NotFound):
        there.get_job("other", location="europe-west1")


def test_each_fake_of_cloud_storage_is_of_something_that_its_emulator_lacks(
    emulators: Emulators,
) -> None:
    bucket = storage.Client(project="my-project").bucket("bucket")
    first = bucket.blob("a name")
    first.upload_from_string(b"one")
    bucket.blob("a name").upload_from_string(b"two", if_generation_match=0)
    second = emulators.object("a name")
    assert second
    assert int(second["generation"]) > first.generation
    older = bucket.blob("a name", generation=first.generation)
    assert older.download_as_bytes() == b"two"
    older.delete()
    assert emulators.object("a name") is None
    with pytest.raises(NotFound):
        bucket.blob("a name").delete()


def test_the_emulators_end_when_the_test_is_killed(emulators: Emulators) -> None:
    assert requests.get(emulators.storage, timeout=100).ok
    assert emulators.process.stdin
    emulators.process.stdin.close()
    assert emulators.process.wait(100) == 0


def test_both_are_installed_from_wheels_whose_hashes_are_locked() -> None:
    lock = Path(__file__).parents[1] / "emulators" / "google-emulators.lock"
    assert (INSTALLED / "installed.lock").read_text() == lock.read_text(), (
        "another lock is installed: run scripts/google-emulators.sh"
    )
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    pinned = [line for line in lines if not line.startswith("    --hash=sha256:")]
    assert all("==" in line and line.endswith(" \\") for line in pinned)
    assert any(line.startswith("bqemulator==") for line in pinned)
