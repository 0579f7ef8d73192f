-- What only the handlers of a prediction see, encrypted; NULL when they have ended.
ALTER TABLE predictions ADD COLUMN private TEXT;
CREATE INDEX predictions_private ON predictions (created_at) WHERE private IS NOT NULL;
