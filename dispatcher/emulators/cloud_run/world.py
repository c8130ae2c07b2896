"""`World`: all jobs, executions, tasks and operations of the emulator, shared by its servers.

The verbs of the API, in memory and behind one lock. What may be asked and how it is sent is
`api.py`'s and the servers'; how tasks run is `executing.py`'s; what a job may say is
`definitions.py`'s. Tests may call the verbs, and read `starts` and `executed`.
"""

from __future__ import annotations

import itertools
import random
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final

from dispatcher.emulators.cloud_run import definitions
from dispatcher.emulators.cloud_run.executing import Executor
from dispatcher.emulators.cloud_run.faults import Faults, Kind
from dispatcher.emulators.cloud_run.journal import Journal
from dispatcher.emulators.cloud_run.messages import (
    ExecutionReference,
    Job,
    RunJobRequest,
    set_seconds,
    stamp,
)
from dispatcher.emulators.cloud_run.naming import changed, check_location, location_of, missing
from dispatcher.emulators.cloud_run.operations import Operations, new_name
from dispatcher.emulators.cloud_run.options import EmulatorOptions
from dispatcher.emulators.cloud_run.readiness import check_ready, is_ready, judge
from dispatcher.emulators.cloud_run.records import ExecutionRecord, Stop, TaskRecord
from dispatcher.emulators.cloud_run.refusal import Code, Refused
from dispatcher.emulators.cloud_run.rendering import (
    CREATOR,
    execution_message,
    operation_message,
    task_message,
)
from dispatcher.emulators.cloud_run.tasks import Runner, TaskStart
from dispatcher.emulators.cloud_run.timetable import Clock, Timetable

__all__ = ["World"]

SUFFIX: Final = "bcdfghjklmnpqrstvwxz2456789"
SUFFIX_LENGTH: Final = 5


class World:
    """Everything that exists in the emulated cloud.

    Attributes:
        permissions: what the caller may do in the project, such as `run.jobs.run`; None for
            everything.
        permissions_on: what it may do besides with single jobs, by their full names.
        authenticated: whether the caller's credentials are right.
        executed: every execution there ever was, in order, those that were deleted included.
        clock: seconds since 1970, as the world sees it.
    """

    def __init__(
        self, runner: Runner, options: EmulatorOptions, faults: Faults, clock: Clock
    ) -> None:
        self.options = options
        self.runner = runner
        self.faults = faults
        self.clock = clock
        self.permissions: frozenset[str] | None = None
        self.permissions_on: dict[str, frozenset[str]] = {}
        self.authenticated = True
        self.executed: list[ExecutionRecord] = []
        self.lock = threading.RLock()
        self.timetable = Timetable(self.lock, clock)
        self.journal = Journal(options.max_log_lines)
        self._executor = Executor(
            options, runner, faults, self.timetable, self.journal, self.lock, clock
        )
        self._executor.on_completed = self._completed
        self._random = random.Random(options.seed)  # noqa: S311 - names, and not secrets
        self._jobs: dict[str, Any] = {}
        self._job_orders: dict[str, int] = {}
        self._order = itertools.count()
        self._executions: dict[str, ExecutionRecord] = {}
        self._completed_of: dict[str, deque[ExecutionRecord]] = {}
        self._operations = Operations()

    # --- for tests --------------------------------------------------------------------------------

    @property
    def starts(self) -> list[TaskStart]:
        """Every attempt that was started, in order."""
        return self._executor.starts

    @property
    def busy(self) -> int:
        """Attempts that run now."""
        return self._executor.busy

    @property
    def most_busy(self) -> int:
        """The most attempts that ever ran at once."""
        return self._executor.most_busy

    @property
    def running(self) -> list[ExecutionRecord]:
        """Executions that have not completed, oldest first."""
        with self.lock:
            return sorted(self._executor.running, key=lambda execution: execution.order)

    def define(
        self,
        project: str,
        region: str,
        job: str,
        *,
        image: str = "image",
        container: str = "",
        command: Iterable[str] = (),
        args: Iterable[str] = (),
        env: Mapping[str, str] | None = None,
        limits: Mapping[str, str] | None = None,
        parallelism: int = 0,
        max_retries: int = 0,
        timeout: float = 600,
        task_count: int = 1,
    ) -> str:
        """Create a job, or replace it; returns its full name. `timeout` is in seconds.

        Raises:
            Refused: the job is one that Cloud Run would not take.
        """
        message = definitions.job_message(
            f"projects/{project}/locations/{region}/jobs/{job}",
            image=image,
            container=container,
            command=command,
            args=args,
            env=env or {},
            limits=limits or {},
            parallelism=parallelism,
            max_retries=max_retries,
            timeout=timeout,
            task_count=task_count,
        )
        self.update_job(message, allow_missing=True)
        return str(message.name)

    def permits(self, permission: str, subject: str) -> bool:
        """Whether the caller may do that with what this names, by grants on it or above it.

        A grant on a job holds for its executions and tasks, and never for lists of all jobs'
        (`jobs/-`); guess: grants_on_jobs.
        """
        if self.permissions is None or permission in self.permissions:
            return True
        job = "/".join(subject.split("/")[:6])
        return permission in self.permissions_on.get(job, frozenset())

    def advance(self, seconds: float) -> None:
        """Move the time on, for scripts that take hours."""
        self.clock.advance(seconds)
        self.timetable.wake()

    def forget(self, name: str) -> None:
        """Lose the record of an execution; what runs of it runs on."""
        with self.lock:
            self._drop(self._execution(name))

    # --- jobs -------------------------------------------------------------------------------------

    def create_job(
        self, parent: str, job_id: str, given: Any, *, validate_only: bool = False
    ) -> Any:
        """Create a job; returns the operation, which is done.

        A second one of the same name is refused with ALREADY_EXISTS (clouds.md §3).
        """
        check_location(parent)
        definitions.check_job_id(job_id)
        name = f"{parent}/jobs/{job_id}"
        with self.lock:
            if name in self._jobs:
                raise Refused(Code.ALREADY_EXISTS, f"Resource '{job_id}' already exists.")
            return self._write_job(name, given, None, validate_only=validate_only)

    def update_job(
        self, given: Any, *, allow_missing: bool = False, validate_only: bool = False
    ) -> Any:
        """Replace a job by another definition; returns the operation, which is done."""
        name = given.name
        check_location(location_of(name))
        with self.lock:
            old = self._jobs.get(name)
            if old is None:
                if not allow_missing:
                    raise missing("JOB", name)
                definitions.check_job_id(name.rpartition("/")[2])
            elif given.etag and given.etag != old.etag:
                raise changed(name)
            return self._write_job(name, given, old, validate_only=validate_only)

    def _write_job(self, name: str, given: Any, old: Any, *, validate_only: bool) -> Any:
        definitions.check_job(given)
        token = given.start_execution_token or given.run_execution_token
        if token:
            definitions.check_token(name.rpartition("/")[2], token)
        if old is None:
            self._check_place(location_of(name))
        now = self.clock()
        job = Job()
        job.CopyFrom(given)
        definitions.fill_defaults(job)
        job.name = name
        job.uid = old.uid if old is not None else str(uuid.uuid4())
        job.generation = job.observed_generation = (old.generation if old is not None else 0) + 1
        job.creator = job.last_modifier = CREATOR
        job.etag = f'"{uuid.uuid4().hex[:16]}"'
        stamp(job.create_time, now)
        if old is not None:
            job.create_time.CopyFrom(old.create_time)
            job.execution_count = old.execution_count
            if old.HasField("latest_created_execution"):
                job.latest_created_execution.CopyFrom(old.latest_created_execution)
        stamp(job.update_time, now)
        judge(job, self.runner, self.options.secrets, now)
        # Of the name and of a second token: guess: execution_token_name.
        started = f"{name}/executions/{name.rpartition('/')[2]}-{token}"
        known = old is not None and token in (old.start_execution_token, old.run_execution_token)
        starts = token and not known and started not in self._executions and is_ready(job)
        if starts:
            self._check_room(location_of(name))
        if not validate_only:
            self._jobs[name] = job
            self._job_orders.setdefault(name, next(self._order))
            self._completed_of.setdefault(name, deque())
            if starts:
                self._launch(job, RunJobRequest.Overrides(), started, now)
        return self._operations.finished(location_of(name), self._shown_job(job))

    def _check_place(self, location: str) -> None:
        """Refuse one job too many (clouds.md §3; guess: too_many_jobs)."""
        limit = self.options.max_jobs
        if limit is None:
            return
        held = sum(location_of(name) == location for name in self._jobs)
        if held >= limit:
            raise Refused(
                Code.RESOURCE_EXHAUSTED,
                f"Quota exceeded: there are {held} jobs in this region; at most {limit} may be.",
                reason="RESOURCE_QUOTA_EXCEEDED",
            )

    def get_job(self, name: str) -> Any:
        """Return a job."""
        with self.lock:
            return self._shown_job(self._job(name))

    def list_jobs(self, parent: str) -> Iterator[tuple[int, Callable[[], Any]]]:
        """Yield the jobs of a location, newest first, each with its place in that order."""
        with self.lock:
            found = [
                (self._job_orders[name], job)
                for name, job in self._jobs.items()
                if name.startswith(f"{parent}/jobs/")
            ]
        for order, job in sorted(found, key=lambda pair: -pair[0]):
            yield order, partial(self._shown_job, job)

    def delete_job(self, name: str, *, etag: str = "", validate_only: bool = False) -> Any:
        """Delete a job with its executions; returns the operation, which is done."""
        with self.lock:
            job = self._job(name)
            if etag and etag != job.etag:
                raise changed(name)
            shown = self._shown_job(job)
            if not validate_only:
                now = self.clock()
                stamp(shown.delete_time, now)
                for execution in [one for one in self._executions.values() if one.job == name]:
                    self._executor.stop_all(execution, Stop.KILL, now)
                    self._drop(execution)
                del self._jobs[name], self._job_orders[name], self._completed_of[name]
            return self._operations.finished(location_of(name), shown)

    def _shown_job(self, job: Any) -> Any:
        shown = Job()
        with self.lock:
            shown.CopyFrom(job)
        if skew := self.faults.skew():
            for field in (shown.create_time, shown.update_time):
                set_seconds(field, field.seconds + field.nanos / 1e9 + skew)
        return shown

    def _job(self, name: str) -> Any:
        job = self._jobs.get(name)
        if job is None:
            raise missing("JOB", name)
        return job

    # --- executions -------------------------------------------------------------------------------

    def run_job(
        self, name: str, overrides: Any, *, etag: str = "", validate_only: bool = False
    ) -> Any:
        """Start an execution; returns its operation, whose metadata is the execution.

        clouds.md §3; guess: run_keeps_etag, first_container.
        """
        with self.lock:
            job = self._job(name)
            if etag and etag != job.etag:
                raise changed(name)
            definitions.check_overrides(job, overrides)
            check_ready(job)
            self._check_room(location_of(name))
            job_id = name.rpartition("/")[2]
            suffix = "".join(self._random.choices(SUFFIX, k=SUFFIX_LENGTH))
            while f"{name}/executions/{job_id}-{suffix}" in self._executions:
                suffix = "".join(self._random.choices(SUFFIX, k=SUFFIX_LENGTH))
            execution = self._launch(
                job,
                overrides,
                f"{name}/executions/{job_id}-{suffix}",
                self.clock(),
                only_try=validate_only,
            )
            return operation_message(execution, self.faults.skew())

    def _check_room(self, location: str) -> None:
        """Refuse one execution too many (clouds.md §3; guess: too_many_running)."""
        limit = self.options.max_running
        if limit is None:
            return
        running = sum(one.location == location for one in self._executor.running)
        if running >= limit:
            raise Refused(
                Code.RESOURCE_EXHAUSTED,
                f"Quota exceeded: {running} executions are running in this region; at most "
                f"{limit} may.",
                reason="RESOURCE_QUOTA_EXCEEDED",
            )

    def _launch(
        self, job: Any, overrides: Any, name: str, now: float, *, only_try: bool = False
    ) -> ExecutionRecord:
        template, task_count = definitions.merge(job, overrides)
        if task_count < job.template.parallelism:
            # googleapis/google-cloud-node#4908; guess: tasks_under_parallelism
            raise Refused(
                Code.INVALID_ARGUMENT,
                f"Violation in RunJobRequest.overrides.task_count: {task_count} must be at least "
                f"the job's parallelism, {job.template.parallelism}.",
            )
        container = template.containers[0]
        env = {
            one.name: self.options.secrets.get(one.value_source.secret_key_ref.secret, one.value)
            for one in container.env
        }
        execution = ExecutionRecord(
            name=name,
            uid=str(uuid.uuid4()),
            order=len(self.executed),
            job=job.name,
            template=template,
            command=tuple(container.command),
            args=tuple(container.args),
            env=env,
            labels=dict(job.template.labels),
            annotations=dict(job.template.annotations),
            task_count=task_count,
            parallelism=min(job.template.parallelism or task_count, task_count),
            max_retries=template.max_retries,
            timeout=template.timeout.seconds + template.timeout.nanos / 1e9,
            created_at=now,
            operation=new_name(location_of(job.name)),
            tasks=[TaskRecord(index) for index in range(task_count)],
        )
        if not only_try:
            self.executed.append(execution)
            self._executions[name] = execution
            self._operations.follow(execution)
            job.execution_count += 1
            reference = ExecutionReference(name=name)
            stamp(reference.create_time, now)
            reference.completion_status = ExecutionReference.EXECUTION_RUNNING
            job.latest_created_execution.CopyFrom(reference)
            self._executor.launch(execution, now)
            fault = self.faults.strike(Kind.FORGET_RUNNING, execution.job_id)
            if fault is not None:
                self.timetable.at(now + fault.seconds, lambda _: self._drop_running(execution))
        return execution

    def get_execution(self, name: str) -> Any:
        """Return an execution as it is now."""
        with self.lock:
            return execution_message(self._execution(name), skew=self.faults.skew())

    def list_executions(
        self, parent: str, lag: float = 0.0
    ) -> Iterator[tuple[int, Callable[[], Any]]]:
        """Yield a job's executions, newest first, each with its place and how it was `lag` s ago.

        The parent `…/jobs/-` stands for all jobs of the location (clouds.md §3).
        """
        every = parent.endswith("/jobs/-")
        with self.lock:
            if not every:
                self._job(parent)
            location = parent.rpartition("/jobs/")[0]
            found = [
                one
                for one in reversed(self._executions.values())
                if one.job == parent or (every and one.location == location)
            ]
            as_of = self.clock() - lag
        for execution in found:
            if not lag or execution.created_at <= as_of:
                yield execution.order, partial(self._as_of, execution, as_of, lag)

    def _as_of(self, execution: ExecutionRecord, as_of: float, lag: float) -> Any:
        with self.lock:
            snapshot = None
            if lag:
                snapshot = next(
                    (then for at, then in reversed(execution.history) if at <= as_of), None
                )
            return execution_message(execution, snapshot, self.faults.skew())

    def cancel_execution(self, name: str, *, etag: str = "", validate_only: bool = False) -> Any:
        """Begin to stop an execution; returns its operation.

        clouds.md §3; guess: cancel_too_late.
        """
        with self.lock:
            execution = self._execution(name, etag)
            if execution.done:
                raise Refused(
                    Code.FAILED_PRECONDITION,
                    f"Execution '{execution.id}' has completed and cannot be cancelled.",
                )
            if not validate_only:
                self._executor.cancel(execution, self.clock())
            return operation_message(execution, self.faults.skew())

    def delete_execution(self, name: str, *, etag: str = "", validate_only: bool = False) -> Any:
        """Delete an execution's record and stop what runs of it; returns the operation, done."""
        with self.lock:
            execution = self._execution(name, etag)
            now = self.clock()
            if not validate_only:
                self._executor.stop_all(execution, Stop.KILL, now)  # guess: delete_running
                self._drop(execution)
            shown = type(execution_message(execution))()
            shown.CopyFrom(execution_message(execution, skew=self.faults.skew()))
            stamp(shown.delete_time, now)
            return self._operations.finished(location_of(name), shown)

    def _execution(self, name: str, etag: str = "") -> ExecutionRecord:
        execution = self._executions.get(name)
        if execution is None:
            raise missing("EXECUTION", name)
        if etag and etag != execution_message(execution).etag:
            raise changed(name)
        return execution

    def _drop(self, execution: ExecutionRecord) -> None:
        execution.deleted = True
        self._executions.pop(execution.name, None)
        completed = self._completed_of.get(execution.job)
        if completed is not None and execution in completed:
            completed.remove(execution)

    def _drop_running(self, execution: ExecutionRecord) -> None:
        if not execution.done:
            self._drop(execution)

    def _completed(self, execution: ExecutionRecord) -> None:
        """Note a completion; keep the newest ones of the job only (clouds.md §3)."""
        job = self._jobs.get(execution.job)
        if job is not None and job.latest_created_execution.name == execution.name:
            reference = job.latest_created_execution
            stamp(reference.completion_time, execution.completed_at)
            reference.completion_status = (
                ExecutionReference.EXECUTION_SUCCEEDED
                if execution.succeeded == execution.task_count
                else ExecutionReference.EXECUTION_CANCELLED
                if execution.cancelled
                else ExecutionReference.EXECUTION_FAILED
            )
        if execution.deleted or execution.job not in self._completed_of:
            return
        completed = self._completed_of[execution.job]
        completed.append(execution)
        while len(completed) > self.options.retention:
            self._drop(completed[0])
        fault = self.faults.strike(Kind.FORGET, execution.job_id)
        if fault is not None and execution.completed_at is not None:
            self.timetable.at(
                execution.completed_at + fault.seconds, lambda _: self._drop(execution)
            )

    # --- tasks ------------------------------------------------------------------------------------

    def execution(self, name: str) -> ExecutionRecord:
        """Return the record of an execution, for what is not in the API's messages."""
        with self.lock:
            return self._execution(name)

    def get_task(self, name: str) -> Any:
        """Return a task as it is now."""
        parent, _, last = name.partition("/tasks/")
        with self.lock:
            execution = self._execution(parent)
            for task in execution.tasks:
                if last == f"{execution.id}-task{task.index}":
                    return task_message(execution, task, self.faults.skew())
        raise missing("TASK", name)

    # --- operations -------------------------------------------------------------------------------

    def get_operation(self, name: str) -> Any:
        """Return an operation as it is now."""
        with self.lock:
            return self._operations.get(name, self.faults.skew())

    def list_operations(self, parent: str) -> list[str]:
        """Return the names of a location's operations, newest first."""
        with self.lock:
            return self._operations.names(parent)

    def delete_operation(self, name: str) -> None:
        """Forget an operation; what it is about goes on."""
        with self.lock:
            self._operations.delete(name)
