"""The accept transaction: evidence, the new status, the event and its deliveries, all or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from operator import itemgetter
from typing import Any, Final, TypeAlias

import msgspec

from receiver.model.costs import Price
from receiver.model.ids import delivery_id, event_id
from receiver.model.states import Verdict
from receiver.model.values import Channel, CostSource, EventType, Outcome, Recipients, Status
from receiver.store.budgets import Entry, Settlements
from receiver.store.costs import Spent, Sums
from receiver.store.costs import sql as costs_sql
from receiver.store.engine import Engine
from receiver.store.predictions import end_of
from receiver.store.predictions import sql as predictions_sql
from receiver.store.statement import (
    Cells,
    News,
    Run,
    Statement,
    Statements,
    Steps,
    Write,
    short,
    text,
)

sql: Final = Statements("inbox")


class CurrentState(msgspec.Struct, frozen=True):
    """The state of a prediction that decides about an outcome; read inside the transaction."""

    id: str
    provider: str
    model: str
    status: Status
    provider_id: str | None
    metadata: str
    """JSON text: decoded only if some handler matches on it."""
    erased: bool = False
    """Whether it was erased, so that its content is no longer stored."""
    submitted_at: float | None = None
    trace: str | None = None
    reply_to: str | None = None
    price: int | None = None
    """Microdollars that it was expected to cost."""
    price_source: CostSource | None = None
    reserved: str | None = None
    """The budgets that its price was reserved from, as JSON."""
    cost: int | None = None
    """Microdollars, if the provider reported it in the answer to the submit."""
    account: str | None = None
    """What its cost is added up by besides provider and model, as JSON."""
    submits: int = 0
    """How many times a submit was begun."""


Match: TypeAlias = Callable[[CurrentState, str], Recipients]
"""Returns the handlers of an event of that type; the handlers' registry implements it."""


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """The effect of an arrival, decided by a pure function inside the transaction."""

    verdict: Verdict
    status: Status
    reason: str
    event_type: EventType | None = None
    """Set if, and only if, the verdict is `accepted`."""
    recipients: Recipients = Recipients()
    cost: Price | None = None
    """The cost, as far as it is known at the end."""
    ask_at: float | None = None
    """When to ask the provider for the cost; None: it need not, or cannot, be asked."""


class IncomingOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """One received outcome, from any channel, with its evidence."""

    prediction_id: str
    provider: str
    channel: Channel | None
    outcome: Outcome
    at: float
    judge: Callable[[CurrentState, IncomingOutcome], Transition]
    headers: str = "[]"
    """JSON of the callback's headers, without secrets."""
    body: bytes = b""
    proved_id: str | None = None
    """The provider's id that the proof covers, if it covers one."""
    only_from: frozenset[Status] | None = None
    """Apply only if the prediction still has one of these statuses (our own verdicts)."""
    submits: int | None = None
    """Apply only if no other submit was begun since this one (our own verdicts)."""
    is_free: bool = False
    """Whether nothing was spent, as the provider has not accepted it."""


class AcceptResult(msgspec.Struct, frozen=True):
    """The result of an arrival, after the commit."""

    verdict: Verdict
    status: Status | None
    reason: str
    event_id: str | None = None
    handlers: tuple[str, ...] = ()
    model: str | None = None
    provider_id: str | None = None
    """The provider's id of the prediction, if there is one."""
    seconds: float | None = None
    """Seconds from the submit to this outcome, if it was accepted and there was a submit."""
    trace: str | None = None
    """The W3C traceparent of the span that it was submitted in, if there was one."""


LONGEST_WAIT: Final = 86400.0
"""Seconds after which a delivery no longer waits for those of other handlers."""


@short(lambda item: len(item.body))
def accept(items: Sequence[IncomingOutcome]) -> Steps[list[AcceptResult]]:
    """Decide about every arrival in order, then write all consequences in a few statements."""
    known = yield from current_states({item.prediction_id for item in items})
    batch = _Batch()
    taken = [_rule(known, item, batch) for item in items]
    yield from batch.write()
    return taken


def current_states(ids: Iterable[str]) -> Steps[dict[str, CurrentState]]:
    found = yield Run(sql.select_known, rows=[(prediction_id,) for prediction_id in ids])
    return {
        row["id"]: CurrentState(
            **{**row, "status": Status(row["status"]), "erased": bool(row["erased"])}
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
    if arrival.submits not in {None, before.submits}:
        return AcceptResult("late", before.status, "begun again")
    ruling = arrival.judge(before, arrival)
    provider_id = before.provider_id or arrival.outcome.provider_id
    if ruling.verdict != "mismatch":
        batch.add(arrival, ruling, before)
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
        handlers=ruling.recipients.handlers,
        model=before.model,
        provider_id=provider_id,
        seconds=seconds,
        trace=before.trace,
    )


class _Evidence:
    """A row for `callbacks`; the same bytes again in the batch are only counted."""

    def __init__(
        self, row: tuple[Any, ...], verdict: str, reason: str, provider: str | None
    ) -> None:
        self.row = row
        self.provider = provider
        """Set only if the prediction is unknown; otherwise its row has the provider."""
        self.verdict = verdict
        self.reason = reason
        self.repeats = 0


class _Batch:
    """Rows to be written together."""

    def __init__(self) -> None:
        self._callbacks: dict[tuple[str, str, str], _Evidence] = {}
        self._ends: list[tuple[Any, ...]] = []
        self._events: list[tuple[Any, ...]] = []
        self._deliveries: list[tuple[Any, ...]] = []
        self._pending: list[tuple[str, str]] = []
        """The deliveries that wait for no other, with their handlers."""
        self._notes: list[dict[str, Any]] = []
        self._sums = Sums()
        self._settlements = Settlements()
        self._questions: list[tuple[str, str, float, float | None]] = []

    def add(self, arrival: IncomingOutcome, ruling: Transition, before: CurrentState) -> None:
        """Add the effect of an arrival; body and headers are left out if it was erased."""
        # A poll that finds it still running is no evidence worth keeping.
        if arrival.channel is not None and (
            ruling.verdict != "noted" or arrival.channel == "webhook"
        ):
            self.keep(arrival, ruling.verdict, ruling.reason, content=not before.erased)
        if ruling.verdict == "accepted":
            self._end(arrival, ruling)
            self._account(arrival, ruling, before)
        elif ruling.verdict in {"ask", "noted"}:
            # A poll that asks for another poll needs no due time here: every poll sets one.
            is_asked = ruling.verdict == "ask" and arrival.channel != "poll"
            self._notes.append(
                {
                    "id": arrival.prediction_id,
                    "status": ruling.status,
                    "provider_id": arrival.outcome.provider_id,
                    "due_at": arrival.at if is_asked else None,
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
            provider = arrival.provider if verdict == "unknown" else None
            self._callbacks[key] = _Evidence(row, verdict, reason, provider)
        else:
            evidence.repeats += 1
            evidence.verdict = "accepted" if verdict == "accepted" else evidence.verdict

    def _end(self, arrival: IncomingOutcome, ruling: Transition) -> None:
        self._ends.append(
            end_of(
                arrival.prediction_id,
                ruling.status,
                arrival.outcome,
                arrival.channel,
                arrival.at,
                ruling.cost,
            )
        )
        unmatched = int(not ruling.recipients.handlers)
        event = (arrival.prediction_id, ruling.event_type, arrival.at, arrival.channel, unmatched)
        self._events.append(event)
        for name in ruling.recipients.handlers:
            made = delivery_id(arrival.prediction_id, name)
            row = (made, arrival.prediction_id, name, arrival.at)
            if after := ruling.recipients.after.get(name):
                self._deliveries.append((*row, *waiting_row(after, arrival.at)))
            else:
                self._deliveries.append((*row, arrival.at, "[]", ""))
                self._pending.append((made, name))

    def _account(self, arrival: IncomingOutcome, ruling: Transition, before: CurrentState) -> None:
        """Add up its cost, settle its reservation, and note when to ask the provider for a cost."""
        amount = None if ruling.cost is None else ruling.cost.amount
        spent = Spent(before.provider, before.model, before.account, arrival.at)
        self._sums.add(spent, 1, amount or 0, int(amount is None))
        if before.reserved is not None:
            change = 0 if amount is None else amount - (before.price or 0)
            entry: Entry = "released" if arrival.is_free else "settled"
            self._settlements.add(before.id, before.reserved, entry, change, arrival.at)
        if ruling.ask_at is not None:
            question = (before.id, before.provider, ruling.ask_at, arrival.outcome.units)
            self._questions.append(question)

    def write(self) -> Steps[None]:
        # Sorted, so that two transactions cannot deadlock.
        callbacks = [
            (*each.row, each.verdict, each.reason, each.repeats, each.provider)
            for _, each in sorted(self._callbacks.items(), key=itemgetter(0))
        ]
        batches: list[tuple[Statement, Sequence[Cells]]] = [
            (sql.insert_callbacks, callbacks),
            (predictions_sql.end_predictions, self._ends),
            (sql.insert_events, self._events),
            (sql.insert_deliveries, self._deliveries),
            (costs_sql.add_sums, self._sums.rows()),
            (costs_sql.insert_questions, self._questions),
        ]
        ended = [prediction for prediction, *_ in self._ends]
        news = News(self._pending, ended) if ended else None
        yield Write([(statement, rows) for statement, rows in batches if rows], news)
        for note in self._notes:
            yield Run(sql.note_prediction, note)
        yield from self._settlements.write()


def waiting_row(after: Sequence[str], now: float) -> tuple[float, str, str]:
    """Return the due time, the handlers and the reason of a delivery that waits for others."""
    return now + LONGEST_WAIT, text(after), f"waits for {', '.join(after)}"


async def accept_outcome(store: Engine, incoming: IncomingOutcome) -> AcceptResult:
    """Record one outcome: evidence, new state, event and deliveries in one transaction."""
    try:
        return await store.write(accept, incoming)
    except Exception as error:
        if not store.is_taken(error):
            raise
        # A provider's id belongs to one prediction: the outcome contains that of another.
        return AcceptResult("mismatch", None, "its id belongs to another prediction")
