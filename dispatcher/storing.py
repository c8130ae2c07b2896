"""Which jobs cannot do without the storage, and what a target's leader tells of it. Pure.

The leader of a target looks at the storage every few minutes and writes what it finds into the
limits of the target's row. What it tells is lasting: a storage that does not answer is no problem
that somebody has to mend, and is not told. Enqueueing refuses on its word, launches wait on it, and
`explain` repeats it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final, NamedTuple

from dispatcher.durations import format_duration
from dispatcher.job import Job
from dispatcher.storage import LONGEST_SIGNED

__all__ = [
    "SIGNED_TASKS",
    "SIGNING_MARGIN",
    "Told",
    "Trouble",
    "signs_results",
    "signs_too_long",
    "storage_need",
    "storage_trouble",
    "tell",
]

SIGNED_TASKS: Final = 500
"""Chunks of one execution at most, where each is given URLs of its own. Without a key file Google
is asked for each signature, and a launch must be made within seconds of its intent."""

SIGNING_MARGIN: Final = timedelta(minutes=15)
"""What a URL lives longer than its task may: for the launch call, and for clocks that differ."""


class Told(NamedTuple):
    """What a target's leader tells of the storage that it was given."""

    results: bool
    """Tasks can leave results somewhere."""

    claims: bool
    """Tasks can be asked to claim their work."""

    storage_problem: str | None = None
    """Why nothing can be written or read there until somebody mends it."""

    signing_problem: str | None = None
    """Why URLs that are signed here do not work."""


class Trouble(NamedTuple):
    """What keeps the tasks of a job from their work."""

    need: str
    """What the job wants of the storage: completes "job NAME …"."""

    problem: str


def tell(told: Told) -> dict[str, Any]:
    """Write what is told as a part of the limits of a target's row."""
    return {name: value for name, value in told._asdict().items() if value is not None}


def storage_need(job: Job, *, claims: bool) -> str | None:
    """Say why a job cannot do without the storage; None if its options do not tell that."""
    if job.receipt == "required":
        return "requires receipts"
    if job.options.get("signed_urls"):
        return "gives its tasks signed URLs"
    if claims and job.options.get("wrapped"):
        return "has an entry wrapper, which claims its work there"
    return None


def storage_trouble(job: Job, limits: Mapping[str, Any] | None) -> Trouble | None:
    """Say what keeps a job from running now, by the limits of its target's row; None if nothing.

    `limits` are those of a lease that has not run out, else None: what is wrong with a storage is
    known only from somebody who looks at it.
    """
    if not limits:
        return None
    need = storage_need(job, claims=bool(limits.get("claims")))
    problem = limits.get("storage_problem")
    if problem is None and job.options.get("signed_urls"):
        problem = limits.get("signing_problem")
    return None if need is None or problem is None else Trouble(need, problem)


def signs_results(job: Job) -> bool:
    """Say if each task of a job is given signed URLs of its own, to write its receipt to."""
    return bool(job.options.get("signed_urls")) and job.receipt != "ignored"


def signs_too_long(job: Job) -> str | None:
    """Say why URLs cannot be signed for as long as a task of the job may take; None if they can."""
    longest = job.start_timeout + job.timeout + SIGNING_MARGIN
    if not signs_results(job) or longest <= LONGEST_SIGNED:
        return None
    return (
        f"gives its tasks signed URLs, which live {format_duration(LONGEST_SIGNED)} at most, and a "
        f"task may write its receipt only {format_duration(longest)} after its launch "
        f"(start_timeout {format_duration(job.start_timeout)}, timeout "
        f"{format_duration(job.timeout)}, and {format_duration(SIGNING_MARGIN)}): shorten these, "
        "or do without options.signed_urls"
    )
