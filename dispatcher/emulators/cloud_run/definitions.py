"""What a job may say, and what an execution of it becomes: checks and merging, without state.

All of it works on the protobuf messages and refuses what the real Cloud Run refuses. Rules without
a source here are in `guesses.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from dispatcher.backends.cloud_run.names import RESERVED_NAMES, RESERVED_PREFIXES
from dispatcher.emulators.cloud_run.messages import Job, TaskTemplate, seconds_of, set_seconds
from dispatcher.emulators.cloud_run.quantities import DEFAULT_CPU, DEFAULT_MEMORY, amount
from dispatcher.emulators.cloud_run.refusal import Code, Refused

__all__ = [
    "MAX_TASKS",
    "check_job",
    "check_job_id",
    "check_overrides",
    "check_token",
    "fill_defaults",
    "job_message",
    "merge",
]

MAX_TASKS: Final = 10_000
"""Tasks in an execution (clouds.md §3)."""

MAX_RETRIES: Final = 10
DEFAULT_RETRIES: Final = 3
"""`max_retries` where a job does not say (clouds.md §3; vendor: TaskTemplate.max_retries)."""

DEFAULT_TIMEOUT: Final = 600
MAX_TIMEOUT: Final = 168 * 3600
"""Seconds an attempt may be given (vendor: configuring/task-timeout; clouds.md §3)."""

MAX_VALUE: Final = 32_768
"""Bytes in the value of a variable, and characters in its name (vendor: EnvVar; clouds.md §2)."""

MAX_ENV: Final = 1_000
MAX_ARGS: Final = 1_000
"""Variables and arguments of a container (clouds.md §2)."""

MAX_NAME: Final = 63
"""Job name and execution token together are shorter than this (vendor: Job)."""

CPUS: Final = frozenset({"1", "2", "4", "8", "1000m", "2000m", "4000m", "8000m"})
"""vendor: ResourceRequirements.limits; clouds.md §1."""

MOST_MEMORY: Final[Mapping[int, str]] = {1: "4Gi", 2: "8Gi", 4: "16Gi", 8: "32Gi"}
"""Memory of a container at most, by its cpus (vendor: configuring/jobs/memory-limits)."""

JOB_ID: Final = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
ENV_NAME: Final = re.compile(r"[^=\x00]+")
RESERVED_LABELS: Final = (
    "run.googleapis.com",
    "cloud.googleapis.com",
    "serving.knative.dev",
    "autoscaling.knative.dev",
)
"""Namespaces that API v2 rejects in labels (vendor: Job.labels)."""


def _wrong(message: str) -> Refused:
    return Refused(Code.INVALID_ARGUMENT, message)


def check_job_id(job_id: str) -> None:
    """Refuse what cannot be a job's id (vendor: CreateJobRequest.job_id, RFC 1035 label)."""
    if not JOB_ID.fullmatch(job_id):
        raise _wrong(
            f"job_id: {job_id!r} is invalid: only lower-case letters, digits and '-', beginning "
            "with a letter, not ending with '-', less than 64 characters."
        )


def check_token(job_id: str, token: str) -> None:
    """Refuse a token of start_execution_token that is too long or cannot be in a name.

    The length: vendor: Job.start_execution_token; the letters are those of a name, RFC 1035.
    """
    if len(job_id) + len(token) >= MAX_NAME:
        raise _wrong(
            f"job.start_execution_token: the name of the job and the token have "
            f"{len(job_id) + len(token)} characters together; fewer than {MAX_NAME} are allowed."
        )
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", token):
        raise _wrong(
            f"job.start_execution_token: {token!r} is invalid: only lower-case letters, digits and "
            "'-' in between."
        )


def check_job(job: Any) -> None:
    """Refuse a job whose definition cannot be (vendor: Job, ExecutionTemplate, TaskTemplate)."""
    for label in job.labels:
        if label.partition("/")[0] in RESERVED_LABELS:
            raise _wrong(f"job.labels: {label!r} is in a reserved namespace.")
    template = job.template
    if not template.template.containers:
        raise _wrong("job.template.template.containers: at least one container is required.")
    if template.parallelism < 0:
        raise _wrong(f"job.template.parallelism: {template.parallelism} must not be negative.")
    _check_task_count("job.template.task_count", template.task_count, unset=0)
    task = template.template
    if task.HasField("max_retries") and not 0 <= task.max_retries <= MAX_RETRIES:
        raise _wrong(
            f"job.template.template.max_retries: {task.max_retries} must be between 0 and "
            f"{MAX_RETRIES}."
        )
    if task.HasField("timeout"):
        _check_timeout("job.template.template.timeout", seconds_of(task.timeout))
    names = [container.name for container in task.containers if container.name]
    if len(set(names)) != len(names):
        raise _wrong("job.template.template.containers: the names of containers must differ.")
    for number, container in enumerate(task.containers):
        _check_container(f"job.template.template.containers[{number}]", container)


def _check_container(where: str, container: Any) -> None:
    """Refuse a container that cannot be (vendor: Container; guess: little_memory)."""
    if not container.image:
        raise _wrong(f"{where}.image: required.")
    cpu = container.resources.limits.get("cpu")
    if cpu is not None and cpu not in CPUS:
        raise _wrong(f"{where}.resources.limits.cpu: {cpu!r} must be one of 1, 2, 4, 8.")
    memory = container.resources.limits.get("memory", DEFAULT_MEMORY)
    most = MOST_MEMORY[int(amount(cpu or DEFAULT_CPU))]
    try:
        is_too_much = amount(memory) > amount(most)
    except ValueError as error:
        raise _wrong(f"{where}.resources.limits.memory: {error}.") from error
    if is_too_much:
        largest = MOST_MEMORY[max(MOST_MEMORY)]
        if amount(memory) > amount(largest):
            most = largest
        raise _wrong(
            f"{where}.resources.limits.memory: {memory!r} is more than {most}, the most "
            f"{'there is' if most == largest else f'for {cpu or DEFAULT_CPU} cpu'}; see "
            "https://cloud.google.com/run/docs/configuring/jobs/memory-limits."
        )
    _check_args(f"{where}.args", container.args)
    _check_env(f"{where}.env", container.env)


def _check_args(where: str, args: Any) -> None:
    """Refuse too many arguments (clouds.md §2)."""
    if len(args) > MAX_ARGS:
        raise _wrong(f"{where}: {len(args)} arguments; at most {MAX_ARGS} are allowed.")


def _check_env(where: str, env: Any) -> None:
    """Refuse variables that cannot be (vendor: EnvVar; clouds.md §2; guess: reserved_env)."""
    if len(env) > MAX_ENV:
        raise _wrong(f"{where}: {len(env)} variables; at most {MAX_ENV} are allowed.")
    for one in env:
        if not ENV_NAME.fullmatch(one.name) or len(one.name) > MAX_VALUE:
            raise _wrong(
                f"{where}: the name {one.name[:80]!r} is invalid: 1 to {MAX_VALUE} characters "
                "without '='."
            )
        if one.name in RESERVED_NAMES or one.name.startswith(RESERVED_PREFIXES):
            raise _wrong(f"{where}: the name {one.name} is reserved and cannot be set.")
        size = len(one.value.encode())
        if size > MAX_VALUE:
            raise _wrong(
                f"{where}: the value of {one.name} has {size} bytes; at most {MAX_VALUE} are "
                "allowed."
            )


def _check_task_count(where: str, count: int, *, unset: int) -> None:
    """Refuse a number of tasks that is none or too large (clouds.md §3)."""
    if count != unset and not 1 <= count <= MAX_TASKS:
        raise _wrong(f"{where}: {count} must be between 1 and {MAX_TASKS}.")


def _check_timeout(where: str, seconds: float) -> None:
    """Refuse a timeout that is too short or too long (vendor: configuring/task-timeout)."""
    if not 1 <= seconds <= MAX_TIMEOUT:
        raise _wrong(f"{where}: {seconds:g}s must be between 1s and {MAX_TIMEOUT}s.")


def fill_defaults(job: Any) -> None:
    """Write what a job leaves open as the server does (vendor: TaskTemplate, ExecutionTemplate)."""
    template = job.template
    template.task_count = template.task_count or 1
    task = template.template
    if not task.HasField("max_retries"):
        task.max_retries = DEFAULT_RETRIES
    if not task.HasField("timeout"):
        set_seconds(task.timeout, DEFAULT_TIMEOUT)


def job_message(
    name: str,
    *,
    image: str,
    container: str,
    command: Iterable[str],
    args: Iterable[str],
    env: Mapping[str, str],
    limits: Mapping[str, str],
    parallelism: int,
    max_retries: int,
    timeout: float,
    task_count: int,
) -> Any:
    """Put a job of one container together."""
    job = Job(name=name)
    template = job.template
    template.parallelism = parallelism
    template.task_count = task_count
    template.template.max_retries = max_retries
    set_seconds(template.template.timeout, timeout)
    holder = template.template.containers.add(
        name=container, image=image, command=list(command), args=list(args)
    )
    for variable, value in env.items():
        holder.env.add(name=variable, value=value)
    holder.resources.limits.update(limits)
    return job


def check_overrides(job: Any, overrides: Any) -> None:
    """Refuse overrides that the job cannot take (clouds.md §2 and §3)."""
    # An int32 that is not set reads as 0: that is "not overridden", and not a count.
    _check_task_count("overrides.task_count", overrides.task_count, unset=0)
    if overrides.HasField("timeout"):
        _check_timeout("overrides.timeout", seconds_of(overrides.timeout))
    containers = job.template.template.containers
    seen: set[str] = set()
    for number, override in enumerate(overrides.container_overrides):
        where = f"overrides.container_overrides[{number}]"
        container = _container_of(where, containers, override.name)
        if container.name in seen:
            raise _wrong(f"{where}: the container {container.name!r} is overridden twice.")
        seen.add(container.name)
        if override.clear_args and override.args:
            raise _wrong(f"{where}: clear_args and args cannot both be set.")
        _check_args(f"{where}.args", override.args)
        _check_env(f"{where}.env", override.env)
        merged = {one.name for one in container.env} | {one.name for one in override.env}
        if len(merged) > MAX_ENV:
            raise _wrong(f"{where}.env: {len(merged)} variables together with the job's own.")


def _container_of(where: str, containers: Any, name: str) -> Any:
    """Find what an override is for (vendor: ContainerOverride.name; guess: override_name)."""
    if not name:
        if len(containers) > 1:
            raise _wrong(f"{where}.name: required, as the job has {len(containers)} containers.")
        return containers[0]
    for container in containers:
        if container.name == name:
            return container
    known = ", ".join(repr(container.name) for container in containers if container.name) or "none"
    raise _wrong(f"{where}.name: the job has no container named {name!r}; it has {known}.")


def merge(job: Any, overrides: Any) -> tuple[Any, int]:
    """Merge checked overrides into the job's template; returns the task template and task count.

    `args` replace, and an empty list changes nothing unless `clear_args` is set; `env` merges by
    name (clouds.md §3).
    """
    task = TaskTemplate()
    task.CopyFrom(job.template.template)
    for override in overrides.container_overrides:
        container = _container_of("overrides", task.containers, override.name)
        if override.clear_args:
            del container.args[:]
        elif override.args:
            container.args[:] = override.args
        _merge_env(container.env, override.env)
    if overrides.HasField("timeout"):
        task.timeout.CopyFrom(overrides.timeout)
    return task, overrides.task_count or job.template.task_count


def _merge_env(env: Any, changes: Iterable[Any]) -> None:
    """Merge variables by name (clouds.md §3; guess: duplicate_env)."""
    places = {one.name: one for one in env}
    for change in changes:
        place = places.get(change.name)
        if place is None:
            place = places[change.name] = env.add()
        place.CopyFrom(change)
