"""The container's part: input, claim, receipt and their transport, each on its own."""

from __future__ import annotations

import ast
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from buckets import FakeGcs, serve_gcs
from waiting import until

from dispatcher import container
from dispatcher.container import (
    EXIT_CLAIMED_BY_ANOTHER,
    InputError,
    StorageError,
    Task,
    claim,
    task_count,
    task_index,
)
from dispatcher.storage import Storage

PLATFORM = ("AWS_", "CLOUD_RUN_", "CLOUDSDK_", "DISPATCH_", "GCE_", "GOOGLE_", "JOB_", "STORAGE_")


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in os.environ:
        if name.startswith(PLATFORM):
            monkeypatch.delenv(name)
    monkeypatch.setattr(container, "PAUSES", (0.0, 0.0, 0.0))
    container._kept.clear()
    container._regions.clear()
    yield
    container._kept.clear()
    container._regions.clear()


@pytest.fixture
def s3(s3_bucket: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    url, client = s3_bucket
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    return client


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcs]:
    with serve_gcs() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have progress written at once, and again at once, however long each write takes.

    It waits for twenty times as long as a write took: by this clock it took no time.
    """
    still = SimpleNamespace(monotonic=lambda: 0.0, time=time.time, sleep=time.sleep)
    monkeypatch.setattr(container, "time", still)
    monkeypatch.setattr(container, "PROGRESS_SECONDS", 0.01)


@pytest.fixture(params=["file", "s3", "gs"])
def prefix(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return (tmp_path / "a b%é").as_uri() + "/"
    request.getfixturevalue({"s3": "s3", "gs": "gcs"}[request.param])
    return f"{request.param}://bucket/of us/"


def task(items: list[Any], **environ: str) -> Task:
    return Task({"DISPATCH_ITEMS": json.dumps(items), **environ})


def receipt(uri: str) -> dict[str, Any] | None:
    data = container._read(uri, 1 << 20)
    return None if data is None else json.loads(data)


class TestWhoItIs:
    @pytest.mark.parametrize(
        ("environ", "index", "count"),
        [
            ({}, 0, 1),
            ({"CLOUD_RUN_TASK_INDEX": "7", "CLOUD_RUN_TASK_COUNT": "9"}, 7, 9),
            ({"AWS_BATCH_JOB_ARRAY_INDEX": "3", "AWS_BATCH_JOB_ARRAY_SIZE": "4"}, 3, 4),
            ({"JOB_COMPLETION_INDEX": "2", "DISPATCH_TASK_COUNT": "5"}, 2, 5),
            ({"DISPATCH_TASK_INDEX": "1", "DISPATCH_TASK_COUNT": "2"}, 1, 2),
        ],
    )
    def test_index_and_count_are_those_of_the_platform(
        self, environ: Mapping[str, str], index: int, count: int
    ) -> None:
        assert (task_index(environ), task_count(environ)) == (index, count)

    def test_an_index_that_is_no_number_is_refused(self) -> None:
        with pytest.raises(InputError, match="CLOUD_RUN_TASK_INDEX is '-1', and must be a number"):
            task_index({"CLOUD_RUN_TASK_INDEX": "-1"})


DOCUMENT = (
    '{"chunk":12,"attempt":1,"items":["a","\u2028b"]}\n'
    '{"chunk":40,"attempt":3,"items":[{"id": 7}]}\n'
)


class TestInput:
    def test_a_task_alone_has_its_items_in_a_variable(self) -> None:
        one = task([1, "é"], DISPATCH_ATTEMPT="2", DISPATCH_CHUNK="5")
        assert (one.items, one.attempt, one.chunk) == ([1, "é"], 2, 5)

    def test_a_document_in_a_variable_has_a_line_for_each_task(self) -> None:
        environ = {"DISPATCH_INPUT": DOCUMENT, "CLOUD_RUN_TASK_INDEX": "1"}
        one = Task(environ)
        assert (one.items, one.attempt, one.chunk) == ([{"id": 7}], 3, 40)

    def test_a_document_is_read_from_every_kind_of_place(self, prefix: str) -> None:
        uri = f"{prefix}inputs/b/k.jsonl"
        container._create(uri, DOCUMENT.encode())
        first = Task({"DISPATCH_INPUT_URI": uri})
        assert (first.items, first.chunk) == (["a", "\u2028b"], 12)
        assert Task({"DISPATCH_INPUT_URI": uri, "DISPATCH_TASK_INDEX": "1"}).chunk == 40

    def test_a_document_is_read_from_a_signed_url(
        self, s3: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        s3.put_object(Bucket="bucket", Key="k.jsonl", Body=DOCUMENT.encode())
        url = s3.generate_presigned_url("get_object", {"Bucket": "bucket", "Key": "k.jsonl"})
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        assert Task({"DISPATCH_INPUT_URI": url, "DISPATCH_TASK_INDEX": "1"}).chunk == 40

    def test_the_items_of_one_task_may_be_a_document_of_their_own(self, tmp_path: Path) -> None:
        path = tmp_path / "input.json"
        path.write_text('[1,\n{"a": 2},\n3]')
        environ = {"DISPATCH_INPUT_URI": path.as_uri(), "DISPATCH_TASK_INDEX": "9"}
        assert Task(environ).items == [1, {"a": 2}, 3]

    @pytest.mark.parametrize(
        ("environ", "said"),
        [
            ({}, "there is no input: none of DISPATCH_ITEMS, DISPATCH_INPUT and"),
            ({"DISPATCH_ITEMS": "[1"}, "DISPATCH_ITEMS is not JSON: "),
            ({"DISPATCH_ITEMS": "7"}, "DISPATCH_ITEMS is neither an array of items nor an object"),
            ({"DISPATCH_INPUT": '{"items":7}\n'}, "line 1 of DISPATCH_INPUT is neither"),
            (
                {"DISPATCH_INPUT": DOCUMENT, "DISPATCH_TASK_INDEX": "2"},
                "DISPATCH_INPUT has 2 lines, and this is task 2, counted from 0",
            ),
            ({"DISPATCH_INPUT_URI": "ftp://h/a?b"}, "ftp://h/a is none of file://, s3://, gs://"),
            ({"DISPATCH_INPUT_URI": "file://h/a"}, "file://h/a is relative or names a host"),
            ({"DISPATCH_INPUT_URI": "gs://b"}, "gs://b names no bucket, or no object"),
        ],
    )
    def test_an_input_that_cannot_be_used_is_named(
        self, environ: Mapping[str, str], said: str
    ) -> None:
        with pytest.raises(InputError) as caught:
            Task(environ)
        assert str(caught.value).startswith(said)

    def test_a_document_that_is_missing_is_named(self, prefix: str) -> None:
        uri = f"{prefix}inputs/none.jsonl"
        with pytest.raises(StorageError) as caught:
            Task({"DISPATCH_INPUT_URI": uri})
        assert str(caught.value) == f"there is no {uri}"


class TestReceipt:
    def test_it_says_how_every_item_ended(self, prefix: str) -> None:
        one = task(
            ["a", {"id": 1}, "b"],
            DISPATCH_KEY="k1",
            DISPATCH_CHUNK="12",
            DISPATCH_TASK_INDEX="3",
            DISPATCH_RESULT_URI=f"{prefix}results/k1/",
        )
        one.report("b", ok=False, error=OSError("no\udcff room\0"))
        one.report("a", ok=True, output={"rows": 7})
        one.report({"id": 1}, ok=True, output_uri="gs://elsewhere/x")
        assert one.close()
        found = receipt(f"{prefix}results/k1/3.json")
        assert found is not None
        written = datetime.strptime(found.pop("written_at"), "%Y-%m-%dT%H:%M:%S%z")
        assert abs((datetime.now(UTC) - written).total_seconds()) < 60
        assert found == {
            "version": 1,
            "key": "k1",
            "task": 3,
            "chunk": 12,
            "attempt": 1,
            "complete": True,
            "items": [
                {"i": 0, "ok": True, "output": {"rows": 7}},
                {"i": 1, "ok": True, "output_uri": "gs://elsewhere/x"},
                {"i": 2, "ok": False, "error": "OSError: no? room\ufffd"},
            ],
        }

    def test_the_first_receipt_stands(
        self, prefix: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for ok in (True, False):
            one = task([1], DISPATCH_RESULT_URI=prefix)
            one.report(1, ok=ok)
            assert one.close()
        found = receipt(f"{prefix}0.json")
        assert found is not None
        assert found["items"] == [{"i": 0, "ok": True}]
        assert "there is a receipt at" in capsys.readouterr().err

    def test_there_is_none_while_an_item_is_unreported(
        self, prefix: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        one = task([1, 2], DISPATCH_RESULT_URI=prefix)
        one.report(2, ok=True)
        assert one.close()
        assert receipt(f"{prefix}0.json") is None
        found = receipt(f"{prefix}0.progress.json")
        assert found is not None
        assert (found["complete"], found["items"]) == (False, [{"i": 1, "ok": True}])
        assert "1 of 2 items were not reported" in capsys.readouterr().err

    def test_a_large_output_lies_beside_it(self, prefix: str) -> None:
        one = task([1], DISPATCH_RESULT_URI=prefix)
        one.report(1, ok=True, output="x" * 5000)
        one.close()
        found = receipt(f"{prefix}0.json")
        assert found is not None
        uri = f"{prefix}0.output.0.json"
        assert found["items"] == [{"i": 0, "ok": True, "output_uri": uri}]
        assert container._read(uri, 9999) == b'"' + b"x" * 5000 + b'"'

    def test_a_file_of_its_own_is_taken_as_it_is_named(self, tmp_path: Path) -> None:
        one = task([1], DISPATCH_RESULT_URI=(tmp_path / "result.json").as_uri())
        one.report(1, ok=True)
        one.flush()
        one.close()
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "result.json",
            "result.progress.json",
        ]

    def test_no_items_make_a_complete_one(self, tmp_path: Path) -> None:
        task([], DISPATCH_RESULT_URI=f"{tmp_path.as_uri()}/").close()
        found = receipt((tmp_path / "0.json").as_uri())
        assert found is not None
        assert (found["complete"], found["items"]) == (True, [])

    def test_equal_items_are_reported_one_after_the_other(self) -> None:
        one = task(["a", 1, "a"])
        one.report("a", ok=False)
        one.report("a", ok=True)
        one.report("a", ok=False, error="changed")
        assert one._results == {
            0: {"i": 0, "ok": False, "error": "it failed"},
            2: {"i": 2, "ok": False, "error": "changed"},
        }

    def test_a_mistake_is_told_where_it_is_made(self) -> None:
        one = task([1, "a"])
        with pytest.raises(ValueError, match=r"'1' is none of this task's 2 items"):
            one.report("1", ok=True)
        with pytest.raises(ValueError, match="is none of this task's"):
            one.report(object(), ok=True)
        with pytest.raises(ValueError, match="there is no item 2: this task has 2"):
            one.report_at(2, ok=True)
        with pytest.raises(TypeError, match="ok is 1, and must be True or False"):
            one.report_at(0, 1)  # type: ignore[arg-type] # the mistake
        with pytest.raises(ValueError, match="to be ok, and to have the error 'x'"):
            one.report_at(0, ok=True, error="x")
        with pytest.raises(ValueError, match="the output of item 0 is not JSON: "):
            one.report_at(0, ok=True, output=float("nan"))
        with pytest.raises(ValueError, match="give one of them"):
            one.report_at(0, ok=True, output=1, output_uri="s3://b/c")
        assert one.unreported == 2

    def test_outputs_and_errors_beyond_its_room_go_beside_it_or_are_cut(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(container, "MAX_RECEIPT_BYTES", 4000)
        one = task(list(range(10)), DISPATCH_RESULT_URI=f"{tmp_path.as_uri()}/")
        for position in range(5):
            one.report_at(position, ok=False, error="e" * 5000)
        for position in range(5, 10):
            one.report_at(position, ok=True, output="x" * 1000)
        entries = list(one._results.values())
        lengths = [len(entry.get("error", "")) for entry in entries[:5]]
        assert lengths[0] == 1000
        assert 100 < lengths[4] < 1000
        assert all(entry["error"].endswith("e…") for entry in entries[:5])
        assert all("output_uri" in entry for entry in entries[5:])
        # What is said anew takes the place of what was said before.
        for _ in range(50):
            one.report_at(0, ok=False, error="e" * 5000)
        one.report_at(0, ok=True)
        one.report_at(4, ok=False, error="e" * 5000)
        assert len(one._results[4]["error"]) > lengths[4]
        one.close()
        assert (tmp_path / "0.json").stat().st_size <= 4000

    @pytest.mark.parametrize("count", [1, 9, 100, None], ids=str)
    @pytest.mark.parametrize("text", ["e", "é", "障", "😀", "\1", '"', "a\n障\x7f😀"], ids=ascii)
    def test_it_never_has_more_bytes_than_the_dispatcher_reads(
        self, text: str, count: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(container, "MAX_RECEIPT_BYTES", 20_000)
        uri = f"{tmp_path.as_uri()}/"
        if count is None:  # as many as can be told of
            count = task([0] * 700, DISPATCH_RESULT_URI=uri)._room.most_items
            assert count > 600
        one = task([0] * count, DISPATCH_RESULT_URI=uri, DISPATCH_KEY="k", DISPATCH_CHUNK="7")
        one.progress(2**70, 2**70)
        output = text * (4000 // len(container._json(text).encode()))
        for position in range(count):
            failed = position % 3 > 0
            with suppress(ValueError):  # no room for where its output lies
                one.report_at(
                    position,
                    ok=not failed,
                    error=text * 1000 if failed else None,
                    output=output if position % 2 else None,
                )
            if position not in one._results:
                one.report_at(position, ok=not failed, error=text * 1000 if failed else None)
        one.flush()
        one.close()
        progress, whole = (
            (tmp_path / f"0.{name}").read_bytes() for name in ("progress.json", "json")
        )
        assert max(len(progress), len(whole)) <= 20_000
        told = json.loads(whole)["items"]
        assert [entry["ok"] for entry in told] == [n % 3 == 0 for n in range(count)]
        assert json.loads(progress)["items"] == told
        assert all(len(entry.get("error", "")) <= 1000 for entry in told)

    def test_it_tells_of_thousands_of_failures_in_any_script(self, tmp_path: Path) -> None:
        one = task([0] * 9000, DISPATCH_RESULT_URI=f"{tmp_path.as_uri()}/")
        for position in range(9000):
            one.report_at(position, ok=False, error="障" * 1000)
        one.close()
        data = (tmp_path / "0.json").read_bytes()
        assert 12 << 20 < len(data) <= container.MAX_RECEIPT_BYTES
        lengths = [len(entry["error"]) for entry in json.loads(data)["items"]]
        assert (max(lengths), min(lengths) > 250) == (1000, True)

    def test_where_every_output_lies_has_its_place_in_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prefix = f"{tmp_path.as_uri()}/"
        entry = {"i": 99, "ok": False, "output_uri": f"{prefix}0.output.99.json"}
        most = 300 + 100 * len(container._json(entry) + ",")
        monkeypatch.setattr(container, "MAX_RECEIPT_BYTES", most)
        one = task([0] * 100, DISPATCH_RESULT_URI=prefix)
        for position in range(100):
            one.report_at(position, ok=True, output="x" * 500)
        one.close()
        data = (tmp_path / "0.json").read_bytes()
        assert len(data) <= most
        assert all("output_uri" in entry for entry in json.loads(data)["items"])
        for longer in ("gs://b/" + "x" * 500, "gs://b/" + "x" * 9000, "gs://b/\ud800", "gs://b/\0"):
            with pytest.raises(ValueError, match="output_uri of item 5"):
                one.report_at(5, ok=True, output_uri=longer)

    def test_more_items_than_one_can_tell_of_are_refused_before_the_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(container, "MAX_RECEIPT_BYTES", 500)
        monkeypatch.setattr(container._Process, "task", None)
        monkeypatch.setattr(container._Process, "leaves_by_exit", False)
        monkeypatch.setenv("DISPATCH_ITEMS", json.dumps(list(range(100))))
        told = (
            r"this task has 100 items, and a receipt of 500 bytes tells of 1\d: make the job's "
            "chunks smaller"
        )
        monkeypatch.setenv("DISPATCH_RESULT_URI", f"{tmp_path.as_uri()}/")
        with pytest.raises(InputError, match=told), container.run():
            pytest.fail("it began")
        with pytest.raises(InputError, match=told):
            container.report_at(0, ok=True)
        with pytest.raises(InputError, match=told):
            container._this_task().flush()
        assert container.main(["exec", "--each", "true"]) == 65
        # Where nobody asks for a receipt, they are no reason not to work.
        one = task(list(range(100)))
        one.report_at(99, ok=True, output_uri="gs://b/" + "x" * 900)
        one.report_at(98, ok=False, error="x" * 900)
        assert not one.close()

    def test_failures_that_nobody_would_hear_of_must_show_in_the_exit_code(self) -> None:
        one = task([1])
        one.report(1, ok=False)
        assert not one.close()
        one.report(1, ok=True, output="x" * 5000)
        assert one.close()

    @pytest.mark.usefixtures("eager")
    def test_what_is_done_is_kept_while_the_work_goes_on(self, prefix: str) -> None:
        one = task([1, 2], DISPATCH_RESULT_URI=prefix)
        one.progress(1, 10)
        found = until(lambda: receipt(f"{prefix}0.progress.json"))
        assert found["progress"] == {"done": 1, "total": 10}
        one.report(2, ok=True)

        def items() -> Any:
            return (receipt(f"{prefix}0.progress.json") or {}).get("items")

        until(lambda: items() == [{"i": 1, "ok": True}])
        one.report(1, ok=True)
        one.close()
        writer = one._writer
        assert writer is not None
        until(lambda: not writer.is_alive(), "it to end with its last write")

    @pytest.mark.usefixtures("eager")
    def test_progress_that_cannot_be_written_is_told_once_and_tried_again(
        self, gcs: FakeGcs, capsys: pytest.CaptureFixture[str]
    ) -> None:
        gcs.refused = "0.progress.json"
        one = task([1], DISPATCH_RESULT_URI="gs://bucket/")
        one.report(1, ok=True)
        until(lambda: len(gcs.seen) > 2)
        gcs.refused = ""
        until(lambda: "0.progress.json" in gcs.objects)
        one.close()
        assert capsys.readouterr().err.count("progress cannot be written: cannot write gs://") == 1
        assert "0.json" in gcs.objects

    def test_where_it_cannot_be_written_what_is_done_is(
        self, gcs: FakeGcs, capsys: pytest.CaptureFixture[str]
    ) -> None:
        gcs.unavailable = "0.json"
        one = task([1, 2], DISPATCH_RESULT_URI="gs://bucket/")
        one.flush()
        one.report(1, ok=True)
        one.report(2, ok=False, error="bad")
        with pytest.raises(StorageError, match=r"cannot write gs://bucket/0\.json: 503"):
            one.close()
        found = json.loads(gcs.objects["0.progress.json"])
        assert (found["complete"], [entry["i"] for entry in found["items"]]) == (False, [0, 1])
        # It may be tried again.
        gcs.unavailable = ""
        one.close()
        assert json.loads(gcs.objects["0.json"])["complete"]
        assert capsys.readouterr().err == ""

    def test_of_two_writes_of_what_is_done_the_later_one_tells_more(self, tmp_path: Path) -> None:
        one = task([1, 2], DISPATCH_RESULT_URI=f"{tmp_path.as_uri()}/")
        one._stop.set()  # no writer of its own: the test says who writes when
        one.report(1, ok=True)
        arrived = threading.Event()

        class Lock:
            """The one that each write waits for."""

            def __init__(self, lock: Any) -> None:
                self.lock = lock

            def acquire(self, timeout: float) -> bool:
                arrived.set()
                return bool(self.lock.acquire(timeout=timeout))

            def release(self) -> None:
                self.lock.release()

        real = one._writing
        one._writing = Lock(real)  # type: ignore[assignment] # as much of one as flush takes
        with ThreadPoolExecutor(1) as pool:
            with real:
                written = pool.submit(one.flush)
                assert arrived.wait(60)
                one.report(2, ok=True)
            written.result()
        found = receipt((tmp_path / "0.progress.json").as_uri())
        assert found is not None
        assert [entry["i"] for entry in found["items"]] == [0, 1]

    def test_a_signed_url_gets_the_last_word_only(self, s3: Any) -> None:
        address = {"Bucket": "bucket", "Key": "r.json"}
        url = s3.generate_presigned_url("put_object", address)
        one = task([1, 2], DISPATCH_RESULT_URI=url)
        one.report(1, ok=True)
        with pytest.raises(ValueError, match="write it to a place of your own"):
            one.report(2, ok=True, output="x" * 5000)
        one.flush()
        one.report(2, ok=True)
        one.close()
        found = json.loads(s3.get_object(**address)["Body"].read())
        assert (found["complete"], found["items"]) == (False, [{"i": 0, "ok": True}])

    def test_a_line_can_name_signed_urls_for_both(self, s3: Any) -> None:
        urls = {
            name: s3.generate_presigned_url("put_object", {"Bucket": "bucket", "Key": name})
            for name in ("result_uri", "progress_uri")
        }
        one = Task({"DISPATCH_INPUT": json.dumps({"items": [1], **urls})})
        one.flush()
        one.report(1, ok=True)
        one.close()
        complete = [
            json.loads(s3.get_object(Bucket="bucket", Key=name)["Body"].read())["complete"]
            for name in ("progress_uri", "result_uri")
        ]
        assert complete == [False, True]


class TestClaim:
    def test_without_a_uri_there_is_nothing_to_claim(self) -> None:
        claim({})

    def test_all_tasks_of_the_first_execution_go_on_and_another_one_leaves(
        self, prefix: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        uri = f"{prefix}claims/k1"
        first = {"DISPATCH_CLAIM_URI": uri, "CLOUD_RUN_EXECUTION": "job-abc"}
        claim(first)
        claim(first)
        with pytest.raises(SystemExit) as caught:
            claim({**first, "CLOUD_RUN_EXECUTION": "job-xyz"})
        assert caught.value.code == EXIT_CLAIMED_BY_ANOTHER == 94
        assert capsys.readouterr().err == (
            f"dispatcher: {uri} belongs to execution job-abc, and this is job-xyz: "
            "nothing is done here\n"
        )
        assert container._read(uri, 100) == b"job-abc"

    def test_the_tasks_of_a_batch_array_are_one_execution(self, tmp_path: Path) -> None:
        uri = (tmp_path / "k").as_uri()
        for index in range(3):
            claim({"DISPATCH_CLAIM_URI": uri, "AWS_BATCH_JOB_ID": f"1234:{index}"})
        assert (tmp_path / "k").read_text() == "1234"

    def test_of_many_at_once_one_goes_on(self, prefix: str) -> None:
        together = threading.Barrier(8)

        def try_it(number: int) -> bool:
            together.wait()
            try:
                claim({"DISPATCH_CLAIM_URI": f"{prefix}k", "CLOUD_RUN_EXECUTION": str(number)})
            except SystemExit:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(try_it, range(8))).count(True) == 1

    def test_where_it_cannot_be_claimed_the_work_is_not_begun(self, gcs: FakeGcs) -> None:
        gcs.refused = "k"
        with pytest.raises(
            StorageError, match=r"cannot write gs://bucket/k: 403 Forbidden: .*No\."
        ):
            claim({"DISPATCH_CLAIM_URI": "gs://bucket/k"})
        with pytest.raises(InputError, match=r"is https://h/k: a claim is written \*and\* read"):
            claim({"DISPATCH_CLAIM_URI": "https://h/k?secret"})

    def test_it_is_what_the_dispatcher_reads(self, tmp_path: Path) -> None:
        place = Storage(tmp_path.as_uri())
        claim({"DISPATCH_CLAIM_URI": place.uri("claims/k"), "CLOUD_RUN_EXECUTION": "e"})
        assert place.read("claims/k", 100) == b"e"
        assert not place.create("claims/k", b"")


class _Server(ThreadingHTTPServer):
    """Answers what a test says, call after call; the last answer again and again."""

    daemon_threads = True

    def __init__(self, answers: list[tuple[int, dict[str, str], bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.answers = answers
        self.seen: list[tuple[str, str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: object) -> None:
        """The test's output is not the place."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.seen.append((self.command, self.path, dict(self.headers.items())))
        answers = self.server.answers
        status, headers, data = answers.pop(0) if len(answers) > 1 else answers[0]
        if status == 0:  # no answer: the line goes dead
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_PUT = do_GET  # noqa: N815 -- the name is http.server's
    do_POST = do_GET  # noqa: N815 -- as above


@pytest.fixture
def serve() -> Iterator[Callable[..., _Server]]:
    servers: list[_Server] = []

    def start(*answers: tuple[int, dict[str, str], bytes]) -> _Server:
        server = _Server(list(answers))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class TestTransport:
    @pytest.mark.parametrize("token", [None, "a/session+token="])
    @pytest.mark.parametrize(
        "headers", [{}, {"If-None-Match": "*", "Content-Type": "application/json"}]
    )
    def test_a_request_is_signed_as_botocore_signs_it(
        self, token: str | None, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = datetime(2024, 5, 1, 2, 3, 4, tzinfo=UTC)
        url = "https://bucket.s3.eu-west-1.amazonaws.com/results/a%20b/%C3%A9/0.json"
        ours = container._sign(
            "PUT",
            url,
            headers,
            b'{"a":1}',
            container._Credentials("AKID", "secret", token, 0),
            "eu-west-1",
            now,
        )
        request = AWSRequest("PUT", url, headers=dict(headers), data=b'{"a":1}')
        request.context["payload_signing_enabled"] = True
        monkeypatch.setattr("botocore.auth.get_current_datetime", lambda *_, **__: now)
        S3SigV4Auth(Credentials("AKID", "secret", token), "s3", "eu-west-1").add_auth(request)
        assert ours["Authorization"] == request.headers["Authorization"]
        assert ours["X-Amz-Date"] == request.headers["X-Amz-Date"]

    def test_what_got_no_clear_answer_is_asked_again(self, serve: Callable[..., _Server]) -> None:
        server = serve((503, {}, b""), (0, {}, b""), (429, {}, b""), (200, {}, b"here"))
        assert container._read(f"{server.url}/a", 10) == b"here"
        assert len(server.seen) == 4

    def test_a_refusal_is_not_asked_again_and_told_without_the_secret(
        self, serve: Callable[..., _Server]
    ) -> None:
        server = serve((403, {}, b"<Code>RequestTimeTooSkewed</Code>"))
        with pytest.raises(StorageError) as caught:
            container._create(f"{server.url}/a?X-Amz-Signature=secret", b"")
        assert str(caught.value) == (
            f"cannot write {server.url}/a: 403 Forbidden: <Code>RequestTimeTooSkewed</Code>"
        )
        assert len(server.seen) == 1

    def test_a_document_that_is_cut_off_is_read_again(self, serve: Callable[..., _Server]) -> None:
        whole = b'{"items":[1]}\n{"items":[2]}\n'
        cut = (200, {"Content-Length": str(len(whole))}, whole[:20])
        server = serve(cut, cut, (200, {}, whole))
        environ = {"DISPATCH_INPUT_URI": f"{server.url}/a", "DISPATCH_TASK_INDEX": "1"}
        assert Task(environ).items == [2]
        server = serve((200, {"Content-Length": "999"}, b'{"items":[1]}\n'))
        with pytest.raises(StorageError, match="was cut off, 985 bytes before its end"):
            Task({**environ, "DISPATCH_INPUT_URI": f"{server.url}/a"})

    def test_the_region_of_a_bucket_is_learnt(
        self, serve: Callable[..., _Server], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = serve((400, {"x-amz-bucket-region": "eu-west-1"}, b""), (200, {}, b"x"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        assert container._read("s3://bucket/a", 10) == b"x"
        scopes = [headers["Authorization"].split("/")[2] for _, _, headers in server.seen]
        assert scopes == ["us-east-1", "eu-west-1"]

    @pytest.mark.parametrize(
        ("bucket", "region", "host"),
        [
            ("bucket", "eu-west-1", "bucket.s3.eu-west-1.amazonaws.com"),
            ("a.b", "eu-west-1", "s3.eu-west-1.amazonaws.com"),
            ("bucket", "cn-north-1", "bucket.s3.cn-north-1.amazonaws.com.cn"),
        ],
    )
    def test_a_bucket_has_its_host(
        self, bucket: str, region: str, host: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_REGION", region)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        call = container._call("GET", f"s3://{bucket}/k", None, only_new=False)
        assert urlsplit(call.url).netloc == host

    def test_google_is_asked_with_the_platforms_own_token(
        self, serve: Callable[..., _Server], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = serve((200, {}, b'{"access_token":"t1","expires_in":3599}'))
        monkeypatch.setenv("GCE_METADATA_HOST", server.url.removeprefix("http://"))
        for _ in range(2):
            call = container._call("PUT", "gs://bucket/a b", b"", only_new=True)
            assert call.headers["Authorization"] == "Bearer t1"
        assert call.method == "POST"
        assert call.url == (
            "https://storage.googleapis.com/upload/storage/v1/b/bucket/o"
            "?uploadType=media&name=a+b&ifGenerationMatch=0"
        )
        [(_, path, headers)] = server.seen
        assert path == "/computeMetadata/v1/instance/service-accounts/default/token"
        assert headers["Metadata-Flavor"] == "Google"
        container._kept.clear()
        monkeypatch.setenv("CLOUDSDK_AUTH_ACCESS_TOKEN", "t2")
        call = container._call("GET", "gs://bucket/a b", None, only_new=False)
        assert call.headers == {"Authorization": "Bearer t2"}
        assert call.url == "https://storage.googleapis.com/storage/v1/b/bucket/o/a%20b?alt=media"

    def test_without_a_platform_it_says_which_credentials_are_missing(
        self, serve: Callable[..., _Server], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = serve((404, {}, b""))
        monkeypatch.setenv("GCE_METADATA_HOST", server.url.removeprefix("http://"))
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.url)
        with pytest.raises(StorageError, match="there is no token of Google here"):
            container._read("gs://bucket/a", 10)
        with pytest.raises(StorageError, match="there are no credentials of AWS here"):
            container._read("s3://bucket/a", 10)


ROLE = json.dumps(
    {
        "AccessKeyId": "AKID",
        "SecretAccessKey": "secret",
        "Token": "session",
        "Expiration": "2999-01-01T00:00:00Z",
    }
).encode()


class TestCredentialsOfAws:
    def test_a_container_asks_its_agent(
        self, serve: Callable[..., _Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        server = serve((200, {}, ROLE))
        (tmp_path / "token").write_text("let me in\n")
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{server.url}/role")
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "token"))
        for _ in range(2):
            assert container._aws_credentials()[:3] == ("AKID", "secret", "session")
        [(_, path, headers)] = server.seen
        assert (path, headers["Authorization"]) == ("/role", "let me in")

    def test_an_instance_is_asked_with_a_session_token(
        self, serve: Callable[..., _Server], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = serve((200, {}, b"t"), (200, {}, b"the-role\n"), (200, {}, ROLE))
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.url)
        assert container._aws_credentials().access_key == "AKID"
        assert [(method, path) for method, path, _ in server.seen] == [
            ("PUT", "/latest/api/token"),
            ("GET", "/latest/meta-data/iam/security-credentials/"),
            ("GET", "/latest/meta-data/iam/security-credentials/the-role"),
        ]

    def test_a_service_account_of_kubernetes_becomes_a_role(
        self, moto: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "token").write_text("a.web.token")
        monkeypatch.setenv("AWS_ENDPOINT_URL", moto[0])
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/exporter")
        found = container._aws_credentials()
        assert found.access_key.startswith("ASIA")
        assert found.token
        assert found.until > time.time()
        assert container._create("s3://bucket/by-role", b"x")


class TestOneFile:
    path = Path(container.__file__)

    def test_it_is_written_in_python_3_8(self) -> None:
        tree = ast.parse(self.path.read_text(), feature_version=(3, 8))
        newer = {"removeprefix", "removesuffix", "UTC", "to_thread", "bit_count", "pairwise"}
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & newer
        strict = [node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)]
        assert "strict" not in strict

    def test_it_imports_the_standard_library_alone(self) -> None:
        tree = ast.parse(self.path.read_text())
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                modules.add((node.module or "").partition(".")[0])
        assert modules <= sys.stdlib_module_names


def test_a_programs_own_handler_of_sigterm_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DISPATCH_ITEMS", "[1]")
    monkeypatch.setenv("DISPATCH_RESULT_URI", f"{tmp_path.as_uri()}/")
    monkeypatch.setattr(container._Process, "task", None)
    monkeypatch.setattr(container._Process, "leaves_by_exit", False)

    def own(_signum: int, _frame: object) -> None:
        """Ours."""

    before = signal.signal(signal.SIGTERM, own)
    try:
        with container.run() as one:
            assert signal.getsignal(signal.SIGTERM) is own
            one.report(1, ok=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "0.json").exists()
