"""The buckets of calls: taken from by all workers, a row for each target and kind of call."""

from __future__ import annotations

import sqlalchemy as sa

from dispatcher.budget import LEAST_PACE, RECOVERY, Bucket
from dispatcher.store.base import BaseStore

__all__ = ["MeterStore"]


class MeterStore(BaseStore):
    """The buckets of calls: taken from by all workers, a row for each target and kind of call."""

    def bucket(self, tx: sa.Connection, target: str, kind: str) -> Bucket:
        """Lock and read a bucket, after the target where that is locked too."""
        self.run(
            tx,
            """
            INSERT INTO dispatcher.bucket (target, kind) VALUES (:target, :kind)
            ON CONFLICT (target, kind) DO NOTHING
            """,
            target=target,
            kind=kind,
        )
        row = self.run(
            tx,
            """
            SELECT tokens, coalesce(extract(epoch FROM now() - taken_at), 0)::float8, pace,
                coalesce(extract(epoch FROM now() - slowed_at), 0)::float8
            FROM dispatcher.bucket WHERE target = :target AND kind = :kind FOR UPDATE
            """,
            target=target,
            kind=kind,
        ).one()
        return Bucket(*row)

    def write_tokens(self, tx: sa.Connection, target: str, kind: str, tokens: float) -> None:
        """Write what is left in a locked bucket."""
        self.run(
            tx,
            """
            UPDATE dispatcher.bucket SET tokens = :tokens, taken_at = now()
            WHERE target = :target AND kind = :kind
            """,
            target=target,
            kind=kind,
            tokens=tokens,
        )

    def slow_down(self, target: str, kind: str) -> None:
        """Halve the rate of a bucket: the provider said that a call was one too many.

        Calls that are refused together halve it once.
        """
        with self.transaction() as tx:
            self.run(
                tx,
                """
                INSERT INTO dispatcher.bucket AS b (target, kind, pace, slowed_at)
                VALUES (:target, :kind, 0.5, now())
                ON CONFLICT (target, kind) DO UPDATE
                SET slowed_at = now(), pace = greatest(:least, 0.5 * least(1, b.pace
                    * 2 ^ least(10, coalesce(extract(epoch FROM now() - b.slowed_at), 0)::float8
                        / :recovery)))
                WHERE b.slowed_at IS NULL OR b.slowed_at < now() - interval '1 second'
                """,
                target=target,
                kind=kind,
                least=LEAST_PACE,
                recovery=RECOVERY,
            )
