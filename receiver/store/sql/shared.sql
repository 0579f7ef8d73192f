-- fragment: event_columns
e.id AS event_id, e.type AS event_type, e.time AS event_time, e.channel AS event_channel,
    {prediction_columns}

-- fragment: of_one_event
d.id > 'dlv_' || substr(e.prediction_id, 6) AND d.id < 'dlv_' || substr(e.prediction_id, 6) || '~'
