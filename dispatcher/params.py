"""JSON values that a job holds, and the params of a batch checked against their JSON schema.

`job.py` says which values these are; the wording of what is wrong is that of `problems.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import jsonschema
import referencing
import referencing.exceptions
from jsonschema.validators import validator_for

from dispatcher.problems import Path, Problem, Problems, choices, shown
from dispatcher.templating import is_plain

__all__ = ["check_schema", "copy_json", "defaults", "schema_problems"]

_DEEPEST: Final = 100


def copy_json(value: Any, path: Path = ()) -> Any:
    """Copy a value that JSON and Postgres give back unchanged; refuse any other.

    Raises:
        Problems: with the path within the value.
    """
    if len(path) > _DEEPEST:
        raise Problems([Problem((), f"is nested too deep; it must be at most {_DEEPEST} levels")])
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str):
        if not is_plain(value):
            must = "it must have no NUL character and no half of a surrogate pair"
            raise Problems([Problem(path, f"is {shown(value, path)}; {must}")])
        return value
    if isinstance(value, list | tuple):
        return [copy_json(inner, (*path, index)) for index, inner in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {
            copy_json(key, path): copy_json(inner, (*path, key)) for key, inner in value.items()
        }
    must = "it must be JSON: text, a finite number, true, false, null, a list or a mapping of text"
    raise Problems([Problem(path, f"is {shown(value, path)}; {must}")])


def check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse what is no JSON schema, or one that describes anything but a mapping.

    Raises:
        Problems: with the path within the schema.
    """
    try:
        validator_for(schema, default=jsonschema.Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        path = tuple(error.absolute_path)
        # A type that does not exist fails an "any of"; the list of types is what helps.
        plain = next((inner for inner in error.context or () if inner.validator == "enum"), error)
        raise Problems([Problem(path, f"is no JSON schema: {plain.message}")]) from error
    if schema.get("type", "object") != "object":
        must = 'it must be "object", as params are given by name'
        raise Problems([Problem(("type",), f"is {shown(schema['type'])}; {must}")])
    return schema


def defaults(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the defaults of the schema's own `properties`."""
    return {
        name: copy_json(inner["default"])
        for name, inner in schema.get("properties", {}).items()
        if isinstance(inner, dict) and "default" in inner
    }


def schema_problems(schema: dict[str, Any], params: dict[str, Any]) -> list[Problem]:
    """Say all that is wrong with params, each with its path within them."""
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    # An empty registry: a schema that points elsewhere is refused, never fetched.
    validator = kind(schema, format_checker=kind.FORMAT_CHECKER, registry=referencing.Registry())
    try:
        return [
            problem
            for error in sorted(validator.iter_errors(params), key=lambda e: list(map(str, e.path)))
            for problem in _schema_problem(error)
        ]
    except referencing.exceptions.Unresolvable as error:
        return [Problem((), f"cannot be checked: the schema's $ref {error.ref!r} leads nowhere")]


def _schema_problem(error: jsonschema.ValidationError) -> Iterator[Problem]:
    path = tuple(error.absolute_path)
    value: Any = error.instance
    wanted: Any = error.validator_value
    schema: Any = error.schema
    match error.validator:
        case "required":
            # One error for each missing name; the message alone says which.
            yield from (
                Problem((*path, name), "is missing; it is required")
                for name in wanted
                if name not in value and error.message.startswith(repr(name))
            )
        case "additionalProperties" if wanted is False:
            known = schema.get("properties", {})
            patterns = schema.get("patternProperties", {})
            for name in value:
                if name not in known and not any(re.search(p, name) for p in patterns):
                    text = f"is not a param of this job; allowed: {choices(name, known)}"
                    yield Problem((*path, name), text)
        case "type":
            types = wanted if isinstance(wanted, str) else " or ".join(wanted)
            yield Problem(path, f"is {shown(value, path)}; it must be of type {types}")
        case "enum":
            allowed = ", ".join(map(shown, wanted))
            yield Problem(path, f"is {shown(value, path)}; it must be one of {allowed}")
        case _:
            rule = f"{error.validator}: {shown(wanted)}"
            yield Problem(path, f"is {shown(value, path)}; it must fit {rule}")
