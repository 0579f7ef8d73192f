-- name: select_known
-- Read and lock the current state of predictions.
-- Locked in sorted order, so that two batches in two processes cannot deadlock.
SELECT {gather:id, provider, model, status, provider_id, metadata,
    erased_at IS NOT NULL AS erased, submitted_at, trace, reply_to, price, price_source, reserved,
    cost, account, submits}
FROM predictions WHERE id IN (SELECT r.id FROM {rows:id text}) ORDER BY id {lock}

-- name: insert_callbacks
-- Record callbacks; repeats of the same bytes are only counted.
INSERT INTO callbacks
    (prediction_id, channel, digest, received_at, headers, body, verdict, reason, repeats, provider)
SELECT r.prediction_id, r.channel, r.digest, r.received_at, r.headers, r.body, r.verdict, r.reason,
       r.repeats, r.provider
FROM {rows:prediction_id text, channel text, digest text, received_at float, headers text,
           body bytes, verdict text, reason text, repeats int, provider text} WHERE true
ON CONFLICT (prediction_id, channel, digest) DO UPDATE
SET repeats = callbacks.repeats + 1 + excluded.repeats, repeated_at = excluded.received_at,
    verdict = CASE excluded.verdict WHEN 'accepted' THEN 'accepted' ELSE callbacks.verdict END

-- name: note_prediction
-- Record a status that is no end, or a request to poll.
UPDATE predictions
SET status = :status, provider_id = coalesce(provider_id, :provider_id),
    due_at = least(due_at, coalesce(:due_at::float, due_at))
WHERE id = :id AND status NOT IN ({terminal})

-- name: insert_events
-- Record events; `unmatched` are those that no handler matched.
INSERT INTO events (prediction_id, type, time, channel, unmatched)
SELECT r.prediction_id, r.type, r.time, r.channel, r.unmatched
FROM {rows:prediction_id text, type text, time float, channel text, unmatched int}

-- name: insert_deliveries
-- Create deliveries: due now, or waiting for other deliveries of their event.
INSERT INTO deliveries (id, prediction_id, handler, state, due_at, created_at, after, reason)
SELECT r.id, r.prediction_id, r.handler, 'pending', r.due_at, r.at, r.after, r.reason
FROM {rows:id text, prediction_id text, handler text, at float, due_at float, after text,
           reason text}
