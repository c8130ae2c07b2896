"""A Celery-based dispatch queue: a list of items in, remote container jobs out, all in Postgres.

from dispatcher import Dispatcher

batch = Dispatcher().enqueue("nightly-export", items=["orders", "customers"])
batch.wait()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dispatcher.client import Batch, Dispatcher
    from dispatcher.config import Config, Settings, Target, load_config, load_settings
    from dispatcher.errors import (
        ConfigurationError,
        DispatcherError,
        IdempotencyConflict,
        InvalidInput,
        InvalidItems,
        NotAllowed,
        SchemaMismatch,
        UnknownBatch,
        UnknownJob,
        Unreachable,
        WaitTimeout,
    )
    from dispatcher.job import (
        Chunking,
        ItemSource,
        Job,
        Limits,
        Overrides,
        RetryPolicy,
        SuccessPolicy,
    )
    from dispatcher.queries import Attempt, Chunk, Event
    from dispatcher.results import Item, ItemState, Output
    from dispatcher.schedule import Schedule
    from dispatcher.states import BatchState, ChunkState, ExecutionState, Outcome

__all__ = [
    "Attempt",
    "Batch",
    "BatchState",
    "Chunk",
    "ChunkState",
    "Chunking",
    "Config",
    "ConfigurationError",
    "Dispatcher",
    "DispatcherError",
    "Event",
    "ExecutionState",
    "IdempotencyConflict",
    "InvalidInput",
    "InvalidItems",
    "Item",
    "ItemSource",
    "ItemState",
    "Job",
    "Limits",
    "NotAllowed",
    "Outcome",
    "Output",
    "Overrides",
    "RetryPolicy",
    "Schedule",
    "SchemaMismatch",
    "Settings",
    "SuccessPolicy",
    "Target",
    "UnknownBatch",
    "UnknownJob",
    "Unreachable",
    "WaitTimeout",
    "load_config",
    "load_settings",
]

_HOMES = {
    "Attempt": "dispatcher.queries",
    "Batch": "dispatcher.client",
    "BatchState": "dispatcher.states",
    "Chunk": "dispatcher.queries",
    "ChunkState": "dispatcher.states",
    "Chunking": "dispatcher.job",
    "Config": "dispatcher.config",
    "ConfigurationError": "dispatcher.errors",
    "Dispatcher": "dispatcher.client",
    "DispatcherError": "dispatcher.errors",
    "Event": "dispatcher.queries",
    "ExecutionState": "dispatcher.states",
    "IdempotencyConflict": "dispatcher.errors",
    "InvalidInput": "dispatcher.errors",
    "InvalidItems": "dispatcher.errors",
    "ItemSource": "dispatcher.job",
    "Job": "dispatcher.job",
    "Limits": "dispatcher.job",
    "NotAllowed": "dispatcher.errors",
    "Outcome": "dispatcher.states",
    "Item": "dispatcher.results",
    "ItemState": "dispatcher.results",
    "Output": "dispatcher.results",
    "Overrides": "dispatcher.job",
    "RetryPolicy": "dispatcher.job",
    "Schedule": "dispatcher.schedule",
    "SchemaMismatch": "dispatcher.errors",
    "Settings": "dispatcher.config",
    "SuccessPolicy": "dispatcher.job",
    "Target": "dispatcher.config",
    "UnknownBatch": "dispatcher.errors",
    "UnknownJob": "dispatcher.errors",
    "Unreachable": "dispatcher.errors",
    "WaitTimeout": "dispatcher.errors",
    "load_config": "dispatcher.config",
    "load_settings": "dispatcher.config",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the CLI and item sources need few of them."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
