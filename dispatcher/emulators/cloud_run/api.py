"""The methods that are served: one table for both transports.

Each names its messages, its permission, its quota and its places in HTTP; what it does is a verb of
the world. `gate.py` calls it, the servers only translate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

from dispatcher.emulators.cloud_run import messages as m
from dispatcher.emulators.cloud_run.faults import Kind
from dispatcher.emulators.cloud_run.logreading import list_log_entries
from dispatcher.emulators.cloud_run.paging import page
from dispatcher.emulators.cloud_run.rendering import task_message
from dispatcher.emulators.cloud_run.world import World

__all__ = ["METHODS", "Method", "Quota"]

Quota = Literal["run", "read", "write", "logs"]
Handler = Callable[[World, Any], Any]

JOBS: Final = "google.cloud.run.v2.Jobs"
EXECUTIONS: Final = "google.cloud.run.v2.Executions"
TASKS: Final = "google.cloud.run.v2.Tasks"
OPERATIONS: Final = "google.longrunning.Operations"
LOGGING: Final = "google.logging.v2.LoggingServiceV2"

LOCATION: Final = "projects/*/locations/*"
JOB: Final = f"{LOCATION}/jobs/*"
EXECUTION: Final = f"{JOB}/executions/*"


@dataclass(frozen=True, slots=True)
class Method:
    """One method of the API."""

    service: str
    rpc: str
    request: Any
    """The class of its request."""

    handle: Handler
    permission: str
    """What the caller must be allowed; empty if anybody may."""

    quota: Quota | None
    http: tuple[str, str]
    """The HTTP method, and the path with its variables as in Google's annotations."""

    body: str = ""
    """The field of the request that the HTTP body fills; "*" for all of it."""

    resource: str = "name"
    """The field that names what it is about."""

    @property
    def name(self) -> str:
        """How it is called in counts and faults: "Jobs.RunJob"."""
        return f"{self.service.rpartition('.')[2]}.{self.rpc}"

    def subject(self, request: Any) -> str:
        """Return the full name of what a request is about."""
        value: Any = request
        for part in self.resource.split("."):
            value = getattr(value, part)
        return str(value if isinstance(value, str) else next(iter(value), ""))


# --- what each does -------------------------------------------------------------------------------


def _create_job(world: World, request: Any) -> Any:
    return world.create_job(
        request.parent, request.job_id, request.job, validate_only=request.validate_only
    )


def _list_jobs(world: World, request: Any) -> Any:
    places = world.list_jobs(request.parent)
    jobs, token = page(
        places, size=request.page_size, token=request.page_token, limit=world.options.page_size
    )
    return m.ListJobsResponse(jobs=jobs, next_page_token=token)


def _update_job(world: World, request: Any) -> Any:
    return world.update_job(
        request.job, allow_missing=request.allow_missing, validate_only=request.validate_only
    )


def _delete_job(world: World, request: Any) -> Any:
    return world.delete_job(request.name, etag=request.etag, validate_only=request.validate_only)


def _run_job(world: World, request: Any) -> Any:
    return world.run_job(
        request.name, request.overrides, etag=request.etag, validate_only=request.validate_only
    )


def _test_permissions(world: World, request: Any) -> Any:
    world.get_job(request.resource)
    return m.TestIamPermissionsResponse(
        permissions=[one for one in request.permissions if world.permits(one, request.resource)]
    )


def _lag(world: World, method: str) -> float:
    """By how many seconds a list is behind (guess: lists_are_current)."""
    fault = world.faults.strike(Kind.STALE_LISTS, method)
    return fault.seconds if fault else 0.0


def _list_executions(world: World, request: Any) -> Any:
    places = world.list_executions(request.parent, _lag(world, "Executions.ListExecutions"))
    executions, token = page(
        places, size=request.page_size, token=request.page_token, limit=world.options.page_size
    )
    return m.ListExecutionsResponse(executions=executions, next_page_token=token)


def _cancel_execution(world: World, request: Any) -> Any:
    return world.cancel_execution(
        request.name, etag=request.etag, validate_only=request.validate_only
    )


def _delete_execution(world: World, request: Any) -> Any:
    return world.delete_execution(
        request.name, etag=request.etag, validate_only=request.validate_only
    )


def _list_tasks(world: World, request: Any) -> Any:
    """List the tasks of an execution (guess: task_order)."""
    lag = _lag(world, "Tasks.ListTasks")
    with world.lock:
        execution = world.execution(request.parent)
        as_of = world.clock() - lag if lag else None
        skew = world.faults.skew()
        tasks, token = page(
            (
                (task.index, partial(task_message, execution, task, skew, as_of))
                for task in execution.tasks
            ),
            size=request.page_size,
            token=request.page_token,
            limit=world.options.page_size,
            newest_first=False,
        )
    return m.ListTasksResponse(tasks=tasks, next_page_token=token)


def _get_task(world: World, request: Any) -> Any:
    return world.get_task(request.name)


def _list_operations(world: World, request: Any) -> Any:
    names = world.list_operations(request.name)
    places = (
        (len(names) - number, partial(world.get_operation, name))
        for number, name in enumerate(names)
    )
    operations, token = page(
        places, size=request.page_size, token=request.page_token, limit=world.options.page_size
    )
    return m.ListOperationsResponse(operations=operations, next_page_token=token)


def _delete_operation(world: World, request: Any) -> Any:
    world.delete_operation(request.name)
    return m.Empty()


# --- the table ------------------------------------------------------------------------------------

_TABLE: Final = (
    Method(
        JOBS,
        "CreateJob",
        m.CreateJobRequest,
        _create_job,
        "run.jobs.create",
        "write",
        ("POST", f"/v2/{{parent={LOCATION}}}/jobs"),
        "job",
        "parent",
    ),
    Method(
        JOBS,
        "GetJob",
        m.GetJobRequest,
        lambda world, request: world.get_job(request.name),
        "run.jobs.get",
        "read",
        ("GET", f"/v2/{{name={JOB}}}"),
    ),
    Method(
        JOBS,
        "ListJobs",
        m.ListJobsRequest,
        _list_jobs,
        "run.jobs.list",
        "read",
        ("GET", f"/v2/{{parent={LOCATION}}}/jobs"),
        resource="parent",
    ),
    Method(
        JOBS,
        "UpdateJob",
        m.UpdateJobRequest,
        _update_job,
        "run.jobs.update",
        "write",
        ("PATCH", f"/v2/{{job.name={JOB}}}"),
        "job",
        "job.name",
    ),
    Method(
        JOBS,
        "DeleteJob",
        m.DeleteJobRequest,
        _delete_job,
        "run.jobs.delete",
        "write",
        ("DELETE", f"/v2/{{name={JOB}}}"),
    ),
    Method(
        JOBS,
        "RunJob",
        m.RunJobRequest,
        _run_job,
        "run.jobs.run",
        "run",
        ("POST", f"/v2/{{name={JOB}}}:run"),
        "*",
    ),
    Method(
        JOBS,
        "TestIamPermissions",
        m.TestIamPermissionsRequest,
        _test_permissions,
        "",
        "read",
        ("POST", f"/v2/{{resource={JOB}}}:testIamPermissions"),
        "*",
        "resource",
    ),
    Method(
        EXECUTIONS,
        "GetExecution",
        m.GetExecutionRequest,
        lambda world, request: world.get_execution(request.name),
        "run.executions.get",
        "read",
        ("GET", f"/v2/{{name={EXECUTION}}}"),
    ),
    Method(
        EXECUTIONS,
        "ListExecutions",
        m.ListExecutionsRequest,
        _list_executions,
        "run.executions.list",
        "read",
        ("GET", f"/v2/{{parent={JOB}}}/executions"),
        resource="parent",
    ),
    Method(
        EXECUTIONS,
        "CancelExecution",
        m.CancelExecutionRequest,
        _cancel_execution,
        "run.executions.cancel",
        "write",
        ("POST", f"/v2/{{name={EXECUTION}}}:cancel"),
        "*",
    ),
    Method(
        EXECUTIONS,
        "DeleteExecution",
        m.DeleteExecutionRequest,
        _delete_execution,
        "run.executions.delete",
        "write",
        ("DELETE", f"/v2/{{name={EXECUTION}}}"),
    ),
    Method(
        TASKS,
        "GetTask",
        m.GetTaskRequest,
        _get_task,
        "run.tasks.get",
        "read",
        ("GET", f"/v2/{{name={EXECUTION}/tasks/*}}"),
    ),
    Method(
        TASKS,
        "ListTasks",
        m.ListTasksRequest,
        _list_tasks,
        "run.tasks.list",
        "read",
        ("GET", f"/v2/{{parent={EXECUTION}}}/tasks"),
        resource="parent",
    ),
    Method(
        OPERATIONS,
        "GetOperation",
        m.GetOperationRequest,
        lambda world, request: world.get_operation(request.name),
        "run.operations.get",
        "read",
        ("GET", f"/v2/{{name={LOCATION}/operations/*}}"),
    ),
    Method(
        OPERATIONS,
        "ListOperations",
        m.ListOperationsRequest,
        _list_operations,
        "run.operations.list",
        "read",
        ("GET", f"/v2/{{name={LOCATION}}}/operations"),
    ),
    Method(
        OPERATIONS,
        "WaitOperation",
        m.WaitOperationRequest,
        lambda world, request: world.get_operation(request.name),
        "run.operations.get",
        "read",
        ("POST", f"/v2/{{name={LOCATION}/operations/*}}:wait"),
        "*",
    ),
    Method(
        OPERATIONS,
        "DeleteOperation",
        m.DeleteOperationRequest,
        _delete_operation,
        "run.operations.delete",
        "write",
        ("DELETE", f"/v2/{{name={LOCATION}/operations/*}}"),
    ),
    Method(
        LOGGING,
        "ListLogEntries",
        m.ListLogEntriesRequest,
        list_log_entries,
        "logging.logEntries.list",
        "logs",
        ("POST", "/v2/entries:list"),
        "*",
        "resource_names",
    ),
)

METHODS: Final[Mapping[str, Method]] = {method.name: method for method in _TABLE}
"""Every method by its name, such as "Jobs.RunJob"."""
