"""Claims: which of two executions of one key does the work, where a provider cannot keep it to one.

The first task that starts creates the claim, with its execution's name; the tasks of a double leave
with `CLAIM_LOST` and have done nothing. Losing is no outcome: the winner is followed instead.
"""

from __future__ import annotations

from typing import Final

import structlog

from dispatcher.backends.base import CLAIM_LOST, Handle, Report
from dispatcher.documents import claim_path
from dispatcher.engine.place import Place
from dispatcher.store import Store

__all__ = ["Claims"]

log = structlog.get_logger(__name__)

NAME_BYTES: Final = 4096


class Claims:
    """Looks up who won, and has the engine follow that one."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def winner(self, place: Place, key: str, handle: Handle) -> Handle | None:
        """Name the execution that has claimed a key; None if nobody has.

        Raises:
            Unreachable: the storage does not answer.
            StorageRefused: it refuses.
        """
        if place.storage is None or place.backend.limits.relaunch_safe:
            return None
        name = place.storage.read(claim_path(key), NAME_BYTES)
        if name is None:
            return None
        return place.backend.winner(handle, name.decode(errors="replace").strip())

    def decide(self, place: Place, key: str, handle: Handle) -> Handle | None:
        """Name the execution that does the work of a key, before a double of it is stopped.

        If nobody has claimed it yet, the one that is followed is given it: or else the double could
        win while it is being stopped, and the other one would leave for its sake.

        Raises:
            Unreachable: the storage does not answer.
            StorageRefused: it refuses.
        """
        name = handle.rpartition("/")[2]  # as `dispatcher.container` writes it
        if (
            place.storage is not None
            and not place.backend.limits.relaunch_safe
            and place.backend.winner(handle, name) == handle
        ):
            place.storage.create(claim_path(key), name.encode())
        return self.winner(place, key, handle)

    def lost(self, place: Place, report: Report) -> bool:
        """Say if a report may be that of a double: a task of it found the claim taken."""
        if place.storage is None or place.backend.limits.relaunch_safe:
            return False
        return any(task.exit_code == CLAIM_LOST for task in report.tasks)

    def follow(self, place: Place, execution_id: int, handle: Handle) -> bool:
        """Follow the winner instead of a double; whether there is another one to follow.

        Raises:
            Unreachable: the storage does not answer.
            StorageRefused: it refuses.
        """
        (row,) = self._store.executions([execution_id]) or (None,)
        if row is None:
            return False
        winner = self.winner(place, row.key, handle)
        if winner is None or winner == handle:
            return False
        reason = f"the claim belongs to {winner}, and {handle} has done nothing"
        log.warning("double", key=row.key, winner=winner, loser=handle)
        return self._store.follow_winner(row.key, handle, winner, reason)
