-- fragment: prediction_columns
p.id, p.provider, p.model, p.status, p.mode, p.input, p.metadata, p.provider_id, p.output,
    p.error_code, p.error_message, p.channel, p.parent_id, p.depth, p.created_at,
    p.submitted_at, p.completed_at, p.erased_at

-- fragment: event_columns
e.id AS event_id, e.type AS event_type, e.time AS event_time, e.channel AS event_channel,
    {prediction_columns}

-- fragment: of_one_event
d.id > 'dlv_' || substr(e.prediction_id, 6) AND d.id < 'dlv_' || substr(e.prediction_id, 6) || '~'
