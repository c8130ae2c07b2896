"""The definitions that jobs carry for their provider, compared with what is there, and written.

A backend that can do so is `Definable`. Nothing is shown, and nobody is asked, here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from dispatcher.backends.base import Backend, BackendError, Change, Definable, Unavailable
from dispatcher.backends.registry import make_backend
from dispatcher.config import Config
from dispatcher.errors import ConfigurationError, InvalidInput, Unreachable
from dispatcher.job import Job

__all__ = ["Defined", "compare", "unfit", "write"]


@dataclass(frozen=True, slots=True)
class Defined:
    """A job with a definition, and how that differs from what is there."""

    job: Job
    backend: Definable
    options: BaseModel
    changes: Sequence[Change]
    asked: Backend
    """The same as `backend`, for what every backend can."""


def compare(config: Config, names: Sequence[str]) -> list[Defined]:
    """Compare the definitions of these jobs, or of all that have one.

    Raises:
        InvalidInput: two jobs want one definition to be different things.
        UnknownJob: there is no such job.
        InvalidInput: a job that is named has no definition, or its target takes none.
        ConfigurationError: a provider refuses to be asked.
        Unreachable: a provider does not answer.
    """
    asked = [config.job(name) for name in dict.fromkeys(names)] or list(config.jobs.values())
    backends = {job.target: make_backend(config.targets[job.target]) for job in asked}
    _refuse_two_wills(config, backends, {job.name for job in asked})
    found = []
    for job in asked:
        backend = backends[job.target]
        options = backend.Options.model_validate(job.options)
        changes = None
        if isinstance(backend, Definable):
            with _worded(job):
                changes = backend.changes(job, options)
            if changes is not None:
                found.append(Defined(job, backend, options, changes, backends[job.target]))
        if changes is None and names:
            kind = config.targets[job.target].backend
            raise InvalidInput(
                f"job {job.name} has no definition to apply: give it one in `options.definition`"
                if isinstance(backend, Definable)
                else f"job {job.name} is for a {kind} target, which takes no definition"
            )
    return found


def write(defined: Defined) -> str:
    """Create or update a definition; returns its name at the provider.

    Raises:
        ConfigurationError: the provider refuses it.
        Unreachable: it does not answer.
    """
    with _worded(defined.job):
        return defined.backend.apply(defined.job, defined.options)


def unfit(defined: Defined) -> Iterator[str]:
    """Say what would keep a job from running now that its definition is written."""
    try:
        remarks = defined.asked.check(defined.job, defined.options)
    except BackendError as error:
        yield f"job {defined.job.name} cannot be looked at: {error}"
        return
    for remark in remarks:
        if remark.level == "fail":
            todo = f"; {remark.todo}" if remark.todo else ""
            yield f"job {defined.job.name} cannot run yet: {remark.text}{todo}"


def _refuse_two_wills(
    config: Config, backends: Mapping[str, Backend], asked: AbstractSet[str]
) -> None:
    """See that what the asked jobs write would not be written over by another job."""
    known: dict[str, list[tuple[Job, dict[str, Any]]]] = {}
    for job in config.jobs.values():
        backend = backends.get(job.target)
        if not isinstance(backend, Definable):
            continue
        wanted = backend.wanted(backend.Options.model_validate(job.options))
        if wanted is None:
            continue
        name, will = wanted[0], wanted[1].model_dump(exclude_none=True)
        for other, its in known.setdefault(name, []):
            if asked & {job.name, other.name} and (where := _differ(its, will)):
                raise InvalidInput(
                    f"jobs {other.name} and {job.name} define {name} differently ({where}), so "
                    "each would undo what the other applies: give both the same "
                    "options.definition, or leave it to one of them, or name different jobs of the "
                    "provider"
                )
        known[name].append((job, will))


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Name the first value that both set, each to something else."""
    for key in sorted(one.keys() & other.keys()):
        mine, its = one[key], other[key]
        if isinstance(mine, dict) and isinstance(its, dict):
            within = _differ(mine, its)
            if within is not None:
                return f"{key}.{within}"
        elif mine != its:
            return key
    return None


@contextmanager
def _worded(job: Job) -> Iterator[None]:
    try:
        yield
    except Unavailable as error:
        raise Unreachable(f"job {job.name}: {error}") from error
    except BackendError as error:
        raise ConfigurationError(f"job {job.name}: {error}") from error
