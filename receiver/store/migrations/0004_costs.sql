-- Costs: what a prediction is expected to cost and what it cost, what is reserved of a budget, and
-- sums by day. All money is in microdollars.

-- By its recipe or the table of prices; NULL: neither has a price for it.
ALTER TABLE predictions ADD COLUMN price INTEGER;
ALTER TABLE predictions ADD COLUMN price_source TEXT;
-- The budgets that its price was reserved of, and when their times end, as JSON; NULL: of none.
ALTER TABLE predictions ADD COLUMN reserved TEXT;
-- As far as it is known; the provider's own figure may come later.
ALTER TABLE predictions ADD COLUMN cost INTEGER;
ALTER TABLE predictions ADD COLUMN cost_source TEXT
    CHECK (cost_source IN ('provider', 'computed', 'recipe'));
-- By what its cost is added up beside provider and model, as JSON: recipe, key, metadata; or NULL.
ALTER TABLE predictions ADD COLUMN account TEXT;

-- Only ever added to. `amount` is what a row adds to what is spent of the budgets: a settlement, and
-- one that corrects it, the difference to what was counted before.
CREATE TABLE ledger (
    seq           INTEGER PRIMARY KEY,
    prediction_id TEXT NOT NULL,
    entry         TEXT NOT NULL CHECK (entry IN ('reserved', 'settled', 'released')),
    amount        INTEGER NOT NULL,
    at            REAL NOT NULL
);
CREATE INDEX ledger_prediction ON ledger (prediction_id);

-- What ended on a day. A day has several rows of the same (`shard`), so that servers do not wait for
-- each other to add to one.
CREATE TABLE cost_sums (
    -- Since 1970, in UTC.
    day         INTEGER NOT NULL,
    provider    TEXT NOT NULL,
    model       TEXT NOT NULL,
    account     TEXT NOT NULL,
    shard       INTEGER NOT NULL,
    predictions INTEGER NOT NULL,
    amount      INTEGER NOT NULL,
    -- How many of them have no figure.
    unknown     INTEGER NOT NULL,
    PRIMARY KEY (day, provider, model, account, shard)
) WITHOUT ROWID;

-- Predictions that have ended, and whose providers are still to be asked what they cost.
CREATE TABLE cost_questions (
    prediction_id TEXT PRIMARY KEY,
    provider      TEXT NOT NULL,
    due_at        REAL NOT NULL,
    tries         INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX cost_questions_due ON cost_questions (provider, due_at);

-- What the limit is by, and its time, as in `person/day`.
ALTER TABLE order_counts ADD COLUMN kind TEXT NOT NULL DEFAULT '';
