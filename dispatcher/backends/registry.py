"""Which kinds of backend there are, by name.

A backend's module is imported when a target first names it, so that one that is not used needs no
package. Other distributions add theirs under the entry point group `dispatcher.backends`; one's own
is named by "module:Class".
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Final, cast

from pydantic import BaseModel

from dispatcher.backends.base import UNMETERED, Backend, Meter
from dispatcher.errors import ConfigurationError
from dispatcher.problems import choices

if TYPE_CHECKING:
    from dispatcher.config import Target

__all__ = ["BACKENDS", "ENTRY_POINTS", "backend_class", "known_backends", "make_backend"]

BACKENDS: Final[dict[str, str]] = {
    "cloud_run": "dispatcher.backends.cloud_run:CloudRunBackend",
    "local": "dispatcher.backends.local:LocalBackend",
    "null": "dispatcher.testing:NullBackend",
}
"""Name → "module:class" of the backends that come with this package."""

ENTRY_POINTS: Final = "dispatcher.backends"


def known_backends() -> tuple[str, ...]:
    """Name every backend that is installed here, our own and those of entry points."""
    return tuple(sorted({*BACKENDS, *entry_points(group=ENTRY_POINTS).names}))


def backend_class(name: str) -> type[Backend]:
    """Import the backend of this name.

    Raises:
        ConfigurationError: there is none, or a package that it needs is not installed.
    """
    found = _entry_point(name)
    if found is None:
        raise ConfigurationError(
            f'"{name}" is no known backend; known: {choices(name, known_backends())}'
        )
    try:
        return cast("type[Backend]", getattr(import_module(found.module), found.attr))
    except ImportError as error:
        raise ConfigurationError(
            f'the backend "{name}" cannot be imported ({error}); '
            f"to install what it needs: {_installation(found)}"
        ) from error
    except AttributeError as error:
        raise ConfigurationError(
            f'the backend "{name}" is registered as {found.value}, which does not exist ({error}); '
            "mend the registration"
        ) from error


def make_backend(target: Target, meter: Meter = UNMETERED) -> Backend:
    """Make the backend of a target; nothing is connected yet.

    Its calls are counted at the meter: without one, nobody's budget is asked for.

    Raises:
        ConfigurationError: as `backend_class`.
    """
    # The protocol says how a backend is made in words only; a class has no typed `__init__` there.
    make = cast("Callable[[str, BaseModel, Meter], Backend]", backend_class(target.backend))
    return make(target.name, target.settings, meter)


def _entry_point(name: str) -> EntryPoint | None:
    if name in BACKENDS:
        return EntryPoint(name, BACKENDS[name], ENTRY_POINTS)
    if ":" in name:
        return EntryPoint(name, name, ENTRY_POINTS)
    return next(iter(entry_points(group=ENTRY_POINTS, name=name)), None)


def _installation(found: EntryPoint) -> str:
    if found.dist is not None:  # it knows its own needs
        return f"pip install '{found.dist.name}'"
    # Our own extras are named as their backends, with dashes. From a checkout: this is on no index,
    # and what has our name there is somebody else's.
    return f"in a checkout of dispatcher, pip install '.[{found.name.replace('_', '-')}]'"
