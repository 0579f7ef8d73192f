-- name: hold_limits
-- Lock the row of a provider's limits until the commit.
-- So two transactions cannot count a provider's requests at once.
INSERT INTO limits (provider, turns) VALUES (:provider, 1)
ON CONFLICT (provider) DO UPDATE SET turns = limits.turns + 1

-- name: count_requests
-- Count the requests of the last minute, and read when the first of them was sent.
SELECT CAST(coalesce(sum(requests), 0) AS bigint) AS sent, min(at) AS first FROM requests
WHERE provider = :provider AND at > :since::float

-- name: insert_requests
-- Count requests that are about to be sent.
INSERT INTO requests (provider, at, requests) VALUES (:provider, :now::float, :requests::int)

-- name: forget_requests
-- Delete counts that are older than a minute.
DELETE FROM requests WHERE provider = :provider AND at <= :since::float
