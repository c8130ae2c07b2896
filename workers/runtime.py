"""What one worker process works with: settings, store, engine, waker. Made once, on first use."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from threading import Lock

from dispatcher import schema
from dispatcher.config import Config, Settings, load_config, load_settings
from dispatcher.engine import Engine
from dispatcher.errors import ConfigurationError
from dispatcher.storage import Storage
from dispatcher.store import Store
from dispatcher.wake import Waker

__all__ = ["AtWork", "Runtime", "runtime"]


class AtWork:
    """What threads of this process are busy with, so that none begins what another one does.

    It saves them the way to the database, where an advisory lock keeps it from being done twice.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._ids: set[str] = set()

    @contextmanager
    def on(self, name: str) -> Iterator[bool]:
        """Be busy with something to the end of the block; False if another thread is."""
        with self._lock:
            free = name not in self._ids
            self._ids.add(name)
        try:
            yield free
        finally:
            if free:
                with self._lock:
                    self._ids.discard(name)


@dataclass(frozen=True, slots=True)
class Runtime:
    """The parts of a worker process."""

    settings: Settings
    config: Config
    store: Store
    engine: Engine
    waker: Waker
    planning: AtWork = field(default_factory=AtWork)
    """The batches that this process plans."""


@cache
def runtime() -> Runtime:
    """Make the parts from the settings.

    Raises:
        ConfigurationError: a setting or the file of jobs and targets cannot be used.
    """
    settings = load_settings()
    if settings.jobs is None:
        raise ConfigurationError(
            "a worker needs to know the targets: set DISPATCHER_JOBS to a YAML file or a module"
        )
    config = load_config(settings.jobs)
    # Random at the end, as a container's process often has the same host name and pid again.
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    store = Store(
        schema.create_engine(settings.database_url, pool_size=settings.pool_size, worker=True),
        actor=name,
    )
    engine = Engine(
        store,
        config,
        launch_concurrency=settings.launch_concurrency,
        call_window=settings.call_window,
        storage=None if settings.storage_url is None else Storage(settings.storage_url),
        storage_keep=settings.storage_keep,
    )
    return Runtime(settings, config, store, engine, Waker(settings.broker_url))
