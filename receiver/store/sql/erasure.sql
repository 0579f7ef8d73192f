-- name: hold_prediction
-- Read and lock the fields that decide whether a prediction may be erased.
SELECT status, erased_at FROM predictions WHERE id = :id {lock}

-- name: blank_prediction
-- Erase the content of a prediction.
-- The schema requires an output of a success, and a message of an error: they are set empty.
UPDATE predictions
SET input = '{}', metadata = '{}', links = '{}', trace = NULL, fingerprint = NULL,
    reply_to = NULL, private = NULL, ordered = NULL,
    output = CASE WHEN output IS NOT NULL THEN '[]' END,
    error_message = CASE WHEN error_code IS NOT NULL THEN '' END, erased_at = :now::float
WHERE id = :id

-- name: blank_callbacks
-- Erase the headers and bodies of a prediction's callbacks.
UPDATE callbacks SET headers = '[]', body = '' WHERE prediction_id = :id

-- name: select_running
-- Return which of some deliveries are running.
SELECT id FROM deliveries WHERE id IN (SELECT r.id FROM {rows:id text}) AND state = 'running'

-- name: skip_deliveries
-- End the pending deliveries of an erased prediction.
UPDATE deliveries
SET state = 'skipped', due_at = NULL, ended_at = :now::float, after = '[]', reason = 'erased'
WHERE id IN (SELECT r.id FROM {rows:id text}) AND state = 'pending'
RETURNING id

-- name: blank_deliveries
-- Erase the reasons of deliveries.
UPDATE deliveries SET reason = '' WHERE id IN (SELECT r.id FROM {rows:id text}) AND reason <> ''

-- name: blank_breakers
-- Erase the reasons of circuit breakers that are equal to an attempt's.
UPDATE handlers SET reason = '' WHERE reason <> '' AND reason IN (
    SELECT a.reason FROM attempts a
    WHERE a.delivery_id IN (SELECT r.id FROM {rows:id text}))

-- name: blank_attempts
-- Erase the reasons and notes of attempts.
UPDATE attempts SET reason = '', note = '' WHERE delivery_id IN (SELECT r.id FROM {rows:id text})
