-- fragment: event_columns
e.id, e.type, e.time, e.channel,
    p.id, p.provider, p.model, p.status, p.mode, p.input, p.metadata, p.provider_id, p.output,
    p.error_code, p.error_message, p.channel, p.parent_id, p.depth, p.created_at,
    p.submitted_at, p.completed_at, p.erased_at, p.reply_to

-- fragment: of_one_event
d.id > 'dlv_' || substr(e.prediction_id, 6) AND d.id < 'dlv_' || substr(e.prediction_id, 6) || '~'
