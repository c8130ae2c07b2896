"""The backend itself: the door's verbs, each as few calls as it can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from threading import Lock
from typing import Any, ClassVar, Final, Literal

import structlog
from google.api_core import exceptions as api
from google.cloud import run_v2
from pydantic import BaseModel

from dispatcher.backends.base import (
    UNMETERED,
    BackendLimits,
    Change,
    Definition,
    Handle,
    Launched,
    LaunchRequest,
    Meter,
    Recorded,
    Rejected,
    Remark,
    Report,
    Unavailable,
)
from dispatcher.backends.cloud_run import checking, definitions, launching, logs
from dispatcher.backends.cloud_run.clients import Clients, RunClients
from dispatcher.backends.cloud_run.failures import (
    CLIENT_ERRORS,
    at_launch,
    at_read,
    calling,
    words,
)
from dispatcher.backends.cloud_run.memory import Memory
from dispatcher.backends.cloud_run.names import job_name, read_handle
from dispatcher.backends.cloud_run.options import (
    LONGEST_TIMEOUT,
    MAX_TASKS,
    CloudRunOptions,
    CloudRunSettings,
)
from dispatcher.backends.cloud_run.own_jobs import OwnJobs
from dispatcher.backends.cloud_run.reading import PAGE, Reader
from dispatcher.backends.cloud_run.refusals import Refusals
from dispatcher.boottime import boottime
from dispatcher.job import Job

__all__ = ["CloudRunBackend"]

log = structlog.get_logger(__name__)

MAX_PAYLOAD_BYTES: Final = 64 * 1024 * 1024
"""Of one chunk's items: they go by reference, and the container reads them whole."""

LIVE_KEPT: Final = 300.0
"""Seconds for which a Cloud Run job is taken to be as it was read."""

REFUSED_KEPT: Final = 10.0
"""The same where a launch would be refused for it: somebody may just have mended it."""

MAKES_JOBS: Final = (
    "give the workers' account run.jobs.create, run.jobs.get and run.jobs.delete on the project, "
    "and iam.serviceAccounts.actAs on the job's account; or set the job's parallelism to 0 and "
    "limit it by `limits.running`, and leave options.mode out"
)
DEFINES_JOBS: Final = (
    "give the account that applies roles/run.developer on the project, and "
    "roles/iam.serviceAccountUser on the service account that the job runs as"
)


class CloudRunBackend:
    """Runs executions of Cloud Run jobs in one project and region."""

    Options: ClassVar[type[BaseModel]] = CloudRunOptions
    Settings: ClassVar[type[BaseModel]] = CloudRunSettings
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        # Quotas differ with a project's age; these fit the lowest that were reported [I].
        "launches_per_minute": 60,
        "reads_per_minute": 300,
        "writes_per_minute": 30,
        "logs_per_minute": 30,
        "max_running": 1000,
    }
    COMMAND: ClassVar[Literal["required", "refused"]] = "refused"

    def __init__(
        self,
        name: str,
        settings: BaseModel,
        meter: Meter = UNMETERED,
        *,
        monotonic: Callable[[], float] = boottime,
    ) -> None:
        if not isinstance(settings, CloudRunSettings):
            raise TypeError(f"target {name!r}: settings are {settings!r}, not CloudRunSettings")
        self.name = name
        self.settings = settings
        self._meter = meter
        self._monotonic = monotonic
        self._clients = Clients(settings)
        self._memory = Memory(monotonic)
        self._reader = Reader(settings, self._clients, meter, self._memory, monotonic)
        self._refusals = Refusals(monotonic)
        self._lock = Lock()
        self._live: dict[str, tuple[run_v2.Job, float]] = {}
        self._unreadable: dict[str, float] = {}
        self._own_jobs = OwnJobs(settings, self._clients, meter, monotonic)
        self._limits = BackendLimits(
            max_tasks=MAX_TASKS,
            max_payload_bytes=MAX_PAYLOAD_BYTES,
            inline_bytes=launching.INLINE_BYTES,
            max_text_bytes=launching.MAX_TEXT_BYTES,
            call_timeout=settings.call_timeout,
            find_grace=settings.find_grace,
            absent_grace=max(timedelta(seconds=30), settings.find_grace),
            page_size=PAGE,
            poll_interval=settings.poll_interval,
            relaunch_safe=False,
            own_results=False,
            per_task_env=False,
        )

    @property
    def limits(self) -> BackendLimits:
        """The numbers that the planner and the engine rely on."""
        return self._limits

    def home(self) -> None:
        """Any worker will do."""
        return

    def definition(self, options: BaseModel) -> Definition:
        """Read the job's parallelism.

        Raises:
            Rejected: there is no such job, or it may not be read.
            Unavailable: ask again later.
        """
        own = _own(options)
        if own.mode == "strict":  # each job of its own is given what the launch asks for
            return Definition(own.parallelism, LONGEST_TIMEOUT)
        live = self._read_live(own, at_most_old=0.0)
        return Definition(live.template.parallelism or None, LONGEST_TIMEOUT)

    def check(self, job: Job, options: BaseModel) -> Sequence[Remark]:
        """Say what would keep a job from running here, and what else its owner should know.

        Raises:
            Unavailable: it cannot be said now.
        """
        own = _own(options)
        remarks = list(checking.on_paper(job, own))
        try:
            return [
                *remarks,
                *checking.on_live(job, own, self.settings, self._clients, self._meter),
            ]
        except CLIENT_ERRORS as error:
            told = at_launch(error, "cannot speak to Cloud Run")
            if isinstance(told, Unavailable):
                raise told from error
            return [*remarks, Remark("fail", str(told))]

    # --- launch -----------------------------------------------------------------------------------

    def launch(self, request: LaunchRequest) -> Launched:
        """Start the execution, or adopt the one of this key that is known of.

        In mode `strict` no second one can come to be; else one that nobody has seen yet can.

        Raises:
            Rejected: Cloud Run refuses it, or would.
            Unavailable: it refuses it for now, or its answer was lost.
        """
        began = self._monotonic()
        own = _own(request.options)
        known = self._memory.launched(request.key)
        if known is not None:
            return known
        self._own_jobs.serve(request.instance)
        env = launching.env_of(request, self._limits)
        _refuse(launching.misfits(request, env))
        with self._refusals.asking(own.job, self._short()):
            try:
                clients = self._clients.run()
            except CLIENT_ERRORS as error:
                raise at_launch(error, "cannot speak to Cloud Run") from error
            live, strict = self._look_ahead(own, request)
            container = launching.container_of(own, live)
            if not strict:
                return self._launch_shared(request, env, container, clients, began)
        # Whether a job may be made says nothing of those that run the shared one.
        with self._refusals.asking(f"{own.job}, by a job of its own", self._short()):
            return self._launch_strict(request, env, container, clients, began)

    def _look_ahead(
        self, own: CloudRunOptions, request: LaunchRequest
    ) -> tuple[run_v2.Job | None, bool]:
        """Look at the job as it is known to be, and say if the launch makes one of its own.

        Raises:
            Rejected: it cannot run so many tasks, also when it is looked at anew.
            Unavailable: the kind of launch depends on the job, which cannot be read now.
        """
        live = self._live_for(own)
        strict = launching.makes_a_job(own, live, request)
        if live is None:
            return live, strict
        tasks = len(request.tasks)
        if any(launching.check_live(own, live, tasks, strict=strict)):
            # It may have been mended since it was read; one read serves all that would be refused.
            live = self._read_live(own, at_most_old=REFUSED_KEPT, not_started=True)
            strict = launching.makes_a_job(own, live, request)
            _refuse(launching.check_live(own, live, tasks, strict=strict))
        return live, strict

    def _launch_shared(
        self,
        request: LaunchRequest,
        env: dict[str, str],
        container: str,
        clients: RunClients,
        began: float,
    ) -> Launched:
        """Run the shared job."""
        own = _own(request.options)
        asked = launching.run_request(self._job(own.job), request, env, container)
        try:
            operation = clients.jobs.run_job(asked, retry=None, timeout=self._left(began))
        except CLIENT_ERRORS as error:
            told = at_launch(error, f"cannot run {asked.name}")
            if isinstance(told, Rejected):
                self._forget(own.job)  # it may have been changed since it was looked at
            raise told from error
        # The operation's metadata is the execution, long before it ends [C].
        execution = operation.metadata
        launched = execution and self._reader.remember(
            run_v2.Execution.pb(execution), asked.name, request
        )
        if not launched:
            raise Unavailable(f"Cloud Run ran {asked.name} and did not say as what")
        return launched

    def _launch_strict(
        self,
        request: LaunchRequest,
        env: dict[str, str],
        container: str,
        clients: RunClients,
        began: float,
    ) -> Launched:
        """Make a job of the launch's own, whose name cannot be taken twice, and its execution."""
        own = _own(request.options)
        live = self._read_live(own, at_most_old=LIVE_KEPT)
        wanted = launching.strict_job(request, env, container, live)
        name, left = launching.strict_id(request.key), self._left(began)
        self._own_jobs.take_place()
        try:
            clients.jobs.create_job(
                run_v2.CreateJobRequest(parent=self._place(), job=wanted, job_id=name),
                retry=None,
                timeout=left,
            )
        except (api.AlreadyExists, api.Conflict):
            self._own_jobs.give_back()
            log.info("the job of this key exists already", job=name)
        except CLIENT_ERRORS as error:
            self._own_jobs.give_back()  # if it was made all the same, the next list shows it
            what = launching.cannot_make_a_job(own, name, live, len(request.tasks))
            raise at_launch(error, what, MAKES_JOBS) from error
        try:
            launched = self._find_strict(request, clients, self._left(began))
        except Unavailable as error:
            # The job is there, and with it its execution: this leaves open what was started.
            raise Unavailable(str(error)) from error
        if launched is None:
            raise Unavailable(f"the job {name} has no execution yet: it is looked for by its name")
        return launched

    def _find_strict(
        self, request: LaunchRequest, clients: RunClients, timeout: float
    ) -> Launched | None:
        """Look for the execution of the job that a launch has made for itself."""
        name = self._job(launching.strict_id(request.key))
        try:
            with calling(self._meter, "read", f"cannot read {name}"):
                job = clients.jobs.get_job(
                    run_v2.GetJobRequest(name=name), retry=None, timeout=timeout
                )
        except api.NotFound:
            return None
        latest = job.latest_created_execution.name
        if not latest:
            return None
        # It may be named in short [C: Execution names elsewhere are full; U here].
        full = latest if "/" in latest else f"{name}/executions/{latest}"
        execution = run_v2.Execution(
            name=full, create_time=job.latest_created_execution.create_time
        )
        return self._reader.remember(run_v2.Execution.pb(execution), name, request)

    def find(self, request: LaunchRequest) -> Launched | None:
        """Look the execution up by its key; None if there is none now.

        Raises:
            Unavailable: it cannot be said now.
        """
        own = _own(request.options)
        self._own_jobs.serve(request.instance)
        found = None
        if own.mode != "shared":
            found = self._find_strict(request, self._ready(), self._timeout())
        if found is None and own.mode != "strict":
            found = self._reader.find(request, own.job)
        return found

    # --- follow -----------------------------------------------------------------------------------

    def poll(self, handles: Sequence[Handle]) -> Mapping[Handle, Report]:
        """Report on a page of executions. One that is left out cannot be told of (yet).

        Raises:
            Unavailable: nothing can be said now.
        """
        return self._reader.poll(handles)

    def winner(self, handle: Handle, name: str) -> Handle:
        """Name the execution beside this one that CLOUD_RUN_EXECUTION named in its tasks."""
        return f"{handle.rpartition('/')[0]}/{name}"

    def cancel(self, handle: Handle) -> None:
        """Ask for the end of an execution; one that is unknown or has ended is left alone.

        Raises:
            Unavailable: ask again later.
        """
        if read_handle(handle) is None:
            return
        clients = self._ready()
        try:
            with calling(self._meter, "write", f"cannot cancel {handle}"):
                clients.executions.cancel_execution(
                    run_v2.CancelExecutionRequest(name=handle), retry=None, timeout=self._timeout()
                )
        except api.NotFound:
            return
        except Unavailable as error:
            # The name is a good one, so that what is refused is the cancel of what has ended [U].
            if not isinstance(error.__cause__, api.BadRequest):
                raise
            log.info("cancel refused", handle=handle, why=words(error.__cause__))

    def strays(self, instance: str, since: datetime) -> Iterable[Launched]:
        """List what runs in the region for an installation and was created since then.

        Raises:
            Unavailable: it cannot be listed now.
        """
        self._own_jobs.serve(instance)
        return self._reader.strays(instance, since)

    def logs(self, handle: Handle, task_index: int, tail: int) -> Iterator[str]:
        """Yield the last `tail` lines that a task wrote, oldest first, without line ends.

        Raises:
            Unavailable: they cannot be read now.
        """
        yield from logs.last_lines(
            self.settings, self._clients, self._meter, handle, task_index, tail
        )

    def clean(self, now: datetime) -> int:  # noqa: ARG002 - of the protocol
        """Do nothing: `make_room` deletes the jobs of launches.

        Executions of shared jobs are left to Cloud Run, which keeps the newest 1,000 [D].
        """
        return 0

    def make_room(
        self, now: datetime, recorded: Callable[[Sequence[str]], Mapping[str, Recorded]]
    ) -> int:
        """Delete jobs of mode `strict` after `keep`; sooner where the region's places get short.

        Raises:
            Unavailable: ask again later.
        """
        return self._own_jobs.make_room(now - self.settings.keep, recorded)

    # --- definition -------------------------------------------------------------------------------

    def wanted(self, options: BaseModel) -> tuple[str, BaseModel] | None:
        """Name the Cloud Run job, or the container of it, that the `definition` is about."""
        own = _own(options)
        if own.definition is None:
            return None
        name = self._job(own.job)
        return f"{name} ({own.container})" if own.container else name, own.definition

    def changes(self, job: Job, options: BaseModel) -> Sequence[Change] | None:
        """Compare the job's `definition` with what is there; None if the job has none.

        Raises:
            Rejected: it may not be read, or is refused.
            Unavailable: ask again later.
        """
        del job
        own = _own(options)
        if own.definition is None:
            return None
        return definitions.differences(own, self._live_or_none(own))

    def apply(self, job: Job, options: BaseModel) -> str:
        """Create or update the Cloud Run job; returns its full name. Its readiness is not awaited.

        Raises:
            Rejected: Cloud Run refuses it, or the job has no `definition`.
            Unavailable: ask again later.
        """
        own = _own(options)
        if own.definition is None:
            raise Rejected(f"job {job.name} has no options.definition to apply")
        live = self._live_or_none(own)
        wanted, name = definitions.written(own, live), self._job(own.job)
        clients = self._ready()
        self._meter.take("write")
        try:
            if live is None:
                clients.jobs.create_job(
                    run_v2.CreateJobRequest(parent=self._place(), job=wanted, job_id=own.job),
                    retry=None,
                    timeout=self._timeout(),
                )
            else:
                # With the etag of what was read: nobody's change in between is overwritten.
                clients.jobs.update_job(
                    run_v2.UpdateJobRequest(job=wanted), retry=None, timeout=self._timeout()
                )
        except CLIENT_ERRORS as error:
            raise at_launch(
                error, f"cannot write the definition of {name}", DEFINES_JOBS
            ) from error
        self._forget(own.job)
        return name

    # --- small parts ------------------------------------------------------------------------------

    def _live_for(self, own: CloudRunOptions) -> run_v2.Job | None:
        """Give the job as it is, or as it was, for a check before a launch; None if unknown.

        In mode `mixed` it is never unknown: the kind of launch depends on it.

        Raises:
            Rejected: there is no such job; or it may not be read and must be.
            Unavailable: it must be read and cannot be now; nothing was started.
        """
        with self._lock:
            known, unreadable = self._live.get(own.job), self._unreadable.get(own.job, -math.inf)
        needed = own.mode == "mixed"
        if self._monotonic() - unreadable < LIVE_KEPT and not needed:
            return None
        try:
            return self._read_live(own, at_most_old=LIVE_KEPT, not_started=True)
        except Unavailable as error:
            if known is None and needed:
                raise
            log.debug("launched without a look at the job", job=own.job, why=str(error))
            return None if known is None else known[0]
        except Rejected as error:
            if needed or isinstance(error.__cause__, api.NotFound):
                raise
            with self._lock:
                self._unreadable[own.job] = self._monotonic()
            return None  # it may not be read; whether it may be run is for Cloud Run to say

    def _live_or_none(self, own: CloudRunOptions) -> run_v2.Job | None:
        try:
            return self._read_live(own, at_most_old=0.0)
        except Rejected as error:
            if isinstance(error.__cause__, api.NotFound):
                return None
            raise

    def _read_live(
        self, own: CloudRunOptions, *, at_most_old: float, not_started: bool = False
    ) -> run_v2.Job:
        """Read the Cloud Run job that a job names, if what is known of it is older than this.

        `not_started` says that it is read before a launch, which has not been called if that fails.

        Raises:
            Rejected: there is no such job, or it may not be read.
            Unavailable: ask again later.
        """
        now = self._monotonic()
        with self._lock:
            known = self._live.get(own.job)
        if known is not None and now - known[1] < at_most_old:
            return known[0]
        name = self._job(own.job)
        what = f"the Cloud Run job {name} cannot be read"
        try:
            clients = self._clients.run()
        except CLIENT_ERRORS as error:
            raise at_launch(error, "cannot speak to Cloud Run") from error
        try:
            with calling(self._meter, "read", what):
                live = clients.jobs.get_job(
                    run_v2.GetJobRequest(name=name), retry=None, timeout=self._short()
                )
        except api.NotFound as error:
            self._forget(own.job)
            raise at_launch(error, what) from error
        except Unavailable as error:
            cause = error.__cause__
            if isinstance(cause, (api.Forbidden, api.Unauthorized, api.BadRequest)):
                raise at_launch(cause, what) from cause
            if not_started:
                raise Unavailable(
                    str(error), retry_after=error.retry_after, not_started=True
                ) from cause
            raise
        if live.template.template.max_retries and own.mode == "shared" and known is None:
            log.warning(
                "the Cloud Run job retries by itself, hidden from our attempts",
                job=name,
                max_retries=live.template.template.max_retries,
            )
        with self._lock:
            self._live[own.job] = live, now
            self._unreadable.pop(own.job, None)
        return live

    def _forget(self, job: str) -> None:
        with self._lock:
            self._live.pop(job, None)

    def _ready(self) -> RunClients:
        try:
            return self._clients.run()
        except CLIENT_ERRORS as error:
            raise at_read(error, "cannot speak to Cloud Run") from error

    def _place(self) -> str:
        return f"projects/{self.settings.project}/locations/{self.settings.region}"

    def _job(self, job: str) -> str:
        return job_name(self.settings.project, self.settings.region, job)

    def _timeout(self) -> float:
        return self.settings.call_timeout.total_seconds()

    def _short(self) -> float:
        """Seconds for a read before a launch: most of `call_timeout` is the launch's own."""
        return self._timeout() / 4

    def _left(self, began: float) -> float:
        """Seconds that a launch has left of `call_timeout`.

        Raises:
            Unavailable: hardly any, and nothing was called.
        """
        left = self._timeout() - (self._monotonic() - began)
        if left < self._timeout() / 4:
            raise Unavailable(
                "the token and the look at the job took too long to launch in time",
                not_started=True,
            )
        return left


def _own(options: BaseModel) -> CloudRunOptions:
    if not isinstance(options, CloudRunOptions):
        raise TypeError(f"options are {options!r}, not CloudRunOptions")
    return options


def _refuse(problems: Iterable[str]) -> None:
    found = list(problems)
    if found:
        raise Rejected("; ".join(found))
