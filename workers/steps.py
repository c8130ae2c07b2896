"""The steps that a tap asks for and that the clock takes by itself: plan, launch, sweep (and fire).

Each works for a second or two at most and leaves the rest to another tap, so that a worker can stop
at any time.
"""

from __future__ import annotations

import time
from typing import Final

from dispatcher.wake import LAUNCH
from workers.runtime import Runtime

__all__ = ["launch", "plan", "sweep"]

BUSY: Final = 1.5
"""Seconds that one step goes on launching."""


def plan(run: Runtime, batch_id: str) -> None:
    """Plan a batch, and have its chunks launched."""
    target = run.engine.plan(batch_id)
    if target is not None:
        run.waker.tap(LAUNCH, target=target)


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
    """Fire what is due, and do again what a lost message or a crash has left undone."""
    for batch_id in [*run.engine.fire(), *run.engine.sweep()]:
        plan(run, batch_id)
