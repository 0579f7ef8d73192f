-- name: select_changes
-- Read a page of the change log, oldest first.
SELECT j.seq, j.status, j.time, p.id AS prediction_id, p.provider, p.model, p.metadata
FROM changes j JOIN predictions p ON p.id = j.prediction_id
WHERE j.seq > :after::int AND j.seq <= :end::int ORDER BY j.seq LIMIT :most::int

-- name: select_events_below
-- Read the events before a position, newest first, as changes of status.
SELECT e.seq, substr(e.type, 12) AS status, e.time, p.id AS prediction_id, p.provider, p.model, p.metadata
FROM events e JOIN predictions p ON p.id = e.prediction_id
WHERE e.seq < :below::int ORDER BY e.seq DESC LIMIT :most::int

-- name: select_events
-- Read complete events with their predictions.
SELECT {event_columns}
FROM {rows:prediction_id text} JOIN events e ON e.prediction_id = r.prediction_id
JOIN predictions p ON p.id = e.prediction_id

-- name: select_watermark
-- Read a number that was stored by name.
SELECT value FROM watermarks WHERE name = :name
