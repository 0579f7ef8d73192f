-- name: begin
-- Record an action before it is done.
INSERT INTO audit (id, at, who, client, action, target)
VALUES (:id, :at::float, :who, :client, :action, :target)

-- name: end
-- Record the result of an action.
UPDATE audit SET result = :result WHERE id = :id

-- name: list
-- List actions, newest first.
SELECT id, at, who, client, action, target, result FROM audit {where}
ORDER BY id DESC LIMIT :limit::int
-- filter cursor: id < :cursor

-- name: forget
-- Delete the oldest actions, `most` at most.
DELETE FROM audit WHERE id IN (
    SELECT id FROM audit WHERE id < :before ORDER BY id LIMIT :most::int)
