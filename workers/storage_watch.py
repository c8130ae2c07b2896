"""What a worker finds when it looks at the storage: for the rows of the targets that it leads."""

from __future__ import annotations

import re
from typing import Final

import structlog

from dispatcher.engine import Place
from dispatcher.engine.place import plain
from dispatcher.errors import DispatcherError, Unreachable
from dispatcher.storage import Storage
from dispatcher.storing import Told

__all__ = ["StorageWatch"]

log = structlog.get_logger(__name__)

_PROBE: Final = re.compile(r"checks/[0-9a-f-]{36}")


class StorageWatch:
    """Looks at the storage, and keeps what is wrong with it until it was seen to work.

    A look may take as long as the storage takes; nothing waits for it. A storage that does not
    answer says nothing new: that passes, and nobody has to mend it.

    Args:
        storage: The one of this process; None where none is configured.
        signs: Whether a job that is served here gives its tasks signed URLs.
    """

    def __init__(self, storage: Storage | None, *, signs: bool) -> None:
        self._storage = storage
        self._signs = signs
        self._found: tuple[str | None, str | None] = (None, None)

    @property
    def in_order(self) -> bool:
        """Whether nothing is known to be wrong."""
        return self._found == (None, None)

    def told(self, place: Place) -> Told:
        """Say what a target's row is to tell of it."""
        results = place.storage is not None or place.backend.limits.own_results
        if place.storage is None:
            return Told(results, claims=False)
        return Told(results, place.claims is not None, *self._found)

    def look(self) -> bool:
        """Look once; whether something else is wrong now than before."""
        if self._storage is None:
            return False
        before = self._found
        try:
            self._storage.check()
            problem = None
        except Unreachable as error:
            log.warning("the storage does not answer", why=str(error))
            return False
        except DispatcherError as error:
            problem = _said(error)
        self._found = (problem, self._signing(before[1]) if problem is None else None)
        if self._found == before:
            return False
        if self.in_order:
            log.info("the storage can be used again", storage=self._storage.url)
        else:
            log.error("the storage cannot be used", why=problem or self._found[1])
        return True

    def _signing(self, before: str | None) -> str | None:
        """Say what is wrong with URLs that are signed here."""
        if not self._signs or self._storage is None:
            return None
        try:
            self._storage.check_signing()
        except Unreachable as error:
            log.warning("the storage does not answer", why=str(error))
            return before
        except DispatcherError as error:
            return _said(error)
        return None


def _said(error: DispatcherError) -> str:
    """Give the storage's words without the name of this look's probe: the next says the same."""
    return _PROBE.sub("checks/", plain(str(error)))
