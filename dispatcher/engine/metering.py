"""A target's budgets of calls, as its backend asks for them; counted over all workers."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from dispatcher import budget
from dispatcher.backends.base import Unavailable
from dispatcher.config import Target
from dispatcher.store import Store

__all__ = ["TargetMeter"]


class TargetMeter:
    """Takes tokens from the buckets of one target; a kind without a rate is free."""

    def __init__(self, store: Store, target: Target) -> None:
        self._store = store
        self._target = target.name
        self._rates = {
            "read": target.reads_per_minute,
            "write": target.writes_per_minute,
            "logs": target.logs_per_minute,
        }

    def take(
        self, kind: Literal["read", "write", "logs"], calls: int = 1, *, gentle: bool = False
    ) -> None:
        """Take calls from a budget just before they are made.

        `gentle` takes them only if half of a full bucket is left for others.

        Raises:
            Unavailable: the budget is used up for now; nothing was called.
        """
        rate = self._rates[kind]
        if rate is None:
            return
        with self._store.transaction() as tx:
            bucket = self._store.bucket(tx, self._target, kind)
            # Never more than a full bucket, or it could not be had at all.
            full = budget.burst(rate * budget.pace(bucket))
            wanted = min(float(calls), full)
            needed = min(wanted + full / 2, full) if gentle else wanted
            wait = budget.seconds_until(bucket, rate, needed)
            if wait <= 0.0:
                self._store.write_tokens(tx, self._target, kind, budget.left(bucket, rate) - wanted)
        if wait > 0.0:
            raise Unavailable(
                f"the budget of {rate:g} {kind} calls a minute on target {self._target} is used up "
                f"for {wait:.1f} s",
                not_started=True,
                retry_after=timedelta(seconds=wait),
            )

    def throttled(self, kind: Literal["read", "write", "logs"]) -> None:
        """Halve the rate of a kind of call: the provider refused one for being one too many."""
        self._store.slow_down(self._target, kind)
