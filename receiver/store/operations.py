"""What is written: functions of a connection and all the items that wait for one operation.

Each runs inside the writer's transaction and gives one answer per item, in order.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Any, Final

import msgspec

from receiver.model import Status, delivery_id, event_id
from receiver.store import queries as q
from receiver.store import rows as to
from receiver.store.values import (
    Arrival,
    Claims,
    Created,
    Job,
    Known,
    NewPrediction,
    Progress,
    Replayed,
    Ruling,
    Settlement,
    Slots,
    Taken,
    Wanted,
)

_LARGEST_RAW: Final = 4 * 1024 * 1024
"""Characters of a provider's payload up to which a handler is given it."""
_LARGEST_INLINE_BODY: Final = 32 * 1024
"""Bytes up to which a body travels inside the batch's JSON; larger ones are bound one by one."""


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def create(cx: sqlite3.Connection, items: Sequence[NewPrediction]) -> list[Created]:
    return [_create_one(cx, new) for new in items]


def _create_one(cx: sqlite3.Connection, new: NewPrediction) -> Created:
    row = msgspec.structs.asdict(new) | {"input": _text(new.input), "metadata": _text(new.metadata)}
    if cx.execute(q.INSERT_PREDICTION, row).rowcount:
        return Created(new.id, is_new=True, fingerprint=new.fingerprint)
    first = cx.execute(q.SELECT_BY_IDEMPOTENCY_KEY, (new.idempotency_key,)).fetchone()
    return Created(first[0], is_new=False, fingerprint=first[1])


def begin_submits(cx: sqlite3.Connection, items: Sequence[Slots]) -> list[list[Job]]:
    return [_begin_some(cx, slots) for slots in items]


def _begin_some(cx: sqlite3.Connection, slots: Slots) -> list[Job]:
    most = slots.most
    if slots.max_in_flight is not None:
        in_flight = cx.execute(q.COUNT_IN_FLIGHT, (slots.provider,)).fetchone()[0]
        most = min(most, slots.max_in_flight - in_flight)
    if most <= 0:
        return []
    row = msgspec.structs.asdict(slots) | {"most": most}
    rows = cx.execute(q.BEGIN_SUBMITS, row).fetchall()
    return sorted((to.job(row) for row in rows), key=lambda job: job.ticket.id)


_PROGRESS: Final = {
    "accepted": q.ACCEPT_SUBMIT,
    "postponed": q.POSTPONE_SUBMIT,
    "ambiguous": q.DOUBT_SUBMIT,
    "looked": q.LOOKED,
}


def progress(cx: sqlite3.Connection, items: Sequence[Progress]) -> list[None]:
    for item in items:
        row = msgspec.structs.asdict(item) | {"links": _text(item.links)}
        cx.execute(_PROGRESS[item.cause], row)
    return [None] * len(items)


def claim_due(
    cx: sqlite3.Connection, items: Sequence[tuple[str, float, float, int]]
) -> list[list[Job]]:
    return [_claim_some(cx, *item) for item in items]


def _claim_some(
    cx: sqlite3.Connection, provider: str, now: float, hold_until: float, most: int
) -> list[Job]:
    params = {"provider": provider, "now": now, "hold_until": hold_until, "most": most}
    return [to.job(row) for row in cx.execute(q.CLAIM_DUE, params).fetchall()]


def hasten(cx: sqlite3.Connection, items: Sequence[tuple[str, float]]) -> list[None]:
    for provider, now in items:
        cx.execute(q.HASTEN_LOOKS, {"provider": provider, "now": now})
    return [None] * len(items)


def mark_cancel(cx: sqlite3.Connection, items: Sequence[str]) -> list[None]:
    cx.executemany(q.MARK_CANCEL, [(item,) for item in items])
    return [None] * len(items)


def recover(cx: sqlite3.Connection, items: Sequence[tuple[str, float]]) -> list[None]:
    for owner, now in items:
        cx.execute(q.DOUBT_ABANDONED_SUBMITS, {"now": now})
        params = {"owner": owner, "now": now, "everyone": True, "reason": "its process died"}
        cx.execute(q.RECLAIM, params).fetchall()
    return [None] * len(items)


def accept(cx: sqlite3.Connection, items: Sequence[Arrival]) -> list[Taken]:
    """Rule on every arrival in order, then write all their consequences in four statements."""
    known = _known(cx, (item.prediction_id for item in items))
    batch = _Batch()
    taken = [_rule(known, item, batch) for item in items]
    batch.write(cx)
    return taken


def _known(cx: sqlite3.Connection, ids: Iterable[str]) -> dict[str, Known]:
    text = cx.execute(q.SELECT_KNOWN, {"rows": _text(list(ids))}).fetchone()[0]
    return {row.id: row for row in msgspec.json.decode(text, type=list[Known])}


def _rule(known: dict[str, Known], arrival: Arrival, batch: _Batch) -> Taken:
    before = known.get(arrival.prediction_id)
    if before is None:
        if arrival.channel is not None:
            batch.keep(arrival, "unknown", "no such prediction")
        return Taken("unknown", None, "no such prediction")
    if arrival.only_from is not None and before.status not in arrival.only_from:
        return Taken("late", before.status, f"already {before.status}")
    ruling = arrival.judge(before, arrival)
    if ruling.verdict != "mismatch":
        batch.add(arrival, ruling)
        provider_id = before.provider_id or arrival.outcome.provider_id
        known[before.id] = msgspec.structs.replace(
            before, status=ruling.status, provider_id=provider_id
        )
    made = None if ruling.event_type is None else event_id(before.id)
    return Taken(ruling.verdict, ruling.status, ruling.reason, made, ruling.handlers)


class _Batch:
    """Rows to be written together."""

    def __init__(self) -> None:
        self._callbacks: list[tuple[Any, ...]] = []
        self._large_callbacks: list[tuple[Any, ...]] = []
        self._ends: list[tuple[Any, ...]] = []
        self._events: list[tuple[Any, ...]] = []
        self._deliveries: list[tuple[Any, ...]] = []
        self._notes: list[dict[str, Any]] = []

    def add(self, arrival: Arrival, ruling: Ruling) -> None:
        # "Still running", as a poll says it again and again, is not evidence of anything.
        if arrival.channel is not None and (
            ruling.verdict != "noted" or arrival.channel == "webhook"
        ):
            self.keep(arrival, ruling.verdict, ruling.reason)
        if ruling.verdict == "accepted":
            self._end(arrival, ruling)
        elif ruling.verdict in {"ask", "noted"}:
            # A look that ends in the wish to look again falls due as every other look does.
            asked = ruling.verdict == "ask" and arrival.channel != "poll"
            self._notes.append(
                {
                    "id": arrival.prediction_id,
                    "status": ruling.status,
                    "provider_id": arrival.outcome.provider_id,
                    "due_at": arrival.at if asked else None,
                }
            )

    def keep(self, arrival: Arrival, verdict: str, reason: str) -> None:
        body = arrival.body if verdict != "duplicate" else b""
        digest = blake2b(arrival.body, digest_size=16).hexdigest()
        try:
            text = body.decode() if b"\0" not in body else None
        except UnicodeDecodeError:
            text = None
        head = (arrival.prediction_id, arrival.channel, digest, arrival.at, arrival.headers)
        if text is None or len(body) > _LARGEST_INLINE_BODY:
            value = body if text is None else text
            self._large_callbacks.append((*head, value, verdict, reason))
        else:
            self._callbacks.append((*head, text, verdict, reason))

    def _end(self, arrival: Arrival, ruling: Ruling) -> None:
        outcome = arrival.outcome
        error = outcome.error
        self._ends.append(
            (
                arrival.prediction_id,
                ruling.status,
                outcome.provider_id,
                _text(outcome.output) if ruling.status is Status.SUCCEEDED else None,
                error.code if error else None,
                error.message if error else None,
                arrival.channel,
                arrival.at,
            )
        )
        self._events.append((arrival.prediction_id, ruling.event_type, arrival.at, arrival.channel))
        self._deliveries.extend(
            (delivery_id(arrival.prediction_id, name), arrival.prediction_id, name, arrival.at)
            for name in ruling.handlers
        )

    def write(self, cx: sqlite3.Connection) -> None:
        # The large first: their repeats in the same batch are small, having no body, and the first
        # row of a digest is the one that is kept.
        if self._large_callbacks:
            cx.executemany(q.INSERT_CALLBACK, self._large_callbacks)
        for sql, rows in (
            (q.INSERT_CALLBACKS, self._callbacks),
            (q.END_PREDICTIONS, self._ends),
            (q.INSERT_EVENTS, self._events),
            (q.INSERT_DELIVERIES, self._deliveries),
        ):
            if rows:
                cx.execute(sql, {"rows": _text(rows)})
        if self._notes:
            cx.executemany(q.NOTE_PREDICTION, self._notes)


def claim(cx: sqlite3.Connection, items: Sequence[Wanted]) -> list[Claims]:
    return [_claim_for(cx, wanted) for wanted in items]


def _claim_for(cx: sqlite3.Connection, wanted: Wanted) -> Claims:
    params = msgspec.structs.asdict(wanted) | {"largest": _LARGEST_RAW}
    text = cx.execute(q.SELECT_WANTED, params).fetchone()[0]
    claims = [to.claimed(row, wanted.handler) for row in msgspec.json.decode(text)]
    if claims:
        params["rows"] = _text([claim.id for claim in claims])
        cx.execute(q.CLAIM_DELIVERIES, params)
    next_due = None
    if len(claims) < wanted.most:
        next_due = cx.execute(q.NEXT_PENDING, (wanted.handler,)).fetchone()[0]
    return Claims(claims, next_due)


def settle(cx: sqlite3.Connection, items: Sequence[Settlement]) -> list[bool]:
    params = {"rows": _text([_settlement_row(item) for item in items])}
    held = msgspec.json.decode(cx.execute(q.SELECT_HELD, params).fetchone()[0])
    cx.execute(q.INSERT_ATTEMPTS, params)
    cx.execute(q.SETTLE_DELIVERIES, params)
    mine = {(delivery_id, number) for delivery_id, number in held}
    return [(item.id, item.number) in mine for item in items]


def _settlement_row(item: Settlement) -> tuple[Any, ...]:
    pending = item.decision.state == "pending"
    return (
        item.id,
        item.owner,
        item.number,
        item.started_at,
        item.ended_at,
        item.result,
        item.decision.reason,
        item.decision.state,
        item.ended_at + item.decision.delay if pending else None,
        None if pending else item.ended_at,
    )


def release(cx: sqlite3.Connection, items: Sequence[tuple[str, float]]) -> list[None]:
    for owner, now in items:
        cx.execute(q.RELEASE_DELIVERIES, {"owner": owner, "now": now})
    return [None] * len(items)


def renew(cx: sqlite3.Connection, items: Sequence[tuple[str, list[str], float]]) -> list[None]:
    for owner, ids, lease_until in items:
        params = {"owner": owner, "lease_until": lease_until, "rows": _text(ids)}
        cx.execute(q.RENEW_LEASES, params)
    return [None] * len(items)


def reclaim(cx: sqlite3.Connection, items: Sequence[tuple[str, float]]) -> list[list[str]]:
    found = []
    for owner, now in items:
        params = {"owner": owner, "now": now, "everyone": False, "reason": "its lease ran out"}
        found.append([row[0] for row in cx.execute(q.RECLAIM, params).fetchall()])
    return found


_Replay = tuple[str, Callable[[Known, str], Sequence[str]], float]


def replay(cx: sqlite3.Connection, items: Sequence[_Replay]) -> list[Replayed]:
    return [_replay_one(cx, *item) for item in items]


def _replay_one(
    cx: sqlite3.Connection,
    prediction_id: str,
    match: Callable[[Known, str], Sequence[str]],
    now: float,
) -> Replayed:
    event = cx.execute(q.SELECT_EVENT_TYPE, (prediction_id,)).fetchone()
    if event is None:
        return Replayed(None)
    known = _known(cx, [prediction_id])[prediction_id]
    rows = [
        (delivery_id(prediction_id, name), prediction_id, name, now)
        for name in match(known, event[0])
    ]
    owed = cx.execute(q.REPLAY_DELIVERIES, {"rows": _text(rows)}).fetchall()
    cx.execute(q.FORGET_STEPS, {"rows": _text([row[0] for row in owed])})
    return Replayed(len(owed), tuple(handler for _, handler in owed))


def retry(cx: sqlite3.Connection, items: Sequence[tuple[str, float]]) -> list[str | None]:
    return [_retry_one(cx, {"id": delivery_id, "now": now}) for delivery_id, now in items]


def _retry_one(cx: sqlite3.Connection, params: dict[str, Any]) -> str | None:
    for sql in (q.RETRY_DELIVERY, q.HASTEN_DELIVERY):
        rows = cx.execute(sql, params).fetchall()
        if rows:
            return str(rows[0][0])
    return None


def remember(cx: sqlite3.Connection, items: Sequence[tuple[str, str, str]]) -> list[None]:
    cx.executemany(q.INSERT_STEP, items)
    return [None] * len(items)


def probe(cx: sqlite3.Connection, items: Sequence[float]) -> list[None]:
    cx.execute(q.PROBE, (items[-1], items[-1]))
    return [None] * len(items)
