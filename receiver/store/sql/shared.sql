-- fragment: event_columns
e.id AS event_id, e.type AS event_type, e.time AS event_time, e.channel AS event_channel,
    {prediction_columns}

-- fragment: of_one_event
d.id > 'dlv_' || substr(e.prediction_id, 6) AND d.id < 'dlv_' || substr(e.prediction_id, 6) || '~'

-- fragment: handlers_with_pending
h (name) AS (
    SELECT min(handler) FROM deliveries WHERE state = 'pending'
    UNION ALL
    SELECT (SELECT min(d.handler) FROM deliveries d
            WHERE d.state = 'pending' AND d.handler > h.name)
    FROM h WHERE h.name IS NOT NULL
)
