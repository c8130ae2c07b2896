"""${message}

Rule: the code of the release before this one is still running while this is applied and for some
time after. Add columns as nullable or with a default; drop or rename only what no supported release
uses; build indexes on large tables CONCURRENTLY; raise installation.oldest_code in the migration
after which older code can no longer work.
"""

from __future__ import annotations

from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    ${upgrades if upgrades else ""}


def downgrade() -> None:
    """Take back."""
    ${downgrades if downgrades else ""}
