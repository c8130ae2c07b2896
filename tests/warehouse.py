"""A fake of BigQuery and Cloud Storage: as much of their REST APIs as exporting tables needs.

It is a fake of ours and no proof of what Google does. Google's own clients talk to it. It is as
strict as the documents are in what an export can do wrong: a job's id is taken once, a job belongs
to a location, a job extracts one table, a URI without `*` takes 1 GB of logical bytes, a listing
has pages, a write may ask for the generation that it replaces.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c
from serving import Prompt, Server

PROJECT, DATASET, BUCKET = "my-project", "shop", "bucket"
SINGLE_FILE = 10**9
"""Logical bytes that fit one file."""

MULTI_REGIONS = frozenset({"US", "EU"})
FORMATS = {
    "CSV": {"NONE", "GZIP"},
    "NEWLINE_DELIMITED_JSON": {"NONE", "GZIP"},
    "AVRO": {"NONE", "DEFLATE", "SNAPPY"},
    "PARQUET": {"NONE", "SNAPPY", "GZIP", "ZSTD"},
}


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason

    @property
    def body(self) -> bytes:
        """As Google's APIs write it."""
        error = {"reason": self.reason, "message": str(self), "domain": "global"}
        whole = {"code": self.status, "message": str(self), "errors": [error]}
        return json.dumps({"error": whole}).encode()


def check_extract(
    project: str, body: dict[str, Any], location: str, taken: Container[str], bucket: str = BUCKET
) -> None:
    """Refuse what BigQuery refuses of a new extract job from a dataset that lies in a location.

    Args:
        project: of the call's path.
        body: the job.
        location: of the dataset.
        taken: the ids that there are.
        bucket: the only one.

    Raises:
        Refused: as BigQuery says it.
    """
    reference, extract = body["jobReference"], body["configuration"]["extract"]
    job_id, asked = reference["jobId"], reference.get("location", "US")
    if project != PROJECT or reference["projectId"] != project:
        raise Refused(403, "accessDenied", f"Access Denied: Project {project}")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,1024}", job_id):
        raise Refused(400, "invalid", f"Invalid job ID {job_id!r}")
    if job_id in taken:
        raise Refused(409, "duplicate", f"Already Exists: Job {project}:{asked}.{job_id}")
    source = extract.get("sourceTable")
    if not isinstance(source, dict):
        raise Refused(400, "required", "Required parameter is missing: sourceTable")
    if asked != location:
        raise dataset_not_found(source, asked)
    compressions = FORMATS.get(extract.get("destinationFormat", "CSV"), set())
    if extract.get("compression", "NONE") not in compressions:
        raise Refused(400, "invalid", "Invalid compression for this format")
    for uri in extract["destinationUris"]:
        found = re.fullmatch(r"gs://([^/]+)/(.+)", uri)
        if found is None or uri.count("*") > 1 or "//" in found[2]:
            raise Refused(400, "invalid", f"Invalid destination URI {uri}")
        if found[1] != bucket:
            raise Refused(404, "notFound", f"Not found: Bucket {found[1]}")


def dataset_not_found(source: dict[str, Any], location: str) -> Refused:
    """What is said of a table's dataset that is nowhere, or elsewhere."""
    name = f"{source['projectId']}:{source['datasetId']}"
    said = f"Not found: Dataset {name} was not found in location {location}"
    return Refused(404, "notFound", said)


def check_job_location(job_id: str, asked: str | None, location: str) -> None:
    """Refuse a look at a job that does not say where the job is.

    Raises:
        Refused: as BigQuery says it.
    """
    if (asked or "US") != location and (asked is not None or location not in MULTI_REGIONS):
        raise Refused(404, "notFound", f"Not found: Job {PROJECT}:{job_id}")


@dataclass
class Table:
    """A table, and into how many files BigQuery happens to cut it."""

    rows: int = 10
    size: int = 1000
    files: int = 1
    kind: str = "TABLE"
    nested: bool = False
    content: str = "some rows"


@dataclass
class Object:
    """An object of the bucket."""

    data: bytes
    generation: int


@dataclass
class Warehouse:
    """One dataset, one bucket, and the jobs between them."""

    location: str = "europe-west1"
    page: int = 50
    """Entries of a listing's page at most, whatever is asked for."""

    looks: int = 1
    """How often a job is looked at before it is done."""

    tables: dict[str, Table] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    objects: dict[str, Object] = field(default_factory=dict)
    failing: dict[str, int] = field(default_factory=dict)
    """How many more extract jobs of a table fail, after they have written something."""

    refused: list[tuple[int, str]] = field(default_factory=list)
    """What was refused, in order: status and message."""

    before_write: Callable[[str], None] = lambda _: None
    """Called with the name of an object that a client is about to write."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    _generation: int = 0

    def extracted(self, table: str) -> list[str]:
        """The ids of the jobs that extracted a table, in order."""
        return [
            job_id
            for job_id, job in self.jobs.items()
            if job["configuration"]["extract"]["sourceTable"]["tableId"] == table
        ]

    def under(self, prefix: str) -> dict[str, bytes]:
        """The objects whose names begin so, by the rest of their names."""
        with self.lock:
            return {
                name[len(prefix) :]: one.data
                for name, one in sorted(self.objects.items())
                if name.startswith(prefix)
            }

    # --- BigQuery ---

    def list_tables(self, token: str) -> dict[str, Any]:
        names = sorted(self.tables)
        start = int(token or 0)
        end = start + self.page
        listed = [
            {"tableReference": _reference(name), "type": self.tables[name].kind}
            for name in names[start:end]
        ]
        more = {"nextPageToken": str(end)} if end < len(names) else {}
        return {"tables": listed, "totalItems": len(names), **more}

    def get_table(self, name: str) -> dict[str, Any]:
        table = self._table(name)
        return {
            "tableReference": _reference(name),
            "type": table.kind,
            "location": self.location,
            "numBytes": str(table.size),
            "numRows": str(table.rows),
        }

    def insert_job(self, project: str, body: dict[str, Any]) -> dict[str, Any]:
        check_extract(project, body, self.location, self.jobs)
        reference, extract = body["jobReference"], body["configuration"]["extract"]
        source = extract["sourceTable"]
        if source["datasetId"] != DATASET:
            raise dataset_not_found(source, self.location)
        self._table(source["tableId"])
        job_id, location = reference["jobId"], self.location
        job = {
            "kind": "bigquery#job",
            "id": f"{project}:{location}.{job_id}",
            "jobReference": {**reference, "location": location},
            "configuration": body["configuration"],
            "status": {"state": "RUNNING"},
            "statistics": {"creationTime": "1795226400000"},
        }
        self.jobs[job_id] = {**job, "looks": self.looks}
        # From its beginning, something of it can be seen in the bucket.
        self._write_files(extract, files=1)
        return job

    def get_job(self, job_id: str, location: str | None) -> dict[str, Any]:
        job = self.jobs.get(job_id)
        if job is None:
            raise Refused(404, "notFound", f"Not found: Job {PROJECT}:{job_id}")
        check_job_location(job_id, location, self.location)
        job["looks"] -= 1
        if job["looks"] <= 0 and job["status"]["state"] != "DONE":
            job["status"] = {"state": "DONE", **self._finish(job)}
        return {name: value for name, value in job.items() if name != "looks"}

    def _finish(self, job: dict[str, Any]) -> dict[str, Any]:
        """Do a job's work; returns its error, if any."""
        extract = job["configuration"]["extract"]
        name = extract["sourceTable"]["tableId"]
        table = self._table(name)
        (uri,) = extract["destinationUris"]
        reason = message = ""
        if self.failing.get(name, 0) > 0:
            self.failing[name] -= 1
            reason, message = "backendError", "Error encountered during execution. Try again."
        elif table.nested and extract["destinationFormat"] == "CSV":
            reason, message = (
                "invalid",
                "Operation cannot be performed on a nested schema. Field: x",
            )
        elif "*" not in uri and table.size > SINGLE_FILE:
            reason = "invalid"
            message = f"Table {name} too large to be exported to a single file. Specify a uri "
            message += "including a * to shard export."
        if reason:
            error = {"reason": reason, "message": message}
            return {"errorResult": error, "errors": [error]}
        written = self._write_files(extract, files=table.files)
        job["statistics"]["extract"] = {"destinationUriFileCounts": [str(written)]}
        return {}

    def _write_files(self, extract: dict[str, Any], files: int) -> int:
        table = self.tables[extract["sourceTable"]["tableId"]]
        (uri,) = extract["destinationUris"]
        name = uri.partition(f"gs://{BUCKET}/")[2]
        numbers = range(files if "*" in name else 1)
        for number in numbers:
            self.put(name.replace("*", f"{number:012}"), f"{table.content} {number}".encode())
        return len(numbers)

    def _table(self, name: str) -> Table:
        if name not in self.tables:
            raise Refused(404, "notFound", f"Not found: Table {PROJECT}:{DATASET}.{name}")
        return self.tables[name]

    # --- Cloud Storage ---

    def put(self, name: str, data: bytes, match: str | None = None) -> dict[str, Any]:
        with self.lock:
            standing = self.objects.get(name)
            if match is not None and int(match) != (standing.generation if standing else 0):
                raise Refused(412, "conditionNotMet", "At least one of the pre-conditions failed")
            self._generation += 1
            self.objects[name] = Object(data, self._generation)
            return self.shown(name)

    def delete(self, name: str, generation: str | None) -> None:
        standing = self.objects.get(name)
        if standing is None or (generation or str(standing.generation)) != str(standing.generation):
            raise Refused(404, "notFound", f"No such object: {BUCKET}/{name}")
        del self.objects[name]

    def shown(self, name: str) -> dict[str, Any]:
        one = self.objects[name]
        return {
            "kind": "storage#object",
            "bucket": BUCKET,
            "name": name,
            "generation": str(one.generation),
            "size": str(len(one.data)),
            "md5Hash": _md5(one.data),
            "crc32c": base64.b64encode(google_crc32c.Checksum(one.data).digest()).decode(),
        }

    def list_objects(self, prefix: str, token: str) -> dict[str, Any]:
        names = sorted(name for name in self.objects if name.startswith(prefix) and name > token)
        shown = [self.shown(name) for name in names[: self.page]]
        more = {"nextPageToken": names[self.page - 1]} if len(names) > self.page else {}
        return {"kind": "storage#objects", "items": shown, **more}


def _reference(table: str) -> dict[str, str]:
    return {"projectId": PROJECT, "datasetId": DATASET, "tableId": table}


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


@dataclass
class Answer:
    """An answer of one of the APIs."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


class Api(Prompt, BaseHTTPRequestHandler):
    """One call of an API of Google; what there is to call is for its children to say."""

    def respond(self, body: bytes) -> Answer:
        """Do what is asked for.

        Raises:
            Refused: it is not done.
            ConnectionError: the test ends the call without an answer.
        """
        raise NotImplementedError

    def remember(self, refusal: Refused) -> None:
        """Note what was refused."""
        raise NotImplementedError

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        try:
            answer = self.respond(body)
        except Refused as refusal:
            self.remember(refusal)
            answer = Answer(refusal.body, refusal.status)
        except ConnectionError:
            self.close_connection = True
            return
        self.send_response(answer.status if answer.body or answer.status != 200 else 204)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = _serve  # noqa: N815 -- http.server's own names


class _Server(Server):
    def __init__(self, warehouse: Warehouse) -> None:
        super().__init__(_Api)
        self.warehouse = warehouse


class _Api(Api):
    server: _Server

    def remember(self, refusal: Refused) -> None:
        self.server.warehouse.refused.append((refusal.status, str(refusal)))

    def respond(self, body: bytes) -> Answer:
        answer = Answer(self._route(body))
        if "alt=media" in self.path:
            answer.headers["X-Goog-Hash"] = f"md5={_md5(answer.body)}"
        return answer

    def _route(self, body: bytes) -> bytes:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        house = self.server.warehouse
        for pattern, call in self._calls(house, query, body):
            if found := re.fullmatch(pattern, f"{self.command} {parts.path}"):
                if pattern.startswith("POST /upload/"):  # may be held by the test
                    return _as_json(call(*map(unquote, found.groups())))
                with house.lock:
                    return _as_json(call(*map(unquote, found.groups())))
        raise Refused(404, "notFound", f"this fake has no {self.command} {parts.path}")

    def _calls(
        self, house: Warehouse, query: dict[str, str], body: bytes
    ) -> list[tuple[str, Callable[..., Any]]]:
        tables = f"/bigquery/v2/projects/{PROJECT}/datasets/{DATASET}/tables"
        objects = f"/storage/v1/b/{BUCKET}/o"
        token = query.get("pageToken", "")
        return [
            (f"GET {tables}", lambda: house.list_tables(token)),
            (f"GET {tables}/([^/]+)", house.get_table),
            (
                "POST /bigquery/v2/projects/([^/]+)/jobs",
                lambda project: house.insert_job(project, json.loads(body)),
            ),
            (
                f"GET /bigquery/v2/projects/{PROJECT}/jobs/([^/]+)",
                lambda job_id: house.get_job(job_id, query.get("location")),
            ),
            (f"GET /storage/v1/b/{BUCKET}", lambda: {"name": BUCKET, "location": house.location}),
            (f"GET {objects}", lambda: house.list_objects(query.get("prefix", ""), token)),
            (f"GET /download{objects}/(.+)", lambda name: self._data(house, name)),
            (f"POST /upload{objects}", lambda: self._upload(house, query, body)),
            (
                f"DELETE {objects}/(.+)",
                lambda name: house.delete(name, query.get("generation")),
            ),
        ]

    @staticmethod
    def _data(house: Warehouse, name: str) -> bytes:
        if name not in house.objects:
            raise Refused(404, "notFound", f"No such object: {BUCKET}/{name}")
        return house.objects[name].data

    def _upload(self, house: Warehouse, query: dict[str, str], body: bytes) -> dict[str, Any]:
        assert query["uploadType"] == "multipart", query
        name, data = uploaded(self.headers["Content-Type"], body)
        house.before_write(name)
        return house.put(name, data, query.get("ifGenerationMatch"))


def uploaded(content_type: str, body: bytes) -> tuple[str, bytes]:
    """The name and the content of a multipart upload."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    parts: Any = BytesParser().parsebytes(head + body).get_payload()
    described, content = parts
    return json.loads(described.get_payload(decode=True))["name"], content.get_payload(decode=True)


def _as_json(answer: Any) -> bytes:
    if isinstance(answer, bytes):
        return answer
    return b"" if answer is None else json.dumps(answer).encode()


@contextmanager
def serve(warehouse: Warehouse) -> Iterator[str]:
    """Run the fake until the block ends; gives its URL."""
    with _Server(warehouse).serving() as server:
        yield server.url
