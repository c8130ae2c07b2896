"""What one worker process works with: settings, store, engine, waker. Made once, on first use."""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass
from functools import cache

from dispatcher import schema
from dispatcher.config import Config, Settings, load_config, load_settings
from dispatcher.engine import Engine
from dispatcher.errors import ConfigurationError
from dispatcher.store import Store
from dispatcher.wake import Waker

__all__ = ["Runtime", "runtime"]


@dataclass(frozen=True, slots=True)
class Runtime:
    """The parts of a worker process."""

    settings: Settings
    config: Config
    store: Store
    engine: Engine
    waker: Waker


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
        schema.create_engine(settings.database_url, pool_size=settings.pool_size), actor=name
    )
    engine = Engine(
        store,
        config,
        launch_concurrency=settings.launch_concurrency,
        call_window=settings.call_window,
    )
    return Runtime(settings, config, store, engine, Waker(settings.broker_url))
