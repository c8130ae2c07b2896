CREATE SCHEMA dispatcher;
CREATE FUNCTION dispatcher.refuse_change() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
    BEGIN
        RAISE EXCEPTION 'events are append-only: % of dispatcher.event is refused', TG_OP
            USING ERRCODE = 'restrict_violation';
    END $$;
CREATE TABLE dispatcher.alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE dispatcher.attempt (
    batch_id text NOT NULL,
    chunk_index integer NOT NULL,
    number integer NOT NULL,
    execution_id bigint NOT NULL,
    task_index integer NOT NULL,
    outcome text,
    exit_code integer,
    reason text,
    result_uri text,
    log_tail text,
    opened_at timestamp with time zone NOT NULL,
    started_at timestamp with time zone,
    ended_at timestamp with time zone,
    settled_at timestamp with time zone,
    positions integer[],
    progress_done bigint,
    progress_total bigint,
    progress_at timestamp with time zone,
    CONSTRAINT attempt_outcome CHECK ((outcome = ANY (ARRAY['cancelled'::text, 'failed'::text, 'lost'::text, 'no_capacity'::text, 'out_of_memory'::text, 'preempted'::text, 'rejected'::text, 'start_failed'::text, 'succeeded'::text, 'suspect'::text, 'timed_out'::text]))),
    CONSTRAINT attempt_settled CHECK (((outcome IS NULL) = (settled_at IS NULL)))
);
COMMENT ON COLUMN dispatcher.attempt.outcome IS 'null while it is open';
COMMENT ON COLUMN dispatcher.attempt.result_uri IS 'where the task says that its result lies';
COMMENT ON COLUMN dispatcher.attempt.log_tail IS 'last lines of a task that ended badly';
COMMENT ON COLUMN dispatcher.attempt.positions IS 'the items of its chunk that it was given; null: all of them';
COMMENT ON COLUMN dispatcher.attempt.progress_done IS 'as its task last said while it ran';
CREATE TABLE dispatcher.batch (
    id text NOT NULL,
    key text,
    request json NOT NULL,
    job_name text NOT NULL,
    job json NOT NULL,
    code_version integer NOT NULL,
    target text NOT NULL,
    params json NOT NULL,
    labels json NOT NULL,
    priority integer NOT NULL,
    items_from text NOT NULL,
    state text NOT NULL,
    reason text,
    actor text NOT NULL,
    created_at timestamp with time zone NOT NULL,
    planned_at timestamp with time zone,
    deadline timestamp with time zone NOT NULL,
    finished_at timestamp with time zone,
    item_count bigint,
    chunk_count integer,
    largest_chunk bigint,
    max_failed_chunks integer,
    cancel_requested_at timestamp with time zone,
    cancel_kind text,
    cancel_reason text,
    plan_tries integer DEFAULT 0 NOT NULL,
    plan_after timestamp with time zone,
    max_failed_items bigint,
    min_ratio double precision,
    stop_early boolean DEFAULT false NOT NULL,
    CONSTRAINT batch_cancel_has_kind CHECK (((cancel_requested_at IS NULL) = (cancel_kind IS NULL))),
    CONSTRAINT batch_cancel_kind CHECK ((cancel_kind = ANY (ARRAY['batch_deadline'::text, 'invalid'::text, 'operator'::text, 'success_policy'::text]))),
    CONSTRAINT batch_finished CHECK (((finished_at IS NOT NULL) = (state = ANY (ARRAY['cancelled'::text, 'failed'::text, 'succeeded'::text])))),
    CONSTRAINT batch_state CHECK ((state = ANY (ARRAY['cancelled'::text, 'failed'::text, 'planning'::text, 'running'::text, 'succeeded'::text])))
);
COMMENT ON COLUMN dispatcher.batch.key IS 'the caller''s idempotency key';
COMMENT ON COLUMN dispatcher.batch.request IS 'what a second use of the key must match';
COMMENT ON COLUMN dispatcher.batch.job IS 'the job as it was when enqueued';
COMMENT ON COLUMN dispatcher.batch.code_version IS 'the code that wrote the job';
COMMENT ON COLUMN dispatcher.batch.priority IS 'higher is launched first';
COMMENT ON COLUMN dispatcher.batch.items_from IS 'pages, source or a URI';
COMMENT ON COLUMN dispatcher.batch.reason IS 'why it ended as it did';
COMMENT ON COLUMN dispatcher.batch.actor IS 'who enqueued it';
COMMENT ON COLUMN dispatcher.batch.largest_chunk IS 'bytes of the items of its largest chunk';
COMMENT ON COLUMN dispatcher.batch.max_failed_chunks IS 'null where another bound is given';
COMMENT ON COLUMN dispatcher.batch.cancel_kind IS 'what asked for its end';
COMMENT ON COLUMN dispatcher.batch.min_ratio IS 'of the items that must succeed';
CREATE TABLE dispatcher.bucket (
    target text NOT NULL,
    kind text NOT NULL,
    tokens double precision,
    taken_at timestamp with time zone,
    pace double precision DEFAULT 1 NOT NULL,
    slowed_at timestamp with time zone,
    CONSTRAINT bucket_kind CHECK ((kind = ANY (ARRAY['launch'::text, 'logs'::text, 'read'::text, 'write'::text]))),
    CONSTRAINT bucket_pace CHECK (((pace > (0)::double precision) AND (pace <= (1)::double precision))),
    CONSTRAINT bucket_taken CHECK (((tokens IS NULL) = (taken_at IS NULL)))
);
COMMENT ON TABLE dispatcher.bucket IS 'budgets of calls to a provider, taken from by all workers';
COMMENT ON COLUMN dispatcher.bucket.kind IS 'of call';
COMMENT ON COLUMN dispatcher.bucket.tokens IS 'left when one was last taken';
COMMENT ON COLUMN dispatcher.bucket.pace IS 'the part of the full rate that it was slowed to';
CREATE TABLE dispatcher.chunk (
    batch_id text NOT NULL,
    index integer NOT NULL,
    state text NOT NULL,
    size integer NOT NULL,
    weight double precision,
    attempts integer DEFAULT 0 NOT NULL,
    budget_from integer DEFAULT 0 NOT NULL,
    due_at timestamp with time zone NOT NULL,
    hold_until timestamp with time zone,
    outcome text,
    reason text,
    finished_at timestamp with time zone,
    items_ok integer DEFAULT 0 NOT NULL,
    parent integer,
    depth integer DEFAULT 0 NOT NULL,
    awaits_split text,
    CONSTRAINT chunk_awaits_split CHECK (((awaits_split IS NULL) OR ((awaits_split = ANY (ARRAY['first'::text, 'halves'::text])) AND (state = 'pending'::text)))),
    CONSTRAINT chunk_finished CHECK (((finished_at IS NOT NULL) = (state = ANY (ARRAY['cancelled'::text, 'failed'::text, 'split'::text, 'succeeded'::text])))),
    CONSTRAINT chunk_items_ok CHECK (((items_ok >= 0) AND (items_ok <= size))),
    CONSTRAINT chunk_outcome CHECK ((outcome = ANY (ARRAY['cancelled'::text, 'failed'::text, 'lost'::text, 'no_capacity'::text, 'out_of_memory'::text, 'preempted'::text, 'rejected'::text, 'start_failed'::text, 'succeeded'::text, 'suspect'::text, 'timed_out'::text]))),
    CONSTRAINT chunk_parent CHECK (((parent IS NULL) = (depth = 0))),
    CONSTRAINT chunk_state CHECK ((state = ANY (ARRAY['cancelled'::text, 'failed'::text, 'launching'::text, 'pending'::text, 'running'::text, 'split'::text, 'succeeded'::text])))
);
COMMENT ON COLUMN dispatcher.chunk.size IS 'items in it';
COMMENT ON COLUMN dispatcher.chunk.weight IS 'sum of the field it was balanced by';
COMMENT ON COLUMN dispatcher.chunk.attempts IS 'last number';
COMMENT ON COLUMN dispatcher.chunk.budget_from IS 'attempts up to this number cost nothing: an operator''s retry forgave them';
COMMENT ON COLUMN dispatcher.chunk.outcome IS 'of its last ended attempt';
COMMENT ON COLUMN dispatcher.chunk.reason IS 'why it is where it is';
COMMENT ON COLUMN dispatcher.chunk.items_ok IS 'items that succeeded, as receipts say; all of them where it succeeded without';
COMMENT ON COLUMN dispatcher.chunk.parent IS 'the chunk that it was split from';
COMMENT ON COLUMN dispatcher.chunk.depth IS 'of splits';
COMMENT ON COLUMN dispatcher.chunk.awaits_split IS 'it waits, undue, until successes of its batch pay for this cut of it';
CREATE TABLE dispatcher.chunk_items (
    batch_id text NOT NULL,
    chunk_index integer NOT NULL,
    items json NOT NULL
);
COMMENT ON TABLE dispatcher.chunk_items IS 'apart from chunk, whose rows are rewritten at each move';
COMMENT ON COLUMN dispatcher.chunk_items.items IS 'one JSON array, see items.join_items';
CREATE TABLE dispatcher.event (
    id bigint NOT NULL,
    at timestamp with time zone NOT NULL,
    actor text NOT NULL,
    kind text NOT NULL,
    batch_id text,
    chunk_index integer,
    attempt integer,
    execution_id bigint,
    old text,
    new text,
    reason text,
    CONSTRAINT event_kind CHECK ((kind = ANY (ARRAY['attempt'::text, 'batch'::text, 'chunk'::text, 'execution'::text, 'schedule'::text, 'target'::text])))
);
COMMENT ON TABLE dispatcher.event IS 'append-only: triggers refuse UPDATE, DELETE and TRUNCATE; no foreign keys (retention)';
COMMENT ON COLUMN dispatcher.event.actor IS 'a person, an application or a worker';
COMMENT ON COLUMN dispatcher.event.kind IS 'what it is about';
COMMENT ON COLUMN dispatcher.event.old IS 'null where nothing moved';
COMMENT ON COLUMN dispatcher.event.new IS 'null where nothing moved';
ALTER TABLE dispatcher.event ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME dispatcher.event_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE dispatcher.execution (
    id bigint NOT NULL,
    key text NOT NULL,
    target text NOT NULL,
    batch_id text,
    job_name text,
    code_version integer DEFAULT 1 NOT NULL,
    state text NOT NULL,
    stray boolean DEFAULT false NOT NULL,
    tasks integer NOT NULL,
    open_tasks integer NOT NULL,
    parallelism integer NOT NULL,
    request json,
    worker text,
    handle text,
    console_url text,
    logs_url text,
    intent_at timestamp with time zone NOT NULL,
    calls integer DEFAULT 0 NOT NULL,
    call_by timestamp with time zone,
    next_call_at timestamp with time zone,
    looks integer DEFAULT 0 NOT NULL,
    next_look_at timestamp with time zone,
    launched_at timestamp with time zone,
    start_deadline timestamp with time zone,
    started_at timestamp with time zone,
    deadline timestamp with time zone,
    absent_since timestamp with time zone,
    cancel_requested_at timestamp with time zone,
    cancel_kind text,
    cancel_sent_at timestamp with time zone,
    next_cancel_at timestamp with time zone,
    cancel_calls integer DEFAULT 0 NOT NULL,
    finished_at timestamp with time zone,
    reason text,
    unread_since timestamp with time zone,
    CONSTRAINT execution_cancel_has_kind CHECK (((cancel_requested_at IS NULL) = (cancel_kind IS NULL))),
    CONSTRAINT execution_cancel_kind CHECK ((cancel_kind = ANY (ARRAY['batch_deadline'::text, 'invalid'::text, 'operator'::text, 'start_timeout'::text, 'stray'::text, 'success_policy'::text, 'timeout'::text]))),
    CONSTRAINT execution_ended_is_settled CHECK (((state <> 'ended'::text) OR (open_tasks = 0))),
    CONSTRAINT execution_finished CHECK (((finished_at IS NOT NULL) = (state = 'ended'::text))),
    CONSTRAINT execution_launched_has_handle CHECK (((state <> 'launched'::text) OR (handle IS NOT NULL))),
    CONSTRAINT execution_open_tasks CHECK (((open_tasks >= 0) AND (open_tasks <= tasks))),
    CONSTRAINT execution_state CHECK ((state = ANY (ARRAY['ended'::text, 'intended'::text, 'launched'::text, 'unknown'::text])))
);
COMMENT ON COLUMN dispatcher.execution.key IS 'its name at the provider';
COMMENT ON COLUMN dispatcher.execution.batch_id IS 'null for a stray of an unknown batch';
COMMENT ON COLUMN dispatcher.execution.code_version IS 'the code that wrote its job; older workers leave it alone';
COMMENT ON COLUMN dispatcher.execution.request IS 'what was asked of the provider; secrets redacted';
COMMENT ON COLUMN dispatcher.execution.worker IS 'who made the last launch call';
COMMENT ON COLUMN dispatcher.execution.calls IS 'launch calls';
COMMENT ON COLUMN dispatcher.execution.looks IS 'finds in a row';
COMMENT ON COLUMN dispatcher.execution.cancel_kind IS 'what asked for its end; beats the provider''s word';
COMMENT ON COLUMN dispatcher.execution.unread_since IS 'tasks have ended whose receipts cannot be read';
ALTER TABLE dispatcher.execution ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME dispatcher.execution_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE dispatcher.installation (
    one boolean DEFAULT true NOT NULL,
    instance text NOT NULL,
    oldest_code integer NOT NULL,
    CONSTRAINT installation_single_row CHECK (one)
);
COMMENT ON COLUMN dispatcher.installation.instance IS 'names this installation at providers';
COMMENT ON COLUMN dispatcher.installation.oldest_code IS 'the oldest code it supports';
CREATE TABLE dispatcher.item_page (
    batch_id text NOT NULL,
    number integer NOT NULL,
    count integer NOT NULL,
    items json NOT NULL
);
COMMENT ON TABLE dispatcher.item_page IS 'what the caller of enqueue gave, until it is planned';
COMMENT ON COLUMN dispatcher.item_page.items IS 'one JSON array, see items.join_items';
CREATE TABLE dispatcher.item_result (
    batch_id text NOT NULL,
    chunk_index integer NOT NULL,
    "position" integer NOT NULL,
    attempt integer NOT NULL,
    ok boolean NOT NULL,
    output json,
    output_uri text,
    error text
);
COMMENT ON TABLE dispatcher.item_result IS 'how items ended, as the receipts of their tasks say; the last word on each';
COMMENT ON COLUMN dispatcher.item_result."position" IS 'in its chunk, from 0';
COMMENT ON COLUMN dispatcher.item_result.attempt IS 'the number of the one that told it';
COMMENT ON COLUMN dispatcher.item_result.output IS 'small ones; larger ones lie at output_uri';
CREATE TABLE dispatcher.schedule_firing (
    schedule text NOT NULL,
    due_at timestamp with time zone NOT NULL,
    batch_id text,
    fired_at timestamp with time zone NOT NULL,
    actor text NOT NULL,
    reason text
);
COMMENT ON COLUMN dispatcher.schedule_firing.batch_id IS 'null where the firing was skipped';
CREATE TABLE dispatcher.target (
    name text NOT NULL,
    backend text NOT NULL,
    limits json NOT NULL,
    home json,
    lease_owner text,
    lease_token bigint DEFAULT 0 NOT NULL,
    lease_until timestamp with time zone,
    down_since timestamp with time zone,
    down_reason text,
    down_calls integer DEFAULT 0 NOT NULL,
    resume_at timestamp with time zone
);
COMMENT ON COLUMN dispatcher.target.limits IS 'as its last leaseholder was configured';
COMMENT ON COLUMN dispatcher.target.home IS 'the only machine that can serve it';
CREATE TABLE dispatcher.worker (
    id text NOT NULL,
    host text NOT NULL,
    pid integer NOT NULL,
    version text NOT NULL,
    code_version integer NOT NULL,
    problems json NOT NULL,
    started_at timestamp with time zone NOT NULL,
    heartbeat_at timestamp with time zone NOT NULL,
    stopped_at timestamp with time zone
);
COMMENT ON COLUMN dispatcher.worker.problems IS 'targets it cannot serve, and why';
ALTER TABLE ONLY dispatcher.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY dispatcher.attempt
    ADD CONSTRAINT attempt_execution_id_key UNIQUE (execution_id, task_index);
ALTER TABLE ONLY dispatcher.attempt
    ADD CONSTRAINT attempt_pkey PRIMARY KEY (batch_id, chunk_index, number);
ALTER TABLE ONLY dispatcher.batch
    ADD CONSTRAINT batch_key_key UNIQUE (key);
ALTER TABLE ONLY dispatcher.batch
    ADD CONSTRAINT batch_pkey PRIMARY KEY (id);
ALTER TABLE ONLY dispatcher.bucket
    ADD CONSTRAINT bucket_pkey PRIMARY KEY (target, kind);
ALTER TABLE ONLY dispatcher.chunk_items
    ADD CONSTRAINT chunk_items_pkey PRIMARY KEY (batch_id, chunk_index);
ALTER TABLE ONLY dispatcher.chunk
    ADD CONSTRAINT chunk_pkey PRIMARY KEY (batch_id, index);
ALTER TABLE ONLY dispatcher.event
    ADD CONSTRAINT event_pkey PRIMARY KEY (id);
ALTER TABLE ONLY dispatcher.execution
    ADD CONSTRAINT execution_key_key UNIQUE (key);
ALTER TABLE ONLY dispatcher.execution
    ADD CONSTRAINT execution_pkey PRIMARY KEY (id);
ALTER TABLE ONLY dispatcher.installation
    ADD CONSTRAINT installation_pkey PRIMARY KEY (one);
ALTER TABLE ONLY dispatcher.item_page
    ADD CONSTRAINT item_page_pkey PRIMARY KEY (batch_id, number);
ALTER TABLE ONLY dispatcher.item_result
    ADD CONSTRAINT item_result_pkey PRIMARY KEY (batch_id, chunk_index, "position");
ALTER TABLE ONLY dispatcher.schedule_firing
    ADD CONSTRAINT schedule_firing_pkey PRIMARY KEY (schedule, due_at);
ALTER TABLE ONLY dispatcher.target
    ADD CONSTRAINT target_pkey PRIMARY KEY (name);
ALTER TABLE ONLY dispatcher.worker
    ADD CONSTRAINT worker_pkey PRIMARY KEY (id);
CREATE UNIQUE INDEX attempt_open ON dispatcher.attempt USING btree (batch_id, chunk_index) WHERE (outcome IS NULL);
CREATE INDEX batch_deadline ON dispatcher.batch USING btree (deadline) WHERE ((state = ANY (ARRAY['planning'::text, 'running'::text])) AND (cancel_requested_at IS NULL));
CREATE INDEX batch_live ON dispatcher.batch USING btree (target, priority DESC, created_at) WHERE (state = 'running'::text);
CREATE INDEX batch_recent ON dispatcher.batch USING btree (created_at DESC, id);
CREATE INDEX batch_unplanned ON dispatcher.batch USING btree (created_at) WHERE (state = 'planning'::text);
CREATE INDEX chunk_due ON dispatcher.chunk USING btree (batch_id, due_at, index) WHERE (state = 'pending'::text);
CREATE INDEX chunk_open ON dispatcher.chunk USING btree (batch_id) WHERE (state = ANY (ARRAY['launching'::text, 'pending'::text, 'running'::text]));
CREATE INDEX chunk_waits_for_split ON dispatcher.chunk USING btree (batch_id, index) WHERE (awaits_split IS NOT NULL);
CREATE INDEX event_at ON dispatcher.event USING brin (at);
CREATE INDEX event_batch ON dispatcher.event USING btree (batch_id, id);
CREATE INDEX execution_batch ON dispatcher.execution USING btree (batch_id, id);
CREATE INDEX execution_live ON dispatcher.execution USING btree (target, state, id) WHERE (state = ANY (ARRAY['intended'::text, 'launched'::text, 'unknown'::text]));
CREATE INDEX execution_live_batch ON dispatcher.execution USING btree (batch_id) WHERE (state = ANY (ARRAY['intended'::text, 'launched'::text, 'unknown'::text]));
CREATE INDEX execution_live_job ON dispatcher.execution USING btree (job_name) WHERE (state = ANY (ARRAY['intended'::text, 'launched'::text, 'unknown'::text]));
CREATE INDEX item_result_failed ON dispatcher.item_result USING btree (batch_id, chunk_index, "position") WHERE (NOT ok);
CREATE TRIGGER event_append_only BEFORE DELETE OR UPDATE ON dispatcher.event FOR EACH ROW EXECUTE FUNCTION dispatcher.refuse_change();
CREATE TRIGGER event_no_truncate BEFORE TRUNCATE ON dispatcher.event FOR EACH STATEMENT EXECUTE FUNCTION dispatcher.refuse_change();
ALTER TABLE ONLY dispatcher.attempt
    ADD CONSTRAINT attempt_execution_id_fkey FOREIGN KEY (execution_id) REFERENCES dispatcher.execution(id) ON DELETE CASCADE;
ALTER TABLE ONLY dispatcher.chunk
    ADD CONSTRAINT chunk_batch_id_fkey FOREIGN KEY (batch_id) REFERENCES dispatcher.batch(id) ON DELETE CASCADE;
ALTER TABLE ONLY dispatcher.chunk_items
    ADD CONSTRAINT chunk_items_batch_id_fkey FOREIGN KEY (batch_id) REFERENCES dispatcher.batch(id) ON DELETE CASCADE;
ALTER TABLE ONLY dispatcher.item_page
    ADD CONSTRAINT item_page_batch_id_fkey FOREIGN KEY (batch_id) REFERENCES dispatcher.batch(id) ON DELETE CASCADE;
ALTER TABLE ONLY dispatcher.item_result
    ADD CONSTRAINT item_result_batch_id_fkey FOREIGN KEY (batch_id) REFERENCES dispatcher.batch(id) ON DELETE CASCADE;
