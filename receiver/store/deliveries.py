"""Deliveries: claimed, settled, released, reclaimed and redelivered; and handlers' stored steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from receiver.model.answers import AttemptRecord, Delivery, Page
from receiver.model.errors import Unreadable
from receiver.model.ids import delivery_id
from receiver.model.retry import Decision
from receiver.model.tolerant import read_json
from receiver.model.values import Event, Recipients, utc
from receiver.store.backlog import BacklogReader
from receiver.store.engine import Repository, each
from receiver.store.inbox import CurrentState, Match, current_states, waiting_row
from receiver.store.paging import listed, page_of, rfc3339
from receiver.store.predictions import Annotation, annotate, prediction_of
from receiver.store.statement import News, Row, Run, Statements, Steps, Write, short

sql: Final = Statements("deliveries")


class ClaimRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request of a handler's worker for deliveries."""

    handler: str
    owner: str
    most: int
    now: float
    lease_until: float
    only: tuple[str, ...] = ()
    """The ids of deliveries of that handler; empty: those that have been due for longest."""


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """One claimed delivery, with all that its handler needs."""

    id: str
    handler: str
    attempt: int
    """1-based number of the attempt in this round."""
    round: int
    """How many times the delivery was replayed."""
    number: int
    """Number of the claim over all rounds; settlements of older claims change nothing."""
    event: Event
    trace: str | None = None
    """The W3C traceparent of the span that its prediction was submitted in, if there was one."""
    private: str | None = None
    """The private content of its prediction, for handlers only, encrypted by `Seals`."""


class Claims(msgspec.Struct, frozen=True):
    """Claimed deliveries, and when to claim again."""

    claims: list[Claim]
    next_due: float | None
    """When the handler's next delivery falls due, or now if that was not read; None: there is no
    other, or only some or as many as wanted were claimed."""
    lost: list[LostAttempt] = []
    """Attempts that were found to have ended with their process."""


class Settlement(msgspec.Struct, frozen=True, kw_only=True):
    """The end of one attempt."""

    id: str
    owner: str
    number: int
    decision: Decision
    result: str
    """The result of the attempt itself: `done`, or a Failure's kind."""
    note: str = ""
    """The handler's note on the attempt."""
    started_at: float
    ended_at: float


class LostAttempt(msgspec.Struct, frozen=True):
    """An attempt whose process is gone: its delivery is pending again."""

    delivery: str
    handler: str
    prediction_id: str
    provider: str
    provider_id: str | None
    channel: str | None
    attempt: int
    number: int
    """Number of the claim over all rounds of the delivery."""
    reason: str
    seconds: float
    """Seconds from the claim until it was taken back."""


class Released(msgspec.Struct, frozen=True):
    """The result of giving back an owner's claims."""

    ids: list[str]
    """All deliveries that are pending again."""
    lost: list[LostAttempt]
    """Those of them whose attempt counts, as stops have interrupted them too often."""


class ReleaseRequest(NamedTuple):
    """A request of an owner to make its claims pending again."""

    owner: str
    now: float
    only: tuple[str, ...] = ()
    """The ids of the deliveries; empty: all."""


class ReplayResult(msgspec.Struct, frozen=True):
    """How many deliveries of an event are redelivered; None: there is no event yet."""

    pending: int | None
    handlers: tuple[str, ...] = ()
    erased: bool = False
    """Whether the prediction was erased, so that there is nothing to deliver."""


HEX: Final = "\\x"
"""Prefix of a body in hex, which is not text: rows are passed as JSON."""
LARGEST_RAW: Final = 4 * 1024 * 1024
"""Most characters of a provider's payload that a handler gets; a larger one is left out."""
_RAN_OUT: Final = "its lease ran out"
_CUT_SHORT: Final = "a stop cut it short once more"
_MOST_GIVEN_BACK: Final = 3
"""How many times a stop may interrupt a delivery without using up one of its attempts."""


@each()
def claim(wanted: ClaimRequest) -> Steps[Claims]:
    """Claim due deliveries, for a store whose rows themselves are the queue."""
    params = msgspec.structs.asdict(wanted) | {"largest": LARGEST_RAW}
    if wanted.only:
        found = yield Run(sql.select_these, params, [(name,) for name in wanted.only])
    else:
        found = yield Run(sql.select_wanted, params)
    claims = [claim_of(row, wanted.handler) for row in found]
    if claims:
        yield Run(sql.claim_deliveries, params, [(claim.id,) for claim in claims])
    next_due = None
    if len(claims) < wanted.most and not wanted.only:
        [row] = yield Run(sql.next_pending, params)
        next_due = row["due_at"]
    return Claims(claims, next_due)


@short()
def settle(items: Sequence[Settlement]) -> Steps[list[bool]]:
    rows = [_settlement_row(item) for item in items]
    found = yield Run(sql.select_held, rows=rows)
    yield Write([(sql.insert_attempts, rows), (sql.settle_deliveries, rows)])
    awaited = {row["prediction_id"] for row in found if row["is_awaited"]}
    if awaited:
        yield from _release_waiting(sorted(awaited), max(item.ended_at for item in items))
    held = {(row["id"], row["claims"]) for row in found}
    return [(item.id, item.number) in held for item in items]


def _release_waiting(predictions: Sequence[str], now: float) -> Steps[None]:
    """Make waiting deliveries due if all the deliveries that they wait for have ended."""
    found = yield Run(sql.select_waiting, rows=[(prediction,) for prediction in predictions])
    waiting = {
        row["id"]: {
            delivery_id(row["prediction_id"], name) for name in msgspec.json.decode(row["after"])
        }
        for row in found
    }
    wanted = sorted({name for names in waiting.values() for name in names})
    found = yield Run(sql.select_unended, rows=[(name,) for name in wanted])
    unended = {row["id"] for row in found}
    free = [(name,) for name, others in waiting.items() if not others & unended]
    if free:
        pending = yield Run(sql.stop_waiting, {"now": now}, free)
        yield Write([], News([(row["id"], row["handler"]) for row in pending]))


@each()
def release_waiting(item: tuple[float, str, int]) -> Steps[str]:
    """Make deliveries due that wait only for ended ones; a replay can leave such.

    An item is the time, the prediction after which to begin, and the most predictions to check; a
    result is the prediction after which to continue, empty at the end.
    """
    now, cursor, most = item
    found = yield Run(sql.select_with_waiting, {"cursor": cursor, "most": most})
    predictions = [row["prediction_id"] for row in found]
    if predictions:
        yield from _release_waiting(predictions, now)
    return predictions[-1] if len(predictions) == most else ""


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


@each()
def release(item: ReleaseRequest) -> Steps[Released]:
    """Make an owner's claims pending; if one was given back too often, its attempt counts."""
    owner, now, only = item
    params = {"owner": owner, "now": now, "everything": not only}
    rows = [(name,) for name in only]
    given_back = yield Run(sql.release_deliveries, params | {"most": _MOST_GIVEN_BACK}, rows)
    rest = yield Run(sql.reclaim_own, params | {"reason": _CUT_SHORT}, rows)
    lost = yield from record_lost(rest, now)
    return Released([row["id"] for row in (*given_back, *rest)], lost)


@each()
def renew(item: tuple[str, list[str], float]) -> Steps[list[str]]:
    owner, ids, lease_until = item
    params = {"owner": owner, "lease_until": lease_until}
    renewed = yield Run(sql.renew_leases, params, [(delivery_id,) for delivery_id in ids])
    return [row["id"] for row in renewed]


@each()
def reclaim(item: tuple[str, float]) -> Steps[list[LostAttempt]]:
    """Make claims whose lease has expired pending again."""
    owner, now = item
    params = {"owner": owner, "now": now, "everyone": False, "reason": _RAN_OUT}
    return (yield from record_lost((yield Run(sql.reclaim, params)), now))


def reclaim_all(owner: str, now: float) -> Steps[list[LostAttempt]]:
    """Make all claims of earlier processes pending again; for a store of one process only."""
    params = {"owner": owner, "now": now, "everyone": True, "reason": "its process died"}
    return (yield from record_lost((yield Run(sql.reclaim, params)), now))


@each()
def reclaim_these(item: tuple[Sequence[str], float]) -> Steps[list[LostAttempt]]:
    """Make those of some deliveries whose lease has expired pending again."""
    ids, now = item
    params = {"now": now, "reason": _RAN_OUT}
    found = yield Run(sql.reclaim_these, params, [(delivery_id,) for delivery_id in ids])
    return (yield from record_lost(found, now))


def record_lost(found: Sequence[Row], now: float) -> Steps[list[LostAttempt]]:
    """Record and return the attempts of claims that were just taken back."""
    if not found:
        return []
    lost = [(row["id"],) for row in found]
    yield Run(sql.insert_lost, {"now": now}, lost)
    yield Run(sql.end_lost_probes, rows=lost)
    return [LostAttempt(**row) for row in (yield Run(sql.select_lost, {"now": now}, lost))]


@each(itemgetter(0))
def replay(item: tuple[str, Match, float]) -> Steps[ReplayResult]:
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
"""Selects the handlers that get an event again, by its type and its deliveries' states by handler.

A delivery that is pending or running stays as it is, selected or not.
"""


def redeliver(
    predictions: Sequence[str], choose: Choose, now: float, replay_id: str | None
) -> Steps[list[tuple[str, str]]]:
    """Redeliver the events of predictions; return the deliveries (id, handler) made pending."""
    known = yield from current_states(predictions)
    found = yield Run(sql.select_replayable, rows=[(name,) for name in predictions])
    events: dict[str, tuple[str, dict[str, str]]] = {}
    for row in found:
        _, states = events.setdefault(row["prediction_id"], (row["type"], {}))
        if row["handler"] is not None:
            states[row["handler"]] = row["state"]
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
    # Waiting deliveries come last: a settlement locks in this order too, so none can deadlock.
    rows = [*sorted(free), *sorted(waiting)]
    if not rows:
        return []
    made = yield Run(sql.replay_deliveries, {"replay_id": replay_id}, rows)
    pending = [(row["id"], row["handler"]) for row in made]
    if pending:
        yield Run(sql.forget_steps, rows=[(delivery,) for delivery, _ in pending])
        of_prediction = {delivery: prediction for delivery, prediction, *_ in rows}
        routed = sorted({of_prediction[delivery] for delivery, _ in pending})
        yield Run(sql.mark_matched, rows=[(name,) for name in routed])
        held = {delivery for delivery, *_ in waiting}
        yield Write([], News([one for one in pending if one[0] not in held]))
    return pending


@each(itemgetter(0))
def retry(item: tuple[str, float]) -> Steps[str | None]:
    wanted, now = item
    params = {"id": wanted, "now": now}
    pending: list[Row] = []
    erased = yield Run(sql.select_erased, params)
    if erased and not erased[0]["erased"]:
        pending = (yield Run(sql.retry_delivery, params)) or (
            yield Run(sql.hasten_delivery, params)
        )
    if not pending:
        return None
    [row] = pending
    yield Write([], News([(row["id"], row["handler"])]))
    return str(row["handler"])


def delivery_of(row: Row) -> Delivery:
    times = ("created_at", "due_at", "ended_at")
    history = sorted(msgspec.json.decode(row["history"] or "[]"), key=itemgetter("number"))
    return Delivery(
        **{
            **row,
            **{name: rfc3339(row[name]) for name in times},
            "history": [_attempt(attempt) for attempt in history],
        }
    )


def _attempt(row: Row) -> AttemptRecord:
    times = ("started_at", "ended_at")
    return AttemptRecord(**{**row, **{name: rfc3339(row[name]) for name in times}})


def claim_of(row: Row, handler: str) -> Claim:
    return Claim(
        id=row["delivery_id"],
        handler=handler,
        attempt=row["attempt"],
        round=row["round"],
        number=row["number"],
        event=Event(
            id=row["event_id"],
            type=row["event_type"],
            time=utc(row["event_time"]),
            channel=row["event_channel"],
            prediction=prediction_of(row),
            raw=None if row["raw"] is None else _payload(row["raw"]),
        ),
        trace=row["trace"],
        private=row["private"],
    )


def _payload(body: str | bytes) -> Any:
    """Return a provider's payload: decoded JSON, or text such as a web page, or None."""
    if isinstance(body, str) and body.startswith(HEX):
        body = bytes.fromhex(body.removeprefix(HEX))
    try:
        return read_json(body)
    except Unreadable:
        return body if isinstance(body, str) else _readable(body)


def _readable(body: bytes) -> str | None:
    """Return bytes as text; None if they are not text."""
    try:
        return None if b"\0" in body else body.decode()
    except UnicodeDecodeError:
        return None


class DeliveryStore(Repository):
    """The deliveries of one store."""

    async def replay(self, prediction_id: str, match: Match, now: float) -> ReplayResult:
        """Make the event of a prediction pending again for its matching handlers."""
        return await self._store.write(replay, (prediction_id, match, now))

    async def retry(self, delivery_id: str, now: float) -> str | None:
        """Make a dead or skipped delivery pending, or a pending one due; return its handler."""
        return await self._store.write(retry, (delivery_id, now))

    async def page(self, limit: int, **given: str | None) -> Page[Delivery]:
        """Return a page, filtered by any of: state, handler, prediction, id, cursor."""
        rows = await listed(self._store, sql.lists["list_deliveries"], given, limit)
        return page_of([delivery_of(row) for row in rows], limit)

    async def pending(self, *, few: bool = False) -> dict[str, int]:
        """Count pending deliveries by handler, up to 10,000 of each; `few`: up to 1,000."""
        backlog = BacklogReader(self._store)
        return (await (backlog.few([]) if few else backlog.depth([]))).of_handlers()

    async def recall(self, delivery_id: str, key: str) -> str | None:
        """Return the remembered result of a handler's sub-step, as JSON."""
        rows = await self._store.read(sql.select_step, delivery_id=delivery_id, key=key)
        return rows[0]["result"] if rows else None

    async def annotate(self, annotation: Annotation) -> None:
        """Add a handler's results to a prediction; repeating it changes nothing.

        Raises ValueError if the prediction's metadata would be too large.
        """
        await self._store.write(annotate, annotation)

    async def remember(self, delivery_id: str, key: str, result: str) -> str:
        """Store the result of a sub-step, unless one is stored; return the stored one."""
        rows = await self._store.run(
            sql.insert_step, delivery_id=delivery_id, key=key, result=result
        )
        return rows[0]["result"] if rows else result
