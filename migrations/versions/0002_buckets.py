"""Budgets of calls in rows of their own: one for each target and kind of call.

The bucket of launch calls moves there from its target; code that looks for it in the target's row
can no longer work.
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.execute(
        """
        CREATE TABLE dispatcher.bucket (
            target TEXT NOT NULL,
            kind TEXT NOT NULL,
            tokens DOUBLE PRECISION,
            taken_at TIMESTAMP WITH TIME ZONE,
            pace DOUBLE PRECISION DEFAULT 1 NOT NULL,
            slowed_at TIMESTAMP WITH TIME ZONE,
            CONSTRAINT bucket_pkey PRIMARY KEY (target, kind),
            CONSTRAINT bucket_kind CHECK (kind IN ('launch', 'logs', 'read', 'write')),
            CONSTRAINT bucket_pace CHECK (pace > 0 AND pace <= 1),
            CONSTRAINT bucket_taken CHECK ((tokens IS NULL) = (taken_at IS NULL))
        )
        """
    )
    op.execute(
        """
        COMMENT ON TABLE dispatcher.bucket
        IS 'budgets of calls to a provider, taken from by all workers'
        """
    )
    for column, comment in (
        ("kind", "of call"),
        ("tokens", "left when one was last taken"),
        ("pace", "the part of the full rate that it was slowed to"),
    ):
        op.execute(f"COMMENT ON COLUMN dispatcher.bucket.{column} IS '{comment}'")
    op.execute(
        """
        INSERT INTO dispatcher.bucket (target, kind, tokens, taken_at, pace, slowed_at)
        SELECT name, 'launch', tokens, tokens_at, pace, CASE WHEN pace < 1 THEN now() END
        FROM dispatcher.target WHERE (tokens IS NULL) = (tokens_at IS NULL)
        """
    )
    op.execute("ALTER TABLE dispatcher.target DROP COLUMN tokens, DROP COLUMN tokens_at")
    op.execute("ALTER TABLE dispatcher.target DROP COLUMN pace")
    op.execute("UPDATE dispatcher.installation SET oldest_code = greatest(oldest_code, 2)")


def downgrade() -> None:
    """Take back."""
    op.execute("ALTER TABLE dispatcher.target ADD COLUMN tokens DOUBLE PRECISION")
    op.execute("ALTER TABLE dispatcher.target ADD COLUMN tokens_at TIMESTAMP WITH TIME ZONE")
    op.execute("ALTER TABLE dispatcher.target ADD COLUMN pace DOUBLE PRECISION DEFAULT 1 NOT NULL")
    op.execute(
        "ALTER TABLE dispatcher.target ADD CONSTRAINT target_pace CHECK (pace > 0 AND pace <= 1)"
    )
    op.execute("COMMENT ON COLUMN dispatcher.target.tokens IS 'left in the bucket of launch calls'")
    op.execute("COMMENT ON COLUMN dispatcher.target.pace IS '1 is the full rate'")
    op.execute(
        """
        UPDATE dispatcher.target t
        SET tokens = b.tokens, tokens_at = b.taken_at, pace = b.pace
        FROM dispatcher.bucket b WHERE b.target = t.name AND b.kind = 'launch'
        """
    )
    op.execute("DROP TABLE dispatcher.bucket")
    op.execute("UPDATE dispatcher.installation SET oldest_code = 1")
