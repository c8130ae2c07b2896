"""Long-running operations: those of executions, which end with them, and those done at once."""

from __future__ import annotations

import uuid
from typing import Any

from dispatcher.emulators.cloud_run.messages import Operation
from dispatcher.emulators.cloud_run.records import ExecutionRecord
from dispatcher.emulators.cloud_run.refusal import Code, Refused
from dispatcher.emulators.cloud_run.rendering import operation_message

__all__ = ["Operations", "new_name"]


def new_name(location: str) -> str:
    """Make the name of a new operation in `projects/…/locations/…`."""
    return f"{location}/operations/{uuid.uuid4()}"


class Operations:
    """Every operation by its name. To be used with the world's lock held."""

    def __init__(self) -> None:
        self._operations: dict[str, ExecutionRecord | Any] = {}

    def follow(self, execution: ExecutionRecord) -> None:
        """Keep the operation of an execution that has just started."""
        self._operations[execution.operation] = execution

    def finished(self, location: str, response: Any) -> Any:
        """Make an operation that is done, and keep it (guess: job_operations)."""
        operation = Operation(name=new_name(location), done=True)
        operation.metadata.Pack(response)
        operation.response.Pack(response)
        self._operations[operation.name] = operation
        return operation

    def get(self, name: str, skew: float) -> Any:
        """Show an operation as it is now.

        Raises:
            Refused: there is none of that name (google/longrunning/operations.proto).
        """
        operation = self._operations.get(name)
        if operation is None:
            raise Refused(Code.NOT_FOUND, f"Operation '{name}' does not exist.")
        if isinstance(operation, ExecutionRecord):
            return operation_message(operation, skew)
        return operation

    def names(self, location: str) -> list[str]:
        """Return the names of a location's operations, newest first."""
        prefix = f"{location}/operations/"
        return [name for name in reversed(self._operations) if name.startswith(prefix)]

    def delete(self, name: str) -> None:
        """Forget an operation; what it is about goes on."""
        self.get(name, 0.0)
        del self._operations[name]
