-- name: select_by_key
-- Find the prediction that was ordered by a key.
SELECT prediction_id FROM orders WHERE key = :key

-- name: insert_order
-- Record an order, unless its key is taken.
INSERT INTO orders (key, prediction_id, recipe, options, price, created_at)
VALUES (:key, :prediction_id, :recipe, :options, :price::int, :created_at::float)
ON CONFLICT (key) DO NOTHING
RETURNING key

-- name: select_order
-- Read the recipe and options of an order.
SELECT recipe, options FROM orders WHERE prediction_id = :prediction_id

-- name: blank_options
-- Erase the options that predictions were ordered with.
UPDATE orders SET options = '{}' WHERE prediction_id IN (SELECT r.id FROM {rows:id text})
