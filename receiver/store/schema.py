"""The schema, as numbered migrations: each is applied once, in one transaction, and never edited.

One text serves both engines, but for a few words.

The database forbids the bad state: one event per prediction, one delivery per (event, handler), one
owner of a provider id, a due time on every row that is not at its end.
"""

from __future__ import annotations

from typing import Final

_0001_INITIAL: Final = """
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
    idempotency_key  TEXT,
    fingerprint      TEXT,
    created_at       REAL NOT NULL,
    submitted_at     REAL,
    completed_at     REAL,
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
CREATE INDEX predictions_due ON predictions (provider, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX predictions_living ON predictions (provider, status, id) WHERE due_at IS NOT NULL;
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
    PRIMARY KEY (prediction_id, channel, digest)
) WITHOUT ROWID;

-- In the order of their commits. An event is named after its prediction: there is never another.
CREATE TABLE events (
    seq           INTEGER PRIMARY KEY,
    prediction_id TEXT NOT NULL UNIQUE REFERENCES predictions (id),
    id            TEXT GENERATED ALWAYS AS ('evt_' || substr(prediction_id, 6)) VIRTUAL,
    type          TEXT NOT NULL CHECK (type IN ('prediction.succeeded', 'prediction.failed',
                      'prediction.canceled')),
    time          REAL NOT NULL,
    channel       TEXT
);

-- A delivery is named after its event and its handler, so the primary key forbids a second one.
CREATE TABLE deliveries (
    id            TEXT PRIMARY KEY,
    prediction_id TEXT NOT NULL REFERENCES events (prediction_id),
    event_id      TEXT GENERATED ALWAYS AS ('evt_' || substr(prediction_id, 6)) VIRTUAL,
    handler       TEXT NOT NULL,
    state         TEXT NOT NULL CHECK (state IN ('pending', 'running', 'done', 'skipped', 'dead')),
    attempts      INTEGER NOT NULL DEFAULT 0,
    round         INTEGER NOT NULL DEFAULT 0,
    claims        INTEGER NOT NULL DEFAULT 0,
    due_at        REAL,
    owner         TEXT,
    lease_until   REAL,
    created_at    REAL NOT NULL,
    ended_at      REAL,
    reason        TEXT NOT NULL DEFAULT '',
    CONSTRAINT a_name_is_of_its_event CHECK (substr(id, 5, 32) = substr(prediction_id, 6)),
    CONSTRAINT a_pending_delivery_is_due CHECK ((state = 'pending') = (due_at IS NOT NULL)),
    CONSTRAINT a_running_delivery_is_claimed CHECK ((state = 'running') = (owner IS NOT NULL)),
    CONSTRAINT a_claim_expires CHECK ((owner IS NULL) = (lease_until IS NULL)),
    CONSTRAINT an_ended_delivery_has_a_time
        CHECK ((state IN ('done', 'skipped', 'dead')) = (ended_at IS NOT NULL))
) WITHOUT ROWID;
CREATE INDEX deliveries_pending ON deliveries (handler, due_at) WHERE state = 'pending';
CREATE INDEX deliveries_running ON deliveries (lease_until) WHERE state = 'running';
CREATE INDEX deliveries_failed ON deliveries (state, id) WHERE state IN ('skipped', 'dead');

CREATE TABLE attempts (
    delivery_id TEXT NOT NULL REFERENCES deliveries (id),
    number      INTEGER NOT NULL,
    started_at  REAL NOT NULL,
    ended_at    REAL NOT NULL,
    result      TEXT NOT NULL,
    reason      TEXT NOT NULL,
    PRIMARY KEY (delivery_id, number)
) WITHOUT ROWID;

CREATE TABLE steps (
    delivery_id TEXT NOT NULL REFERENCES deliveries (id),
    key         TEXT NOT NULL,
    result      TEXT NOT NULL,
    PRIMARY KEY (delivery_id, key)
) WITHOUT ROWID;

CREATE TABLE probe (one INTEGER PRIMARY KEY CHECK (one = 1), at REAL NOT NULL);
"""

# What all processes on one database have in common: providers' limits, and who does what for all.
_0002_SHARED: Final = """
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

CREATE TABLE roles (
    name    TEXT PRIMARY KEY,
    owner   TEXT NOT NULL,
    until   REAL NOT NULL,
    at_work INTEGER NOT NULL
);
"""

# How many predictions led to one, what a delivery waits for, what an attempt had to say.
_0003_CHAINS: Final = """
ALTER TABLE predictions ADD COLUMN depth INTEGER NOT NULL DEFAULT 0;
ALTER TABLE deliveries ADD COLUMN after TEXT NOT NULL DEFAULT '[]';
ALTER TABLE attempts ADD COLUMN note TEXT NOT NULL DEFAULT '';
CREATE INDEX deliveries_waiting ON deliveries (prediction_id)
    WHERE state = 'pending' AND after <> '[]';
"""

# Whatever moves a prediction is written down by the database itself, so that no way of moving one
# can forget it; its own clock is asked only where the row has no time of its own.
_JOURNALING: Final = """
CREATE TRIGGER journal_of_new AFTER INSERT ON predictions BEGIN
    INSERT INTO journal (prediction_id, status, time) VALUES (NEW.id, NEW.status, NEW.created_at);
END;
CREATE TRIGGER journal_of_moves AFTER UPDATE OF status ON predictions
WHEN OLD.status <> NEW.status BEGIN
    INSERT INTO journal (prediction_id, status, time)
    VALUES (NEW.id, NEW.status,
            coalesce(NEW.completed_at, (julianday('now') - 2440587.5) * 86400.0));
END;
"""
_JOURNALING_IN_POSTGRES: Final = """
CREATE FUNCTION receiver.write_journal() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO receiver.journal (prediction_id, status, time)
    VALUES (NEW.id, NEW.status, CASE TG_OP WHEN 'INSERT' THEN NEW.created_at
            ELSE coalesce(NEW.completed_at, extract(epoch FROM clock_timestamp())) END);
    RETURN NULL;
END $$;
CREATE TRIGGER journal_of_new AFTER INSERT ON predictions
    FOR EACH ROW EXECUTE FUNCTION receiver.write_journal();
CREATE TRIGGER journal_of_moves AFTER UPDATE OF status ON predictions
    FOR EACH ROW WHEN (OLD.status <> NEW.status) EXECUTE FUNCTION receiver.write_journal();
"""

# To delete an event its deliveries were looked for, all of them one by one, as no index has them by
# prediction and none shall be paid for by every accept. Their ids are made of the prediction's, so
# whoever deletes finds them by that.
_DETACHING: Final = """
CREATE TABLE detached (
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
    created_at    REAL NOT NULL,
    ended_at      REAL,
    reason        TEXT NOT NULL DEFAULT '',
    after         TEXT NOT NULL DEFAULT '[]',
    replay_id     TEXT,
    CONSTRAINT a_name_is_of_its_event CHECK (substr(id, 5, 32) = substr(prediction_id, 6)),
    CONSTRAINT a_pending_delivery_is_due CHECK ((state = 'pending') = (due_at IS NOT NULL)),
    CONSTRAINT a_running_delivery_is_claimed CHECK ((state = 'running') = (owner IS NOT NULL)),
    CONSTRAINT a_claim_expires CHECK ((owner IS NULL) = (lease_until IS NULL)),
    CONSTRAINT an_ended_delivery_has_a_time
        CHECK ((state IN ('done', 'skipped', 'dead')) = (ended_at IS NOT NULL))
) WITHOUT ROWID;
INSERT INTO detached (id, prediction_id, handler, state, attempts, round, claims, due_at, owner,
                      lease_until, created_at, ended_at, reason, after)
    SELECT id, prediction_id, handler, state, attempts, round, claims, due_at, owner, lease_until,
           created_at, ended_at, reason, after FROM deliveries ORDER BY id;
DROP TABLE deliveries;
ALTER TABLE detached RENAME TO deliveries;
CREATE INDEX deliveries_pending ON deliveries (handler, due_at) WHERE state = 'pending';
CREATE INDEX deliveries_running ON deliveries (lease_until) WHERE state = 'running';
CREATE INDEX deliveries_failed ON deliveries (state, id) WHERE state IN ('skipped', 'dead');
CREATE INDEX deliveries_waiting ON deliveries (prediction_id)
    WHERE state = 'pending' AND after <> '[]';
"""
_DETACHING_IN_POSTGRES: Final = """
ALTER TABLE deliveries DROP CONSTRAINT deliveries_prediction_id_fkey;
ALTER TABLE deliveries ADD COLUMN replay_id TEXT;
"""

# What whoever operates it asks for: what happens now, what was turned away, what is held back.
_0004_OPERATING: Final = f"""
CREATE TABLE journal (
    seq           INTEGER PRIMARY KEY,
    prediction_id TEXT NOT NULL,
    status        TEXT NOT NULL,
    time          REAL NOT NULL
);
INSERT INTO journal (prediction_id, status, time)
    SELECT prediction_id, substr(type, 12), time FROM events ORDER BY seq;
{_JOURNALING}

-- How far a table was cut off at its old end, by its name.
CREATE TABLE marks (
    name  TEXT PRIMARY KEY,
    value INTEGER NOT NULL
);

ALTER TABLE predictions ADD COLUMN trace TEXT;
ALTER TABLE predictions ADD COLUMN erased_at REAL;

ALTER TABLE events ADD COLUMN unrouted INTEGER NOT NULL DEFAULT 0;
CREATE INDEX events_unrouted ON events (time) WHERE unrouted = 1;
CREATE INDEX callbacks_unneeded ON callbacks (received_at) WHERE verdict <> 'accepted';

-- Where no prediction says it: whose callback it was. And when the same bytes came last.
ALTER TABLE callbacks ADD COLUMN provider TEXT;
ALTER TABLE callbacks ADD COLUMN repeated_at REAL;
CREATE INDEX callbacks_undelivered ON callbacks (coalesce(repeated_at, received_at))
    WHERE verdict IN ('duplicate', 'late', 'unknown') OR verdict = 'accepted' AND repeats > 0;

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

-- Handlers whose deliveries wait: by hand (paused), or after a run of failures (open).
CREATE TABLE handlers (
    name        TEXT PRIMARY KEY,
    paused_at   REAL,
    failures    INTEGER NOT NULL DEFAULT 0,
    open_until  REAL,
    probe_until REAL
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
{_DETACHING}
CREATE INDEX deliveries_replayed ON deliveries (replay_id, due_at)
    WHERE state = 'pending' AND replay_id IS NOT NULL;
"""  # noqa: S608 - our own constants

# Why a handler is held back; and when an attempt began, for whoever finds its process gone.
_0005_REASONS: Final = """
ALTER TABLE handlers ADD COLUMN reason TEXT NOT NULL DEFAULT '';
ALTER TABLE deliveries ADD COLUMN claimed_at REAL;
"""

MIGRATIONS: Final = (_0001_INITIAL, _0002_SHARED, _0003_CHAINS, _0004_OPERATING, _0005_REASONS)
"""Migration n is at index n-1; a database says in its version how many it has had."""

# Ids are compared byte by byte, whatever language the server was set up for.
_POSTGRES_WORDS: Final = {
    _JOURNALING: _JOURNALING_IN_POSTGRES,
    _DETACHING: _DETACHING_IN_POSTGRES,
    "INTEGER PRIMARY KEY": "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY",
    " INTEGER": " BIGINT",
    " TEXT": ' TEXT COLLATE "C"',
    " REAL": " DOUBLE PRECISION",
    " BLOB": " BYTEA",
    " VIRTUAL": " STORED",
    " WITHOUT ROWID": "",
}


def for_postgres(script: str) -> str:
    """Say a migration in PostgreSQL's words."""
    for word, other in _POSTGRES_WORDS.items():
        script = script.replace(word, other)
    return script
