-- Searches by people. A search by a filter without an index reads a bounded number of rows: the id
-- where it ends is found first, and limits it.

-- fragment: hit_columns
p.id, p.provider, p.model, p.status, p.created_at, p.submitted_at, p.completed_at, p.erased_at,
    p.error_code, substr(p.error_message, 1, 300) AS error_message, p.recipe, p.person, p.depth,
    substr(p.input, greatest(instr(p.input, '"prompt":"'), 1), 600) AS prompt,
    CASE WHEN length(p.output) < 20000 THEN p.output END AS output,
    p.output IS NOT NULL AND p.output <> '[]' AS has_output,
    CASE WHEN length(p.metadata) < 20000 THEN p.metadata ELSE '{}' END AS metadata

-- name: search
-- Find predictions, newest first.
SELECT {hit_columns} FROM predictions p
WHERE p.id IN (SELECT id FROM predictions {where} ORDER BY id DESC LIMIT :limit::int)
ORDER BY p.id DESC
{of_a_list}
-- filter recipe: recipe = :recipe AND ordered IS NOT NULL
-- filter person: person = :person AND ordered IS NOT NULL
-- filter model: lower(model) = lower(:model)
-- filter models: lower(model) LIKE lower(:models) ESCAPE '!'
-- filter text: instr(lower(input), lower(:text)) > 0
-- filter needle: instr(metadata, :needle) > 0
-- filter until: id < :until
-- filter bound: id >= :bound

-- name: bound
-- Find where a search of a bounded number of rows ends.
SELECT id FROM predictions {where} ORDER BY id DESC LIMIT 1 OFFSET :most::int
-- filter unsuccessful: status = :status AND error_code IS NOT NULL
-- filter recipe: recipe = :recipe AND ordered IS NOT NULL
-- filter person: person = :person AND ordered IS NOT NULL
-- filter provider: provider = :provider
-- filter model: lower(model) = lower(:model)
-- filter since: id >= :since
-- filter until: id < :until
-- filter cursor: id < :cursor

-- name: select_parents
-- Read the ancestors of a prediction, the oldest first.
WITH RECURSIVE up (id, parent_id, steps) AS (
    SELECT id, parent_id, 0 FROM predictions WHERE id = :id
    UNION ALL
    SELECT p.id, p.parent_id, up.steps + 1 FROM up JOIN predictions p ON p.id = up.parent_id
    WHERE up.steps < 50
)
SELECT {hit_columns} FROM up JOIN predictions p ON p.id = up.id WHERE up.steps > 0
ORDER BY up.steps DESC

-- name: select_children
-- Read the predictions that the handlers of a prediction submitted, the oldest first.
SELECT {hit_columns} FROM predictions p
WHERE p.parent_id = :id AND p.parent_id IS NOT NULL ORDER BY p.id LIMIT 50

-- name: select_callbacks
-- Read the arrivals for a prediction, the oldest first; of a large body its beginning.
SELECT channel, received_at, headers, substr(body, 1, 20000) AS body, length(body) AS size, verdict,
       reason, repeats, repeated_at
FROM callbacks WHERE prediction_id = :id ORDER BY received_at LIMIT 50

-- name: count_recent
-- Count the latest predictions by status, `most` at most.
SELECT status, count(*) AS number
FROM (SELECT status FROM predictions WHERE id >= :since ORDER BY id DESC LIMIT :most::int) n
GROUP BY status

-- name: select_whole
-- Return which of some predictions exist and were not erased.
SELECT id FROM predictions
WHERE id IN (SELECT r.id FROM {rows:id text}) AND erased_at IS NULL
