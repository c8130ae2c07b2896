"""Chunks that wait to be split until other successes of their batch pay for it."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.execute("ALTER TABLE dispatcher.chunk ADD COLUMN awaits_split TEXT")
    op.execute(
        "COMMENT ON COLUMN dispatcher.chunk.awaits_split IS"
        " 'it waits, undue, until successes of its batch pay for this cut of it'"
    )
    op.execute(
        "ALTER TABLE dispatcher.chunk ADD CONSTRAINT chunk_awaits_split"
        " CHECK (awaits_split IS NULL"
        " OR (awaits_split IN ('first', 'halves') AND state = 'pending')) NOT VALID"
    )
    op.execute("ALTER TABLE dispatcher.chunk VALIDATE CONSTRAINT chunk_awaits_split")
    op.execute(
        "CREATE INDEX chunk_waits_for_split ON dispatcher.chunk (batch_id, index)"
        " WHERE awaits_split IS NOT NULL"
    )


def downgrade() -> None:
    """Take back. What waits to be split is due again, and is tried once more."""
    op.execute("DROP INDEX dispatcher.chunk_waits_for_split")
    op.execute("ALTER TABLE dispatcher.chunk DROP CONSTRAINT chunk_awaits_split")
    op.execute("ALTER TABLE dispatcher.chunk DROP COLUMN awaits_split")
