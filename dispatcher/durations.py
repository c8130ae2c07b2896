"""Durations as people write them: 90s, 10m, 1h30m; read, checked and written back.

`job.py` and `config.py` use it for each of their durations; it knows neither.
"""

from __future__ import annotations

import math
import re
from datetime import timedelta
from typing import Annotated, Final, TypeAlias

from pydantic import BeforeValidator, PlainSerializer

from dispatcher.errors import InvalidInput
from dispatcher.problems import shown

__all__ = ["Duration", "format_duration", "parse_duration"]

_DURATION_FORMS: Final = "such as 90s, 10m, 1h30m or 2d, or a number of seconds"
_DURATION: Final = re.compile(
    r"(?:(?P<days>[0-9]+)d\s*)?(?:(?P<hours>[0-9]+)h\s*)?(?:(?P<minutes>[0-9]+)m\s*)?"
    r"(?:(?P<seconds>[0-9]+)(?:\.(?P<fraction>[0-9]{1,6}))?s)?"
)
_SECONDS: Final = re.compile(r"[0-9]+(?:\.[0-9]+)?")

# So that `now() + duration` stays a date that Python and Postgres can hold.
_LONGEST: Final = timedelta(days=3650)


def parse_duration(text: str) -> timedelta:
    """Read a duration: "90s", "10m", "1h30m", "1h 30m", "2d", "0.5s", or a number of seconds.

    Units go from days to seconds, each at most once; only seconds may have a fraction.

    Raises:
        InvalidInput: the text has no such form.
    """
    stripped = text.strip()
    try:
        if _SECONDS.fullmatch(stripped):
            return timedelta(seconds=float(stripped))
        match = _DURATION.fullmatch(stripped) if stripped else None
        if match is not None:
            parts = match.groupdict(default="0")
            micro = int(parts.pop("fraction").ljust(6, "0"))
            return timedelta(microseconds=micro, **{unit: int(n) for unit, n in parts.items()})
    except (OverflowError, ValueError) as error:  # too long for a timedelta, or for an int
        raise InvalidInput(f"the duration {shown(text)} is too long") from error
    raise InvalidInput(f"{shown(text)} is not a duration; write one {_DURATION_FORMS}")


def format_duration(duration: timedelta) -> str:
    """Write a duration in the short form that `parse_duration` reads back exactly: "1h30m".

    Raises:
        InvalidInput: it is negative.
    """
    if duration < timedelta(0):
        raise InvalidInput(f"the duration {duration} is negative; it must be 0s or more")
    minutes, seconds = divmod(duration.seconds, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{duration.microseconds:06}".rstrip("0") if duration.microseconds else ""
    units = ((duration.days, "d"), (hours, "h"), (minutes, "m"))
    text = "".join(f"{count}{unit}" for count, unit in units if count)
    return text + (f"{seconds}{fraction}s" if seconds or fraction or not text else "")


def _read_duration(value: object) -> timedelta:
    duration = _as_duration(value)
    if not timedelta(0) < duration <= _LONGEST:
        raise ValueError(f"must be longer than 0s and at most {format_duration(_LONGEST)}")
    return duration


def _as_duration(value: object) -> timedelta:
    if isinstance(value, timedelta):
        return value
    if isinstance(value, str):
        try:
            return parse_duration(value)
        except InvalidInput as error:
            raise ValueError(f"must be a duration {_DURATION_FORMS}") from error
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        try:
            return timedelta(seconds=value)
        except OverflowError:
            return timedelta.max  # the caller refuses it with the bounds
    raise ValueError(f"must be a duration {_DURATION_FORMS}")


Duration: TypeAlias = Annotated[
    timedelta,
    BeforeValidator(_read_duration),
    PlainSerializer(format_duration, return_type=str, when_used="json"),
]
"""A positive duration, ten years at most: from text, seconds or a timedelta; "1h30m" in JSON."""
