"""Claims: which of two executions of one key does the work, where a provider cannot keep it to one.

The first task that starts creates the claim, with its execution's name; the tasks of a double leave
with `CLAIM_LOST` and have done nothing. Losing is no outcome: the winner is followed instead.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Final

import structlog

from dispatcher.backends.base import CLAIM_LOST, Handle, Launched, Report
from dispatcher.documents import claim_path
from dispatcher.engine.place import Place
from dispatcher.errors import Unreachable
from dispatcher.states import ExecutionState, Outcome
from dispatcher.storage import StorageRefused
from dispatcher.store import Store

__all__ = ["Claims"]

log = structlog.get_logger(__name__)

NAME_BYTES: Final = 4096
NOBODY: Final = b"nobody"
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""What platforms call executions."""


class Claims:
    """Looks up who won, and has the engine follow that one."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def winner(self, place: Place, key: str, handle: Handle) -> Handle | None:
        """Name the execution that has claimed a key; None if nobody has.

        Raises:
            Unreachable: the storage does not answer.
        """
        name = self._holder(place, key)
        return None if name is None else place.backend.winner(handle, name)

    def begun(self, place: Place, key: str) -> bool:
        """Whether an execution that nobody can find has begun the work of a key.

        If not, none does so any more: the claim is nobody's from now on.

        Raises:
            Unreachable: the storage does not answer.
        """
        self._give(place, key, NOBODY)
        return self._holder(place, key) not in {None, NOBODY.decode()}

    def _holder(self, place: Place, key: str) -> str | None:
        """Read the name that has claimed a key; None if there is none.

        What is no name of an execution is no claim: a container may write anything.

        Raises:
            Unreachable: the storage does not answer.
        """
        if place.claims is None:
            return None
        try:
            data = place.claims.read(claim_path(key), NAME_BYTES)
        except StorageRefused as error:
            log.warning("a claim cannot be read", key=key, why=str(error))
            return None
        name = "" if data is None else data.decode(errors="replace").strip()
        return name if NAME.fullmatch(name) else None

    def decide(self, place: Place, key: str, handle: Handle) -> Handle | None:
        """Name the execution that does the work of a key, before a double of it is stopped.

        If nobody has claimed it yet, the one that is followed is given it: or else the double could
        win while it is being stopped, and the other one would leave for its sake.

        Raises:
            Unreachable: the storage does not answer.
        """
        name = handle.rpartition("/")[2]  # as `dispatcher.container` writes it
        if place.backend.winner(handle, name) == handle:
            self._give(place, key, name.encode())
        return self.winner(place, key, handle)

    def sort_out(self, place: Place, found: Sequence[Launched], reason: str) -> None:
        """Stop what runs and belongs to no open execution: it is a stray.

        Not so what is followed under that key, or what has the claim of it: that one is followed
        from now on, and the other one is a stray when it is found.
        """
        known = self._store.known_keys([one.key for one in found])
        lag = place.backend.limits.find_grace.total_seconds()
        for one in found:
            state, handle, ended_for = known.get(one.key, (ExecutionState.ENDED, None, None))
            if state != ExecutionState.ENDED and handle in (None, one.handle):
                continue  # it is the one, or its launch is still being found out
            if handle == one.handle and ended_for is not None and ended_for < lag:
                continue  # the list may lag; what does run on is found again
            try:
                followed = self._follows(place, one, state, handle, reason)
            except Unreachable as error:
                # Left alone until that can be found out, and found again.
                log.warning("a claim cannot be read now", key=one.key, why=str(error))
                continue
            if not followed and self._store.record_stray(place.target.name, one, reason):
                log.warning("stray", target=place.target.name, handle=one.handle)

    def _follows(
        self, place: Place, found: Launched, state: str, handle: Handle | None, reason: str
    ) -> bool:
        """Follow an execution that is not the recorded one of its key, if it has the claim.

        Raises:
            Unreachable: the storage does not answer.
        """
        if handle == found.handle:
            return False  # it has ended in the rows, and runs on
        if state == ExecutionState.ENDED or handle is None:
            # What has not begun shall not begin any more.
            self._give(place, found.key, NOBODY)
            return False
        if self.decide(place, found.key, handle) != found.handle:
            return False
        log.warning("double", key=found.key, winner=found.handle, loser=handle)
        why = f"the claim belongs to {found.handle}, and {handle} does nothing: {reason}"
        if self._store.follow_winner(found.key, handle, found.handle, why):
            place.watch.forget_handle(handle)
        return True

    def _give(self, place: Place, key: str, name: bytes) -> None:
        """Make the claim of a key for somebody, if there is none yet.

        Raises:
            Unreachable: the storage does not answer.
        """
        if place.claims is None:
            return
        try:
            place.claims.create(claim_path(key), name)
        except StorageRefused as error:
            log.warning("a claim cannot be made", key=key, why=str(error))

    def may_be_double(
        self, place: Place, report: Report, calls: int, settled: Collection[int]
    ) -> bool:
        """Say if a report may be that of a double: then it must be known who has the claim.

        A task that found the claim taken says so by its exit code. One that could not read it, or
        never ran, ends in other ways.
        """
        if place.claims is None:
            return False
        return any(
            task.exit_code == CLAIM_LOST or (calls > 1 and task.outcome is not Outcome.SUCCEEDED)
            for task in report.tasks
            if task.index not in settled
        )

    def follow(self, place: Place, execution_id: int, handle: Handle) -> bool:
        """Follow the winner instead of a double; whether there is another one to follow.

        Raises:
            Unreachable: the storage does not answer.
        """
        (row,) = self._store.executions([execution_id]) or (None,)
        if row is None:
            return False
        if row.handle != handle:
            return True  # somebody has turned to the other one meanwhile
        winner = self.winner(place, row.key, handle)
        if winner is None or winner == handle:
            return False
        reason = f"the claim belongs to {winner}, and {handle} has done nothing"
        log.warning("double", key=row.key, winner=winner, loser=handle)
        self._store.follow_winner(row.key, handle, winner, reason)
        return True  # or somebody else did, or its row has ended: in no case does this one count
