"""Every statement that moves a row, one function a transition, a module for each verb.

Each transition names the old state in its WHERE and writes its event in the same transaction; a
function that moved nothing returns an empty result, and that is ordinary: a message was doubled or
came late. What is to be moved is decided in `dispatcher/engine`; what people read is in
`queries.py`.

Where chunks are found by their primary key, their state is compared as `state || ''`: right after a
plan no statistics tell Postgres that a partial index on the state holds the whole batch, and it
would go through all of it for each chunk.

Locks are taken in one order everywhere: target, job, batch, execution, chunk, each by id. Time is
the database's `now()`, the start of the transaction.
"""

from __future__ import annotations

from dispatcher.store.base import Conflict, again
from dispatcher.store.enqueueing import EnqueueStore, new_batch_id
from dispatcher.store.firing import FireStore
from dispatcher.store.following import FollowStore
from dispatcher.store.intervening import InterveneStore
from dispatcher.store.launching import LaunchStore
from dispatcher.store.leading import LeadStore
from dispatcher.store.metering import MeterStore
from dispatcher.store.planning import Planning
from dispatcher.store.settling import SettleStore

__all__ = ["Conflict", "Planning", "Store", "again", "new_batch_id"]


class Store(
    EnqueueStore,
    LaunchStore,
    FollowStore,
    SettleStore,
    InterveneStore,
    FireStore,
    LeadStore,
    MeterStore,
):
    """All transitions over one SQLAlchemy engine; `PlanStore` comes with `InterveneStore`."""
