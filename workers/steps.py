"""The steps that a tap asks for and that the clock takes by itself: plan, launch, sweep (and fire).

Each works for a second or two at most and leaves the rest to another tap, so that a worker can stop
at any time. Only a plan may take as long as its item source does.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Final

import structlog

from dispatcher.errors import DispatcherError, InvalidInput, Unreachable
from dispatcher.store.base import Conflict
from dispatcher.wake import LAUNCH, PLAN
from workers.runtime import Runtime

__all__ = ["launch", "plan", "plan_waiting", "sweep"]

log = structlog.get_logger(__name__)

BUSY: Final = 1.5
"""Seconds that one step goes on launching."""


PLANNED_AT_ONCE: Final = 20
"""Waiting batches that are looked up together."""

AFTER_A_FAULT: Final = timedelta(minutes=1)
"""How long a batch waits whose planning met an error that nobody expected."""


def plan(run: Runtime, batch_id: str) -> None:
    """Plan a batch, and have its chunks launched; nothing, if another thread plans it.

    Raises:
        Unreachable: the database does not answer.
        Conflict: another session stood in the way; nothing was written.
    """
    with run.planning.on(batch_id) as free:
        if not free:
            return
        try:
            target = run.engine.plan(batch_id)
        except (InvalidInput, Unreachable, Conflict):
            raise
        except Exception as error:
            # It may be a fault of this batch alone: it steps back, so that others are planned.
            log.exception("planning failed; postponed", batch=batch_id)
            why = f"planning failed: {type(error).__name__}: {error}"
            run.store.postpone_plan(batch_id, AFTER_A_FAULT, why)
            return
    if target is not None:
        run.waker.tap(LAUNCH, target=target)


def plan_waiting(run: Runtime) -> None:
    """Plan the batches of our targets that wait for it; one that fails keeps none from it."""
    for batch_id in run.store.unplanned(PLANNED_AT_ONCE, run.engine.places):
        try:
            plan(run, batch_id)
        except DispatcherError as error:
            log.warning("not planned; tried again", batch=batch_id, why=str(error))
        except Exception:
            log.exception("not planned; tried again", batch=batch_id)


def launch(run: Runtime, target: str) -> int:
    """Launch what is due on a target; the number of launch calls made."""
    end = time.monotonic() + BUSY
    calls = 0
    while True:
        done = run.engine.launch(target)
        calls += done.calls
        if not done.more:
            return calls
        if time.monotonic() >= end:
            run.waker.tap(LAUNCH, target=target)
            return calls


def sweep(run: Runtime) -> None:
    """Fire what is due, and do again what a lost message or a crash has left undone.

    What waits to be planned is only tapped: a plan may take minutes.
    """
    for batch_id in dict.fromkeys([*run.engine.fire(), *run.engine.sweep()]):
        run.waker.tap(PLAN, batch_id=batch_id)
