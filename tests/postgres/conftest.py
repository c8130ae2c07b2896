"""A bench on a database of the test's own; whatever a test did, the invariants hold at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
import structlog
from workbench import Bench, job

MakeBench: TypeAlias = Callable[..., Bench]


@pytest.fixture(autouse=True)
def plain_tracebacks() -> Iterator[None]:
    """Log tracebacks as text: with the variables of each frame, one takes a second."""
    # The list itself is changed: a logger may have been told to keep it.
    processors = structlog.get_config()["processors"]
    before = list(processors)
    plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    processors[:] = [
        plain if isinstance(one, structlog.dev.ConsoleRenderer) else one for one in before
    ]
    yield
    processors[:] = before


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
