-- fragment: settlements
{rows:id text, owner text, number int, started_at float, ended_at float, result text, reason text,
      note text, state text, due_at float, closed_at float}

-- fragment: of_the_event
JOIN events e ON e.prediction_id = d.prediction_id
JOIN predictions p ON p.id = d.prediction_id
LEFT JOIN callbacks c ON c.prediction_id = p.id AND c.verdict = 'accepted'

-- fragment: start_run
UPDATE deliveries
SET state = 'running', owner = :owner, lease_until = :lease_until::float, due_at = NULL, after = '[]',
    attempts = attempts + 1, claims = claims + 1, claimed_at = :now::float

-- fragment: with_held_by_owner
WITH held AS MATERIALIZED (
    SELECT id FROM deliveries WHERE state = 'running' AND owner = :owner
      AND (:everything::bool OR id IN (SELECT r.id FROM {rows:id text})) ORDER BY id {lock}
)

-- fragment: take_back_held
UPDATE deliveries
SET state = 'pending', due_at = :now::float, owner = NULL, lease_until = NULL, reason = :reason
WHERE id IN (SELECT id FROM held)
RETURNING id

-- fragment: to_claim
d.id AS delivery_id, d.attempts + 1 AS attempt, d.round, d.claims + 1 AS number,
    {event_columns}, p.trace, p.private,
    CASE WHEN c.body IS NULL OR length(c.body) > :largest::int THEN NULL
         WHEN typeof(c.body) = 'text' AND substr(c.body, 1, 2) <> '\x' THEN c.body ELSE '\x' || hex(c.body) END AS raw

-- name: mark_matched
-- Mark events as matched, as they have deliveries now.
UPDATE events SET unmatched = 0
WHERE prediction_id IN (SELECT r.id FROM {rows:id text}) AND unmatched = 1

-- name: select_wanted
-- Read the deliveries that a handler may claim, with the events, in the order of their due times.
-- Large payloads are left out, as a claim of many would not fit in memory.
SELECT {gather:{to_claim}}
FROM (SELECT id, prediction_id, attempts, round, claims FROM deliveries
      WHERE handler = :handler AND state = 'pending' AND due_at <= :now::float
      ORDER BY due_at LIMIT :most::int) d
{of_the_event}

-- name: select_these
-- Read some deliveries that are due, with the events, as `select_wanted` does.
SELECT {gather:{to_claim}}
FROM (SELECT id, prediction_id, attempts, round, claims FROM deliveries
      WHERE id IN (SELECT r.id FROM {rows:id text}) AND state = 'pending'
        AND due_at <= :now::float) d
{of_the_event}

-- name: claim_deliveries
-- Claim deliveries: they run until they are settled or the lease expires.
{start_run}
WHERE state = 'pending' AND id IN (SELECT r.id FROM {rows:id text})

-- name: take_deliveries
-- Claim deliveries that a queue has handed out, and read them, in one round trip.
WITH held AS MATERIALIZED (
    SELECT id FROM deliveries WHERE id IN (SELECT r.id FROM {rows:id text}) AND state = 'pending'
    ORDER BY id {lock}
), d AS (
    {start_run}
    WHERE id IN (SELECT id FROM held)
    RETURNING id, prediction_id, attempts, round, claims
)
SELECT d.id AS delivery_id, d.attempts AS attempt, d.round, d.claims AS number,
    {event_columns}, p.trace, p.private,
    CASE WHEN length(c.body) <= :largest::int THEN c.body END AS raw
FROM d
{of_the_event}

-- name: select_leases
-- Read the states and leases of deliveries, and lock them.
SELECT id, state, lease_until FROM deliveries WHERE id IN (SELECT r.id FROM {rows:id text})
ORDER BY id {lock}

-- name: next_pending
-- Read when the next delivery of a handler falls due.
SELECT min(due_at) AS due_at FROM deliveries WHERE handler = :handler AND state = 'pending'

-- name: select_held
-- Read and lock the deliveries whose claim is still held by the settlement's owner.
-- This and the two statements after it change nothing if the claim was lost meanwhile.
-- `|| ''` prevents SQLite from walking the index of all running deliveries for each of them.
SELECT {gather:d.id, d.claims, d.prediction_id,
    EXISTS (SELECT 1 FROM deliveries w
            WHERE w.prediction_id = d.prediction_id AND w.state = 'pending' AND w.after <> '[]')
    AS is_awaited}
FROM {settlements} JOIN deliveries d ON d.id = r.id
WHERE d.state || '' = 'running' AND d.owner = r.owner AND d.claims = r.number ORDER BY d.id {lock}

-- name: insert_attempts
-- Record attempts whose claim is still held.
INSERT INTO attempts (delivery_id, number, started_at, ended_at, result, reason, note)
SELECT d.id, d.claims, r.started_at, r.ended_at, r.result, r.reason, r.note
FROM {settlements} JOIN deliveries d ON d.id = r.id
WHERE d.state || '' = 'running' AND d.owner = r.owner AND d.claims = r.number

-- name: settle_deliveries
-- End claims that are still held.
UPDATE deliveries
SET state = r.state, due_at = r.due_at, ended_at = r.closed_at, reason = r.reason,
    owner = NULL, lease_until = NULL
FROM {settlements}
WHERE deliveries.id = r.id AND deliveries.state || '' = 'running'
  AND deliveries.owner = r.owner AND deliveries.claims = r.number

-- name: select_waiting
-- Read and lock the deliveries of predictions that wait for other deliveries.
-- The lock is taken before the deliveries they wait for are read: if two of these end at once, the
-- later transaction sees the end of both.
SELECT d.id, d.prediction_id, d.after
FROM {rows:id text} JOIN deliveries d ON d.prediction_id = r.id
WHERE d.state = 'pending' AND d.after <> '[]' ORDER BY d.id {lock}

-- name: select_with_waiting
-- Find predictions with deliveries that wait for other deliveries, page by page.
SELECT DISTINCT prediction_id FROM deliveries
WHERE state = 'pending' AND after <> '[]' AND prediction_id > :cursor
ORDER BY prediction_id LIMIT :most::int

-- name: select_unended
-- Return which of some deliveries have not ended.
SELECT id FROM deliveries
WHERE id IN (SELECT r.id FROM {rows:id text}) AND state IN ('pending', 'running')

-- name: stop_waiting
-- Make waiting deliveries due.
UPDATE deliveries SET due_at = :now::float, after = '[]', reason = ''
WHERE id IN (SELECT r.id FROM {rows:id text}) AND state = 'pending'
RETURNING id, handler

-- name: release_deliveries
-- Give back an owner's claims, or some, when it stops or its time is over; no attempt counts.
-- Every earlier claim without a recorded attempt was given back too. A delivery with many of those
-- may be the cause of the stops, and is left out.
{with_held_by_owner}
UPDATE deliveries
SET state = 'pending', due_at = :now::float, owner = NULL, lease_until = NULL, attempts = attempts - 1
WHERE id IN (SELECT id FROM held)
  AND claims <= :most::int + (SELECT count(*) FROM attempts a WHERE a.delivery_id = deliveries.id)
RETURNING id

-- name: renew_leases
-- Extend the leases of an owner's claims.
WITH held AS MATERIALIZED (
    SELECT id FROM deliveries
    WHERE state = 'running' AND owner = :owner AND id IN (SELECT r.id FROM {rows:id text})
    ORDER BY id {lock}
)
UPDATE deliveries SET lease_until = :lease_until::float WHERE id IN (SELECT id FROM held)
RETURNING id

-- name: reclaim
-- Take back claims whose lease has expired, and with `everyone` those of all other processes.
WITH held AS MATERIALIZED (
    SELECT id FROM deliveries
    WHERE state = 'running' AND (lease_until <= :now::float OR (:everyone::bool AND owner <> :owner))
    ORDER BY id {lock}
)
{take_back_held}

-- name: reclaim_own
-- Take back the claims that an owner still holds after `release_deliveries`.
{with_held_by_owner}
{take_back_held}

-- name: reclaim_these
-- Take back those of some claims whose lease has expired.
WITH held AS MATERIALIZED (
    SELECT id FROM deliveries
    WHERE state = 'running' AND lease_until <= :now::float AND id IN (SELECT r.id FROM {rows:id text})
    ORDER BY id {lock}
)
{take_back_held}

-- name: end_lost_probes
-- End the probes of lost claims, so that another process may make the next.
WITH held AS MATERIALIZED (
    SELECT name FROM handlers
    WHERE probe_until IS NOT NULL AND name IN (SELECT d.handler FROM {rows:id text} JOIN deliveries d ON d.id = r.id)
    ORDER BY name {lock}
)
UPDATE handlers SET probe_until = NULL WHERE name IN (SELECT name FROM held)

-- name: insert_lost
-- Record the attempts of lost claims.
-- It is only known when they began, and that their process has ended.
INSERT INTO attempts (delivery_id, number, started_at, ended_at, result, reason, note)
SELECT d.id, d.claims, coalesce(d.claimed_at, :now::float), :now::float, 'lost', d.reason, ''
FROM {rows:id text} JOIN deliveries d ON d.id = r.id

-- name: select_lost
-- Read lost attempts, for the log.
SELECT d.id AS delivery, d.handler, d.prediction_id, p.provider, p.provider_id, e.channel,
    d.attempts AS attempt, d.claims AS number, d.reason, :now::float - coalesce(d.claimed_at, :now::float) AS seconds
FROM {rows:id text}
JOIN deliveries d ON d.id = r.id
JOIN events e ON e.prediction_id = d.prediction_id
JOIN predictions p ON p.id = d.prediction_id

-- name: select_event_type
-- Read the type of a prediction's event.
SELECT type FROM events WHERE prediction_id = :prediction_id

-- name: select_replayable
-- Read the events of predictions that were not erased, with their deliveries.
SELECT {gather:e.prediction_id, e.type, d.handler, d.state}
FROM {rows:id text}
JOIN predictions p ON p.id = r.id AND p.erased_at IS NULL
JOIN events e ON e.prediction_id = r.id
LEFT JOIN deliveries d ON {of_one_event}

-- name: replay_deliveries
-- Make deliveries pending for another round, or create them.
INSERT INTO deliveries (id, prediction_id, handler, state, due_at, created_at, after, reason,
                        replay_id)
SELECT r.id, r.prediction_id, r.handler, 'pending', r.due_at, r.at, r.after, r.reason, :replay_id
FROM {rows:id text, prediction_id text, handler text, at float, due_at float, after text,
           reason text} WHERE true
ON CONFLICT (id) DO UPDATE
SET state = 'pending', due_at = excluded.due_at, ended_at = NULL, attempts = 0,
    round = deliveries.round + 1, after = excluded.after, reason = excluded.reason,
    replay_id = excluded.replay_id
WHERE deliveries.state IN ('done', 'skipped', 'dead')
RETURNING id, handler

-- name: forget_steps
-- Delete the results that `ctx.once` stored for deliveries.
DELETE FROM steps WHERE delivery_id IN (SELECT r.id FROM {rows:id text})

-- name: select_erased
-- Return whether a delivery's prediction was erased, and lock it until the commit.
-- The lock prevents an erase until then.
SELECT erased_at IS NOT NULL AS erased FROM predictions WHERE id = 'pred_' || substr(:id, 5, 32) {lock}

-- name: retry_delivery
-- Make a skipped or dead delivery pending again.
UPDATE deliveries
SET state = 'pending', due_at = :now::float, ended_at = NULL, attempts = 0, reason = 'retried by hand'
WHERE id = :id AND state IN ('skipped', 'dead')
RETURNING id, handler

-- name: hasten_delivery
-- Make a pending delivery due now.
UPDATE deliveries SET due_at = :now::float, after = '[]' WHERE id = :id AND state = 'pending'
RETURNING id, handler

-- fragment: listed
d.id, d.event_id, d.prediction_id, d.handler, d.state, d.attempts, d.round, d.replay_id,
       d.reason, d.created_at, d.due_at, d.ended_at,
       (SELECT p.model FROM predictions p WHERE p.id = d.prediction_id) AS model,
       (SELECT json_group_array(json_object('number', a.number, 'started_at', a.started_at,
            'ended_at', a.ended_at, 'result', a.result, 'reason', a.reason, 'note', a.note))
        FROM attempts a WHERE a.delivery_id = d.id) AS history

-- name: list_deliveries
-- List deliveries with their attempts, newest first.
SELECT {listed} FROM deliveries d {where} ORDER BY d.id DESC LIMIT :limit::int
-- filter state: d.state = :state
-- filter failed: d.state = :state AND d.state IN ('skipped', 'dead')
-- filter running: d.state = :state AND d.state = 'running'
-- filter handler: d.handler = :handler
-- filter prediction: d.id > 'dlv_' || substr(:prediction, 6) AND d.id < 'dlv_' || substr(:prediction, 6) || '~'
-- filter id: d.id = :id
-- filter cursor: d.id < :cursor
-- filter bound: d.id >= :bound

-- name: list_pending
-- List pending deliveries by handler, in the order of their due times.
SELECT {listed} FROM deliveries d {where} ORDER BY d.handler, d.due_at LIMIT :limit::int
-- filter base: d.state = 'pending'
-- filter handler: d.handler = :handler

-- name: bound_failed
-- Find where a search of a bounded number of dead or skipped deliveries ends.
SELECT d.id FROM deliveries d {where} ORDER BY d.id DESC LIMIT 1 OFFSET :most::int
-- filter failed: d.state = :state AND d.state IN ('skipped', 'dead')
-- filter cursor: d.id < :cursor

-- name: insert_step
-- Store the result of a step of `ctx.once`, unless the prediction was erased; return the stored.
-- Attempts may overlap if one timed out or its process froze: all of them get the first result.
INSERT INTO steps (delivery_id, key, result)
SELECT :delivery_id, :key, :result FROM predictions
WHERE id = 'pred_' || substr(:delivery_id, 5, 32) AND erased_at IS NULL {lock}
ON CONFLICT (delivery_id, key) DO UPDATE SET result = steps.result
RETURNING result

-- name: select_step
-- Read the result of a step.
SELECT result FROM steps WHERE delivery_id = :delivery_id AND key = :key
