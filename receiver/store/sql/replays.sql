-- name: insert
-- Store a replay that was counted.
INSERT INTO replays (id, wanted, state, events, matched, next, last, created_at)
VALUES (:id, :wanted, 'counted', :events::int, :matched::int, :next::int, :last::int, :now::float)

-- name: forget
-- Delete the oldest replays beyond those that are kept.
DELETE FROM replays WHERE state <> 'running'
AND id <= (SELECT id FROM replays ORDER BY id DESC LIMIT 1 OFFSET :most::int)

-- name: start
-- Start a replay that was counted.
UPDATE replays SET state = 'running' WHERE id = :id AND state = 'counted' RETURNING id

-- name: cancel
-- Cancel a replay that has not ended.
UPDATE replays SET state = 'canceled', ended_at = :now::float
WHERE id = :id AND state IN ('counted', 'running') RETURNING id

-- name: list
-- List replays, newest first.
SELECT id, state, events, matched, replayed, wanted, created_at, ended_at FROM replays {where}
ORDER BY id DESC LIMIT :limit::int
-- filter id: id = :id
-- filter cursor: id < :cursor

-- name: select_running
-- Read the replays under way, oldest first.
SELECT id, wanted, next, last FROM replays WHERE state = 'running' ORDER BY id

-- name: select_bounds
-- Read the positions before the first event and of the last.
SELECT coalesce((SELECT min(seq) FROM events), 1) - 1 AS first,
       coalesce((SELECT max(seq) FROM events), 0) AS last

-- name: select_candidates
-- Read events that may match, with the states of their deliveries.
SELECT {gather:e.seq, e.type, e.prediction_id, e.provider, e.model, e.status, e.metadata,
                e.reply_to, d.handler, d.state}
FROM (SELECT e.seq, e.type, e.prediction_id, p.provider, p.model, p.status, p.metadata,
             p.reply_to
      FROM events e JOIN predictions p ON p.id = e.prediction_id
      {where} ORDER BY e.seq LIMIT :most::int) e
LEFT JOIN deliveries d ON {of_one_event}
-- filter stretch: e.seq > :next::int AND e.seq <= :last::int AND p.erased_at IS NULL
-- filter since: e.time >= :since::float
-- filter until: e.time < :until::float
-- filter provider: p.provider = :provider
-- filter in_state: EXISTS (SELECT 1 FROM deliveries d WHERE {of_one_event} AND d.state = :in_state)

-- name: hold
-- Read and lock the progress of a replay.
SELECT state, next FROM replays WHERE id = :id {lock}

-- name: move
-- Record a step of a replay; the last one ends it.
UPDATE replays
SET next = :next::int, replayed = replayed + :pending::int,
    state = CASE WHEN :next::int >= last THEN 'done' ELSE state END,
    ended_at = CASE WHEN :next::int >= last THEN :now::float END
WHERE id = :id RETURNING state

-- name: count_due
-- Count the deliveries of a replay that are due and not begun.
SELECT count(*) AS number FROM (SELECT 1 FROM deliveries
    WHERE state = 'pending' AND replay_id IS NOT NULL AND replay_id = :id AND due_at <= :now::float
    LIMIT :most::int) d
