-- name: select_breakers
-- Read the breakers that were ever set, paused handlers too.
SELECT name, paused_at, failures, open_until, probe_until, reason FROM handlers

-- name: pause
-- Make a handler's deliveries wait until it is resumed.
INSERT INTO handlers (name, paused_at) VALUES (:name, :now::float)
ON CONFLICT (name) DO UPDATE SET paused_at = coalesce(handlers.paused_at, excluded.paused_at)

-- name: resume
-- Let a handler's deliveries run, whether it was paused or its breaker was open.
UPDATE handlers
SET paused_at = NULL, failures = 0, open_until = NULL, probe_until = NULL, reason = ''
WHERE name = :name

-- name: trip
-- Open the breaker after a run of failures, or again after a failed probe.
-- If many attempts fail at once, the first trips it.
INSERT INTO handlers (name, failures, open_until, reason) VALUES (:name, 1, :until::float, :reason)
ON CONFLICT (name) DO UPDATE
SET failures = handlers.failures + 1, open_until = excluded.open_until, probe_until = NULL,
    reason = excluded.reason
WHERE handlers.open_until IS NULL OR handlers.open_until <= :now::float
RETURNING failures

-- name: probe
-- Start a probe, if the breaker's wait is over and no other probe is under way.
UPDATE handlers SET probe_until = :until::float
WHERE name = :name AND open_until <= :now::float AND (probe_until IS NULL OR probe_until <= :now::float)
RETURNING name

-- name: end_probe
-- End a probe without a result, but not a later one of another process.
UPDATE handlers SET probe_until = NULL WHERE name = :name AND probe_until <= :until::float

-- name: reset
-- Close the breaker after a success.
UPDATE handlers SET failures = 0, open_until = NULL, probe_until = NULL, reason = ''
WHERE name = :name AND open_until IS NOT NULL
RETURNING name

-- name: try_again
-- Let every open breaker probe now.
-- Run at a start, as a new release may have fixed what failed. A probe under way is ended too: its
-- process may be the one that this one replaces.
UPDATE handlers SET probe_until = NULL,
    open_until = CASE WHEN open_until > :now::float THEN :now::float ELSE open_until END
WHERE open_until IS NOT NULL
