-- name: select_gates
SELECT name, paused_at, failures, open_until, probe_until, reason FROM handlers

-- name: pause
INSERT INTO handlers (name, paused_at) VALUES (:name, :now::float)
ON CONFLICT (name) DO UPDATE SET paused_at = coalesce(handlers.paused_at, excluded.paused_at)

-- name: resume
UPDATE handlers
SET paused_at = NULL, failures = 0, open_until = NULL, probe_until = NULL, reason = ''
WHERE name = :name

-- name: open
-- Of many that fail at once the first opens it; a failed probe opens it again, for longer.
INSERT INTO handlers (name, failures, open_until, reason) VALUES (:name, 1, :until::float, :reason)
ON CONFLICT (name) DO UPDATE
SET failures = handlers.failures + 1, open_until = excluded.open_until, probe_until = NULL,
    reason = excluded.reason
WHERE handlers.open_until IS NULL OR handlers.open_until <= :now::float
RETURNING failures

-- name: probe
UPDATE handlers SET probe_until = :until::float
WHERE name = :name AND open_until <= :now::float AND (probe_until IS NULL OR probe_until <= :now::float)
RETURNING name

-- name: end_probe
UPDATE handlers SET probe_until = NULL WHERE name = :name

-- name: close
UPDATE handlers SET failures = 0, open_until = NULL, probe_until = NULL, reason = ''
WHERE name = :name AND open_until IS NOT NULL
RETURNING name

-- name: try_again
-- Whoever starts may have fixed what failed: the next delivery is tried at once, even if another
-- was being tried, as its process may be the one that died before this one.
UPDATE handlers SET probe_until = NULL,
    open_until = CASE WHEN open_until > :now::float THEN :now::float ELSE open_until END
WHERE open_until IS NOT NULL
