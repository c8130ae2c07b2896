"""Items in objects: read through the one door for files and clouds."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from buckets import gcs_account, s3_platform

from dispatcher import storage
from dispatcher.errors import DispatcherError, InvalidItems, Unreachable
from dispatcher.storage import check_uri, read_bytes, read_items


def texts(uri: str) -> list[str]:
    with read_items(uri) as stream:
        return list(stream)


def refusal(uri: str, kind: type[DispatcherError] = InvalidItems) -> str:
    with pytest.raises(kind) as caught:
        texts(uri)
    return str(caught.value)


class TestFiles:
    def test_the_formats_are_those_of_local_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"a": 1}\n2\n')
        (tmp_path / "a.csv").write_text("id\n7\n")
        (tmp_path / "a.txt").write_text("x\n\ny\n")
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"1\n2\n"))
        assert texts((tmp_path / "a.jsonl").as_uri()) == ['{"a": 1}', "2"]
        assert texts((tmp_path / "a.csv").as_uri()) == ['{"id":"7"}']
        assert texts((tmp_path / "a.txt").as_uri()) == ['"x"', '"y"']
        assert texts((tmp_path / "a.jsonl.gz").as_uri()) == ["1", "2"]
        assert texts(f"file://localhost{tmp_path}/a.jsonl") == ['{"a": 1}', "2"]

    def test_awkward_names_are_found(self, tmp_path: Path) -> None:
        path = tmp_path / "a b#é%20?.jsonl"
        path.write_text("1\n")
        assert texts(path.as_uri()) == ["1"]

    def test_a_large_object_is_read_in_parts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(storage, "_PART_BYTES", 1000)
        monkeypatch.setattr(storage, "_BLOCK_BYTES", 300)
        lines = [f'"é{number}"' for number in range(5000)]
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(lines))
        assert texts(path.as_uri()) == lines
        assert {len(block) for block in read_bytes(path.as_uri())} <= {300, 100, *range(300)}

    def test_an_object_changed_while_it_is_read_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(storage, "_PART_BYTES", 4)
        path = tmp_path / "a.jsonl"
        path.write_text("1\n2\n3\n4\n")
        blocks = read_bytes(path.as_uri())
        next(blocks)
        path.write_text("1\n2\n3\n4\n5\n")
        with pytest.raises(InvalidItems, match=r"a\.jsonl was changed while"):
            list(blocks)

    def test_what_is_wrong_in_a_line_is_named_with_the_uri(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("1\nhello\n")
        assert refusal(path.as_uri()).startswith(f"{path.as_uri()}:2 is not JSON")

    def test_a_missing_object_an_empty_one_and_a_directory_are_refused(
        self, tmp_path: Path
    ) -> None:
        uri = (tmp_path / "a.jsonl").as_uri()
        assert refusal(uri) == f"cannot read items from {uri}: there is no such object"
        (tmp_path / "a.jsonl").touch()
        assert refusal(uri).startswith(f"{uri} has no items")
        (tmp_path / "dir.jsonl").mkdir()
        assert "there is no such object" in refusal((tmp_path / "dir.jsonl").as_uri())


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        (
            "http://host/a.jsonl",
            (
                "cannot read items from 'http://host/a.jsonl': "
                "it must start with file:///, s3:// or gs://"
            ),
        ),
        (
            "a.jsonl",
            "cannot read items from 'a.jsonl': it must start with file:///, s3:// or gs://",
        ),
        (
            "file://data/a.jsonl",
            (
                "'file://data/a.jsonl' is relative or names a host: "
                "write file:/// and the absolute path"
            ),
        ),
        ("s3:///a.jsonl", "'s3:///a.jsonl' names no bucket: write s3://BUCKET/KEY"),
        ("gs://bucket", "'gs://bucket' names no object: write the whole name of a file of items"),
        (
            "s3://b/folder/",
            "'s3://b/folder/' names no object: write the whole name of a file of it",
        ),
    ],
)
def test_a_uri_that_could_never_be_read_is_refused_at_once(uri: str, said: str) -> None:
    with pytest.raises(InvalidItems) as caught:
        check_uri(uri)
    assert str(caught.value).startswith(said)
    with pytest.raises(InvalidItems):
        read_bytes(uri)


def test_a_uri_of_an_unknown_kind_of_file_is_refused_at_once() -> None:
    check_uri("s3://bucket/a.csv.gz")
    with pytest.raises(InvalidItems, match=r"a file of items ends in one of \.jsonl"):
        check_uri("s3://bucket/a.parquet")
    with pytest.raises(InvalidItems, match=r"a file of items ends in one of \.jsonl"):
        read_items("s3://bucket/a.parquet")


class _Bucket(BaseHTTPRequestHandler):
    """As much of S3 and GCS as reading one object needs, and a key for each way to fail."""

    body = b"".join(b"%d\n" % number for number in range(1000))

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def _answer(self, *, send_body: bool) -> None:
        status = {"/b/no.jsonl": 404, "/b/secret.jsonl": 403, "/b/fault.jsonl": 501}.get(self.path)
        data = b"" if status else self.body
        status = status or 200
        if (wanted := self.headers["Range"]) and status == 200:
            start, end = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            data = self.body[start : end + 1]
            status = 206
        self.send_response(status)
        if status == 206:
            total = len(self.body)
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{total}")
        self.send_header("ETag", '"one"')
        self.send_header("Last-Modified", "Wed, 01 May 2024 00:00:00 GMT")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if send_body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """The test's output is not the place."""


def leads_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all buckets looked for at a URL."""
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", gcs_account(url))
    monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
    for name, value in s3_platform(url).items():
        monkeypatch.setenv(name, value)


class TestBuckets:
    @pytest.fixture
    def bucket(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with ThreadingHTTPServer(("127.0.0.1", 0), _Bucket) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            leads_to(f"http://127.0.0.1:{server.server_port}", monkeypatch)
            try:
                yield
            finally:
                server.shutdown()
                thread.join()

    @pytest.mark.usefixtures("bucket")
    def test_an_object_in_a_bucket_is_read_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storage, "_PART_BYTES", 500)
        assert texts("s3://b/a.jsonl") == [str(number) for number in range(1000)]
        assert texts("gs://b/a.jsonl") == [str(number) for number in range(1000)]

    @pytest.mark.usefixtures("bucket")
    def test_a_missing_object_and_one_not_allowed_are_told_apart(self) -> None:
        assert refusal("s3://b/no.jsonl") == (
            "cannot read items from s3://b/no.jsonl: there is no such object"
        )
        assert refusal("s3://b/secret.jsonl").startswith(
            "cannot read items from s3://b/secret.jsonl: no permission; the credentials are those "
            "that the worker's platform gives it. The storage says: "
        )

    @pytest.mark.usefixtures("bucket")
    def test_a_fault_of_the_storage_is_no_fault_of_the_items(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(storage, "_RETRY", {"max_retries": 0})
        assert refusal("s3://b/fault.jsonl", Unreachable).startswith(
            "cannot read items from s3://b/fault.jsonl now: "
        )

    def test_a_storage_that_does_not_answer_is_unreachable(
        self, deserted: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        leads_to(deserted, monkeypatch)
        monkeypatch.setattr(storage, "_RETRY", {"max_retries": 0})
        said = refusal("s3://b/a.jsonl", Unreachable)
        assert "Debug" not in said
