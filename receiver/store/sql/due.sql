-- name: select_due
-- Read when the first of each kind falls due, and how long others hold what they have claimed.
-- Pending deliveries are looked at from handler to handler by the index, however many each has. What
-- a breaker holds back is due when that lets one through, and what is paused is not due at all.
WITH RECURSIVE {handlers_with_pending}
SELECT * FROM (
    SELECT 'delivery' AS kind, h.name AS name,
        greatest(
            (SELECT min(d.due_at) FROM deliveries d WHERE d.handler = h.name AND d.state = 'pending'),
            coalesce(b.open_until, 0), coalesce(b.probe_until, 0)) AS due_at
    FROM h LEFT JOIN handlers b ON b.name = h.name
    WHERE h.name IS NOT NULL AND b.paused_at IS NULL LIMIT 1000) pending
UNION ALL
SELECT 'submit', r.provider,
    (SELECT min(p.due_at) FROM predictions p WHERE p.provider = r.provider AND p.status = 'queued')
FROM {rows:provider text}
UNION ALL
SELECT 'poll', r.provider,
    (SELECT min(p.due_at) FROM predictions p
     WHERE p.provider = r.provider AND p.status IN ({in_flight}))
FROM {rows:provider text}
UNION ALL
SELECT 'claim', handler, min(lease_until) FROM deliveries
WHERE state = 'running' AND owner <> :owner GROUP BY handler
