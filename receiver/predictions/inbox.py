"""The inbox: every outcome, pushed, streamed or polled, is proved, read and recorded here.

A callback is proved over its raw bytes before anything is parsed; a stream event or a poll answer
is proved by our own connection and key. Then all follow the same path: read, advance, and one
transaction that holds the evidence, the new state, the event and its deliveries.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Final

import msgspec
import structlog

from receiver.model.costs import Price
from receiver.model.errors import StoreUnavailable, Unproved, Unreadable
from receiver.model.states import TERMINAL, advance
from receiver.model.tasks import TaskSet
from receiver.model.values import Channel, Error, Outcome, OutcomeKind, Status, expired
from receiver.observability.runtime import Runtime
from receiver.predictions.limits import Limits
from receiver.predictions.proofs import Proofs
from receiver.predictions.tokens import Tokens
from receiver.providers import DECLARED
from receiver.providers.adapter import Billing, Callback, Metered, Provider
from receiver.store.facade import Store
from receiver.store.inbox import (
    AcceptResult,
    CurrentState,
    IncomingOutcome,
    Match,
    Transition,
    accept_outcome,
)

log = structlog.get_logger("receiver")

_EVIDENCE: Final = (b"x-", b"webhook-")
"""Prefixes of the headers that are a provider's own."""
_MOST_PARKED: Final = 1000
_MOST_WARNED: Final = 1000
_SEARCH_AGAIN: Final = (0.2, 1.0, 4.0)
"""Seconds between searches for the prediction of a stream event that came before its id."""


class Inbox:
    """Proves, reads and records outcomes, and wakes the tasks that wait for the changes."""

    def __init__(
        self,
        store: Store,
        providers: Mapping[str, Provider],
        tokens: Tokens,
        match: Match,
        proofs: Proofs,
        limits: Limits,
        runtime: Runtime,
    ) -> None:
        self._runtime = runtime
        self._limits = limits
        self._bills_after = {
            name: provider.bills_after
            for name, provider in providers.items()
            if isinstance(provider, Billing)
        }
        self._metered_after = {
            name: provider.metered_after
            for name, provider in providers.items()
            if isinstance(provider, Metered)
        }
        self._clock = runtime.clock
        self._searches = TaskSet()
        self._store = store
        self._providers = providers
        self._tokens = tokens
        self._match = match
        self._proofs = proofs
        self._parked: OrderedDict[tuple[str, str], tuple[Outcome, bytes]] = OrderedDict()
        self._unmatched: set[tuple[str, str | None, OutcomeKind]] = set()
        """Provider, model and kind of outcomes that were already logged as unmatched."""

    def prediction_id_of(self, provider_name: str, token: str) -> str | None:
        """Return the prediction id of a callback's path; None if we did not make that path."""
        try:
            return self._tokens.open_callback(provider_name, token)
        except Unproved:
            return None

    async def callback(
        self, provider_name: str, prediction_id: str, callback: Callback
    ) -> AcceptResult:
        """Prove and record a callback on a path that we made.

        Raises Unproved, KeysUnavailable or StoreUnavailable.
        """
        provider = self._providers[provider_name]
        proved_id = await self._proofs.prove(provider_name, prediction_id, callback)
        try:
            outcome = provider.read(callback.body)
        except Unreadable:
            # It is the provider's: keep it, and ask for the outcome.
            outcome = Outcome(kind="ask", provider_id=proved_id)
        if provider.proof == "capability":  # others may know the path
            outcome = Outcome(kind="ask", provider_id=outcome.provider_id)
        return await self.take(
            IncomingOutcome(
                prediction_id=prediction_id,
                provider=provider_name,
                channel="webhook",
                outcome=outcome,
                at=callback.at,
                judge=self._judge,
                headers=_headers(callback, DECLARED[provider_name].secret_headers),
                body=callback.body,
                proved_id=proved_id,
            ),
            callback,
        )

    async def answer(
        self,
        provider_name: str,
        prediction_id: str,
        channel: Channel,
        outcome: Outcome,
        body: bytes,
    ) -> AcceptResult:
        """Record an outcome from our own connection: of a poll, a blocking call or a stream."""
        return await self.take(
            IncomingOutcome(
                prediction_id=prediction_id,
                provider=provider_name,
                channel=channel,
                outcome=outcome,
                at=self._clock(),
                judge=self._judge,
                body=body,
            )
        )

    async def stream_event(
        self, provider_name: str, outcome: Outcome, body: bytes
    ) -> AcceptResult | None:
        """Record a stream event; park it if its prediction is not known (yet)."""
        if outcome.provider_id is None:
            return None
        # Parked first: a submitter stores the id, then unparks, so one of the two finds the event.
        key = (provider_name, outcome.provider_id)
        self._parked[key] = (outcome, body)
        while len(self._parked) > _MOST_PARKED:
            self._parked.popitem(last=False)
        prediction_id = await self._store.predictions.find(provider_name, outcome.provider_id)
        if prediction_id is None:
            if not self._runtime.single_process:
                self._searches.start(self._search_again(provider_name, outcome.provider_id))
            return None
        return await self.unpark(provider_name, outcome.provider_id, prediction_id)

    async def _search_again(self, provider_name: str, provider_id: str) -> None:
        """Look again for the prediction of a parked event: another process may be submitting it."""
        for seconds in _SEARCH_AGAIN:
            await asyncio.sleep(seconds)
            with contextlib.suppress(StoreUnavailable, Unproved):  # a poll finds out
                prediction_id = await self._store.predictions.find(provider_name, provider_id)
                if prediction_id is not None:
                    await self.unpark(provider_name, provider_id, prediction_id)
                    return

    async def stop(self) -> None:
        """Stop the searches for predictions of parked events."""
        await self._searches.cancel()

    async def unpark(
        self, provider_name: str, provider_id: str, prediction_id: str
    ) -> AcceptResult | None:
        """Record the stream event that came before its prediction's id was stored, if any."""
        parked = self._parked.pop((provider_name, provider_id), None)
        if parked is None:
            return None
        outcome, body = parked
        return await self.answer(provider_name, prediction_id, "sse", outcome, body)

    async def verdict(
        self,
        provider_name: str,
        prediction_id: str,
        error: Error,
        *,
        only_from: frozenset[Status],
        submits: int | None = None,
        is_free: bool = True,
        channel: Channel | None = None,
        body: bytes = b"",
    ) -> AcceptResult:
        """End a prediction by our own verdict: refused, expired, canceled before it was sent.

        It `is_free` if the provider has not taken it.
        """
        kind: OutcomeKind = "canceled" if error.code == "canceled" else "failed"
        return await self.take(
            IncomingOutcome(
                prediction_id=prediction_id,
                provider=provider_name,
                channel=channel,
                outcome=Outcome(kind=kind, error=error),
                at=self._clock(),
                judge=self._judge,
                body=body,
                only_from=only_from,
                submits=submits,
                is_free=is_free,
            )
        )

    async def too_late(self, provider_name: str, prediction_id: str, last_reason: str) -> None:
        """End what was still queued at its latest time; `last_reason` is why it was put off."""
        error = expired("it was too late to begin: nothing was spent", "")
        if last_reason:
            error = expired("every submit was put off", last_reason)
        log.warning("prediction.expired", prediction=prediction_id, code=error.code)
        await self.verdict(
            provider_name, prediction_id, error, only_from=frozenset({Status.QUEUED})
        )

    async def take(
        self, arrival: IncomingOutcome, callback: Callback | None = None
    ) -> AcceptResult:
        """Record one outcome, exactly once, and wake the tasks that wait for it."""
        taken = await accept_outcome(self._store, arrival)
        if taken.verdict == "mismatch":
            raise Unproved("id_mismatch")
        wakeups = self._runtime.wakeups
        wakeups.wake("handler", *taken.handlers)
        wakeups.wake_all("changes")
        if taken.verdict == "ask":
            wakeups.wake_all("poll")
        elif taken.verdict == "accepted":
            wakeups.wake("capacity", arrival.provider)
            wakeups.wake("prediction", arrival.prediction_id)
            if not taken.handlers:
                self._warn_of_unmatched(arrival, taken)
        with self._runtime.tracing.outcome(arrival, taken):
            self._runtime.telemetry.outcome(arrival, taken, callback)
        return taken

    def _warn_of_unmatched(self, arrival: IncomingOutcome, taken: AcceptResult) -> None:
        """Log that no handler matches such events, once for each provider, model and kind."""
        sort = (arrival.provider, taken.model, arrival.outcome.kind)
        if sort in self._unmatched or len(self._unmatched) >= _MOST_WARNED:
            return
        self._unmatched.add(sort)
        log.warning(
            "event.unmatched",
            event_id=taken.event_id,
            prediction=arrival.prediction_id,
            provider=arrival.provider,
            model=taken.model,
            type=f"prediction.{taken.status}",
        )

    def _judge(self, known: CurrentState, arrival: IncomingOutcome) -> Transition:
        """Return what an arrival does; a pure function that runs inside the transaction."""
        if arrival.provider != known.provider or not _agrees(known, arrival):
            return Transition(verdict="mismatch", status=known.status, reason="another's")
        verdict, status, reason = advance(known.status, known.provider_id, arrival.outcome)
        if verdict != "accepted" or status not in TERMINAL:
            return Transition(verdict=verdict, status=status, reason=reason)
        event_type = f"prediction.{status}"
        cost = self._cost(known, arrival)
        return Transition(
            verdict=verdict,
            status=status,
            reason=reason,
            event_type=event_type,  # type: ignore[arg-type] # a terminal status names an event type
            recipients=self._match(known, event_type),
            cost=cost,
            ask_at=self._ask_at(known, arrival, cost),
        )

    def _cost(self, known: CurrentState, arrival: IncomingOutcome) -> Price | None:
        """Return what it cost, as far as that is known at the end."""
        if arrival.is_free:
            return Price(0, "computed")
        amount = known.cost if arrival.outcome.cost is None else arrival.outcome.cost
        if amount is not None:
            return Price(amount, "provider")
        # A failed prediction may cost nothing or the full price: only the provider knows.
        succeeded = arrival.outcome.kind == "succeeded"
        return self._price(known, arrival.outcome) if succeeded else None

    def _ask_at(
        self, known: CurrentState, arrival: IncomingOutcome, cost: Price | None
    ) -> float | None:
        """Return when to ask the provider for the cost; None if it is known or not available."""
        after = self._bills_after.get(known.provider)
        if after is None and cost is None and arrival.outcome.kind == "succeeded":
            after = self._metered_after.get(known.provider)
        is_named = known.provider_id or arrival.outcome.provider_id
        is_known = arrival.is_free or (cost is not None and cost.source == "provider")
        return None if after is None or is_known or not is_named else arrival.at + after

    def _price(self, known: CurrentState, outcome: Outcome) -> Price | None:
        if known.price is not None and known.price_source == "recipe":
            return Price(known.price, "recipe")
        amount = self._limits.prices.measured(known.provider, known.model, outcome.output)
        amount = known.price if amount is None else amount
        return None if amount is None else Price(amount, "computed")


def _agrees(known: CurrentState, arrival: IncomingOutcome) -> bool:
    """Return whether the proved id is the body's or, if that has none, our own submit's."""
    if arrival.proved_id is None:
        return True
    outcome = arrival.outcome
    named = {outcome.provider_id, outcome.also_known_as} - {None}
    if named and arrival.proved_id not in named:
        return False
    return bool(named) or known.provider_id in {None, arrival.proved_id}


def _headers(callback: Callback, secret: Collection[bytes]) -> str:
    """Return the provider's own headers as JSON, for evidence, without secrets."""
    kept = [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in callback.headers
        if name.startswith(_EVIDENCE) and name not in {*secret, b"x-api-key"}
    ]
    return msgspec.json.encode(kept).decode()
