"""How a YAML file or a Python module becomes a plain mapping of targets and jobs.

Only the form is read here: syntax, keys that are given twice, what a module exports. What the
values mean is `config.py`'s.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ValidationError

from dispatcher.errors import ConfigurationError
from dispatcher.job import Chunking, ItemSource, Job, Limits, RetryPolicy, SuccessPolicy
from dispatcher.problems import problems_of, shown

__all__ = ["Source", "read_source"]

_MODULE: Final = re.compile(
    r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*)(?::(?P<attribute>[^\W\d]\w*))?"
)
_SECTIONS: Final = ("targets", "jobs", "schedules")
_MODELS: Final[dict[str, type[BaseModel]]] = {
    model.__name__: model
    for model in (Chunking, ItemSource, Job, Limits, RetryPolicy, SuccessPolicy)
}


@dataclass(frozen=True, slots=True)
class Source:
    """What a source holds, unchecked."""

    values: Mapping[Any, Any]
    problems: tuple[str, ...] = ()
    """Lines on what is wrong with its form though it could be read: keys given twice."""


def read_source(source: str) -> Source:
    """Read a YAML file, or what a Python module exports.

    Args:
        source: a path, or "module" with attributes `targets` and `jobs`, or "module:attribute" of a
            mapping that has those keys.

    Raises:
        ConfigurationError: there is no such thing, or it cannot be read.
    """
    if Path(source).is_file() or os.sep in source or source.endswith((".yaml", ".yml")):
        return _read_yaml(source)
    match = _MODULE.fullmatch(source)
    if match is None:
        raise ConfigurationError(
            f"{shown(source)} names no jobs; give the path of a YAML file, or "
            '"module" or "module:attribute" of Python'
        )
    return Source(_read_module(source, match["module"], match["attribute"]))


# --- YAML -----------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """The safe loader, which also notes keys that a mapping has twice."""

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self.doubled: list[tuple[yaml.Mark, str]] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Not where values are made: by then `<<` has brought in keys that may be overridden.
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    self.doubled.append((key.start_mark, key.value))
                seen.add(key.value)
        return node


def _read_yaml(source: str) -> Source:
    try:
        loader = _Loader(Path(source).read_bytes())
        try:
            values = loader.get_single_data()
        finally:
            loader.dispose()
    except OSError as error:
        raise ConfigurationError(f"{source}: cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        raise ConfigurationError(_syntax(source, error)) from error
    except (yaml.YAMLError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise ConfigurationError(f"{source}: is no YAML: {text}") from error
    if not isinstance(values, Mapping):
        held = "is empty" if values is None else f"holds {shown(values)}"
        raise ConfigurationError(
            f"{source}: {held}; it must be a mapping with the keys targets and jobs"
        )
    doubled = (
        f'{source}:{_place(mark)}: the key "{key}" is given twice in one mapping; leave one out'
        for mark, key in loader.doubled
    )
    return Source(values, tuple(doubled))


def _syntax(source: str, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    context = f" ({error.context})" if error.context else ""
    return f"{source}:{_place(mark) if mark else ''}: is no YAML: {error.problem}{context}"


def _place(mark: yaml.Mark) -> str:
    return f"{mark.line + 1}:{mark.column + 1}"


# --- Python ---------------------------------------------------------------------------------------


def _read_module(source: str, name: str, attribute: str | None) -> Mapping[Any, Any]:
    with _current_directory_importable():
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise _failed(source, error) from error
            raise ConfigurationError(
                f"{source}: there is no Python module {error.name} here; for a file, "
                "give a path that ends in .yaml"
            ) from error
        except Exception as error:
            raise _failed(source, error) from error
    if attribute is None:
        return _sections(source, module)
    try:
        held = getattr(module, attribute)
    except AttributeError:
        raise ConfigurationError(f"{source}: the module {name} has no {attribute}") from None
    return held if isinstance(held, Mapping) else _sections(source, held)


def _sections(source: str, held: object) -> Mapping[Any, Any]:
    found = {name: getattr(held, name) for name in _SECTIONS if hasattr(held, name)}
    if not found:
        raise ConfigurationError(f"{source}: has neither targets nor jobs; it must have both")
    return found


def _failed(source: str, error: Exception) -> ConfigurationError:
    """Word what a module raised while it was imported, with the line that did."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not {"pydantic", "importlib"} & set(Path(f.filename).parts)]
    place = f"{source}: {Path(theirs[-1].filename).name}:{theirs[-1].lineno}"
    model = _MODELS.get(error.title) if isinstance(error, ValidationError) else None
    if isinstance(error, ValidationError) and model is not None:
        lines = (f"{place}: {error.title}: {problem}" for problem in problems_of(error, model))
        return ConfigurationError("\n".join(lines))
    return ConfigurationError(f"{place}: importing it failed: {type(error).__name__}: {error}")


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    """Let a module beside the caller be found though a program elsewhere was started."""
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
