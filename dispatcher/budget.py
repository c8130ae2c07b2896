"""Budgets of calls as token buckets, one for each target and kind of call. Pure.

A bucket fills at its rate and holds the calls of ten seconds at most. When the provider says
that a call was one too many, the rate is halved; it doubles again with each minute that passes, so
that nobody has to write a row for every call that went well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["LEAST_PACE", "Bucket", "burst", "left", "pace", "seconds_until"]

LEAST_PACE: Final = 0.05
"""The rate never shrinks below this part of what is configured."""

RECOVERY: Final = 60.0
"""Seconds in which a shrunk rate doubles."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket as its row was written; ages are seconds of the database's clock."""

    tokens: float | None = None
    """What was left; None while nothing was ever taken."""

    age: float = 0.0
    pace: float = 1.0
    """The part of the configured rate that it was slowed to."""

    pace_age: float = 0.0


def pace(bucket: Bucket) -> float:
    """Say which part of its configured rate a bucket has now."""
    doublings = min(10.0, max(0.0, bucket.pace_age) / RECOVERY)
    return min(1.0, max(LEAST_PACE, bucket.pace) * float(2.0**doublings))


def burst(per_minute: float) -> float:
    """Say how many tokens a bucket holds at most: those of ten seconds, and never less than one."""
    return max(1.0, per_minute / 6.0)


def left(bucket: Bucket, per_minute: float) -> float:
    """Say how many tokens a bucket holds now."""
    rate = per_minute * pace(bucket)
    if bucket.tokens is None:
        return burst(rate)
    return min(burst(rate), bucket.tokens + rate / 60.0 * max(0.0, bucket.age))


def seconds_until(bucket: Bucket, per_minute: float, tokens: float) -> float:
    """Say how long it takes until so many tokens are there; 0 if they are now."""
    missing = tokens - left(bucket, per_minute)
    return max(0.0, missing * 60.0 / (per_minute * pace(bucket)))
