"""A Celery-based dispatch queue: a list of items in, remote container jobs out, all in Postgres.

from dispatcher import Dispatcher

batch = Dispatcher().enqueue("nightly-export", items=["orders", "customers"])
batch.wait()
"""

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
from dispatcher.job import Chunking, ItemSource, Job, Limits, RetryPolicy, SuccessPolicy
from dispatcher.queries import Attempt, Chunk, Event, Output
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
    "ItemSource",
    "Job",
    "Limits",
    "NotAllowed",
    "Outcome",
    "Output",
    "RetryPolicy",
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
