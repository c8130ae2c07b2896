from __future__ import annotations

from dispatcher.pausing import Pause


def test_a_pause_doubles_with_each_failure_up_to_the_longest() -> None:
    pause, now, lengths = Pause(longest=30.0), 100.0, []
    for _ in range(6):
        pause.failed(now)
        lengths.append(pause.until - now)
        now = pause.until
    assert lengths == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_failures_within_a_pause_count_once() -> None:
    pause = Pause(longest=30.0)
    for now in (0.0, 0.1, 1.9):
        pause.failed(now)
    assert (pause.failures, pause.until) == (1, 2.0)
    assert pause.lasts(1.9)
    assert not pause.lasts(2.0)


def test_an_answer_makes_the_next_pause_short_again() -> None:
    pause = Pause(longest=30.0)
    pause.failed(0.0)
    pause.failed(2.0)
    pause.answered()
    pause.failed(10.0)
    assert pause.until == 12.0


def test_a_pause_is_as_long_as_the_provider_asked_for_within_the_longest() -> None:
    pause = Pause(longest=30.0)
    pause.asked(0.0, 7.0)
    assert (pause.until, pause.failures) == (7.0, 0)
    pause.asked(0.0, 7000.0)
    assert pause.until == 30.0
