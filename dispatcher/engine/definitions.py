"""What the providers' own definitions fix, read outside of every transaction and remembered."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Final

import structlog

from dispatcher.backends.base import Backend, Definition, Rejected, Unavailable
from dispatcher.pausing import Pause
from dispatcher.requests import Plan

__all__ = ["Definitions"]

log = structlog.get_logger(__name__)

REMEMBERED: Final = 300.0
"""Seconds for which a definition is taken to be as it was read."""

LONGEST_PAUSE: Final = 60.0
"""Seconds between two tries to read one that cannot be read, at most."""


class Definitions:
    """The definitions that the jobs of one target name.

    Whoever needs one that has not been read goes without it in this turn; `read` reads it then, and
    the next turn has it.
    """

    def __init__(self, backend: Backend, monotonic: Callable[[], float]) -> None:
        self._backend = backend
        self._monotonic = monotonic
        self._known: dict[str, tuple[Definition, float]] = {}
        self._wanted: dict[str, Plan] = {}
        self._pause = Pause(LONGEST_PAUSE)
        self._broken: dict[str, Pause] = {}
        """Those whose reading met a fault of ours: they keep no other from being read."""

        self._lock = Lock()

    def under(self, plan: Plan) -> Plan | None:
        """Read a plan under its definition; None if that must be read first.

        An old reading serves while the new one is awaited.
        """
        with self._lock:
            known = self._known.get(plan.definition_key)
            if known is None or self._monotonic() - known[1] > REMEMBERED:
                self._wanted[plan.definition_key] = plan
        return None if known is None else plan.under(known[0])

    def read(self) -> bool:
        """Read what was wanted; whether anything new is known.

        After a failure nothing is read for a while, and what is wanted stays so.

        Raises:
            Unavailable: the provider cannot be asked now; what was wanted still is.
        """
        with self._lock:
            if self._pause.lasts(self._monotonic()):
                return False
            now = self._monotonic()
            wanted = {
                key: plan
                for key, plan in self._wanted.items()
                if key not in self._broken or not self._broken[key].lasts(now)
            }
        read = False
        for key, plan in wanted.items():
            try:
                found = self._backend.definition(plan.options)
            except Unavailable as error:
                with self._lock:
                    self._leave_alone(error)
                raise
            except Rejected as error:
                log.warning("definition cannot be read", job=plan.job.name, why=str(error))
                # What it was goes on to count; if nothing is known, the launch will be refused too.
                with self._lock:
                    known = self._known.get(key)
                found = Definition() if known is None else known[0]
            except Exception:
                log.exception("definition cannot be read; asked again", job=plan.job.name)
                with self._lock:
                    pause = self._broken.setdefault(key, Pause(LONGEST_PAUSE))
                    pause.failed(self._monotonic())
                continue
            read = True
            with self._lock:
                self._known[key] = (found, self._monotonic())
                self._wanted.pop(key, None)
                self._broken.pop(key, None)
                self._pause.answered()
        return read

    def _leave_alone(self, error: Unavailable) -> None:
        """Ask again later, and the later the longer nobody answers."""
        if error.not_started:  # it does answer, or was not asked: the budget was used up
            seconds = error.retry_after.total_seconds() if error.retry_after else 1.0
            self._pause.asked(self._monotonic(), seconds)
        else:
            self._pause.failed(self._monotonic())
