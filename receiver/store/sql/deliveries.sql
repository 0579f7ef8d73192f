-- fragment: settlements
{rows:id text, owner text, number int, started_at float, ended_at float, result text, reason text,
      note text, state text, due_at float, closed_at float}

-- fragment: of_the_event
JOIN events e ON e.prediction_id = d.prediction_id
JOIN predictions p ON p.id = d.prediction_id
LEFT JOIN callbacks c ON c.prediction_id = p.id AND c.verdict = 'accepted'

-- name: mark_matched
UPDATE events SET unmatched = 0
WHERE prediction_id IN (SELECT r.id FROM {rows:id text}) AND unmatched = 1

-- name: select_wanted
-- The provider's own payload comes along, unless it is so large that a lane of them would not fit.
SELECT {gather:d.id, d.attempts + 1, d.round, d.claims + 1,
{event_columns}, p.trace,
    CASE WHEN c.body IS NULL OR length(c.body) > :largest::int THEN NULL
         WHEN typeof(c.body) = 'text' THEN c.body ELSE '\x' || hex(c.body) END}
FROM (SELECT id, prediction_id, attempts, round, claims FROM deliveries
      WHERE handler = :handler AND state = 'pending' AND due_at <= :now::float
      ORDER BY due_at LIMIT :most::int) d
{of_the_event}

-- name: claim_deliveries
UPDATE deliveries
SET state = 'running', owner = :owner, lease_until = :lease_until::float, due_at = NULL, after = '[]',
    attempts = attempts + 1, claims = claims + 1, claimed_at = :now::float
WHERE state = 'pending' AND id IN (SELECT r.id FROM {rows:id text})

-- name: take_deliveries
-- For a queue that has said what is due: all in one round trip.
WITH held AS MATERIALIZED (
    SELECT id FROM deliveries WHERE id IN (SELECT r.id FROM {rows:id text}) AND state = 'pending'
    ORDER BY id {lock}
), d AS (
    UPDATE deliveries
    SET state = 'running', owner = :owner, lease_until = :lease_until::float, due_at = NULL, after = '[]',
        attempts = attempts + 1, claims = claims + 1, claimed_at = :now::float
    WHERE id IN (SELECT id FROM held)
    RETURNING id, prediction_id, attempts, round, claims
)
SELECT d.id, d.attempts, d.round, d.claims,
{event_columns}, p.trace,
    CASE WHEN length(c.body) <= :largest::int THEN c.body END
FROM d
{of_the_event}

-- name: select_leases
SELECT id, state, lease_until FROM deliveries WHERE id IN (SELECT r.id FROM {rows:id text})
ORDER BY id {lock}

-- name: next_pending
SELECT min(due_at) FROM deliveries WHERE handler = :handler AND state = 'pending'

-- name: select_held
-- Who no longer holds the claim settles nothing: all three statements look for it first.
SELECT {gather:d.id, d.claims, d.prediction_id,
    EXISTS (SELECT 1 FROM deliveries w
            WHERE w.prediction_id = d.prediction_id AND w.state = 'pending' AND w.after <> '[]')}
FROM {settlements} JOIN deliveries d ON d.id = r.id
WHERE d.state = 'running' AND d.owner = r.owner AND d.claims = r.number ORDER BY d.id {lock}

-- name: insert_attempts
INSERT INTO attempts (delivery_id, number, started_at, ended_at, result, reason, note)
SELECT d.id, d.claims, r.started_at, r.ended_at, r.result, r.reason, r.note
FROM {settlements} JOIN deliveries d ON d.id = r.id
WHERE d.state = 'running' AND d.owner = r.owner AND d.claims = r.number

-- name: settle_deliveries
UPDATE deliveries
SET state = r.state, due_at = r.due_at, ended_at = r.closed_at, reason = r.reason,
    owner = NULL, lease_until = NULL
FROM {settlements}
WHERE deliveries.id = r.id AND deliveries.state = 'running'
  AND deliveries.owner = r.owner AND deliveries.claims = r.number

-- name: select_waiting
-- Only those who wait are locked, and then looked at anew what they wait for: of two that end at
-- once, the later sees both at their end.
SELECT d.id, d.prediction_id, d.after
FROM {rows:id text} JOIN deliveries d ON d.prediction_id = r.id
WHERE d.state = 'pending' AND d.after <> '[]' ORDER BY d.id {lock}

-- name: select_with_waiting
-- For whoever looks whether something waits that nobody will let go, page by page.
SELECT DISTINCT prediction_id FROM deliveries
WHERE state = 'pending' AND after <> '[]' AND prediction_id > :cursor
ORDER BY prediction_id LIMIT :most::int

-- name: select_unended
SELECT id FROM deliveries
WHERE id IN (SELECT r.id FROM {rows:id text}) AND state IN ('pending', 'running')

-- name: stop_waiting
UPDATE deliveries SET due_at = :now::float, after = '[]', reason = ''
WHERE id IN (SELECT r.id FROM {rows:id text}) AND state = 'pending'
RETURNING id, handler

-- name: release_deliveries
-- Given back when we stop: the attempt does not count. Every earlier claim without a recorded
-- attempt was given back too; a delivery with many of those may be what stops us, and is left out.
WITH held AS MATERIALIZED (
    SELECT id FROM deliveries WHERE state = 'running' AND owner = :owner ORDER BY id {lock}
)
UPDATE deliveries
SET state = 'pending', due_at = :now::float, owner = NULL, lease_until = NULL, attempts = attempts - 1
WHERE id IN (SELECT id FROM held)
  AND claims <= :most::int + (SELECT count(*) FROM attempts a WHERE a.delivery_id = deliveries.id)
RETURNING id

-- name: renew_leases
WITH held AS MATERIALIZED (
    SELECT id FROM deliveries
    WHERE state = 'running' AND owner = :owner AND id IN (SELECT r.id FROM {rows:id text})
    ORDER BY id {lock}
)
UPDATE deliveries SET lease_until = :lease_until::float WHERE id IN (SELECT id FROM held)
RETURNING id

-- name: reclaim
-- Leases that ran out, and claims of processes that cannot exist any more.
WITH held AS MATERIALIZED (
    SELECT id FROM deliveries
    WHERE state = 'running' AND (lease_until <= :now::float OR (:everyone::bool AND owner <> :owner))
    ORDER BY id {lock}
)
UPDATE deliveries
SET state = 'pending', due_at = :now::float, owner = NULL, lease_until = NULL, reason = :reason
WHERE id IN (SELECT id FROM held)
RETURNING id

-- name: reclaim_own
-- What an owner runs when it stops and may not give back any more.
WITH held AS MATERIALIZED (
    SELECT id FROM deliveries WHERE state = 'running' AND owner = :owner ORDER BY id {lock}
)
UPDATE deliveries
SET state = 'pending', due_at = :now::float, owner = NULL, lease_until = NULL, reason = :reason
WHERE id IN (SELECT id FROM held)
RETURNING id

-- name: reclaim_these
WITH held AS MATERIALIZED (
    SELECT id FROM deliveries
    WHERE state = 'running' AND lease_until <= :now::float AND id IN (SELECT r.id FROM {rows:id text})
    ORDER BY id {lock}
)
UPDATE deliveries
SET state = 'pending', due_at = :now::float, owner = NULL, lease_until = NULL, reason = :reason
WHERE id IN (SELECT id FROM held)
RETURNING id

-- name: end_lost_probes
-- One of them may have been a handler's probe: another process may make the next.
WITH held AS MATERIALIZED (
    SELECT name FROM handlers
    WHERE probe_until IS NOT NULL AND name IN (SELECT d.handler FROM {rows:id text} JOIN deliveries d ON d.id = r.id)
    ORDER BY name {lock}
)
UPDATE handlers SET probe_until = NULL WHERE name IN (SELECT name FROM held)

-- name: insert_lost
-- Its process cannot tell of it any more: all that is known is when it began, and that it is over.
INSERT INTO attempts (delivery_id, number, started_at, ended_at, result, reason, note)
SELECT d.id, d.claims, coalesce(d.claimed_at, :now::float), :now::float, 'lost', d.reason, ''
FROM {rows:id text} JOIN deliveries d ON d.id = r.id

-- name: select_lost
SELECT d.id, d.handler, d.prediction_id, p.provider, p.provider_id, e.channel, d.attempts, d.reason,
    :now::float - coalesce(d.claimed_at, :now::float)
FROM {rows:id text}
JOIN deliveries d ON d.id = r.id
JOIN events e ON e.prediction_id = d.prediction_id
JOIN predictions p ON p.id = d.prediction_id

-- name: select_event_type
SELECT type FROM events WHERE prediction_id = :prediction_id

-- name: select_replayable
-- What was erased has an event, but nothing that a handler could be given.
SELECT {gather:e.prediction_id, e.type, d.handler, d.state}
FROM {rows:id text}
JOIN predictions p ON p.id = r.id AND p.erased_at IS NULL
JOIN events e ON e.prediction_id = r.id
LEFT JOIN deliveries d ON {of_one_event}

-- name: replay_deliveries
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
DELETE FROM steps WHERE delivery_id IN (SELECT r.id FROM {rows:id text})

-- name: select_erased
-- Held until the commit, so that nothing is redelivered of what is being erased.
SELECT erased_at IS NOT NULL FROM predictions WHERE id = 'pred_' || substr(:id, 5, 32) {lock}

-- name: retry_delivery
UPDATE deliveries
SET state = 'pending', due_at = :now::float, ended_at = NULL, attempts = 0, reason = 'retried by hand'
WHERE id = :id AND state IN ('skipped', 'dead')
RETURNING id, handler

-- name: hasten_delivery
UPDATE deliveries SET due_at = :now::float, after = '[]' WHERE id = :id AND state = 'pending'
RETURNING id, handler

-- name: list_deliveries
SELECT d.id, d.event_id, d.prediction_id, d.handler, d.state, d.attempts, d.round, d.replay_id,
       d.reason, d.created_at, d.due_at, d.ended_at,
       (SELECT json_group_array(json_object('number', a.number, 'started_at', a.started_at,
            'ended_at', a.ended_at, 'result', a.result, 'reason', a.reason, 'note', a.note))
        FROM attempts a WHERE a.delivery_id = d.id)
FROM deliveries d {where}
ORDER BY d.id DESC LIMIT :limit::int
-- filter state: d.state = :state
-- filter failed: d.state = :state AND d.state IN ('skipped', 'dead')
-- filter running: d.state = :state AND d.state = 'running'
-- filter handler: d.handler = :handler
-- filter prediction: d.id > 'dlv_' || substr(:prediction, 6) AND d.id < 'dlv_' || substr(:prediction, 6) || '~'
-- filter id: d.id = :id
-- filter cursor: d.id < :cursor

-- name: insert_step
INSERT INTO steps (delivery_id, key, result)
SELECT :delivery_id, :key, :result FROM predictions
WHERE id = 'pred_' || substr(:delivery_id, 5, 32) AND erased_at IS NULL {lock}
ON CONFLICT DO NOTHING

-- name: select_step
SELECT result FROM steps WHERE delivery_id = :delivery_id AND key = :key

-- name: count_pending
SELECT handler, count(*) FROM deliveries WHERE state = 'pending' GROUP BY handler
