"""A schedule's due time becomes one batch, whoever and however many fire it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Literal

import pytest
import sqlalchemy as sa

from dispatcher import Config, Job, Target
from dispatcher.engine import Engine, firer
from dispatcher.errors import InvalidInput
from dispatcher.schedule import Schedule
from dispatcher.schema import create_engine
from dispatcher.store import Store
from dispatcher.storing import Told, tell
from dispatcher.testing import NullBackend, NullSettings

NOW = datetime(2026, 11, 1, 2, 0, 30, tzinfo=UTC)


class Site:
    """Workers over one database whose time is what the test says."""

    def __init__(self, url: str) -> None:
        self.engine = create_engine(url)
        self.schedule = Schedule(name="nightly", cron="0 * * * *", job="work", items=None)
        with self.engine.begin() as tx:
            tx.execute(sa.text("CREATE TABLE public.clock (at timestamptz)"))
            tx.execute(sa.text("INSERT INTO public.clock VALUES (:at)"), {"at": NOW})

    def move(self, **time: int) -> None:
        with self.engine.begin() as tx:
            tx.execute(sa.text("UPDATE public.clock SET at = at + :by"), {"by": timedelta(**time)})

    def worker(
        self, receipt: Literal["optional", "required"] = "optional", **more: object
    ) -> Engine:
        target = Target(name="fake", backend="null", settings=NullSettings())
        job = Job(
            name="work", target="fake", command=("x",), receipt=receipt, items={"source": "m:f"}
        )
        schedule = self.schedule.model_copy(update=more)
        config = Config({"fake": target}, {"work": job}, "test", {"nightly": schedule})
        store = Store(self.engine, actor="w", now="(SELECT at FROM public.clock)")
        return Engine(store, config, backends={"fake": NullBackend("fake", NullSettings())})

    def rows(self) -> list[tuple[object, ...]]:
        with self.engine.begin() as tx:
            return [
                tuple(row)
                for row in tx.execute(
                    sa.text(
                        "SELECT f.due_at, f.batch_id IS NOT NULL, f.reason"
                        " FROM dispatcher.schedule_firing f ORDER BY due_at"
                    )
                )
            ]

    def batches(self) -> int:
        with self.engine.begin() as tx:
            count: int = tx.execute(sa.text("SELECT count(*) FROM dispatcher.batch")).scalar_one()
            return count


@pytest.fixture
def site(database_url: str) -> Iterator[Site]:
    made = Site(database_url)
    yield made
    made.engine.dispose()


def test_a_new_schedule_fires_from_now_on(site: Site) -> None:
    worker = site.worker()
    assert worker.fire() == []
    site.move(minutes=59, seconds=29)
    assert worker.fire() == []
    site.move(seconds=1)
    (batch,) = worker.fire()
    assert worker.fire() == [], "once"
    with site.engine.begin() as tx:
        found = tx.execute(
            sa.text("SELECT actor, labels ->> 'schedule' FROM dispatcher.batch WHERE id = :id"),
            {"id": batch},
        ).one()
    assert tuple(found) == ("schedule nightly", "nightly")


def test_missed_times_are_recorded_and_the_last_is_fired(site: Site) -> None:
    worker = site.worker()
    worker.fire()
    site.move(hours=5)
    assert len(worker.fire()) == 1
    assert [fired for _, fired, _ in site.rows()] == [False] * 5 + [True]
    assert site.rows()[1][2] == "missed, and catch_up is last"


def test_two_that_fire_at_once_make_one_batch(site: Site) -> None:
    site.worker().fire()
    site.move(hours=3)
    start = threading.Barrier(4)
    fired: list[str] = []

    def fire() -> None:
        worker = site.worker(catch_up="all")
        start.wait(60)
        for _ in range(3):
            fired.extend(worker.fire())

    threads = [threading.Thread(target=fire) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fired) == len(set(fired)) == 3
    assert site.batches() == 3


def test_a_time_that_is_due_while_the_storage_has_to_be_mended_makes_a_batch_that_waits(
    site: Site,
) -> None:
    worker = site.worker(receipt="required")
    told = tell(Told(results=True, claims=True, storage_problem="there is no such bucket"))
    home, lease = None, timedelta(days=1)
    assert worker.store.lease("fake", backend="null", limits=told, home=home, lease=lease) is None
    worker.fire()
    site.move(hours=1)
    assert len(worker.fire()) == 1


def test_one_that_cannot_be_enqueued_is_recorded_with_its_reason_and_holds_up_nothing(
    site: Site,
) -> None:
    worker = site.worker(items="missing.jsonl")
    worker.fire()
    site.move(hours=1)
    assert worker.fire() == []
    assert "missing.jsonl" in str(site.rows()[-1][2])
    site.move(hours=1)
    assert len(site.worker().fire()) == 1


def test_a_reason_that_no_column_holds_is_recorded_in_characters_that_it_does(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise InvalidInput("line 3: \0 is no item")

    worker = site.worker()
    worker.fire()
    site.move(hours=1)
    with monkeypatch.context() as broken:
        broken.setattr(firer, "scheduled", refuse)
        assert worker.fire() == []
    assert site.rows()[-1][2] == "line 3: \N{REPLACEMENT CHARACTER} is no item"
    site.move(hours=1)
    assert len(worker.fire()) == 1
