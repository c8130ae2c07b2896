"""The first tables.

Written once from `dispatcher/schema.py` and frozen: later changes are migrations of their own.
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = (
    """
    CREATE TABLE dispatcher.batch (
        id TEXT NOT NULL,
        key TEXT,
        request JSON NOT NULL,
        job_name TEXT NOT NULL,
        job JSON NOT NULL,
        code_version INTEGER NOT NULL,
        target TEXT NOT NULL,
        params JSON NOT NULL,
        labels JSON NOT NULL,
        priority INTEGER NOT NULL,
        items_from TEXT NOT NULL,
        state TEXT NOT NULL,
        reason TEXT,
        actor TEXT NOT NULL,
        created_at TIMESTAMP WITH TIME ZONE NOT NULL,
        planned_at TIMESTAMP WITH TIME ZONE,
        deadline TIMESTAMP WITH TIME ZONE NOT NULL,
        finished_at TIMESTAMP WITH TIME ZONE,
        item_count BIGINT,
        chunk_count INTEGER,
        largest_chunk BIGINT,
        max_failed_chunks INTEGER NOT NULL,
        cancel_requested_at TIMESTAMP WITH TIME ZONE,
        cancel_kind TEXT,
        cancel_reason TEXT,
        plan_tries INTEGER DEFAULT 0 NOT NULL,
        plan_after TIMESTAMP WITH TIME ZONE,
        CONSTRAINT batch_pkey PRIMARY KEY (id),
        CONSTRAINT batch_state CHECK (state IN ('cancelled', 'failed', 'planning', 'running', 'succeeded')),
        CONSTRAINT batch_finished CHECK ((finished_at IS NOT NULL) = (state IN ('cancelled', 'failed', 'succeeded'))),
        CONSTRAINT batch_cancel_has_kind CHECK ((cancel_requested_at IS NULL) = (cancel_kind IS NULL)),
        CONSTRAINT batch_cancel_kind CHECK (cancel_kind IN ('batch_deadline', 'invalid', 'operator')),
        CONSTRAINT batch_key_key UNIQUE (key)
    )
    """,
    "CREATE INDEX batch_deadline ON dispatcher.batch (deadline) WHERE state IN ('planning', 'running') AND cancel_requested_at IS NULL",
    "CREATE INDEX batch_live ON dispatcher.batch (target, priority DESC, created_at) WHERE state = 'running'",
    "CREATE INDEX batch_recent ON dispatcher.batch (created_at DESC, id)",
    "CREATE INDEX batch_unplanned ON dispatcher.batch (created_at) WHERE state = 'planning'",
    "COMMENT ON COLUMN dispatcher.batch.key IS 'the caller''s idempotency key'",
    "COMMENT ON COLUMN dispatcher.batch.request IS 'what a second use of the key must match'",
    "COMMENT ON COLUMN dispatcher.batch.job IS 'the job as it was when enqueued'",
    "COMMENT ON COLUMN dispatcher.batch.code_version IS 'the code that wrote the job'",
    "COMMENT ON COLUMN dispatcher.batch.priority IS 'higher is launched first'",
    "COMMENT ON COLUMN dispatcher.batch.items_from IS 'pages, source or a URI'",
    "COMMENT ON COLUMN dispatcher.batch.reason IS 'why it ended as it did'",
    "COMMENT ON COLUMN dispatcher.batch.actor IS 'who enqueued it'",
    "COMMENT ON COLUMN dispatcher.batch.largest_chunk IS 'bytes of the items of its largest chunk'",
    "COMMENT ON COLUMN dispatcher.batch.cancel_kind IS 'what asked for its end'",
    """
    CREATE TABLE dispatcher.event (
        id BIGINT GENERATED ALWAYS AS IDENTITY,
        at TIMESTAMP WITH TIME ZONE NOT NULL,
        actor TEXT NOT NULL,
        kind TEXT NOT NULL,
        batch_id TEXT,
        chunk_index INTEGER,
        attempt INTEGER,
        execution_id BIGINT,
        "old" TEXT,
        "new" TEXT,
        reason TEXT,
        CONSTRAINT event_pkey PRIMARY KEY (id),
        CONSTRAINT event_kind CHECK (kind IN ('attempt', 'batch', 'chunk', 'execution', 'schedule', 'target'))
    )
    """,
    "CREATE INDEX event_at ON dispatcher.event USING brin (at)",
    "CREATE INDEX event_batch ON dispatcher.event (batch_id, id)",
    "COMMENT ON TABLE dispatcher.event IS 'append-only: triggers refuse UPDATE, DELETE and TRUNCATE; no foreign keys (retention)'",
    "COMMENT ON COLUMN dispatcher.event.actor IS 'a person, an application or a worker'",
    "COMMENT ON COLUMN dispatcher.event.kind IS 'what it is about'",
    "COMMENT ON COLUMN dispatcher.event.old IS 'null where nothing moved'",
    "COMMENT ON COLUMN dispatcher.event.new IS 'null where nothing moved'",
    """
    CREATE TABLE dispatcher.execution (
        id BIGINT GENERATED ALWAYS AS IDENTITY,
        key TEXT NOT NULL,
        target TEXT NOT NULL,
        batch_id TEXT,
        job_name TEXT,
        code_version INTEGER DEFAULT 1 NOT NULL,
        state TEXT NOT NULL,
        stray BOOLEAN DEFAULT false NOT NULL,
        tasks INTEGER NOT NULL,
        open_tasks INTEGER NOT NULL,
        parallelism INTEGER NOT NULL,
        request JSON,
        worker TEXT,
        handle TEXT,
        console_url TEXT,
        logs_url TEXT,
        intent_at TIMESTAMP WITH TIME ZONE NOT NULL,
        calls INTEGER DEFAULT 0 NOT NULL,
        call_by TIMESTAMP WITH TIME ZONE,
        next_call_at TIMESTAMP WITH TIME ZONE,
        looks INTEGER DEFAULT 0 NOT NULL,
        next_look_at TIMESTAMP WITH TIME ZONE,
        launched_at TIMESTAMP WITH TIME ZONE,
        start_deadline TIMESTAMP WITH TIME ZONE,
        started_at TIMESTAMP WITH TIME ZONE,
        deadline TIMESTAMP WITH TIME ZONE,
        absent_since TIMESTAMP WITH TIME ZONE,
        cancel_requested_at TIMESTAMP WITH TIME ZONE,
        cancel_kind TEXT,
        cancel_sent_at TIMESTAMP WITH TIME ZONE,
        next_cancel_at TIMESTAMP WITH TIME ZONE,
        cancel_calls INTEGER DEFAULT 0 NOT NULL,
        finished_at TIMESTAMP WITH TIME ZONE,
        reason TEXT,
        CONSTRAINT execution_pkey PRIMARY KEY (id),
        CONSTRAINT execution_state CHECK (state IN ('ended', 'intended', 'launched', 'unknown')),
        CONSTRAINT execution_finished CHECK ((finished_at IS NOT NULL) = (state IN ('ended'))),
        CONSTRAINT execution_open_tasks CHECK (open_tasks BETWEEN 0 AND tasks),
        CONSTRAINT execution_launched_has_handle CHECK (state <> 'launched' OR handle IS NOT NULL),
        CONSTRAINT execution_ended_is_settled CHECK (state <> 'ended' OR open_tasks = 0),
        CONSTRAINT execution_cancel_kind CHECK (cancel_kind IN ('batch_deadline', 'invalid', 'operator', 'start_timeout', 'stray', 'timeout')),
        CONSTRAINT execution_cancel_has_kind CHECK ((cancel_requested_at IS NULL) = (cancel_kind IS NULL)),
        CONSTRAINT execution_key_key UNIQUE (key)
    )
    """,
    "CREATE INDEX execution_batch ON dispatcher.execution (batch_id, id)",
    "CREATE INDEX execution_live ON dispatcher.execution (target, state, id) WHERE state IN ('intended', 'launched', 'unknown')",
    "CREATE INDEX execution_live_batch ON dispatcher.execution (batch_id) WHERE state IN ('intended', 'launched', 'unknown')",
    "CREATE INDEX execution_live_job ON dispatcher.execution (job_name) WHERE state IN ('intended', 'launched', 'unknown')",
    "COMMENT ON COLUMN dispatcher.execution.key IS 'its name at the provider'",
    "COMMENT ON COLUMN dispatcher.execution.batch_id IS 'null for a stray of an unknown batch'",
    "COMMENT ON COLUMN dispatcher.execution.code_version IS 'the code that wrote its job; older workers leave it alone'",
    "COMMENT ON COLUMN dispatcher.execution.request IS 'what was asked of the provider; secrets redacted'",
    "COMMENT ON COLUMN dispatcher.execution.worker IS 'who made the last launch call'",
    "COMMENT ON COLUMN dispatcher.execution.calls IS 'launch calls'",
    "COMMENT ON COLUMN dispatcher.execution.looks IS 'finds in a row'",
    "COMMENT ON COLUMN dispatcher.execution.cancel_kind IS 'what asked for its end; beats the provider''s word'",
    """
    CREATE TABLE dispatcher.installation (
        one BOOLEAN DEFAULT true NOT NULL,
        instance TEXT NOT NULL,
        oldest_code INTEGER NOT NULL,
        CONSTRAINT installation_pkey PRIMARY KEY (one),
        CONSTRAINT installation_single_row CHECK (one)
    )
    """,
    "COMMENT ON COLUMN dispatcher.installation.instance IS 'names this installation at providers'",
    "COMMENT ON COLUMN dispatcher.installation.oldest_code IS 'the oldest code it supports'",
    """
    CREATE TABLE dispatcher.schedule_firing (
        schedule TEXT NOT NULL,
        due_at TIMESTAMP WITH TIME ZONE NOT NULL,
        batch_id TEXT,
        fired_at TIMESTAMP WITH TIME ZONE NOT NULL,
        actor TEXT NOT NULL,
        reason TEXT,
        CONSTRAINT schedule_firing_pkey PRIMARY KEY (schedule, due_at)
    )
    """,
    "COMMENT ON COLUMN dispatcher.schedule_firing.batch_id IS 'null where the firing was skipped'",
    """
    CREATE TABLE dispatcher.target (
        name TEXT NOT NULL,
        backend TEXT NOT NULL,
        limits JSON NOT NULL,
        home JSON,
        lease_owner TEXT,
        lease_token BIGINT DEFAULT 0 NOT NULL,
        lease_until TIMESTAMP WITH TIME ZONE,
        tokens DOUBLE PRECISION,
        tokens_at TIMESTAMP WITH TIME ZONE,
        pace DOUBLE PRECISION DEFAULT 1 NOT NULL,
        down_since TIMESTAMP WITH TIME ZONE,
        down_reason TEXT,
        down_calls INTEGER DEFAULT 0 NOT NULL,
        resume_at TIMESTAMP WITH TIME ZONE,
        CONSTRAINT target_pkey PRIMARY KEY (name),
        CONSTRAINT target_pace CHECK (pace > 0 AND pace <= 1)
    )
    """,
    "COMMENT ON COLUMN dispatcher.target.limits IS 'as its last leaseholder was configured'",
    "COMMENT ON COLUMN dispatcher.target.home IS 'the only machine that can serve it'",
    "COMMENT ON COLUMN dispatcher.target.tokens IS 'left in the bucket of launch calls'",
    "COMMENT ON COLUMN dispatcher.target.pace IS '1 is the full rate'",
    """
    CREATE TABLE dispatcher.worker (
        id TEXT NOT NULL,
        host TEXT NOT NULL,
        pid INTEGER NOT NULL,
        version TEXT NOT NULL,
        code_version INTEGER NOT NULL,
        problems JSON NOT NULL,
        started_at TIMESTAMP WITH TIME ZONE NOT NULL,
        heartbeat_at TIMESTAMP WITH TIME ZONE NOT NULL,
        stopped_at TIMESTAMP WITH TIME ZONE,
        CONSTRAINT worker_pkey PRIMARY KEY (id)
    )
    """,
    "COMMENT ON COLUMN dispatcher.worker.problems IS 'targets it cannot serve, and why'",
    """
    CREATE TABLE dispatcher.attempt (
        batch_id TEXT NOT NULL,
        chunk_index INTEGER NOT NULL,
        number INTEGER NOT NULL,
        execution_id BIGINT NOT NULL,
        task_index INTEGER NOT NULL,
        outcome TEXT,
        exit_code INTEGER,
        reason TEXT,
        result_uri TEXT,
        log_tail TEXT,
        opened_at TIMESTAMP WITH TIME ZONE NOT NULL,
        started_at TIMESTAMP WITH TIME ZONE,
        ended_at TIMESTAMP WITH TIME ZONE,
        settled_at TIMESTAMP WITH TIME ZONE,
        CONSTRAINT attempt_pkey PRIMARY KEY (batch_id, chunk_index, number),
        CONSTRAINT attempt_outcome CHECK (outcome IN ('cancelled', 'failed', 'lost', 'no_capacity', 'out_of_memory', 'preempted', 'rejected', 'start_failed', 'succeeded', 'timed_out')),
        CONSTRAINT attempt_settled CHECK ((outcome IS NULL) = (settled_at IS NULL)),
        CONSTRAINT attempt_execution_id_key UNIQUE (execution_id, task_index),
        CONSTRAINT attempt_execution_id_fkey FOREIGN KEY(execution_id) REFERENCES dispatcher.execution (id) ON DELETE CASCADE
    )
    """,
    "CREATE UNIQUE INDEX attempt_open ON dispatcher.attempt (batch_id, chunk_index) WHERE outcome IS NULL",
    "COMMENT ON COLUMN dispatcher.attempt.outcome IS 'null while it is open'",
    "COMMENT ON COLUMN dispatcher.attempt.result_uri IS 'where the task says that its result lies'",
    "COMMENT ON COLUMN dispatcher.attempt.log_tail IS 'last lines of a task that ended badly'",
    """
    CREATE TABLE dispatcher.chunk (
        batch_id TEXT NOT NULL,
        index INTEGER NOT NULL,
        state TEXT NOT NULL,
        size INTEGER NOT NULL,
        weight DOUBLE PRECISION,
        attempts INTEGER DEFAULT 0 NOT NULL,
        budget_from INTEGER DEFAULT 0 NOT NULL,
        due_at TIMESTAMP WITH TIME ZONE NOT NULL,
        hold_until TIMESTAMP WITH TIME ZONE,
        outcome TEXT,
        reason TEXT,
        finished_at TIMESTAMP WITH TIME ZONE,
        CONSTRAINT chunk_pkey PRIMARY KEY (batch_id, index),
        CONSTRAINT chunk_state CHECK (state IN ('cancelled', 'failed', 'launching', 'pending', 'running', 'succeeded')),
        CONSTRAINT chunk_outcome CHECK (outcome IN ('cancelled', 'failed', 'lost', 'no_capacity', 'out_of_memory', 'preempted', 'rejected', 'start_failed', 'succeeded', 'timed_out')),
        CONSTRAINT chunk_finished CHECK ((finished_at IS NOT NULL) = (state IN ('cancelled', 'failed', 'succeeded'))),
        CONSTRAINT chunk_batch_id_fkey FOREIGN KEY(batch_id) REFERENCES dispatcher.batch (id) ON DELETE CASCADE
    )
    """,
    "CREATE INDEX chunk_due ON dispatcher.chunk (batch_id, due_at, index) WHERE state = 'pending'",
    "CREATE INDEX chunk_open ON dispatcher.chunk (batch_id) WHERE state IN ('launching', 'pending', 'running')",
    "COMMENT ON COLUMN dispatcher.chunk.size IS 'items in it'",
    "COMMENT ON COLUMN dispatcher.chunk.weight IS 'sum of the field it was balanced by'",
    "COMMENT ON COLUMN dispatcher.chunk.attempts IS 'last number'",
    "COMMENT ON COLUMN dispatcher.chunk.budget_from IS 'attempts up to this number cost nothing: an operator''s retry forgave them'",
    "COMMENT ON COLUMN dispatcher.chunk.outcome IS 'of its last ended attempt'",
    "COMMENT ON COLUMN dispatcher.chunk.reason IS 'why it is where it is'",
    """
    CREATE TABLE dispatcher.chunk_items (
        batch_id TEXT NOT NULL,
        chunk_index INTEGER NOT NULL,
        items JSON NOT NULL,
        CONSTRAINT chunk_items_pkey PRIMARY KEY (batch_id, chunk_index),
        CONSTRAINT chunk_items_batch_id_fkey FOREIGN KEY(batch_id) REFERENCES dispatcher.batch (id) ON DELETE CASCADE
    )
    """,
    "COMMENT ON TABLE dispatcher.chunk_items IS 'apart from chunk, whose rows are rewritten at each move'",
    "COMMENT ON COLUMN dispatcher.chunk_items.items IS 'one JSON array, see items.join_items'",
    """
    CREATE TABLE dispatcher.item_page (
        batch_id TEXT NOT NULL,
        number INTEGER NOT NULL,
        count INTEGER NOT NULL,
        items JSON NOT NULL,
        CONSTRAINT item_page_pkey PRIMARY KEY (batch_id, number),
        CONSTRAINT item_page_batch_id_fkey FOREIGN KEY(batch_id) REFERENCES dispatcher.batch (id) ON DELETE CASCADE
    )
    """,
    "COMMENT ON TABLE dispatcher.item_page IS 'what the caller of enqueue gave, until it is planned'",
    "COMMENT ON COLUMN dispatcher.item_page.items IS 'one JSON array, see items.join_items'",
)

APPEND_ONLY = (
    """
    CREATE FUNCTION dispatcher.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'events are append-only: % of dispatcher.event is refused', TG_OP
            USING ERRCODE = 'restrict_violation';
    END $$
    """,
    """
    CREATE TRIGGER event_append_only BEFORE UPDATE OR DELETE ON dispatcher.event
    FOR EACH ROW EXECUTE FUNCTION dispatcher.refuse_change()
    """,
    """
    CREATE TRIGGER event_no_truncate BEFORE TRUNCATE ON dispatcher.event
    FOR EACH STATEMENT EXECUTE FUNCTION dispatcher.refuse_change()
    """,
)


def upgrade() -> None:
    """Apply."""
    for statement in (*TABLES, *APPEND_ONLY):
        op.execute(statement)
    op.execute(
        "INSERT INTO dispatcher.installation (instance, oldest_code) "
        "VALUES (substr(md5(gen_random_uuid()::text), 1, 12), 1)"
    )


def downgrade() -> None:
    """Take back: everything that was recorded is lost."""
    for table in (
        "item_page",
        "chunk_items",
        "chunk",
        "attempt",
        "worker",
        "target",
        "schedule_firing",
        "installation",
        "execution",
        "event",
        "batch",
    ):
        op.execute(f"DROP TABLE dispatcher.{table}")
    op.execute("DROP FUNCTION dispatcher.refuse_change()")
