-- Tried here: run on PostgreSQL with stand-ins for cron, net and vault. Not tried: Supabase, as that needs an account.
-- Supabase's pg_cron and pg_net call the receiver, wherever that is, and only when something is due, so that nothing runs in vain.
-- In the SQL editor, with the line that `receiver wake-url` prints in place of this address, which is a secret:
SELECT vault.create_secret('https://hooks.example.org/wake/TOKEN', 'receiver_wake_url');

CREATE EXTENSION IF NOT EXISTS pg_cron;
CREATE EXTENSION IF NOT EXISTS pg_net;

-- Every ten seconds: deliveries whose handler is not held back, submits and polls, and what a lost process had claimed.
SELECT cron.schedule('receiver-drain', '10 seconds', $cron$
    SELECT net.http_post(url := decrypted_secret, body := '{}'::jsonb, timeout_milliseconds := 60000)
    FROM vault.decrypted_secrets
    WHERE name = 'receiver_wake_url' AND (
        EXISTS (SELECT FROM receiver.deliveries d LEFT JOIN receiver.handlers h ON h.name = d.handler
                WHERE d.state = 'pending' AND d.due_at <= extract(epoch FROM now()) AND h.paused_at IS NULL
                  AND coalesce(greatest(h.open_until, h.probe_until), 0) <= extract(epoch FROM now()))
        OR EXISTS (SELECT FROM receiver.deliveries
                   WHERE state = 'running' AND lease_until <= extract(epoch FROM now()))
        OR EXISTS (SELECT FROM receiver.predictions
                   WHERE due_at IS NOT NULL AND due_at <= extract(epoch FROM now())))
$cron$);

-- Once an hour in any case: retention, replays and whatever else a drain looks after.
SELECT cron.schedule('receiver-housekeeping', '7 * * * *', $cron$
    SELECT net.http_post(url := decrypted_secret, body := '{}'::jsonb, timeout_milliseconds := 60000)
    FROM vault.decrypted_secrets WHERE name = 'receiver_wake_url'
$cron$);
