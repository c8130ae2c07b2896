"""Receipts: how each item ended, chunks that are split, and success by items.

Code that does not know the state `split`, the outcome `suspect` or a batch without
`max_failed_chunks` can no longer work.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

OUTCOMES = (
    "cancelled", "failed", "lost", "no_capacity", "out_of_memory", "preempted", "rejected",
    "start_failed", "succeeded", "timed_out",
)  # fmt: skip
CHUNK_STATES = ("cancelled", "failed", "launching", "pending", "running", "succeeded")
FINAL_CHUNK = ("cancelled", "failed", "succeeded")
BATCH_CANCELS = ("batch_deadline", "invalid", "operator")
EXECUTION_CANCELS = ("batch_deadline", "invalid", "operator", "start_timeout", "stray", "timeout")


def _words(words: tuple[str, ...]) -> str:
    return ", ".join(f"'{word}'" for word in sorted(words))


def _recheck(table: str, name: str, check: str) -> None:
    op.execute(f"ALTER TABLE dispatcher.{table} DROP CONSTRAINT {table}_{name}")
    op.execute(f"ALTER TABLE dispatcher.{table} ADD CONSTRAINT {table}_{name} CHECK ({check})")


def _checks(
    outcomes: tuple[str, ...],
    states: tuple[str, ...],
    final: tuple[str, ...],
    batch_cancels: tuple[str, ...],
    execution_cancels: tuple[str, ...],
) -> None:
    for table in ("attempt", "chunk"):
        _recheck(table, "outcome", f"outcome IN ({_words(outcomes)})")
    _recheck("chunk", "state", f"state IN ({_words(states)})")
    _recheck("chunk", "finished", f"(finished_at IS NOT NULL) = (state IN ({_words(final)}))")
    _recheck("batch", "cancel_kind", f"cancel_kind IN ({_words(batch_cancels)})")
    _recheck("execution", "cancel_kind", f"cancel_kind IN ({_words(execution_cancels)})")


def _comments(table: str, **comments: str) -> None:
    for column, comment in comments.items():
        op.execute(f"COMMENT ON COLUMN dispatcher.{table}.{column} IS '{comment}'")


def upgrade() -> None:
    """Apply."""
    _checks(
        (*OUTCOMES, "suspect"),
        (*CHUNK_STATES, "split"),
        (*FINAL_CHUNK, "split"),
        (*BATCH_CANCELS, "success_policy"),
        (*EXECUTION_CANCELS, "success_policy"),
    )
    op.execute(
        """
        ALTER TABLE dispatcher.batch
            ALTER COLUMN max_failed_chunks DROP NOT NULL,
            ADD COLUMN max_failed_items BIGINT,
            ADD COLUMN min_ratio DOUBLE PRECISION,
            ADD COLUMN stop_early BOOLEAN DEFAULT false NOT NULL
        """
    )
    _comments(
        "batch",
        max_failed_chunks="null where another bound is given",
        min_ratio="of the items that must succeed",
    )
    op.execute(
        """
        ALTER TABLE dispatcher.chunk
            ADD COLUMN items_ok INTEGER DEFAULT 0 NOT NULL,
            ADD COLUMN parent INTEGER,
            ADD COLUMN depth INTEGER DEFAULT 0 NOT NULL,
            ADD CONSTRAINT chunk_items_ok CHECK (items_ok BETWEEN 0 AND size),
            ADD CONSTRAINT chunk_parent CHECK ((parent IS NULL) = (depth = 0))
        """
    )
    _comments(
        "chunk",
        items_ok="items that succeeded, as receipts say; all of them where it succeeded without",
        parent="the chunk that it was split from",
        depth="of splits",
    )
    op.execute(
        """
        ALTER TABLE dispatcher.attempt
            ADD COLUMN positions INTEGER[],
            ADD COLUMN progress_done BIGINT,
            ADD COLUMN progress_total BIGINT,
            ADD COLUMN progress_at TIMESTAMP WITH TIME ZONE
        """
    )
    _comments(
        "attempt",
        positions="the items of its chunk that it was given; null: all of them",
        progress_done="as its task last said while it ran",
    )
    op.execute(
        """
        CREATE TABLE dispatcher.item_result (
            batch_id TEXT NOT NULL,
            chunk_index INTEGER NOT NULL,
            position INTEGER NOT NULL,
            attempt INTEGER NOT NULL,
            ok BOOLEAN NOT NULL,
            output JSON,
            output_uri TEXT,
            error TEXT,
            CONSTRAINT item_result_pkey PRIMARY KEY (batch_id, chunk_index, position),
            CONSTRAINT item_result_batch_id_fkey FOREIGN KEY (batch_id)
                REFERENCES dispatcher.batch (id) ON DELETE CASCADE
        )
        """
    )
    op.execute(
        """
        CREATE INDEX item_result_failed
        ON dispatcher.item_result (batch_id, chunk_index, position) WHERE NOT ok
        """
    )
    op.execute(
        """
        COMMENT ON TABLE dispatcher.item_result
        IS 'how items ended, as the receipts of their tasks say; the last word on each'
        """
    )
    _comments(
        "item_result",
        position="in its chunk, from 0",
        attempt="the number of the one that told it",
        output="small ones; larger ones lie at output_uri",
    )
    op.execute("UPDATE dispatcher.chunk SET items_ok = size WHERE state = 'succeeded'")
    op.execute("UPDATE dispatcher.installation SET oldest_code = greatest(oldest_code, 3)")


def downgrade() -> None:
    """Take back: what receipts told of items is lost.

    Refused by the constraints while rows use what is new.
    """
    _checks(OUTCOMES, CHUNK_STATES, FINAL_CHUNK, BATCH_CANCELS, EXECUTION_CANCELS)
    op.execute("DROP TABLE dispatcher.item_result")
    op.execute(
        """
        ALTER TABLE dispatcher.attempt
            DROP COLUMN positions, DROP COLUMN progress_done, DROP COLUMN progress_total,
            DROP COLUMN progress_at
        """
    )
    op.execute(
        """
        ALTER TABLE dispatcher.chunk
            DROP CONSTRAINT chunk_items_ok, DROP CONSTRAINT chunk_parent,
            DROP COLUMN items_ok, DROP COLUMN parent, DROP COLUMN depth
        """
    )
    op.execute("UPDATE dispatcher.batch SET max_failed_chunks = 0 WHERE max_failed_chunks IS NULL")
    op.execute(
        """
        ALTER TABLE dispatcher.batch
            ALTER COLUMN max_failed_chunks SET NOT NULL,
            DROP COLUMN max_failed_items, DROP COLUMN min_ratio, DROP COLUMN stop_early
        """
    )
    op.execute("COMMENT ON COLUMN dispatcher.batch.max_failed_chunks IS NULL")
    op.execute("UPDATE dispatcher.installation SET oldest_code = 2")
