"""What a launch asks of Cloud Run, and what is refused before it is asked. Pure.

A run of a job can vary its args (which replace the definition's), its variables (merged by name),
its number of tasks and the timeout of a task; nothing else [C: RunJobRequest.Overrides]. All tasks
of an execution get the same args and variables: what differs from task to task comes by the input
document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

from google.cloud import run_v2

from dispatcher.backends.base import BackendLimits, LaunchRequest, Rejected
from dispatcher.backends.cloud_run.options import LONGEST_TIMEOUT, CloudRunOptions, reserved
from dispatcher.counting import counted
from dispatcher.documents import document, needs_document
from dispatcher.durations import format_duration

__all__ = [
    "INLINE_BYTES",
    "MAX_TEXT_BYTES",
    "TOKEN",
    "cannot_make_a_job",
    "check_live",
    "container_of",
    "env_of",
    "makes_a_job",
    "misfits",
    "run_request",
    "strict_id",
    "strict_job",
]

MAX_TEXT_BYTES: Final = 32 * 1024
"""Bytes of a variable's value at most [C: EnvVar.value]."""

INLINE_BYTES: Final = 24 * 1024
"""Bytes of input that go into a variable: a fifth and more is left free (facts/clouds.md §2)."""

MAX_VARIABLES: Final = 1000
MAX_ARGS: Final = 1000
"""Of one container [D: quotas]."""

TOKEN: Final = "a1"  # noqa: S105 - a name, and no secret
"""Suffix of the one execution of a job that mode `strict` makes."""

_LONGEST_STRICT: Final = 62 - len(TOKEN)
"""Name and token of a job are fewer than 63 characters together [C: Job.start_execution_token]."""


def env_of(request: LaunchRequest, limits: BackendLimits) -> dict[str, str]:
    """Give the variables that all tasks of an execution get.

    Raises:
        Rejected: the input is too large for a variable, and no document was written.
    """
    first = request.tasks[0]
    env = {} if request.wrapped else dict(first.env)
    env |= {
        "DISPATCH_KEY": request.key,
        "DISPATCH_INSTANCE": request.instance,
        "DISPATCH_BATCH_ID": request.batch_id,
        "DISPATCH_JOB": request.job,
        "DISPATCH_TASK_COUNT": str(len(request.tasks)),
    }
    if len(request.tasks) == 1:
        env["DISPATCH_ATTEMPT"] = str(first.attempt)
        env["DISPATCH_CHUNK"] = str(first.chunk_index)
    if request.result_uri is not None:
        env["DISPATCH_RESULT_URI"] = request.result_uri
    if request.claim_uri is not None:
        env["DISPATCH_CLAIM_URI"] = request.claim_uri
    if not needs_document(request, limits):
        env["DISPATCH_ITEMS"] = first.items
        # Where there is a document they stand in the task's line of it.
        if first.result_uri is not None:
            env["DISPATCH_RESULT_URI"] = first.result_uri
        if first.progress_uri is not None:
            env["DISPATCH_PROGRESS_URI"] = first.progress_uri
    elif request.input_uri is not None:
        env["DISPATCH_INPUT_URI"] = request.input_uri
    else:
        text = document(request)
        size = len(text.encode())
        if size > limits.inline_bytes:
            raise Rejected(
                f"the input of this execution is {size:,} bytes and a Cloud Run variable holds "
                f"{limits.inline_bytes:,} of it: set DISPATCHER_STORAGE_URL for the workers, so "
                "that it goes by reference; or give fewer items to a chunk, or fewer chunks to an "
                "execution (options.max_tasks)"
            )
        env["DISPATCH_INPUT"] = text
    return env


def misfits(request: LaunchRequest, env: dict[str, str]) -> Iterator[str]:
    """Say what Cloud Run would refuse of a request, whatever its job is like."""
    if request.command:
        yield (
            f"the job's `command` is {' '.join(request.command)[:200]!r} and Cloud Run cannot "
            "override an entrypoint: put it in the definition, and what follows it in `args`"
        )
    first = request.tasks[0]
    if not request.wrapped and any(
        task.args != first.args or dict(task.env) != dict(first.env) for task in request.tasks
    ):
        yield (
            "args or env differ from chunk to chunk, and all tasks of an execution share theirs: "
            "set options.max_tasks to 1, or use the entry wrapper (options.wrapped)"
        )
    if request.timeout > LONGEST_TIMEOUT:
        yield (
            f"the timeout is {format_duration(request.timeout)} and Cloud Run allows "
            f"{format_duration(LONGEST_TIMEOUT)}: mend the job's `timeout`"
        )
    for name, value in env.items():
        size = len(value.encode())
        if reserved(name):
            yield f"the variable {name} is Cloud Run's own: give it another name in the job's `env`"
        if size > MAX_TEXT_BYTES:
            yield (
                f"the variable {name} is {size:,} bytes and Cloud Run allows {MAX_TEXT_BYTES:,}: "
                "give fewer items to a chunk, or have the image read DISPATCH_INPUT_URI"
            )
    if len(env) > MAX_VARIABLES:
        yield f"there are {len(env):,} variables and Cloud Run allows {MAX_VARIABLES:,}"
    if len(first.args) > MAX_ARGS:
        yield f"there are {len(first.args):,} args and Cloud Run allows {MAX_ARGS:,}"


def makes_a_job(options: CloudRunOptions, live: Any | None, request: LaunchRequest) -> bool:
    """Say if a launch makes a job of its own."""
    if options.mode != "mixed":
        return options.mode == "strict"
    return live is not None and len(request.tasks) < live.template.parallelism


def cannot_make_a_job(options: CloudRunOptions, name: str, live: Any, tasks: int) -> str:
    """Say what a launch could not do that needs a job of its own, and why it does."""
    if options.mode == "strict":
        return f"cannot create the job {name}"
    return f"{_too_few(options, live, tasks)}. A job of its own for them, {name}, cannot be created"


def check_live(
    options: CloudRunOptions, live: Any, tasks: int, *, strict: bool = False
) -> Iterator[str]:
    """Say why a job as it is now cannot run so many tasks.

    That fewer tasks than its parallelism are refused is [I: googleapis/google-cloud-node#4908];
    [C: Execution.parallelism] says that it must be at most the number of tasks.
    """
    template = live.template
    if strict:
        return
    if tasks < template.parallelism:
        yield (
            f"{_too_few(options, live, tasks)}. Set options.mode to mixed; or set its parallelism "
            "to 0 and limit the job by `limits.running`"
        )
    if options.parallelism is not None and not 0 < template.parallelism <= options.parallelism:
        has = template.parallelism or "none (as many as it can)"
        yield (
            f"options.parallelism is {options.parallelism} and the Cloud Run job {options.job} has "
            f"{has}: leave the option out, so that it is read there, or mend the definition"
        )


def _too_few(options: CloudRunOptions, live: Any, tasks: int) -> str:
    return (
        f"the Cloud Run job {options.job} has parallelism {live.template.parallelism} and this "
        f"execution has {counted(tasks, 'task')}: Cloud Run refuses fewer tasks "
        "than that"
    )


def container_of(options: CloudRunOptions, live: Any | None) -> str:
    """Name the container that overrides are for; "" where the job has one [U: may be empty].

    Raises:
        Rejected: the job has several containers, or none of this name.
    """
    if live is None:
        return options.container or ""
    names = [container.name for container in live.template.template.containers]
    if options.container is not None:
        if options.container not in names:
            raise Rejected(
                f"options.container is {options.container!r}; the Cloud Run job {options.job} has "
                f"{', '.join(map(repr, names)) or 'none'}"
            )
        return options.container
    if len(names) > 1:
        raise Rejected(
            f"the Cloud Run job {options.job} has several containers, "
            f"{', '.join(map(repr, names))}: name one in options.container"
        )
    return names[0] if names else ""


def run_request(
    name: str, request: LaunchRequest, env: dict[str, str], container: str
) -> run_v2.RunJobRequest:
    """Write the call that starts an execution of a job.

    Without args of the job's own the definition's stay, unless it says that there are to be none:
    empty args mean "unset" there [C].
    """
    override = run_v2.RunJobRequest.Overrides.ContainerOverride(
        name=container,
        args=() if request.wrapped else list(request.tasks[0].args),
        clear_args=_clears_args(request),
        env=[run_v2.EnvVar(name=name, value=value) for name, value in env.items()],
    )
    return run_v2.RunJobRequest(
        name=name,
        overrides=run_v2.RunJobRequest.Overrides(
            container_overrides=[override],
            task_count=len(request.tasks),
            timeout=_whole_seconds(request.timeout),
        ),
    )


def strict_id(key: str) -> str:
    """Name the job that mode `strict` makes for a key: by the key itself if that is legal."""
    if len(key) <= _LONGEST_STRICT and not key.endswith("-"):
        return key
    return f"d-{hashlib.sha256(key.encode()).hexdigest()[:40]}"


def strict_job(
    request: LaunchRequest, env: dict[str, str], container: str, live: run_v2.Job
) -> run_v2.Job:
    """Write the job of one launch: the shared one's template with this launch's overrides in it."""
    job = run_v2.Job(
        labels={
            **dict(live.labels),
            "dispatcher-instance": request.instance,
            "dispatcher-key": request.key,
        },
        launch_stage=live.launch_stage,
        binary_authorization=live.binary_authorization,
        template=live.template,
        start_execution_token=TOKEN,
    )
    template = job.template
    template.task_count = len(request.tasks)
    template.parallelism = request.parallelism
    template.template.max_retries = 0
    template.template.timeout = _whole_seconds(request.timeout)  # type: ignore[assignment]  # proto-plus takes a timedelta
    for part in template.template.containers:
        if part.name == container:
            kept = [variable for variable in part.env if variable.name not in env]
            part.env = [*kept, *(run_v2.EnvVar(name=n, value=v) for n, v in env.items())]
            if request.tasks[0].args and not request.wrapped:
                part.args = list(request.tasks[0].args)
            elif _clears_args(request):
                part.args = []
    return job


def _clears_args(request: LaunchRequest) -> bool:
    """Whether the definition's args are to go: with the wrapper they are the image's command."""
    return request.clear_args and not request.wrapped and not request.tasks[0].args


def _whole_seconds(timeout: timedelta) -> timedelta:
    """Give whole seconds, one at least: that is what a task's timeout is counted in [D]."""
    return timedelta(seconds=max(1, -(-timeout // timedelta(seconds=1))))
