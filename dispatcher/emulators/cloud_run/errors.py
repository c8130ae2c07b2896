"""A refusal as Google writes it: a `google.rpc.Status` with an ErrorInfo, and its JSON."""

from __future__ import annotations

from typing import Any

from dispatcher.emulators.cloud_run.messages import ErrorInfo, Status, json_format
from dispatcher.emulators.cloud_run.refusal import HTTP_STATUS, Refused

__all__ = ["error_body", "status_of"]


def status_of(refused: Refused) -> Any:
    """Make the Status."""
    status = Status(code=refused.code, message=refused.message)
    if refused.reason:
        info = ErrorInfo(reason=refused.reason, domain="googleapis.com", metadata=refused.metadata)
        status.details.add().Pack(info)
    return status


def error_body(refused: Refused) -> dict[str, Any]:
    """Make the body of an error over HTTP."""
    details = json_format.MessageToDict(status_of(refused)).get("details", [])
    error = {
        "code": HTTP_STATUS[refused.code],
        "message": refused.message,
        "status": refused.code.name,
    }
    if details:
        error["details"] = details
    return {"error": error}
