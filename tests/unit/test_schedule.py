"""Which due times a schedule has, and what becomes of those that were missed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher import ConfigurationError, load_config
from dispatcher.schedule import Schedule, firings, next_due


def schedule(cron: str = "0 2 * * *", **more: Any) -> Schedule:
    return Schedule(name="nightly", cron=cron, job="export", **more)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_a_line_is_read_in_its_own_time_zone() -> None:
    due = firings(schedule("0 6 * * *", timezone="Asia/Tokyo"), at("2026-11-01"), at("2026-11-02"))
    assert [firing.due_at for firing in due] == [at("2026-11-01T21:00")]


def test_the_next_due_time_is_told_in_utc() -> None:
    tokyo = schedule("0 6 * * *", timezone="Asia/Tokyo")
    assert next_due(tokyo, at("2026-11-01")) == at("2026-11-01T21:00")
    assert next_due(tokyo, at("2026-11-01T21:00")) == at("2026-11-02T21:00")


def test_a_time_that_a_change_of_clocks_leaves_out_or_doubles_fires_once() -> None:
    berlin = schedule("30 2 * * *", timezone="Europe/Berlin", catch_up="all")
    spring = firings(berlin, at("2026-03-28T12:00"), at("2026-03-29T12:00"))
    autumn = firings(berlin, at("2026-10-24T12:00"), at("2026-10-25T12:00"))
    assert len(spring) == len(autumn) == 1


@pytest.mark.parametrize(
    ("catch_up", "limit", "fired"),
    [("none", 24, 0), ("last", 24, 1), ("all", 24, 5), ("all", 2, 2)],
)
def test_after_a_time_without_workers_the_policy_says_what_is_fired(
    catch_up: str, limit: int, fired: int
) -> None:
    missed = schedule("0 * * * *", catch_up=catch_up, catch_up_limit=limit)
    due = firings(missed, at("2026-11-01T00:30"), at("2026-11-01T05:30"))
    assert len(due) == 5, "the others are recorded as skipped"
    assert [f.skipped is None for f in due] == [False] * (5 - fired) + [True] * fired


def test_what_is_due_right_now_is_fired_and_what_was_missed_before_is_not_doubled_by_it() -> None:
    due = firings(schedule("0 * * * *"), at("2026-11-01T00:30"), at("2026-11-01T03:00"))
    assert [f.skipped is None for f in due] == [False, False, True]


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=40), st.sampled_from(["none", "last", "all"])
)
def test_however_the_clock_ticks_each_due_time_comes_up_once(ticks: list[int], policy: str) -> None:
    every = schedule("*/7 * * * *", catch_up=policy)
    start = last = now = at("2026-11-01T00:01")
    seen = []
    for minutes in ticks:
        now += timedelta(minutes=minutes)
        found = firings(every, last, now)
        seen += [f.due_at for f in found]
        last = found[-1].due_at if found else last
    whole = [f.due_at for f in firings(every, start, now)]
    assert seen == whole


CONFIG = """
targets: {here: {backend: local}}
jobs:
  export: {target: here, command: [x], items: {source: "m:f"}}
  plain: {target: here, command: [x]}
schedules:
  nightly: %s
"""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{cron: 0 2 * *, job: export}", "schedules.nightly.cron"),
        ("{cron: 0 2 * * *, job: exprt}", "it must be a configured job: export, plain (did you"),
        ("{cron: 0 2 * * *, job: export, timezone: Mars}", "is no time zone; it must be a name"),
        ("{cron: 0 2 * * *, job: plain}", 'items is missing, and job "plain" has no item source'),
        ("{cron: 0 2 * * *, job: export, params: {a: 1}}", "schedules.nightly.params do not fit"),
        ("{cron: 0 2 * * *, job: export, catchup: all}", 'did you mean "catch_up"?'),
    ],
)  # fmt: skip
def test_a_wrong_schedule_is_refused_with_its_place(tmp_path: Path, given: str, said: str) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(CONFIG % given)
    with pytest.raises(ConfigurationError) as caught:
        load_config(str(path))
    assert said in str(caught.value)


def test_a_right_schedule_is_read(tmp_path: Path) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(CONFIG % "{cron: 0 6 * * *, timezone: Asia/Tokyo, job: export}")
    assert load_config(str(path)).schedules["nightly"].timezone == "Asia/Tokyo"


@pytest.mark.parametrize(("catch_up", "fired"), [("last", 1), ("all", 3)])
def test_of_more_missed_times_than_are_worked_through_at_once_only_the_newest_are_fired(
    catch_up: str, fired: int
) -> None:
    """They come in four blocks, and only the last one holds the newest."""
    every = schedule("*/2 * * * *", catch_up=catch_up, catch_up_limit=3)
    last, now = at("2026-09-01"), at("2026-10-13T00:01:30")
    blocks = []
    while found := firings(every, last, now):
        blocks.append(found)
        last = found[-1].due_at
    kept = [[f.due_at for f in block if f.skipped is None] for block in blocks]
    assert [len(block) for block in kept] == [0, 0, 0, fired]
    assert kept[-1][-1] == at("2026-10-13")
    assert sum(map(len, blocks)) == 42 * 24 * 30, "and every one of them is recorded"
