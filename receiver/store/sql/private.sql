-- fragment: is_spent
private IS NOT NULL AND (created_at <= :before::float OR due_at IS NULL AND NOT EXISTS (
    SELECT 1 FROM deliveries d
    WHERE d.id > 'dlv_' || substr(predictions.id, 6)
    AND d.id < 'dlv_' || substr(predictions.id, 6) || '~' AND d.state IN ('pending', 'running')))

-- name: select_spent
-- Find predictions whose private content has expired, or whose handlers have all ended.
SELECT id FROM predictions WHERE {is_spent} ORDER BY created_at LIMIT :most::int

-- name: empty_spent
-- Delete the private content of those of some predictions.
-- Rows that another process has locked are left for the next time.
WITH chosen AS MATERIALIZED (
    SELECT id FROM predictions WHERE id IN (SELECT r.id FROM {rows:id text}) AND {is_spent}
    ORDER BY id {skip}
)
UPDATE predictions SET private = NULL WHERE id IN (SELECT id FROM chosen)
