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

SILENT: Final = 2
"""Definitions in a row that get no answer, after which no other is asked for: each may take as long
as a call may."""


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
        """Those that could not be read, each with a pause: they keep no other from being read."""

        self._lock = Lock()

    @property
    def answered(self) -> bool:
        """Whether any was ever read: then the provider answers for some at least."""
        return bool(self._known)

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

        One that cannot be read is left alone for a while and keeps no other from being read, unless
        the provider seems to answer for none. What is wanted stays so.

        Raises:
            Unavailable: the provider gave no answer for some, or cannot be asked now; what it did
                answer is known.
        """
        now = self._monotonic()
        with self._lock:
            if self._pause.lasts(now):
                return False
            wanted = {
                key: plan
                for key, plan in self._wanted.items()
                if key not in self._broken or not self._broken[key].lasts(now)
            }
        read, in_a_row = False, 0
        unread: Unavailable | None = None
        for key, plan in wanted.items():
            try:
                found = self._backend.definition(plan.options)
            except Unavailable as error:
                unread, in_a_row = error, in_a_row + 1
                nobody = error.not_started or in_a_row == SILENT
                self._leave_alone(key, plan, error, nobody=nobody)
                if nobody:
                    break
                continue
            except Rejected as error:
                log.warning("definition cannot be read", job=plan.job.name, why=str(error))
                # What it was goes on to count; if nothing is known, the launch will be refused too.
                with self._lock:
                    known = self._known.get(key)
                found = Definition() if known is None else known[0]
            except Exception:
                log.exception("definition cannot be read; asked again", job=plan.job.name)
                with self._lock:
                    self._put_off(key)
                continue
            read, in_a_row = True, 0
            with self._lock:
                self._known[key] = (found, self._monotonic())
                self._wanted.pop(key, None)
                self._broken.pop(key, None)
                self._pause.answered()
        if unread is not None:
            raise unread
        return read

    def _put_off(self, key: str) -> None:
        """Ask again later for one that cannot be read, and the later the longer that is so."""
        self._broken.setdefault(key, Pause(LONGEST_PAUSE)).failed(self._monotonic())

    def _leave_alone(self, key: str, plan: Plan, error: Unavailable, *, nobody: bool) -> None:
        """Ask again later for one that got no answer, after the others; or for all of them."""
        with self._lock:
            self._wanted.pop(key, None)
            self._wanted[key] = plan
            if error.not_started:  # it does answer, or was not asked: the budget was used up
                seconds = error.retry_after.total_seconds() if error.retry_after else 1.0
                self._pause.asked(self._monotonic(), seconds)
                return
            self._put_off(key)
            if nobody:
                self._pause.failed(self._monotonic())
