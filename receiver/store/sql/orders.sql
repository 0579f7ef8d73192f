-- name: select_by_key
-- Find the prediction that was ordered by a key.
SELECT prediction_id FROM orders WHERE key = :key

-- name: hold_count
-- Read and lock what was ordered under a limit; in a new hour, day or month that is nothing.
-- Of two servers whose clocks differ, the one that is behind counts into the time of the other.
INSERT INTO order_counts (subject, until, orders, spent) VALUES (:subject, :until::float, 0, 0)
ON CONFLICT (subject) DO UPDATE
SET orders = CASE WHEN order_counts.until < excluded.until THEN 0 ELSE order_counts.orders END,
    spent = CASE WHEN order_counts.until < excluded.until THEN 0 ELSE order_counts.spent END,
    until = CASE WHEN order_counts.until < excluded.until THEN excluded.until
                 ELSE order_counts.until END
RETURNING until, orders, spent

-- name: add_to_counts
-- Count what was ordered.
UPDATE order_counts SET orders = order_counts.orders + r.orders, spent = order_counts.spent + r.spent
FROM {rows:subject text, orders int, spent int} WHERE order_counts.subject = r.subject

-- name: insert_order
-- Record an order, unless its key is taken.
INSERT INTO orders (key, prediction_id, recipe, options, price, created_at)
VALUES (:key, :prediction_id, :recipe, :options, :price::int, :created_at::float)
ON CONFLICT (key) DO NOTHING
RETURNING key

-- name: select_order
-- Read what was ordered.
SELECT recipe, options FROM orders WHERE prediction_id = :prediction_id

-- name: blank_options
-- Erase what predictions were ordered with.
UPDATE orders SET options = '{}' WHERE prediction_id IN (SELECT r.id FROM {rows:id text})

-- name: forget_counts
-- Delete counts of a time that is long over; what is being counted is passed over.
DELETE FROM order_counts WHERE subject IN (
    SELECT subject FROM order_counts WHERE until < :before::float
    ORDER BY until LIMIT :most::int {skip})
