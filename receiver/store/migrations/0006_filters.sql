-- What people look predictions up by beside status, recipe and person. Neither changes after the
-- submit, and so no end of a prediction writes to these.
CREATE INDEX predictions_provider ON predictions (provider, id);
CREATE INDEX predictions_model ON predictions (lower(model), id);
