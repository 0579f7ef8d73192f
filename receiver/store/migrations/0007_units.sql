-- What the provider counts of a prediction, where the outcome said so.
ALTER TABLE cost_questions ADD COLUMN units REAL;
