"""Hypothesis writes stories of everything that can go wrong, and none of them may end badly.

`DISPATCHER_SIM_EXAMPLES=5000` tells that many stories instead of the few that fit into a test run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from simulation.story import (
    Advance,
    At,
    Cancel,
    ConsoleCancel,
    Continue,
    Database,
    Enqueue,
    Explain,
    Fails,
    Follow,
    Launch,
    Plan,
    Provider,
    Retry,
    Step,
    Strays,
    Sweep,
    TaskEnds,
    Turn,
    Vanish,
    tell,
)

from dispatcher.states import Outcome
from dispatcher.testing import Fault

EXAMPLES: Final = int(os.environ.get("DISPATCHER_SIM_EXAMPLES", "60"))

T = TypeVar("T")


def seldom(strategy: st.SearchStrategy[T]) -> st.SearchStrategy[T | None]:
    return st.one_of(st.none(), st.none(), strategy)


OUTSIDE = ["before a transaction", "after a commit"]
CALLS = [
    f"{when} {verb}"
    for verb in ("find", "poll", "cancel", "strays")
    for when in ("before", "after")
]
LAUNCHES = ["before launch", "after launch"]
TIMES = st.integers(1, 6)
FEW = st.integers(1, 2)
WORKER = st.integers(0, 1)
DIE = seldom(
    st.one_of(
        st.builds(At, st.sampled_from([*OUTSIDE, "before a commit"]), TIMES),
        st.builds(At, st.sampled_from([*LAUNCHES, *CALLS]), FEW),
    )
)
FREEZE = seldom(
    st.one_of(
        st.builds(At, st.sampled_from(OUTSIDE), TIMES),
        st.builds(At, st.sampled_from([*LAUNCHES, *CALLS]), FEW),
    )
)
CLIENT_DIES = seldom(st.builds(At, st.sampled_from([*OUTSIDE, "before a commit"])))
NUMBER = st.integers(0, 3)
WORK = {"worker": WORKER, "die": DIE, "freeze": FREEZE}

PROVIDERS = st.builds(
    Provider,
    safe=st.booleans(),
    lag=st.sampled_from([0.0, 4.0]),
    max_running=st.sampled_from([None, 2, 3]),
    max_executions=st.sampled_from([None, None, 2]),
    launches_per_minute=st.sampled_from([None, None, 30.0]),
    page_size=st.sampled_from([100, 2]),
    obeys_timeout=st.booleans(),
    absent_grace=st.sampled_from([2.0, 8.0]),
    second_never_starts=st.booleans(),
    concurrency=st.integers(1, 3),
)

ENQUEUE = st.builds(
    Enqueue,
    job=st.sampled_from(["single", "packed", "limited", "halved"]),
    items=st.integers(0, 6),
    key=seldom(st.sampled_from(["k1", "k2"])),
    die=CLIENT_DIES,
)
FAULTS = st.builds(
    Fails,
    verb=st.sampled_from(["launch", "launch", "find", "poll", "cancel", "strays", "logs"]),
    fault=st.sampled_from(Fault),
    times=st.integers(1, 3),
    retry_after=st.sampled_from([None, 1.0, 20.0]),
)
ENDS = st.builds(
    TaskEnds,
    which=NUMBER,
    outcome=st.sampled_from(
        [
            Outcome.SUCCEEDED,
            Outcome.SUCCEEDED,
            Outcome.FAILED,
            Outcome.PREEMPTED,
            Outcome.OUT_OF_MEMORY,
            Outcome.NO_CAPACITY,
            Outcome.START_FAILED,
        ]
    ),
)
ADVANCE = st.builds(Advance, st.sampled_from([0.5, 2.0, 2.0, 6.0, 16.0, 26.0, 40.0, 130.0, 650.0]))
LAUNCH = st.builds(Launch, **WORK)
FOLLOW = st.builds(Follow, **WORK)
TURN = st.builds(Turn, **WORK)

PLAN = st.builds(Plan, **WORK, batch=NUMBER)
ALONE: st.SearchStrategy[Step] = st.one_of(
    TURN,
    LAUNCH,
    FOLLOW,
    FOLLOW,
    ADVANCE,
    ADVANCE,
    ENDS,
    ENDS,
    FAULTS,
    st.builds(Continue, NUMBER),
    ENQUEUE,
    PLAN,
    st.builds(Sweep, **WORK),
    st.builds(Strays, **WORK),
    st.builds(Cancel, NUMBER, die=CLIENT_DIES),
    st.builds(Retry, NUMBER, everything=st.booleans(), die=CLIENT_DIES),
    st.builds(Vanish, NUMBER),
    st.builds(ConsoleCancel, NUMBER),
    st.builds(Explain, NUMBER),
)

# Chance alone seldom leads to the places where it gets difficult: a launch in trouble, looked for
# by others while time goes by.
LONG = st.builds(Advance, st.sampled_from([16.0, 26.0, 33.0, 65.0]))
TROUBLE = st.one_of(
    st.builds(Launch, WORKER, die=st.builds(At, st.sampled_from(LAUNCHES), FEW)),
    st.builds(Launch, WORKER, freeze=st.builds(At, st.sampled_from(LAUNCHES), FEW)),
    st.builds(Launch, WORKER, freeze=st.builds(At, st.just("after a commit"), st.just(2))),
    st.builds(Launch, WORKER),
)
LOOKED_FOR = st.one_of(FOLLOW, st.builds(Follow, WORKER), LONG, FAULTS)
TROUBLED: st.SearchStrategy[tuple[Step, ...]] = st.builds(
    lambda *parts: (*parts[:4], *parts[4], *parts[5:]),
    ENQUEUE,
    st.builds(Sweep),
    seldom(FAULTS).map(lambda fault: fault or Advance(0.5)),
    TROUBLE,
    st.lists(LOOKED_FOR, min_size=2, max_size=8),
    st.one_of(st.builds(Continue, NUMBER), ALONE),
)
# And: tasks that run and end while polls, cancels and settles go wrong.
POLL_FAULTS = st.builds(
    Fails,
    verb=st.sampled_from(["poll", "poll", "cancel", "logs"]),
    fault=st.sampled_from(Fault),
    times=st.integers(1, 2),
)
WATCHED = st.one_of(
    st.tuples(ENDS, FOLLOW),
    st.tuples(POLL_FAULTS, LONG, st.builds(Follow, WORKER)),
    st.tuples(st.builds(Cancel, NUMBER), FOLLOW),
    st.tuples(st.builds(Vanish, NUMBER), LONG, FOLLOW),
    st.tuples(st.builds(ConsoleCancel, NUMBER), LONG, FOLLOW),
    st.tuples(LONG, FOLLOW),
    st.tuples(st.builds(Explain, NUMBER)),
)
FOLLOWED: st.SearchStrategy[tuple[Step, ...]] = st.builds(
    lambda asked, turn, parts: (asked, turn, *(step for part in parts for step in part)),
    ENQUEUE,
    st.builds(Turn, WORKER),
    st.lists(WATCHED, min_size=2, max_size=6),
)
STEPS: st.SearchStrategy[list[Step]] = st.lists(
    st.one_of(ALONE.map(lambda step: (step,)), TROUBLED, FOLLOWED), min_size=8, max_size=24
).map(lambda parts: [step for part in parts for step in part])


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    made = Database(database_url)
    yield made
    made.close()


@pytest.mark.long
@pytest.mark.timeout(600 + 10 * EXAMPLES)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(provider=PROVIDERS, first=ENQUEUE, steps=STEPS)
def test_every_batch_ends_and_nothing_runs_twice_whatever_dies_sleeps_or_lies(
    database: Database, provider: Provider, first: Enqueue, steps: list[Step]
) -> None:
    tell(database, provider, [first, Sweep(), *steps])
