-- name: hold_count
-- Read and lock the counts under a limit in its hour, day or month.
INSERT INTO order_counts (subject, until, orders, spent, kind)
VALUES (:subject, :until::float, 0, 0, :kind)
ON CONFLICT (subject) DO UPDATE SET until = excluded.until
RETURNING orders, spent

-- name: add_to_counts
-- Count created predictions.
UPDATE order_counts SET orders = order_counts.orders + r.orders, spent = order_counts.spent + r.spent
FROM {rows:subject text, orders int, spent int} WHERE order_counts.subject = r.subject

-- name: hold_spent
-- Lock counts, sorted, so that two transactions cannot deadlock.
SELECT subject FROM order_counts WHERE subject IN (SELECT r.subject FROM {rows:subject text})
ORDER BY subject {lock}

-- name: correct_spent
-- Correct the sums spent, if they are still counted.
UPDATE order_counts SET spent = order_counts.spent + r.amount
FROM {rows:subject text, until float, amount int}
WHERE order_counts.subject = r.subject AND order_counts.until = r.until

-- name: insert_ledger
-- Record amounts that were reserved, settled or released.
INSERT INTO ledger (prediction_id, entry, amount, at)
SELECT r.prediction_id, r.entry, r.amount, r.at
FROM {rows:prediction_id text, entry text, amount int, at float}

-- name: delete_ledger
-- Delete the ledger's entries of deleted predictions.
DELETE FROM ledger WHERE prediction_id IN (SELECT r.id FROM {rows:id text})

-- name: forget_counts
-- Delete counts whose period ended long ago; skip those that are locked.
-- A process whose clock is ahead deletes no count that others still use.
DELETE FROM order_counts WHERE subject IN (
    SELECT subject FROM order_counts WHERE until < least(:before::float, {clock} - :age::float)
    ORDER BY until LIMIT :most::int {skip})

-- name: fullest
-- Read the highest sum spent from one current budget of each kind; up to 10,000 are read.
SELECT kind, max(spent) AS spent
FROM (SELECT kind, spent FROM order_counts
      WHERE until IN (:hour::float, :day::float, :month::float) LIMIT 10000) c
GROUP BY kind
