"""What an emulator can be told when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["EmulatorOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatorOptions:
    """Numbers and limits. Quotas are off unless given; None is "no limit"."""

    grpc_port: int = 0
    """Loopback port; 0 for any that is free."""

    rest_port: int = 0

    latency: float = 0.0
    """Seconds that every call takes: half of it before it takes effect, half after."""

    page_size: int = 100
    """Records on a page of a list at most, and by default."""

    retention: int = 1_000
    """Completed executions that are kept per job; the oldest go first (clouds.md §3)."""

    max_running: int | None = None
    """Executions that may run at once in a project and region."""

    max_jobs: int | None = 1_000
    """Jobs that may be there at once in a project and region (clouds.md §3)."""

    max_parallel_tasks: int | None = None
    """Tasks that may run at once, over all executions: the regional capacity."""

    run_per_minute: int | None = None
    """RunJob calls per minute, project and region. The other quotas likewise; see `gate.py`."""

    read_per_minute: int | None = None
    write_per_minute: int | None = None
    logs_per_minute: int | None = None

    start_seconds: float = 0.0
    """How long an execution is pending before its first tasks start."""

    secrets: Mapping[str, str] = field(default_factory=dict)
    """Values of secrets by name, for variables with a `value_source`."""

    seed: int | None = None
    """For names and faults; None for different ones each time."""

    max_log_lines: int = 200_000
    """Lines of output that are kept, over all tasks; the oldest go first."""
