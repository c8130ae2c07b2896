"""What lies where in the storage, and the input document of an execution. Pure.

The document says what each task of an execution works on, as one JSON line a task. It is needed
where all tasks of an execution are given one environment, or where the items of a single task are
too large for the launch call. Line *i* belongs to task index *i*, so that a shell finds its own
with `sed -n "$((i + 1))p"`, and one URL, signed or not, serves every task. The same rows give the
same document, to the byte: it is written create-only under the execution's key, and a launch that
is repeated finds its own document there. Only where it holds signed URLs, which run out, each
launch call writes one of its own.
"""

from __future__ import annotations

import json
from typing import Final

from dispatcher.backends.base import BackendLimits, LaunchRequest, TaskInput

__all__ = [
    "DOCUMENT_BYTES",
    "STORED",
    "claim_path",
    "document",
    "input_path",
    "needs_document",
    "result_prefix",
    "tasks_that_fit",
]

DOCUMENT_BYTES: Final = 32 << 20
"""A document is read whole by each of its tasks: packs are cut so that it stays below this."""

_INPUTS: Final = "inputs/"
_RESULTS: Final = "results/"
_CLAIMS: Final = "claims/"
_CHECKS: Final = "checks/"
"""Probes of `Storage.check`, where a process ended before it had removed its own."""

STORED: Final = (_INPUTS, _RESULTS, _CLAIMS, _CHECKS)
"""All that this package puts into the storage, by prefix."""

LINE_BYTES: Final = 256
"""What a line takes beside its items, about, where the job has no templates for each chunk."""


def needs_document(request: LaunchRequest, limits: BackendLimits) -> bool:
    """Say if the tasks learn their input from a document: else it is in each task's environment."""
    if request.wrapped or (len(request.tasks) > 1 and not limits.per_task_env):
        return True
    return any(len(task.items.encode()) > limits.inline_bytes for task in request.tasks)


def document(request: LaunchRequest) -> str:
    """Write the input document of an execution; each line ends with a line feed."""
    return "".join(_line(task, wrapped=request.wrapped) for task in request.tasks)


def tasks_that_fit(request: LaunchRequest, room: int) -> int:
    """Say how many tasks of an execution, the first ones, have a document of so many bytes.

    One at least, whatever its size.
    """
    size = 0
    for place, task in enumerate(request.tasks):
        size += len(_line(task, wrapped=request.wrapped).encode(errors="surrogatepass"))
        if size > room:
            return max(1, place)
    return len(request.tasks)


def input_path(request: LaunchRequest, call: int = 1) -> str:
    """Name the document within the storage.

    One that holds signed URLs is of one launch call: a later call finds URLs in it that no longer
    work, and writes another under the number of that call.
    """
    number = f".{call}" if call > 1 and request.tasks[0].result_uri is not None else ""
    return f"{_INPUTS}{request.batch_id}/{request.key}{number}.jsonl"


def result_prefix(batch_id: str, key: str) -> str:
    """Name the place within the storage where the tasks of an execution write their results."""
    return f"{_RESULTS}{batch_id}/{key}/"


def claim_path(key: str) -> str:
    """Name the object within the storage that makes one execution of a key the only one."""
    return f"{_CLAIMS}{key}"


def _line(task: TaskInput, *, wrapped: bool) -> str:
    # The items are JSON text already. A line feed in them can only be between values.
    items = task.items.replace("\n", " ").replace("\r", " ")
    line = f'{{"chunk":{task.chunk_index},"attempt":{task.attempt}'
    # Before the items, so that a shell can tell it from what stands in an item.
    if task.result_uri is not None:
        line += f',"result_uri":{_json(task.result_uri)}'
    if task.progress_uri is not None:
        line += f',"progress_uri":{_json(task.progress_uri)}'
    line += f',"items":{items}'
    if wrapped:
        line += f',"args":{_json(task.args)},"env":{_json(dict(task.env))}'
    return line + "}\n"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
