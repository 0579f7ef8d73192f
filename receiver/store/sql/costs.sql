-- name: add_sums
-- Add to the daily sums.
INSERT INTO cost_sums (day, provider, model, account, shard, predictions, amount, unknown)
SELECT r.day, r.provider, r.model, r.account, {shard}, r.predictions, r.amount, r.unknown
FROM {rows:day int, provider text, model text, account text, predictions int, amount int,
           unknown int} WHERE true
ON CONFLICT (day, provider, model, account, shard) DO UPDATE
SET predictions = cost_sums.predictions + excluded.predictions,
    amount = cost_sums.amount + excluded.amount, unknown = cost_sums.unknown + excluded.unknown

-- fragment: sums
CAST(sum(predictions) AS BIGINT) AS predictions, CAST(sum(amount) AS BIGINT) AS amount,
       CAST(sum(unknown) AS BIGINT) AS unknown
FROM cost_sums WHERE day >= :first::int AND day < :end::int

-- name: select_sums
-- Read the daily sums.
SELECT day, provider, model, account, {sums}
GROUP BY day, provider, model, account LIMIT :most::int

-- name: select_totals
-- Read the daily sums of all accounts together.
SELECT day, provider, model, '' AS account, {sums} GROUP BY day, provider, model LIMIT :most::int

-- name: insert_questions
-- Record predictions whose cost is to be asked for.
INSERT INTO cost_questions (prediction_id, provider, due_at, units)
SELECT r.prediction_id, r.provider, r.due_at, r.units
FROM {rows:prediction_id text, provider text, due_at float, units float} WHERE true
ON CONFLICT (prediction_id) DO NOTHING

-- name: select_questions
-- Read the predictions whose cost a provider is to be asked for now.
SELECT q.prediction_id AS id, q.tries, q.units, p.model, p.mode, p.provider_id, p.links,
       p.submitted_at
FROM (SELECT prediction_id, tries, units FROM cost_questions
      WHERE provider = :provider AND due_at <= :now::float ORDER BY due_at LIMIT :most::int) q
JOIN predictions p ON p.id = q.prediction_id

-- name: postpone_questions
-- Postpone questions to be asked again later.
UPDATE cost_questions SET due_at = r.due_at, tries = cost_questions.tries + 1
FROM {rows:id text, due_at float} WHERE cost_questions.prediction_id = r.id

-- name: delete_questions
-- Delete questions that are not asked again.
DELETE FROM cost_questions WHERE prediction_id IN (SELECT r.id FROM {rows:id text})

-- name: hold_costs
-- Read and lock the known costs of predictions.
SELECT id, provider, model, completed_at, price, reserved, cost, cost_source, account
FROM predictions WHERE id IN (SELECT r.id FROM {rows:id text}) ORDER BY id {lock}

-- name: set_costs
-- Record the costs of predictions.
UPDATE predictions SET cost = r.cost, cost_source = r.source
FROM {rows:id text, cost int, source text} WHERE predictions.id = r.id

-- name: set_account
-- Record the account that the cost of a prediction is added up by.
UPDATE predictions SET account = :account WHERE id = :id

-- name: hold_sums
-- Read and lock the rows of one sum.
SELECT shard, predictions, amount, unknown FROM cost_sums
WHERE day = :day::int AND provider = :provider AND model = :model AND account = :account
ORDER BY shard {lock}

-- name: delete_sums
-- Delete the rows of one sum.
DELETE FROM cost_sums
WHERE day = :day::int AND provider = :provider AND model = :model AND account = :account
    AND shard IN (SELECT r.shard FROM {rows:shard int})
