"""The installation's own storage: input documents and receipts, in a directory or a bucket."""

from __future__ import annotations

import json
import os
import stat
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from buckets import FakeGcs, gcs_account, s3_platform, serve_gcs
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from obstore.exceptions import PermissionDeniedError

from dispatcher import storage
from dispatcher.errors import ConfigurationError, DispatcherError, Unreachable
from dispatcher.storage import MAX_OBJECT_BYTES, Storage, StorageRefused, TooLarge

AN_HOUR = timedelta(hours=1)


@pytest.fixture
def s3(s3_bucket: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    url, client = s3_bucket
    for name, value in s3_platform(url).items():
        monkeypatch.setenv(name, value)
    return client


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcs]:
    with serve_gcs() as server:
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", server.account())
        monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
        yield server


@pytest.fixture(params=["file", "s3", "gs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "file":
        return Storage((tmp_path / "a b%é").as_uri())
    request.getfixturevalue({"s3": "s3", "gs": "gcs"}[request.param])
    return Storage(f"{request.param}://bucket/of us/it")


class TestEveryPlace:
    def test_an_object_is_written_once_and_read_back(self, place: Storage) -> None:
        assert place.read("inputs/b1/k1.jsonl", 100) is None
        assert place.create("inputs/b1/k1.jsonl", b"first")
        assert not place.create("inputs/b1/k1.jsonl", b"second")
        assert place.read("inputs/b1/k1.jsonl", 100) == b"first"
        assert place.create("inputs/b1/empty", b"")
        assert place.read("inputs/b1/empty", 0) == b""

    def test_of_many_writers_at_once_one_wins(self, place: Storage) -> None:
        together = threading.Barrier(8)

        def write(number: int) -> bool:
            together.wait()
            return place.create("claims/k1", b"%d" % number)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(write, range(8)))
        assert won.count(True) == 1
        assert place.read("claims/k1", 10) == b"%d" % won.index(True)

    def test_a_large_object_is_refused_before_it_is_read(self, place: Storage) -> None:
        place.create("results/k1/0.json", b"x" * 101)
        with pytest.raises(TooLarge) as caught:
            place.read("results/k1/0.json", 100)
        assert str(caught.value) == (
            f"{place.uri('results/k1/0.json')} has 101 bytes, and may have 100; it was not read"
        )

    def test_the_beginning_of_a_large_object_can_be_read(self, place: Storage) -> None:
        place.create("results/b/k/0.json", b"0123456789" * 1000)
        assert place.beginning("results/b/k/0.json", 12) == b"012345678901"
        assert place.beginning("results/b/k/1.json", 12) is None

    def test_what_is_too_large_is_not_written(self, place: Storage) -> None:
        with pytest.raises(TooLarge, match=r"would have 67,108,865 bytes, and an object may have"):
            place.create("inputs/large", bytes(MAX_OBJECT_BYTES + 1))
        assert place.read("inputs/large", 10) is None

    def test_objects_below_a_path_are_listed(self, place: Storage) -> None:
        for path in ("results/k1/0.json", "results/k1/10.json", "results/k10/0.json"):
            place.create(path, b"12")
        found = {stored.path: stored.size for stored in place.list("results/k1/")}
        assert found == {"results/k1/0.json": 2, "results/k1/10.json": 2}
        assert list(place.list("results/none")) == []

    def test_the_probe_leaves_nothing(self, place: Storage) -> None:
        place.check()
        assert list(place.list("checks")) == []

    @pytest.mark.parametrize("path", ["", "/a", "../a", "a/../b", "a//b", "a b", "a?b", ".a"])
    def test_a_path_that_is_none_is_a_mistake(self, place: Storage, path: str) -> None:
        with pytest.raises(ValueError, match="is no path in the storage"):
            place.create(path, b"")
        with pytest.raises(ValueError, match="is no path in the storage"):
            place.uri(path)

    def test_a_prefix_is_no_object(self, place: Storage) -> None:
        assert place.uri("results/k1/") == place.uri("results/k1") + "/"
        with pytest.raises(ValueError, match="is no path"):
            place.create("results/k1/", b"")


class TestAges:
    def test_old_objects_are_deleted_and_empty_directories_with_them(self, tmp_path: Path) -> None:
        place = Storage(tmp_path.as_uri())
        for path in ("inputs/old/a", "inputs/old/b", "inputs/mixed/old", "inputs/mixed/new"):
            place.create(path, b"1")
        long_ago = datetime(2024, 5, 1, tzinfo=UTC).timestamp()
        for path in ("inputs/old/a", "inputs/old/b", "inputs/mixed/old"):
            os.utime(tmp_path / path, (long_ago, long_ago))
        assert place.delete_older("inputs", datetime.now(UTC) - AN_HOUR) == 3
        assert [stored.path for stored in place.list("inputs")] == ["inputs/mixed/new"]
        assert [found.name for found in (tmp_path / "inputs").iterdir()] == ["mixed"]
        assert place.delete_older("nothing", datetime.now(UTC)) == 0

    def test_old_objects_of_a_bucket_are_deleted(
        self, s3: Any, gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(storage, "_DELETE_PAGE", 2)
        for place in (Storage("s3://bucket/x"), Storage("gs://bucket/x")):
            for number in range(5):
                place.create(f"inputs/{number}", b"1")
            assert place.delete_older("inputs", datetime(2024, 1, 1, tzinfo=UTC)) == 0
            assert place.delete_older("inputs", datetime.now(UTC) + AN_HOUR) == 5
            assert list(place.list("inputs")) == []
        assert "Contents" not in s3.list_objects_v2(Bucket="bucket")
        assert not gcs.objects

    def test_two_that_clean_up_at_once_do_not_disturb_each_other(self, tmp_path: Path) -> None:
        place = Storage(tmp_path.as_uri())
        for number in range(200):
            place.create(f"inputs/{number % 7}/{number}", b"1")
        later = datetime.now(UTC) + AN_HOUR
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: place.delete_older("inputs", later), range(4)))
        assert list(place.list("inputs")) == []


class TestDirectories:
    def test_a_directory_that_we_make_is_private_and_one_that_was_there_is_left(
        self, tmp_path: Path
    ) -> None:
        Storage((tmp_path / "made").as_uri()).create("inputs/a", b"")
        assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o700
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared").chmod(0o2770)
        Storage((tmp_path / "shared").as_uri()).create("inputs/a", b"")
        assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o2770

    def test_to_name_a_place_touches_nothing(self, tmp_path: Path) -> None:
        assert Storage((tmp_path / "a").as_uri()).uri("x") == (tmp_path / "a/x").as_uri()
        assert not list(tmp_path.iterdir())

    def test_a_file_is_not_signed(self, tmp_path: Path) -> None:
        signed = Storage(tmp_path.as_uri()).sign("a", method="PUT", expires=AN_HOUR)
        assert signed == (tmp_path / "a").as_uri()

    def test_a_file_where_the_directory_should_be_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "a").touch()
        with pytest.raises(StorageRefused, match=r"cannot read file:///.*: .*File exists"):
            Storage((tmp_path / "a").as_uri()).check()

    @pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
    def test_a_directory_that_may_not_be_written_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir(mode=0o500)
        with pytest.raises(StorageRefused, match="no permission"):
            Storage((tmp_path / "a").as_uri()).check()


class SignedElsewhere(Storage):
    """A storage whose signed URLs lead to another server."""

    def __init__(self, url: str, elsewhere: str) -> None:
        super().__init__(url)
        self._elsewhere = elsewhere

    def sign(self, path: str, *, method: Any, expires: timedelta) -> str:
        super().sign(path, method=method, expires=expires)
        return f"{self._elsewhere}/{path}?X-Signature=secret"


class Answering(ThreadingHTTPServer):
    """Refuses whatever is asked."""

    status = 403

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Refusal(BaseHTTPRequestHandler):
    server: Answering

    def log_message(self, *_: object) -> None:
        """The test's output is not the place."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        said = b"<Error><Code>AccessDenied</Code><Message>Not valid yet</Message></Error>"
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)


@pytest.fixture
def answering() -> Iterator[Answering]:
    with Answering(("127.0.0.1", 0), _Refusal) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class TestSignedUrls:
    def test_a_signed_url_of_s3_writes_and_reads_without_credentials(self, s3: Any) -> None:
        place = Storage("s3://bucket/x")
        url = place.sign("results/k/0.json", method="PUT", expires=AN_HOUR)
        for status in (200, 412):
            request = urllib.request.Request(  # noqa: S310 -- of a server on loopback
                url,
                data=b"{}",
                method="PUT",
                headers={"If-None-Match": "*", "Content-Type": "application/json"},
            )
            assert _status(request) == status
        assert s3.get_object(Bucket="bucket", Key="x/results/k/0.json")["Body"].read() == b"{}"
        url = place.sign("results/k/0.json", method="GET", expires=AN_HOUR)
        assert _status(urllib.request.Request(url)) == 200  # noqa: S310 -- as above

    def test_a_url_of_google_is_signed_with_the_accounts_key(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        account = {"client_email": "a@b.c", "private_key": key.decode(), "private_key_id": "1"}
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
        url = Storage("gs://bucket/x").sign("inputs/a", method="GET", expires=AN_HOUR)
        assert url.startswith("https://storage.googleapis.com/bucket/x/inputs/a?X-Goog-Algorithm=")
        assert "X-Goog-Expires=3600" in url

    def test_many_are_signed_in_the_order_in_which_they_were_asked_for(self, s3: Any) -> None:  # noqa: ARG002 - its variables
        paths = [f"results/k/{number}.json" for number in range(40)]
        signed = Storage("s3://bucket/x").sign_all(paths, method="PUT", expires=AN_HOUR)
        assert [urlsplit(url).path for url in signed] == [f"/bucket/x/{path}" for path in paths]

    def test_a_check_writes_and_reads_a_probe_by_them_and_removes_it(self, s3: Any) -> None:
        Storage("s3://bucket/signing").check_signing()
        assert "Contents" not in s3.list_objects_v2(Bucket="bucket", Prefix="signing/")

    def test_a_check_has_nothing_to_sign_of_a_directory(self, tmp_path: Path) -> None:
        Storage((tmp_path / "a").as_uri()).check_signing()
        assert not (tmp_path / "a").exists()

    @pytest.mark.parametrize(
        ("status", "error", "said"),
        [
            (
                403,
                StorageRefused,
                r"is answered 403 Forbidden: AccessDenied: Not valid yet\. The cl",
            ),
            (
                503,
                Unreachable,
                r"is answered 503 Service Unavailable: AccessDenied: Not valid yet$",
            ),
        ],
    )
    def test_a_check_tells_what_the_storage_says_of_them_and_not_what_they_are(
        self, status: int, error: type[Exception], said: str, s3: Any, answering: Answering
    ) -> None:  # fmt: skip
        del s3  # its variables
        answering.status = status
        place = SignedElsewhere("s3://bucket/signing", answering.url)
        with pytest.raises(error, match=f"a URL that was signed here to write s3://.*{said}") as it:
            place.check_signing()
        assert "secret" not in str(it.value)

    @pytest.mark.usefixtures("s3")
    def test_a_check_of_a_place_where_nobody_answers_them_may_be_repeated(
        self, deserted: str
    ) -> None:
        with pytest.raises(Unreachable, match="gets no answer") as it:
            SignedElsewhere("s3://bucket/signing", deserted).check_signing()
        assert "secret" not in str(it.value)

    def test_a_longer_time_than_any_provider_signs_for_is_a_mistake(self) -> None:
        with pytest.raises(ValueError, match=r"signed for at most 7 days.*, not for 8 days"):
            Storage("s3://b").sign("a", method="GET", expires=timedelta(days=8))


class TestRefusals:
    def test_a_directory_that_can_never_be_made_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(StorageRefused, match="is not there and cannot be made"):
            Storage((tmp_path / ("x" * 300)).as_uri()).check()

    def test_a_wrong_clock_is_called_one(self) -> None:
        error = PermissionDeniedError("<Code>RequestTimeTooSkewed</Code><Message>By 1 h.</Message>")
        said = str(storage._refusal("cannot write s3://b/k", error))
        assert said == (
            "cannot write s3://b/k: the clock of this machine is wrong; "
            "RequestTimeTooSkewed: By 1 h."
        )

    @pytest.mark.parametrize(
        ("url", "said"),
        [
            ("/data", "is no place for objects: write file:///absolute/directory"),
            ("https://b/c", "is no place for objects"),
            ("file://data/x", "is relative, names a host or names the root"),
            ("file:///", "is relative, names a host or names the root"),
            ("s3:///x", "names no bucket"),
            ("gs://bucket/a//b", "has a part that is empty, '.' or '..'"),
            ("file:///data/../x", "has a part that is empty, '.' or '..'"),
        ],
    )
    def test_a_url_that_is_no_storage_is_refused_at_once(self, url: str, said: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            Storage(url)
        assert str(caught.value).startswith(f"the storage {url!r} {said}")

    @pytest.mark.usefixtures("s3", "gcs")
    @pytest.mark.parametrize("scheme", ["s3", "gs"])
    def test_a_missing_bucket_is_never_taken_for_a_missing_object(self, scheme: str) -> None:
        place = Storage(f"{scheme}://elsewhere")
        for act in (
            place.check,
            lambda: place.read("a", 1),
            lambda: list(place.list("a")),
            lambda: place.create("a", b""),
        ):
            with pytest.raises(StorageRefused) as caught:
                act()
            assert "there is no such bucket; make it, or mend the storage URL" in str(caught.value)

    def test_no_permission_is_told_in_the_providers_words(self, gcs: FakeGcs) -> None:
        gcs.refused = "x/claims/k"
        with pytest.raises(StorageRefused) as caught:
            Storage("gs://bucket/x").create("claims/k", b"")
        assert str(caught.value) == (
            "cannot write gs://bucket/x/claims/k: no permission; the credentials are those that "
            "this process's platform gives it. The storage says: AccessDenied: No."
        )

    def test_a_storage_that_does_not_answer_is_unreachable(
        self, deserted: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", gcs_account(deserted))
        monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
        monkeypatch.setattr(storage, "_RETRY", {"max_retries": 0})
        place = Storage("gs://bucket")
        for act in (place.check, lambda: place.read("a", 1), lambda: list(place.list("a"))):
            with pytest.raises(Unreachable, match=r"^cannot \w+ gs://bucket/\S+ now: ") as caught:
                act()
            assert "Debug" not in str(caught.value)

    def test_variables_of_the_platform_that_make_no_sense_are_told(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", "{")
        with pytest.raises(StorageRefused, match=r"cannot open gs://b: the platform's variables"):
            Storage("gs://b").check()

    def test_a_storage_that_lets_objects_be_overwritten_is_refused(
        self, gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = Storage("gs://bucket")
        kept = dict[str, bytes]()
        monkeypatch.setattr(gcs, "objects", _Forgetful(kept))
        with pytest.raises(DispatcherError, match="does not know create-only writes"):
            place.check()


class _Forgetful(dict[str, bytes]):
    """Says of no key that it is there, and has it all the same when it is read."""

    asked = 0

    def __contains__(self, key: object) -> bool:
        self.asked += 1
        # A look, a write, the read, a write.
        return self.asked == 3


def _status(request: urllib.request.Request) -> int:
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 -- loopback
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
