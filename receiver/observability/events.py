"""Telemetry: everything that happens is reported here once, as a log line and as a metric.

A log line has all ids that it concerns, so that a search for any of them finds it, and never an
argument, an input or a body.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import Any, Final, Literal, get_args

import structlog

from receiver.model.errors import StoreUnavailable
from receiver.model.ids import event_id
from receiver.model.states import Verdict
from receiver.observability.metrics import Metrics
from receiver.providers.adapter import Callback
from receiver.store.deliveries import Claim, LostAttempt, Settlement
from receiver.store.inbox import AcceptResult, IncomingOutcome

log = structlog.get_logger("receiver")

SubmitResult = Literal["accepted", "answered", "rejected", "postponed", "unconfirmed"]
PollResult = Literal["ended", "pending", "failed"]

QUIET: Final = frozenset({"/healthz", "/health", "/readyz", "/ready", "/metrics"})
"""Routes that machines call all day: logged at debug level, unless they fail."""
_LOGGED: Final = frozenset(get_args(Verdict)) - {"noted", "mismatch"}
"""Verdicts on outcomes that have a line in the log."""
_FAULT: Final = 500
_CLIENTS_FAULT: Final = 400


class Telemetry:
    """Reports outcomes, attempts, requests, submits, polls and the state of the store."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.writable = True
        """Whether the last write to the database succeeded."""

    def expect(self, providers: Iterable[str], handlers: Iterable[str]) -> None:
        """Create the counters at zero: Prometheus sees no increase if one begins at 1.

        An alert on the first dead delivery needs the zero before it.
        """
        metrics = self.metrics
        for provider, result in product(providers, get_args(SubmitResult)):
            metrics.submits[provider, result]
        for provider, result in product(providers, get_args(PollResult)):
            metrics.polls[provider, result]
        for handler, state in product(handlers, ("done", "skipped", "dead")):
            metrics.ends[handler, state]

    def outcome(
        self, arrival: IncomingOutcome, taken: AcceptResult, callback: Callback | None = None
    ) -> None:
        """Report an outcome; the line of a `callback` also reports its request."""
        channel = arrival.channel or "none"
        self.metrics.outcomes[arrival.provider, channel, taken.verdict].inc()
        if taken.verdict == "noted":
            return
        if taken.seconds is not None and arrival.channel is not None:
            self.metrics.waits[(channel,)].observe(taken.seconds)
        sender = {}
        if callback is not None:
            sender = {
                "request": callback.request,
                "client": callback.client,
                "bytes": len(callback.body),
            }
        log.info(
            "outcome.taken",
            provider=arrival.provider,
            provider_id=taken.provider_id or arrival.outcome.provider_id,
            prediction=arrival.prediction_id,
            channel=arrival.channel,
            outcome=arrival.outcome.kind,
            verdict=taken.verdict,
            reason=taken.reason,
            model=taken.model,
            status=taken.status,
            event_id=taken.event_id,
            seconds=None if taken.seconds is None else round(taken.seconds, 3),
            **sender,
        )

    def attempt(
        self, claim: Claim, settlement: Settlement, *, held: bool, error: BaseException | None
    ) -> None:
        """Report an attempt; `held`: its claim was still ours, so that its end counts."""
        result, decision = settlement.result, settlement.decision
        seconds = max(settlement.ended_at - settlement.started_at, 0.0)
        self.metrics.attempts[claim.handler, result].inc()
        self.metrics.runs[(claim.handler,)].observe(seconds)
        if held and decision.state != "pending":
            self.metrics.ends[claim.handler, decision.state].inc()
        fields: Mapping[str, Any] = {
            **_ids(claim),
            "attempt": claim.attempt,
            "result": result,
            "state": decision.state if held else "claim lost",
            "seconds": round(seconds, 4),
        }
        if result == "done":
            log.info("handler.attempt", **fields)
            return
        if result == "skip":  # the handler's own decision, not a failure
            log.info("handler.attempt", **fields, reason=decision.reason)
            return
        delay = round(decision.delay, 3) if decision.state == "pending" else None
        log.warning(
            "handler.attempt", **fields, reason=decision.reason, retry_in=delay, exc_info=error
        )

    def interrupted(self, claim: Claim) -> None:
        """Report an attempt that is cut short because we stop; the first few do not count."""
        log.warning("handler.interrupted", **_ids(claim))

    def lost(self, attempts: Sequence[LostAttempt]) -> None:
        """Report attempts that their own process did not: it is gone, or was frozen too long."""
        for one in attempts:
            self.metrics.attempts[one.handler, "lost"].inc()
            log.warning(
                "handler.attempt",
                handler=one.handler,
                delivery=one.delivery,
                event_id=event_id(one.prediction_id),
                prediction=one.prediction_id,
                provider=one.provider,
                provider_id=one.provider_id,
                channel=one.channel,
                attempt=one.attempt,
                result="lost",
                state="pending",
                seconds=round(max(one.seconds, 0.0), 4),
                reason=one.reason,
            )

    def request(self, route: str, status: int, fields: Mapping[str, Any]) -> None:
        """Report a request that has ended; `fields` are the rest of its log line."""
        self.metrics.requests[route, str(status)].inc()
        if status >= _FAULT or "reason" in fields:
            log.warning("request.handled", route=route, status=status, **fields)
        elif status < _CLIENTS_FAULT and (route in QUIET or _is_logged(fields)):
            log.debug("request.handled", route=route, status=status, **fields)
        else:
            log.info("request.handled", route=route, status=status, **fields)

    def refused(self, provider: str, reason: str) -> None:
        """Count a refused callback; the log line of its request has the rest."""
        self.metrics.refusals[provider, reason].inc()

    def submit(self, provider: str, result: SubmitResult) -> None:
        self.metrics.submits[provider, result].inc()

    def poll(self, provider: str, result: PollResult) -> None:
        self.metrics.polls[provider, result].inc()

    def batch(self, size: int) -> None:
        """Count a commit; a failure of the count must not affect it."""
        with suppress(Exception):
            self.metrics.batches.observe(size)

    def store(self, trouble: StoreUnavailable | None) -> None:
        """Report that the database takes no writes or, with None, that it does again."""
        self.writable = trouble is None
        if trouble is None:
            log.info("store.recovered")
        else:
            log.error("store.unavailable", reason=str(trouble))


def _is_logged(request: Mapping[str, Any]) -> bool:
    """Return whether a request was an answered callback whose outcome has a log line."""
    return request.get("verdict") in _LOGGED and "ended" not in request


def _ids(claim: Claim) -> Mapping[str, Any]:
    prediction = claim.event.prediction
    return {
        "handler": claim.handler,
        "delivery": claim.id,
        "event_id": claim.event.id,
        "prediction": prediction.id,
        "provider": prediction.provider,
        "model": prediction.model,
        "provider_id": prediction.provider_id,
        "channel": claim.event.channel,
    }
