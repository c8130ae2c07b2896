"""When to look again: seldom while nothing can have ended, often when the end is near."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.polling import LONGEST, SHORTEST, History, interval, page_interval

AGES = st.floats(0, 1e6)


@given(AGES, st.none() | st.floats(0, 1e6))
def test_an_interval_is_never_too_short_nor_too_long(age: float, shortest: float | None) -> None:
    assert SHORTEST <= interval(age, shortest) <= LONGEST


@pytest.mark.parametrize(
    ("age", "seconds"),
    [(0, SHORTEST), (5, SHORTEST), (60, 3), (200, 10), (600, LONGEST), (1e6, LONGEST)],
)
def test_without_history_an_end_is_seen_late_by_a_twentieth(age: float, seconds: float) -> None:
    assert interval(age, None) == seconds


@pytest.mark.parametrize(
    ("age", "shortest", "seconds"),
    [
        (0, 100, 25),  # nothing of this job ended sooner than after 100 s
        (50, 100, 20),  # up to 70 s, from when on it may
        (69.9, 100, SHORTEST),
        (70, 100, 3.5),
        (200, 100, 10),
        (0, 4000, 30),
        (0, 1, SHORTEST),
    ],
)
def test_with_history_few_looks_are_spent_on_the_time_in_which_nothing_ends(
    age: float, shortest: float, seconds: float
) -> None:
    assert interval(age, shortest) == pytest.approx(seconds)


def looks(seconds: float, shortest: float | None) -> tuple[int, float]:
    """How often a run is looked at, and how late its end is seen."""
    age, count = 0.0, 0
    while age < seconds:
        age += interval(age, shortest)
        count += 1
    return count, age - seconds


@given(st.floats(30, 1e4))
def test_a_run_as_long_as_ever_takes_fewer_looks_and_is_seen_as_soon(seconds: float) -> None:
    count, late = looks(seconds, seconds)
    assert late <= max(SHORTEST, min(LONGEST, 0.05 * seconds)) + 1e-6
    assert count < looks(seconds, None)[0]


def test_a_history_speaks_from_the_fifth_run_on_and_forgets_the_oldest() -> None:
    history = History(keep=6)
    for seconds in (1.0, 50.0, 60.0, 70.0):
        history.add(seconds)
    assert history.shortest() is None
    history.add(80.0)
    assert history.shortest() == 1.0
    history.add(90.0)
    history.add(100.0)
    assert history.shortest() == 50.0


@pytest.mark.parametrize(
    ("pages", "rate", "seconds"), [(1, None, 0), (100, None, 0), (1, 60, 1), (10, 6, 100)]
)
def test_rounds_keep_to_a_budget_of_calls(pages: int, rate: float | None, seconds: float) -> None:
    assert page_interval(pages, rate) == seconds
