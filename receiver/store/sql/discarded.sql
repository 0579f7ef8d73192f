-- Lists of one kind of rows each, the latest first, and by their key if the times are equal.

-- fragment: latest
coalesce(c.repeated_at, c.received_at)

-- fragment: kind
CASE c.verdict WHEN 'accepted' THEN 'duplicate' ELSE c.verdict END

-- fragment: callback_key
c.prediction_id || '/' || c.channel || '/' || c.digest

-- fragment: rejection_key
r.provider || '/' || r.reason || '/' || r.source

-- name: list_callbacks
-- List duplicate, late and unknown callbacks, the latest first.
SELECT {callback_key} AS row_key, {kind} AS kind,
       CASE c.verdict WHEN 'accepted' THEN 'the same bytes again' ELSE c.reason END AS reason,
       coalesce(p.provider, c.provider) AS provider, c.channel, NULL AS source, c.prediction_id,
       e.id AS event_id, c.repeats + CASE c.verdict WHEN 'accepted' THEN 0 ELSE 1 END AS times,
       c.received_at AS first_at, {latest} AS last_at
FROM callbacks c LEFT JOIN predictions p ON p.id = c.prediction_id
LEFT JOIN events e ON e.prediction_id = c.prediction_id
{where} ORDER BY {latest} DESC, {callback_key} DESC LIMIT :limit::int
-- filter base: (c.verdict IN ('duplicate', 'late', 'unknown') OR c.verdict = 'accepted' AND c.repeats > 0)
-- filter cursor: {latest} <= :before::float AND ({latest} < :before::float OR {callback_key} < :key)
-- filter kind: {kind} = :kind
-- filter provider: coalesce(p.provider, c.provider) = :provider
-- filter prediction: c.prediction_id = :prediction

-- name: list_rejections
-- List callbacks that were not proved and orders that were refused, the latest first.
SELECT {rejection_key} AS row_key, 'rejected' AS kind, r.reason, nullif(r.provider, '') AS provider,
       NULL AS channel,
       r.source, NULL AS prediction_id, NULL AS event_id, r.times, r.first_at, r.last_at
FROM rejections r
{where} ORDER BY r.last_at DESC, {rejection_key} DESC LIMIT :limit::int
-- filter base: r.times > 0
-- filter cursor: r.last_at <= :before::float AND (r.last_at < :before::float OR {rejection_key} < :key)
-- filter provider: r.provider = :provider

-- name: list_unmatched
-- List events that no handler matched, the latest first.
SELECT e.prediction_id AS row_key, 'unmatched' AS kind,
       'no handler wants ' || e.type || ' of ' || p.model AS reason, p.provider, e.channel,
       NULL AS source, e.prediction_id, e.id AS event_id, 1 AS times, e.time AS first_at,
       e.time AS last_at
FROM events e JOIN predictions p ON p.id = e.prediction_id
{where} ORDER BY e.time DESC, e.prediction_id DESC LIMIT :limit::int
-- filter base: e.unmatched = 1
-- filter cursor: e.time <= :before::float AND (e.time < :before::float OR e.prediction_id < :key)
-- filter provider: p.provider = :provider
-- filter prediction: e.prediction_id = :prediction

-- name: forget
-- Delete counts of rejected callbacks that have not changed for long.
DELETE FROM rejections WHERE last_at < :before::float

-- name: select_counted
-- Read which rejected callbacks have a count of their own.
SELECT {gather:provider, reason, source} FROM rejections

-- name: count
-- Add to the counts of rejected callbacks.
INSERT INTO rejections (provider, reason, source, times, first_at, last_at)
SELECT r.provider, r.reason, r.source, r.times, r.first_at, r.last_at
FROM {rows:provider text, reason text, source text, times int, first_at float, last_at float}
WHERE true
ON CONFLICT (provider, reason, source) DO UPDATE
SET times = rejections.times + excluded.times, last_at = excluded.last_at
