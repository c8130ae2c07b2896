"""Cloud Logging's ListLogEntries over the journal, with the part of its filter language in use.

Understood (vendor: logging/docs/view/logging-query-language): comparisons `field op value` with
`= != : > >= < <=`, joined by AND, OR, NOT, parentheses, line ends or just blanks. Fields:
`logName`, `resource.type`, `resource.labels.*`, `labels.*`, `textPayload`, `timestamp`, `severity`,
`insertId`. Anything else is refused, so that no filter silently matches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, Final

from dispatcher.emulators.cloud_run.journal import JournalEntry
from dispatcher.emulators.cloud_run.messages import ListLogEntriesResponse
from dispatcher.emulators.cloud_run.paging import page
from dispatcher.emulators.cloud_run.refusal import Code, Refused
from dispatcher.emulators.cloud_run.rendering import log_message
from dispatcher.emulators.cloud_run.world import World

__all__ = ["compile_filter", "list_log_entries"]

Test = Callable[[JournalEntry, float], bool]
"""Whether an entry matches, given the skew of the times that are shown."""

TOKEN: Final = re.compile(
    r'\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<op>!=|>=|<=|[=:<>()])|(?P<word>[^\s"=:<>!()]+))'
)
MAX_PAGE: Final = 1_000
"""Entries on a page at most (vendor: ListLogEntriesRequest.page_size), and by default 50."""

DEFAULT_PAGE: Final = 50


def list_log_entries(world: World, request: Any) -> Any:
    """Answer ListLogEntries (vendor: ListLogEntriesRequest)."""
    projects = {name for name in request.resource_names if name.startswith("projects/")}
    if not projects:
        raise Refused(Code.INVALID_ARGUMENT, "resource_names: at least one project is required.")
    if request.order_by not in ("", "timestamp", "timestamp asc", "timestamp desc"):
        raise Refused(
            Code.INVALID_ARGUMENT,
            f"order_by: {request.order_by!r}; allowed: 'timestamp asc', 'timestamp desc'.",
        )
    matches = compile_filter(request.filter)
    skew = world.faults.skew()
    found = sorted(
        (
            entry
            for entry in world.journal.entries()
            if f"projects/{entry.project}" in projects and matches(entry, skew)
        ),
        key=lambda entry: (entry.at, entry.order),
    )
    # Its place in the order of time; a page of a growing journal may so repeat a late line.
    places = [(number, partial(log_message, entry, skew)) for number, entry in enumerate(found)]
    newest_first = request.order_by.endswith("desc")
    entries, token = page(
        reversed(places) if newest_first else places,
        size=request.page_size or DEFAULT_PAGE,
        token=request.page_token,
        limit=MAX_PAGE,
        newest_first=newest_first,
    )
    return ListLogEntriesResponse(entries=entries, next_page_token=token)


def compile_filter(text: str) -> Test:
    """Make a test of a filter.

    Raises:
        Refused: the filter cannot be read.
    """
    tokens = _tokens(text)
    if not tokens:
        return lambda _entry, _skew: True
    parser = _Parser(tokens)
    test = parser.any_of()
    if parser.tokens:
        raise _unreadable(f"unexpected {parser.tokens[0][1]!r}")
    return test


def _unreadable(why: str) -> Refused:
    """Tell that a filter is no filter (vendor: logging/view/logging-query-language)."""
    return Refused(Code.INVALID_ARGUMENT, f"Unparseable filter: {why}.")


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    place = 0
    text = text.rstrip()
    while place < len(text):
        match = TOKEN.match(text, place)
        if match is None:
            raise _unreadable(f"syntax error at {text[place : place + 20]!r}")
        place = match.end()
        kind = str(match.lastgroup)
        word = match[kind]
        if kind == "string":
            word = re.sub(r"\\(.)", r"\1", word[1:-1])
        tokens.append((kind, word))
    return tokens


class _Parser:
    """Recursive descent; in this language OR binds tighter than AND."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens = tokens

    def _next_is(self, kind: str, word: str) -> bool:
        return bool(self.tokens) and self.tokens[0] == (kind, word)

    def any_of(self) -> Test:
        """Read terms that must all hold, to the end or to a closing parenthesis."""
        tests = [self._either()]
        while self.tokens and not self._next_is("op", ")"):
            if self._next_is("word", "AND"):
                self.tokens.pop(0)
            tests.append(self._either())
        return lambda entry, skew: all(test(entry, skew) for test in tests)

    def _either(self) -> Test:
        tests = [self._one()]
        while self._next_is("word", "OR"):
            self.tokens.pop(0)
            tests.append(self._one())
        return lambda entry, skew: any(test(entry, skew) for test in tests)

    def _one(self) -> Test:
        if self._next_is("word", "NOT"):
            self.tokens.pop(0)
            inner = self._one()
            return lambda entry, skew: not inner(entry, skew)
        if self._next_is("op", "("):
            self.tokens.pop(0)
            test = self.any_of()
            self._take("op", ")")
            return test
        return self._comparison()

    def _take(self, kind: str, word: str | None = None) -> str:
        if not self.tokens:
            raise _unreadable("it ends too early")
        found, text = self.tokens.pop(0)
        if found != kind or (word is not None and text != word):
            raise _unreadable(f"unexpected {text!r}")
        return text

    def _comparison(self) -> Test:
        field = self._take("word")
        # labels."run.googleapis.com/execution_name" comes as two tokens.
        if field.endswith(".") and self.tokens and self.tokens[0][0] == "string":
            field += self._take("string")
        operator = self._take("op")
        if not self.tokens or self.tokens[0][0] not in ("word", "string"):
            raise _unreadable(f"{field} is compared with nothing")
        value = self.tokens.pop(0)[1]
        # An unquoted time has colons in it.
        while field == "timestamp" and self._next_is("op", ":"):
            value += self.tokens.pop(0)[1] + self._take("word")
        if field == "timestamp":
            return _time_test(operator, value)
        return _text_test(_reader(field), operator, value)


def _reader(field: str) -> Callable[[JournalEntry], str | None]:
    if field.startswith("labels."):
        return lambda entry: entry.labels.get(field.removeprefix("labels."))
    if field.startswith("resource.labels."):
        return lambda entry: entry.resource_labels.get(field.removeprefix("resource.labels."))
    readers: dict[str, Callable[[JournalEntry], str | None]] = {
        "logName": lambda entry: entry.log_name,
        "resource.type": lambda _: "cloud_run_job",
        "textPayload": lambda entry: entry.line.text,
        "severity": lambda _: "DEFAULT",
        "insertId": lambda entry: f"{entry.order:012x}",
    }
    if field not in readers:
        raise _unreadable(f"the field {field} is not supported here")
    return readers[field]


def _text_test(read: Callable[[JournalEntry], str | None], operator: str, value: str) -> Test:
    if operator == "=":
        return lambda entry, _: read(entry) == value
    if operator == "!=":
        return lambda entry, _: read(entry) != value
    if operator == ":":
        return lambda entry, _: value.lower() in (read(entry) or "").lower()
    if operator == ">=" and value == "DEFAULT":
        return lambda _entry, _skew: True
    raise _unreadable(f"{operator} is not supported for this field")


def _time_test(operator: str, value: str) -> Test:
    try:
        moment = datetime.fromisoformat(value).timestamp()
    except ValueError as error:
        raise _unreadable(f"{value!r} is not a time") from error
    tests: dict[str, Test] = {
        "=": lambda entry, skew: entry.at + skew == moment,
        ">=": lambda entry, skew: entry.at + skew >= moment,
        ">": lambda entry, skew: entry.at + skew > moment,
        "<=": lambda entry, skew: entry.at + skew <= moment,
        "<": lambda entry, skew: entry.at + skew < moment,
    }
    if operator not in tests:
        raise _unreadable(f"{operator} is not supported for times")
    return tests[operator]
