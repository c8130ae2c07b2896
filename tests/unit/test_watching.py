"""What the leaseholder of a target remembers between two looks."""

from __future__ import annotations

from dispatcher.polling import LONGEST, SHORTEST
from dispatcher.store.rows import ExecutionRow
from dispatcher.watching import FRESH, Watch, Watched


def by_handle(watch: Watch, handle: str) -> Watched | None:
    return next((one for one in watch._known.values() if one.handle == handle), None)


def row(number: int, age: float = 0.0, **fields: object) -> ExecutionRow:
    values: dict[str, object] = {
        "id": number,
        "key": f"key-{number}",
        "batch_id": "b",
        "job_name": "work",
        "state": "launched",
        "stray": False,
        "tasks": 1,
        "open_tasks": 1,
        "parallelism": 1,
        "handle": f"handle-{number}",
        "calls": 1,
        "looks": 0,
        "cancel_kind": None,
        "cancel_sent_at": None,
        "cancel_calls": 0,
        "launched_age": age,
        "started": True,
        "absent_for": None,
        "past_call_by": None,
        "intent_at": None,
    }
    return ExecutionRow(**{**values, **fields})  # type: ignore[arg-type]  # the values above


def watching(*rows: ExecutionRow, now: float = 100.0) -> Watch:
    watch = Watch()
    watch.add(rows, {}, now)
    return watch


def due(watch: Watch, now: float, page: int = 100) -> list[list[int]]:
    return [[one.id for one in group] for group in watch.due(now, page)]


def test_an_old_execution_is_looked_at_at_once_and_a_new_one_a_little_later() -> None:
    watch = watching(row(1, age=500), row(2))
    assert due(watch, 100, page=1) == [[1]]
    assert due(watch, 100 + SHORTEST, page=1) == [[1], [2]]


def test_what_is_not_launched_is_not_watched() -> None:
    watch = watching(row(1, state="unknown"), row(2, handle=None))
    assert len(watch) == 0


def test_the_rest_of_a_page_is_filled_with_what_is_due_next() -> None:
    watch = watching(*[row(n, age=500) for n in range(3)])
    watch.add([row(n) for n in range(10, 30)], {}, 100)
    assert due(watch, 100, page=2) == [[0, 1], [2, 10]]
    assert due(watch, 100, page=100) == [[0, 1, 2, *range(10, 30)]]


def test_nothing_is_asked_while_nothing_is_due() -> None:
    watch = watching(row(1))
    assert due(watch, 100 + 0.9 * SHORTEST) == []


def test_what_has_gone_is_forgotten_and_what_is_new_is_named() -> None:
    watch = watching(row(1, age=50), row(2, age=50))
    assert watch.keep([2, 3, 4]) == [3, 4]
    assert (len(watch), by_handle(watch, "handle-1")) == (1, None)
    two = by_handle(watch, "handle-2")
    assert two is not None
    assert two.id == 2
    watch.forget(77)


def test_a_look_sets_the_next_one_by_the_age() -> None:
    watch = watching(row(1, age=200))
    (page,) = watch.due(100, 10)
    watch.seen(page[0], 100)
    assert page[0].next_look == 110
    watch.hurry([1, 99], 100)
    assert page[0].next_look == 100 + SHORTEST


def test_a_page_that_cannot_be_read_is_tried_again_later_and_later() -> None:
    watch = watching(row(1, age=200))
    (page,) = watch.due(100, 10)
    waits = []
    for failures in (1, 2, 3, 20):
        watch.failed(page, 100, failures)
        waits.append(page[0].next_look - 100)
    assert waits == [2 * SHORTEST, 4 * SHORTEST, 8 * SHORTEST, LONGEST]


def test_a_pause_holds_all_looks() -> None:
    watch = watching(row(1, age=200))
    watch.pause(130)
    assert due(watch, 129.9) == []
    assert due(watch, 130) == [[1]]


def test_what_ended_teaches_when_the_next_may_end() -> None:
    watch = Watch()
    for number in range(5):
        watch.add([row(number, age=500)], {}, 100)
        one = by_handle(watch, f"handle-{number}")
        assert one is not None
        watch.ended(one, 40.0 if number else None)
    watch.add([row(8, age=500)], {}, 100)
    (page,) = watch.due(100, 10)
    watch.seen(page[0], 100)
    watch.ended(page[0], None)  # by the provider's times: unknown; it ran for 500 s when last seen
    watch.add([row(9)], {}, 100)
    nine = by_handle(watch, "handle-9")
    assert nine is not None
    assert nine.next_look == 110, "a quarter of 40 s, in which no execution of this job ended"


def test_a_deadline_is_held_only_against_what_was_just_looked_at() -> None:
    watch = watching(row(1, age=500), row(2, age=500), row(3, age=500))
    (page,) = watch.due(100, 10)
    watch.seen(page[0], 100)
    watch.seen(page[1], 100)
    page[0].looked = 100 - FRESH - 1
    assert watch.fresh([1, 2, 3, 4], 100) == [2]
    assert due(watch, 100, page=2) == [[1, 3]], "the others are looked at at once"


def test_an_absence_that_another_worker_saw_goes_on() -> None:
    watch = watching(row(1, age=500, absent_for=45.0))
    (page,) = watch.due(100, 10)
    assert page[0].absent == 55
