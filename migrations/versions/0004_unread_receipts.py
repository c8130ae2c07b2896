"""Since when the receipts of tasks that have ended cannot be read: for `explain`."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.execute("ALTER TABLE dispatcher.execution ADD COLUMN unread_since TIMESTAMP WITH TIME ZONE")
    op.execute(
        "COMMENT ON COLUMN dispatcher.execution.unread_since IS"
        " 'tasks have ended whose receipts cannot be read'"
    )


def downgrade() -> None:
    """Take back."""
    op.execute("ALTER TABLE dispatcher.execution DROP COLUMN unread_since")
