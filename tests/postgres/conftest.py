"""A bench on a database of the test's own; whatever a test did, the invariants hold at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
from workbench import Bench, job

MakeBench: TypeAlias = Callable[..., Bench]


@pytest.fixture
def make_bench(database_url: str) -> Iterator[MakeBench]:
    """Make the bench of this test: jobs, and `limits`, `settings`, `wrap` of its target."""
    made: list[Bench] = []

    def make(*jobs: Any, **options: Any) -> Bench:
        assert not made, "one bench a test: its provider is found by the target's name"
        made.append(Bench(database_url, jobs or (job(),), **options))
        return made[0]

    yield make
    for bench in made:
        bench.close()


@pytest.fixture
def bench(make_bench: MakeBench) -> Bench:
    """A bench with one job, `work`, that runs an item a chunk and retries after 10, 20, … s."""
    return make_bench()
