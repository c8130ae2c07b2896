"""The program of `bigquery-export`: exports the tables of one chunk, each whole or not at all.

A table of a night is exported by one extract job of BigQuery, whose id follows from what it does:
whoever asks for it again, after a crash or in a second container, gets a 409 and goes on with the
job that is there. It writes under a prefix of its own. Only when all of its files are there is the
table's manifest put in place, in one write; then what older nights left is deleted.

    DESTINATION/DATASET/TABLE/manifest.json                    names the files that are the export
    DESTINATION/DATASET/TABLE/NIGHT-FORMAT-TRY/part-*.csv.gz   those files

Variables: DATASET (project.dataset), DESTINATION (gs://bucket/prefix), FORMAT; and those of the
dispatcher, which `container.py` reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import requests
from google.api_core.exceptions import Conflict, GoogleAPIError, PreconditionFailed
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import GoogleAuthError
from google.cloud import bigquery, storage

try:
    from dispatcher import container
except ImportError:  # in the image, where it is a file
    import container  # type: ignore[import-not-found,no-redef]  # as above

BAD_USAGE = 64
BAD_INPUT = 65
"""Exit codes that say: trying again will not help; `exit_codes` in jobs.yaml knows them."""

AT_ONCE = 10
"""Extract jobs of this container that run at once; BigQuery does the work."""

TRIES = 100
"""Jobs for one table and night at most: each one that failed keeps its id."""

EXTRACT_SECONDS = 50 * 60
"""BigQuery stops a job after this, so that the next try can begin a new one."""

CALL_SECONDS = 60.0
SHORTEST_WAIT, LONGEST_WAIT = 0.1, 5.0
"""Seconds between two looks at the jobs that run."""

RACES = 5
"""How often a manifest may change under a publication before that gives up."""

FORMATS = {
    "csv": ("csv.gz", "CSV", "GZIP"),
    "json": ("json.gz", "NEWLINE_DELIMITED_JSON", "GZIP"),
    "avro": ("avro", "AVRO", "SNAPPY"),
    "parquet": ("parquet", "PARQUET", "SNAPPY"),
}
"""Each with the end of its files' names, and what BigQuery calls it and its compression."""

NIGHT = re.compile(r"\d{4}-\d\d-\d\d[a-z]?")
"""A day; a letter after it is one more export of that day. Later ones sort after earlier ones."""


class ExportError(Exception):
    """A table was not exported; the text says why."""


FAILURES = (ExportError, GoogleAPIError, GoogleAuthError, requests.RequestException)
"""What is told of one table, while the others go on."""


@dataclass(frozen=True)
class Place:
    """What is exported, and to where: the same for all tables of a job."""

    project: str
    dataset: str
    bucket: str
    root: str
    """The destination in the bucket: empty, or with a slash at its end."""

    format: str

    @classmethod
    def told(cls, environ: Mapping[str, str]) -> Place:
        """Read the variables.

        Raises:
            ValueError: one of them is not set, or cannot be used.
        """
        dataset, destination, form = (
            environ.get(name, "") for name in ("DATASET", "DESTINATION", "FORMAT")
        )
        source = re.fullmatch(r"((?:[a-z0-9.-]+:)?[a-z0-9-]+)\.(\w+)", dataset)
        goal = re.fullmatch(r"gs://([a-z0-9._-]+)((?:/[^/*]+)*)/?", destination)
        if source is None:
            raise ValueError(f"DATASET is {dataset!r}, and must be project.dataset")
        if goal is None:
            raise ValueError(f"DESTINATION is {destination!r}, and must be like gs://bucket/folder")
        form = form or "csv"
        if form not in FORMATS:
            raise ValueError(f"FORMAT is {form!r}; allowed: {', '.join(FORMATS)}")
        return cls(source[1], source[2], goal[1], f"{goal[2]}/"[1:], form)


@dataclass(frozen=True)
class Run:
    """One try at the export of a table for a night: one extract job, with a prefix of its own."""

    place: Place
    table: str
    night: str
    number: int

    @property
    def name(self) -> str:
        """Its folder: what is put in place, or deleted, as one."""
        return f"{self.night}-{self.place.format}-{self.number}"

    @property
    def folder(self) -> str:
        """Where all that belongs to the table lies."""
        return f"{self.place.root}{self.place.dataset}/{self.table}/"

    @property
    def prefix(self) -> str:
        """Where the files of this run lie, and no others."""
        return f"{self.folder}{self.name}/"

    @property
    def uri(self) -> str:
        """What BigQuery is told. Always with `*`: a table may pass 1 GB on any night."""
        return f"gs://{self.place.bucket}/{self.prefix}part-*.{FORMATS[self.place.format][0]}"

    @property
    def job_id(self) -> str:
        """The same for the same work, whoever asks for it: BigQuery takes it once."""
        words = re.sub(r"[^A-Za-z0-9]+", "-", self.table)[:60]
        source = f"{self.place.project}.{self.place.dataset}.{self.table}"
        digest = hashlib.sha256(f"{source} {self.uri}".encode()).hexdigest()[:16]
        return f"export_{self.night}_{words}_{digest}_{self.number}"


class Extracts:
    """The extract jobs of BigQuery."""

    def __init__(self, place: Place, labels: Mapping[str, str]) -> None:
        fake = os.environ.get("BIGQUERY_EMULATOR_HOST")
        self._client = bigquery.Client(
            place.project,
            credentials=AnonymousCredentials() if fake else None,  # type: ignore[no-untyped-call]  # google.auth tells no types
        )
        self._place = place
        self._config = bigquery.ExtractJobConfig(
            destination_format=FORMATS[place.format][1],
            compression=FORMATS[place.format][2],
            job_timeout_ms=EXTRACT_SECONDS * 1000,
            labels=dict(labels),
        )

    def begin(self, item: Mapping[str, Any]) -> tuple[Run, bigquery.ExtractJob]:
        """Start the job of a table's night, or find the one that was started before.

        A job that failed keeps its id; so each try has a number, and the first that has not failed
        is the one.

        Raises:
            ExportError: too many have failed.
        """
        table, location = str(item["table"]), item["location"]
        source = bigquery.DatasetReference(self._place.project, self._place.dataset).table(table)
        for number in range(1, TRIES + 1):
            run = Run(self._place, table, item["night"], number)
            try:
                return run, self._client.extract_table(
                    source,
                    run.uri,
                    job_id=run.job_id,
                    location=location,
                    job_config=self._config,
                    timeout=CALL_SECONDS,
                )
            except Conflict:
                job = self._client.get_job(run.job_id, location=location, timeout=CALL_SECONDS)
            if not isinstance(job, bigquery.ExtractJob):
                raise ExportError(f"{run.job_id} is another kind of job, and not ours")
            if job.error_result is None:
                print(f"{table}: goes on with job {run.job_id}, which is {job.state}", flush=True)
                return run, job
        raise ExportError(f"{TRIES} extract jobs for the night {item['night']} have failed")


class Exports:
    """The exports in Cloud Storage: what a table's readers see."""

    def __init__(self, place: Place) -> None:
        # Told by STORAGE_EMULATOR_HOST, it needs no credentials.
        self._client = storage.Client(project=place.project)
        self._bucket = self._client.bucket(place.bucket)

    def publish(self, run: Run, files: int, rows: int) -> dict[str, Any]:
        """Make a finished run the table's export, and delete what older nights left.

        May be done again, and by several at once: an older night never takes the place of a newer
        one, and no run of a newer night is touched.

        Returns:
            What is told of the table: its files, bytes, rows, manifest and job.

        Raises:
            ExportError: the files are not those that the job wrote; or others publish all the time.
        """
        manifest_name = f"{run.folder}manifest.json"
        for _ in range(RACES):
            found = list(self._client.list_blobs(self._bucket, prefix=run.folder))
            manifest = next((blob for blob in found if blob.name == manifest_name), None)
            own = [blob for blob in found if blob.name.startswith(run.prefix)]
            standing = {} if manifest is None else _read_manifest(manifest)
            if standing and standing["night"] > run.night:
                _delete(self._bucket, own)
                return {"superseded_by": standing["night"], "job": run.job_id}
            if len(own) != files:
                raise ExportError(f"{run.job_id} wrote {files} files, and {len(own)} are there")
            told = {
                "rows": rows,
                "bytes": sum(blob.size for blob in own),
                "files": files,
                "job": run.job_id,
            }
            if standing.get("run") != run.name:
                text = json.dumps(_manifest(run, told, own), ensure_ascii=False, indent=1)
                try:
                    self._bucket.blob(manifest_name).upload_from_string(
                        text,
                        "application/json",
                        if_generation_match=manifest.generation if manifest else 0,
                        timeout=CALL_SECONDS,
                    )
                except PreconditionFailed:
                    continue  # somebody else has just published: look again who is newer
            _delete(self._bucket, [blob for blob in found if _is_stale(blob.name, run)])
            return {**told, "manifest": f"gs://{run.place.bucket}/{manifest_name}"}
        raise ExportError(f"{manifest_name} changed {RACES} times while it was to be written")


def _manifest(run: Run, told: Mapping[str, Any], files: Iterable[storage.Blob]) -> dict[str, Any]:
    return {
        "version": 1,
        "dataset": f"{run.place.project}.{run.place.dataset}",
        "table": run.table,
        "night": run.night,
        "run": run.name,
        "format": run.place.format,
        **told,
        "files": [
            {
                "uri": f"gs://{run.place.bucket}/{blob.name}",
                "bytes": blob.size,
                "crc32c": blob.crc32c,
            }
            for blob in files
        ],
        "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _read_manifest(blob: storage.Blob) -> dict[str, Any]:
    try:
        told = json.loads(blob.download_as_bytes(timeout=CALL_SECONDS))
        if isinstance(told, dict) and all(isinstance(told[name], str) for name in ("night", "run")):
            return told
    except (ValueError, KeyError):
        pass  # said below
    raise ExportError(f"{blob.name} is no manifest of this program: move it away")


def _is_stale(name: str, run: Run) -> bool:
    """Whether an object is of an older night, or of another try at this one."""
    folder = name[len(run.folder) :].partition("/")[0]
    night = folder.rsplit("-", 2)[0]
    return NIGHT.fullmatch(night) is not None and night <= run.night and folder != run.name


def _delete(bucket: storage.Bucket, blobs: Sequence[storage.Blob]) -> None:
    # By their generations: these objects, and none that took the name of one since.
    bucket.delete_blobs(blobs, on_error=_gone, preserve_generation=True, timeout=CALL_SECONDS)


def _gone(_: object) -> None:
    """Another container has deleted it, which is as well."""


def export_all(task: container.Task, extracts: Extracts, exports: Exports) -> None:
    """Export every table of the task, some at once, and report each."""
    waiting = deque(range(len(task.items)))
    running: dict[int, tuple[Run, bigquery.ExtractJob]] = {}
    pause = SHORTEST_WAIT
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            position = waiting.popleft()
            try:
                running[position] = extracts.begin(task.items[position])
            except FAILURES as error:
                _report_failed(task, position, error)
        ended = 0
        for position, (run, job) in list(running.items()):
            try:
                output = _settle(run, job, exports, rows=task.items[position]["rows"])
            except FAILURES as error:
                _report_failed(task, position, error)
            else:
                if output is None:
                    continue
                task.report_at(position, ok=True, output=output)
                print(f"{run.table}: {json.dumps(output)}", flush=True)
            del running[position]
            ended += 1
        if running and not ended:
            time.sleep(pause)
        pause = SHORTEST_WAIT if ended else min(pause * 1.5, LONGEST_WAIT)


def _settle(
    run: Run, job: bigquery.ExtractJob, exports: Exports, *, rows: int
) -> dict[str, Any] | None:
    """Look at a job, and publish what it wrote if it has ended; None if it has not.

    Raises:
        ExportError: it failed, or what it wrote cannot be published.
    """
    if job.state != "DONE":
        job.reload(timeout=CALL_SECONDS)
    if job.state != "DONE":
        return None
    if job.error_result is not None:
        reason, message = (job.error_result.get(name) for name in ("reason", "message"))
        raise ExportError(f"{run.job_id} failed: {reason}: {message}")
    return exports.publish(run, sum(job.destination_uri_file_counts or ()), rows)


def _report_failed(task: container.Task, position: int, error: Exception) -> None:
    sys.stderr.write(f"{task.items[position]['table']}: {error}\n")
    task.report_at(position, ok=False, error=error)


def check_items(items: Sequence[Any]) -> None:
    """Refuse items that `tables.py` did not make.

    Raises:
        ValueError: one of them lacks something.
    """
    wanted = {"table": str, "location": str, "night": str, "rows": int}
    for item in items:
        if not isinstance(item, dict) or not all(
            isinstance(item.get(name), kind) for name, kind in wanted.items()
        ):
            raise ValueError(f"{item!r} must be an object with {', '.join(wanted)}")
        if NIGHT.fullmatch(item["night"]) is None:
            raise ValueError(f"night is {item['night']!r}, and must be like 2026-11-21 or …-21b")


def main() -> int:
    """Do the work of one task; return the exit code."""
    try:
        place = Place.told(os.environ)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return BAD_USAGE
    labels = {"dispatch-batch": os.environ.get("DISPATCH_BATCH_ID", "by-hand")}
    try:
        with container.run() as task:
            check_items(task.items)
            export_all(task, Extracts(place, labels), Exports(place))
    except ValueError as error:  # container.InputError is one
        sys.stderr.write(f"bad input: {error}\n")
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
