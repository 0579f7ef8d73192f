-- fragment: beside_pending
SELECT 'delivery', handler, 'running', count(*), min(CASE round WHEN 0 THEN created_at END), 0, ''
FROM deliveries WHERE state = 'running' GROUP BY handler
UNION ALL
SELECT 'dead', '', 'dead', count(*), NULL, 0, ''
FROM (SELECT 1 FROM deliveries d
      WHERE d.state = 'dead' AND d.state IN ('skipped', 'dead') LIMIT 10000) n
UNION ALL
SELECT 'prediction', r.provider, r.status,
    (SELECT count(*) FROM (SELECT 1 FROM predictions p
                           WHERE p.provider = r.provider AND p.status = r.status
                             AND p.due_at IS NOT NULL
                           ORDER BY p.id LIMIT 10000) n),
    NULL,
    CASE WHEN :before::float > 0 AND r.status IN ('processing', 'unconfirmed') THEN
        (SELECT count(*) FROM (SELECT p.due_at FROM predictions p
                               WHERE p.provider = r.provider AND p.status = r.status
                                 AND p.due_at IS NOT NULL
                               ORDER BY p.id LIMIT 10000) n
         WHERE n.due_at <= :before::float)
    ELSE 0 END,
    ''
FROM {rows:provider text, status text}
UNION ALL
SELECT 'breaker', name, CASE WHEN paused_at IS NOT NULL THEN 'paused' ELSE 'open' END, 0,
    open_until, 0, reason
FROM handlers WHERE paused_at IS NOT NULL OR open_until IS NOT NULL

-- name: count_all
-- Count all open work; no count exceeds 10,000, so that its cost has a bound.
-- The index leads from one handler with pending deliveries to the next, however many each has. A
-- delivery that is pending again after its end is as old as its due time, any other as its event.
-- Work due since `before` is overdue; if `before` is 0, it is not counted.
WITH RECURSIVE {handlers_with_pending}
SELECT * FROM (
    SELECT 'delivery' AS kind, h.name AS name, 'pending' AS state,
        (SELECT count(*) FROM (SELECT 1 FROM deliveries d
                               WHERE d.handler = h.name AND d.state = 'pending' LIMIT 10000) n)
        AS number,
        (SELECT min(CASE o.round WHEN 0 THEN o.created_at ELSE o.due_at END)
         FROM (SELECT d.round, d.created_at, d.due_at FROM deliveries d
               WHERE d.handler = h.name AND d.state = 'pending' ORDER BY d.due_at LIMIT 10000) o)
        AS since,
        (SELECT count(*) FROM (SELECT 1 FROM deliveries d
                               WHERE d.handler = h.name AND d.state = 'pending'
                                 AND d.due_at <= :before::float LIMIT 10000) n)
        AS overdue,
        '' AS reason
    FROM h WHERE h.name IS NOT NULL LIMIT 1000) pending
UNION ALL
{beside_pending}

-- name: count_few
-- Count the same for display: a handler's pending deliveries up to 1,000, and without their ages.
WITH RECURSIVE {handlers_with_pending}
SELECT * FROM (
    SELECT 'delivery' AS kind, h.name AS name, 'pending' AS state,
        (SELECT count(*) FROM (SELECT 1 FROM deliveries d
                               WHERE d.handler = h.name AND d.state = 'pending' LIMIT 1000) n)
        AS number,
        CAST(NULL AS REAL) AS since, 0 AS overdue, '' AS reason
    FROM h WHERE h.name IS NOT NULL LIMIT 1000) pending
UNION ALL
{beside_pending}
