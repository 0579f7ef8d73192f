-- A living prediction's message is the last reason why it has not ended.

-- fragment: prediction_columns
p.id, p.provider, p.model, p.status, p.mode, p.input, p.metadata, p.provider_id, p.output,
    p.error_code, p.error_message, p.channel, p.parent_id, p.depth, p.created_at,
    p.submitted_at, p.completed_at, p.erased_at, p.reply_to, p.ordered, p.cost, p.cost_source

-- fragment: job_columns
id, provider, model, mode, status, input, provider_id, links, submitted_at, cancel_requested,
submits, polls, deadline_at, latest_at, due_at AS held_until, error_message AS last_reason, trace

-- fragment: of_a_list
-- filter status: status = :status
-- filter living: status = :status AND due_at IS NOT NULL
-- filter unsuccessful: status = :status AND error_code IS NOT NULL
-- filter provider: provider = :provider
-- filter since: id >= :since
-- filter cursor: id < :cursor

-- fragment: in_doubt
CASE WHEN submitted_at IS NULL THEN 'queued' ELSE 'unconfirmed' END

-- fragment: keep_reason
error_message = CASE WHEN erased_at IS NULL THEN coalesce(:reason, error_message) END

-- name: insert_prediction
-- Create a prediction in status `queued`, unless its idempotency key is taken.
INSERT INTO predictions (id, provider, model, mode, status, input, metadata, parent_id, depth,
                         idempotency_key, fingerprint, created_at, due_at, trace, reply_to,
                         private, ordered, latest_at, price, price_source, reserved, account)
VALUES (:id, :provider, :model, :mode, 'queued', :input, :metadata, :parent_id,
        coalesce((SELECT p.depth + 1 FROM predictions p WHERE p.id = :parent_id), 0),
        :idempotency_key, :fingerprint, :created_at::float, :created_at::float, :trace,
        :reply_to, :private, :ordered, :latest_at::float, :price::int, :price_source, :reserved,
        :account)
ON CONFLICT (idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
RETURNING id

-- name: select_by_idempotency_key
-- Find the prediction that has an idempotency key.
SELECT id, fingerprint FROM predictions WHERE idempotency_key = :idempotency_key

-- name: begin_submits
-- Move queued predictions to `submitting`, the oldest first.
-- One that is to be submitted later is skipped. MATERIALIZED: a plain subquery may be run again for
-- each row. `+` prevents the use of the index of due times: all due rows would be sorted, and few
-- are taken. One that is too late is not begun; at its deadline it is too late to begin it again.
WITH chosen AS MATERIALIZED (
    SELECT id FROM predictions WHERE provider = :provider AND status = 'queued'
    AND due_at IS NOT NULL AND +due_at <= :now::float
    AND (latest_at IS NULL OR latest_at > :now::float) ORDER BY id LIMIT :most::int {skip})
UPDATE predictions
SET status = 'submitting', submits = submits + 1, submitted_at = NULL, due_at = :hold_until::float,
    deadline_at = coalesce(deadline_at, :deadline::float),
    latest_at = least(coalesce(latest_at, deadline_at, :deadline::float),
                      coalesce(deadline_at, :deadline::float))
WHERE id IN (SELECT id FROM chosen)
RETURNING {job_columns}

-- name: mark_sent
-- Record that a submit is about to be sent.
-- Committed before the first byte that could be billed is sent: a process that dies before this
-- commit has sent nothing. It changes nothing, and nothing may be sent, if another process has
-- begun the submit again.
UPDATE predictions SET submitted_at = :now::float, due_at = :hold_until::float
WHERE id = :id AND status = 'submitting' AND submits = :submits::int AND submitted_at IS NULL
RETURNING id

-- name: count_in_flight
-- Count a provider's predictions in flight, up to its limit.
SELECT count(*) AS number FROM (
    SELECT 1 FROM predictions
    WHERE provider = :provider AND status IN ({in_flight}) AND due_at IS NOT NULL
    LIMIT :max_in_flight::int) p

-- name: next_queued
-- Read when the next queued prediction may be submitted, and the first time when one is too late.
SELECT (SELECT min(due_at) FROM predictions
        WHERE provider = :provider AND status = 'queued') AS due_at,
       (SELECT min(latest_at) FROM predictions
        WHERE provider = :provider AND status = 'queued' AND latest_at IS NOT NULL) AS latest_at

-- name: select_late
-- Find queued predictions that it is too late to submit, and why they were put off, if they were.
SELECT id, error_message AS last_reason FROM predictions
WHERE provider = :provider AND status = 'queued' AND latest_at <= :now::float
ORDER BY latest_at LIMIT :most::int

-- name: accept_submit
-- Record that a provider has accepted a submit.
-- A callback may have come first: then the status stays, and only the provider's id and links are
-- filled in. An earlier due time stays too: it means that a poll was asked for.
UPDATE predictions
SET provider_id = coalesce(provider_id, :provider_id),
    links = CASE WHEN erased_at IS NULL THEN :links ELSE links END,
    cost = CASE WHEN status IN ({terminal}) THEN cost ELSE coalesce(:cost::int, cost) END,
    cost_source = CASE WHEN status IN ({terminal}) OR :cost::int IS NULL THEN cost_source
                       ELSE 'provider' END,
    due_at = CASE WHEN status IN ({terminal}) THEN NULL
                  ELSE least(due_at, :due_at::float, deadline_at) END,
    status = CASE WHEN status IN ({from_accepted}) THEN 'processing' ELSE status END
WHERE id = :id
RETURNING cancel_requested = 1 AND status NOT IN ({terminal}) AS is_to_cancel

-- name: postpone_submit
-- Queue a prediction again, to be submitted later.
UPDATE predictions
SET status = 'queued', due_at = least(:due_at::float, deadline_at), submitted_at = NULL,
    {keep_reason}
WHERE id = :id AND status IN ({from_postponed}) AND submits = :submits::int

-- name: mark_unconfirmed
-- Record a submit without an answer: it may have reached the provider.
-- One that was not marked as sent was not sent, and is queued again.
UPDATE predictions
SET status = {in_doubt}, due_at = least(due_at, :due_at::float, deadline_at), {keep_reason}
WHERE id = :id AND status IN ({from_ambiguous}) AND submits = :submits::int

-- name: record_poll
-- Record that a poll has brought no end.
-- A poll sets the due time to the end of its hold. Another due time means that another poll was
-- asked for meanwhile, which comes first.
UPDATE predictions
SET due_at = CASE WHEN due_at >= :held_until::float - 0.001 THEN :due_at::float
                  ELSE least(due_at, :due_at::float) END,
    polls = polls + 1, {keep_reason}
WHERE id = :id AND status NOT IN ({terminal})

-- name: claim_due
-- Take predictions that are due for a poll, and make them due again later.
-- If the process dies during the poll, they are due again then.
WITH chosen AS MATERIALIZED (
    SELECT id FROM predictions
    WHERE provider = :provider AND due_at <= :now::float AND status IN ({in_flight})
    ORDER BY due_at LIMIT :most::int {skip})
UPDATE predictions SET due_at = :hold_until::float
WHERE id IN (SELECT id FROM chosen)
RETURNING {job_columns}

-- name: select_stale
-- Find predictions that have been queued for long.
-- It compares the due time, which is moved when the clock steps.
SELECT id FROM predictions
WHERE provider = :provider AND status = 'queued' AND due_at <= :before::float
ORDER BY due_at LIMIT :most::int

-- name: next_due
-- Read when the next prediction of a provider falls due for a poll.
SELECT min(due_at) AS due_at FROM predictions
WHERE provider = :provider AND status IN ({in_flight})

-- name: select_job
-- Read a prediction as the submitter and the poller use it.
SELECT {job_columns} FROM predictions WHERE id = :id

-- name: mark_cancel
-- Record that a cancel was requested.
UPDATE predictions SET cancel_requested = 1 WHERE id = :id AND status NOT IN ({terminal})

-- name: mark_abandoned_submits
-- Mark the submits of a dead process as unconfirmed, or queue them again if nothing was sent.
-- For SQLite, where no other process can be submitting: the answers, if any, are lost.
UPDATE predictions SET status = {in_doubt}, due_at = :now::float
WHERE status IN ({in_flight}) AND status = 'submitting'

-- name: select_id_by_provider_id
-- Find a prediction by its provider's id.
SELECT id FROM predictions WHERE provider = :provider AND provider_id = :provider_id

-- name: expedite_polls
-- Make all predictions at a provider due for a poll now.
-- It replaces the events that a stream may have missed while it was not connected.
WITH held AS MATERIALIZED (
    SELECT id FROM predictions
    WHERE provider = :provider AND status IN ('processing', 'unconfirmed') AND due_at > :now::float
    ORDER BY id {lock}
)
UPDATE predictions SET due_at = :now::float WHERE id IN (SELECT id FROM held)

-- name: select_prediction
-- Read a prediction.
SELECT {prediction_columns} FROM predictions p WHERE p.id = :id

-- name: select_result
-- Read and lock the fields that a handler may add to, unless the prediction was erased.
-- The lock is for two handlers that add at once. A handler may still run after the erasure.
SELECT output, metadata FROM predictions WHERE id = :id AND erased_at IS NULL {lock}

-- name: update_result
-- Record the additions of a handler.
UPDATE predictions SET output = :output, metadata = :metadata WHERE id = :id

-- name: end_predictions
-- End predictions, unless they have ended.
UPDATE predictions
SET status = r.status, provider_id = coalesce(predictions.provider_id, r.provider_id),
    output = r.output, error_code = r.error_code, error_message = r.error_message,
    channel = r.channel, completed_at = r.at, due_at = NULL, cost = r.cost,
    cost_source = r.cost_source
FROM {rows:id text, status text, provider_id text, output text, error_code text,
           error_message text, channel text, at float, cost int, cost_source text}
WHERE predictions.id = r.id AND predictions.status NOT IN ({terminal})

-- name: select_account
-- Read the account that the cost of a prediction is added up by.
SELECT account FROM predictions WHERE id = :id

-- name: count_ahead
-- Count the predictions queued at a provider before another one, up to 1,000.
SELECT count(*) AS number
FROM (SELECT 1 FROM predictions p
      WHERE p.status = 'queued' AND p.provider = :provider AND p.due_at IS NOT NULL AND p.id < :id
      LIMIT 1000) n

-- name: list_predictions
-- List predictions, newest first.
-- The ids are selected first: if rows must be sorted, it is without their large columns.
SELECT {prediction_columns} FROM predictions p
WHERE p.id IN (SELECT id FROM predictions {where} ORDER BY id DESC LIMIT :limit::int)
ORDER BY p.id DESC
{of_a_list}

-- name: scan_predictions
-- Read the fields of predictions that a search checks, newest first.
SELECT id, model, metadata FROM predictions {where} ORDER BY id DESC LIMIT :limit::int
{of_a_list}

-- name: select_predictions
-- Read predictions, newest first.
SELECT {prediction_columns} FROM {rows:id text} JOIN predictions p ON p.id = r.id
ORDER BY p.id DESC
