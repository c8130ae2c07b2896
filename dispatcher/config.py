"""What targets and jobs an installation has: one file or module, read once into frozen values.

Everything that is wrong with it is told at once, in one `ConfigurationError`. How a file becomes a
plain mapping is `sources.py`'s; what a job may say is `job.py`'s; how a wrong value is worded is
`problems.py`'s. The `DISPATCHER_*` settings are `settings.py`'s and given here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, Final, TypeAlias, TypeVar

from pydantic import (
    AllowInfNan,
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    Strict,
    ValidationError,
)

from dispatcher.backends.base import Backend
from dispatcher.backends.registry import backend_class
from dispatcher.errors import ConfigurationError, InvalidInput, UnknownJob
from dispatcher.job import Count, Job, Name
from dispatcher.problems import Problem, Problems, choices, problems_of, shown, unknown_key
from dispatcher.schedule import Schedule
from dispatcher.settings import Settings, load_settings, standalone_file
from dispatcher.sources import read_source

__all__ = ["Config", "Settings", "Target", "load_config", "load_settings", "standalone_file"]

_Rate: TypeAlias = Annotated[float, Strict(), AllowInfNan(allow_inf_nan=False), Field(gt=0)]


class Target(BaseModel):
    """A configured place where executions happen: a backend with its settings and limits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    backend: Annotated[str, Field(min_length=1)]
    """The kind, as the registry names it."""

    max_running: Count | None = None
    """Slots at once, over all jobs."""

    max_executions: Count | None = None
    launches_per_minute: _Rate | None = None
    reads_per_minute: _Rate | None = None
    """Calls that look up, list and report; over all workers."""

    writes_per_minute: _Rate | None = None
    """Calls that cancel and remove; launches are counted apart."""

    logs_per_minute: _Rate | None = None
    """Calls that read logs."""

    settings: InstanceOf[BaseModel]
    """An instance of the backend's `Settings`."""


_TARGET_KEYS: Final = frozenset(Target.model_fields) - {"name", "settings"}
_SECTIONS: Final = ("jobs", "schedules", "targets")

_Part = TypeVar("_Part", Job, Target, Schedule)


@dataclass(frozen=True, slots=True)
class Config:
    """The targets, jobs and schedules of an installation."""

    targets: Mapping[str, Target]
    jobs: Mapping[str, Job]
    source: str
    """Where they were read, for messages."""

    schedules: Mapping[str, Schedule] = field(default_factory=dict)

    def job(self, name: str) -> Job:
        """Look a job up.

        Raises:
            UnknownJob: none of that name is configured.
        """
        try:
            return self.jobs[name]
        except KeyError:
            raise UnknownJob(
                f'no job "{name}" is configured in {self.source}; '
                f"configured: {choices(name, self.jobs)}"
            ) from None


def load_config(source: str) -> Config:
    """Read the targets and jobs from a YAML file or from a Python module.

    Args:
        source: a path, or "module" with attributes `targets` and `jobs`, or "module:attribute" of a
            mapping that has those keys.

    Raises:
        ConfigurationError: all that is wrong, one line each: file, path, value, what is allowed.
    """
    read = read_source(source)
    problems = [unknown_key((key,), _SECTIONS) for key in read.values if key not in _SECTIONS]
    named = dict(_named("targets", read.values.get("targets"), problems))
    targets = _each("targets", named, _read_target, problems)

    def read_job(name: str, raw: Any) -> Job:
        return _read_job(name, raw, lambda target: _backend_of(target, named))

    jobs = dict(_named("jobs", read.values.get("jobs"), problems))
    found = _each("jobs", jobs, read_job, problems)
    timed = dict(_named("schedules", read.values.get("schedules"), problems))
    schedules = _each("schedules", timed, partial(_read_schedule, found, jobs), problems)
    lines = [*read.problems, *(f"{source}: {problem}" for problem in problems)]
    if lines:
        raise ConfigurationError("\n".join(dict.fromkeys(lines)))
    return Config(
        MappingProxyType(targets), MappingProxyType(found), source, MappingProxyType(schedules)
    )


def _named(section: str, raw: Any, problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    """Yield each part of a section with its name: of a mapping, or of a list of named parts."""
    if raw is None:
        return
    if isinstance(raw, Mapping):
        for name, part in raw.items():
            if isinstance(name, str):
                yield name, part
            else:
                text = "is no name, which must be text: put it in quotes"
                problems.append(Problem((section, shown(name)), text))
        return
    if not isinstance(raw, list | tuple):
        text = f"is {shown(raw)}; it must be a mapping of names to {section}"
        problems.append(Problem((section,), text))
        return
    seen: set[str] = set()
    for index, part in enumerate(raw):
        name = part.get("name") if isinstance(part, Mapping) else getattr(part, "name", None)
        if not isinstance(name, str):
            text = f"is {shown(part)}; in a list it must have a name"
            problems.append(Problem((section, index), text))
        elif name in seen:
            problems.append(Problem((section, name), "is given twice; leave one out"))
        else:
            seen.add(name)
            yield name, part


def _each(
    section: str,
    named: Mapping[str, Any],
    read: Callable[[str, Any], _Part],
    problems: list[Problem],
) -> dict[str, _Part]:
    """Read each part of a section, and note what is wrong with those that cannot be."""
    found = {}
    for name, raw in named.items():
        try:
            found[name] = read(name, raw)
        except Problems as error:
            problems += [problem.under(section, name) for problem in error.problems]
    return found


def _without_name(name: str, raw: Any, kind: str) -> tuple[dict[Any, Any], list[Problem]]:
    """Copy a mapping without its name, which must be the key's."""
    if not isinstance(raw, Mapping):
        raise Problems([Problem((), f"is {shown(raw)}; it must be a mapping that says the {kind}")])
    given = raw.get("name", name)
    values = {key: value for key, value in raw.items() if key != "name"}
    return values, ([] if given == name else [_other_name(given, name)])


def _other_name(given: object, key: str) -> Problem:
    return Problem(("name",), f'is {shown(given)} under the key "{key}"; both must be the same')


# --- targets --------------------------------------------------------------------------------------


class _Unread(BaseModel):
    """Stands for settings that are wrong while the target's own keys are checked."""


def _read_target(name: str, raw: Any) -> Target:
    if isinstance(raw, Target):
        return _check_target(name, raw)
    values, problems = _without_name(name, raw, "target's backend")
    own = {key: value for key, value in values.items() if key in _TARGET_KEYS}
    rest = {key: value for key, value in values.items() if key not in _TARGET_KEYS}
    settings: BaseModel = _Unread()
    if isinstance(own.get("backend"), str):
        try:
            backend = backend_class(own["backend"])
            model = backend.Settings
            own = {**backend.DEFAULTS, **own}
            settings = model.model_validate(rest)
        except ConfigurationError as error:
            problems.append(Problem(("backend",), f"cannot be used: {error}"))
        except ValidationError as error:
            problems += problems_of(error, model, also=_TARGET_KEYS)
    try:
        target = Target.model_validate({**own, "name": name, "settings": settings})
    except ValidationError as error:
        problems += map(_of_key, problems_of(error, Target))
    if problems:
        raise Problems(problems)
    return target


def _check_target(name: str, target: Target) -> Target:
    if target.name != name:
        raise Problems([_other_name(target.name, name)])
    try:
        model = backend_class(target.backend).Settings
    except ConfigurationError as error:
        raise Problems([Problem(("backend",), f"cannot be used: {error}")]) from error
    if not isinstance(target.settings, model):
        text = f"is a {type(target.settings).__name__}; it must be the {target.backend} backend's"
        raise Problems([Problem(("settings",), f"{text} {model.__qualname__}")])
    return target


def _of_key(problem: Problem) -> Problem:
    """Place a problem with the name where a file has it: at the key."""
    return Problem((), problem.text) if problem.path == ("name",) else problem


# --- jobs -----------------------------------------------------------------------------------------


def _backend_of(target: str, named: Mapping[str, Any]) -> type[Backend] | None:
    """Find the kind of backend that a target has; None if that is wrong itself.

    The target may be wrong elsewhere: the job is checked all the same.

    Raises:
        Problems: there is no such target.
    """
    if target not in named:
        text = f"is {shown(target)}; it must be a configured target: {choices(target, named)}"
        raise Problems([Problem(("target",), text)])
    raw = named[target]
    backend = raw.get("backend") if isinstance(raw, Mapping) else getattr(raw, "backend", None)
    try:
        return backend_class(backend) if isinstance(backend, str) else None
    except ConfigurationError:  # told where the target is read
        return None


def _read_job(name: str, raw: Any, backend_of: Callable[[str], type[Backend] | None]) -> Job:
    if isinstance(raw, Job):
        if raw.name != name:
            raise Problems([_other_name(raw.name, name)])
        problems = _place_problems(raw.target, raw.options, raw.command, backend_of)
        if problems:
            raise Problems(problems)
        return raw
    values, problems = _without_name(name, raw, "job's target and command")
    # The place too, even if the job is wrong elsewhere: all at once.
    options, command = values.get("options", {}), values.get("command", ())
    problems += _place_problems(values.get("target"), options, command, backend_of)
    try:
        job = Job.model_validate({**values, "name": name})
    except ValidationError as error:
        raise Problems([*map(_of_key, problems_of(error, Job)), *problems]) from error
    if problems:
        raise Problems(problems)
    return job


def _place_problems(
    target: Any,
    options: Any,
    command: Any,
    backend_of: Callable[[str], type[Backend] | None],
) -> list[Problem]:
    """Say what keeps a job from running at this target; wrong types are the job's own."""
    if not isinstance(target, str) or not target:
        return []
    try:
        backend = backend_of(target)
    except Problems as error:
        return list(error.problems)
    if backend is None:
        return []
    problems = []
    if backend.COMMAND == "required" and command == ():
        problems.append(Problem(("command",), "is missing; it must say the program to run"))
    if backend.COMMAND == "refused" and command:
        text = f"is {shown(command)}; target {target!r} cannot set the program of an execution: "
        problems.append(Problem(("command",), text + "put it into the definition, and args here"))
    if isinstance(options, Mapping):
        try:
            backend.Options.model_validate(options)
        except ValidationError as error:
            found = problems_of(error, backend.Options)
            problems += [problem.under("options") for problem in found]
    return problems


# --- schedules ------------------------------------------------------------------------------------


def _read_schedule(
    found: Mapping[str, Job], named: Mapping[str, Any], name: str, raw: Any
) -> Schedule:
    if isinstance(raw, Schedule):
        schedule, problems = raw, [] if raw.name == name else [_other_name(raw.name, name)]
    else:
        values, problems = _without_name(name, raw, "schedule's cron line and job")
        try:
            schedule = Schedule.model_validate({**values, "name": name})
        except ValidationError as error:
            raise Problems([*map(_of_key, problems_of(error, Schedule)), *problems]) from error
    if schedule.job not in named:
        text = f"is {shown(schedule.job)}; it must be a configured job: "
        problems.append(Problem(("job",), text + choices(schedule.job, named)))
    elif (job := found.get(schedule.job)) is not None:
        if schedule.items is None and job.items is None:
            text = f'is missing, and job "{job.name}" has no item source; give one of them'
            problems.append(Problem(("items",), text))
        try:
            job.check_params(schedule.params)
        except InvalidInput as error:
            problems.append(Problem(("params",), f"do not fit: {error}"))
    if problems:
        raise Problems(problems)
    return schedule
