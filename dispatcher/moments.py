"""How times are told to people and to programs: always UTC, relative and absolute together.

`explaining.py` and `rendering.py` write with it and the command line reads `--since` with it. It
knows no clock: now is an argument. Durations as people write them are `durations.py`'s.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from dispatcher.durations import parse_duration
from dispatcher.errors import InvalidInput
from dispatcher.problems import shown

__all__ = ["ago", "ahead", "clock", "iso", "read_moment", "since", "span"]

_SECONDS: Final = 100
_MINUTES: Final = 100
_HOURS: Final = 48
_EXACT_HOURS: Final = 10


def iso(moment: datetime) -> str:
    """Write a moment for programs: ISO 8601, UTC, with a Z."""
    return moment.astimezone(UTC).isoformat().removesuffix("+00:00") + "Z"


def clock(moment: datetime, now: datetime) -> str:
    """Write a moment for people, to the second; the date only if it is another one than today."""
    utc = moment.astimezone(UTC)
    same_day = utc.date() == now.astimezone(UTC).date()
    return utc.strftime("%H:%M:%SZ" if same_day else "%Y-%m-%d %H:%M:%SZ")


def span(length: timedelta) -> str:
    """Say how long, in one unit or two: "12 s", "18 min", "5 h 20 min", "3 days"."""
    seconds = max(0.0, length.total_seconds())
    if seconds < 1:
        return "less than 1 s" if seconds else "0 s"
    if seconds < _SECONDS:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < _MINUTES:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < _EXACT_HOURS and rest:
        return f"{hours} h {rest} min"
    if hours < _HOURS:
        return f"{round(minutes / 60)} h"
    return f"{round(hours / 24)} days"


def ago(moment: datetime, now: datetime) -> str:
    """Say when something was: "18 min ago (07:12:00Z)"."""
    length = now - moment
    said = "just now" if length < timedelta(seconds=1) else f"{span(length)} ago"
    return f"{said} ({clock(moment, now)})"


def since(moment: datetime, now: datetime) -> str:
    """Say from when on something is so: "since 07:12:00Z (18 min ago)"."""
    length = now - moment
    said = "just now" if length < timedelta(seconds=1) else f"{span(length)} ago"
    return f"since {clock(moment, now)} ({said})"


def ahead(moment: datetime, now: datetime) -> str:
    """Say when something will be: "in 3 min (07:34:10Z)", or "at once" where it is overdue."""
    if moment <= now:
        return "at once"
    return f"in {span(moment - now)} ({clock(moment, now)})"


def read_moment(text: str, now: datetime) -> datetime:
    """Read a moment: a date or time in ISO 8601, or how long ago, such as 90m or 2d.

    A time without a zone is UTC.

    Raises:
        InvalidInput: it is neither.
    """
    try:
        moment = datetime.fromisoformat(text.strip())
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    except ValueError:
        try:
            # A number alone is a duration in seconds to `durations`, and no time to people.
            if not text.strip().isdigit():
                return now - parse_duration(text)
        except (InvalidInput, OverflowError):
            pass
    raise InvalidInput(
        f"{shown(text)} is not a time; write a date or time such as 2025-11-20 or "
        "2025-11-20T06:00:00Z (UTC if no zone is given), or how long ago, such as 90m or 2d"
    )
