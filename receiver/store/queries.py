"""Every query, named and described; what the marks in them mean is said in `dialect`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final

from receiver.model.states import IN_FLIGHT, TERMINAL, Cause, sources
from receiver.model.values import Status
from receiver.store.dialect import Query


def _in(statuses: frozenset[Status]) -> str:
    return ", ".join(f"'{status}'" for status in sorted(statuses))


_TERMINAL: Final = _in(TERMINAL)

# --- predictions ---

INSERT_PREDICTION: Final = Query("""
INSERT INTO predictions (id, provider, model, mode, status, input, metadata, parent_id, depth,
                         idempotency_key, fingerprint, created_at, due_at, trace)
VALUES (:id, :provider, :model, :mode, 'queued', :input, :metadata, :parent_id,
        coalesce((SELECT p.depth + 1 FROM predictions p WHERE p.id = :parent_id), 0),
        :idempotency_key, :fingerprint, :created_at, :created_at, :trace)
ON CONFLICT (idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
RETURNING id
""")

SELECT_BY_IDEMPOTENCY_KEY: Final = Query(
    "SELECT id, fingerprint FROM predictions WHERE idempotency_key = :idempotency_key"
)

# Whoever counts what a provider still takes holds its row, so that two never count at once.
HOLD_LIMITS: Final = Query("""
INSERT INTO limits (provider, turns) VALUES (:provider, 1)
ON CONFLICT (provider) DO UPDATE SET turns = limits.turns + 1
""")

COUNT_IN_FLIGHT: Final = Query(f"""
SELECT count(*) FROM predictions WHERE provider = :provider AND status IN ({_in(IN_FLIGHT)})
AND due_at IS NOT NULL
""")  # noqa: S608 - our own constants

COUNT_REQUESTS: Final = Query("""
SELECT CAST(coalesce(sum(requests), 0) AS bigint), min(at) FROM requests
WHERE provider = :provider AND at > :since
""")

INSERT_REQUESTS: Final = Query(
    "INSERT INTO requests (provider, at, requests) VALUES (:provider, :now, :requests)"
)

FORGET_REQUESTS: Final = Query("DELETE FROM requests WHERE provider = :provider AND at <= :since")

_JOB_COLUMNS: Final = """
id, provider, model, mode, status, input, provider_id, links, submitted_at, cancel_requested,
submits, polls, created_at, deadline_at
"""

# The oldest first, so that predictions wait in order; one that was told to come later is passed.
# The choice is made once, whatever the plan: a subquery may be run again for each row.
BEGIN_SUBMITS: Final = Query(f"""
WITH chosen AS MATERIALIZED (
    SELECT id FROM predictions WHERE provider = :provider AND status = 'queued'
    AND due_at <= :now ORDER BY id LIMIT :most {{skip}})
UPDATE predictions
SET status = 'submitting', submits = submits + 1, submitted_at = :now,
    due_at = CASE mode WHEN 'sync' THEN :hold_sync_until ELSE :hold_until END,
    deadline_at = coalesce(deadline_at, :deadline)
WHERE id IN (SELECT id FROM chosen)
RETURNING {_JOB_COLUMNS}
""")  # noqa: S608

NEXT_QUEUED: Final = Query("""
SELECT min(due_at) FROM predictions WHERE provider = :provider AND status = 'queued'
""")

# A callback may have come first: then the state stays and only the names are filled in. An earlier
# due time stays too, as it means that somebody asked for a look.
ACCEPT_SUBMIT: Final = Query(f"""
UPDATE predictions
SET provider_id = coalesce(provider_id, :provider_id),
    links = CASE WHEN erased_at IS NULL THEN :links ELSE links END,
    due_at = CASE WHEN status IN ({_TERMINAL}) THEN NULL
                  ELSE least(due_at, :due_at, deadline_at) END,
    status = CASE WHEN status IN ({_in(sources(Cause.ACCEPTED))}) THEN 'processing' ELSE status END
WHERE id = :id
""")  # noqa: S608

POSTPONE_SUBMIT: Final = Query(f"""
UPDATE predictions SET status = 'queued', due_at = least(:due_at, deadline_at), submitted_at = NULL
WHERE id = :id AND status IN ({_in(sources(Cause.POSTPONED))})
""")  # noqa: S608

DOUBT_SUBMIT: Final = Query(f"""
UPDATE predictions SET status = 'unconfirmed', due_at = least(due_at, :due_at, deadline_at)
WHERE id = :id AND status IN ({_in(sources(Cause.AMBIGUOUS))})
""")  # noqa: S608

# Whoever looks holds the row until later than `due_at`: an earlier time means a new wish to look.
LOOKED: Final = Query(f"""
UPDATE predictions SET due_at = least(due_at, :due_at), polls = polls + 1
WHERE id = :id AND status NOT IN ({_TERMINAL})
""")  # noqa: S608

# Taking a due row pushes its due time: if we die over it, it is due again.
CLAIM_DUE: Final = Query(f"""
WITH chosen AS MATERIALIZED (
    SELECT id FROM predictions
    WHERE provider = :provider AND due_at <= :now AND status <> 'queued'
    ORDER BY due_at LIMIT :most {{skip}})
UPDATE predictions SET due_at = :hold_until
WHERE id IN (SELECT id FROM chosen)
RETURNING {_JOB_COLUMNS}
""")  # noqa: S608

SELECT_STALE: Final = Query("""
SELECT id FROM predictions
WHERE provider = :provider AND status = 'queued' AND due_at IS NOT NULL AND created_at <= :before
LIMIT :most
""")

NEXT_DUE: Final = Query("""
SELECT min(due_at) FROM predictions
WHERE provider = :provider AND due_at IS NOT NULL AND status <> 'queued'
""")

SELECT_JOB: Final = Query(f"SELECT {_JOB_COLUMNS} FROM predictions WHERE id = :id")  # noqa: S608

MARK_CANCEL: Final = Query(f"""
UPDATE predictions SET cancel_requested = 1 WHERE id = :id AND status NOT IN ({_TERMINAL})
""")  # noqa: S608

# Only this process can have been submitting, and it was not: the answer, if any, is lost.
DOUBT_ABANDONED_SUBMITS: Final = Query("""
UPDATE predictions SET status = 'unconfirmed', due_at = :now WHERE status = 'submitting'
""")

SELECT_ID_BY_PROVIDER_ID: Final = Query("""
SELECT id FROM predictions WHERE provider = :provider AND provider_id = :provider_id
""")

# What may have been said while nobody listened is asked for.
HASTEN_LOOKS: Final = Query("""
WITH held AS MATERIALIZED (
    SELECT id FROM predictions
    WHERE provider = :provider AND status IN ('processing', 'unconfirmed') AND due_at > :now
    ORDER BY id {lock}
)
UPDATE predictions SET due_at = :now WHERE id IN (SELECT id FROM held)
""")

_PREDICTION_COLUMNS: Final = """
id, provider, model, status, mode, input, metadata, provider_id, output, error_code, error_message,
channel, parent_id, depth, created_at, submitted_at, completed_at, erased_at
"""

SELECT_PREDICTION: Final = Query(
    f"SELECT {_PREDICTION_COLUMNS} FROM predictions WHERE id = :id"  # noqa: S608
)


# A handler adds to what a prediction is; two handlers may do so at once. One that would not end may
# do so when all is erased.
SELECT_RESULT: Final = Query("""
SELECT output, metadata FROM predictions WHERE id = :id AND erased_at IS NULL {lock}
""")

UPDATE_RESULT: Final = Query(
    "UPDATE predictions SET output = :output, metadata = :metadata WHERE id = :id"
)

# Where the wanted are few among many, the clause says so in the words of a partial index.
_ALSO: Final[dict[tuple[str, str], str]] = {
    **{("status", status): "living" for status in Status if status not in TERMINAL},
    ("status", Status.FAILED): "unsuccessful",
    ("status", Status.CANCELED): "unsuccessful",
    ("state", "dead"): "failed",
    ("state", "skipped"): "failed",
    ("state", "running"): "running",
}


class Listing:
    """A list that is filtered by any of its clauses, newest first; one row more than asked for."""

    def __init__(self, text: str, clauses: Mapping[str, str]) -> None:
        self._text = text
        self._clauses = clauses
        self.names = clauses.keys()
        """What it can be filtered by."""
        self._by = cache(self._make)

    def by(self, filters: Mapping[str, str]) -> Query:
        """Give the query that uses just these of the filters."""
        named = {_ALSO.get((name, value), name) for name, value in filters.items()}
        return self._by(tuple(sorted(named)))

    def _make(self, filters: tuple[str, ...]) -> Query:
        terms = " AND ".join(self._clauses[name] for name in filters)
        return Query(self._text.replace("{where}", f"WHERE {terms}" if terms else ""))


LIST_PREDICTIONS: Final = Listing(
    f"SELECT {_PREDICTION_COLUMNS} FROM predictions {{where}} ORDER BY id DESC LIMIT :limit",  # noqa: S608
    {
        "status": "status = :status",
        "living": "status = :status AND due_at IS NOT NULL",
        "unsuccessful": "status = :status AND error_code IS NOT NULL",
        "provider": "provider = :provider",
        "cursor": "id < :cursor",
    },
)

# --- the inbox: one transaction per batch of arrivals ---

# In one order, so that two batches in two processes never wait for each other in a circle.
SELECT_KNOWN: Final = Query("""
SELECT {gather:id, provider, model, status, provider_id, metadata, erased_at IS NOT NULL,
    submitted_at}
FROM predictions WHERE id IN (SELECT r.id FROM {rows:id text}) ORDER BY id {lock}
""")

# The same bytes again are counted, not kept; they may be understood only the second time.
_INSERT_CALLBACKS: Final = """
INSERT INTO callbacks
    (prediction_id, channel, digest, received_at, headers, body, verdict, reason, repeats{more})
SELECT r.prediction_id, r.channel, r.digest, r.received_at, r.headers, r.body, r.verdict, r.reason,
       r.repeats{r.more}
FROM {rows:prediction_id text, channel text, digest text, received_at float, headers text,
           body bytes, verdict text, reason text, repeats int{more text}} WHERE true
ON CONFLICT (prediction_id, channel, digest) DO UPDATE
SET repeats = callbacks.repeats + 1 + excluded.repeats, repeated_at = excluded.received_at,
    verdict = CASE excluded.verdict WHEN 'accepted' THEN 'accepted' ELSE callbacks.verdict END
"""


def _with(text: str, more: str) -> Query:
    """Give the query that writes one more column, or none."""
    for mark, words in (("{more}", "{}"), ("{r.more}", "r.{}"), ("{more text}", "{} text")):
        text = text.replace(mark, f", {words.format(more)}" if more else "")
    return Query(text)


INSERT_CALLBACKS: Final = _with(_INSERT_CALLBACKS, "")

# Of predictions that are not here, so that nothing else says whose it was.
INSERT_UNKNOWN: Final = _with(_INSERT_CALLBACKS, "provider")

END_PREDICTIONS: Final = Query(f"""
UPDATE predictions
SET status = r.status, provider_id = coalesce(predictions.provider_id, r.provider_id),
    output = r.output, error_code = r.error_code, error_message = r.error_message,
    channel = r.channel, completed_at = r.at, due_at = NULL
FROM {{rows:id text, status text, provider_id text, output text, error_code text,
           error_message text, channel text, at float}}
WHERE predictions.id = r.id AND predictions.status NOT IN ({_TERMINAL})
""")  # noqa: S608

NOTE_PREDICTION: Final = Query(f"""
UPDATE predictions
SET status = :status, provider_id = coalesce(provider_id, :provider_id),
    due_at = least(due_at, coalesce(:due_at, due_at))
WHERE id = :id AND status NOT IN ({_TERMINAL})
""")  # noqa: S608

_INSERT_EVENTS: Final = """
INSERT INTO events (prediction_id, type, time, channel{more})
SELECT r.prediction_id, r.type, r.time, r.channel{r.more}
FROM {rows:prediction_id text, type text, time float, channel text}
"""
INSERT_EVENTS: Final = Query(_INSERT_EVENTS.replace("{more}", "").replace("{r.more}", ""))

# Those that no handler wanted.
INSERT_UNROUTED: Final = Query(
    _INSERT_EVENTS.replace("{more}", ", unrouted").replace("{r.more}", ", 1")
)

ROUTE_EVENTS: Final = Query("""
UPDATE events SET unrouted = 0
WHERE prediction_id IN (SELECT r.id FROM {rows:id text}) AND unrouted = 1
""")

INSERT_DELIVERIES: Final = Query("""
INSERT INTO deliveries (id, prediction_id, handler, state, due_at, created_at)
SELECT r.id, r.prediction_id, r.handler, 'pending', r.at, r.at
FROM {rows:id text, prediction_id text, handler text, at float}
""")

INSERT_WAITING: Final = Query("""
INSERT INTO deliveries (id, prediction_id, handler, state, due_at, created_at, after, reason)
SELECT r.id, r.prediction_id, r.handler, 'pending', r.due_at, r.at, r.after, r.reason
FROM {rows:id text, prediction_id text, handler text, at float, due_at float, after text,
           reason text}
""")

# --- deliveries ---

# All ids of a prediction's deliveries start alike, which the primary key can find.
OF_ONE_EVENT: Final = """
d.id > 'dlv_' || substr(e.prediction_id, 6) AND d.id < 'dlv_' || substr(e.prediction_id, 6) || '~'
"""

EVENT_COLUMNS: Final = """
    e.id, e.type, e.time, e.channel,
    p.id, p.provider, p.model, p.status, p.mode, p.input, p.metadata, p.provider_id, p.output,
    p.error_code, p.error_message, p.channel, p.parent_id, p.depth, p.created_at,
    p.submitted_at, p.completed_at, p.erased_at
"""
_OF_THE_EVENT: Final = """
JOIN events e ON e.prediction_id = d.prediction_id
JOIN predictions p ON p.id = d.prediction_id
LEFT JOIN callbacks c ON c.prediction_id = p.id AND c.verdict = 'accepted'
"""

# The provider's own payload comes along, unless it is so large that a lane of them would not fit.
SELECT_WANTED: Final = Query(f"""
SELECT {{gather:d.id, d.attempts + 1, d.round, d.claims + 1, {EVENT_COLUMNS},
    CASE WHEN typeof(c.body) = 'text' AND length(c.body) <= :largest THEN c.body END}}
FROM (SELECT id, prediction_id, attempts, round, claims FROM deliveries
      WHERE handler = :handler AND state = 'pending' AND due_at <= :now
      ORDER BY due_at LIMIT :most) d
{_OF_THE_EVENT}
""")  # noqa: S608

CLAIM_DELIVERIES: Final = Query("""
UPDATE deliveries
SET state = 'running', owner = :owner, lease_until = :lease_until, due_at = NULL, after = '[]',
    attempts = attempts + 1, claims = claims + 1, claimed_at = :now
WHERE state = 'pending' AND id IN (SELECT r.id FROM {rows:id text})
""")

# For a queue that has said what is due: all in one round trip.
TAKE_DELIVERIES: Final = Query(f"""
WITH held AS MATERIALIZED (
    SELECT id FROM deliveries WHERE id IN (SELECT r.id FROM {{rows:id text}}) AND state = 'pending'
    ORDER BY id {{lock}}
), d AS (
    UPDATE deliveries
    SET state = 'running', owner = :owner, lease_until = :lease_until, due_at = NULL, after = '[]',
        attempts = attempts + 1, claims = claims + 1, claimed_at = :now
    WHERE id IN (SELECT id FROM held)
    RETURNING id, prediction_id, attempts, round, claims
)
SELECT d.id, d.attempts, d.round, d.claims, {EVENT_COLUMNS},
    CASE WHEN length(c.body) <= :largest THEN c.body END
FROM d {_OF_THE_EVENT}
""")  # noqa: S608

SELECT_LEASES: Final = Query("""
SELECT id, state, lease_until FROM deliveries WHERE id IN (SELECT r.id FROM {rows:id text})
ORDER BY id {lock}
""")

NEXT_PENDING: Final = Query("""
SELECT min(due_at) FROM deliveries WHERE handler = :handler AND state = 'pending'
""")

_SETTLEMENTS: Final = """
{rows:id text, owner text, number int, started_at float, ended_at float, result text, reason text,
      note text, state text, due_at float, closed_at float}
"""

# Who no longer holds the claim settles nothing: all three statements look for it first.
SELECT_HELD: Final = Query(f"""
SELECT {{gather:d.id, d.claims, d.prediction_id,
    EXISTS (SELECT 1 FROM deliveries w
            WHERE w.prediction_id = d.prediction_id AND w.state = 'pending' AND w.after <> '[]')}}
FROM {_SETTLEMENTS} JOIN deliveries d ON d.id = r.id
WHERE d.state = 'running' AND d.owner = r.owner AND d.claims = r.number ORDER BY d.id {{lock}}
""")  # noqa: S608

INSERT_ATTEMPTS: Final = Query(f"""
INSERT INTO attempts (delivery_id, number, started_at, ended_at, result, reason, note)
SELECT d.id, d.claims, r.started_at, r.ended_at, r.result, r.reason, r.note
FROM {_SETTLEMENTS} JOIN deliveries d ON d.id = r.id
WHERE d.state = 'running' AND d.owner = r.owner AND d.claims = r.number
""")  # noqa: S608

SETTLE_DELIVERIES: Final = Query(f"""
UPDATE deliveries
SET state = r.state, due_at = r.due_at, ended_at = r.closed_at, reason = r.reason,
    owner = NULL, lease_until = NULL
FROM {_SETTLEMENTS}
WHERE deliveries.id = r.id AND deliveries.state = 'running'
  AND deliveries.owner = r.owner AND deliveries.claims = r.number
""")  # noqa: S608

# Only those who wait are locked, and then looked at anew what they wait for: of two that end at
# once, the later sees both at their end.
SELECT_WAITING: Final = Query("""
SELECT d.id, d.prediction_id, d.after
FROM {rows:id text} JOIN deliveries d ON d.prediction_id = r.id
WHERE d.state = 'pending' AND d.after <> '[]' ORDER BY d.id {lock}
""")

# For whoever looks whether something waits that nobody will let go, page by page.
SELECT_WITH_WAITING: Final = Query("""
SELECT DISTINCT prediction_id FROM deliveries
WHERE state = 'pending' AND after <> '[]' AND prediction_id > :cursor
ORDER BY prediction_id LIMIT :most
""")

SELECT_UNENDED: Final = Query("""
SELECT id FROM deliveries
WHERE id IN (SELECT r.id FROM {rows:id text}) AND state IN ('pending', 'running')
""")

STOP_WAITING: Final = Query("""
UPDATE deliveries SET due_at = :now, after = '[]', reason = ''
WHERE id IN (SELECT r.id FROM {rows:id text}) AND state = 'pending'
RETURNING id, handler
""")

# Given back unharmed, when we stop: the attempt does not count.
RELEASE_DELIVERIES: Final = Query("""
WITH held AS MATERIALIZED (
    SELECT id FROM deliveries WHERE state = 'running' AND owner = :owner ORDER BY id {lock}
)
UPDATE deliveries
SET state = 'pending', due_at = :now, owner = NULL, lease_until = NULL, attempts = attempts - 1
WHERE id IN (SELECT id FROM held)
RETURNING id
""")

RENEW_LEASES: Final = Query("""
WITH held AS MATERIALIZED (
    SELECT id FROM deliveries
    WHERE state = 'running' AND owner = :owner AND id IN (SELECT r.id FROM {rows:id text})
    ORDER BY id {lock}
)
UPDATE deliveries SET lease_until = :lease_until WHERE id IN (SELECT id FROM held)
RETURNING id
""")

_RECLAIM: Final = """
WITH held AS MATERIALIZED (
    SELECT id FROM deliveries WHERE state = 'running' AND (<lost>) ORDER BY id {lock}
)
UPDATE deliveries
SET state = 'pending', due_at = :now, owner = NULL, lease_until = NULL, reason = :reason
WHERE id IN (SELECT id FROM held)
RETURNING id
"""

# Leases that ran out, and claims of processes that cannot exist any more.
RECLAIM: Final = Query(
    _RECLAIM.replace("<lost>", "lease_until <= :now OR (:everyone AND owner <> :owner)")
)

RECLAIM_THESE: Final = Query(
    _RECLAIM.replace("<lost>", "lease_until <= :now AND id IN (SELECT r.id FROM {rows:id text})")
)

# One of them may have been a handler's probe: another process may make the next.
END_LOST_PROBES: Final = Query("""
WITH held AS MATERIALIZED (
    SELECT name FROM handlers
    WHERE probe_until IS NOT NULL AND name IN (SELECT d.handler FROM {rows:id text}
                                               JOIN deliveries d ON d.id = r.id)
    ORDER BY name {lock}
)
UPDATE handlers SET probe_until = NULL WHERE name IN (SELECT name FROM held)
""")

# Its process cannot tell of it any more: all that is known is when it began, and that it is over.
INSERT_LOST: Final = Query("""
INSERT INTO attempts (delivery_id, number, started_at, ended_at, result, reason, note)
SELECT d.id, d.claims, coalesce(d.claimed_at, :now), :now, 'lost', d.reason, ''
FROM {rows:id text} JOIN deliveries d ON d.id = r.id
""")

SELECT_LOST: Final = Query("""
SELECT d.id, d.handler, d.prediction_id, p.provider, p.provider_id, e.channel, d.attempts, d.reason,
    :now - coalesce(d.claimed_at, :now)
FROM {rows:id text}
JOIN deliveries d ON d.id = r.id
JOIN events e ON e.prediction_id = d.prediction_id
JOIN predictions p ON p.id = d.prediction_id
""")

SELECT_EVENT_TYPE: Final = Query("SELECT type FROM events WHERE prediction_id = :prediction_id")

# What was erased has an event, but nothing that a handler could be given.
SELECT_REPLAYABLE: Final = Query(f"""
SELECT {{gather:e.prediction_id, e.type, d.handler, d.state}}
FROM {{rows:id text}}
JOIN predictions p ON p.id = r.id AND p.erased_at IS NULL
JOIN events e ON e.prediction_id = r.id
LEFT JOIN deliveries d ON {OF_ONE_EVENT}
""")  # noqa: S608

REPLAY_DELIVERIES: Final = Query("""
INSERT INTO deliveries (id, prediction_id, handler, state, due_at, created_at, after, reason,
                        replay_id)
SELECT r.id, r.prediction_id, r.handler, 'pending', r.due_at, r.at, r.after, r.reason, :replay_id
FROM {rows:id text, prediction_id text, handler text, at float, due_at float, after text,
           reason text} WHERE true
ON CONFLICT (id) DO UPDATE
SET state = 'pending', due_at = excluded.due_at, ended_at = NULL, attempts = 0,
    round = deliveries.round + 1, after = excluded.after, reason = excluded.reason,
    replay_id = excluded.replay_id
WHERE deliveries.state IN ('done', 'skipped', 'dead')
RETURNING id, handler
""")

FORGET_STEPS: Final = Query(
    "DELETE FROM steps WHERE delivery_id IN (SELECT r.id FROM {rows:id text})"
)

# Held until the commit, so that nothing is owed again of what is being erased.
SELECT_ERASED: Final = Query("""
SELECT erased_at IS NOT NULL FROM predictions WHERE id = 'pred_' || substr(:id, 5, 32) {lock}
""")

RETRY_DELIVERY: Final = Query("""
UPDATE deliveries
SET state = 'pending', due_at = :now, ended_at = NULL, attempts = 0, reason = 'retried by hand'
WHERE id = :id AND state IN ('skipped', 'dead')
RETURNING id, handler
""")

HASTEN_DELIVERY: Final = Query("""
UPDATE deliveries SET due_at = :now, after = '[]' WHERE id = :id AND state = 'pending'
RETURNING id, handler
""")

LIST_DELIVERIES: Final = Listing(
    """
SELECT d.id, d.event_id, d.prediction_id, d.handler, d.state, d.attempts, d.round, d.replay_id,
       d.reason, d.created_at, d.due_at, d.ended_at,
       (SELECT json_group_array(json_object('number', a.number, 'started_at', a.started_at,
            'ended_at', a.ended_at, 'result', a.result, 'reason', a.reason, 'note', a.note))
        FROM attempts a WHERE a.delivery_id = d.id)
FROM deliveries d {where}
ORDER BY d.id DESC LIMIT :limit
""",
    {
        "state": "d.state = :state",
        "failed": "d.state = :state AND d.state IN ('skipped', 'dead')",
        "running": "d.state = :state AND d.state = 'running'",
        "handler": "d.handler = :handler",
        "prediction": "d.id > 'dlv_' || substr(:prediction, 6) "
        "AND d.id < 'dlv_' || substr(:prediction, 6) || '~' AND d.prediction_id = :prediction",
        "id": "d.id = :id",
        "cursor": "d.id < :cursor",
    },
)

COUNT_OWED: Final = Query("""
SELECT handler, count(*) FROM deliveries WHERE state = 'pending' GROUP BY handler
""")

SELECT_BACKLOG: Final = Query("""
SELECT
    (SELECT count(*) FROM deliveries WHERE state = 'dead'),
    (SELECT count(*) FROM deliveries d WHERE state = 'pending' AND due_at <= :before
        AND NOT EXISTS (SELECT 1 FROM handlers h WHERE h.name = d.handler
                        AND (h.paused_at IS NOT NULL OR h.open_until > :before))),
    (SELECT count(*) FROM predictions
        WHERE due_at <= :before AND status IN ('processing', 'unconfirmed'))
""")

SELECT_HELD_BACK: Final = Query(
    """
SELECT name, paused_at IS NOT NULL, reason FROM handlers
WHERE paused_at IS NOT NULL OR open_until IS NOT NULL ORDER BY name
"""
)

INSERT_STEP: Final = Query("""
INSERT INTO steps (delivery_id, key, result)
SELECT :delivery_id, :key, :result FROM predictions
WHERE id = 'pred_' || substr(:delivery_id, 5, 32) AND erased_at IS NULL {lock}
ON CONFLICT DO NOTHING
""")

SELECT_STEP: Final = Query(
    "SELECT result FROM steps WHERE delivery_id = :delivery_id AND key = :key"
)

TRY_WRITE: Final = Query(
    "INSERT INTO probe (one, at) VALUES (1, :now) ON CONFLICT (one) DO UPDATE SET at = excluded.at"
)

# --- what one process does for all ---

# Whoever holds a role renews it in time; it passes to another once that has not happened.
HOLD_ROLE: Final = Query("""
INSERT INTO roles (name, owner, until, at_work) VALUES (:name, :owner, :until, 0)
ON CONFLICT (name) DO UPDATE
SET owner = excluded.owner, until = excluded.until,
    at_work = CASE WHEN roles.owner = excluded.owner THEN roles.at_work ELSE 0 END
WHERE roles.owner = excluded.owner OR roles.until <= :now
RETURNING owner
""")

REPORT_ROLE: Final = Query(
    "UPDATE roles SET at_work = :at_work WHERE name = :name AND owner = :owner"
)

LEAVE_ROLE: Final = Query("DELETE FROM roles WHERE name = :name AND owner = :owner")

SELECT_ROLE: Final = Query("SELECT at_work FROM roles WHERE name = :name AND until > :now")
