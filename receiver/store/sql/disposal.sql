-- A prediction stays as long as a delivery of its parent may run again: that handler submits with
-- an idempotency key, and the key is deleted with its prediction.

-- fragment: may_go
p.completed_at <= CASE p.status WHEN 'succeeded' THEN :succeeded_before::float
                  WHEN 'failed' THEN :failed_before::float
                  WHEN 'canceled' THEN :canceled_before::float END
AND NOT EXISTS (SELECT 1 FROM deliveries d
    WHERE d.id > 'dlv_' || substr(p.id, 6) AND d.id < 'dlv_' || substr(p.id, 6) || '~'
    AND (d.state IN ('pending', 'running')
         OR d.state = 'dead' AND d.ended_at > :dead_before::float AND p.erased_at IS NULL))
AND NOT EXISTS (SELECT 1 FROM deliveries d
    WHERE d.id > 'dlv_' || substr(p.parent_id, 6) AND d.id < 'dlv_' || substr(p.parent_id, 6) || '~'
    AND (d.state IN ('pending', 'running') OR d.state = 'dead' AND d.ended_at > :dead_before::float))
AND EXISTS (SELECT 1 FROM events e
            WHERE e.prediction_id = p.id AND e.seq < (SELECT max(seq) FROM events))

-- name: select_old
-- Read predictions in the order of their ids, and whether they may be deleted.
SELECT p.id, CASE WHEN {may_go} THEN 1 ELSE 0 END AS may_go FROM predictions p
WHERE p.id > :cursor AND p.id < :horizon ORDER BY p.id LIMIT :most::int

-- name: hold_predictions
-- Lock predictions.
SELECT id FROM predictions WHERE id IN (SELECT r.id FROM {rows:id text}) ORDER BY id {lock}

-- name: hold_deliveries
-- Read and lock the deliveries of predictions.
SELECT d.id, d.prediction_id FROM {rows:id text} CROSS JOIN deliveries d
WHERE d.id > 'dlv_' || substr(r.id, 6) AND d.id < 'dlv_' || substr(r.id, 6) || '~' ORDER BY d.id {lock}

-- name: select_free
-- Return which of some predictions may be deleted.
SELECT p.id FROM predictions p WHERE p.id IN (SELECT r.id FROM {rows:id text}) AND {may_go}

-- name: select_changes
-- Read the oldest rows of the change log, but never the last one.
SELECT seq, time FROM changes WHERE seq < (SELECT max(seq) FROM changes) ORDER BY seq LIMIT :most::int

-- name: delete_changes
-- Delete the change log up to a position.
DELETE FROM changes WHERE seq <= :last::int

-- name: set_watermark
-- Store a number by name; it only grows.
INSERT INTO watermarks (name, value) VALUES (:name, :value::int)
ON CONFLICT (name) DO UPDATE SET value = excluded.value WHERE watermarks.value < excluded.value

-- name: select_cut
-- Read the time of the latest callback that decided nothing and need not be kept.
SELECT received_at FROM callbacks WHERE verdict <> 'accepted'
ORDER BY received_at DESC LIMIT 1 OFFSET :kept::int

-- name: select_unneeded
-- Find old callbacks that decided nothing, except those of young living predictions.
SELECT c.prediction_id, c.channel, c.digest FROM callbacks c
WHERE c.verdict <> 'accepted' AND c.received_at <= :before::float AND NOT EXISTS (
    SELECT 1 FROM predictions p
    WHERE p.id = c.prediction_id AND p.due_at IS NOT NULL AND p.created_at > :young::float)
ORDER BY c.received_at LIMIT :most::int

-- name: select_orphans
-- Find callbacks whose predictions are deleted.
SELECT c.prediction_id, c.channel, c.digest FROM callbacks c
WHERE c.verdict <> 'accepted' AND c.received_at <= :before::float AND NOT EXISTS (
    SELECT 1 FROM predictions p WHERE p.id = c.prediction_id)
ORDER BY c.received_at LIMIT :most::int

-- name: delete_callbacks
-- Delete callbacks that decided nothing.
DELETE FROM callbacks WHERE verdict <> 'accepted' AND (prediction_id, channel, digest) IN
    (SELECT r.prediction_id, r.channel, r.digest
     FROM {rows:prediction_id text, channel text, digest text})

-- name: delete_attempts
-- Delete the attempts of deliveries.
DELETE FROM attempts WHERE delivery_id IN (SELECT r.id FROM {rows:id text})

-- name: delete_deliveries
-- Delete deliveries.
DELETE FROM deliveries WHERE id IN (SELECT r.id FROM {rows:id text})

-- name: delete_events
-- Delete the events of predictions.
DELETE FROM events WHERE prediction_id IN (SELECT r.id FROM {rows:id text})

-- name: delete_callbacks_of
-- Delete all callbacks of predictions.
DELETE FROM callbacks WHERE prediction_id IN (SELECT r.id FROM {rows:id text})

-- name: delete_predictions
-- Delete predictions.
DELETE FROM predictions WHERE id IN (SELECT r.id FROM {rows:id text})
