"""Receipts: what a task wrote of how each of its items ended. Pure.

`docs/container.md` is the protocol. What a container writes is not trusted: a receipt is read up to
a size, must be of this very execution and task, and may tell of items that the task was given and
of no others; anything else is refused as a whole, with a reason.

As values, JSON can take thirty times its size. So a receipt is parsed value by value, and only what
is kept of an item is there beside the next one.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

from dispatcher.states import Outcome

__all__ = [
    "PROGRESS",
    "STORAGE_PATIENCE",
    "Expected",
    "InvalidReceipt",
    "ItemResult",
    "Receipt",
    "begins_a_receipt",
    "halves",
    "most_bytes",
    "open_positions",
    "progress_name",
    "read_receipt",
    "receipt_name",
    "weigh",
]

STORAGE_PATIENCE: Final = timedelta(minutes=15)
"""How long the end of a task waits for a storage that does not answer."""

MAX_RECEIPT_BYTES: Final = 16 << 20
"""A larger receipt is refused unread, however many items there are; the helper writes none."""

BASE_BYTES: Final = 256 << 10
ITEM_BYTES: Final = 48 << 10
"""For each item: a whole output and a whole error, each character of them escaped, and a URI."""

MAX_VALUE: Final = 256 << 10
"""Characters of one entry of `items`, or of another value: as values it may take 8 MB."""

MAX_SURPLUS: Final = 10_000
"""Items over those that were given that are counted, to say how many there are."""

PIECE_BYTES: Final = 64 << 10
"""Bytes that are decoded at once."""

GONE: Final = frozenset({Outcome.LOST, Outcome.PREEMPTED})
"""Outcomes that say how the container went, and not how its work did: a complete receipt does."""

MAX_OUTPUT_BYTES: Final = 4096
MAX_TEXT: Final = 1000
MAX_URI: Final = 8000
PROGRESS: Final = ".progress.json"
KNOWN: Final = frozenset({"version", "key", "task", "attempt", "complete", "progress"})
"""What is looked at beside `items`; any other key may be there, and is passed over."""

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_SPACE: Final = re.compile("[ \t\n\r]*")
_GOES_ON: Final = frozenset({"", ".", "e", "E"})
_NUL: Final = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")
"""As JSON spells it; a backslash that is text is spelt with two."""


class InvalidReceipt(Exception):
    """What was written cannot be used as a receipt; the text says why."""

    def __init__(self, message: str, *, foreign: bool = False) -> None:
        super().__init__(message)
        self.foreign = foreign
        """Whether it does not even claim to be a receipt: a result of the program's own kind."""


@dataclass(frozen=True, slots=True)
class Expected:
    """Whose receipt it must be."""

    key: str
    """Of the execution."""

    task_index: int
    attempt: int
    items: int
    """How many items the attempt was given."""


@dataclass(frozen=True, slots=True)
class ItemResult:
    """How one item ended."""

    position: int
    """Its place among the items that the attempt was given, from 0."""

    ok: bool
    output: str | None = None
    """JSON text."""

    output_uri: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a task wrote: of all its items if it is complete."""

    complete: bool
    items: tuple[ItemResult, ...]
    progress: tuple[int, int] | None = None
    """Done and total, in the program's own unit."""

    uri: str | None = None

    @property
    def failed(self) -> tuple[ItemResult, ...]:
        """The items that did not succeed."""
        return tuple(item for item in self.items if not item.ok)


def receipt_name(task_index: int) -> str:
    """Name the receipt of a task under its execution's result prefix; there only if complete."""
    return f"{task_index}.json"


def progress_name(task_index: int) -> str:
    """Name what a task has written while it ran."""
    return f"{task_index}{PROGRESS}"


def most_bytes(items: int) -> int:
    """Say how large the receipt of a task may be that was given so many items."""
    return min(MAX_RECEIPT_BYTES, BASE_BYTES + items * ITEM_BYTES)


def begins_a_receipt(beginning: bytes) -> bool:
    """Say if something of which only the beginning is known claims to be a receipt."""
    told: dict[str, Any] = {}
    with suppress(InvalidReceipt, _TooMuch):
        _members(_Text(beginning), told, Expected("", 0, 0, 0))
    return isinstance(told.get("complete"), bool) or told.get("version") == 1


def read_receipt(data: bytes, expected: Expected, uri: str | None = None) -> Receipt:
    """Read a receipt.

    Raises:
        InvalidReceipt: it is no JSON, of another version, execution, task or attempt, or tells of
            items that the task was not given, or of one twice.
    """
    told, items = _told(data, expected)
    complete = told.get("complete")
    if not isinstance(complete, bool) or items is None:
        raise InvalidReceipt("`complete` must be true or false, and `items` a list")
    if items.count > expected.items:
        raise InvalidReceipt(f"it tells of {items.count} items; {expected.items} were given")
    if items.problem is not None:
        raise InvalidReceipt(items.problem)
    found = tuple(items.found)
    if len({item.position for item in found}) != len(found):
        raise InvalidReceipt("it tells of one item twice")
    if complete and len(found) != expected.items:
        raise InvalidReceipt(
            f"it is said to be complete and tells of {len(found)} of {expected.items} items"
        )
    return Receipt(complete, found, _progress(told.get("progress")), uri)


def weigh(
    outcome: Outcome,
    reason: str | None,
    receipt: Receipt | None,
    problem: str | None,
    *,
    required: bool,
) -> tuple[Outcome, str | None]:
    """Say how an attempt ended, given what its receipt tells beside the provider's word.

    Args:
        outcome: What the provider, or our own cancel, says.
        reason: The same in words.
        receipt: What the task wrote, if it can be used.
        problem: Why what it wrote cannot be used, if so.
        required: Whether a success needs a complete receipt.
    """
    if outcome in GONE and receipt is not None and receipt.complete:
        ended = Outcome.FAILED if receipt.failed else Outcome.SUCCEEDED
        said = _failures(receipt) if receipt.failed else "its receipt is complete"
        return ended, f"{said}; else: {reason or outcome}"
    if outcome is not Outcome.SUCCEEDED:
        if receipt is not None and receipt.failed:
            return outcome, _joined(reason, _failures(receipt))
        return outcome, reason
    doubt = _doubt(receipt, problem, required=required)
    if doubt is not None:
        return Outcome.SUSPECT, doubt
    if receipt is not None and receipt.failed:
        return Outcome.FAILED, _failures(receipt)
    return outcome, reason


def _doubt(receipt: Receipt | None, problem: str | None, *, required: bool) -> str | None:
    """Say why an exit with code 0 is not taken for a success."""
    if problem is not None:
        return f"ended with exit code 0, but its receipt cannot be used: {problem}"
    if receipt is None or not (receipt.complete or receipt.items):
        lacking = "ended with exit code 0 and wrote no receipt, which the job requires"
        return lacking if required else None
    if not receipt.complete:
        return f"ended with exit code 0, but its receipt tells of {len(receipt.items)} items only"
    return None


def open_positions(size: int, done: Iterable[int]) -> list[int]:
    """Name the items of a chunk that have not succeeded yet."""
    gone = set(done)
    return [position for position in range(size) if position not in gone]


def halves(positions: Sequence[int], *, first_alone: bool) -> list[list[int]]:
    """Cut what is left of a chunk into two parts, or its first item from the rest."""
    at = 1 if first_alone else (len(positions) + 1) // 2
    return [part for part in (list(positions[:at]), list(positions[at:])) if part]


def _failures(receipt: Receipt) -> str:
    failed = receipt.failed
    first = failed[0].error or "no error told"
    return f"{len(failed)} of {len(receipt.items)} items failed: {first}"


def _joined(*parts: str | None) -> str:
    return "; ".join(part for part in parts if part)


@dataclass(slots=True)
class _Items:
    """What the entries of `items` tell, as long as that can be right."""

    given: int
    count: int = 0
    found: list[ItemResult] = field(default_factory=list)
    problem: str | None = None
    """What is wrong with the first one that is wrong."""

    def read(self, text: _Text) -> None:
        """Read the entries; what is wrong with them is said when all of the document was read."""
        text.take("[")
        if text.take("]"):
            return
        while True:
            self._add(text.value(), text)
            if not text.take(","):
                break
        text.insist("]")

    def _add(self, entry: Any, text: _Text) -> None:
        self.count += 1
        if self.count > self.given + MAX_SURPLUS:
            raise _TooMuch(f"it tells of more than {self.count - 1} items; {self.given} were given")
        if self.count > self.given:
            self.found.clear()
        elif self.problem is None:
            try:
                self.found.append(_item(entry, self.given, text))
            except InvalidReceipt as error:
                self.problem = str(error)
                self.found.clear()


class _Text:
    """A JSON text that is decoded piece by piece and parsed value by value."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._decoder = codecs.getincrementaldecoder(json.detect_encoding(data[:4]))(
            "surrogatepass"
        )
        self._decoded = 0
        self._text = ""
        self._at = self._start = 0

    def peek(self) -> str:
        """Look at the next character that is no space; nothing if there is none."""
        while True:
            found = self._text[self._at : self._at + 1]
            if found > " ":
                return found
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            found = self._text[self._at : self._at + 1]
            if found or not self._more():
                return found

    def take(self, mark: str) -> bool:
        """Pass over a mark, if it comes next."""
        if self.peek() != mark:
            return False
        self._at += 1
        return True

    def insist(self, mark: str) -> None:
        """Pass over a mark that must come next; without one, over the end."""
        if self.peek() != mark:
            found = self._text[self._at : self._at + 1]
            raise _no_json(f"{_named(mark)} is expected, and there is {_named(found)}")
        self._at += len(mark)

    def value(self) -> Any:
        """Parse the next value.

        Raises:
            InvalidReceipt: it is none.
            _TooMuch: it is larger than `MAX_VALUE`.
        """
        self.peek()
        while True:
            problem = None
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise _no_json(error) from None
            except ValueError as error:
                problem = error
            else:
                # What ends with the piece, or before this, may be the beginning of a number.
                if self._text[end : end + 1] not in _GOES_ON:
                    self._start, self._at = self._at, end
                    return value
            if self._decoded >= len(self._data):
                break
            if len(self._text) - self._at > MAX_VALUE:
                raise _TooMuch(
                    f"it holds a value of more than {MAX_VALUE:,} characters, or is no JSON"
                )
            # All that a value may have, so that a large one is tried twice and not piece by piece.
            while len(self._text) - self._at <= MAX_VALUE and self._more():
                pass
        if problem is not None:
            raise _no_json(getattr(problem, "msg", problem))
        self._start, self._at = self._at, end
        return value

    def written_output(self) -> int:
        """Say how many bytes the output in the entry that was read last has, as it was written.

        Its numbers count as they were spelt: `1e-7` is longer as Python writes it.
        """
        entry, _ = _AS_SPELT.raw_decode(self._text, self._start)
        return _size(_ENCODER.encode(entry["output"]))

    def _more(self) -> bool:
        """Decode another piece; say if there was one. What was parsed is let go."""
        if self._decoded >= len(self._data):
            return False
        piece = self._data[self._decoded : self._decoded + PIECE_BYTES]
        self._decoded += len(piece)
        try:
            more = self._decoder.decode(piece, final=self._decoded >= len(self._data))
        except UnicodeDecodeError as error:
            raise _no_json(f"{error.encoding}: {error.reason}") from None
        self._text = self._text[self._at :] + more
        self._at = self._start = 0
        return True


class _TooMuch(Exception):
    """It is not read to its end; the text says why."""


def _of_length(number: str) -> int:
    """Make a number that is written with as many characters as this one."""
    return int("1" * min(len(number), MAX_OUTPUT_BYTES + 1))


_DECODER: Final = json.JSONDecoder()
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_AS_SPELT: Final = json.JSONDecoder(parse_float=_of_length)


def _named(mark: str) -> str:
    return f"'{mark}'" if mark else "its end"


def _no_json(why: object) -> InvalidReceipt:
    return InvalidReceipt(f"it is no JSON: {str(why)[:200]}", foreign=True)


def _told(data: bytes, expected: Expected) -> tuple[dict[str, Any], _Items | None]:
    """Parse what was written, and see that it is of this task; `items` apart, None if no list."""
    told: dict[str, Any] = {}
    text = _Text(data)
    if text.peek() != "{":
        raise InvalidReceipt("it is no JSON object with `version` and `complete`", foreign=True)
    try:
        items = _members(text, told, expected)
    except _TooMuch as error:
        raise InvalidReceipt(str(error), foreign=not _claims(told)) from None
    if not _claims(told):
        raise InvalidReceipt("it is no JSON object with `version` and `complete`", foreign=True)
    if told.get("version") != 1:
        raise InvalidReceipt(f"its version is {_shown(told.get('version'))}; known is 1")
    for name, wanted in (
        ("key", expected.key),
        ("task", expected.task_index),
        ("attempt", expected.attempt),
    ):
        found = told.get(name)
        if found is not None and (found != wanted or isinstance(found, bool)):
            raise InvalidReceipt(f"its {name} is {_shown(found)}, and this is {wanted}")
    return told, items


def _members(text: _Text, told: dict[str, Any], expected: Expected) -> _Items | None:
    """Read an object into `told`, as far as it is known; of a key that is there twice, the last."""
    items = None
    text.insist("{")
    if not text.take("}"):
        while True:
            if text.peek() != '"':
                text.insist('"')
            name = text.value()
            text.insist(":")
            if name == "items":
                items = None
                if text.peek() == "[":
                    items = _Items(expected.items)
                    items.read(text)
                else:
                    text.value()
            elif name in KNOWN:
                told[name] = text.value()
            else:
                text.value()
            if not text.take(","):
                break
        text.insist("}")
    text.insist("")
    return items


def _claims(told: Mapping[str, Any]) -> bool:
    """Say if it claims to be a receipt."""
    return told.keys() >= {"version", "complete"}


def _item(entry: Any, given: int, text: _Text) -> ItemResult:
    if not isinstance(entry, Mapping):
        raise InvalidReceipt(f"{_shown(entry)} is no item: it must be an object with `i` and `ok`")
    position, ok = entry.get("i"), entry.get("ok")
    if type(position) is not int or not 0 <= position < given:
        raise InvalidReceipt(f"item {_shown(position)} was not given: 0 to {given - 1} were")
    if not isinstance(ok, bool):
        raise InvalidReceipt(f"`ok` of item {position} is {_shown(ok)}: true or false is allowed")
    output = None
    if entry.get("output") is not None:
        try:
            output = _ENCODER.encode(entry["output"])
            fits = _size(output) <= MAX_OUTPUT_BYTES or text.written_output() <= MAX_OUTPUT_BYTES
        except RecursionError:
            raise InvalidReceipt(f"the output of item {position} is nested too deep") from None
        except ValueError:  # Python reads NaN and 1e999, and Postgres refuses what it makes of them
            raise InvalidReceipt(
                f"the output of item {position} holds a number that JSON does not have"
            ) from None
        if not fits:
            raise InvalidReceipt(
                f"the output of item {position} is larger than {MAX_OUTPUT_BYTES} bytes: "
                "write it elsewhere and give its output_uri"
            )
        # Postgres keeps neither a NUL nor half of a surrogate pair, also where JSON spells them.
        output = _NUL.sub(r"\1\\ufffd", _SURROGATE.sub("\ufffd", output))
    return ItemResult(
        position,
        ok,
        output,
        _uri(entry.get("output_uri"), position),
        None if ok else _text(entry.get("error")) or "no error told",
    )


def _size(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _uri(value: Any, position: int) -> str | None:
    """Take a URI as it is, or refuse it: half of one leads nowhere."""
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_URI or "\0" in value:
        raise InvalidReceipt(
            f"the output_uri of item {position} is no text of at most {MAX_URI} characters"
        )
    return _SURROGATE.sub("\ufffd", value)


def _text(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = _SURROGATE.sub("\ufffd", text.replace("\0", "\ufffd"))
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _progress(told: Any) -> tuple[int, int] | None:
    if not isinstance(told, Mapping):
        return None
    done, total = told.get("done"), told.get("total")
    most = 2**62
    if type(done) is int and type(total) is int and 0 <= done <= most and 0 <= total <= most:
        return done, total
    return None


def _shown(value: Any) -> str:
    return repr(value)[:80]
