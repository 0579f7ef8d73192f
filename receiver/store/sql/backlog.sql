-- name: select_backlog
SELECT
    (SELECT count(*) FROM deliveries WHERE state = 'dead'),
    (SELECT count(*) FROM deliveries d WHERE state = 'pending' AND due_at <= :before::float
        AND NOT EXISTS (SELECT 1 FROM handlers h WHERE h.name = d.handler
                        AND (h.paused_at IS NOT NULL OR h.open_until > :before::float))),
    (SELECT count(*) FROM predictions
        WHERE due_at <= :before::float AND status IN ('processing', 'unconfirmed'))

-- name: pending
-- From handler to handler by the index, however many deliveries each has. A count ends at 10,000, as
-- more is as bad; so does the search for the oldest, in those due first. A delivery that is pending
-- again after its end is as old as its due time, any other as its event.
WITH RECURSIVE h (name) AS (
    SELECT min(handler) FROM deliveries WHERE state = 'pending'
    UNION ALL
    SELECT (SELECT min(d.handler) FROM deliveries d
            WHERE d.state = 'pending' AND d.handler > h.name)
    FROM h WHERE h.name IS NOT NULL
)
SELECT h.name,
    (SELECT count(*) FROM (SELECT 1 FROM deliveries d
                           WHERE d.handler = h.name AND d.state = 'pending' LIMIT 10000) n),
    (SELECT min(CASE o.round WHEN 0 THEN o.created_at ELSE o.due_at END)
     FROM (SELECT d.round, d.created_at, d.due_at FROM deliveries d
           WHERE d.handler = h.name AND d.state = 'pending' ORDER BY d.due_at LIMIT 10000) o)
FROM h WHERE h.name IS NOT NULL LIMIT 200

-- name: running
SELECT handler, count(*), min(CASE round WHEN 0 THEN created_at END) FROM deliveries
WHERE state = 'running' GROUP BY handler

-- name: living
SELECT r.provider, r.status,
    (SELECT count(*) FROM (SELECT 1 FROM predictions p
                           WHERE p.provider = r.provider AND p.status = r.status
                             AND p.due_at IS NOT NULL
                           ORDER BY p.id LIMIT 10000) n)
FROM {rows:provider text, status text}

-- name: held
SELECT name, CASE WHEN paused_at IS NOT NULL THEN 'paused' ELSE 'open' END, reason FROM handlers
WHERE paused_at IS NOT NULL OR open_until IS NOT NULL ORDER BY name
