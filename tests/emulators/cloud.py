"""The real client library against an emulator, over both transports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import run_v2
from google.cloud.run_v2.services.executions.transports import ExecutionsGrpcTransport
from google.cloud.run_v2.services.jobs.transports import JobsGrpcTransport
from google.cloud.run_v2.services.tasks.transports import TasksGrpcTransport
from waiting import until

from dispatcher.emulators.cloud_run import CloudRunEmulator

JOB = "projects/p/locations/r/jobs/job"
Overrides = run_v2.RunJobRequest.Overrides


class Cloud:
    """The three clients of one transport."""

    def __init__(self, emulator: CloudRunEmulator, transport: str, channel: Any) -> None:
        self.emulator = emulator
        self.transport = transport
        if transport == "grpc":
            self.jobs = run_v2.JobsClient(transport=JobsGrpcTransport(channel=channel))
            self.executions = run_v2.ExecutionsClient(
                transport=ExecutionsGrpcTransport(channel=channel)
            )
            self.tasks = run_v2.TasksClient(transport=TasksGrpcTransport(channel=channel))
        else:
            options: dict[str, Any] = {
                "credentials": AnonymousCredentials(),  # type: ignore[no-untyped-call]
                "transport": "rest",
                "client_options": {"api_endpoint": emulator.rest_url},
            }
            self.jobs = run_v2.JobsClient(**options)
            self.executions = run_v2.ExecutionsClient(**options)
            self.tasks = run_v2.TasksClient(**options)

    def run(self, job: str = JOB, **overrides: Any) -> run_v2.Execution:
        """Run a job, with overrides for it or for its only container; returns the execution."""
        container = {
            key: overrides.pop(key)
            for key in ("name", "args", "env", "clear_args")
            if key in overrides
        }
        if "env" in container:
            container["env"] = [
                run_v2.EnvVar(name=key, value=value) for key, value in container["env"].items()
            ]
        if container:
            overrides["container_overrides"] = [Overrides.ContainerOverride(**container)]
        request = run_v2.RunJobRequest(name=job)
        if overrides:
            request.overrides = Overrides(**overrides)
        execution: run_v2.Execution = self.jobs.run_job(request, timeout=60).metadata
        return execution

    def finished(self, execution: run_v2.Execution) -> run_v2.Execution:
        """Wait until an execution has completed."""
        ended: run_v2.Execution = eventually(
            lambda: self.executions.get_execution(name=execution.name),
            lambda now: bool(now.completion_time),
        )
        return ended

    def results(self, execution: run_v2.Execution) -> list[run_v2.Task]:
        return list(self.tasks.list_tasks(parent=execution.name))


def eventually(look: Callable[[], Any], holds: Callable[[Any], bool] = bool) -> Any:
    """Look until it holds; returns what was seen then."""
    seen: list[Any] = [None]

    def probe() -> bool:
        seen[0] = look()
        return holds(seen[0])

    try:
        until(probe)
    except pytest.fail.Exception as failed:
        pytest.fail(f"{failed}; seen last: {seen[0]}")
    return seen[0]


class Clouds(Protocol):
    def __call__(self, emulator: CloudRunEmulator, transport: str = "grpc") -> Cloud: ...
