"""What can be given as items, and what is said about what cannot."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.errors import InvalidItems
from dispatcher.items import (
    MAX_ITEM_BYTES,
    Format,
    ItemsDigest,
    format_of,
    is_uri,
    join_items,
    open_items,
    pages,
    parse,
    split_items,
    stream_items,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)


def texts(items: object, base: Path | None = None) -> list[str]:
    with open_items(items, base=base) as stream:
        return list(stream)


def refusal(items: object, base: Path | None = None) -> str:
    with pytest.raises(InvalidItems) as caught:
        texts(items, base)
    return str(caught.value)


def parsed(data: bytes, kind: Format = "jsonl", block: int = 7) -> list[str]:
    blocks = [data[place : place + block] for place in range(0, len(data), block)]
    return [text for texts in parse(blocks, kind, "F") for text in texts]


def parse_refusal(data: bytes, kind: Format = "jsonl", block: int = 1 << 18) -> str:
    with pytest.raises(InvalidItems) as caught:
        parsed(data, kind, block)
    return str(caught.value)


class TestValues:
    @given(st.lists(JSON, max_size=20))
    def test_items_come_out_as_they_went_in(self, values: list[Any]) -> None:
        assert [json.loads(text) for text in texts(values)] == values

    @given(st.lists(JSON, max_size=20))
    def test_joining_is_undone_exactly_by_splitting(self, values: list[Any]) -> None:
        encoded = texts(values)
        joined = join_items(encoded)
        assert split_items(joined) == encoded
        assert json.loads(joined) == values

    def test_a_generator_is_read_only_as_far_as_needed(self) -> None:
        taken = 0

        def numbers() -> Iterator[int]:
            nonlocal taken
            while True:
                yield taken
                taken += 1

        with open_items(numbers()) as stream:
            assert next(iter(stream)) == "0"
        assert taken < 2000

    def test_an_empty_list_has_no_items_and_is_fine(self) -> None:
        assert texts([]) == []

    def test_enums_of_text_and_tuples_are_json(self) -> None:
        colour = StrEnum("colour", ["RED"])
        assert texts([colour.RED, (1, 2)]) == ['"red"', "[1,2]"]

    def test_what_is_no_json_is_named_with_its_position_type_and_value(self) -> None:
        assert refusal(["a", 2, datetime(2024, 5, 1)]) == (  # noqa: DTZ001 - any will do
            "item 2 is a datetime.datetime, which is not a JSON value: "
            "datetime.datetime(2024, 5, 1, 0, 0)"
        )
        assert refusal([{"when": [{1}]}]) == "item 0 holds a set, which is not a JSON value: {1}"

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            (float("nan"), r"item 0 is a float that cannot be written as JSON: nan \(Out of range"),
            ({(1, 2): 3}, r"item 0 is a dict that cannot be .*keys must be str"),
            ("\ud800", r"item 0 is a str that cannot be .*half of a surrogate pair"),
            (["\ud800"], r"item 0 is a list that cannot be .*half of a surrogate pair"),
        ],
    )
    def test_what_json_cannot_hold_is_refused(self, value: object, said: str) -> None:
        assert re.match(said, refusal([value]))

    def test_an_item_nested_without_end_is_refused(self) -> None:
        loop: list[Any] = []
        loop.append(loop)
        assert "Circular reference" in refusal([loop])
        deep: list[Any] = []
        for _ in range(300):
            deep = [deep]
        assert "recursion limit exceeded" in refusal([deep])

    def test_an_item_too_large_is_refused_with_its_position_and_size(self) -> None:
        assert texts(["x" * (MAX_ITEM_BYTES - 2)])
        assert refusal(["a", "é" * MAX_ITEM_BYTES]) == (
            "item 1 is 2,097,154 bytes as JSON and an item may have 1,048,576: "
            "put the data into storage and let the item name it"
        )

    def test_a_single_item_by_mistake_is_refused_with_what_to_give_instead(self) -> None:
        assert refusal({"id": 1}) == (
            "items must be a list or another ordered iterable of JSON values, not a dict: "
            "{'id': 1}; put a single item into a list: [value], or give its values or items()"
        )
        assert "put a single item into a list" in refusal(b"abc")
        assert refusal(7).endswith("not a int: 7; give a list or another iterable of JSON values")

    def test_a_set_has_no_order_and_is_refused(self) -> None:
        assert "give sorted(...)" in refusal({1, 2})

    def test_an_open_file_and_async_code_are_refused(self) -> None:
        async def numbers() -> AsyncIterator[int]:
            yield 1

        assert "give the path of the file" in refusal(io.BytesIO())
        assert "async code is not awaited" in refusal(numbers())

    def test_a_string_is_a_path_and_one_that_is_none_is_explained(self) -> None:
        assert refusal("orders") == (
            "'orders' does not say what it holds: a file of items ends in one of .jsonl, .ndjson, "
            ".csv, .txt, .lines, and .gz may follow. To enqueue one string, give a list: "
            "['orders']"
        )


class TestFiles:
    def test_jsonl_keeps_the_spelling_of_each_line(self) -> None:
        data = b'{"b": 1, "a":12345678901234567890123}\r\n\r\n  1.50\n\n"\xc3\xa9"'
        kept = ['{"b": 1, "a":12345678901234567890123}', "1.50", '"é"']
        assert parsed(data) == kept

    @given(st.lists(JSON, min_size=1, max_size=20), st.integers(1, 50))
    def test_the_size_of_the_blocks_makes_no_difference(
        self, values: list[Any], block: int
    ) -> None:
        data = "\n".join(json.dumps(value, ensure_ascii=False) for value in values)
        assert [json.loads(text) for text in parsed(data.encode(), block=block)] == values

    def test_only_a_line_feed_ends_a_line(self) -> None:
        assert parsed('"a\u2028b\x85c"\n2'.encode()) == ['"a\u2028b\x85c"', "2"]

    def test_a_byte_order_mark_is_passed_over(self) -> None:
        assert parsed(b"\xef\xbb\xbf1\n2", block=1) == ["1", "2"]

    def test_what_is_no_json_is_named_with_file_and_line(self) -> None:
        assert parse_refusal(b'{"a": 1}\n\nhello world\n3\n') == (
            "F:3 is not JSON: expected value at column 1; it starts with 'hello world'. "
            "Each line must hold one JSON value"
        )

    @pytest.mark.parametrize("line", [b"1,2", b"[1", b"NaN", b"{'a': 1}", b'"\\ud800"', b"01"])
    def test_a_line_that_is_only_nearly_json_is_refused(self, line: bytes) -> None:
        assert parse_refusal(b"1\n" + line + b"\n2]").startswith("F:2 is not JSON")

    def test_json_over_many_lines_gets_a_hint(self) -> None:
        assert "jq -c '.[]'" in parse_refusal(b"[\n  1,\n  2\n]\n")
        with pytest.raises(InvalidItems, match="a JSON array becomes JSONL with"):
            format_of("orders.json")

    @pytest.mark.parametrize("block", [1, 5, 1000])
    def test_what_is_no_utf8_is_named_with_file_and_line(self, block: int) -> None:
        assert parse_refusal(b"1\n2\n\n\xff\n5", block=block) == (
            "F:4 is not UTF-8 text: byte 0xff (invalid start byte); save the file as UTF-8"
        )

    def test_a_line_too_long_is_refused_before_it_is_read_whole(self) -> None:
        given = 0

        def endless() -> Iterator[bytes]:
            nonlocal given
            yield b"1\n"
            while True:
                given += 1
                yield b"x" * 100_000

        with pytest.raises(InvalidItems, match=r"F:2 is longer than 1,048,576 bytes"):
            list(parse(endless(), "jsonl", "F"))
        assert given == 11

    def test_lines_of_text_become_strings(self) -> None:
        data = b'one\r\n two "2" \n\n   \nthree\\'
        assert parsed(data, "lines") == ['"one"', '" two \\"2\\" "', '"three\\\\"']

    def test_a_line_of_text_too_large_as_json_is_refused(self) -> None:
        data = b"one\n" + b"\x01" * (MAX_ITEM_BYTES // 2)
        assert parse_refusal(data, "lines").startswith("F:2 is 3,145,730 bytes as JSON")

    def test_rows_of_csv_become_objects_of_strings(self) -> None:
        data = b'id,name\r\n1,"Smith, ""J""\r\nJr"\r\n\r\n2,\xc3\xa9\r\n'
        assert parsed(data, "csv") == [
            '{"id":"1","name":"Smith, \\"J\\"\\r\\nJr"}',
            '{"id":"2","name":"é"}',
        ]

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (b"a,b\n1,2\n3\n", "F:3 has 1 columns and the header has 2: ['3']"),
            (b"a,b\n1,2,3\n", "F:2 has 3 columns and the header has 2: ['1', '2', '3']"),
            (b"a,b,a\n", "F:1: the header has 'a' twice; rename one column"),
            (b"a,,b\n", "F:1: column 2 of the header has no name"),
            (b'a\n"x"y\n', "F:2 is not valid CSV: ',' expected after '\"'"),
            (b'a\n1\n"x\n', "F:3 is not valid CSV: unexpected end of data"),
        ],
    )
    def test_bad_csv_is_named_with_file_and_line(self, data: bytes, said: str) -> None:
        assert parse_refusal(data, "csv") == said

    @pytest.mark.parametrize("data", [b"", b"\n", b"\n \r\n\n"])
    def test_a_file_without_items_is_refused(self, data: bytes) -> None:
        assert parse_refusal(data).startswith("F has no items; a batch of none can")
        assert parse_refusal(data, "lines").startswith("F has no items")

    def test_csv_with_nothing_but_a_header_is_refused(self) -> None:
        assert parse_refusal(b"a,b\n", "csv").startswith("F has no items after its header line")

    @pytest.mark.parametrize(
        ("name", "kind"),
        [("a.jsonl", "jsonl"), ("a.NDJSON", "jsonl"), ("a.csv.gz", "csv"), ("a.txt", "lines")],
    )
    def test_the_name_says_what_a_file_holds(self, name: str, kind: str) -> None:
        assert format_of(name) == kind


class TestPaths:
    def test_a_relative_path_starts_at_the_base(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text("1\n2\n")
        assert texts("a.jsonl", base=tmp_path) == ["1", "2"]
        assert texts(Path("a.jsonl"), base=tmp_path) == ["1", "2"]
        assert texts(str(tmp_path / "a.jsonl"), base=Path("/elsewhere")) == ["1", "2"]

    def test_a_compressed_file_may_have_many_members(self, tmp_path: Path) -> None:
        lines = [f'"{number}"' for number in range(100_000)]
        data = gzip.compress("\n".join(lines[:60_000]).encode() + b"\n")
        (tmp_path / "a.jsonl.gz").write_bytes(
            data + gzip.compress("\n".join(lines[60_000:]).encode())
        )
        assert texts(tmp_path / "a.jsonl.gz") == lines

    def test_a_compressed_file_is_inflated_piece_by_piece(self) -> None:
        data = gzip.compress(b"1" * 50_000_000)
        with pytest.raises(InvalidItems, match="F:1 is longer than"):
            list(parse([data], "jsonl", "F", gzipped=True))

    @pytest.mark.parametrize("cut", [0, 5, 40])
    def test_a_compressed_file_cut_off_is_refused(self, tmp_path: Path, cut: int) -> None:
        data = gzip.compress(b'"some text that needs a few bytes"\n' * 3)
        (tmp_path / "a.jsonl.gz").write_bytes(data[:cut])
        assert refusal(tmp_path / "a.jsonl.gz").endswith(
            "a.jsonl.gz ends in the middle: its gzip data is cut off"
        )

    def test_a_file_that_only_pretends_to_be_compressed_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl.gz").write_bytes(b"1\n2\n3\n")
        assert "a.jsonl.gz is not valid gzip, as its name says it is" in refusal(
            tmp_path / "a.jsonl.gz"
        )

    def test_a_missing_file_and_a_directory_are_refused_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidItems) as caught:
            open_items(tmp_path / "no.jsonl")
        assert str(caught.value) == (
            f"cannot read items from {tmp_path}/no.jsonl: No such file or directory"
        )
        (tmp_path / "dir.jsonl").mkdir()
        with pytest.raises(InvalidItems, match="is a directory; give the path"):
            open_items(tmp_path / "dir.jsonl")

    def test_a_file_that_goes_before_it_is_read_is_told(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("1\n")
        stream = open_items(path)
        path.unlink()
        with pytest.raises(InvalidItems, match="No such file or directory"):
            list(stream)

    def test_a_uri_is_no_local_path(self) -> None:
        assert is_uri("s3://bucket/a.jsonl")
        assert is_uri("file:///a.jsonl")
        assert not is_uri("a:b/c.jsonl")
        assert not is_uri("/a://b")
        assert (
            refusal("s3://bucket/a.jsonl")
            == "'s3://bucket/a.jsonl' is not the path of a local file"
        )

    def test_a_stream_such_as_standard_input_is_read_and_left_open(self) -> None:
        stream = io.BytesIO(b"a\nb\n")
        assert list(stream_items(stream, "lines")) == ['"a"', '"b"']
        assert not stream.closed
        with pytest.raises(InvalidItems, match=r"^standard input has no items"):
            list(stream_items(stream, "lines"))

    def test_closing_early_closes_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text("1\n" * 500_000)
        stream = open_items(tmp_path / "a.jsonl")
        assert next(iter(stream)) == "1"
        # A file left open would be a ResourceWarning, which is an error here.
        stream.close()
        assert list(stream) == []


class TestPages:
    @given(st.lists(JSON), st.integers(1, 10), st.integers(1, 200))
    def test_pages_hold_all_items_in_order_within_their_limits(
        self, values: list[Any], max_items: int, max_bytes: int
    ) -> None:
        encoded = texts(values)
        cut = list(pages(encoded, max_items, max_bytes))
        assert [text for page in cut for text in split_items(page.json)] == encoded
        for page in cut:
            assert page.count == len(split_items(page.json))
            assert 1 <= page.count <= max_items
            assert page.count == 1 or len(page.json.encode()) <= max_bytes

    @given(st.lists(JSON), st.integers(1, 10), st.integers(1, 200))
    def test_the_digest_does_not_depend_on_the_pages(
        self, values: list[Any], max_items: int, max_bytes: int
    ) -> None:
        cut, whole = ItemsDigest(), ItemsDigest()
        for page in pages(texts(values), max_items, max_bytes):
            cut.update(page)
        for page in pages(texts(values)):
            whole.update(page)
        assert cut.hexdigest() == whole.hexdigest()
        assert cut.count == len(values)

    @pytest.mark.parametrize("other", [[1], [1, 2, 3], [2, 1], ["1,2"], [[1, 2]], ["1", "2"], []])
    def test_other_items_have_another_digest(self, other: list[Any]) -> None:
        digests = set()
        for values in ([1, 2], other):
            digest = ItemsDigest()
            for page in pages(texts(values)):
                digest.update(page)
            digests.add(digest.hexdigest())
        assert len(digests) == 2
