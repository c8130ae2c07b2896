"""The Celery application: `celery -A workers.app worker`, `beat`, `flower`.

Starting a worker starts its clock; SIGTERM ends the process within a few seconds whatever is open,
because nothing that is open needs this process.
"""

from __future__ import annotations

import os
import threading
from typing import Any, Final

import structlog
from celery import Celery, bootsteps
from celery.signals import setup_logging, worker_shutting_down

from dispatcher.config import load_settings
from dispatcher.errors import DispatcherError
from dispatcher.logs import configure
from dispatcher.settings import misspelt_variables
from dispatcher.wake import SWEEP, celery_settings
from workers.clock import Clock
from workers.runtime import runtime

__all__ = ["app"]

log = structlog.get_logger(__name__)

HARD_EXIT_AFTER: Final = 4.0
"""Seconds from SIGTERM until the process ends, whatever is open."""

SWEEP_EVERY: Final = 5.0


def _settings_or_exit() -> Any:
    """Read the settings; a wrong one ends the process with a sentence and not with a traceback."""
    try:
        return load_settings()
    except DispatcherError as error:
        raise SystemExit(f"dispatcher: {error}") from error


settings = _settings_or_exit()
app = Celery("workers", include=["workers.tasks"])
app.conf.update(celery_settings(settings.broker_url))
app.conf.update(
    worker_pool="threads",
    worker_concurrency=4,
    beat_schedule={"sweep": {"task": SWEEP, "schedule": SWEEP_EVERY}},
)


@setup_logging.connect  # type: ignore[untyped-decorator]  # celery ships no types
def set_up_logging(**_: Any) -> None:
    """Log in our form; Celery keeps its hands off."""
    configure(settings.level, settings.log_format)
    for line in misspelt_variables():
        log.warning("setting_ignored", why=line)


class ClockStep(bootsteps.StartStopStep):  # type: ignore[misc]  # celery ships no types
    """Runs the clock beside the pool, for the life of the worker and not of its connection."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        self.clock: Clock | None = None
        super().__init__(parent, **kwargs)

    def start(self, _parent: Any) -> None:
        """Make the engine and start the clock."""
        try:
            self.clock = Clock(runtime())
        except DispatcherError as error:
            log.critical("this worker cannot start", why=str(error))
            os._exit(78)
        worker_shutting_down.connect(self._shut_down, weak=False)
        self.clock.start()

    def stop(self, _parent: Any) -> None:
        """Stop the clock and give the leases back."""
        if self.clock is not None:
            self.clock.stop()

    terminate = stop

    def _shut_down(self, **_: Any) -> None:
        """Begin to stop at the signal, and make sure of the end."""
        timer = threading.Timer(HARD_EXIT_AFTER, os._exit, args=(0,))
        timer.daemon = True
        timer.start()
        if self.clock is not None:
            threading.Thread(target=self.clock.stop, name="stop-clock", daemon=True).start()


app.steps["worker"].add(ClockStep)
