"""Every query, named and described.

Those that run for many rows at once take one JSON array (`:rows`) and do the batch in a single
step: Python's sqlite3 gives up the interpreter lock around every step, and getting it back while
the event loop is busy costs far more than the step itself.
"""

from __future__ import annotations

from typing import Final

from receiver.model import IN_FLIGHT, TERMINAL, Cause, Status, sources


def _in(statuses: frozenset[Status]) -> str:
    return ", ".join(f"'{status}'" for status in sorted(statuses))


_TERMINAL: Final = _in(TERMINAL)

# --- predictions ---

INSERT_PREDICTION: Final = """
INSERT INTO predictions (id, provider, model, mode, status, input, metadata, parent_id,
                         idempotency_key, fingerprint, created_at, due_at)
VALUES (:id, :provider, :model, :mode, 'queued', :input, :metadata, :parent_id,
        :idempotency_key, :fingerprint, :created_at, :created_at)
ON CONFLICT (idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
"""

SELECT_BY_IDEMPOTENCY_KEY: Final = (
    "SELECT id, fingerprint FROM predictions WHERE idempotency_key = ?"
)

COUNT_IN_FLIGHT: Final = f"""
SELECT count(*) FROM predictions WHERE provider = ? AND status IN ({_in(IN_FLIGHT)})
AND due_at IS NOT NULL
"""  # noqa: S608 - our own constants

_JOB_COLUMNS: Final = """
id, provider, model, mode, status, input, provider_id, links, submitted_at, cancel_requested,
submits, polls, created_at, deadline_at
"""

# The oldest first, so that predictions wait in order; one that was told to come later is passed.
BEGIN_SUBMITS: Final = f"""
UPDATE predictions
SET status = 'submitting', submits = submits + 1, submitted_at = :now, due_at = :hold_until,
    deadline_at = coalesce(deadline_at, :now + :timeout)
WHERE id IN (SELECT id FROM predictions WHERE provider = :provider AND status = 'queued'
             AND due_at <= :now ORDER BY id LIMIT :most)
RETURNING {_JOB_COLUMNS}
"""  # noqa: S608

NEXT_QUEUED: Final = """
SELECT min(due_at) FROM predictions WHERE provider = ? AND status = 'queued'
"""

# A callback may have come first: then the state stays and only the names are filled in. An earlier
# due time stays too, as it means that somebody asked for a look.
ACCEPT_SUBMIT: Final = f"""
UPDATE predictions
SET provider_id = coalesce(provider_id, :provider_id), links = :links,
    due_at = CASE WHEN status IN ({_TERMINAL}) THEN NULL ELSE min(due_at, :due_at, deadline_at) END,
    status = CASE WHEN status IN ({_in(sources(Cause.ACCEPTED))}) THEN 'processing' ELSE status END
WHERE id = :id
"""  # noqa: S608

POSTPONE_SUBMIT: Final = f"""
UPDATE predictions SET status = 'queued', due_at = min(:due_at, deadline_at), submitted_at = NULL
WHERE id = :id AND status IN ({_in(sources(Cause.POSTPONED))})
"""  # noqa: S608

DOUBT_SUBMIT: Final = f"""
UPDATE predictions SET status = 'unconfirmed', due_at = min(due_at, :due_at, deadline_at)
WHERE id = :id AND status IN ({_in(sources(Cause.AMBIGUOUS))})
"""  # noqa: S608

# Whoever looks holds the row until later than `due_at`: an earlier time means a new wish to look.
LOOKED: Final = f"""
UPDATE predictions SET due_at = min(due_at, :due_at), polls = polls + 1
WHERE id = :id AND status NOT IN ({_TERMINAL})
"""  # noqa: S608

# Taking a due row pushes its due time: if we die over it, it is due again.
CLAIM_DUE: Final = f"""
UPDATE predictions SET due_at = :hold_until
WHERE id IN (SELECT id FROM predictions
             WHERE provider = :provider AND due_at <= :now AND status <> 'queued'
             ORDER BY due_at LIMIT :most)
RETURNING {_JOB_COLUMNS}
"""  # noqa: S608

SELECT_STALE: Final = """
SELECT id FROM predictions
WHERE provider = ? AND status = 'queued' AND due_at IS NOT NULL AND created_at <= ? LIMIT ?
"""

NEXT_DUE: Final = """
SELECT min(due_at) FROM predictions
WHERE provider = ? AND due_at IS NOT NULL AND status <> 'queued'
"""

SELECT_JOB: Final = f"SELECT {_JOB_COLUMNS} FROM predictions WHERE id = ?"  # noqa: S608

MARK_CANCEL: Final = f"""
UPDATE predictions SET cancel_requested = 1 WHERE id = ? AND status NOT IN ({_TERMINAL})
"""  # noqa: S608

# Only this process can have been submitting, and it was not: the answer, if any, is lost.
DOUBT_ABANDONED_SUBMITS: Final = """
UPDATE predictions SET status = 'unconfirmed', due_at = :now WHERE status = 'submitting'
"""

SELECT_ID_BY_PROVIDER_ID: Final = (
    "SELECT id FROM predictions WHERE provider = ? AND provider_id = ?"
)

SELECT_SUBMIT_TIMES: Final = """
SELECT submitted_at FROM predictions
WHERE provider = ? AND id >= ? AND submitted_at >= ? ORDER BY submitted_at
"""

# What may have been said while nobody listened is asked for.
HASTEN_LOOKS: Final = """
UPDATE predictions SET due_at = min(due_at, :now)
WHERE provider = :provider AND status IN ('processing', 'unconfirmed') AND due_at IS NOT NULL
"""

_PREDICTION_COLUMNS: Final = """
id, provider, model, status, mode, input, metadata, provider_id, output, error_code, error_message,
channel, parent_id, created_at, submitted_at, completed_at
"""

SELECT_PREDICTION: Final = f"SELECT {_PREDICTION_COLUMNS} FROM predictions WHERE id = ?"  # noqa: S608

LIST_PREDICTIONS: Final = f"""
SELECT {_PREDICTION_COLUMNS} FROM predictions {{where}} ORDER BY id DESC LIMIT :limit
"""  # noqa: S608

# Each filter that is given adds its clause.
PREDICTION_CLAUSES: Final = {
    "status": "status = :status",
    "provider": "provider = :provider",
    "cursor": "id < :cursor",
}

# --- the inbox: one transaction per batch of arrivals ---

# One row that holds all rows, so that reading a batch is one step.
SELECT_KNOWN: Final = """
SELECT json_group_array(json_array(id, provider, model, status, provider_id, metadata))
FROM predictions WHERE id IN (SELECT value FROM json_each(:rows))
"""

# The same bytes again are counted, not kept; they may be understood only the second time.
_REPEATED: Final = """
ON CONFLICT (prediction_id, channel, digest) DO UPDATE SET repeats = repeats + 1,
    verdict = CASE excluded.verdict WHEN 'accepted' THEN 'accepted' ELSE verdict END
"""

INSERT_CALLBACKS: Final = (
    """
INSERT INTO callbacks (prediction_id, channel, digest, received_at, headers, body, verdict, reason)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
       json_extract(value, '$[3]'), json_extract(value, '$[4]'), json_extract(value, '$[5]'),
       json_extract(value, '$[6]'), json_extract(value, '$[7]')
FROM json_each(:rows) WHERE true
"""
    + _REPEATED
)

INSERT_CALLBACK: Final = (
    """
INSERT INTO callbacks (prediction_id, channel, digest, received_at, headers, body, verdict, reason)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""
    + _REPEATED
)

END_PREDICTIONS: Final = f"""
UPDATE predictions
SET status = json_extract(value, '$[1]'),
    provider_id = coalesce(predictions.provider_id, json_extract(value, '$[2]')),
    output = json_extract(value, '$[3]'), error_code = json_extract(value, '$[4]'),
    error_message = json_extract(value, '$[5]'), channel = json_extract(value, '$[6]'),
    completed_at = json_extract(value, '$[7]'), due_at = NULL
FROM json_each(:rows)
WHERE predictions.id = json_extract(value, '$[0]') AND predictions.status NOT IN ({_TERMINAL})
"""  # noqa: S608

NOTE_PREDICTION: Final = f"""
UPDATE predictions
SET status = :status, provider_id = coalesce(provider_id, :provider_id),
    due_at = min(due_at, coalesce(:due_at, due_at))
WHERE id = :id AND status NOT IN ({_TERMINAL})
"""  # noqa: S608

INSERT_EVENTS: Final = """
INSERT INTO events (prediction_id, type, time, channel)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
       json_extract(value, '$[3]')
FROM json_each(:rows)
"""

_DELIVERIES: Final = """
INSERT INTO deliveries (id, prediction_id, handler, state, due_at, created_at)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
       'pending', json_extract(value, '$[3]'), json_extract(value, '$[3]')
FROM json_each(:rows) WHERE true
"""

INSERT_DELIVERIES: Final = _DELIVERIES

# --- deliveries ---

# The provider's own payload comes along, unless it is so large that a lane of them would not fit.
SELECT_WANTED: Final = """
SELECT json_group_array(json_array(
    d.id, d.attempts, d.round, d.claims, e.id, e.type, e.time, e.channel,
    p.id, p.provider, p.model, p.status, p.mode, p.input, p.metadata, p.provider_id, p.output,
    p.error_code, p.error_message, p.channel, p.parent_id, p.created_at, p.submitted_at,
    p.completed_at,
    CASE WHEN typeof(c.body) = 'text' AND length(c.body) <= :largest THEN c.body END))
FROM (SELECT id, prediction_id, attempts, round, claims FROM deliveries
      WHERE handler = :handler AND state = 'pending' AND due_at <= :now
      ORDER BY due_at LIMIT :most) d
JOIN events e ON e.prediction_id = d.prediction_id
JOIN predictions p ON p.id = d.prediction_id
LEFT JOIN callbacks c ON c.prediction_id = p.id AND c.verdict = 'accepted'
"""

CLAIM_DELIVERIES: Final = """
UPDATE deliveries
SET state = 'running', owner = :owner, lease_until = :lease_until, due_at = NULL,
    attempts = attempts + 1, claims = claims + 1
WHERE state = 'pending' AND id IN (SELECT value FROM json_each(:rows))
"""

NEXT_PENDING: Final = """
SELECT min(due_at) FROM deliveries WHERE handler = ? AND state = 'pending'
"""

# Who no longer holds the claim settles nothing: both statements look for it first.
INSERT_ATTEMPTS: Final = """
INSERT INTO attempts (delivery_id, number, started_at, ended_at, result, reason)
SELECT d.id, d.claims, json_extract(value, '$[3]'), json_extract(value, '$[4]'),
       json_extract(value, '$[5]'), json_extract(value, '$[6]')
FROM json_each(:rows) JOIN deliveries d ON d.id = json_extract(value, '$[0]')
WHERE d.state = 'running' AND d.owner = json_extract(value, '$[1]')
  AND d.claims = json_extract(value, '$[2]')
"""

SELECT_HELD: Final = """
SELECT json_group_array(json_array(d.id, d.claims))
FROM json_each(:rows) JOIN deliveries d ON d.id = json_extract(value, '$[0]')
WHERE d.state = 'running' AND d.owner = json_extract(value, '$[1]')
  AND d.claims = json_extract(value, '$[2]')
"""

SETTLE_DELIVERIES: Final = """
UPDATE deliveries
SET state = json_extract(value, '$[7]'), due_at = json_extract(value, '$[8]'),
    ended_at = json_extract(value, '$[9]'), reason = json_extract(value, '$[6]'),
    owner = NULL, lease_until = NULL
FROM json_each(:rows)
WHERE deliveries.id = json_extract(value, '$[0]') AND deliveries.state = 'running'
  AND deliveries.owner = json_extract(value, '$[1]')
  AND deliveries.claims = json_extract(value, '$[2]')
"""

# Given back unharmed, when we stop: the attempt does not count.
RELEASE_DELIVERIES: Final = """
UPDATE deliveries
SET state = 'pending', due_at = :now, owner = NULL, lease_until = NULL, attempts = attempts - 1
WHERE state = 'running' AND owner = :owner
"""

RENEW_LEASES: Final = """
UPDATE deliveries SET lease_until = :lease_until
WHERE state = 'running' AND owner = :owner AND id IN (SELECT value FROM json_each(:rows))
"""

# Leases that ran out, and claims of processes that cannot exist any more.
RECLAIM: Final = """
UPDATE deliveries
SET state = 'pending', due_at = :now, owner = NULL, lease_until = NULL, reason = :reason
WHERE state = 'running' AND (lease_until <= :now OR (:everyone AND owner <> :owner))
RETURNING handler
"""

SELECT_EVENT_TYPE: Final = "SELECT type FROM events WHERE prediction_id = ?"

REPLAY_DELIVERIES: Final = f"""{_DELIVERIES}
ON CONFLICT (id) DO UPDATE
SET state = 'pending', due_at = excluded.due_at, ended_at = NULL, attempts = 0, round = round + 1,
    reason = 'replayed'
WHERE state IN ('done', 'skipped', 'dead')
RETURNING id, handler
"""

FORGET_STEPS: Final = "DELETE FROM steps WHERE delivery_id IN (SELECT value FROM json_each(:rows))"

RETRY_DELIVERY: Final = """
UPDATE deliveries
SET state = 'pending', due_at = :now, ended_at = NULL, attempts = 0, reason = 'retried by hand'
WHERE id = :id AND state IN ('skipped', 'dead')
RETURNING handler
"""

HASTEN_DELIVERY: Final = """
UPDATE deliveries SET due_at = :now WHERE id = :id AND state = 'pending' RETURNING handler
"""

LIST_DELIVERIES: Final = """
SELECT d.id, d.event_id, d.prediction_id, d.handler, d.state, d.attempts, d.reason, d.created_at,
       d.due_at, d.ended_at,
       (SELECT json_group_array(json_object('number', a.number, 'started_at', a.started_at,
            'ended_at', a.ended_at, 'result', a.result, 'reason', a.reason))
        FROM attempts a WHERE a.delivery_id = d.id)
FROM deliveries d {where}
ORDER BY d.id DESC LIMIT :limit
"""

DELIVERY_CLAUSES: Final = {
    "state": "d.state = :state",
    "handler": "d.handler = :handler",
    # All ids of a prediction's deliveries start alike, which the primary key can find.
    "prediction": "d.id > 'dlv_' || substr(:prediction, 6) "
    "AND d.id < 'dlv_' || substr(:prediction, 6) || '~' AND d.prediction_id = :prediction",
    "id": "d.id = :id",
    "cursor": "d.id < :cursor",
}

COUNT_OWED: Final = """
SELECT handler, count(*) FROM deliveries WHERE state = 'pending' GROUP BY handler
"""

INSERT_STEP: Final = """
INSERT INTO steps (delivery_id, key, result) VALUES (?, ?, ?) ON CONFLICT DO NOTHING
"""

SELECT_STEP: Final = "SELECT result FROM steps WHERE delivery_id = ? AND key = ?"

PROBE: Final = "INSERT INTO probe (one, at) VALUES (1, ?) ON CONFLICT (one) DO UPDATE SET at = ?"
