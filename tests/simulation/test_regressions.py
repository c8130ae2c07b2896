"""Stories that once ended badly, as short as they could be made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from simulation.story import (
    Advance,
    At,
    Continue,
    Database,
    Enqueue,
    Explain,
    Fails,
    Follow,
    Launch,
    Provider,
    Step,
    Strays,
    Sweep,
    TaskEnds,
    Vanish,
    tell,
)

from dispatcher.states import Outcome
from dispatcher.testing import Fault


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    made = Database(database_url)
    yield made
    made.close()


def test_a_target_that_only_the_look_for_strays_found_down_comes_up_again(
    database: Database,
) -> None:
    tell(database, Provider(), [Fails("strays", Fault.UNAVAILABLE), Strays()])


def test_a_target_that_a_worker_found_down_before_it_died_comes_up_again(
    database: Database,
) -> None:
    tell(
        database,
        Provider(),
        [
            Enqueue(items=1),
            Sweep(),
            Launch(),
            Fails("poll", Fault.UNAVAILABLE),
            Advance(2),
            Follow(0, die=At("before poll", 2)),
            Fails("poll", Fault.UNAVAILABLE),
            Advance(2),
            Follow(0),
            Follow(0, die=At("after a commit", 1)),
            TaskEnds(0, Outcome.SUCCEEDED),
        ],
    )


@pytest.mark.parametrize("verb", ["launch", "find", "poll", "cancel", "strays", "logs"])
def test_a_call_that_is_refused_for_ever_is_no_end_of_the_turn(
    database: Database, verb: str
) -> None:
    trouble: list[Step] = [
        Enqueue("packed", items=4),
        Sweep(),
        Fails("launch", Fault.REPLY_LOST),
        Fails(verb, Fault.REJECTED, times=2),
        Launch(),
        Advance(20),
        Follow(0),
        Advance(10),
        Follow(1),
        TaskEnds(0, Outcome.FAILED),
        Advance(10),
        Follow(0),
        Vanish(0),
        Advance(30),
        Follow(0),
        Advance(10),
        Follow(0),
        Strays(),
    ]
    tell(database, Provider(second_never_starts=True), trouble)


def test_a_chunk_that_was_split_is_explained(database: Database) -> None:
    attempt: list[Step] = [Launch(), Advance(65), Follow(), Advance(20)]
    tell(
        database,
        Provider(),
        [Enqueue("halved", items=2), Sweep(), *attempt, *attempt, Explain()],
    )


def test_an_old_look_and_a_late_answer_do_not_start_a_key_twice(database: Database) -> None:
    """The first looks and falls asleep; the second calls again and dies; the first goes on."""
    tell(
        database,
        Provider(safe=False),
        [
            Enqueue(items=1),
            Sweep(),
            Launch(0, die=At("before launch")),
            Advance(16),
            Follow(0),
            Advance(20),
            Follow(0, freeze=At("after find")),
            Follow(1, die=At("after launch")),
            Advance(16),
            Follow(1, die=At("before find")),
            Continue(),
        ],
    )
