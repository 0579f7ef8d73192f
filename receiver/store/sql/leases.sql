-- name: hold
-- The holder of a lease renews it in time; it passes to another once that has not happened.
INSERT INTO leases (name, owner, until, at_work) VALUES (:name, :owner, :until::float, 0)
ON CONFLICT (name) DO UPDATE
SET owner = excluded.owner, until = excluded.until,
    at_work = CASE WHEN leases.owner = excluded.owner THEN leases.at_work ELSE 0 END
WHERE leases.owner = excluded.owner OR leases.until <= :now::float
RETURNING owner

-- name: report
UPDATE leases SET at_work = :at_work::int WHERE name = :name AND owner = :owner

-- name: release
DELETE FROM leases WHERE name = :name AND owner = :owner

-- name: select_lease
SELECT at_work FROM leases WHERE name = :name AND until > :now::float
