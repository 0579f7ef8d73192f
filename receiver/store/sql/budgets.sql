-- name: hold_count
-- Read and lock what was counted under a limit in its hour, day or month.
INSERT INTO order_counts (subject, until, orders, spent, kind)
VALUES (:subject, :until::float, 0, 0, :kind)
ON CONFLICT (subject) DO UPDATE SET until = excluded.until
RETURNING orders, spent

-- name: add_to_counts
-- Count what was made.
UPDATE order_counts SET orders = order_counts.orders + r.orders, spent = order_counts.spent + r.spent
FROM {rows:subject text, orders int, spent int} WHERE order_counts.subject = r.subject

-- name: hold_spent
-- Lock counts, in one order, so that two transactions cannot deadlock.
SELECT subject FROM order_counts WHERE subject IN (SELECT r.subject FROM {rows:subject text})
ORDER BY subject {lock}

-- name: correct_spent
-- Correct what was spent, where that is still counted.
UPDATE order_counts SET spent = order_counts.spent + r.amount
FROM {rows:subject text, until float, amount int}
WHERE order_counts.subject = r.subject AND order_counts.until = r.until

-- name: insert_ledger
-- Record what was reserved, settled or released.
INSERT INTO ledger (prediction_id, entry, amount, at)
SELECT r.prediction_id, r.entry, r.amount, r.at
FROM {rows:prediction_id text, entry text, amount int, at float}

-- name: delete_ledger
-- Delete what the ledger says of predictions that are deleted.
DELETE FROM ledger WHERE prediction_id IN (SELECT r.id FROM {rows:id text})

-- name: forget_counts
-- Delete counts of a time that is long over; what is being counted is passed over.
-- A process whose clock is ahead deletes nothing that others still count.
DELETE FROM order_counts WHERE subject IN (
    SELECT subject FROM order_counts WHERE until < least(:before::float, {clock} - :age::float)
    ORDER BY until LIMIT :most::int {skip})

-- name: fullest
-- Read the most that was spent of one of each kind of budget now, of up to 10,000.
SELECT kind, max(spent) AS spent
FROM (SELECT kind, spent FROM order_counts
      WHERE until IN (:hour::float, :day::float, :month::float) LIMIT 10000) c
GROUP BY kind
