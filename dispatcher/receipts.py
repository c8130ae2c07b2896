"""Receipts: what a task wrote of how each of its items ended. Pure.

`docs/container.md` is the protocol. What a container writes is not trusted: a receipt is read up to
a size, must be of this very execution and task, and may tell of items that the task was given and
of no others; anything else is refused as a whole, with a reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from dispatcher.states import Outcome

__all__ = [
    "MAX_RECEIPT_BYTES",
    "PROGRESS",
    "STORAGE_PATIENCE",
    "Expected",
    "InvalidReceipt",
    "ItemResult",
    "Receipt",
    "halves",
    "open_positions",
    "progress_name",
    "read_receipt",
    "receipt_name",
    "weigh",
]

STORAGE_PATIENCE: Final = timedelta(minutes=15)
"""How long the end of a task waits for a storage that does not answer."""

MAX_RECEIPT_BYTES: Final = 16 << 20
"""A larger receipt is refused unread; the helper writes none."""

GONE: Final = frozenset({Outcome.LOST, Outcome.PREEMPTED})
"""Outcomes that say how the container went, and not how its work did: a complete receipt does."""

MAX_OUTPUT_BYTES: Final = 4096
MAX_TEXT: Final = 1000
MAX_URI: Final = 8000
PROGRESS: Final = ".progress.json"
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
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


def read_receipt(data: bytes, expected: Expected, uri: str | None = None) -> Receipt:
    """Read a receipt.

    Raises:
        InvalidReceipt: it is no JSON, of another version, execution, task or attempt, or tells of
            items that the task was not given, or of one twice.
    """
    told = _told(data, expected)
    complete, entries = told.get("complete"), told.get("items")
    if not isinstance(complete, bool) or not isinstance(entries, list):
        raise InvalidReceipt("`complete` must be true or false, and `items` a list")
    if len(entries) > expected.items:
        raise InvalidReceipt(f"it tells of {len(entries)} items; {expected.items} were given")
    items = tuple(_item(entry, expected.items) for entry in entries)
    if len({item.position for item in items}) != len(items):
        raise InvalidReceipt("it tells of one item twice")
    if complete and len(items) != expected.items:
        raise InvalidReceipt(
            f"it is said to be complete and tells of {len(items)} of {expected.items} items"
        )
    return Receipt(complete, items, _progress(told.get("progress")), uri)


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


def _told(data: bytes, expected: Expected) -> dict[str, Any]:
    """Parse what was written, and see that it is of this task."""
    try:
        told = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidReceipt(f"it is no JSON: {str(error)[:200]}", foreign=True) from None
    if not isinstance(told, dict) or not told.keys() >= {"version", "complete"}:
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
    return told


def _item(entry: Any, given: int) -> ItemResult:
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
            output = json.dumps(
                entry["output"], ensure_ascii=False, allow_nan=False, separators=(",", ":")
            )
        except RecursionError:
            raise InvalidReceipt(f"the output of item {position} is nested too deep") from None
        except ValueError:  # Python reads NaN and 1e999, and Postgres refuses what it makes of them
            raise InvalidReceipt(
                f"the output of item {position} holds a number that JSON does not have"
            ) from None
        if len(output.encode(errors="surrogatepass")) > MAX_OUTPUT_BYTES:
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
