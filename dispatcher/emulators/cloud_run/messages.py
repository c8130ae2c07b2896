"""The protobuf classes of the real client libraries, and how to fill their times.

The only module that imports Google's packages for messages. The bare protobuf classes are used, and
not their proto-plus wrappers, which are several times slower; on the wire they are the same.
"""

from __future__ import annotations

from typing import Any, Final

from google.cloud import run_v2
from google.cloud.logging_v2.types import ListLogEntriesRequest as _ListLogEntriesRequest
from google.cloud.logging_v2.types import ListLogEntriesResponse as _ListLogEntriesResponse
from google.cloud.logging_v2.types import LogEntry as _LogEntry
from google.iam.v1 import iam_policy_pb2
from google.longrunning import operations_pb2
from google.protobuf import empty_pb2, json_format
from google.rpc import error_details_pb2, status_pb2

__all__ = [
    "CancelExecutionRequest",
    "Condition",
    "CreateJobRequest",
    "DeleteExecutionRequest",
    "DeleteJobRequest",
    "DeleteOperationRequest",
    "Empty",
    "EnvVar",
    "ErrorInfo",
    "Execution",
    "ExecutionReference",
    "GetExecutionRequest",
    "GetJobRequest",
    "GetOperationRequest",
    "GetTaskRequest",
    "Job",
    "ListExecutionsRequest",
    "ListExecutionsResponse",
    "ListJobsRequest",
    "ListJobsResponse",
    "ListLogEntriesRequest",
    "ListLogEntriesResponse",
    "ListOperationsRequest",
    "ListOperationsResponse",
    "ListTasksRequest",
    "ListTasksResponse",
    "LogEntry",
    "Operation",
    "RunJobRequest",
    "Status",
    "Task",
    "TaskTemplate",
    "TestIamPermissionsRequest",
    "TestIamPermissionsResponse",
    "UpdateJobRequest",
    "WaitOperationRequest",
    "json_format",
    "seconds_of",
    "set_seconds",
    "stamp",
]

Job: Final[Any] = run_v2.Job.pb()
Execution: Final[Any] = run_v2.Execution.pb()
ExecutionReference: Final[Any] = run_v2.ExecutionReference.pb()
Task: Final[Any] = run_v2.Task.pb()
TaskTemplate: Final[Any] = run_v2.TaskTemplate.pb()
Condition: Final[Any] = run_v2.Condition.pb()
EnvVar: Final[Any] = run_v2.EnvVar.pb()

CreateJobRequest: Final[Any] = run_v2.CreateJobRequest.pb()
GetJobRequest: Final[Any] = run_v2.GetJobRequest.pb()
ListJobsRequest: Final[Any] = run_v2.ListJobsRequest.pb()
ListJobsResponse: Final[Any] = run_v2.ListJobsResponse.pb()
UpdateJobRequest: Final[Any] = run_v2.UpdateJobRequest.pb()
DeleteJobRequest: Final[Any] = run_v2.DeleteJobRequest.pb()
RunJobRequest: Final[Any] = run_v2.RunJobRequest.pb()
GetExecutionRequest: Final[Any] = run_v2.GetExecutionRequest.pb()
ListExecutionsRequest: Final[Any] = run_v2.ListExecutionsRequest.pb()
ListExecutionsResponse: Final[Any] = run_v2.ListExecutionsResponse.pb()
CancelExecutionRequest: Final[Any] = run_v2.CancelExecutionRequest.pb()
DeleteExecutionRequest: Final[Any] = run_v2.DeleteExecutionRequest.pb()
GetTaskRequest: Final[Any] = run_v2.GetTaskRequest.pb()
ListTasksRequest: Final[Any] = run_v2.ListTasksRequest.pb()
ListTasksResponse: Final[Any] = run_v2.ListTasksResponse.pb()

LogEntry: Final[Any] = _LogEntry.pb()
ListLogEntriesRequest: Final[Any] = _ListLogEntriesRequest.pb()
ListLogEntriesResponse: Final[Any] = _ListLogEntriesResponse.pb()

TestIamPermissionsRequest: Final[Any] = iam_policy_pb2.TestIamPermissionsRequest
TestIamPermissionsResponse: Final[Any] = iam_policy_pb2.TestIamPermissionsResponse

Operation: Final[Any] = operations_pb2.Operation
GetOperationRequest: Final[Any] = operations_pb2.GetOperationRequest
ListOperationsRequest: Final[Any] = operations_pb2.ListOperationsRequest
ListOperationsResponse: Final[Any] = operations_pb2.ListOperationsResponse
WaitOperationRequest: Final[Any] = operations_pb2.WaitOperationRequest
DeleteOperationRequest: Final[Any] = operations_pb2.DeleteOperationRequest

Empty: Final[Any] = empty_pb2.Empty
Status: Final[Any] = status_pb2.Status
ErrorInfo: Final[Any] = error_details_pb2.ErrorInfo

NANOS: Final = 1_000_000_000


def stamp(field: Any, moment: float | None, skew: float = 0.0) -> None:
    """Set a Timestamp field to seconds since 1970; None leaves it unset."""
    if moment is not None:
        set_seconds(field, moment + skew)


def set_seconds(field: Any, seconds: float) -> None:
    """Set a Timestamp or Duration field, to the microsecond."""
    whole = int(seconds // 1)
    field.seconds = whole
    field.nanos = min(round((seconds - whole) * 1e6) * 1000, NANOS - 1000)


def seconds_of(field: Any) -> float:
    """Read a Timestamp or Duration field as seconds."""
    return float(field.seconds) + float(field.nanos) / NANOS
