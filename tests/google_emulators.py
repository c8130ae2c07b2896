"""bqemulator and gcp-storage-emulator as one BigQuery and one Cloud Storage, and what they lack.

Neither is ours. Google's clients talk to a front, which passes on what the emulators can do. What
they cannot, it does itself; each such call is marked FAKE below, and a test sees that each is still
needed. Both run in the virtualenv that scripts/google-emulators.sh makes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import requests
from serving import Server
from warehouse import (
    BUCKET,
    PROJECT,
    Answer,
    Api,
    Refused,
    check_extract,
    check_job_location,
    dataset_not_found,
    uploaded,
)

from installation import ROOT

INSTALLED = ROOT / ".venv-google-emulators"
SERVERS = ROOT / "tests" / "emulators" / "google_servers.py"
SHARD = 2000
"""Bytes of rows above which an export has more files than one; of BigQuery, a billion."""

CALL_SECONDS = 100
KEPT_HEADERS = ("Content-Type", "X-Goog-Hash")


@dataclass
class Emulators:
    """The two, as they are."""

    bigquery: str
    storage: str
    folder: Path
    """Where bqemulator writes `gs://bucket/name`: bucket/name below this."""

    process: subprocess.Popen[bytes]
    """Both; it ends by itself when its standard input does, as when the test is killed."""

    def call(self, method: str, path: str, body: bytes = b"", content_type: str = "") -> Answer:
        """Call that one of them which serves a path."""
        base = self.bigquery if path.startswith("/bigquery/") else self.storage
        done = requests.request(
            method,
            base + path,
            data=body,
            headers={"Content-Type": content_type or "application/json"},
            timeout=CALL_SECONDS,
        )
        headers = {name: done.headers[name] for name in KEPT_HEADERS if name in done.headers}
        return Answer(done.content, done.status_code, headers)

    def ask(self, method: str, path: str, told: Any = None) -> dict[str, Any]:
        """Call, and read what is answered.

        Raises:
            Refused: the emulator did.
        """
        answer = self.call(method, path, b"" if told is None else json.dumps(told).encode())
        read: dict[str, Any] = json.loads(answer.body or b"{}")
        if answer.status >= 400:
            error = read.get("error", {})
            reason = error.get("errors", [{"reason": "notFound"}])[0]["reason"]
            raise Refused(answer.status, reason, error.get("message", f"{answer.status} of {path}"))
        return read

    def upload(self, name: str, data: bytes) -> None:
        """Write an object."""
        path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quote(name, safe='')}"
        assert self.call("POST", path, data, "application/octet-stream").status == 200

    def object(self, name: str) -> dict[str, Any] | None:
        """What there is of that name."""
        try:
            return self.ask("GET", f"/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}")
        except Refused as refusal:
            if refusal.status != 404:
                raise
            return None

    def content(self, name: str) -> bytes:
        """The content of an object."""
        path = f"/download/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}?alt=media"
        answer = self.call("GET", path)
        assert answer.status == 200, (name, answer)
        return answer.body

    def names(self, prefix: str) -> list[str]:
        """The names of all objects under a prefix, without it."""
        found = self.ask("GET", f"/storage/v1/b/{BUCKET}/o?prefix={quote(prefix, safe='')}")
        return [one["name"][len(prefix) :] for one in found.get("items", [])]

    def query(self, sql: str) -> list[list[str]]:
        """Run a query in bqemulator; its rows."""
        told = {"query": sql, "useLegacySql": False}
        answer = self.ask("POST", f"/bigquery/v2/projects/{PROJECT}/queries", told)
        assert not answer.get("errors"), answer
        return [[cell["v"] for cell in row["f"]] for row in answer.get("rows", [])]


@dataclass
class Extract:
    """An extract job, of which bqemulator has another: the export statement that does its work."""

    configuration: dict[str, Any]
    location: str
    looks: int


@dataclass
class Front:
    """What Google's clients are led to."""

    emulators: Emulators
    page: int = 2
    """Entries of a listing's page at most."""

    looks: int = 2
    """How often an extract job is looked at before it is done."""

    extracts: dict[str, Extract] = field(default_factory=dict)
    """By their ids, in order."""

    refused: list[tuple[int, str]] = field(default_factory=list)
    """What the front refused, in order: status and message."""

    before_write: Callable[[str], None] = lambda _: None
    """Called with the name of an object that a client is about to write."""

    lock: threading.RLock = field(default_factory=threading.RLock)

    # --- BigQuery ---

    def list_tables(self, dataset: str, token: str) -> dict[str, Any]:
        """FAKE: pages, and that a dataset which is not there is a 404."""
        path = f"/bigquery/v2/projects/{PROJECT}/datasets/{dataset}"
        self.emulators.ask("GET", path)
        told = self.emulators.ask("GET", f"{path}/tables?maxResults=100000")
        start = int(token or 0)
        end = start + self.page
        more = {"nextPageToken": str(end)} if end < len(told["tables"]) else {}
        return {**told, "tables": told["tables"][start:end], **more}

    def get_table(self, dataset: str, table: str) -> dict[str, Any]:
        """FAKE: numBytes, counted from the rows that are there, and the location."""
        path = f"/bigquery/v2/projects/{PROJECT}/datasets/{dataset}"
        told = self.emulators.ask("GET", f"{path}/tables/{table}")
        location = self.emulators.ask("GET", path)["location"]
        # As BigQuery counts: 8 bytes a number, 2 more than its text a string.
        sizes = [
            f"2 + BYTE_LENGTH(`{column['name']}`)" if column["type"] == "STRING" else "8"
            for column in told["schema"]["fields"]
        ]
        sql = f"SELECT SUM({' + '.join(sizes)}) FROM `{PROJECT}.{dataset}.{table}`"  # noqa: S608 -- of a test's own table
        ((counted,),) = self.emulators.query(sql)
        return {**told, "numBytes": counted or "0", "location": location}

    def insert_job(self, project: str, body: dict[str, Any]) -> dict[str, Any]:
        """FAKE: an extract job, done by bqemulator's export statement; its id is taken once.

        bqemulator's own extract job writes one file whose name has the `*`, says not how many files
        it wrote, takes any id any number of times, and answers 500 for a table that is not there.
        """
        extract = body["configuration"]["extract"]
        source, job_id = extract["sourceTable"], body["jobReference"]["jobId"]
        path = f"/bigquery/v2/projects/{PROJECT}/datasets/{source['datasetId']}"
        try:
            location = self.emulators.ask("GET", path)["location"]
        except Refused:
            raise dataset_not_found(source, body["jobReference"]["location"]) from None
        check_extract(project, body, location, self.extracts)
        self.emulators.ask("GET", f"{path}/tables/{source['tableId']}")
        (uri,) = extract["destinationUris"]
        table = f"{PROJECT}.{source['datasetId']}.{source['tableId']}"
        options = f"uri='{uri}', format='{extract['destinationFormat']}'"
        options += f", compression='{extract['compression']}', overwrite=true"
        sql = f"EXPORT DATA OPTIONS({options}) AS SELECT * FROM `{table}`"  # noqa: S608 -- as above
        statement = {"query": {"query": sql, "useLegacySql": False}}
        told = {"jobReference": body["jobReference"], "configuration": statement}
        self.emulators.ask("POST", f"/bigquery/v2/projects/{project}/jobs", told)
        self.extracts[job_id] = Extract(body["configuration"], location, self.looks)
        # From its beginning, something of it can be seen in the bucket.
        self._move(uri, 1)
        return self._shown(job_id)

    def get_job(self, job_id: str, location: str | None) -> dict[str, Any]:
        """FAKE: where a job is; and that it takes a while."""
        extract = self.extracts.get(job_id)
        if extract is None:
            raise Refused(404, "notFound", f"Not found: Job {PROJECT}:{job_id}")
        check_job_location(job_id, location, extract.location)
        extract.looks = max(0, extract.looks - 1)
        if extract.looks == 0:
            (uri,) = extract.configuration["extract"]["destinationUris"]
            self._move(uri)
        return self._shown(job_id)

    def _shown(self, job_id: str) -> dict[str, Any]:
        """An extract job, with state, error and number of files from that of bqemulator."""
        extract = self.extracts[job_id]
        own = self.emulators.ask("GET", f"/bigquery/v2/projects/{PROJECT}/jobs/{job_id}")
        reference = {**own["jobReference"], "location": extract.location}
        shown = {**own, "jobReference": reference, "configuration": extract.configuration}
        statistics = dict(own["statistics"])
        told = statistics.pop("query").get("exportDataStatistics")
        if extract.looks > 0:
            return {**shown, "status": {"state": "RUNNING"}, "statistics": statistics}
        if told is not None:
            statistics["extract"] = {"destinationUriFileCounts": [told["fileCount"]]}
        return {**shown, "statistics": statistics}

    def _move(self, uri: str, limit: int | None = None) -> None:
        """FAKE: from the folder of bqemulator into the bucket."""
        pattern = uri.removeprefix("gs://")
        for path in sorted(self.emulators.folder.glob(pattern))[:limit]:
            name = path.relative_to(self.emulators.folder / BUCKET).as_posix()
            self.emulators.upload(name, path.read_bytes())
            path.unlink()

    # --- Cloud Storage ---

    def upload(self, call: _Call) -> Answer:
        """FAKE: whether the object is the one, or none, that the writer says it replaces."""
        # Of a media upload, the query says what it writes; of a multipart one, its first part.
        name = call.query.get("name") or uploaded(call.headers["Content-Type"], call.sent)[0]
        self.before_write(name)
        with self.lock:
            match = call.query.get("ifGenerationMatch")
            standing = self.emulators.object(name)
            if match is not None and match != (standing["generation"] if standing else "0"):
                raise Refused(412, "conditionNotMet", "At least one of the pre-conditions failed")
            return call.passed_on()

    def download(self, call: _Call, name: str) -> Answer:
        """FAKE: that another object of the name is not the one that is asked for."""
        self._check_generation(name, call.query.get("generation"))
        return call.passed_on()

    def delete(self, call: _Call, name: str) -> Answer:
        """FAKE: as for a download."""
        self._check_generation(name, call.query.get("generation"))
        return call.passed_on()

    def _check_generation(self, name: str, generation: str | None) -> None:
        standing = self.emulators.object(name)
        if standing is None or (generation or standing["generation"]) != standing["generation"]:
            raise Refused(404, "notFound", f"No such object: {BUCKET}/{name}")


class _Server(Server):
    def __init__(self, front: Front) -> None:
        super().__init__(_Call)
        self.front = front


class _Call(Api):
    """One call: of the front where it is a FAKE, and else of an emulator."""

    server: _Server
    sent: bytes
    query: dict[str, str]

    def remember(self, refusal: Refused) -> None:
        self.server.front.refused.append((refusal.status, str(refusal)))

    def respond(self, body: bytes) -> Answer:
        parts = urlsplit(self.path)
        self.sent = body
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        front = self.server.front
        project, objects = f"/bigquery/v2/projects/{PROJECT}", f"/storage/v1/b/{BUCKET}/o"
        if re.fullmatch(f"POST /upload{objects}", f"{self.command} {parts.path}"):
            return front.upload(self)  # may be held by the test
        fakes: list[tuple[str, Callable[..., Any]]] = [
            (
                f"GET {project}/datasets/([^/]+)/tables",
                lambda dataset: front.list_tables(dataset, self.query.get("pageToken", "")),
            ),
            (f"GET {project}/datasets/([^/]+)/tables/([^/]+)", front.get_table),
            (
                "POST /bigquery/v2/projects/([^/]+)/jobs",
                lambda name: front.insert_job(name, json.loads(body)),
            ),
            (
                f"GET {project}/jobs/([^/]+)",
                lambda job_id: front.get_job(job_id, self.query.get("location")),
            ),
            (f"GET /download{objects}/(.+)", lambda name: front.download(self, name)),
            (f"DELETE {objects}/(.+)", lambda name: front.delete(self, name)),
        ]
        for pattern, call in fakes:
            if found := re.fullmatch(pattern, f"{self.command} {parts.path}"):
                with front.lock:
                    told = call(*map(unquote, found.groups()))
                return told if isinstance(told, Answer) else Answer(json.dumps(told).encode())
        return self.passed_on()

    def passed_on(self) -> Answer:
        """What the emulator answers."""
        emulators = self.server.front.emulators
        return emulators.call(
            self.command, self.path, self.sent, self.headers["Content-Type"] or ""
        )


@contextmanager
def run_emulators(folder: Path, *, bigquery: bool = True) -> Iterator[Emulators]:
    """Start both, or Cloud Storage alone, and stop them at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    # The extension of DuckDB is in the virtualenv's folder.
    settings = {"HOME": str(INSTALLED), "PATH": os.environ["PATH"], "TMPDIR": str(folder)}
    log = folder / "servers.log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [INSTALLED / "bin" / "python", SERVERS, folder, BUCKET, *([str(SHARD)] * bigquery)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=settings,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout
        try:
            told = next((line for line in process.stdout if line.startswith(b"{")), None)
            assert told, log.read_text()[-4000:]
            yield Emulators(**json.loads(told), folder=folder, process=process)
        finally:
            process.kill()  # they keep nothing


@contextmanager
def serve_front(emulators: Emulators) -> Iterator[tuple[Front, str]]:
    """Run the front until the block ends; gives it and its URL."""
    front = Front(emulators)
    with _Server(front).serving() as server:
        yield front, server.url
