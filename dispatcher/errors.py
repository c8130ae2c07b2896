"""Every error that this package raises on purpose, and what its reader does next.

    DispatcherError
    ├── InvalidInput             what the caller gave is wrong: mend it and call again
    │   ├── ConfigurationError   a setting, or the file of jobs and targets
    │   ├── UnknownJob           no job of that name is configured
    │   ├── InvalidItems         the items cannot be read, or one of them cannot be used
    │   ├── IdempotencyConflict  the key belongs to another request
    │   └── UnknownBatch         no batch (or more than one) has this id or prefix
    ├── NotAllowed               the thing is in a state in which that cannot be done
    ├── Unreachable              Postgres, the broker or a provider does not answer: try again
    ├── SchemaMismatch           the database is behind or ahead of this code
    └── WaitTimeout              `wait` gave up; the batch goes on

A class exists only where a caller does something different for it. Every message says what was
wrong, the value, what is allowed, and where to mend it.
"""

from __future__ import annotations

__all__ = [
    "ConfigurationError",
    "DispatcherError",
    "IdempotencyConflict",
    "InvalidInput",
    "InvalidItems",
    "NotAllowed",
    "SchemaMismatch",
    "UnknownBatch",
    "UnknownJob",
    "Unreachable",
    "WaitTimeout",
]


class DispatcherError(Exception):
    """The root of every error raised on purpose; its text is meant for people."""


class InvalidInput(DispatcherError, ValueError):
    """What the caller gave is wrong. Nothing was written; mend it and call again."""


class ConfigurationError(InvalidInput):
    """A setting, or the file of jobs, targets and schedules, cannot be used."""


class UnknownJob(InvalidInput):
    """No job of that name is configured."""


class InvalidItems(InvalidInput):
    """The items cannot be read, or one of them cannot be used."""


class IdempotencyConflict(InvalidInput):
    """The idempotency key already belongs to a different request."""


class UnknownBatch(InvalidInput):
    """No batch, or more than one, has this id or prefix."""


class NotAllowed(DispatcherError):
    """The batch or chunk is in a state in which that cannot be done."""


class Unreachable(DispatcherError, ConnectionError):
    """A server does not answer. Nothing is known to be wrong with the request: try again."""


class SchemaMismatch(DispatcherError):
    """The tables in the database are older or newer than this code can use."""


class WaitTimeout(DispatcherError, TimeoutError):
    """`wait` gave up before the batch ended; the batch itself goes on."""
