-- name: hold_limits
-- A count of what a provider still takes holds its row, so that two never count at once.
INSERT INTO limits (provider, turns) VALUES (:provider, 1)
ON CONFLICT (provider) DO UPDATE SET turns = limits.turns + 1

-- name: count_requests
SELECT CAST(coalesce(sum(requests), 0) AS bigint), min(at) FROM requests
WHERE provider = :provider AND at > :since::float

-- name: insert_requests
INSERT INTO requests (provider, at, requests) VALUES (:provider, :now::float, :requests::int)

-- name: forget_requests
DELETE FROM requests WHERE provider = :provider AND at <= :since::float
