-- Lists of one kind of rows each, the latest first, and by their key where that is the same.

-- fragment: latest
coalesce(c.repeated_at, c.received_at)

-- fragment: kind
CASE c.verdict WHEN 'accepted' THEN 'duplicate' ELSE c.verdict END

-- fragment: callback_key
c.prediction_id || '/' || c.channel || '/' || c.digest

-- fragment: rejection_key
r.provider || '/' || r.reason || '/' || r.source

-- name: list_callbacks
SELECT {callback_key}, {kind},
       CASE c.verdict WHEN 'accepted' THEN 'the same bytes again' ELSE c.reason END,
       coalesce(p.provider, c.provider), c.channel, NULL, c.prediction_id, e.id,
       c.repeats + CASE c.verdict WHEN 'accepted' THEN 0 ELSE 1 END, c.received_at, {latest}
FROM callbacks c LEFT JOIN predictions p ON p.id = c.prediction_id
LEFT JOIN events e ON e.prediction_id = c.prediction_id
{where} ORDER BY {latest} DESC, {callback_key} DESC LIMIT :limit::int
-- filter base: (c.verdict IN ('duplicate', 'late', 'unknown') OR c.verdict = 'accepted' AND c.repeats > 0)
-- filter cursor: {latest} <= :before::float AND ({latest} < :before::float OR {callback_key} < :key)
-- filter kind: {kind} = :kind
-- filter provider: coalesce(p.provider, c.provider) = :provider
-- filter prediction: c.prediction_id = :prediction

-- name: list_rejections
SELECT {rejection_key}, 'rejected', r.reason, r.provider, NULL, r.source, NULL, NULL, r.times,
       r.first_at, r.last_at
FROM rejections r
{where} ORDER BY r.last_at DESC, {rejection_key} DESC LIMIT :limit::int
-- filter base: r.times > 0
-- filter cursor: r.last_at <= :before::float AND (r.last_at < :before::float OR {rejection_key} < :key)
-- filter provider: r.provider = :provider

-- name: list_unmatched
SELECT e.prediction_id, 'unmatched', 'no handler wants ' || e.type || ' of ' || p.model, p.provider,
       e.channel, NULL, e.prediction_id, e.id, 1, e.time, e.time
FROM events e JOIN predictions p ON p.id = e.prediction_id
{where} ORDER BY e.time DESC, e.prediction_id DESC LIMIT :limit::int
-- filter base: e.unmatched = 1
-- filter cursor: e.time <= :before::float AND (e.time < :before::float OR e.prediction_id < :key)
-- filter provider: p.provider = :provider
-- filter prediction: e.prediction_id = :prediction

-- name: forget
DELETE FROM rejections WHERE last_at < :before::float

-- name: select_counted
SELECT {gather:provider, reason, source} FROM rejections

-- name: count
INSERT INTO rejections (provider, reason, source, times, first_at, last_at)
SELECT r.provider, r.reason, r.source, r.times, r.first_at, r.last_at
FROM {rows:provider text, reason text, source text, times int, first_at float, last_at float}
WHERE true
ON CONFLICT (provider, reason, source) DO UPDATE
SET times = rejections.times + excluded.times, last_at = excluded.last_at
