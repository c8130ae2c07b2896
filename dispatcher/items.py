"""Items as they travel: the JSON text of each, checked once, never taken apart again.

This module reads what the caller of `enqueue` gives (values, a local file, a stream), refuses what
is not usable with a message that says where it stands, and joins texts into pages and chunks.
Objects in storage are opened by `storage.py` and item sources are run by `item_source.py`; both
give the same `ItemStream`. How items become chunks is decided in `planning.py`.

Everything streams. Memory is bounded by a block of lines, a page and the largest item allowed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import reprlib
import zlib
from collections.abc import AsyncIterable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from stat import S_ISDIR
from types import TracebackType
from typing import BinaryIO, Final, Literal, NoReturn, Self, TypeAlias

from pydantic_core import from_json

from dispatcher.errors import InvalidItems

__all__ = [
    "EXTENSIONS",
    "MAX_ITEM_BYTES",
    "Format",
    "ItemStream",
    "ItemsDigest",
    "Page",
    "encode_items",
    "format_of",
    "is_uri",
    "join_items",
    "open_items",
    "pages",
    "parse",
    "refuse_non_items",
    "split_items",
    "stream_items",
]

MAX_ITEM_BYTES: Final = 1 << 20
"""The largest item, as UTF-8 JSON. What is larger belongs in storage, with its name as the item."""

Format: TypeAlias = Literal["jsonl", "csv", "lines"]

EXTENSIONS: Final[Mapping[str, Format]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".txt": "lines",
    ".lines": "lines",
}
"""What a file is by the end of its name; `.gz` may follow."""

_BLOCK_BYTES: Final = 1 << 18
_BLOCK_ITEMS: Final = 1000
_SEPARATOR: Final = ",\n"


def join_items(texts: Iterable[str]) -> str:
    """Join the JSON texts of items into the text of one JSON array.

    No text holds a raw newline (`ItemStream` sees to it), so `split_items` can undo this exactly.
    """
    return f"[{_SEPARATOR.join(texts)}]"


def split_items(text: str) -> list[str]:
    """Give back the very texts that `join_items` joined: key order, spacing and digits are kept."""
    return text[1:-1].split(_SEPARATOR) if len(text) > len("[]") else []


class ItemStream(Iterable[str]):
    """The JSON text of each item, in order, once. Closing it frees what it reads from.

    Iterating raises `InvalidItems` at the first item that cannot be used.
    """

    def __init__(self, name: str, blocks: Generator[list[str], None, None]) -> None:
        self.name: Final = name
        """What is read, as messages call it."""
        self._blocks = blocks

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._blocks)

    def close(self) -> None:
        """Stop reading and free the file or process behind. May be repeated."""
        self._blocks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Page:
    """Some items of a stream, as one row."""

    json: str
    """The text of one JSON array; `split_items` gives the items back."""

    count: int


def pages(items: Iterable[str], max_items: int = 1000, max_bytes: int = 1 << 20) -> Iterator[Page]:
    """Cut a stream of items into pages of at most `max_items` items and `max_bytes` of UTF-8.

    An item larger than `max_bytes` gets a page of its own. No page is empty.
    """
    page: list[str] = []
    size = 0
    for text in items:
        added = _utf8_length(text) + len(_SEPARATOR)
        if page and (len(page) == max_items or size + added > max_bytes):
            yield Page(join_items(page), len(page))
            page = []
            size = 0
        page.append(text)
        size += added
    if page:
        yield Page(join_items(page), len(page))


class ItemsDigest:
    """SHA-256 over the texts of items: the same items in the same order, however they are paged.

    It compares texts, not values: `{"a":1}` and `{"a": 1}` differ.
    """

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self.count = 0

    def update(self, page: Page) -> None:
        """Add the items of the next page."""
        self._sha.update(page.json[1:-1].encode())
        self._sha.update(_SEPARATOR.encode())
        self.count += page.count

    def hexdigest(self) -> str:
        """The digest of all items so far."""
        return self._sha.hexdigest()


def is_uri(text: str) -> bool:
    """Whether this names an object in storage, read when the batch is planned, and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def format_of(name: str) -> Format:
    """Say by its name what a file holds.

    Raises:
        InvalidItems: the name ends in nothing that is known.
    """
    stem = name.removesuffix(".gz")
    for extension, kind in EXTENSIONS.items():
        if stem.lower().endswith(extension):
            return kind
    allowed = ", ".join(EXTENSIONS)
    hint = ""
    if stem.lower().endswith(".json"):
        hint = "; a JSON array becomes JSONL with `jq -c '.[]'`"
    raise InvalidItems(
        f"{name!r} does not say what it holds: a file of items ends in one of {allowed}, "
        f"and .gz may follow{hint}"
    )


def open_items(items: object, *, base: Path | None = None) -> ItemStream:
    """Open what the caller of `enqueue` gave as items: an iterable of JSON values, or a local path.

    Args:
        items: a list or other ordered iterable; the path of a `.jsonl`, `.csv` or `.txt` file; or
            a stream that is open already.
        base: what a relative path is relative to; the working directory if None.

    Raises:
        InvalidItems: it is neither; or the file is missing, unreadable or of an unknown kind.
            What is wrong with a single item is raised when the stream comes to it.
    """
    if isinstance(items, ItemStream):
        return items
    if isinstance(items, (str, os.PathLike)):
        return _open_file(os.fspath(items), base)
    values = refuse_non_items(items, "items")
    return ItemStream("items", _in_blocks(encode_items(values)))


def stream_items(stream: BinaryIO, kind: Format, name: str = "standard input") -> ItemStream:
    """Read items from a binary stream that is already open, and stays so, such as stdin."""
    return ItemStream(name, parse(iter(lambda: stream.read(_BLOCK_BYTES), b""), kind, name))


def parse(
    blocks: Iterable[bytes], kind: Format, name: str, *, gzipped: bool = False
) -> Generator[list[str], None, None]:
    """Turn the bytes of a file, in blocks of any size, into lists of JSON texts of items.

    A byte order mark and blank lines are passed over. JSONL lines keep their spelling; a row of CSV
    becomes an object of strings under the names of the header; other lines become strings.

    Raises:
        InvalidItems: naming the file and line; also if there is no item in the whole file.
    """
    if gzipped:
        blocks = _gunzip(blocks, name)
    lines = _lines(blocks, name)
    if kind == "jsonl":
        texts = _jsonl(lines, name)
    elif kind == "csv":
        texts = _in_blocks(_csv(lines, name))
    else:
        texts = _in_blocks(_strings(lines, name))
    empty = True
    for block in texts:
        if block:
            empty = False
            yield block
    if empty:
        raise InvalidItems(
            f"{name} has no items"
            + (" after its header line" if kind == "csv" else "")
            + "; a batch of none can be enqueued from Python only, with an empty list"
        )


def encode_items(values: Iterable[object]) -> Iterator[str]:
    """Give the compact JSON text of each value.

    Raises:
        InvalidItems: naming the position (from 0), type and value of one that is not JSON.
    """
    for position, value in enumerate(values):
        try:
            yield _encode(value)
        except _Unusable as problem:
            raise InvalidItems(f"item {position} {problem}") from None


def refuse_non_items(given: object, said: str) -> Iterable[object]:
    """Return `given` if it is an ordered iterable of items, and not one item by mistake.

    Args:
        given: anything.
        said: how messages call it: "items", "the value that m:f returned".

    Raises:
        InvalidItems: saying what to give instead.
    """
    if isinstance(given, (str, bytes, bytearray, memoryview)):
        instead = "put a single item into a list: [value]"
    elif isinstance(given, Mapping):
        instead = "put a single item into a list: [value], or give its values or items()"
    elif isinstance(given, (set, frozenset)):
        instead = "a set has no order, so a repeated request would differ: give sorted(...)"
    elif isinstance(given, io.IOBase):
        instead = "give the path of the file"
    elif isinstance(given, AsyncIterable) or hasattr(given, "__await__"):
        instead = "async code is not awaited here: give a list or a plain generator"
    elif isinstance(given, Iterable):
        return given
    else:
        instead = "give a list or another iterable of JSON values"
    raise InvalidItems(
        f"{said} must be a list or another ordered iterable of JSON values, not a "
        f"{_type_name(given)}: {_short(given)}; {instead}"
    )


class _Unusable(Exception):
    """Why a value cannot be an item; the text goes on after the item's place."""


def _refuse(value: object) -> NoReturn:
    raise _NotJson(value)


class _NotJson(Exception):
    """The encoder met this value, in the item or as the item."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value


_encode_json: Final = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_refuse
).encode


def _encode(value: object) -> str:
    """Give the JSON text of one value, such as every reader of it will accept."""
    try:
        text = _encode_json(value)
        # Python writes what others cannot read: lone surrogates, values nested hundreds deep.
        from_json(text, allow_inf_nan=False)
    except _NotJson as problem:
        holds = "is" if problem.value is value else "holds"
        raise _Unusable(
            f"{holds} a {_type_name(problem.value)}, which is not a JSON value: "
            f"{_short(problem.value)}"
        ) from None
    except (ValueError, TypeError, RecursionError) as error:
        reason = str(error)
        if isinstance(value, str) or "Expected bytes" in reason:
            reason = "it has half of a surrogate pair, which is not Unicode text"
        raise _Unusable(
            f"is a {_type_name(value)} that cannot be written as JSON: {_short(value)} ({reason})"
        ) from None
    size = _utf8_length(text)
    if size > MAX_ITEM_BYTES:
        raise _Unusable(
            f"is {size:,} bytes as JSON and an item may have {MAX_ITEM_BYTES:,}: "
            "put the data into storage and let the item name it"
        )
    return text


def _in_blocks(texts: Iterable[str]) -> Generator[list[str], None, None]:
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if len(block) >= _BLOCK_ITEMS or size >= _BLOCK_BYTES:
            yield block
            block = []
            size = 0
    yield block


def _open_file(given: str | bytes, base: Path | None) -> ItemStream:
    if isinstance(given, bytes) or is_uri(given):
        raise InvalidItems(f"{given!r} is not the path of a local file")
    path = Path(given) if base is None else base / given
    kind = _format_of_path(given)
    try:
        if S_ISDIR(path.stat().st_mode):
            raise InvalidItems(f"{path} is a directory; give the path of a file of items")
    except OSError as error:
        raise _cannot_read(path, error) from None
    return ItemStream(
        str(path), parse(_file_blocks(path), kind, str(path), gzipped=given.endswith(".gz"))
    )


def _format_of_path(given: str) -> Format:
    """As `format_of`, and knows that a string may be an item given by mistake."""
    try:
        return format_of(given)
    except InvalidItems as error:
        raise InvalidItems(
            f"{error}. To enqueue one string, give a list: [{_short(given)}]"
        ) from None


def _cannot_read(path: Path, error: OSError) -> InvalidItems:
    return InvalidItems(f"cannot read items from {path}: {error.strerror or error}")


def _file_blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                yield block
    except OSError as error:
        raise _cannot_read(path, error) from error


def _gunzip(blocks: Iterable[bytes], name: str) -> Iterator[bytes]:
    """Inflate gzip, member after member, never more than a block at once."""
    inflate = zlib.decompressobj(wbits=31)
    try:
        for block in blocks:
            data = block
            while data:
                if inflate.eof:
                    inflate = zlib.decompressobj(wbits=31)
                if text := inflate.decompress(data, _BLOCK_BYTES):
                    yield text
                data = inflate.unconsumed_tail or inflate.unused_data
        while text := inflate.decompress(b"", _BLOCK_BYTES):
            yield text
    except zlib.error as error:
        raise InvalidItems(f"{name} is not valid gzip, as its name says it is: {error}") from None
    if not inflate.eof:
        raise InvalidItems(f"{name} ends in the middle: its gzip data is cut off")


def _lines(blocks: Iterable[bytes], name: str) -> Iterator[tuple[int, list[str]]]:
    """Cut blocks of bytes into lines without their ends: the number of the first, and all."""
    first = 1
    carry: list[bytes] = []
    carried = 0
    for block in blocks:
        end = block.find(b"\n")
        if carried + (end if end >= 0 else len(block)) > MAX_ITEM_BYTES:
            raise InvalidItems(
                f"{name}:{first} is longer than {MAX_ITEM_BYTES:,} bytes, the limit for an "
                "item: put the data into storage and let the item name it"
            )
        if end < 0:
            carry.append(block)
            carried += len(block)
            continue
        whole, _, tail = block.rpartition(b"\n")
        lines = _decoded(b"".join((*carry, whole)), first, name)
        yield first, lines
        first += len(lines)
        carry = [tail]
        carried = len(tail)
    if carried:
        yield first, _decoded(b"".join(carry), first, name)


def _decoded(data: bytes, first: int, name: str) -> list[str]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        number = first + data.count(b"\n", 0, error.start)
        raise InvalidItems(
            f"{name}:{number} is not UTF-8 text: byte {data[error.start]:#04x} ({error.reason}); "
            "save the file as UTF-8"
        ) from None
    return (text.removeprefix("\ufeff") if first == 1 else text).split("\n")


def _jsonl(blocks: Iterable[tuple[int, list[str]]], name: str) -> Generator[list[str], None, None]:
    for first, lines in blocks:
        texts: list[str] = []
        for number, line in enumerate(lines, first):
            text = line.strip(" \t\r")
            if not text:
                continue
            try:
                from_json(text, allow_inf_nan=False, cache_strings="keys")
            except ValueError as error:
                hint = ""
                if text in {"[", "{"}:
                    hint = (
                        " (is it one JSON value over many lines? `jq -c '.[]'` makes JSONL of it)"
                    )
                # The parser says "line 1" of every line; its column is what helps.
                reason = str(error).replace(" at line 1 column", " at column")
                raise InvalidItems(
                    f"{name}:{number} is not JSON: {reason}; it starts with {_short(text)}. "
                    f"Each line must hold one JSON value{hint}"
                ) from None
            texts.append(text)
        yield texts


def _strings(blocks: Iterable[tuple[int, list[str]]], name: str) -> Iterator[str]:
    for first, lines in blocks:
        for number, line in enumerate(lines, first):
            if line.strip():
                yield _encode_at(line.removesuffix("\r"), name, number)


def _csv(blocks: Iterable[tuple[int, list[str]]], name: str) -> Iterator[str]:
    lines = (f"{line}\n" for _, block in blocks for line in block)
    # Strict, so that a stray quote is an error and not a part of some value.
    rows = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise InvalidItems(f"{name}:{rows.line_num} is not valid CSV: {error}") from None
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = _header(row, f"{name}:{rows.line_num}")
        elif len(row) != len(header):
            raise InvalidItems(
                f"{name}:{rows.line_num} has {len(row)} columns and the header has {len(header)}: "
                f"{_short(row)}"
            )
        else:
            yield _encode_at(dict(zip(header, row, strict=True)), name, rows.line_num)


def _header(row: list[str], place: str) -> list[str]:
    for column, field in enumerate(row, 1):
        if not field.strip():
            raise InvalidItems(f"{place}: column {column} of the header has no name")
        if field in row[: column - 1]:
            raise InvalidItems(f"{place}: the header has {_short(field)} twice; rename one column")
    return row


def _encode_at(value: object, name: str, number: int) -> str:
    try:
        return _encode(value)
    except _Unusable as problem:
        raise InvalidItems(f"{name}:{number} {problem}") from None


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _type_name(value: object) -> str:
    kind = type(value)
    return (
        kind.__qualname__
        if kind.__module__ in {"builtins", "__main__"}
        else f"{kind.__module__}.{kind.__qualname__}"
    )


_repr: Final = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60
_repr.maxlong = 40


def _short(value: object) -> str:
    """Show a value in a message: the start and end of it, on one line."""
    return " ".join(_repr.repr(value).split())
