"""Times are told relative and absolute, in UTC, and read as people write them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from dispatcher.errors import InvalidInput
from dispatcher.moments import ago, ahead, clock, iso, read_moment, span

NOW = datetime(2025, 11, 21, 7, 30, tzinfo=UTC)
TOKYO = timezone(timedelta(hours=9))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-5, "0 s"),
        (0, "0 s"),
        (0.4, "less than 1 s"),
        (12.4, "12 s"),
        (99, "99 s"),
        (100, "2 min"),
        (18 * 60, "18 min"),
        (2 * 3600, "2 h"),
        (5 * 3600 + 20 * 60, "5 h 20 min"),
        (24 * 3600, "24 h"),
        (47.6 * 3600, "48 h"),
        (72 * 3600, "3 days"),
    ],
)
def test_a_span_is_told_in_one_unit_or_two(seconds: float, said: str) -> None:
    assert span(timedelta(seconds=seconds)) == said


def test_the_date_is_told_only_if_it_is_another_one() -> None:
    assert clock(NOW, NOW) == "07:30:00Z"
    assert clock(NOW - timedelta(hours=8), NOW) == "2025-11-20 23:30:00Z"
    assert clock(NOW.astimezone(TOKYO), NOW) == "07:30:00Z"


def test_past_and_future_are_told_with_their_time() -> None:
    assert ago(NOW - timedelta(minutes=18), NOW) == "18 min ago (07:12:00Z)"
    assert ago(NOW, NOW) == "just now (07:30:00Z)"
    assert ahead(NOW + timedelta(minutes=4), NOW) == "in 4 min (07:34:00Z)"
    assert ahead(NOW, NOW) == "at once"


def test_programs_get_iso_8601_in_utc() -> None:
    assert iso(NOW.astimezone(TOKYO)) == "2025-11-21T07:30:00Z"
    assert iso(NOW.replace(microsecond=120)) == "2025-11-21T07:30:00.000120Z"


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2025-11-20", datetime(2025, 11, 20, tzinfo=UTC)),
        ("2025-11-20T06:00", datetime(2025, 11, 20, 6, tzinfo=UTC)),
        (" 2025-11-20T06:00:00Z ", datetime(2025, 11, 20, 6, tzinfo=UTC)),
        ("2025-11-20T06:00:00+09:00", datetime(2025, 11, 20, 6, tzinfo=TOKYO)),
        ("90m", NOW - timedelta(minutes=90)),
        ("2d", NOW - timedelta(days=2)),
    ],
)
def test_a_time_is_read_as_people_write_it(text: str, moment: datetime) -> None:
    assert read_moment(text, NOW) == moment


@pytest.mark.parametrize("text", ["", "soon", "90", "2025-13-01", "9999999d"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=r" is not a time; write a date or time such as "):
        read_moment(text, NOW)
