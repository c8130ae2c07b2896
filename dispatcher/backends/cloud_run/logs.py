"""The last lines that a task wrote, from Cloud Logging: dear reads, made on demand only.

Its quota of reads is low (60 a minute was reported [I]), so one call is made, and one page is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from google.api_core import exceptions as api
from google.cloud.logging_v2 import types
from google.protobuf import json_format

from dispatcher.backends.base import Handle, Meter
from dispatcher.backends.cloud_run.clients import Clients
from dispatcher.backends.cloud_run.failures import CLIENT_ERRORS, at_read, calling
from dispatcher.backends.cloud_run.names import log_filter, read_handle
from dispatcher.backends.cloud_run.options import CloudRunSettings

__all__ = ["last_lines"]

MOST: Final = 1000
"""Entries that one call gives at most [C: ListLogEntriesRequest.page_size]."""

NEWEST_FIRST: Final = "timestamp desc"


def last_lines(
    settings: CloudRunSettings,
    clients: Clients,
    meter: Meter,
    handle: Handle,
    task_index: int,
    tail: int,
) -> list[str]:
    """Read the last lines of a task, oldest first.

    Raises:
        Unavailable: the budget is used up, or they cannot be read.
    """
    name = read_handle(handle)
    if name is None or tail < 1:
        return []
    asked = {
        "resource_names": [f"projects/{name.project}"],
        "filter": log_filter(name, int(task_index)),
        "order_by": NEWEST_FIRST,
        "page_size": min(tail, MOST),
    }
    read = _read_rest if settings.transport == "rest" else _read_grpc
    timeout = settings.call_timeout.total_seconds()
    try:
        ready = clients.session() if settings.transport == "rest" else clients.logging()
    except CLIENT_ERRORS as error:
        raise at_read(error, "cannot speak to Cloud Logging") from error
    try:
        with calling(meter, "logs", f"cannot read the output of {handle}"):
            entries = read(ready, asked, timeout)
    except api.NotFound:
        return []
    lines = [line for entry in reversed(list(entries)) for line in entry.split("\n")]
    return lines[-tail:]


def _read_grpc(client: Any, asked: Mapping[str, Any], timeout: float) -> Iterable[str]:
    pager = client.list_log_entries(
        types.ListLogEntriesRequest(**asked), retry=None, timeout=timeout
    )
    page = types.ListLogEntriesResponse.pb(next(iter(pager.pages)))
    return [_text_of_entry(entry) for entry in page.entries]


def _read_rest(ready: Any, asked: Mapping[str, Any], timeout: float) -> Iterable[str]:
    session, address = ready
    body = {
        "resourceNames": asked["resource_names"],
        "filter": asked["filter"],
        "orderBy": asked["order_by"],
        "pageSize": asked["page_size"],
    }
    response = session.post(f"{address}/v2/entries:list", json=body, timeout=timeout)
    if not response.ok:
        raise api.from_http_response(response)  # type: ignore[no-untyped-call]  # untyped there
    return [_text_of_json(entry) for entry in response.json().get("entries", ())]


def _text_of_entry(entry: Any) -> str:
    kind = entry.WhichOneof("payload")
    if kind == "text_payload":
        text: str = entry.text_payload
        return text.rstrip("\n")
    if kind == "json_payload":
        return _text_of_payload(json_format.MessageToDict(entry.json_payload))
    return ""


def _text_of_json(entry: Mapping[str, Any]) -> str:
    if "textPayload" in entry:
        return str(entry["textPayload"]).rstrip("\n")
    return _text_of_payload(entry.get("jsonPayload", {}))


def _text_of_payload(payload: Mapping[str, Any]) -> str:
    """Write what a container logged as JSON: its message alone, if it has nothing else."""
    if set(payload) == {"message"}:
        return str(payload["message"])
    return json.dumps(payload, ensure_ascii=False) if payload else ""
