"""The Celery tasks: thin calls of the steps. A message carries an id and nothing else."""

from __future__ import annotations

from celery import shared_task

from dispatcher.wake import LAUNCH, PLAN, SWEEP
from workers import steps
from workers.runtime import runtime

__all__ = ["launch", "plan", "sweep"]


@shared_task(name=PLAN)  # type: ignore[untyped-decorator]  # celery ships no types
def plan(batch_id: str) -> None:
    """Cut a batch into chunks."""
    steps.plan(runtime(), batch_id)


@shared_task(name=LAUNCH)  # type: ignore[untyped-decorator]  # celery ships no types
def launch(target: str) -> None:
    """Launch what is due on a target."""
    steps.launch(runtime(), target)


@shared_task(name=SWEEP)  # type: ignore[untyped-decorator]  # celery ships no types
def sweep() -> None:
    """Do again what a lost message has left undone."""
    steps.sweep(runtime())
