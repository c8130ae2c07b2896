"""The clock of a worker: one loop that heartbeats and schedules, and slots that do the work.

Each target's turn runs in slots of its own, so that a provider that hangs holds up nothing else.
The loop does no work but the heartbeat and the leases: if it dies, the process dies with it and the
supervisor starts another. What runs is followed to its end even while the broker is down.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from threading import Event, Thread
from typing import Final

import structlog

from dispatcher import schema
from dispatcher.engine import Place, boottime
from dispatcher.errors import DispatcherError, SchemaMismatch
from workers import steps
from workers.runtime import Runtime

__all__ = ["Clock"]

log = structlog.get_logger(__name__)

TICK: Final = 0.1
LAUNCH_EVERY: Final = 1.0
FOLLOW_EVERY: Final = 0.5
STRAYS_EVERY: Final = 60.0
CLEAN_EVERY: Final = 600.0
FORGET_WORKERS: Final = timedelta(days=7)
CRASHED: Final = 70
"""Exit code where the loop died (EX_SOFTWARE of sysexits.h)."""

MISMATCHED: Final = 78
"""Exit code where the database does not fit this code (EX_CONFIG)."""


@dataclass(slots=True)
class Slot:
    """Something that is done again and again, never twice at once."""

    name: str
    step: Callable[[], object]
    every: float
    next_at: float = 0.0
    running: Future[object] | None = None
    target: str | None = None
    """Done only while this target's lease is ours."""

    wakes: Slot | None = None
    """What is done at once after a step that found something: room was made, so launch."""


class Clock:
    """Runs the turns of a worker in threads of its own."""

    def __init__(self, run: Runtime) -> None:
        self._run = run
        self._stopping = Event()
        self._thread = Thread(target=self._guarded_loop, name="clock", daemon=True)
        self._next_beat = 0.0
        self._leased_until: dict[str, float] = {}
        self._problems: dict[str, str] = {}
        self._checked = False
        targets = run.engine.places
        self._pool = ThreadPoolExecutor(4 * len(targets) + 1, "turn")
        self._slots = [
            Slot("sweep", partial(steps.sweep, run), run.settings.sweep_interval.total_seconds())
        ]
        for name in targets:
            launch = Slot(
                f"launch {name}", partial(steps.launch, run, name), LAUNCH_EVERY, target=name
            )
            follow = partial(run.engine.follow, name)
            self._slots += [
                launch,
                Slot(f"follow {name}", follow, FOLLOW_EVERY, target=name, wakes=launch),
                Slot(
                    f"strays {name}",
                    partial(run.engine.sweep_strays, name),
                    STRAYS_EVERY,
                    target=name,
                ),
                Slot(f"clean {name}", partial(run.engine.clean, name), CLEAN_EVERY, target=name),
            ]

    def start(self) -> None:
        """Start the loop."""
        self._thread.start()

    def stop(self, timeout: float = 1.0) -> None:
        """Begin no other turn, and give the leases back so that other workers go on at once.

        May be called twice. A turn that is open goes on until the process ends.
        """
        self._stopping.set()
        self._thread.join(timeout)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _guarded_loop(self) -> None:
        """Run the loop; without it this process would look alive and do nothing, so it ends."""
        try:
            self._loop()
        except BaseException:
            log.exception("the clock died, and this worker with it")
            os._exit(CRASHED)

    def _loop(self) -> None:
        while not self._stopping.wait(TICK):
            now = time.monotonic()
            if now >= self._next_beat:
                self._beat()
                now = time.monotonic()
            if self._checked:
                for slot in self._slots:
                    self._turn(slot, now)
        self._release()

    def _turn(self, slot: Slot, now: float) -> None:
        """Start a slot's step if it is due, not running, and ours to do."""
        if slot.running is not None:
            if not slot.running.done():
                return
            error = slot.running.exception()
            found = error is None and slot.running.result()
            slot.running = None
            slot.next_at = now + slot.every
            if isinstance(error, DispatcherError):
                log.warning("turn failed; tried again", turn=slot.name, why=str(error))
            elif error is not None:
                log.error("turn failed; tried again", turn=slot.name, exc_info=error)
            elif slot.wakes is not None and found:
                slot.wakes.next_at = now
        if now < slot.next_at:
            return
        if slot.target is not None and boottime() >= self._leased_until.get(slot.target, 0.0):
            return
        slot.running = self._pool.submit(slot.step)

    def _beat(self) -> None:
        """Write the heartbeat and renew the leases; a database that is gone stops neither."""
        settings = self._run.settings
        self._next_beat = time.monotonic() + settings.heartbeat.total_seconds()
        try:
            self._check()
            for name, place in self._run.engine.places.items():
                self._lease(name, place)
            self._run.store.beat(
                host=socket.gethostname(),
                pid=os.getpid(),
                version=version("dispatcher"),
                problems=self._problems,
            )
            self._run.store.forget_workers(FORGET_WORKERS)
        except SchemaMismatch as error:
            log.critical("this worker cannot work on this database", why=str(error))
            os._exit(MISMATCHED)
        except DispatcherError as error:
            log.warning("heartbeat failed", why=str(error))
            self._next_beat = time.monotonic() + 1.0

    def _check(self) -> None:
        """Make sure once that the database fits this code."""
        if not self._checked:
            with self._run.store.transaction() as tx:
                schema.check(tx)
            self._checked = True

    def _lease(self, name: str, place: Place) -> None:
        """Take or renew the lease of a target. Ours ends here before it ends in the database."""
        lease = self._run.settings.lease
        until = boottime() + lease.total_seconds()
        problem = self._run.store.lease(
            name,
            backend=place.target.backend,
            limits=place.target.model_dump(
                mode="json", include={"max_running", "max_executions", "launches_per_minute"}
            ),
            home=place.home,
            lease=lease,
        )
        if problem is None:
            self._leased_until[name] = until
            self._problems.pop(name, None)
        else:
            self._leased_until.pop(name, None)
            self._problems[name] = problem

    def _release(self) -> None:
        """Give the leases back."""
        try:
            self._run.store.release()
        except DispatcherError as error:
            log.warning("leases not given back; they run out", why=str(error))
