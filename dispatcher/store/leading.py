"""Heartbeats of workers; leases, pace and outages of targets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

import sqlalchemy as sa

from dispatcher import schema
from dispatcher.store.base import LIVE, BaseStore, Conflict

__all__ = ["LeadStore"]

SOON: Final = "SET LOCAL lock_timeout = '1s'"
"""A worker's clock takes leases: it must not wait for a process that was stopped with the row."""


class LeadStore(BaseStore):
    """Heartbeats of workers; leases, pace and outages of targets."""

    def beat(self, *, host: str, pid: int, version: str, problems: Mapping[str, str]) -> None:
        """Write this worker's heartbeat."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                INSERT INTO dispatcher.worker
                    (id, host, pid, version, code_version, problems, started_at, heartbeat_at)
                VALUES (:id, :host, :pid, :version, :code_version, CAST(:problems AS json), now(),
                    now())
                ON CONFLICT (id) DO UPDATE
                SET heartbeat_at = now(), problems = excluded.problems, stopped_at = NULL
                """,
                id=self.actor,
                host=host,
                pid=pid,
                version=version,
                code_version=schema.CODE_VERSION,
                problems=json.dumps(dict(problems)),
            )

    def forget_workers(self, silent: timedelta) -> None:
        """Drop the rows of workers that stopped or fell silent long ago."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                DELETE FROM dispatcher.worker
                WHERE heartbeat_at < now() - CAST(:silent AS interval)
                """,
                silent=silent,
            )

    def lease(
        self,
        target: str,
        *,
        backend: str,
        limits: Mapping[str, Any],
        home: Mapping[str, str] | None,
        lease: timedelta,
    ) -> str | None:
        """Take or renew a target's lease; None if it is ours now, else why it is not.

        A target with a home is served only there. When its machine was rebooted or its container
        restarted, the same machine takes over as soon as the old lease has run out. A target that
        was given another backend leaves its home, once nothing of the old one runs.

        Raises:
            Conflict: another session has held the target's row for a second.
        """
        with self.transaction() as tx:
            self.run(tx, SOON)
            self.run(
                tx,
                """
                INSERT INTO dispatcher.target (name, backend, limits, home)
                VALUES (:name, :backend, CAST(:limits AS json), CAST(:home AS json))
                ON CONFLICT (name) DO NOTHING
                """,
                name=target,
                backend=backend,
                limits=json.dumps(dict(limits)),
                home=None if home is None else json.dumps(dict(home)),
            )
            row = self.run(
                tx,
                """
                SELECT home, lease_owner, coalesce(lease_until > now(), false), backend
                FROM dispatcher.target WHERE name = :name FOR UPDATE
                """,
                name=target,
            ).one()
            theirs, owner, leased, before = row
            if theirs is not None and before != backend:
                live = self._live(tx, target)
                if live:
                    return (
                        f"target {target} still has {live} executions of backend {before} on host "
                        f"{theirs.get('host')}: serve it there with that backend until they end"
                    )
            elif theirs is not None and not _is_same_machine(theirs, home):
                return f"target {target} can be served only on {_name_machine(theirs, home)}"
            if leased and owner != self.actor:
                return f"target {target} is led by {owner}"
            self.run(
                tx,
                """
                UPDATE dispatcher.target
                SET lease_until = now() + CAST(:lease AS interval), lease_owner = :actor,
                    lease_token = lease_token + CASE WHEN lease_owner = :actor THEN 0 ELSE 1 END,
                    backend = :backend, limits = CAST(:limits AS json), home = CAST(:home AS json)
                WHERE name = :name
                """,
                name=target,
                backend=backend,
                limits=json.dumps(dict(limits)),
                home=None if home is None else json.dumps(dict(home)),
                lease=lease,
                actor=self.actor,
            )
            return None

    def _live(self, tx: sa.Connection, target: str) -> int:
        """Count what may still run on a target."""
        count: int = self.run(
            tx,
            f"SELECT count(*) FROM dispatcher.execution WHERE target = :target AND state IN {LIVE}",  # noqa: S608 - a constant of base.py
            target=target,
        ).scalar_one()
        return count

    def release(self) -> None:
        """Give up this worker's leases and say that it stopped, so that others go on at once.

        Raises:
            Conflict: another session has held a target's row for a second; the others are free.
        """
        with self.transaction() as tx:
            self.run(
                tx,
                "UPDATE dispatcher.worker SET stopped_at = now() WHERE id = :actor",
                actor=self.actor,
            )
            targets = self.run(
                tx,
                "SELECT name FROM dispatcher.target WHERE lease_owner = :actor ORDER BY name",
                actor=self.actor,
            ).scalars()
            held = list(targets)
        busy: Conflict | None = None
        for target in held:
            try:
                self._release(target)
            except Conflict as error:
                busy = error
        if busy is not None:
            raise busy

    def _release(self, target: str) -> None:
        """Give up the lease of one target."""
        with self.transaction() as tx:
            self.run(tx, SOON)
            self.run(
                tx,
                """
                UPDATE dispatcher.target SET lease_until = now(), lease_owner = NULL
                WHERE name = :name AND lease_owner = :actor
                """,
                name=target,
                actor=self.actor,
            )

    def target_down(self, name: str, reason: str, *, resume_in: float | None) -> None:
        """Record that a target does not answer.

        With `resume_in` it is launches that fail: they are held that long, doubled with each such
        failure in a row up to a minute, and then tried one by one.
        """
        with self.transaction() as tx:
            self.run(
                tx,
                """
                WITH old AS (
                    SELECT name FROM dispatcher.target WHERE name = :name AND down_since IS NULL
                ), t AS (
                    UPDATE dispatcher.target
                    SET down_since = coalesce(down_since, now()), down_reason = :reason,
                        down_calls = down_calls
                            + CASE WHEN CAST(:resume_in AS float8) IS NULL THEN 0 ELSE 1 END,
                        resume_at = CASE WHEN CAST(:resume_in AS float8) IS NULL THEN resume_at
                            ELSE now() + interval '1 second'
                                * least(60, :resume_in * 2 ^ least(down_calls, 6)) END
                    WHERE name = :name
                )
                INSERT INTO dispatcher.event (at, actor, kind, old, new, reason)
                SELECT now(), :actor, 'target', 'up', 'down', name || ': ' || :reason FROM old
                """,
                name=name,
                reason=reason,
                resume_in=resume_in,
                actor=self.actor,
            )

    def hold_launches(self, name: str, seconds: float) -> None:
        """Launch nothing on a target for a while: it asked us to slow down."""
        with self.transaction() as tx:
            self.run(
                tx,
                """
                UPDATE dispatcher.target
                SET resume_at = greatest(resume_at, now() + :seconds * interval '1 second')
                WHERE name = :name
                """,
                name=name,
                seconds=seconds,
            )

    def target_up(self, name: str, *, launches: bool) -> None:
        """Record that a target answers again: launches, or only the reading of states.

        That states can be read says nothing about an outage that launches told of.
        """
        with self.transaction() as tx:
            self.run(
                tx,
                """
                WITH t AS (
                    UPDATE dispatcher.target
                    SET down_since = NULL, down_reason = NULL, down_calls = 0, resume_at = NULL
                    WHERE name = :name AND down_since IS NOT NULL
                        AND (:launches OR down_calls = 0)
                    RETURNING name
                )
                INSERT INTO dispatcher.event (at, actor, kind, old, new, reason)
                SELECT now(), :actor, 'target', 'down', 'up', name FROM t
                """,
                name=name,
                launches=launches,
                actor=self.actor,
            )


def _is_same_machine(theirs: Mapping[str, str], ours: Mapping[str, str] | None) -> bool:
    """Compare machines; where one of the two has no identity, host names."""
    if ours is None:
        return False
    by = "machine" if theirs.get("machine") and ours.get("machine") else "host"
    return theirs.get(by) == ours.get(by)


def _name_machine(theirs: Mapping[str, str], ours: Mapping[str, str] | None) -> str:
    """Name a machine so that it can be told from ours."""
    name = f"host {theirs.get('host')}"
    if ours is not None and theirs.get("host") == ours.get("host"):
        name += f" of machine {theirs.get('machine')}, and this is {ours.get('machine')}"
    return name
