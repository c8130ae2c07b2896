"""Computations as the application knows them: its own rows, and the batches behind them.

A computation is a row of the application and a batch of the dispatcher, written in one transaction:
both exist or neither. Whoever asks is a tenant, and sees no computation but its own. `app.py` says
all of this in HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import sqlalchemy as sa

from dispatcher import Batch, BatchState, Dispatcher

JOB = "count-primes"
BLOCK = 1_000_000
"""Numbers that one item stands for."""


ID = re.compile("[a-z0-9]{1,40}")

tables = sa.MetaData()
computation = sa.Table(
    "computation",
    tables,
    sa.Column("id", sa.Text, primary_key=True, comment="The batch's id."),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("upto", sa.BigInteger, nullable=False),
    sa.Column("asked_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
)


class NoSuchComputation(Exception):
    """There is none of this id, or it is another tenant's: that is not told apart."""


class TooLate(Exception):
    """It has ended already."""


class NotDone(Exception):
    """There is no output, as the computation has not succeeded."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a tenant asks for. The values were looked at by `app.py`, and will be by the job."""

    upto: int
    args: list[str] | None = None
    env: dict[str, str] | None = None
    tasks: int | None = None
    timeout: int | None = None
    """Seconds for each task."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one task found."""

    task: int
    attempt: int
    count: int


class Computations:
    """All computations of all tenants. Safe to use from threads."""

    def __init__(self, dispatcher: Dispatcher, engine: sa.Engine) -> None:
        self._dispatcher = dispatcher
        self._engine = engine

    def start(self, tenant: str, key: str, asked: Asked) -> Batch:
        """Write a computation and its batch; or find the ones that the tenant's key has.

        Raises:
            IdempotencyConflict: the key stands for another request.
            InvalidInput: the job does not allow that.
        """
        with self._engine.begin() as connection:
            batch = self._dispatcher.enqueue(
                JOB,
                blocks(asked.upto),
                params={"upto": asked.upto},
                key=f"computation/{tenant}/{key}",
                overrides={
                    "args": asked.args,
                    "env": asked.env,
                    "tasks": asked.tasks,
                    "timeout": asked.timeout,
                },
                labels={"tenant": tenant},
                connection=connection,
            )
            # A key that was used before gives the batch of before, which has its row.
            connection.execute(
                sa.text(
                    "INSERT INTO computation (id, tenant, upto) VALUES (:id, :tenant, :upto) "
                    "ON CONFLICT (id) DO NOTHING"
                ),
                {"id": batch.id, "tenant": tenant, "upto": asked.upto},
            )
        return batch

    def get(self, tenant: str, computation_id: str) -> Batch:
        """Look a computation up.

        Raises:
            NoSuchComputation: the tenant has none of this id.
        """
        if not ID.fullmatch(computation_id):  # Postgres refuses some texts, such as a NUL
            raise NoSuchComputation(computation_id)
        statement = sa.select(computation.c.id).where(
            computation.c.id == computation_id, computation.c.tenant == tenant
        )
        with self._engine.connect() as connection:
            found = connection.execute(statement).scalar_one_or_none()
        if found is None:
            raise NoSuchComputation(computation_id)
        return self._dispatcher.get(found)

    def output(self, tenant: str, computation_id: str) -> list[Part]:
        """Read what each task found.

        Raises:
            NoSuchComputation: the tenant has none of this id.
            NotDone: it has not succeeded (yet).
        """
        batch = self.get(tenant, computation_id)
        if batch.state != "succeeded":
            raise NotDone(f"it is {batch.state}, and {batch.progress:.0%} of its tasks have ended")
        parts: dict[int, Part] = {}
        for output in self._dispatcher.outputs(batch.id):
            found = parts.get(output.chunk_index, Part(output.chunk_index, output.attempt, 0))
            parts[output.chunk_index] = replace(found, count=found.count + output.value["count"])
        return list(parts.values())

    def cancel(self, tenant: str, computation_id: str) -> Batch:
        """Ask for the end of a computation; again, where it was asked for before.

        Raises:
            NoSuchComputation: the tenant has none of this id.
            TooLate: it had succeeded or failed before.
        """
        batch = self.get(tenant, computation_id).cancel(f"cancelled by {tenant}")
        if batch.finished and batch.state is not BatchState.CANCELLED:
            raise TooLate(f"it had {batch.state} before it could be cancelled")
        return batch


def blocks(upto: int) -> Iterator[dict[str, int]]:
    """Cut the numbers below `upto` into items."""
    for start in range(0, upto, BLOCK):
        yield {"from": start, "to": min(start + BLOCK, upto)}
