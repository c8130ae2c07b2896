"""What one batch sets over its job, checked against what the job allows. Pure: no I/O.

The caller may be a stranger behind an application's API. So nothing is allowed unless the job says
so, and what is given is text for the program and never a template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from dispatcher.errors import InvalidInput
from dispatcher.job import Chunking, Count, Duration, EnvName, Job, Text, format_duration
from dispatcher.problems import Problem, problems_of, shown

__all__ = ["MAX_BYTES", "MAX_TEXTS", "overridden"]

MAX_TEXTS: Final = 1000
"""Arguments, and variables, that a batch may bring: as many as the strictest backend can carry."""

MAX_BYTES: Final = 24 * 1024
"""Bytes of UTF-8 that all of them may have together, names included: they go with each launch."""

_SHOWN: Final = 5
"""Problems that a message tells at most: a stranger decides how many there are."""


class _Given(BaseModel):
    """What a batch asks for, before it is compared with what its job allows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    args: tuple[Text, ...] | None = None
    env: dict[EnvName, Text] | None = None
    timeout: Duration | None = None
    tasks: Count | None = None


def overridden(job: Job, overrides: Mapping[str, Any] | None) -> tuple[Job, dict[str, Any]]:
    """Return the job as a batch wants it, and what the batch asked for, in one spelling, as JSON.

    What is None counts as not given, and so does an `env` without a variable. An empty list of
    args is given: it takes the job's away.

    Raises:
        InvalidInput: naming each value that is wrong or not allowed, and what is.
    """
    if overrides is None:
        return job, {}
    if not isinstance(overrides, Mapping):
        problem = Problem((), f"is {shown(overrides)}; it must be a mapping")
        raise _refused(job, [problem])
    try:
        given = _Given.model_validate(dict(overrides))
    except ValidationError as error:
        raise _refused(job, problems_of(error, _Given)) from error
    problems = [*_not_allowed(job, given), *_too_large(given)]
    if problems:
        raise _refused(job, problems)
    changes: dict[str, Any] = {}
    if given.args is not None:
        changes["args"] = tuple(map(_literal, given.args))
        changes["clear_args"] = not given.args
    if given.env is not None:
        changes["env"] = {**job.env, **{name: _literal(text) for name, text in given.env.items()}}
    if given.timeout is not None:
        changes["timeout"] = given.timeout
    if given.tasks is not None:
        changes["chunk"] = Chunking(count=given.tasks, balance_by=job.chunk.balance_by)
    asked = given.model_dump(mode="json", exclude_none=True)
    if not given.env:
        asked.pop("env", None)
    return job.model_copy(update=changes), asked


def _not_allowed(job: Job, given: _Given) -> Iterator[Problem]:
    """Compare with the job's `overrides`."""
    allowed = job.overrides
    if given.args is not None and not allowed.args:
        text = f"is {shown(given.args)}; the job takes no other args than its own"
        yield Problem(("args",), f"{text}: that needs `args: true` there")
    for name, value in (given.env or {}).items():
        if name not in allowed.env:
            path = ("env", name)
            names = ", ".join(sorted(allowed.env)) or "none"
            text = f"is {shown(value, path)}; the variables that may be set are: {names}"
            yield Problem(path, text)
    if given.timeout is not None:
        text = f'is "{format_duration(given.timeout)}"; it must be '
        if allowed.timeout is None:
            yield Problem(("timeout",), f"{text}left out, as the job allows no other than its own")
        elif given.timeout > allowed.timeout:
            yield Problem(("timeout",), f"{text}at most {format_duration(allowed.timeout)}")
    if given.tasks is not None:
        text = f"is {given.tasks}; it must be "
        if allowed.tasks is None:
            yield Problem(("tasks",), f"{text}left out, as the job allows no other than its own")
        elif given.tasks > allowed.tasks:
            yield Problem(("tasks",), f"{text}at most {allowed.tasks}")


def _too_large(given: _Given) -> Iterator[Problem]:
    """Bound what goes with each launch, whatever the backend."""
    args, env = given.args or (), given.env or {}
    for name, count in (("args", len(args)), ("env", len(env))):
        if count > MAX_TEXTS:
            yield Problem((name,), f"has {count:,} entries; it must have at most {MAX_TEXTS:,}")
    size = sum(len(text.encode()) for text in (*args, *env, *env.values()))
    if size > MAX_BYTES:
        name = "args" if args else "env"
        text = f"is too large: args and env together have {size:,} bytes and may have {MAX_BYTES:,}"
        yield Problem((name,), f"{text}; put the data into storage and name it")


def _literal(text: str) -> str:
    """Write a text so that, as a template, it gives itself."""
    return text.replace("{", "{{").replace("}", "}}")


def _refused(job: Job, problems: list[Problem]) -> InvalidInput:
    lines = list(dict.fromkeys(str(problem.under("overrides")) for problem in problems))
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"and {len(lines) - _SHOWN:,} more"]
    return InvalidInput(
        f"the job {job.name!r} cannot run so: {'; '.join(lines)}. "
        f"What a batch may set is in `overrides` of the job {job.name!r} in the jobs file"
    )
