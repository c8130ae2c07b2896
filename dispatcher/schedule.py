"""When a batch is due by the clock: a cron line in a time zone, and what becomes of missed times.

Pure but for its validation; `engine/firer.py` turns what `firings` says into rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from dispatcher.job import Count, Name

__all__ = ["FIRST_SEEN", "MISSED", "Firing", "Schedule", "firings", "next_due"]

LONGEST_GAP: Final = 10_000
"""Due times that are worked through at once."""

ON_TIME: Final = timedelta(minutes=1)
"""A firing is missed when nobody was there for longer than this."""


FIRST_SEEN: Final = "first seen"
"""Why no batch comes of the time at which a worker met a schedule first."""

MISSED: Final = "missed, and catch_up is"
"""How the reason begins that a due time was passed over as its schedule says."""


def _check_cron(text: str) -> str:
    try:
        CronSim(text, datetime(2000, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        raise ValueError(f"is no cron line of five fields, such as 0 2 * * * ({error})") from error
    return text


def _check_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError("is no time zone; it must be a name such as Asia/Tokyo or UTC") from error
    return name


class Schedule(BaseModel):
    """A cron line in a time zone that enqueues a batch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    cron: Annotated[str, AfterValidator(_check_cron)]
    """Minute, hour, day of month, month, day of week."""

    timezone: Annotated[str, AfterValidator(_check_zone)] = "UTC"
    """In which the cron line is read; a time that a change of clocks skips fires just after."""

    job: str
    items: str | None = None
    """A path or URI, over the job's item source."""

    params: dict[str, Any] = Field(default_factory=dict)
    catch_up: Literal["none", "last", "all"] = "last"
    """What is fired of the times that were missed while no worker was there."""

    catch_up_limit: Count = 24
    """With `all`, at most so many of them, the newest."""


@dataclass(frozen=True, slots=True)
class Firing:
    """One due time of a schedule."""

    due_at: datetime
    """In UTC."""

    skipped: str | None = None
    """Why no batch comes of it; None if one does."""


def firings(schedule: Schedule, after: datetime, now: datetime) -> list[Firing]:
    """Say what is due after one time up to another, oldest first, and which of it is fired."""
    zone = ZoneInfo(schedule.timezone)
    due: list[datetime] = []
    more = False
    for moment in CronSim(schedule.cron, after.astimezone(zone)):
        if moment > now:
            break
        if more := len(due) == LONGEST_GAP:
            break
        due.append(moment.astimezone(UTC))
    missed = [moment for moment in due if now - moment > ON_TIME]
    on_time = due[len(missed) :]
    kept: Mapping[str, int] = {
        "none": 0,
        "last": 0 if on_time else 1,
        "all": schedule.catch_up_limit,
    }
    # What is caught up with are the newest: where there are more to come, none of these.
    count = 0 if more else min(len(missed), kept[schedule.catch_up])
    keep = set(missed[len(missed) - count :])
    why = f"{MISSED} {schedule.catch_up}"
    return [Firing(m, None if m in keep or m in on_time else why) for m in due]


def next_due(schedule: Schedule, after: datetime) -> datetime | None:
    """Say when a schedule is due next, in UTC; None if never again."""
    for moment in CronSim(schedule.cron, after.astimezone(ZoneInfo(schedule.timezone))):
        return moment.astimezone(UTC)
    return None
