"""The clock of a worker: one loop that heartbeats and schedules, and slots that do the work.

Each target's turn runs in slots of its own, so that a provider that hangs holds up nothing else.
The loop does no work but the heartbeat and the leases: if it dies or stands still, the process dies
with it and the supervisor starts another. What runs is followed to its end even while the broker
is down.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from threading import Event, Thread
from typing import Final

import sqlalchemy as sa
import structlog

from dispatcher import schema
from dispatcher.boottime import boottime
from dispatcher.engine import Place
from dispatcher.errors import DispatcherError, SchemaMismatch
from dispatcher.store.base import Conflict
from dispatcher.storing import signs_results, tell
from workers import steps
from workers.runtime import Runtime
from workers.storage_watch import StorageWatch

__all__ = ["Clock"]

log = structlog.get_logger(__name__)

TICK: Final = 0.1
LAUNCH_EVERY: Final = 1.0
FOLLOW_EVERY: Final = 0.5
STRAYS_EVERY: Final = 60.0
CLEAN_EVERY: Final = 600.0
ROOM_EVERY: Final = 2.0
"""A budget of calls holds those of ten seconds, half of which are left to others: seldom rounds
would not use it."""

PROGRESS_EVERY: Final = 10.0
STORAGE_EVERY: Final = 300.0
MENDING_EVERY: Final = 30.0
"""Between two looks at a storage that somebody has to mend: launches wait for it."""

FORGET_WORKERS: Final = timedelta(days=7)
STUCK_AFTER: Final = 60.0
"""Seconds that the loop may stand still. No call that it makes may take half as long."""

LOOKS: Final = 60
"""How often the watchdog looks in that time. It counts looks, not seconds: a process that was
stopped and goes on has looked no more often than its loop could have ticked."""

PLANNERS: Final = 2
"""Batches that the clock plans at once: one item source that takes minutes is not in the way."""

CRASHED: Final = 70
"""Exit code where the loop died or stands still (EX_SOFTWARE of sysexits.h)."""

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

    wakes: Sequence[Slot] = ()
    """What is done at once after a step that found something: room was made, so launch."""

    tells: bool = False
    """What it found is told by the heartbeat, at once."""


class Clock:
    """Runs the turns of a worker in threads of its own.

    Args:
        run: The parts of this worker.
        stuck_after: Seconds without a tick of the loop after which the process ends.
        end: Ends the process, with an exit code.
    """

    def __init__(
        self,
        run: Runtime,
        *,
        stuck_after: float = STUCK_AFTER,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._run = run
        self._end = end
        self._stuck_after = stuck_after
        self._ticks = 0
        self._stopping = Event()
        self._thread = Thread(target=self._guarded_loop, name="clock", daemon=True)
        self._watchdog = Thread(target=self._watch, name="watchdog", daemon=True)
        self._next_beat = 0.0
        self._leased_until: dict[str, float] = {}
        self._problems: dict[str, str] = {}
        self._checked = False
        targets = run.engine.places
        storages = [place.storage for place in targets.values() if place.storage is not None]
        self._storage = StorageWatch(
            storages[0] if storages else None,  # a process has one for all its targets
            signs=any(map(signs_results, run.config.jobs.values())),
        )
        every = run.settings.sweep_interval.total_seconds()
        planners = [
            Slot(f"plan {number}", partial(steps.plan_waiting, run), every)
            for number in range(1, PLANNERS + 1)
        ]
        self._slots = [
            Slot("fire", run.engine.fire, every, wakes=planners),
            Slot("sweep", run.engine.sweep, every),
            *planners,
        ]
        if storages:
            self._slots.append(Slot("storage", self._storage.look, 0.0, tells=True))
        for name in targets:
            launch = Slot(
                f"launch {name}", partial(steps.launch, run, name), LAUNCH_EVERY, target=name
            )
            follow = partial(run.engine.follow, name)
            self._slots += [
                launch,
                Slot(f"follow {name}", follow, FOLLOW_EVERY, target=name, wakes=[launch]),
                Slot(
                    f"strays {name}",
                    partial(run.engine.sweep_strays, name),
                    STRAYS_EVERY,
                    target=name,
                ),
                Slot(f"room {name}", partial(run.engine.make_room, name), ROOM_EVERY, target=name),
                Slot(f"clean {name}", partial(run.engine.clean, name), CLEAN_EVERY, target=name),
                Slot(
                    f"progress {name}",
                    partial(run.engine.follow_progress, name),
                    PROGRESS_EVERY,
                    target=name,
                ),
            ]
        self._pool = ThreadPoolExecutor(len(self._slots), "turn")

    def start(self) -> None:
        """Start the loop, and who watches it."""
        self._thread.start()
        self._watchdog.start()

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
            self._end(CRASHED)

    def _watch(self) -> None:
        """End the process if the loop stands still: it would look alive and do nothing."""
        seen, looks = self._ticks, 0
        while not self._stopping.wait(self._stuck_after / LOOKS):
            seen, looks = self._ticks, looks + 1 if seen == self._ticks else 0
            if looks >= LOOKS:
                log.critical("the clock stands still; this worker ends", seconds=self._stuck_after)
                self._end(CRASHED)
                return

    def _loop(self) -> None:
        while not self._stopping.wait(TICK):
            self._ticks += 1
            now = time.monotonic()
            if now >= self._next_beat:
                self._beat()
                if self._stopping.is_set():
                    break
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
            self._end_turn(slot, slot.running, now)
        if now < slot.next_at:
            return
        if slot.target is not None and boottime() >= self._leased_until.get(slot.target, 0.0):
            return
        try:
            slot.running = self._pool.submit(slot.step)
        except RuntimeError:
            # The pool was shut between our look at the event and this line.
            if not self._stopping.is_set():
                raise

    def _end_turn(self, slot: Slot, step: Future[object], now: float) -> None:
        """Say when a slot that is done is due again, and wake those that wait for it."""
        slot.running = None
        slot.next_at = now + slot.every
        if slot.tells:
            slot.next_at = now + (STORAGE_EVERY if self._storage.in_order else MENDING_EVERY)
        error = step.exception()
        if isinstance(error, DispatcherError):
            log.warning("turn failed; tried again", turn=slot.name, why=str(error))
        elif error is not None:
            log.error("turn failed; tried again", turn=slot.name, exc_info=error)
        elif step.result():
            for other in slot.wakes:
                other.next_at = now
            if slot.tells:
                self._next_beat = now

    def _beat(self) -> None:
        """Write the heartbeat and renew the leases; a database that is gone stops neither."""
        settings = self._run.settings
        self._next_beat = time.monotonic() + settings.heartbeat.total_seconds()
        try:
            self._check()
            for name, place in self._run.engine.places.items():
                self._ticks += 1
                if self._stopping.is_set():
                    return
                try:
                    self._lease(name, place)
                except Conflict as error:
                    # What we hold of it we hold to its end; the other targets have theirs to renew.
                    log.warning("lease not renewed; tried again", target=name, why=str(error))
            self._run.store.beat(
                host=socket.gethostname(),
                pid=os.getpid(),
                version=version("dispatcher"),
                problems=self._problems,
            )
            self._run.store.forget_workers(FORGET_WORKERS)
        except SchemaMismatch as error:
            log.critical("this worker cannot work on this database", why=str(error))
            self._end(MISMATCHED)
        except DispatcherError as error:
            log.warning("heartbeat failed", why=str(error))
            self._next_beat = time.monotonic() + 1.0
        except sa.exc.SQLAlchemyError:
            log.exception("heartbeat failed")
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
            limits={
                **place.target.model_dump(
                    mode="json", include={"max_running", "max_executions", "launches_per_minute"}
                ),
                "absent_grace": place.backend.limits.absent_grace.total_seconds(),
                **tell(self._storage.told(place)),
            },
            home=place.home,
            lease=lease,
        )
        if problem is None:
            if name not in self._leased_until:
                # Whoever led it before may have told of an outage that nobody has taken back.
                place.down = place.launches_fail = True
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
