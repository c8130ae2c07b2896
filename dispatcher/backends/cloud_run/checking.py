"""What `dispatcher check` says of a job: its options against the live Cloud Run job.

Nothing is started: the launch is tried with `validate_only`, and the reads that following an
execution needs are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Final

from google.api_core import exceptions as api
from google.cloud import run_v2

from dispatcher.backends.base import Meter, Rejected, Remark, Unavailable
from dispatcher.backends.cloud_run import launching
from dispatcher.backends.cloud_run.clients import RunClients
from dispatcher.backends.cloud_run.failures import CLIENT_ERRORS, at_launch, calling, words
from dispatcher.backends.cloud_run.names import job_name
from dispatcher.backends.cloud_run.options import (
    LONGEST_TIMEOUT,
    MAX_TASKS,
    CloudRunOptions,
    CloudRunSettings,
    reserved,
)
from dispatcher.durations import format_duration
from dispatcher.job import Job
from dispatcher.problems import choices
from dispatcher.templating import uses_chunk

__all__ = ["on_live", "on_paper"]

_FAILED: Final = run_v2.Condition.State.CONDITION_FAILED
_VIEWER: Final = "give the workers' account roles/run.viewer there"
_EXECUTOR: Final = (
    "give the workers' account roles/run.jobsExecutorWithOverrides on the job; roles/run.invoker "
    "is not enough"
)


def on_paper(job: Job, options: CloudRunOptions) -> Iterator[Remark]:
    """Say what is wrong whatever the live job is like."""
    if job.command:
        yield Remark(
            "fail",
            f"`command` is {' '.join(job.command)[:200]!r}: Cloud Run cannot override the "
            "entrypoint",
            "put it in the definition of the Cloud Run job, and what follows it in `args`",
        )
    for name in job.env:
        if reserved(name):
            text = f"`env` sets {name}, which is Cloud Run's own, as PORT, CLOUD_RUN_* and K_* are"
            yield Remark("fail", text, "give the variable another name")
    if job.timeout > LONGEST_TIMEOUT:
        yield Remark(
            "fail",
            f"`timeout` is {format_duration(job.timeout)}; Cloud Run allows "
            f"{format_duration(LONGEST_TIMEOUT)} at most",
            "make it shorter, or the chunks smaller",
        )
    size = launching.MAX_TEXT_BYTES
    for name, text in job.env.items():
        if len(text.encode()) > size:
            yield Remark("fail", f"`env.{name}` is longer than the {size:,} bytes that fit")
    by_chunk = [text for text in (*job.args, *job.env.values()) if uses_chunk(text)]
    if by_chunk and options.max_tasks > 1 and not options.wrapped:
        yield Remark(
            "warn",
            f"options.max_tasks is {options.max_tasks:,}, but args or env differ from chunk to "
            f"chunk ({by_chunk[0][:60]!r}): each execution will have one task",
            "use the entry wrapper (options.wrapped), or have the image read its input document",
        )
    if by_chunk and not options.wrapped:
        yield Remark(
            "ok",
            f"a filled variable or argument holds {size:,} bytes at most; larger is refused",
        )
    if options.max_tasks > 1 or options.wrapped:
        yield Remark(
            "ok",
            f"an input of more than {launching.INLINE_BYTES:,} bytes an execution goes by "
            "reference, and needs DISPATCHER_STORAGE_URL",
        )


def on_live(
    job: Job,
    options: CloudRunOptions,
    settings: CloudRunSettings,
    clients: RunClients,
    meter: Meter,
) -> Iterator[Remark]:
    """Say what the live job, the permissions and a tried launch tell.

    Raises:
        Unavailable: it cannot be said now.
    """
    name = job_name(settings.project, settings.region, options.job)
    timeout = settings.call_timeout.total_seconds()
    try:
        with calling(meter, "read", f"cannot read {name}"):
            live = clients.jobs.get_job(
                run_v2.GetJobRequest(name=name), retry=None, timeout=timeout
            )
    except api.NotFound:
        yield _missing(options, settings, clients, meter)
        return
    except Unavailable as error:
        if not _is_refusal(error):
            raise
        yield _refused(error, f"cannot read {name}")
        return
    yield from _definition(job, options, live)
    yield from _trial(job, options, clients, name, live, timeout)
    yield from _reads(clients, meter, name, timeout)


def _missing(
    options: CloudRunOptions, settings: CloudRunSettings, clients: RunClients, meter: Meter
) -> Remark:
    """Say that the job is not there, and what is."""
    place = f"{settings.project}/{settings.region}"
    text = f"there is no Cloud Run job {options.job} in {place}"
    try:
        with calling(meter, "read", f"cannot list the jobs in {place}"):
            pager = clients.jobs.list_jobs(
                run_v2.ListJobsRequest(
                    parent=f"projects/{settings.project}/locations/{settings.region}", page_size=100
                ),
                retry=None,
                timeout=settings.call_timeout.total_seconds(),
            )
            page = next(iter(pager.pages))
        there = [found.name.rpartition("/")[2] for found in page.jobs]
        text += f"; there: {choices(options.job, there)}"
    except (Unavailable, api.NotFound):
        text += ", or it may not be seen"
    if options.definition is not None:
        return Remark("fail", text, "`dispatcher apply` makes it")
    return Remark(
        "fail", text, "mend options.job, or the target's project and region; or give a `definition`"
    )


def _definition(job: Job, options: CloudRunOptions, live: run_v2.Job) -> Iterator[Remark]:
    """Compare the job with what the definition fixes."""
    template, task = live.template, live.template.template
    ready = live.terminal_condition
    if ready.state == _FAILED:
        said = ready.message or "it does not say why"
        text = f"the Cloud Run job {options.job} is not ready: {said}"
        yield Remark("fail", text, "mend its image, secrets, network or service account")
    elif live.reconciling:
        yield Remark("warn", f"the Cloud Run job {options.job} is being changed just now")
    if options.mode == "shared" and task.max_retries:
        times = task.max_retries + 1
        yield Remark(
            "warn",
            f"the Cloud Run job {options.job} has max_retries {task.max_retries}: a task that "
            f"fails runs up to {times} times, each for up to "
            f"{format_duration(job.timeout)}, on your bill and hidden from our attempts",
            "set its max_retries to 0: retries are the dispatcher's",
        )
    try:
        launching.container_of(options, live)
    except Rejected as error:
        yield Remark("fail", str(error))
    yield from _parallelism(job, options, template.parallelism)
    has: timedelta | None = run_v2.TaskTemplate.pb(task).timeout.ToTimedelta()
    if has and has < job.timeout:
        yield Remark(
            "ok",
            f"the definition's timeout is {format_duration(has)}; each run is given "
            f"{format_duration(job.timeout)}",
        )


def _parallelism(job: Job, options: CloudRunOptions, fixed: int) -> Iterator[Remark]:
    """Compare the definition's parallelism with the job's packs and limits."""
    limits = [one for one in (job.limits.running, job.limits.per_batch) if one is not None]
    least = min(limits, default=None)
    strict = options.mode == "strict"
    if options.parallelism is not None and options.parallelism != fixed and not strict:
        yield Remark(
            "fail",
            f"options.parallelism is {options.parallelism} and the Cloud Run job has "
            f"{fixed or 'none (as many as it can)'}",
            "leave the option out, so that it is read there, or mend the definition",
        )
    if fixed and not strict and least is not None and fixed > least:
        yield Remark(
            "fail",
            f"the Cloud Run job runs {fixed} tasks of an execution at once, and the job's limits "
            f"allow {least}",
            f"set its parallelism to {least} or less, or raise `limits`",
        )
    elif not fixed and least is not None and options.max_tasks > least:
        yield Remark(
            "warn",
            f"the Cloud Run job runs all tasks of an execution at once, and the job's limits allow "
            f"{least}: executions will have {least} tasks at most, not {options.max_tasks:,}",
            "give the Cloud Run job a parallelism, or raise `limits`",
        )
    if fixed > 1 and options.mode == "shared":
        yield Remark(
            "fail",
            f"the Cloud Run job has parallelism {fixed}: Cloud Run refuses executions of fewer "
            "tasks than that, such as the last one of a batch, or a retry"
            + (f", and options.max_tasks is {options.max_tasks}" * (options.max_tasks < fixed)),
            "set options.mode to mixed, which makes a job of their own for these; or set its "
            "parallelism to 0 and limit the job by `limits.running`",
        )


def _trial(
    job: Job,
    options: CloudRunOptions,
    clients: RunClients,
    name: str,
    live: run_v2.Job,
    timeout: float,
) -> Iterator[Remark]:
    """Try the launch without launching: permission, names of variables, timeout, tasks."""
    try:
        container = launching.container_of(options, live)
    except Rejected:
        return  # told of before
    tasks = max(live.template.parallelism, 1) if options.mode != "strict" else 1
    request = run_v2.RunJobRequest(
        name=name,
        validate_only=True,
        overrides=run_v2.RunJobRequest.Overrides(
            container_overrides=[
                run_v2.RunJobRequest.Overrides.ContainerOverride(
                    name=container,
                    args=["" for _ in job.args],
                    env=[run_v2.EnvVar(name=variable, value="") for variable in job.env],
                )
            ],
            task_count=min(max(tasks, options.max_tasks), MAX_TASKS),
            timeout=min(job.timeout, LONGEST_TIMEOUT),
        ),
    )
    try:
        clients.jobs.run_job(request, retry=None, timeout=timeout)
    except (api.Forbidden, api.Unauthorized) as error:
        yield Remark("fail", f"a launch with overrides is refused: {words(error)}", _EXECUTOR)
    except CLIENT_ERRORS as error:
        told = at_launch(error, "a tried launch")
        if isinstance(told, Unavailable):
            raise told from error
        yield Remark("fail", f"a launch would be refused: {words(error)}")
    else:
        yield Remark("ok", f"{name} would take a launch")


def _reads(clients: RunClients, meter: Meter, name: str, timeout: float) -> Iterator[Remark]:
    """Make the reads that following an execution needs, once."""
    executions = run_v2.ListExecutionsRequest(parent=name, page_size=1)
    tasks = run_v2.ListTasksRequest(parent=f"{name}/executions/-", page_size=1)
    reads: tuple[tuple[str, Callable[[], Any]], ...] = (
        (
            "executions",
            lambda: clients.executions.list_executions(executions, retry=None, timeout=timeout),
        ),
        ("tasks", lambda: clients.tasks.list_tasks(tasks, retry=None, timeout=timeout)),
    )
    for what, read in reads:
        try:
            with calling(meter, "read", text := f"the {what} of {name} cannot be listed"):
                read()
        except api.NotFound:
            continue  # looked for, and so permitted: there is no execution yet
        except Unavailable as error:
            if not _is_refusal(error):
                raise
            yield _refused(error, text)


def _refused(error: Unavailable, what: str) -> Remark:
    """Say what may not be read, and once what to do."""
    if isinstance(error.__cause__, api.Forbidden):
        return Remark("fail", f"{what}: {words(error.__cause__)}", _VIEWER)
    return Remark("fail", str(error))


def _is_refusal(error: Unavailable) -> bool:
    return isinstance(error.__cause__, (api.Forbidden, api.Unauthorized, api.BadRequest))
