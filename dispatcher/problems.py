"""How a wrong value is told to people: which field, what it is, what it must be.

One wording for settings, the jobs file and params. Validators raise `ValueError("must …")`;
`problems_of` turns what pydantic collected into lines of `path is value; it must …`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Final, Literal, TypeAlias, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dispatcher.redaction import MASK, is_secret_name, redact

__all__ = ["Path", "Problem", "Problems", "choices", "problems_of", "shown", "unknown_key"]

Path: TypeAlias = tuple[str | int, ...]

_LONGEST: Final = 100

# Pydantic speaks to programmers; the reader of these lines wrote YAML or set a variable.
_WORDING: Final = (
    ("Input should be a valid dictionary or instance of ", "must be a mapping of "),
    ("Input should be a valid dictionary", "must be a mapping"),
    ("Input should be a valid tuple", "must be a list"),
    ("Input should be a valid list", "must be a list"),
    ("Input should be a valid integer, unable to parse string as an integer", "must be an integer"),
    ("Input should be a valid number, unable to parse string as a number", "must be a number"),
    ("Input should be a valid integer", "must be an integer"),
    ("Input should be a valid number", "must be a number"),
    ("Input should be a valid string", "must be text"),
    ("Input should be a valid boolean, unable to interpret input", "must be true or false"),
    ("Input should be a valid boolean", "must be true or false"),
    ("Keys should be strings", "must be text"),
    ("Value error, ", ""),
    ("greater than or equal to", "at least"),
    ("less than or equal to", "at most"),
)

_SHOULD: Final = re.compile(r"^\w+ should ")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: `path` names the field, `text` goes on after it."""

    path: Path
    text: str
    unsaid: str | None = None
    """What `problems_of` says in place of `text` where the field's name looks secret."""

    def __str__(self) -> str:
        """Write the path with dots and go on with the text."""
        return f"{'.'.join(map(str, self.path))} {self.text}".lstrip()

    def under(self, *prefix: str | int) -> Problem:
        """Place the same problem deeper: its path gets a prefix."""
        return Problem((*prefix, *self.path), self.text, self.unsaid)


class Problems(ValueError):
    """Several things wrong at once, raised by one validator and unfolded by `problems_of`."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = tuple(problems)


def shown(value: Any, path: Path = ()) -> str:
    """Write a value as JSON for a message: short, on one line, without its secrets."""
    if value and _is_secret(path):
        return MASK
    try:
        value = redact(value)
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # no JSON, such as a date that YAML made
        text = repr(value)
    except RecursionError:  # it holds itself
        text = f"a {type(value).__name__} nested too deep to show"
    # Half of a surrogate pair would break whatever prints or stores the message.
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def choices(wanted: object, allowed: Iterable[str]) -> str:
    """List what is allowed, with a guess at what was meant."""
    names = sorted(allowed)
    close = get_close_matches(str(wanted), names, n=1)
    return (", ".join(names) or "none") + (f' (did you mean "{close[0]}"?)' if close else "")


def unknown_key(path: Path, allowed: Iterable[str]) -> Problem:
    """Say that the last part of a path is a key that nobody knows."""
    return Problem(path, f"is not a known key; allowed: {choices(path[-1], allowed)}")


def problems_of(
    error: ValidationError, model: type[BaseModel], *, also: Iterable[str] = ()
) -> list[Problem]:
    """Word everything that pydantic found wrong with a value.

    Args:
        error: what pydantic raised.
        model: the model that refused, to name the keys that it allows.
        also: keys that are allowed beside the model's own at its top level.
    """
    found: list[Problem] = []
    choice: Path | None = None
    for detail in error.errors(include_url=False):
        path = tuple(part for part in detail["loc"] if part != "[key]")
        if _is_choice(model, path[:-1]):
            # Pydantic tells of each type that it tried, under a name that nobody wrote.
            path = path[:-1]
            if path == choice:
                wanted = _wanted(detail).removeprefix("must be ")
                found[-1] = Problem(path, f"{found[-1].text}, or {wanted}")
                continue
            choice = path
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, Problems):
            found.extend(_said(problem.under(*path)) for problem in cause.problems)
        elif detail["type"] == "extra_forbidden":
            names = (*_keys_at(model, path[:-1]), *(also if len(path) == 1 else ()))
            found.append(unknown_key(path, names))
        else:
            found.append(Problem(path, _text(detail, path)))
    return found


def _said(problem: Problem) -> Problem:
    if problem.unsaid is None or not _is_secret(problem.path):
        return problem
    return Problem(problem.path, problem.unsaid)


def _is_secret(path: Path) -> bool:
    return bool(path) and is_secret_name(str(path[-1]))


def _text(detail: ErrorDetails, path: Path) -> str:
    if detail["type"] == "missing":
        return "is missing; it is required"
    text = _wanted(detail)
    if detail["type"] == "string_type" and isinstance(detail["input"], int | float):
        text += ": put it in quotes"
    return f"is {shown(detail['input'], path)}; it {text}"


def _wanted(detail: ErrorDetails) -> str:
    text = detail["msg"]
    for theirs, ours in _WORDING:
        text = text.replace(theirs, ours)
    return _SHOULD.sub("must ", text)


def _is_choice(model: type[BaseModel], path: Path) -> bool:
    """Whether the field at this path may be of one of several plain types, such as bool or text."""
    if not path:
        return False
    for part in path[:-1]:
        field = model.model_fields.get(str(part))
        if field is not None:
            model = next(_models_in(field.annotation), model)
    field = model.model_fields.get(str(path[-1]))
    if field is None or get_origin(field.annotation) not in {Union, UnionType}:
        return False
    kinds = [
        get_origin(kind) or kind for kind in get_args(field.annotation) if kind is not NoneType
    ]
    return len(kinds) > 1 and all(kind in {bool, int, float, str, Literal} for kind in kinds)


def _keys_at(model: type[BaseModel], path: Path) -> Iterator[str]:
    """Yield the keys that the model at this path allows, itself or one nested in it."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is not None:  # else an index or a mapping's key: still within the last field
            model = next(_models_in(field.annotation), model)
    for name, field in model.model_fields.items():
        yield field.alias or name


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
