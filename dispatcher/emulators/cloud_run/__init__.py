"""An emulator of Cloud Run Jobs for the real client library, over gRPC and REST.

One world in memory behind both: jobs, executions, tasks, operations and what tasks wrote. Tasks run
as local processes (`ProcessRunner`), as containers of a local engine (`ContainerRunner`) or as a
script says (`ScriptRunner`); `faults` has what can go wrong. Needs the extra `cloud-run`.
"""

from __future__ import annotations

from dispatcher.emulators.cloud_run.emulator import CloudRunEmulator
from dispatcher.emulators.cloud_run.gate import Call
from dispatcher.emulators.cloud_run.guesses import GUESSES
from dispatcher.emulators.cloud_run.options import EmulatorOptions
from dispatcher.emulators.cloud_run.refusal import Code, Refused
from dispatcher.emulators.cloud_run.scripted import Script, ScriptRunner
from dispatcher.emulators.cloud_run.tasks import Line, TaskEnd, TaskStart
from dispatcher.emulators.cloud_run.world import World

__all__ = [
    "GUESSES",
    "Call",
    "CloudRunEmulator",
    "Code",
    "EmulatorOptions",
    "Line",
    "Refused",
    "Script",
    "ScriptRunner",
    "TaskEnd",
    "TaskStart",
    "World",
]
