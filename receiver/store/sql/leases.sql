-- name: hold
-- Take a lease that is free or has expired, or renew it.
INSERT INTO leases (name, owner, until, at_work)
VALUES (:name, :owner, :until::float, :at_work::int)
ON CONFLICT (name) DO UPDATE
SET owner = excluded.owner, until = excluded.until, at_work = excluded.at_work
WHERE leases.owner = excluded.owner OR leases.until <= :now::float
RETURNING owner

-- name: release
-- Give up a lease.
DELETE FROM leases WHERE name = :name AND owner = :owner

-- name: select_lease
-- Read whether the holder of a lease is able to do its task.
SELECT at_work FROM leases WHERE name = :name AND until > :now::float
