"""Fire, plan, launch, poll, settle, sweep: where the store, the backends and the policies meet.

Every step here may be killed at any line and may run twice at once. Each re-reads its rows, decides
with a pure function, and moves them with compare-and-set; what was not moved is found again by the
next sweep. No transaction is open while a backend is called.

A module for each verb: `firer`, `planner`, `launcher`, `poller`, `settler`, `sweeper`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from dispatcher.backends.base import Backend
from dispatcher.backends.registry import make_backend
from dispatcher.boottime import boottime
from dispatcher.config import Config
from dispatcher.engine.claiming import Claims
from dispatcher.engine.definitions import Definitions
from dispatcher.engine.firer import Firer
from dispatcher.engine.launcher import Launcher
from dispatcher.engine.metering import TargetMeter
from dispatcher.engine.place import READERS, Place, Round
from dispatcher.engine.planner import Planner
from dispatcher.engine.plans import PlanCache
from dispatcher.engine.poller import Poller
from dispatcher.engine.receipts import ReceiptReader
from dispatcher.engine.settler import Settler
from dispatcher.engine.sweeper import Sweeper
from dispatcher.storage import Storage
from dispatcher.store import Store
from dispatcher.watching import Watch

__all__ = ["Engine", "Place", "Round"]


class Engine:
    """The verbs of the lifecycle over one store and the targets of one configuration.

    Args:
        store: The tables.
        config: The targets to serve.
        launch_concurrency: Launch calls of a target that this process makes at once.
        call_window: How long after its commit a launch call may begin.
        monotonic: This process's own clock, in seconds.
        roll: A number from 0 to 1 that spreads retries.
        backends: Made from the configuration where not given.
        storage: Where input documents and results lie.
        storage_keep: How long they are kept.
    """

    def __init__(
        self,
        store: Store,
        config: Config,
        *,
        launch_concurrency: int = 16,
        call_window: timedelta = timedelta(seconds=15),
        monotonic: Callable[[], float] = boottime,
        roll: Callable[[], float] = random.random,
        backends: Mapping[str, Backend] | None = None,
        storage: Storage | None = None,
        storage_keep: timedelta = timedelta(days=14),
    ) -> None:
        self.store = store
        self.config = config
        self.places: dict[str, Place] = {}
        for name, target in config.targets.items():
            backend = (backends or {}).get(name) or make_backend(target, TargetMeter(store, target))
            self.places[name] = Place(
                store,
                target,
                backend,
                backend.home(),
                ThreadPoolExecutor(launch_concurrency, f"launch-{name}"),
                ThreadPoolExecutor(READERS, f"read-{name}"),
                Definitions(backend, monotonic),
                Watch(backend.limits.poll_interval.total_seconds()),
                storage,
            )
        plans = PlanCache(store)
        self._firer = Firer(store, config)
        self._planner = Planner(store, self.places)
        self._receipts = ReceiptReader(store, plans)
        self._settler = Settler(store, plans, self._receipts, roll, monotonic)
        claims = Claims(store)
        self._launcher = Launcher(
            store,
            plans,
            self._settler,
            claims,
            concurrency=launch_concurrency,
            window=call_window,
            monotonic=monotonic,
            roll=roll,
        )
        self._poller = Poller(store, self._settler, claims, monotonic)
        self._sweeper = Sweeper(
            store, self._launcher, self._settler, claims, monotonic, storage_keep
        )

    def close(self) -> None:
        """Let the threads end; a call that is open goes on, and is found by its key."""
        for place in self.places.values():
            place.callers.shutdown(wait=False, cancel_futures=True)
            place.readers.shutdown(wait=False, cancel_futures=True)
        self._receipts.close()

    def fire(self) -> list[str]:
        """Enqueue the batches of all schedules' due times; the batches, for the caller to plan."""
        return self._firer.fire()

    def plan(self, batch_id: str) -> str | None:
        """Cut a batch into chunks; the name of its target if it can be launched now, else None."""
        return self._planner.plan(batch_id)

    def launch(self, target: str) -> Round:
        """Make one round of launches on a target: as many as may be called at once."""
        place = self.places.get(target)
        return Round(0, more=False) if place is None else self._launcher.launch(place)

    def follow(self, target: str) -> int:
        """Turn once to all that runs, or may run, on a target: look, call, cancel, time out, poll.

        For the holder of the target's lease; a second one would only double the calls. Returns how
        many tasks were found to have ended, which leaves room to launch others.
        """
        place = self.places[target]
        if not place.following.acquire(blocking=False):
            return 0
        try:
            # Polled first: a deadline is held only against what was just looked at. But a poll that
            # fails holds up no cancel.
            try:
                return self._poller.poll(place)
            finally:
                self._sweeper.tend(place)
        finally:
            place.following.release()

    def sweep(self) -> list[str]:
        """Do again what a lost message or a crash has left undone, over all batches.

        Returns the batches of our targets that wait to be planned, for the caller to plan.
        """
        return self._sweeper.batches(self.places)

    def sweep_strays(self, target: str) -> None:
        """Cancel what runs on a target under our label and belongs to no live execution."""
        self._sweeper.strays(self.places[target])

    def follow_progress(self, target: str) -> int:
        """Read how far some running tasks are; how many told."""
        return self._receipts.follow_progress(self.places[target])

    def clean(self, target: str) -> int:
        """Remove what finished executions have left on a target; say how much."""
        return self._sweeper.clean(self.places[target])

    def make_room(self, target: str) -> int:
        """Remove sooner what has few places on a target; say how much."""
        return self._sweeper.make_room(self.places[target])
