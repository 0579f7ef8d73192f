-- Orders by recipes. The key outlives its prediction: what comes again after that is not done again.

CREATE TABLE orders (
    -- A digest of the way in and of what came by it.
    key           TEXT PRIMARY KEY,
    prediction_id TEXT NOT NULL,
    recipe        TEXT NOT NULL,
    -- JSON, for orders of the same; empty when the prediction was erased or deleted.
    options       TEXT NOT NULL,
    -- Microdollars, as the recipe said.
    price         INTEGER,
    created_at    REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX orders_prediction ON orders (prediction_id);

-- How much was ordered under a limit in its hour, day or month; the row is locked to order more.
CREATE TABLE order_counts (
    -- A digest of what the limit is of, as a person, and of the length of its time.
    subject TEXT PRIMARY KEY,
    until   REAL NOT NULL,
    orders  INTEGER NOT NULL,
    -- Microdollars.
    spent   INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX order_counts_over ON order_counts (until);

-- Recipe, person, place and way in, as JSON.
ALTER TABLE predictions ADD COLUMN ordered TEXT;
-- When it is too late to submit it.
ALTER TABLE predictions ADD COLUMN latest_at REAL;
CREATE INDEX predictions_late ON predictions (provider, latest_at)
    WHERE status = 'queued' AND latest_at IS NOT NULL;
