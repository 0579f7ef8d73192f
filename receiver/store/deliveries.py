"""Deliveries: claimed, settled, released, reclaimed and redelivered; and what handlers keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final, TypeAlias

import msgspec

from receiver.model.answers import AttemptRecord, Delivery, Page
from receiver.model.errors import Unreadable
from receiver.model.ids import delivery_id
from receiver.model.retry import Decision
from receiver.model.tolerant import read_json
from receiver.model.values import Event, Recipients, utc
from receiver.store.engine import Engine
from receiver.store.inbox import CurrentState, current_states, waiting_row
from receiver.store.paging import listed, page_of, rfc3339
from receiver.store.predictions import Annotation, add, prediction_of
from receiver.store.statement import News, Row, Run, Statements, Steps, Write, in_order

sql: Final = Statements("deliveries")


class ClaimRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A lane's wish for work."""

    handler: str
    owner: str
    most: int
    now: float
    lease_until: float


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """One claimed delivery, with all that its handler needs."""

    id: str
    handler: str
    attempt: int
    """1-based, of this round."""
    round: int
    """How often the delivery was replayed."""
    number: int
    """Counts every claim of this delivery, ever; settles of older claims change nothing."""
    event: Event
    trace: str | None = None
    """The W3C traceparent of the span that its prediction was submitted in, where there was one."""


class Claims(msgspec.Struct, frozen=True):
    """Claimed work, and when the next of this handler falls due (None: nothing waits)."""

    claims: list[Claim]
    next_due: float | None
    lost: list[LostAttempt] = []
    """Attempts that were found to have died with their process."""


class Settlement(msgspec.Struct, frozen=True, kw_only=True):
    """The end of one attempt."""

    id: str
    owner: str
    number: int
    decision: Decision
    result: str
    """The word for the attempt itself: `done`, or a Failure's kind."""
    note: str = ""
    """What the handler wanted kept of the attempt."""
    started_at: float
    ended_at: float


class LostAttempt(msgspec.Struct, frozen=True):
    """An attempt whose process is gone: its claim was taken back, its delivery is pending again."""

    delivery: str
    handler: str
    prediction_id: str
    provider: str
    provider_id: str | None
    channel: str | None
    attempt: int
    reason: str
    seconds: float
    """From its claim to its being taken back."""


class Released(msgspec.Struct, frozen=True):
    """What became of an owner's claims when it stopped."""

    ids: list[str]
    """All that are pending again."""
    lost: list[LostAttempt]
    """Those of them whose attempt counts, as stops have cut them short too often."""


class ReplayResult(msgspec.Struct, frozen=True):
    """How many deliveries of an event are redelivered; None: there is no event yet."""

    pending: int | None
    handlers: tuple[str, ...] = ()
    erased: bool = False
    """There is nothing left of the event to hand to a handler."""


HEX: Final = "\\x"
"""What stands before the bytes of a body that is no text, where rows travel as JSON."""
LARGEST_RAW: Final = 4 * 1024 * 1024
"""Characters of a provider's payload up to which a handler is given it."""
_RAN_OUT: Final = "its lease ran out"
_CUT_SHORT: Final = "a stop cut it short once more"
_MOST_GIVEN_BACK: Final = 3
"""How often in its life stops may cut a delivery short without one of its attempts being spent."""


def claim(items: Sequence[ClaimRequest]) -> Steps[list[Claims]]:
    """Claim for lanes whose queue is the rows themselves."""
    results = []
    for wanted in items:
        params = msgspec.structs.asdict(wanted) | {"largest": LARGEST_RAW}
        claims = [claim_of(row, wanted.handler) for row in (yield Run(sql.select_wanted, params))]
        if claims:
            yield Run(sql.claim_deliveries, params, [(claim.id,) for claim in claims])
        next_due = None
        if len(claims) < wanted.most:
            [[next_due]] = yield Run(sql.next_pending, params)
        results.append(Claims(claims, next_due))
    return results


def settle(items: Sequence[Settlement]) -> Steps[list[bool]]:
    rows = [_settlement_row(item) for item in items]
    found = yield Run(sql.select_held, rows=rows)
    yield Write([(sql.insert_attempts, rows), (sql.settle_deliveries, rows)])
    awaited = {prediction_id for _, _, prediction_id, is_awaited in found if is_awaited}
    if awaited:
        yield from _let_go(sorted(awaited), max(item.ended_at for item in items))
    held = {(row[0], row[1]) for row in found}
    return [(item.id, item.number) in held for item in items]


def _let_go(predictions: Sequence[str], now: float) -> Steps[None]:
    """Make due what waited for deliveries that have all ended."""
    found = yield Run(sql.select_waiting, rows=[(prediction,) for prediction in predictions])
    waiting = {
        row[0]: {delivery_id(row[1], name) for name in msgspec.json.decode(row[2])} for row in found
    }
    wanted = sorted({name for names in waiting.values() for name in names})
    unended = {row[0] for row in (yield Run(sql.select_unended, rows=[(name,) for name in wanted]))}
    free = [(name,) for name, others in waiting.items() if not others & unended]
    if free:
        pending = yield Run(sql.stop_waiting, {"now": now}, free)
        yield Write([], News([(row[0], row[1]) for row in pending]))


def let_go(items: Sequence[tuple[float, str, int]]) -> Steps[list[str]]:
    """Make due what waits for what has ended already, as a replay may that met that very end.

    The items are now, the prediction after which to look, and at how many at most; the results are
    where to go on.
    """
    results = []
    for now, cursor, most in items:
        found = yield Run(sql.select_with_waiting, {"cursor": cursor, "most": most})
        predictions = [row[0] for row in found]
        if predictions:
            yield from _let_go(predictions, now)
        results.append(predictions[-1] if len(predictions) == most else "")
    return results


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
        item.note,
        item.decision.state,
        item.ended_at + item.decision.delay if pending else None,
        None if pending else item.ended_at,
    )


def release(items: Sequence[tuple[str, float]]) -> Steps[list[Released]]:
    """Make pending what its owner runs; of what was given back too often the attempt is lost."""
    results = []
    for owner, now in items:
        params = {"owner": owner, "now": now}
        given_back = yield Run(sql.release_deliveries, params | {"most": _MOST_GIVEN_BACK})
        rest = yield Run(sql.reclaim_own, params | {"reason": _CUT_SHORT})
        lost = yield from record_lost(rest, now)
        results.append(Released([row[0] for row in (*given_back, *rest)], lost))
    return results


def renew(items: Sequence[tuple[str, list[str], float]]) -> Steps[list[list[str]]]:
    results = []
    for owner, ids, lease_until in items:
        params = {"owner": owner, "lease_until": lease_until}
        renewed = yield Run(sql.renew_leases, params, [(delivery_id,) for delivery_id in ids])
        results.append([row[0] for row in renewed])
    return results


def reclaim(items: Sequence[tuple[str, float]]) -> Steps[list[list[LostAttempt]]]:
    """Make pending again what has no owner any more."""
    results = []
    for owner, now in items:
        params = {"owner": owner, "now": now, "everyone": False, "reason": _RAN_OUT}
        results.append((yield from record_lost((yield Run(sql.reclaim, params)), now)))
    return results


def reclaim_all(owner: str, now: float) -> Steps[list[LostAttempt]]:
    """Make every claim of other processes pending again: there is no other process."""
    params = {"owner": owner, "now": now, "everyone": True, "reason": "its process died"}
    return (yield from record_lost((yield Run(sql.reclaim, params)), now))


def reclaim_these(items: Sequence[tuple[Sequence[str], float]]) -> Steps[list[list[LostAttempt]]]:
    """Make pending again those of some deliveries that have no owner any more."""
    results = []
    for ids, now in items:
        params = {"now": now, "reason": _RAN_OUT}
        found = yield Run(sql.reclaim_these, params, [(delivery_id,) for delivery_id in ids])
        results.append((yield from record_lost(found, now)))
    return results


def record_lost(found: Sequence[Row], now: float) -> Steps[list[LostAttempt]]:
    """Record the attempts of claims that were just taken back."""
    if not found:
        return []
    yield Run(sql.insert_lost, {"now": now}, found)
    yield Run(sql.end_lost_probes, rows=found)
    return [LostAttempt(*row) for row in (yield Run(sql.select_lost, {"now": now}, found))]


_Match: TypeAlias = Callable[[CurrentState, str], Recipients]
_Replay: TypeAlias = tuple[str, _Match, float]


def replay(items: Sequence[_Replay]) -> Steps[list[ReplayResult]]:
    return (yield from in_order(items, itemgetter(0), _replay_one))


def _replay_one(item: _Replay) -> Steps[ReplayResult]:
    prediction_id, match, now = item
    known = (yield from current_states([prediction_id])).get(prediction_id)
    if known is None or not (yield Run(sql.select_event_type, {"prediction_id": prediction_id})):
        return ReplayResult(None)
    if known.erased:
        return ReplayResult(0, erased=True)
    pending = yield from redeliver(
        [prediction_id], lambda known, event_type, _: match(known, event_type), now, None
    )
    return ReplayResult(len(pending), tuple(handler for _, handler in pending))


Choose: TypeAlias = Callable[[CurrentState, str, Mapping[str, str]], Recipients]
"""Names the handlers that get an event again, given its type and its deliveries' states by handler.

Whatever it says, a delivery that is pending or running stays as it is.
"""


def redeliver(
    predictions: Sequence[str], choose: Choose, now: float, replay_id: str | None
) -> Steps[list[tuple[str, str]]]:
    """Redeliver the events of predictions; return the deliveries (id, handler) made pending."""
    known = yield from current_states(predictions)
    found = yield Run(sql.select_replayable, rows=[(name,) for name in predictions])
    events: dict[str, tuple[str, dict[str, str]]] = {}
    for prediction_id, event_type, handler, state in found:
        _, states = events.setdefault(prediction_id, (event_type, {}))
        if handler is not None:
            states[handler] = state
    free: list[tuple[Any, ...]] = []
    waiting: list[tuple[Any, ...]] = []
    for prediction_id, (event_type, states) in events.items():
        wanted = choose(known[prediction_id], event_type, states)
        for name in wanted.handlers:
            key = (delivery_id(prediction_id, name), prediction_id, name, now)
            if after := wanted.after.get(name):
                waiting.append((*key, *waiting_row(after, now)))
            else:
                free.append((*key, now, "[]", "replayed"))
    # Those that wait come last: whoever ends what they wait for locks in this order too.
    rows = [*sorted(free), *sorted(waiting)]
    if not rows:
        return []
    made = yield Run(sql.replay_deliveries, {"replay_id": replay_id}, rows)
    pending = [(row[0], row[1]) for row in made]
    if pending:
        yield Run(sql.forget_steps, rows=[(delivery,) for delivery, _ in pending])
        of_prediction = {row[0]: row[1] for row in rows}
        routed = sorted({of_prediction[delivery] for delivery, _ in pending})
        yield Run(sql.mark_matched, rows=[(name,) for name in routed])
        held = {row[0] for row in waiting}
        yield Write([], News([one for one in pending if one[0] not in held]))
    return pending


def retry(items: Sequence[tuple[str, float]]) -> Steps[list[str | None]]:
    return (yield from in_order(items, itemgetter(0), _retry_one))


def _retry_one(item: tuple[str, float]) -> Steps[str | None]:
    wanted, now = item
    params = {"id": wanted, "now": now}
    pending: list[Row] = []
    erased = yield Run(sql.select_erased, params)
    if erased and not erased[0][0]:
        pending = (yield Run(sql.retry_delivery, params)) or (
            yield Run(sql.hasten_delivery, params)
        )
    if not pending:
        return None
    [[delivery, handler]] = pending
    yield Write([], News([(delivery, handler)]))
    return str(handler)


def remember(items: Sequence[tuple[str, str, str]]) -> Steps[list[None]]:
    for delivery, key, result in sorted(items):
        params = {"delivery_id": delivery, "key": key, "result": result}
        yield Run(sql.insert_step, params)
    return [None] * len(items)


def delivery_of(row: Sequence[Any]) -> Delivery:
    *head, created_at, due_at, ended_at, history = row
    names = (
        "id",
        "event_id",
        "prediction_id",
        "handler",
        "state",
        "attempts",
        "round",
        "replay_id",
        "reason",
    )
    return Delivery(
        **dict(zip(names, head, strict=True)),
        created_at=rfc3339(created_at),
        due_at=None if due_at is None else rfc3339(due_at),
        ended_at=None if ended_at is None else rfc3339(ended_at),
        history=[
            AttemptRecord(
                **attempt | {name: rfc3339(attempt[name]) for name in ("started_at", "ended_at")}
            )
            for attempt in sorted(msgspec.json.decode(history or "[]"), key=itemgetter("number"))
        ],
    )


def claim_of(row: Sequence[Any], handler: str) -> Claim:
    delivery_id, attempt, rounds, number, event_id, kind, time, channel, *rest, trace, raw = row
    return Claim(
        id=delivery_id,
        handler=handler,
        attempt=attempt,
        round=rounds,
        number=number,
        event=Event(
            id=event_id,
            type=kind,
            time=utc(time),
            channel=channel,
            prediction=prediction_of(rest),
            raw=None if raw is None else _payload(raw),
        ),
        trace=trace,
    )


def _payload(body: str | bytes) -> Any:
    """Decode what a provider sent; a refusal may be a web page, and is given as it is."""
    if isinstance(body, str) and body.startswith(HEX):
        body = bytes.fromhex(body.removeprefix(HEX))
    try:
        return read_json(body)
    except Unreadable:
        return body if isinstance(body, str) else _readable(body)


def _readable(body: bytes) -> str | None:
    """Return bytes that are text as text; others mean nothing to a handler."""
    try:
        return None if b"\0" in body else body.decode()
    except UnicodeDecodeError:
        return None


class DeliveryStore:
    """The deliveries of one store."""

    def __init__(self, store: Engine) -> None:
        self._store = store

    async def replay(
        self, prediction_id: str, match: Callable[[CurrentState, str], Recipients], now: float
    ) -> ReplayResult:
        """Make the event of a prediction pending again for its matching handlers."""
        return await self._store.write(replay, (prediction_id, match, now))

    async def retry(self, delivery_id: str, now: float) -> str | None:
        """Make a dead or skipped delivery pending again, or a pending one due; name its handler."""
        return await self._store.write(retry, (delivery_id, now))

    async def page(self, limit: int, **given: str | None) -> Page[Delivery]:
        """List by any of: state, handler, prediction, id, cursor."""
        rows = await listed(self._store, sql.lists["list_deliveries"], given, limit)
        return page_of([delivery_of(row) for row in rows], limit)

    async def pending(self) -> dict[str, int]:
        """Count pending deliveries by handler."""
        return {row[0]: row[1] for row in await self._store.read(sql.count_pending)}

    async def recall(self, delivery_id: str, key: str) -> str | None:
        """Return the remembered result of a handler's sub-step, as JSON."""
        rows = await self._store.read(sql.select_step, delivery_id=delivery_id, key=key)
        return rows[0][0] if rows else None

    async def annotate(self, annotation: Annotation) -> None:
        """Add to a prediction what a handler found or did; doing it twice changes nothing."""
        await self._store.write(add, annotation)

    async def remember(self, delivery_id: str, key: str, result: str) -> None:
        await self._store.write(remember, (delivery_id, key, result))

    async def finish_waiting(self, now: float, cursor: str, most: int) -> str:
        """Make due what waits for deliveries that have ended already; return where to go on."""
        return await self._store.write(let_go, (now, cursor, most))
