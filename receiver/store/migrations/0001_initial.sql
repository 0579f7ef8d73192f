-- The database forbids the bad state: one event per prediction, one delivery per event and handler,
-- one owner of a provider id, a due time on every row that has not ended.

CREATE TABLE predictions (
    id               TEXT PRIMARY KEY,
    provider         TEXT NOT NULL,
    model            TEXT NOT NULL,
    mode             TEXT NOT NULL CHECK (mode IN ('queue', 'sync')),
    status           TEXT NOT NULL CHECK (status IN ('queued', 'submitting', 'processing',
                         'unconfirmed', 'succeeded', 'failed', 'canceled')),
    input            TEXT NOT NULL,
    metadata         TEXT NOT NULL,
    provider_id      TEXT,
    links            TEXT NOT NULL DEFAULT '{}',
    output           TEXT,
    error_code       TEXT,
    error_message    TEXT,
    channel          TEXT CHECK (channel IN ('webhook', 'sse', 'poll', 'sync')),
    parent_id        TEXT,
    depth            INTEGER NOT NULL DEFAULT 0,
    idempotency_key  TEXT,
    fingerprint      TEXT,
    trace            TEXT,
    -- Where the submit wants the event sent.
    reply_to         TEXT,
    created_at       REAL NOT NULL,
    submitted_at     REAL,
    completed_at     REAL,
    erased_at        REAL,
    due_at           REAL,
    deadline_at      REAL,
    submits          INTEGER NOT NULL DEFAULT 0,
    polls            INTEGER NOT NULL DEFAULT 0,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    CONSTRAINT a_living_row_is_due
        CHECK ((status IN ('succeeded', 'failed', 'canceled')) = (due_at IS NULL)),
    CONSTRAINT an_end_has_a_time
        CHECK ((status IN ('succeeded', 'failed', 'canceled')) = (completed_at IS NOT NULL)),
    CONSTRAINT success_has_an_output CHECK ((status = 'succeeded') = (output IS NOT NULL)),
    CONSTRAINT other_ends_have_an_error
        CHECK ((status IN ('failed', 'canceled')) = (error_code IS NOT NULL))
);
CREATE UNIQUE INDEX predictions_provider_id ON predictions (provider, provider_id)
    WHERE provider_id IS NOT NULL;
CREATE UNIQUE INDEX predictions_idempotency_key ON predictions (idempotency_key)
    WHERE idempotency_key IS NOT NULL;
-- What waits to be submitted and what waits to be polled are looked for apart: many that wait for
-- one must not be passed over by each look for the other.
CREATE INDEX predictions_queued ON predictions (provider, due_at) WHERE status = 'queued';
CREATE INDEX predictions_polled ON predictions (provider, due_at)
    WHERE status IN ('processing', 'submitting', 'unconfirmed');
CREATE INDEX predictions_living ON predictions (status, provider, id) WHERE due_at IS NOT NULL;
CREATE INDEX predictions_unsuccessful ON predictions (status, id) WHERE error_code IS NOT NULL;

-- The evidence; a prediction may be unknown here, as what is proved is kept whatever it is about.
CREATE TABLE callbacks (
    prediction_id TEXT NOT NULL,
    channel       TEXT NOT NULL,
    digest        TEXT NOT NULL,
    received_at   REAL NOT NULL,
    headers       TEXT NOT NULL,
    body          BLOB NOT NULL,
    verdict       TEXT NOT NULL,
    reason        TEXT NOT NULL,
    repeats       INTEGER NOT NULL DEFAULT 0,
    -- Of the latest repeat, if there was one.
    repeated_at   REAL,
    -- Where no prediction says whose callback it was.
    provider      TEXT,
    PRIMARY KEY (prediction_id, channel, digest)
) WITHOUT ROWID;
CREATE INDEX callbacks_unneeded ON callbacks (received_at) WHERE verdict <> 'accepted';
CREATE INDEX callbacks_discarded ON callbacks (coalesce(repeated_at, received_at))
    WHERE verdict IN ('duplicate', 'late', 'unknown') OR verdict = 'accepted' AND repeats > 0;

-- In the order of their commits. An event is named after its prediction: there is never another.
CREATE TABLE events (
    seq           INTEGER PRIMARY KEY,
    prediction_id TEXT NOT NULL UNIQUE REFERENCES predictions (id),
    id            TEXT GENERATED ALWAYS AS ('evt_' || substr(prediction_id, 6)) VIRTUAL,
    type          TEXT NOT NULL CHECK (type IN ('prediction.succeeded', 'prediction.failed',
                      'prediction.canceled')),
    time          REAL NOT NULL,
    channel       TEXT,
    -- 1: no handler matched it.
    unmatched     INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX events_unmatched ON events (time) WHERE unmatched = 1;

-- A delivery is named after its event and its handler, so the primary key forbids a second one. An
-- event is no foreign key: to delete one, all deliveries would be searched for it, or an index of
-- them paid for by every accept. Retention finds them by their ids.
CREATE TABLE deliveries (
    id            TEXT PRIMARY KEY,
    prediction_id TEXT NOT NULL,
    event_id      TEXT GENERATED ALWAYS AS ('evt_' || substr(prediction_id, 6)) VIRTUAL,
    handler       TEXT NOT NULL,
    state         TEXT NOT NULL CHECK (state IN ('pending', 'running', 'done', 'skipped', 'dead')),
    attempts      INTEGER NOT NULL DEFAULT 0,
    round         INTEGER NOT NULL DEFAULT 0,
    claims        INTEGER NOT NULL DEFAULT 0,
    due_at        REAL,
    owner         TEXT,
    lease_until   REAL,
    claimed_at    REAL,
    created_at    REAL NOT NULL,
    ended_at      REAL,
    reason        TEXT NOT NULL DEFAULT '',
    -- The handlers whose deliveries must end first, as JSON.
    after         TEXT NOT NULL DEFAULT '[]',
    replay_id     TEXT,
    CONSTRAINT a_name_is_of_its_event CHECK (substr(id, 5, 32) = substr(prediction_id, 6)),
    CONSTRAINT a_pending_delivery_is_due CHECK ((state = 'pending') = (due_at IS NOT NULL)),
    CONSTRAINT a_running_delivery_is_claimed CHECK ((state = 'running') = (owner IS NOT NULL)),
    CONSTRAINT a_claim_expires CHECK ((owner IS NULL) = (lease_until IS NULL)),
    CONSTRAINT an_ended_delivery_has_a_time
        CHECK ((state IN ('done', 'skipped', 'dead')) = (ended_at IS NOT NULL))
) WITHOUT ROWID;
CREATE INDEX deliveries_pending ON deliveries (handler, due_at) WHERE state = 'pending';
CREATE INDEX deliveries_running ON deliveries (state, id) WHERE state = 'running';
CREATE INDEX deliveries_failed ON deliveries (state, id) WHERE state IN ('skipped', 'dead');
CREATE INDEX deliveries_waiting ON deliveries (prediction_id)
    WHERE state = 'pending' AND after <> '[]';
CREATE INDEX deliveries_replayed ON deliveries (replay_id, due_at)
    WHERE state = 'pending' AND replay_id IS NOT NULL;

CREATE TABLE attempts (
    delivery_id TEXT NOT NULL REFERENCES deliveries (id),
    number      INTEGER NOT NULL,
    started_at  REAL NOT NULL,
    ended_at    REAL NOT NULL,
    result      TEXT NOT NULL,
    reason      TEXT NOT NULL,
    note        TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (delivery_id, number)
) WITHOUT ROWID;

-- What handlers keep by `ctx.once`.
CREATE TABLE steps (
    delivery_id TEXT NOT NULL REFERENCES deliveries (id),
    key         TEXT NOT NULL,
    result      TEXT NOT NULL,
    PRIMARY KEY (delivery_id, key)
) WITHOUT ROWID;

CREATE TABLE probe (one INTEGER PRIMARY KEY CHECK (one = 1), at REAL NOT NULL);

-- One row for each provider, to be locked while its requests are counted.
CREATE TABLE limits (
    provider TEXT PRIMARY KEY,
    turns    INTEGER NOT NULL
);

CREATE TABLE requests (
    provider TEXT NOT NULL,
    at       REAL NOT NULL,
    requests INTEGER NOT NULL
);
CREATE INDEX requests_recent ON requests (provider, at);

-- Leader election: which process does what one does for all.
CREATE TABLE leases (
    name    TEXT PRIMARY KEY,
    owner   TEXT NOT NULL,
    until   REAL NOT NULL,
    at_work INTEGER NOT NULL
);

-- The change log: every status of every prediction, in the order of the commits. Triggers write it,
-- so that nothing that changes a status can forget it.
CREATE TABLE changes (
    seq           INTEGER PRIMARY KEY,
    prediction_id TEXT NOT NULL,
    status        TEXT NOT NULL,
    time          REAL NOT NULL
);
-- only sqlite
CREATE TRIGGER changes_of_new AFTER INSERT ON predictions BEGIN
    INSERT INTO changes (prediction_id, status, time) VALUES (NEW.id, NEW.status, NEW.created_at);
END;
CREATE TRIGGER changes_of_status AFTER UPDATE OF status ON predictions
WHEN OLD.status <> NEW.status BEGIN
    INSERT INTO changes (prediction_id, status, time)
    VALUES (NEW.id, NEW.status,
            coalesce(NEW.completed_at, (julianday('now') - 2440587.5) * 86400.0));
END;
-- only postgres
CREATE FUNCTION receiver.write_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO receiver.changes (prediction_id, status, time)
    VALUES (NEW.id, NEW.status, CASE TG_OP WHEN 'INSERT' THEN NEW.created_at
            ELSE coalesce(NEW.completed_at, extract(epoch FROM clock_timestamp())) END);
    RETURN NULL;
END $$;
CREATE TRIGGER changes_of_new AFTER INSERT ON predictions
    FOR EACH ROW EXECUTE FUNCTION receiver.write_change();
CREATE TRIGGER changes_of_status AFTER UPDATE OF status ON predictions
    FOR EACH ROW WHEN (OLD.status <> NEW.status) EXECUTE FUNCTION receiver.write_change();
-- both

-- How far a table was trimmed at its old end, by its name.
CREATE TABLE watermarks (
    name  TEXT PRIMARY KEY,
    value INTEGER NOT NULL
);

-- Callbacks that were not proved, counted; nothing of them is kept.
CREATE TABLE rejections (
    provider TEXT NOT NULL,
    reason   TEXT NOT NULL,
    source   TEXT NOT NULL,
    times    INTEGER NOT NULL,
    first_at REAL NOT NULL,
    last_at  REAL NOT NULL,
    PRIMARY KEY (provider, reason, source)
) WITHOUT ROWID;

-- Circuit breakers: handlers whose deliveries wait, paused by hand or open after failures.
CREATE TABLE handlers (
    name        TEXT PRIMARY KEY,
    paused_at   REAL,
    failures    INTEGER NOT NULL DEFAULT 0,
    open_until  REAL,
    probe_until REAL,
    -- Of the last failure.
    reason      TEXT NOT NULL DEFAULT ''
);

CREATE TABLE replays (
    id         TEXT PRIMARY KEY,
    wanted     TEXT NOT NULL,
    state      TEXT NOT NULL CHECK (state IN ('counted', 'running', 'done', 'canceled')),
    events     INTEGER NOT NULL,
    matched    INTEGER NOT NULL,
    replayed   INTEGER NOT NULL DEFAULT 0,
    next       INTEGER NOT NULL,
    last       INTEGER NOT NULL,
    created_at REAL NOT NULL,
    ended_at   REAL
);
