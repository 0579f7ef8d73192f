-- name: try_write
-- Write one row, to check whether the database accepts writes.
INSERT INTO probe (one, at) VALUES (1, :now::float) ON CONFLICT (one) DO UPDATE SET at = excluded.at

-- name: last_change
-- Read the last position in the change log.
SELECT coalesce(max(seq), 0) AS seq FROM changes

-- name: shift_predictions
-- Move the due times and deadlines of predictions along with the clock.
-- Of one that was begun, the latest time may be its deadline.
UPDATE predictions SET due_at = due_at + :due::float, deadline_at = deadline_at + :deadline::float,
    latest_at = latest_at
        + CASE WHEN latest_at = deadline_at THEN :deadline::float ELSE :due::float END
WHERE due_at IS NOT NULL

-- name: advance_predictions
-- Make predictions due earlier.
UPDATE predictions SET due_at = due_at - :seconds::float WHERE due_at IS NOT NULL

-- name: shift_pending
-- Move the due times of pending deliveries.
UPDATE deliveries SET due_at = due_at + :due::float WHERE state = 'pending'

-- name: shift_running
-- Move the leases of claims.
UPDATE deliveries SET lease_until = lease_until + :deadline::float WHERE state = 'running'

-- name: shift_breakers
-- Move the times of circuit breakers.
UPDATE handlers
SET open_until = open_until + :due::float, probe_until = probe_until + :deadline::float
WHERE open_until IS NOT NULL OR probe_until IS NOT NULL

-- name: shift_requests
-- Move the times of counted requests.
UPDATE requests SET at = at + :due::float

-- name: shift_leases
-- Move the leases of leaders; that of `take_step` has the new time already.
UPDATE leases SET until = until + :due::float WHERE name <> 'clock'

-- name: take_step
-- Take the lease by which one process moves the stored times.
-- One that ends much earlier or later is of another step.
INSERT INTO leases (name, owner, until, at_work) VALUES ('clock', :owner, :until::float, 0)
ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, until = excluded.until
WHERE abs(leases.until - excluded.until) >= :seconds::float
RETURNING owner
