-- name: select_attempts
-- Read how attempts ended, and the states of their deliveries after them.
-- If the delivery was claimed again, the attempt left it pending.
SELECT a.delivery_id, a.number, a.result, a.reason, a.ended_at AS time, d.handler,
    CASE WHEN d.claims = a.number THEN d.state ELSE 'pending' END AS state,
    CASE WHEN d.claims = a.number THEN d.due_at END AS due_at,
    p.id AS prediction_id, p.provider, p.model, p.status, p.metadata
FROM {rows:delivery text, number int}
JOIN attempts a ON a.delivery_id = r.delivery AND a.number = r.number
JOIN deliveries d ON d.id = a.delivery_id
JOIN predictions p ON p.id = d.prediction_id
ORDER BY a.ended_at, a.delivery_id
