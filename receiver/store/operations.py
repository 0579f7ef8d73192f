"""What is written: one function for each operation, given all the items that wait for it.

Each is a generator that yields the steps of one transaction and knows no database; each engine
runs them in its own way. It returns one result an item, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from operator import itemgetter
from typing import Any, Final, TypeAlias

import msgspec

from receiver.model.ids import delivery_id, event_id
from receiver.model.values import Output, Status, Stored
from receiver.store import queries as q
from receiver.store import rows as to
from receiver.store.dialect import Item, News, Query, Result, Row, Run, Steps, Write
from receiver.store.values import (
    AcceptResult,
    Annotation,
    ClaimRequest,
    Claims,
    CreateResult,
    CurrentState,
    IncomingOutcome,
    Job,
    LeaseRequest,
    LostAttempt,
    NewPrediction,
    Progress,
    Recipients,
    ReplayResult,
    RequestPermit,
    Settlement,
    SubmitBatch,
    SubmitBudget,
    Transition,
)

LARGEST_RAW: Final = 4 * 1024 * 1024
"""Characters of a provider's payload up to which a handler is given it."""
LONGEST_WAIT: Final = 86400.0
"""Seconds after which a delivery waits no more for those of other handlers."""
_RAN_OUT: Final = "its lease ran out"
WINDOW: Final = 60.0
"""Seconds over which a provider's requests are counted; the window slides."""


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def create(items: Sequence[NewPrediction]) -> Steps[list[CreateResult]]:
    return (yield from _in_order(items, lambda new: (new.idempotency_key or "", new.id), _create))


def _in_order(
    items: Sequence[Item], key: Callable[[Item], Any], do: Callable[[Item], Steps[Result]]
) -> Steps[list[Result]]:
    """Do something for each item in the order of their keys, against circles of transactions."""
    results: dict[int, Result] = {}
    for place in sorted(range(len(items)), key=lambda place: key(items[place])):
        results[place] = yield from do(items[place])
    return [results[place] for place in range(len(items))]


def _create(new: NewPrediction) -> Steps[CreateResult]:
    row = msgspec.structs.asdict(new)
    row |= {"input": _text(new.input), "metadata": _text(new.metadata)}
    while not (yield Run(q.INSERT_PREDICTION, row)):
        # Whoever has the key may be deleted by another process between the two statements.
        for first in (yield Run(q.SELECT_BY_IDEMPOTENCY_KEY, row)):
            return CreateResult(first[0], is_new=False, fingerprint=first[1])
    return CreateResult(new.id, is_new=True, fingerprint=new.fingerprint)


def begin_submits(items: Sequence[SubmitBudget]) -> Steps[list[SubmitBatch]]:
    limited = (i.provider for i in items if (i.max_in_flight or i.per_minute) is not None)
    yield from _hold_limits(limited)
    results = []
    for slots in items:
        results.append((yield from _begin_some(slots)))  # noqa: PERF401 - a generator yields for it
    return results


def _hold_limits(providers: Iterable[str]) -> Steps[None]:
    """Let nobody else count what these providers still take; in one order, against circles."""
    for provider in sorted(set(providers)):
        yield Run(q.HOLD_LIMITS, {"provider": provider})


def _begin_some(slots: SubmitBudget) -> Steps[SubmitBatch]:
    provider = {"provider": slots.provider}
    most = slots.most
    wait = 0.0
    if slots.max_in_flight is not None:
        [[in_flight]] = yield Run(q.COUNT_IN_FLIGHT, provider)
        most = min(most, slots.max_in_flight - in_flight)
    if slots.per_minute is not None:
        room, wait = yield from _room(slots.provider, slots.now, slots.per_minute)
        most = min(most, room)
    if most <= 0:
        return SubmitBatch([], wait)
    params = msgspec.structs.asdict(slots)
    params |= {"most": most, "deadline": slots.now + slots.timeout}
    jobs = [to.job(row) for row in (yield Run(q.BEGIN_SUBMITS, params))]
    if jobs and slots.per_minute is not None:
        yield Run(q.INSERT_REQUESTS, {**provider, "now": slots.now, "requests": len(jobs)})
    return SubmitBatch(sorted(jobs, key=lambda job: job.ticket.id), wait)


def _room(provider: str, now: float, per_minute: int) -> Steps[tuple[int, float]]:
    """Say how many requests may be sent now, and in how many seconds there will be more."""
    params = {"provider": provider, "since": now - WINDOW}
    yield Run(q.FORGET_REQUESTS, params)
    [[sent, first]] = yield Run(q.COUNT_REQUESTS, params)
    room = per_minute - sent
    return room, 0.0 if room > 0 else first + WINDOW - now


def take_turns(items: Sequence[RequestPermit]) -> Steps[list[float]]:
    yield from _hold_limits(turn.provider for turn in items)
    results = []
    for turn in items:
        params = {"provider": turn.provider, "now": turn.now, "requests": 1}
        room, wait = yield from _room(turn.provider, turn.now, turn.per_minute)
        if room > 0:
            yield Run(q.INSERT_REQUESTS, params)
        results.append(wait)
    return results


_PROGRESS: Final = {
    "accepted": q.ACCEPT_SUBMIT,
    "postponed": q.POSTPONE_SUBMIT,
    "ambiguous": q.DOUBT_SUBMIT,
    "looked": q.LOOKED,
}


def progress(items: Sequence[Progress]) -> Steps[list[None]]:
    for item in sorted(items, key=lambda item: item.id):
        row = msgspec.structs.asdict(item) | {"links": _text(item.links)}
        yield Run(_PROGRESS[item.cause], row)
    return [None] * len(items)


def claim_due(items: Sequence[tuple[str, float, float, int]]) -> Steps[list[list[Job]]]:
    results = []
    for provider, now, hold_until, most in items:
        params = {"provider": provider, "now": now, "hold_until": hold_until, "most": most}
        results.append([to.job(row) for row in (yield Run(q.CLAIM_DUE, params))])
    return results


def hasten(items: Sequence[tuple[str, float]]) -> Steps[list[None]]:
    for provider, now in items:
        yield Run(q.HASTEN_LOOKS, {"provider": provider, "now": now})
    return [None] * len(items)


def mark_cancel(items: Sequence[str]) -> Steps[list[None]]:
    for item in sorted(items):
        yield Run(q.MARK_CANCEL, {"id": item})
    return [None] * len(items)


def recover(items: Sequence[tuple[str, float]]) -> Steps[list[list[LostAttempt]]]:
    results = []
    for owner, now in items:
        yield Run(q.DOUBT_ABANDONED_SUBMITS, {"now": now})
        params = {"owner": owner, "now": now, "everyone": True, "reason": "its process died"}
        results.append((yield from _lost((yield Run(q.RECLAIM, params)), now)))
    return results


def accept(items: Sequence[IncomingOutcome]) -> Steps[list[AcceptResult]]:
    """Rule on every arrival in order, then write all their consequences in a few statements."""
    known = yield from _known({item.prediction_id for item in items})
    batch = _Batch()
    taken = [_rule(known, item, batch) for item in items]
    yield from batch.write()
    return taken


def _known(ids: Iterable[str]) -> Steps[dict[str, CurrentState]]:
    found = yield Run(q.SELECT_KNOWN, rows=[(prediction_id,) for prediction_id in ids])
    return {
        row[0]: CurrentState(
            row[0], row[1], row[2], Status(row[3]), row[4], row[5], bool(row[6]), row[7]
        )
        for row in found
    }


def _rule(known: dict[str, CurrentState], arrival: IncomingOutcome, batch: _Batch) -> AcceptResult:
    before = known.get(arrival.prediction_id)
    if before is None:
        if arrival.channel is not None:
            batch.keep(arrival, "unknown", "no such prediction")
        return AcceptResult("unknown", None, "no such prediction")
    if arrival.only_from is not None and before.status not in arrival.only_from:
        return AcceptResult("late", before.status, f"already {before.status}")
    ruling = arrival.judge(before, arrival)
    provider_id = before.provider_id or arrival.outcome.provider_id
    if ruling.verdict != "mismatch":
        batch.add(arrival, ruling, content=not before.erased)
        known[before.id] = msgspec.structs.replace(
            before, status=ruling.status, provider_id=provider_id
        )
    made = None if ruling.event_type is None else event_id(before.id)
    seconds = None
    if made is not None and before.submitted_at is not None:
        seconds = max(arrival.at - before.submitted_at, 0.0)
    return AcceptResult(
        verdict=ruling.verdict,
        status=ruling.status,
        reason=ruling.reason,
        event_id=made,
        handlers=ruling.owed.handlers,
        model=before.model,
        provider_id=provider_id,
        seconds=seconds,
    )


class _Evidence:
    """A row of callbacks to be; the same bytes again in the batch only count."""

    def __init__(self, row: tuple[Any, ...], verdict: str, reason: str, provider: str) -> None:
        self.row = row
        self.provider = provider
        self.verdict = verdict
        self.reason = reason
        self.repeats = 0


class _Batch:
    """Rows to be written together."""

    def __init__(self) -> None:
        self._callbacks: dict[tuple[str, str, str], _Evidence] = {}
        self._ends: list[tuple[Any, ...]] = []
        self._events: list[tuple[Any, ...]] = []
        self._unrouted: list[tuple[Any, ...]] = []
        self._deliveries: list[tuple[Any, ...]] = []
        self._waiting: list[tuple[Any, ...]] = []
        self._notes: list[dict[str, Any]] = []

    def add(self, arrival: IncomingOutcome, ruling: Transition, *, content: bool) -> None:
        """Add what an arrival does; without `content` nothing of what it says is kept."""
        # "Still running", as a poll says it again and again, is not evidence of anything.
        if arrival.channel is not None and (
            ruling.verdict != "noted" or arrival.channel == "webhook"
        ):
            self.keep(arrival, ruling.verdict, ruling.reason, content=content)
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

    def keep(
        self, arrival: IncomingOutcome, verdict: str, reason: str, *, content: bool = True
    ) -> None:
        body = arrival.body if content and verdict != "duplicate" else b""
        headers = arrival.headers if content else "[]"
        digest = blake2b(arrival.body, digest_size=16).hexdigest()
        key = (arrival.prediction_id, arrival.channel or "", digest)
        evidence = self._callbacks.get(key)
        if evidence is None:
            row = (*key, arrival.at, headers, body)
            self._callbacks[key] = _Evidence(row, verdict, reason, arrival.provider)
        else:
            evidence.repeats += 1
            evidence.verdict = "accepted" if verdict == "accepted" else evidence.verdict

    def _end(self, arrival: IncomingOutcome, ruling: Transition) -> None:
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
        events = self._events if ruling.owed.handlers else self._unrouted
        events.append((arrival.prediction_id, ruling.event_type, arrival.at, arrival.channel))
        for name in ruling.owed.handlers:
            key = (delivery_id(arrival.prediction_id, name), arrival.prediction_id, name)
            if after := ruling.owed.after.get(name):
                self._waiting.append((*key, arrival.at, *_waits(after, arrival.at)))
            else:
                self._deliveries.append((*key, arrival.at))

    def write(self) -> Steps[None]:
        # In one order, so that two batches in two processes never wait for each other in a circle.
        callbacks: list[Row] = []
        unknown: list[Row] = []
        for _, evidence in sorted(self._callbacks.items(), key=itemgetter(0)):
            row = (*evidence.row, evidence.verdict, evidence.reason, evidence.repeats)
            if evidence.verdict == "unknown":
                unknown.append((*row, evidence.provider))
            else:
                callbacks.append(row)
        batches: list[tuple[Query, Sequence[Row]]] = [
            (q.INSERT_CALLBACKS, callbacks),
            (q.INSERT_UNKNOWN, unknown),
            (q.END_PREDICTIONS, self._ends),
            (q.INSERT_EVENTS, self._events),
            (q.INSERT_UNROUTED, self._unrouted),
            (q.INSERT_DELIVERIES, self._deliveries),
            (q.INSERT_WAITING, self._waiting),
        ]
        owed = [(row[0], row[2]) for row in self._deliveries]
        news = News(owed, [row[0] for row in self._ends]) if self._ends else None
        yield Write([(query, rows) for query, rows in batches if rows], news)
        for note in self._notes:
            yield Run(q.NOTE_PREDICTION, note)


def _waits(after: Sequence[str], now: float) -> tuple[float, str, str]:
    """Give the due time, the handlers and the reason of a delivery that waits for others."""
    return now + LONGEST_WAIT, _text(after), f"waits for {', '.join(after)}"


def claim(items: Sequence[ClaimRequest]) -> Steps[list[Claims]]:
    """Claim for lanes whose queue is the rows themselves."""
    results = []
    for wanted in items:
        params = msgspec.structs.asdict(wanted) | {"largest": LARGEST_RAW}
        claims = [to.claimed(row, wanted.handler) for row in (yield Run(q.SELECT_WANTED, params))]
        if claims:
            yield Run(q.CLAIM_DELIVERIES, params, [(claim.id,) for claim in claims])
        next_due = None
        if len(claims) < wanted.most:
            [[next_due]] = yield Run(q.NEXT_PENDING, params)
        results.append(Claims(claims, next_due))
    return results


def settle(items: Sequence[Settlement]) -> Steps[list[bool]]:
    rows = [_settlement_row(item) for item in items]
    found = yield Run(q.SELECT_HELD, rows=rows)
    yield Write([(q.INSERT_ATTEMPTS, rows), (q.SETTLE_DELIVERIES, rows)])
    awaited = {prediction_id for _, _, prediction_id, is_awaited in found if is_awaited}
    if awaited:
        yield from _let_go(sorted(awaited), max(item.ended_at for item in items))
    held = {(row[0], row[1]) for row in found}
    return [(item.id, item.number) in held for item in items]


def _let_go(predictions: Sequence[str], now: float) -> Steps[None]:
    """Make due what waited for deliveries that have all ended."""
    found = yield Run(q.SELECT_WAITING, rows=[(prediction,) for prediction in predictions])
    waiting = {
        row[0]: {delivery_id(row[1], name) for name in msgspec.json.decode(row[2])} for row in found
    }
    wanted = sorted({name for names in waiting.values() for name in names})
    unended = {row[0] for row in (yield Run(q.SELECT_UNENDED, rows=[(name,) for name in wanted]))}
    free = [(name,) for name, others in waiting.items() if not others & unended]
    if free:
        owed = yield Run(q.STOP_WAITING, {"now": now}, free)
        yield Write([], News([(row[0], row[1]) for row in owed]))


def let_go(items: Sequence[tuple[float, str, int]]) -> Steps[list[str]]:
    """Make due what waits for what has ended already, as a replay may that met that very end.

    The items are now, the prediction after which to look, and at how many at most; the results are
    where to go on.
    """
    results = []
    for now, cursor, most in items:
        found = yield Run(q.SELECT_WITH_WAITING, {"cursor": cursor, "most": most})
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


def release(items: Sequence[tuple[str, float]]) -> Steps[list[list[str]]]:
    results = []
    for owner, now in items:
        given_back = yield Run(q.RELEASE_DELIVERIES, {"owner": owner, "now": now})
        results.append([row[0] for row in given_back])
    return results


def renew(items: Sequence[tuple[str, list[str], float]]) -> Steps[list[list[str]]]:
    results = []
    for owner, ids, lease_until in items:
        params = {"owner": owner, "lease_until": lease_until}
        renewed = yield Run(q.RENEW_LEASES, params, [(delivery_id,) for delivery_id in ids])
        results.append([row[0] for row in renewed])
    return results


def reclaim(items: Sequence[tuple[str, float]]) -> Steps[list[list[LostAttempt]]]:
    """Owe again what has no owner any more."""
    results = []
    for owner, now in items:
        params = {"owner": owner, "now": now, "everyone": False, "reason": _RAN_OUT}
        results.append((yield from _lost((yield Run(q.RECLAIM, params)), now)))
    return results


def reclaim_these(items: Sequence[tuple[Sequence[str], float]]) -> Steps[list[list[LostAttempt]]]:
    """Owe again those of some deliveries that have no owner any more."""
    results = []
    for ids, now in items:
        params = {"now": now, "reason": _RAN_OUT}
        found = yield Run(q.RECLAIM_THESE, params, [(delivery_id,) for delivery_id in ids])
        results.append((yield from _lost(found, now)))
    return results


def _lost(found: Sequence[Row], now: float) -> Steps[list[LostAttempt]]:
    """Record the attempts of claims that were just taken back."""
    if not found:
        return []
    yield Run(q.INSERT_LOST, {"now": now}, found)
    yield Run(q.END_LOST_PROBES, rows=found)
    return [LostAttempt(*row) for row in (yield Run(q.SELECT_LOST, {"now": now}, found))]


_Match: TypeAlias = Callable[[CurrentState, str], Recipients]
_Replay: TypeAlias = tuple[str, _Match, float]


def replay(items: Sequence[_Replay]) -> Steps[list[ReplayResult]]:
    return (yield from _in_order(items, itemgetter(0), _replay_one))


def _replay_one(item: _Replay) -> Steps[ReplayResult]:
    prediction_id, match, now = item
    known = (yield from _known([prediction_id])).get(prediction_id)
    if known is None or not (yield Run(q.SELECT_EVENT_TYPE, {"prediction_id": prediction_id})):
        return ReplayResult(None)
    if known.erased:
        return ReplayResult(0, erased=True)
    owed = yield from owe_again(
        [prediction_id], lambda known, event_type, _: match(known, event_type), now, None
    )
    return ReplayResult(len(owed), tuple(handler for _, handler in owed))


Choose: TypeAlias = Callable[[CurrentState, str, Mapping[str, str]], Recipients]
"""Says to whom an event is owed again, given its type and the states of its deliveries by handler.

Whatever it says, a delivery that is pending or running stays as it is.
"""


def owe_again(
    predictions: Sequence[str], choose: Choose, now: float, replay_id: str | None
) -> Steps[list[tuple[str, str]]]:
    """Owe the events of predictions again; give the deliveries (id, handler) that are owed now."""
    known = yield from _known(predictions)
    found = yield Run(q.SELECT_REPLAYABLE, rows=[(name,) for name in predictions])
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
                waiting.append((*key, *_waits(after, now)))
            else:
                free.append((*key, now, "[]", "replayed"))
    # Those that wait come last: whoever ends what they wait for locks in this order too.
    rows = [*sorted(free), *sorted(waiting)]
    if not rows:
        return []
    made = yield Run(q.REPLAY_DELIVERIES, {"replay_id": replay_id}, rows)
    owed = [(row[0], row[1]) for row in made]
    if owed:
        yield Run(q.FORGET_STEPS, rows=[(delivery,) for delivery, _ in owed])
        of_prediction = {row[0]: row[1] for row in rows}
        routed = sorted({of_prediction[delivery] for delivery, _ in owed})
        yield Run(q.ROUTE_EVENTS, rows=[(name,) for name in routed])
        held = {row[0] for row in waiting}
        yield Write([], News([one for one in owed if one[0] not in held]))
    return owed


def retry(items: Sequence[tuple[str, float]]) -> Steps[list[str | None]]:
    return (yield from _in_order(items, itemgetter(0), _retry_one))


def _retry_one(item: tuple[str, float]) -> Steps[str | None]:
    wanted, now = item
    params = {"id": wanted, "now": now}
    owed: list[Row] = []
    erased = yield Run(q.SELECT_ERASED, params)
    if erased and not erased[0][0]:
        owed = (yield Run(q.RETRY_DELIVERY, params)) or (yield Run(q.HASTEN_DELIVERY, params))
    if not owed:
        return None
    [[delivery, handler]] = owed
    yield Write([], News([(delivery, handler)]))
    return str(handler)


def add(items: Sequence[Annotation]) -> Steps[list[None]]:
    for item in sorted(items, key=lambda item: item.prediction_id):
        prediction = {"id": item.prediction_id}
        for output, metadata in (yield Run(q.SELECT_RESULT, prediction)):
            outputs = None if output is None else _kept(output, item.stored)
            merged = msgspec.json.decode(metadata) | dict(item.metadata)
            row = {**prediction, "output": outputs, "metadata": _text(merged)}
            yield Run(q.UPDATE_RESULT, row)
    return [None] * len(items)


def _kept(output: str, stored: Mapping[int, Stored]) -> str:
    outputs = msgspec.json.decode(output, type=list[Output])
    return _text(
        [
            msgspec.structs.replace(item, stored=stored.get(place, item.stored))
            for place, item in enumerate(outputs)
        ]
    )


def remember(items: Sequence[tuple[str, str, str]]) -> Steps[list[None]]:
    for delivery, key, result in sorted(items):
        params = {"delivery_id": delivery, "key": key, "result": result}
        yield Run(q.INSERT_STEP, params)
    return [None] * len(items)


def try_write(items: Sequence[float]) -> Steps[list[None]]:
    yield Run(q.TRY_WRITE, {"now": items[-1]})
    return [None] * len(items)


def hold_role(items: Sequence[LeaseRequest]) -> Steps[list[bool]]:
    return (yield from _in_order(items, lambda item: item.name, _hold_role_one))


def _hold_role_one(item: LeaseRequest) -> Steps[bool]:
    return bool((yield Run(q.HOLD_ROLE, msgspec.structs.asdict(item))))


def report_role(items: Sequence[tuple[str, str, bool]]) -> Steps[list[None]]:
    for name, owner, at_work in sorted(items):
        params = {"name": name, "owner": owner, "at_work": int(at_work)}
        yield Run(q.REPORT_ROLE, params)
    return [None] * len(items)


def leave_role(items: Sequence[tuple[str, str]]) -> Steps[list[None]]:
    for name, owner in sorted(items):
        yield Run(q.LEAVE_ROLE, {"name": name, "owner": owner})
    return [None] * len(items)
