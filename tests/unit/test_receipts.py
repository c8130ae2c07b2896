"""Receipts as values: what is read of any bytes, what they are weighed to, what is left to do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from dispatcher import receipts as receipts_module
from dispatcher.receipts import (
    BASE_BYTES,
    MAX_OUTPUT_BYTES,
    MAX_RECEIPT_BYTES,
    MAX_TEXT,
    MAX_URI,
    MAX_VALUE,
    Expected,
    InvalidReceipt,
    ItemResult,
    Receipt,
    begins_a_receipt,
    halves,
    most_bytes,
    open_positions,
    read_receipt,
    weigh,
)
from dispatcher.states import Outcome

EXPECTED = Expected("d-k1", 2, 3, 4)
NAMES = ("version", "key", "task", "attempt", "complete", "items", "progress")

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
"""Also what JSON does not have and Python reads all the same: NaN, halves of surrogate pairs."""

entries = st.fixed_dictionaries(
    {},
    optional={
        "i": st.integers(-1, 5) | json_values,
        "ok": st.booleans() | json_values,
        "output": json_values,
        "output_uri": json_values,
        "error": json_values,
    },
)
documents = st.fixed_dictionaries(
    {"version": st.just(1)},
    optional={
        "key": st.sampled_from(["d-k1", "d-other"]) | json_values,
        "task": st.just(2) | json_values,
        "attempt": st.just(3) | json_values,
        "complete": st.booleans() | json_values,
        "items": st.lists(entries, max_size=5) | json_values,
        "progress": st.fixed_dictionaries({"done": json_values, "total": json_values})
        | json_values,
    },
)


def entry(position: int = 0, **fields: Any) -> dict[str, Any]:
    return {"i": position, "ok": True, **fields}


def written(*items: Any, complete: bool = False, **fields: Any) -> bytes:
    told = {"version": 1, "complete": complete, "items": list(items), **fields}
    return json.dumps(told).encode()


def refusal(data: bytes) -> str | None:
    """Why something is no receipt; None if it is one. Nothing else may come of it."""
    try:
        read_receipt(data, EXPECTED)
    except InvalidReceipt as error:
        return str(error)
    return None


def output_of(value: Any) -> Any:
    """What Postgres is given of an output."""
    (item,) = read_receipt(written(entry(output=value)), EXPECTED).items
    return None if item.output is None else json.loads(item.output)


class TestReading:
    @given(st.binary())
    @example(b"")
    @example(b"\xff\xfe\x00")
    @example(b'{"version":' + b"9" * 5000 + b"}")
    @example(b"[" * 100_000)
    @example(b'{"a":' * 100_000)
    @example('{"version": 1, "complete": true, "items": []}'.encode("utf-16"))
    def test_any_bytes_are_a_receipt_or_refused(self, data: bytes) -> None:
        why = refusal(data)
        assert why is None or 0 < len(why) < 400, "what stands in it does not fill the audit"

    @given(documents | json_values)
    def test_what_is_read_can_be_kept_and_tells_of_given_items_only(self, told: Any) -> None:
        data = json.dumps(told).encode()
        try:
            receipt = read_receipt(data, EXPECTED)
        except InvalidReceipt:
            return
        positions = [item.position for item in receipt.items]
        assert len(set(positions)) == len(positions)
        assert set(positions) <= set(range(EXPECTED.items))
        assert not receipt.complete or len(positions) == EXPECTED.items
        for item in receipt.items:
            for text in (item.output, item.output_uri, item.error):
                assert text is None or text.encode().count(0) == 0
            if item.output is not None:
                json.loads(item.output, parse_constant=pytest.fail)
                assert len(item.output.encode()) <= 2 * MAX_OUTPUT_BYTES
            assert len(item.output_uri or "") <= MAX_TEXT
            assert len(item.error or "") <= MAX_TEXT
            assert item.ok == (item.error is None)

    @given(documents)
    def test_every_beginning_of_one_is_refused(self, told: Any) -> None:
        data = json.dumps(told).encode()
        for end in {0, 1, len(data) // 2, len(data) - 1}:
            with pytest.raises(InvalidReceipt) as refused:
                read_receipt(data[:end], EXPECTED)
            assert refused.value.foreign, "a file that is cut short does not say what it is"

    @pytest.mark.parametrize("depth", [100, 900, 990, 1000, 3000, 50_000])
    @pytest.mark.parametrize("name", [*NAMES, "i", "ok", "output", "output_uri", "error"])
    def test_however_deep_something_is_nested_nothing_but_a_refusal_comes_of_it(
        self, name: str, depth: int
    ) -> None:
        deep = "[" * depth + "]" * depth
        if name in NAMES:
            told = {"version": 1, "complete": False, "items": [], name: "DEEP"}
        else:
            told = {"version": 1, "complete": False, "items": [{**entry(), name: "DEEP"}]}
        assert refusal(json.dumps(told).replace('"DEEP"', deep).encode()) != ""

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
    def test_an_output_that_no_database_takes_is_refused(self, number: str) -> None:
        data = written(entry(output=["NUMBER"])).replace(b'"NUMBER"', number.encode())
        with pytest.raises(InvalidReceipt, match="item 0 holds a number that JSON does not have"):
            read_receipt(data, EXPECTED)

    def test_an_output_loses_what_postgres_cannot_keep_and_nothing_else(self) -> None:
        assert output_of("a\0b\ud800") == "a\ufffdb\ufffd"
        assert output_of({"\0": "\0\0"}) == {"\ufffd": "\ufffd\ufffd"}
        assert output_of(r"\u0000 is how JSON spells it") == r"\u0000 is how JSON spells it"
        assert output_of("\\\0") == "\\\ufffd"

    def test_a_success_has_no_error_and_a_failure_has_one(self) -> None:
        data = written(entry(error="but"), entry(1, ok=False), entry(2, ok=False, error=["x"]))
        errors = [item.error for item in read_receipt(data, EXPECTED).items]
        assert errors == [None, "no error told", '["x"]']

    @pytest.mark.parametrize("number", ["1e-7", "1e15", "-1E5"])
    def test_an_output_is_measured_as_it_was_written(self, number: str) -> None:
        def told(count: int) -> str | None:
            numbers = ",".join([number] * count)
            return refusal(
                written(entry(output="NUMBERS")).replace(b'"NUMBERS"', f"[{numbers}]".encode())
            )

        most = (MAX_OUTPUT_BYTES - 1) // (len(number) + 1)
        assert told(most) is None
        assert "larger than 4096 bytes" in str(told(most + 1))

    def test_progress_is_of_two_counts_or_none(self) -> None:
        def progress(done: Any, total: Any) -> tuple[int, int] | None:
            return read_receipt(written(progress={"done": done, "total": total}), EXPECTED).progress

        assert progress(3, 10) == (3, 10)
        for wrong in ((-1, 10), (3, "10"), (True, 10), (3, 2**63), (3.0, 10)):
            assert progress(*wrong) is None


class TestPieceByPiece:
    @pytest.fixture(autouse=True)
    def pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(receipts_module, "PIECE_BYTES", 1)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    @given(
        documents,
        st.sampled_from([None, 1]),
        st.booleans(),
        st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-le"]),
    )
    def test_what_is_read_is_what_json_says(
        self, told: Any, indent: int | None, ascii_only: bool, encoding: str
    ) -> None:
        text = json.dumps(told, indent=indent, ensure_ascii=ascii_only)
        data = text.encode(encoding, "surrogatepass")
        with pytest.MonkeyPatch.context() as whole:
            whole.setattr(receipts_module, "PIECE_BYTES", len(data))
            expected = refusal(data)
        assert refusal(data) == expected
        plain = json.loads(text)
        if expected is None:
            receipt = read_receipt(data, EXPECTED)
            assert receipt.complete is plain["complete"]
            assert [(one.position, one.ok) for one in receipt.items] == [
                (one["i"], one["ok"]) for one in plain["items"]
            ]
        elif not {"version", "complete"} <= plain.keys():
            assert "no JSON object with `version` and `complete`" in expected

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ('{"version": 1, "complete": true, "items": [] ]', "'}' is expected, and there is ']'"),
            ('{"version": 1 "complete": true}', "'}' is expected, and there is '\"'"),
            ('{"version": 1, "complete" true}', "':' is expected, and there is 't'"),
            ('{"version": 1, "complete": true,}', "'\"' is expected, and there is '}'"),
            ('{"version": 1, "complete": true, "items": [{},]}', "Expecting value"),
            ('{"version": 1, "complete": true, "items": [{} {}]}', "']' is expected"),
            ('{"version": 1.', "'}' is expected, and there is '.'"),
            ('{"version": 1, "complete": true} {}', "its end is expected, and there is '{'"),
            ('{"version": 1, "complete": true', "'}' is expected, and there is its end"),
            ('{"version": 1, "complete": "\xff"}', "utf-8: invalid start byte"),
        ],
    )
    def test_what_is_no_json_is_said(self, text: str, why: str) -> None:
        assert str(refusal(text.encode("latin-1"))).startswith("it is no JSON: ")
        assert why in str(refusal(text.encode("latin-1")))

    def test_of_a_key_that_is_there_twice_the_last_counts(self) -> None:
        data = (
            b'{"version":2,"complete":0,"items":[{"i":9}],"items":[],"version":1,"complete":false}'
        )
        assert read_receipt(data, EXPECTED).items == ()


class TestSizes:
    @pytest.mark.parametrize("items", [1, 3, 200])
    def test_the_largest_items_have_room_however_their_characters_are_spelt(
        self, items: int
    ) -> None:
        letter, emoji = "\\u0041", "\\ud83d\\ude00"
        output = letter * (MAX_OUTPUT_BYTES - 2)
        fields = f'"output":"{output}","output_uri":"{"u" * MAX_URI}","error":"{emoji * MAX_TEXT}"'
        entries = ", ".join(f'{{"i":{i},"ok":false,{fields}}}' for i in range(items))
        data = f'{{"version":1,"key":"k","complete":true,"items":[{entries}]}}'.encode()
        assert len(data) <= most_bytes(items)
        read = read_receipt(data, Expected("k", 0, 1, items))
        assert {(len(one.output or ""), len(one.error or "")) for one in read.items} == {
            (MAX_OUTPUT_BYTES, MAX_TEXT)
        }

    def test_a_receipt_may_have_16_mib_and_no_more(self) -> None:
        assert BASE_BYTES < most_bytes(1) < most_bytes(2) < MAX_RECEIPT_BYTES
        assert most_bytes(10**7) == MAX_RECEIPT_BYTES == 16 << 20

    @pytest.mark.parametrize(
        "value", [b"[" + b"[]," * (MAX_VALUE // 2) + b"1]", b'"' + b"x" * 2**19]
    )
    @pytest.mark.parametrize("place", ["unknown", "progress", "items"])
    def test_a_single_large_value_is_refused_before_it_is_parsed(
        self, place: str, value: bytes
    ) -> None:
        value = b"[%s]" % value if place == "items" else value
        claims = b'"version":1,"complete":true'
        member = b'"%s":%s' % (place.encode(), value)
        for data, foreign in (
            (b"{%s,%s}" % (claims, member), False),
            (b"{%s,%s}" % (member, claims), True),
        ):
            with pytest.raises(InvalidReceipt, match="a value of more than 262,144 char") as told:
                read_receipt(data, EXPECTED)
            assert told.value.foreign is foreign

    @pytest.mark.parametrize(
        ("beginning", "claims"),
        [
            (b'{"version": 1, "complete": true, "items": [{"i": 0, "error": "xxx', True),
            (b'{"attempt": 1, "complete": false, "items": [{"i": 0', True),
            (b'{"items": [{"i": 0}, {"i": 1}], "version": 1, "items": [', True),
            (b'{"version": "4.2", "rows": [7, 7, 7', False),
            (b'{"rows": [{"version": 1, "complete": true}, ', False),
            (b'["version", 1, "complete", true', False),
            (b"\x1f\x8b\x08\xff\xff", False),
            (b"", False),
        ],
    )
    def test_its_beginning_tells_a_receipt_from_another_file(
        self, beginning: bytes, claims: bool
    ) -> None:
        assert begins_a_receipt(beginning) is claims

    def test_surplus_items_are_counted_up_to_a_point(self) -> None:
        told = written(*[{}] * 20, complete=True)
        assert refusal(told) == "it tells of 20 items; 4 were given"
        many = told.replace(b"{}, {}", b",".join([b"{}"] * 20_000))
        assert refusal(many) == "it tells of more than 10004 items; 4 were given"


receipts = st.none() | st.lists(st.booleans(), max_size=4).flatmap(
    lambda oks: st.booleans().map(
        lambda complete: Receipt(
            complete and len(oks) > 0,
            tuple(
                ItemResult(place, ok, error=None if ok else "bad") for place, ok in enumerate(oks)
            ),
        )
    )
)


class TestWeighing:
    @given(st.sampled_from(Outcome), receipts, st.none() | st.just("cut short"), st.booleans())
    def test_a_success_is_one_in_the_eyes_of_both_the_provider_and_the_receipt(
        self, outcome: Outcome, receipt: Receipt | None, problem: str | None, required: bool
    ) -> None:
        assume(receipt is None or problem is None)
        weighed, reason = weigh(outcome, "said", receipt, problem, required=required)
        whole = receipt is not None and receipt.complete and not receipt.failed
        gone = outcome in (Outcome.LOST, Outcome.PREEMPTED)
        if weighed is Outcome.SUCCEEDED:
            assert problem is None
            assert receipt is None or not receipt.failed
            assert whole or not required
            assert outcome is Outcome.SUCCEEDED or (gone and whole)
        elif weighed is not outcome and gone:
            assert weighed is Outcome.FAILED, "its work ended, whatever became of its container"
            assert receipt is not None
            assert receipt.complete
            assert receipt.failed
        elif weighed is not outcome:
            assert outcome is Outcome.SUCCEEDED, "a bad end stays what it was"
            assert weighed in (Outcome.FAILED, Outcome.SUSPECT)
        assert reason, "each end says why"


class TestWhatIsLeft:
    @given(st.integers(0, 200), st.data())
    def test_what_is_done_and_what_is_open_are_all_of_a_chunk(
        self, size: int, data: st.DataObject
    ) -> None:
        done = data.draw(st.sets(st.integers(0, max(0, size - 1)), max_size=size))
        left = open_positions(size, done)
        assert left == sorted(set(range(size)) - done)

    @given(st.lists(st.integers(0, 1000), unique=True, min_size=2), st.booleans())
    def test_two_parts_keep_every_item_in_its_order(
        self, positions: list[int], first_alone: bool
    ) -> None:
        one, other = halves(positions, first_alone=first_alone)
        assert one + other == positions
        if first_alone:
            assert len(one) == 1
        else:
            assert len(one) - len(other) in (0, 1)

    def test_an_item_alone_is_not_cut(self) -> None:
        assert halves([7], first_alone=True) == halves([7], first_alone=False) == [[7]]

    @given(st.integers(2, 5000))
    def test_halving_ends_in_as_many_rounds_as_the_logarithm(self, size: int) -> None:
        rounds = 0
        while size > 1:
            size = max(len(part) for part in halves(range(size), first_alone=False))
            rounds += 1
        assert rounds <= 13
