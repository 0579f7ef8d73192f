-- A living prediction's message is the last reason why it has not ended.

-- fragment: job_columns
id, provider, model, mode, status, input, provider_id, links, submitted_at, cancel_requested,
submits, polls, created_at, deadline_at, due_at, error_message, trace

-- fragment: in_doubt
CASE WHEN submitted_at IS NULL THEN 'queued' ELSE 'unconfirmed' END

-- fragment: keep_reason
error_message = CASE WHEN erased_at IS NULL THEN coalesce(:reason, error_message) END

-- fragment: prediction_columns
id, provider, model, status, mode, input, metadata, provider_id, output, error_code, error_message,
channel, parent_id, depth, created_at, submitted_at, completed_at, erased_at, reply_to

-- name: insert_prediction
INSERT INTO predictions (id, provider, model, mode, status, input, metadata, parent_id, depth,
                         idempotency_key, fingerprint, created_at, due_at, trace, reply_to)
VALUES (:id, :provider, :model, :mode, 'queued', :input, :metadata, :parent_id,
        coalesce((SELECT p.depth + 1 FROM predictions p WHERE p.id = :parent_id), 0),
        :idempotency_key, :fingerprint, :created_at::float, :created_at::float, :trace,
        :reply_to)
ON CONFLICT (idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
RETURNING id

-- name: select_by_idempotency_key
SELECT id, fingerprint FROM predictions WHERE idempotency_key = :idempotency_key

-- name: begin_submits
-- The oldest first, so that predictions wait in order; one that was told to come later is passed.
-- The choice is made once, whatever the plan: a subquery may be run again for each row. By `+` no
-- index is used for the due time: all that are due would be sorted, where few are taken.
WITH chosen AS MATERIALIZED (
    SELECT id FROM predictions WHERE provider = :provider AND status = 'queued'
    AND due_at IS NOT NULL AND +due_at <= :now::float ORDER BY id LIMIT :most::int {skip})
UPDATE predictions
SET status = 'submitting', submits = submits + 1, submitted_at = NULL, due_at = :hold_until::float,
    deadline_at = coalesce(deadline_at, :deadline::float)
WHERE id IN (SELECT id FROM chosen)
RETURNING {job_columns}

-- name: mark_sent
-- Committed before the first byte that could be billed is sent. A process that begins a submit and
-- dies before this has sent nothing; one whose row was given to another meanwhile must not send.
UPDATE predictions SET submitted_at = :now::float, due_at = :hold_until::float
WHERE id = :id AND status = 'submitting' AND submits = :submits::int AND submitted_at IS NULL
RETURNING id

-- name: count_in_flight
-- No further than there is a limit, as many more may be in flight.
SELECT count(*) FROM (
    SELECT 1 FROM predictions
    WHERE provider = :provider AND status IN ({in_flight}) AND due_at IS NOT NULL
    LIMIT :max_in_flight::int) p

-- name: next_queued
SELECT min(due_at) FROM predictions WHERE provider = :provider AND status = 'queued'

-- name: accept_submit
-- A callback may have come first: then the state stays and only the names are filled in. An earlier
-- due time stays too, as it means that somebody asked for a look.
UPDATE predictions
SET provider_id = coalesce(provider_id, :provider_id),
    links = CASE WHEN erased_at IS NULL THEN :links ELSE links END,
    due_at = CASE WHEN status IN ({terminal}) THEN NULL
                  ELSE least(due_at, :due_at::float, deadline_at) END,
    status = CASE WHEN status IN ({from_accepted}) THEN 'processing' ELSE status END
WHERE id = :id

-- name: postpone_submit
UPDATE predictions
SET status = 'queued', due_at = least(:due_at::float, deadline_at), submitted_at = NULL,
    {keep_reason}
WHERE id = :id AND status IN ({from_postponed})

-- name: mark_unconfirmed
-- What was not marked as sent was not sent.
UPDATE predictions
SET status = {in_doubt}, due_at = least(due_at, :due_at::float, deadline_at), {keep_reason}
WHERE id = :id AND status IN ({from_ambiguous})

-- name: record_poll
-- A poll holds the row; where its due time is no more the end of that hold, another poll was asked
-- for meanwhile, and comes first.
UPDATE predictions
SET due_at = CASE WHEN due_at >= :held_until::float - 0.001 THEN :due_at::float
                  ELSE least(due_at, :due_at::float) END,
    polls = polls + 1, {keep_reason}
WHERE id = :id AND status NOT IN ({terminal})

-- name: claim_due
-- Taking a due row pushes its due time: if we die over it, it is due again.
WITH chosen AS MATERIALIZED (
    SELECT id FROM predictions
    WHERE provider = :provider AND due_at <= :now::float AND status IN ({in_flight})
    ORDER BY due_at LIMIT :most::int {skip})
UPDATE predictions SET due_at = :hold_until::float
WHERE id IN (SELECT id FROM chosen)
RETURNING {job_columns}

-- name: select_stale
-- By the time at which it was to be submitted, which moves with the clock where that steps.
SELECT id FROM predictions
WHERE provider = :provider AND status = 'queued' AND due_at <= :before::float
ORDER BY due_at LIMIT :most::int

-- name: next_due
SELECT min(due_at) FROM predictions
WHERE provider = :provider AND status IN ({in_flight})

-- name: select_job
SELECT {job_columns} FROM predictions WHERE id = :id

-- name: mark_cancel
UPDATE predictions SET cancel_requested = 1 WHERE id = :id AND status NOT IN ({terminal})

-- name: mark_abandoned_submits
-- Only this process can have been submitting, and it was not: the answer, if any, is lost.
UPDATE predictions SET status = {in_doubt}, due_at = :now::float
WHERE status IN ({in_flight}) AND status = 'submitting'

-- name: select_id_by_provider_id
SELECT id FROM predictions WHERE provider = :provider AND provider_id = :provider_id

-- name: expedite_polls
-- What the stream may have said while nobody listened is asked for.
WITH held AS MATERIALIZED (
    SELECT id FROM predictions
    WHERE provider = :provider AND status IN ('processing', 'unconfirmed') AND due_at > :now::float
    ORDER BY id {lock}
)
UPDATE predictions SET due_at = :now::float WHERE id IN (SELECT id FROM held)

-- name: select_prediction
SELECT {prediction_columns} FROM predictions WHERE id = :id

-- name: select_result
-- A handler adds to what a prediction is; two handlers may do so at once. One that would not end may
-- do so when all is erased.
SELECT output, metadata FROM predictions WHERE id = :id AND erased_at IS NULL {lock}

-- name: update_result
UPDATE predictions SET output = :output, metadata = :metadata WHERE id = :id

-- name: list_predictions
-- First the ids, as where they must be sorted it is without what is large.
SELECT {prediction_columns} FROM predictions
WHERE id IN (SELECT id FROM predictions {where} ORDER BY id DESC LIMIT :limit::int)
ORDER BY id DESC
-- filter status: status = :status
-- filter living: status = :status AND due_at IS NOT NULL
-- filter unsuccessful: status = :status AND error_code IS NOT NULL
-- filter provider: provider = :provider
-- filter cursor: id < :cursor
