-- name: try_write
INSERT INTO probe (one, at) VALUES (1, :now::float) ON CONFLICT (one) DO UPDATE SET at = excluded.at

-- name: last_change
SELECT coalesce(max(seq), 0) FROM changes
