"""What `dispatcher check` says of a job: its options against the live Cloud Run job.

Nothing is started: the launch is tried with `validate_only`, the reads that following an execution
needs are made once, and the other calls are tried on what is not there: Google looks at permissions
first, so that NOT_FOUND says "you may" and PERMISSION_DENIED "you may not" [D: error model].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Final, Literal

from google.api_core import exceptions as api
from google.cloud import run_v2
from google.iam.v1 import iam_policy_pb2

from dispatcher.backends.base import (
    LaunchRequest,
    Meter,
    Rejected,
    Remark,
    TaskInput,
    Unavailable,
)
from dispatcher.backends.cloud_run import launching, logs
from dispatcher.backends.cloud_run.clients import Clients, RunClients
from dispatcher.backends.cloud_run.failures import CLIENT_ERRORS, at_launch, calling, words
from dispatcher.backends.cloud_run.names import ANY_JOB, job_name
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
# Which role holds what: docs.cloud.google.com/iam/docs/roles-permissions/run, and …/logging.
_VIEWER: Final = "give the workers' account roles/run.viewer on the project"
_EXECUTOR: Final = (
    "give the workers' account roles/run.jobsExecutorWithOverrides on the job; roles/run.invoker "
    "is not enough"
)
_MAKER: Final = (
    "give the workers' account roles/run.developer on the project, and "
    "roles/iam.serviceAccountUser on the Cloud Run job's own account: it makes jobs, and runs, "
    "reads, cancels and deletes them"
)
_LOG_VIEWER: Final = "give the workers' account roles/logging.viewer on the project"

_TRIED: Final = "d-check"
"""Key of what is tried: no launch has it, as theirs go on with a batch's id."""


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
    clients: Clients,
    meter: Meter,
) -> Iterator[Remark]:
    """Say what the live job, the permissions and a tried launch tell.

    Raises:
        Unavailable: it cannot be said now.
        google.auth.exceptions.GoogleAuthError: there are no credentials, or they are refused.
    """
    run = clients.run()
    name = job_name(settings.project, settings.region, options.job)
    timeout = settings.call_timeout.total_seconds()
    try:
        with calling(meter, "read", f"cannot read {name}"):
            live = run.jobs.get_job(run_v2.GetJobRequest(name=name), retry=None, timeout=timeout)
    except api.NotFound:
        yield _missing(options, settings, run, meter)
        return
    except Unavailable as error:
        yield _refused(error, f"cannot read {name}", _VIEWER)
        return
    compared = list(_definition(job, options, live))
    yield from compared
    sound = all(one.level != "fail" for one in (*on_paper(job, options), *compared))
    yield from _trials(job, options, settings, run, meter, live, sound=sound)
    yield from _reads(settings, run, meter, name)
    yield from _log_read(settings, clients, meter, name)


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
    if options.mode != "strict" and task.max_retries:
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
    if has and has < job.timeout <= LONGEST_TIMEOUT:
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


def _trials(
    job: Job,
    options: CloudRunOptions,
    settings: CloudRunSettings,
    clients: RunClients,
    meter: Meter,
    live: run_v2.Job,
    *,
    sound: bool,
) -> Iterator[Remark]:
    """Try what a launch, a cancel and, in mode `strict`, the clean-up call, without effect.

    `sound` says whether nothing is known yet that keeps a launch from being taken.
    """
    try:
        container = launching.container_of(options, live)
    except Rejected:
        return  # told of before
    timeout = settings.call_timeout.total_seconds()
    if options.mode != "strict":
        yield from _trial(job, options, clients, live, container, timeout, sound=sound)
        yield from _granted(clients, meter, live.name, timeout)
    if options.mode == "strict" or (options.mode == "mixed" and live.template.parallelism > 1):
        yield from _strict_trials(
            job, options, settings, clients, meter, live, container, sound=sound
        )


def _tried(job: Job, options: CloudRunOptions, tasks: int) -> LaunchRequest:
    """Ask for a launch of the job as the planner would, but for its templates and input."""
    args = tuple("" for _ in job.args)
    env = dict.fromkeys(job.env, "")
    return LaunchRequest(
        key=_TRIED,
        instance="check",
        batch_id="check",
        job=job.name,
        command=(),
        tasks=tuple(TaskInput(index, index, 1, "[]", args, env) for index in range(tasks)),
        options=options,
        timeout=min(job.timeout, LONGEST_TIMEOUT),
        parallelism=tasks,
        wrapped=options.wrapped,
        clear_args=job.clear_args,
    )


def _trial(
    job: Job,
    options: CloudRunOptions,
    clients: RunClients,
    live: run_v2.Job,
    container: str,
    timeout: float,
    *,
    sound: bool,
) -> Iterator[Remark]:
    """Try the launch without launching: permission, names of variables, timeout, tasks."""
    tasks = min(max(live.template.parallelism, options.max_tasks), MAX_TASKS)
    tried = _tried(job, options, tasks)
    request = launching.run_request(live.name, tried, dict(tried.tasks[0].env), container)
    request.validate_only = True
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
        if sound:
            yield Remark("ok", f"{live.name} would take a launch")


def _granted(clients: RunClients, meter: Meter, name: str, timeout: float) -> Iterator[Remark]:
    """Ask what may be done with the job's executions: none need be there to try it on."""
    needed = {"run.executions.cancel": _EXECUTOR, "run.executions.get": _VIEWER}
    asked = iam_policy_pb2.TestIamPermissionsRequest(resource=name, permissions=list(needed))
    what = f"what may be done with the executions of {name}"
    try:
        with calling(meter, "read", f"{what} cannot be asked"):
            answer = clients.jobs.test_iam_permissions(asked, retry=None, timeout=timeout)
    except Unavailable as error:
        if not _is_refusal(error):
            raise
        # Whether a job answers for its executions is unverified: a refusal is no fault of the job.
        text = f"{what} is not known, as it may not be asked: {words(error.__cause__ or error)}"
        yield Remark("warn", text, f"see that {' and '.join(needed)} are granted")
        return
    for permission, todo in needed.items():
        if permission not in answer.permissions:
            yield Remark("fail", f"Permission {permission!r} is missing on {name}", todo)


def _strict_trials(
    job: Job,
    options: CloudRunOptions,
    settings: CloudRunSettings,
    clients: RunClients,
    meter: Meter,
    live: run_v2.Job,
    container: str,
    *,
    sound: bool,
) -> Iterator[Remark]:
    """Try what a launch with a job of its own calls, on a job that is not there."""
    parent = f"projects/{settings.project}/locations/{settings.region}"
    name = f"{parent}/jobs/{launching.strict_id(_TRIED)}"
    execution = f"{name}/executions/{launching.strict_id(_TRIED)}-{launching.TOKEN}"
    tried = _tried(job, options, 1)
    wanted = launching.strict_job(tried, dict(tried.tasks[0].env), container, live)
    creation = run_v2.CreateJobRequest(
        parent=parent, job=wanted, job_id=launching.strict_id(_TRIED), validate_only=True
    )
    deletion = run_v2.DeleteJobRequest(name=name, validate_only=True)
    cancel = run_v2.CancelExecutionRequest(name=execution, validate_only=True)
    find = run_v2.GetJobRequest(name=name)
    look = run_v2.GetExecutionRequest(name=execution)
    jobs = run_v2.ListJobsRequest(parent=parent, page_size=1)
    given: dict[str, Any] = {
        "retry": None,
        "timeout": settings.call_timeout.total_seconds(),
    }
    trials: tuple[tuple[str, Literal["read", "write"], Callable[[], Any]], ...] = (
        ("creating one", "write", lambda: clients.jobs.create_job(creation, **given)),
        ("finding it again", "read", lambda: clients.jobs.get_job(find, **given)),
        ("reading how it runs", "read", lambda: clients.executions.get_execution(look, **given)),
        ("cancelling it", "write", lambda: clients.executions.cancel_execution(cancel, **given)),
        ("listing them", "read", lambda: clients.jobs.list_jobs(jobs, **given)),
        ("deleting it", "write", lambda: clients.jobs.delete_job(deletion, **given)),
    )
    for what, kind, call in trials:
        text = f"mode {options.mode} makes jobs of its own, and {what} is refused"
        try:
            with calling(meter, kind, text):
                call()
        except api.NotFound:
            continue  # looked for, and so permitted
        except Unavailable as error:
            if isinstance(error.__cause__, (api.AlreadyExists, api.Conflict)):
                continue  # somebody has called a job so; it was permitted
            yield _refused(error, text, _MAKER)
            sound = False
    if sound:
        yield Remark("ok", f"jobs like {live.name} would be made at a launch")


def _reads(
    settings: CloudRunSettings, clients: RunClients, meter: Meter, name: str
) -> Iterator[Remark]:
    """Make the reads that following an execution and looking for strays need, once."""
    region = job_name(settings.project, settings.region, ANY_JOB)
    timeout = settings.call_timeout.total_seconds()

    def executions(parent: str) -> Callable[[], Any]:
        asked = run_v2.ListExecutionsRequest(parent=parent, page_size=1)
        return lambda: clients.executions.list_executions(asked, retry=None, timeout=timeout)

    strays = "the executions of all jobs cannot be listed, so that strays are never found"
    tasks = run_v2.ListTasksRequest(parent=f"{name}/executions/-", page_size=1)
    reads: Sequence[tuple[str, Callable[[], Any]]] = (
        (f"the executions of {name} cannot be listed", executions(name)),
        (strays, executions(region)),
        (
            f"the tasks of {name} cannot be listed",
            lambda: clients.tasks.list_tasks(tasks, retry=None, timeout=timeout),
        ),
    )
    for what, read in reads:
        try:
            with calling(meter, "read", what):
                read()
        except api.NotFound:
            continue  # looked for, and so permitted: there is no execution yet
        except Unavailable as error:
            yield _refused(error, what, _VIEWER)


def _log_read(
    settings: CloudRunSettings, clients: Clients, meter: Meter, name: str
) -> Iterator[Remark]:
    """Read the output of a task that is not there. All else works without it."""
    handle = f"{name}/executions/{name.rpartition('/')[2]}-check"
    what = "the output of tasks cannot be read, for `dispatcher logs` and beside failures"
    try:
        logs.last_lines(settings, clients, meter, handle, 0, 1)
    except Unavailable as error:
        todo = _LOG_VIEWER if _is_refusal(error) else None
        yield Remark("warn", f"{what}: {words(error.__cause__ or error)}", todo)


def _refused(error: Unavailable, what: str, todo: str) -> Remark:
    """Word a call that is refused, without the hint that a launch's refusal has.

    Raises:
        Unavailable: it was not refused, and cannot be said now.
    """
    if error.__cause__ is None or not _is_refusal(error):
        raise error
    return Remark("fail", f"{what}: {words(error.__cause__)}", todo)


def _is_refusal(error: Unavailable) -> bool:
    return isinstance(error.__cause__, (api.Forbidden, api.Unauthorized, api.BadRequest))
