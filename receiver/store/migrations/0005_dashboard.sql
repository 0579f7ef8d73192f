-- What people look predictions up by, and what they did in the dashboard.

-- Of what was ordered; erased with it.
-- only sqlite
ALTER TABLE predictions ADD COLUMN recipe TEXT
    GENERATED ALWAYS AS (json_extract(ordered, '$.recipe')) VIRTUAL;
ALTER TABLE predictions ADD COLUMN person TEXT
    GENERATED ALWAYS AS (json_extract(ordered, '$.person')) VIRTUAL;
-- only postgres
ALTER TABLE predictions ADD COLUMN recipe TEXT
    GENERATED ALWAYS AS (ordered::json ->> 'recipe') STORED,
    ADD COLUMN person TEXT
    GENERATED ALWAYS AS (ordered::json ->> 'person') STORED;
-- both
CREATE INDEX predictions_recipe ON predictions (recipe, id) WHERE ordered IS NOT NULL;
CREATE INDEX predictions_person ON predictions (person, id) WHERE ordered IS NOT NULL;
CREATE INDEX predictions_children ON predictions (parent_id, id) WHERE parent_id IS NOT NULL;

-- Who did what by hand; written before it is done, and completed after.
CREATE TABLE audit (
    id      TEXT PRIMARY KEY,
    at      REAL NOT NULL,
    -- The name of the key.
    who     TEXT NOT NULL,
    client  TEXT NOT NULL,
    action  TEXT NOT NULL,
    -- The id or name of what it was done to.
    target  TEXT NOT NULL,
    -- `done`, or the type of the problem; NULL: it is under way, or its process died.
    result  TEXT
);
