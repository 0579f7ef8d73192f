-- name: select_due
-- Read when the first work of each kind falls due, and when the leases of other processes end.
-- The index leads from one handler with pending deliveries to the next, however many each has.
-- Behind an open breaker a delivery is due when the breaker lets one through; of a paused handler
-- none is due.
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
