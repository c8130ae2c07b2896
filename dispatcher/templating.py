"""The templates in a job's `args` and in the values of its `env`. Pure: no I/O.

`{items:csv}` and its like are filled when a chunk is launched; `{{` and `}}` stand for literal
braces. `job.py` checks templates when a job is loaded; whoever renders brings the `Values`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from typing import Any, Final

from dispatcher.errors import InvalidInput

__all__ = [
    "RULES",
    "Values",
    "check_template",
    "is_plain",
    "params_used",
    "render",
    "uses_chunk",
    "uses_pack",
]

_PLAIN: Final = (
    "{items:csv}",
    "{items:json}",
    "{items:lines}",
    "{pack:csv}",
    "{pack:json}",
    "{pack:lines}",
    "{chunk.index}",
    "{attempt}",
    "{batch.id}",
)
_PACK: Final = frozenset({"{pack:csv}", "{pack:json}", "{pack:lines}"})
_CHUNK: Final = frozenset(_PLAIN) - {"{batch.id}"} - _PACK
_PARAM: Final = "{param:"

RULES: Final = (
    f"allowed: {', '.join((*_PLAIN, '{param:NAME}'))}; "
    'write a literal brace twice, as in {{"a": 1}}'
)
"""What may stand in braces, for messages."""

# A doubled brace first, so that "{{{attempt}}}" is a template between literal braces.
_TOKEN: Final = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]")

# As many as the args and env values of a good number of jobs; a template is parsed for each chunk.
_CACHED: Final = 2048


class _Number(str):
    """A number of the items with the digits that the caller wrote: 1.10 stays 1.10."""

    __slots__ = ()


@dataclass(frozen=True)
class Values:
    """What the templates of one attempt are filled with."""

    items: str
    """The chunk's items: one JSON array, as text."""

    params: Mapping[str, Any]
    chunk_index: int
    attempt: int
    """The attempt's number, from 1."""

    batch_id: str
    pack: str | None = None
    """The items of all tasks of the execution, in their order, where a template asks for them."""

    @cached_property
    def parsed_pack(self) -> tuple[Any, ...]:
        """The items of the execution as Python values.

        Raises:
            InvalidInput: the text is no JSON array.
        """
        return _parsed_array(self.items if self.pack is None else self.pack)

    @cached_property
    def parsed_items(self) -> tuple[Any, ...]:
        """The items as Python values, parsed at first use and then kept.

        Raises:
            InvalidInput: the text is no JSON array.
        """
        return _parsed_array(self.items)


def check_template(text: str, *, param_names: frozenset[str] | None) -> None:
    """Refuse a text with a template that does not exist.

    Args:
        text: one of the args, or the value of an env variable.
        param_names: the params that `{param:NAME}` may name; None if any name will do.

    Raises:
        InvalidInput: an unknown template, an unknown param, or a single brace.
    """
    for name in sorted(params_used(text)):
        if param_names is not None and name not in param_names:
            raise InvalidInput(
                f"{_PARAM}{name}}} names no param of this job; {_known(param_names)}"
            )


def uses_chunk(text: str) -> bool:
    """Whether the text differs from chunk to chunk: it uses items, the chunk or the attempt.

    Raises:
        InvalidInput: as `check_template`.
    """
    return any(kind in _CHUNK for _, kind in _parsed(text))


def uses_pack(text: str) -> bool:
    """Whether the text holds the items of all tasks of its execution.

    Raises:
        InvalidInput: as `check_template`.
    """
    return any(kind in _PACK for _, kind in _parsed(text))


def params_used(text: str) -> frozenset[str]:
    """Name the params that the text needs.

    Raises:
        InvalidInput: as `check_template`.
    """
    return frozenset(_param(kind) for _, kind in _parsed(text) if kind.startswith(_PARAM))


def render(text: str, values: Values) -> str:
    """Fill the templates of a text.

    Raises:
        InvalidInput: as `check_template`; or a param is not given; or an item has no such form.
    """
    return "".join(
        literal + (_filled(kind, values) if kind else "") for literal, kind in _parsed(text)
    )


def is_plain(text: str) -> bool:
    """Whether a program can be given this text: no NUL, and nothing that UTF-8 cannot write."""
    try:
        return b"\x00" not in text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False


def _parsed_array(text: str) -> tuple[Any, ...]:
    try:
        parsed = json.loads(text, parse_float=_Number)
    except ValueError as error:
        raise InvalidInput(f"the chunk's items are not JSON: {error}") from error
    if not isinstance(parsed, list):
        raise InvalidInput(f"the chunk's items must be a JSON array, not {_cut(text)}")
    return tuple(parsed)


@lru_cache(maxsize=_CACHED)
def _parsed(text: str) -> tuple[tuple[str, str], ...]:
    """Split a text into pairs of a literal and the template after it ("" for none)."""
    pieces: list[tuple[str, str]] = []
    end = 0
    for token in _TOKEN.finditer(text):
        literal, found, end = text[end : token.start()], token.group(), token.end()
        if found in {"{{", "}}"}:
            pieces.append((literal + found[0], ""))
        elif found in _PLAIN or (found.startswith(_PARAM) and _param(found)):
            pieces.append((literal, found))
        else:
            raise InvalidInput(_refusal(found, text))
    return (*pieces, (text[end:], ""))


def _param(template: str) -> str:
    return template.removeprefix(_PARAM).removesuffix("}")


def _refusal(found: str, text: str) -> str:
    if found in {"{", "}"}:
        return f"the single {found} in {_cut(text)} is no template; {RULES}"
    close = get_close_matches(found, _PLAIN, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{_cut(found)} is no template{hint}; {RULES}"


def _known(names: frozenset[str]) -> str:
    if not names:
        return "it has none: declare it in the job's `params`, a JSON schema"
    return f"allowed: {', '.join(sorted(names))}; mend it here or in the job's `params`"


def _filled(kind: str, values: Values) -> str:
    if kind in {"{items:csv}", "{pack:csv}"}:
        return _csv(_texts(_items(kind, values), kind))
    if kind in {"{items:lines}", "{pack:lines}"}:
        return "\n".join(_line(text) for text in _texts(_items(kind, values), kind))
    if kind.startswith(_PARAM):
        return _given(_param(kind), values.params)
    return {
        "{items:json}": values.items,
        "{pack:json}": values.items if values.pack is None else values.pack,
        "{chunk.index}": str(values.chunk_index),
        "{attempt}": str(values.attempt),
        "{batch.id}": values.batch_id,
    }[kind]


def _items(kind: str, values: Values) -> tuple[Any, ...]:
    return values.parsed_pack if kind in _PACK else values.parsed_items


def _given(name: str, params: Mapping[str, Any]) -> str:
    if name not in params:
        raise InvalidInput(
            f"{_PARAM}{name}}} is used but the param {name!r} is not given; "
            f"given: {', '.join(sorted(params)) or 'none'}"
        )
    value = params[name]
    return value if isinstance(value, str) else _json(value)


def _texts(items: Iterable[Any], template: str) -> list[str]:
    return [_text(position, item, template) for position, item in enumerate(items)]


def _text(position: int, item: Any, template: str) -> str:
    if isinstance(item, str):
        if not is_plain(item):
            raise InvalidInput(
                f"{template} cannot hold item {position} of the chunk, {_cut(_json(item))}: it has "
                "a character that no argument can carry; use {items:json}"
            )
        return item
    if isinstance(item, int):  # a bool too, which JSON writes as true and false
        return _json(item)
    raise InvalidInput(
        f"{template} takes text, numbers, true and false; item {position} of the chunk is "
        f"{_cut(_json(item))}; use {{items:json}}"
    )


def _csv(texts: list[str]) -> str:
    # One empty item must not look like no items; elsewhere an empty field is plain CSV.
    return '""' if texts == [""] else ",".join(_csv_field(text) for text in texts)


def _csv_field(text: str) -> str:
    if any(mark in text for mark in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def _line(text: str) -> str:
    if "\n" in text or "\r" in text:
        raise InvalidInput(
            f"{{items:lines}} cannot hold an item of several lines, {_cut(_json(text))}; "
            "use {items:json}"
        )
    return text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _cut(text: str, at: int = 60) -> str:
    return text if len(text) <= at else f"{text[: at - 1]}…"
