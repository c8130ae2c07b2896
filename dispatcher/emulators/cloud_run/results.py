"""How an attempt ended, in the words of the API: a function of its end and of what stopped it."""

from __future__ import annotations

from typing import Final

from dispatcher.emulators.cloud_run.records import AttemptResult, Stop
from dispatcher.emulators.cloud_run.refusal import Code
from dispatcher.emulators.cloud_run.tasks import TaskEnd

__all__ = ["EXIT_MESSAGE", "SIGKILL", "SIGTERM", "TIMEOUT_MESSAGE", "attempt_result"]

SIGTERM: Final = 15
SIGKILL: Final = 9

TIMEOUT_MESSAGE: Final = "The configured timeout was reached."
"""clouds.md §3."""

EXIT_MESSAGE: Final = "The container exited with an error."
"""clouds.md §3."""

MEMORY_MESSAGE: Final = (
    "Memory limit of {limit} exceeded. Consider increasing the memory limit, see "
    "https://cloud.google.com/run/docs/configuring/memory-limits"
)
"""vendor: configuring/memory-limits; guess: memory_message."""


def attempt_result(end: TaskEnd, stop: Stop | None, memory: str) -> AttemptResult:
    """Say how an attempt ended; `memory` is the limit of its container.

    clouds.md §3 for code, exit code and signal; guess: task_status_codes, killed_is_failed.
    """
    code = None if end.term_signal is not None else end.exit_code
    if stop is Stop.CANCEL:
        return AttemptResult(Code.CANCELLED, "The task was cancelled.", code, end.term_signal)
    if stop is Stop.TIMEOUT:
        return AttemptResult(Code.DEADLINE_EXCEEDED, TIMEOUT_MESSAGE, code, end.term_signal)
    if end.problem:
        return AttemptResult(Code.INTERNAL, end.problem, missing_image=end.missing_image)
    return _by_itself(end, memory)


def _by_itself(end: TaskEnd, memory: str) -> AttemptResult:
    if end.out_of_memory:
        text = MEMORY_MESSAGE.format(limit=memory)
        return AttemptResult(Code.RESOURCE_EXHAUSTED, text, None, SIGKILL)
    if end.term_signal is not None:
        text = f"The container terminated on signal {end.term_signal}."
        return AttemptResult(Code.ABORTED, text, None, end.term_signal)
    if end.exit_code:
        return AttemptResult(Code.ABORTED, EXIT_MESSAGE, end.exit_code)
    return AttemptResult(Code.OK, "", 0)
