-- name: try_write
INSERT INTO probe (one, at) VALUES (1, :now::float) ON CONFLICT (one) DO UPDATE SET at = excluded.at

-- name: last_change
SELECT coalesce(max(seq), 0) FROM changes

-- name: shift_predictions
UPDATE predictions SET due_at = due_at + :due::float, deadline_at = deadline_at + :deadline::float
WHERE due_at IS NOT NULL

-- name: shift_pending
UPDATE deliveries SET due_at = due_at + :due::float WHERE state = 'pending'

-- name: shift_running
UPDATE deliveries SET lease_until = lease_until + :deadline::float WHERE state = 'running'

-- name: shift_breakers
UPDATE handlers
SET open_until = open_until + :due::float, probe_until = probe_until + :deadline::float
WHERE open_until IS NOT NULL OR probe_until IS NOT NULL

-- name: shift_requests
UPDATE requests SET at = at + :due::float

-- name: shift_leases
UPDATE leases SET until = until + :due::float
