-- name: hold_prediction
SELECT status, erased_at FROM predictions WHERE id = :id {lock}

-- name: blank_prediction
-- A blank text where the schema wants one: a success has an output, though there is none in it.
UPDATE predictions
SET input = '{}', metadata = '{}', links = '{}', trace = NULL, fingerprint = NULL,
    reply_to = NULL,
    output = CASE WHEN output IS NOT NULL THEN '[]' END,
    error_message = CASE WHEN error_code IS NOT NULL THEN '' END, erased_at = :now::float
WHERE id = :id

-- name: blank_callbacks
UPDATE callbacks SET headers = '[]', body = '' WHERE prediction_id = :id

-- name: select_running
SELECT id FROM deliveries WHERE id IN (SELECT r.id FROM {rows:id text}) AND state = 'running'

-- name: skip_deliveries
UPDATE deliveries
SET state = 'skipped', due_at = NULL, ended_at = :now::float, after = '[]', reason = 'erased'
WHERE id IN (SELECT r.id FROM {rows:id text}) AND state = 'pending'
RETURNING id

-- name: blank_deliveries
UPDATE deliveries SET reason = '' WHERE id IN (SELECT r.id FROM {rows:id text}) AND reason <> ''

-- name: blank_gates
-- Where a handler is held back, the reason of its last failure stands there too.
UPDATE handlers SET reason = '' WHERE reason <> '' AND reason IN (
    SELECT a.reason FROM attempts a
    WHERE a.delivery_id IN (SELECT r.id FROM {rows:id text}))

-- name: blank_attempts
UPDATE attempts SET reason = '', note = '' WHERE delivery_id IN (SELECT r.id FROM {rows:id text})

-- name: forget_steps
DELETE FROM steps WHERE delivery_id IN (SELECT r.id FROM {rows:id text})
