"""A fake of Google Cloud Storage: as much of its XML and JSON APIs as writing receipts needs.

It is a fake of ours and no proof of what Google does. It keeps to the documents where
`gcp-storage-emulator` does not: a write with generation match 0 of an object that exists is
answered 412, and a PUT to the JSON API's uploads, which is not documented, 405.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import requests
from serving import Prompt, Server

UPLOADS = "/upload/storage/v1/b/"
OBJECTS = "/storage/v1/b/"


class FakeGcs(Server):
    """One bucket, named `bucket`; `objects` are its content by key."""

    def __init__(self) -> None:
        super().__init__(_Api)
        self.objects: dict[str, bytes] = {}
        self.refused = ""
        """A key of which nothing may be read or written: 403."""
        self.unavailable = ""
        """A key of which nothing can be written: 503."""
        self.conflicts = 0
        """How many more writes meet another one at the same time: 409."""

        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.lock = threading.Lock()
        self.forbidden: frozenset[str] = frozenset()
        """Methods that nobody may use on any key: 403."""

    def account(self) -> str:
        """Give the key file, for GOOGLE_SERVICE_ACCOUNT_KEY, that leads clients here."""
        return gcs_account(self.url)


def gcs_account(url: str) -> str:
    """Give the key file, for GOOGLE_SERVICE_ACCOUNT_KEY, that leads clients to a URL."""
    empty = dict.fromkeys(["client_email", "private_key", "private_key_id"], "")
    return json.dumps({"gcs_base_url": url, "disable_oauth": True, **empty})


class _Api(Prompt, BaseHTTPRequestHandler):
    server: FakeGcs

    def do_GET(self) -> None:
        bucket, key, query = self._target()
        if "/computeMetadata/" in self.path:
            assert self.headers["Metadata-Flavor"] == "Google"
            self._answer(200, b'{"access_token":"of-the-platform","expires_in":3599}')
        elif self._refused(bucket, key):
            return
        elif not key:
            self._list(query.get("prefix", ""))
        elif key in self.server.objects:
            self._answer(200, self.server.objects[key])
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def do_PUT(self) -> None:
        if self.path.startswith(UPLOADS):
            self._target()
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(405, b"Method Not Allowed")  # objects.insert is a POST
        else:
            self._write()

    def do_POST(self) -> None:
        self._write()

    def do_DELETE(self) -> None:
        bucket, key, _ = self._target()
        if not self._refused(bucket, key):
            gone = self.server.objects.pop(key, None) is None
            self._answer(404 if gone else 204, b"")

    def _write(self) -> None:
        bucket, key, query = self._target()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self._refused(bucket, key):
            return
        if key == self.server.unavailable:
            self._answer(503, b"<Error><Code>x</Code></Error>")
            return
        match = self.headers["x-goog-if-generation-match"] or query.get("ifGenerationMatch")
        with self.server.lock:
            if self.server.conflicts:
                self.server.conflicts -= 1
                status = 409
            elif match == "0" and key in self.server.objects:
                status = 412
            else:
                status = 200
                self.server.objects[key] = data
        self._answer(status, b"{}" if status == 200 else b"<Error><Code>x</Code></Error>")

    def _target(self) -> tuple[str, str, dict[str, str]]:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.server.seen.append((self.command, self.path, dict(self.headers.items())))
        if parts.path.startswith(UPLOADS):
            return parts.path[len(UPLOADS) :].split("/")[0], query["name"], query
        if parts.path.startswith(OBJECTS):
            bucket, _, key = parts.path[len(OBJECTS) :].partition("/o/")
            return bucket, unquote(key), query
        bucket, _, key = parts.path[1:].partition("/")
        return bucket, unquote(key), query

    def _refused(self, bucket: str, key: str) -> bool:
        if bucket != "bucket":
            text = b"<Error><Code>NoSuchBucket</Code><Message>It is not there.</Message></Error>"
            self._answer(404, text)
        elif key and (key == self.server.refused or self.command in self.server.forbidden):
            self._answer(403, b"<Error><Code>AccessDenied</Code><Message>No.</Message></Error>")
        else:
            return False
        return True

    def _list(self, prefix: str) -> None:
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>x</ETag>"
            "<LastModified>2024-05-01T00:00:00.000Z</LastModified></Contents>"
            for key, data in sorted(self.server.objects.items())
            if key.startswith(prefix)
        )
        self._answer(200, f"<ListBucketResult>{rows}</ListBucketResult>".encode())

    def _answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("ETag", '"one"')
        self.send_header("x-goog-generation", "1")
        self.send_header("Last-Modified", "Wed, 01 May 2024 00:00:00 GMT")
        self.send_header("Content-Length", str(len(data) if status != 204 else 0))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serve_gcs() -> Iterator[FakeGcs]:
    """Run the fake until the block ends."""
    with FakeGcs().serving() as server:
        yield server


def s3_platform(url: str) -> dict[str, str]:
    """Give the variables that lead every client of S3 to `serve_s3`."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_REGION": "us-east-1",
    }


def _one_at_a_time(app: Any) -> Any:
    """Answer one request after the other: moto looks and writes in two steps, and S3 in one."""
    answering = threading.Lock()

    def answer(environ: Any, start_response: Any) -> list[bytes]:
        with answering:
            return list(app(environ, start_response))

    return answer


@contextmanager
def serve_s3() -> Iterator[tuple[str, Any]]:
    """Run moto's S3 on loopback with one bucket, `bucket`: its URL, and a client of boto3."""
    import boto3  # noqa: PLC0415 -- both take a second, which few tests need
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 -- as above

    # Its handler writes to the stderr of the test that first started a server: closed since.
    logging.getLogger("werkzeug").disabled = True
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    assert server._server is not None
    server._server.app = _one_at_a_time(server._server.app)
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        # Its objects belong to the process, and outlive the server that an earlier test had.
        requests.post(f"{url}/moto-api/reset", timeout=60).raise_for_status()
        client = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id="anyone",
            aws_secret_access_key="anything",  # noqa: S106 -- of a server on loopback
        )
        client.create_bucket(Bucket="bucket")
        yield url, client
    finally:
        server.stop()
