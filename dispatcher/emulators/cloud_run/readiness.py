"""Whether a job can be run: its image and its secrets must be there (clouds.md §3).

The answer is its Ready condition, which is written whenever the job is.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from dispatcher.emulators.cloud_run.messages import Condition
from dispatcher.emulators.cloud_run.refusal import Code, Refused
from dispatcher.emulators.cloud_run.rendering import set_condition
from dispatcher.emulators.cloud_run.tasks import Runner

__all__ = ["check_ready", "is_ready", "judge"]


def judge(job: Any, runner: Runner, secrets: Container[str], now: float) -> None:
    """Write the job's Ready condition."""
    condition = job.terminal_condition
    condition.Clear()
    state, text = Condition.CONDITION_SUCCEEDED, ""
    for container in job.template.template.containers[:1]:
        if not runner.has_image(container.image):
            state = Condition.CONDITION_FAILED
            text = f"Image '{container.image}' not found."
            condition.reason = Condition.CONTAINER_MISSING
        for variable in container.env:
            secret = variable.value_source.secret_key_ref.secret
            if secret and secret not in secrets:
                state = Condition.CONDITION_FAILED
                text = f"Secret {secret} was not found, or may not be read."
                condition.reason = Condition.SECRETS_ACCESS_CHECK_FAILED
    set_condition(condition, "Ready", state, message=text, at=now)
    del job.conditions[:]
    job.conditions.add().CopyFrom(condition)


def is_ready(job: Any) -> bool:
    """Whether the job can be run."""
    return bool(job.terminal_condition.state == Condition.CONDITION_SUCCEEDED)


def check_ready(job: Any) -> None:
    """Refuse to run a job that is not ready (guess: not_ready_job)."""
    if not is_ready(job):
        condition = job.terminal_condition
        raise Refused(
            Code.FAILED_PRECONDITION,
            f"Job '{job.name.rpartition('/')[2]}' is not ready and cannot be run: "
            f"{condition.message}",
            reason=Condition.CommonReason.Name(condition.reason),
        )
