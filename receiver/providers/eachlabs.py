"""Eachlabs: predictions with a callback that carries a shared secret, in three shapes.

Facts: eachlabs/mintlify-docs (2026-08), eachlabs/docs (2025-12), the nano-banana page (2025-11).
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import httpx
from msgspec.structs import replace

from receiver.model.costs import micro
from receiver.model.errors import Unproved, Unreadable
from receiver.model.values import Outcome, Ticket
from receiver.providers import parsing, results
from receiver.providers.adapter import (
    Callback,
    CallbackTarget,
    Candidate,
    Found,
    Postponed,
    Proof,
    ProviderResponse,
    Receipt,
)
from receiver.providers.declared import Api, Declared, Given

# One table serves callbacks and polls, as each word has the same meaning in both. "success" in the
# answer to a create means only "created"; `accepted` reads that.
_KINDS: Final = {
    "created": "processing",
    "starting": "processing",
    "queued": "processing",
    "processing": "processing",
    "running": "processing",
    "succeeded": "succeeded",
    "success": "succeeded",
    "completed": "succeeded",
    "failed": "failed",
    "error": "failed",
    "cancelled": "canceled",
    "canceled": "canceled",
}

_FULL: Final = re.compile(r"in[- ]flight|concurren", re.IGNORECASE)
"""Text of a 429 or 402 about running predictions: an account with little money may run only a few
at once, and each reserves its possible cost. There is room when one ends; a retry does not help."""
_CLOCK_SKEW: Final = 120.0
"""Seconds by which Eachlabs' clock and ours may differ when looking for a lost submit."""
_LISTED: Final = 100
"""Deliveries on a page, the maximum."""
_OF_MONEY: Final = frozenset({httpx.codes.PAYMENT_REQUIRED, httpx.codes.TOO_MANY_REQUESTS})

_VERSION: Final = "0.0.1"
"""Required by the old create call, ignored by the new one."""


@dataclass(frozen=True)
class Eachlabs:
    api: Api
    bills_after: float | None
    confirm: bool = False
    """Treat a callback only as a reason to poll, since its secret does not cover its body."""
    name: ClassVar[str] = "eachlabs"
    proof: ClassVar[Proof] = "prediction_secret"
    most_billed: ClassVar[int] = 1

    def check(self, model: str, input: dict[str, Any]) -> None:
        """Refuse nothing: models and their parameters change without us."""

    def request(self, ticket: Ticket, hook: CallbackTarget | None) -> httpx.Request:
        body: dict[str, Any] = {"model": ticket.model, "version": _VERSION, "input": ticket.input}
        if ticket.mode == "sync":
            return self.api.post("/v1/prediction/run", json=body)
        if hook is not None:
            body |= {"webhook_url": hook.url, "webhook_secret": hook.secret}
        return self.api.post("/v1/prediction", json=body)

    def accepted(self, ticket: Ticket, answer: ProviderResponse) -> Receipt:
        body = parsing.content(answer)
        reason = _reason(body)
        hints = _hints(body)
        if answer.status in _OF_MONEY and _FULL.search(reason):
            return Postponed(reason, parsing.retry_after(answer), holds="full")
        if settled := parsing.settle_submit(answer, reason, *hints, blocks=ticket.mode == "sync"):
            return settled
        provider_id = _id(body)
        if ticket.mode == "sync" and (provider_id or body.get("status")):
            return _outcome(body, ticket.input)
        if parsing.lookup(_KINDS, body.get("status"), "processing") in {"failed", "canceled"}:
            return parsing.refusal(reason or "not created", *hints)
        return parsing.accepted("Eachlabs", provider_id)

    def authenticate(self, callback: Callback, *, now: float, keys: Sequence[bytes]) -> None:  # noqa: ARG002 - nothing is dated
        """Compare the secret, which is sent as plain text: no HMAC, though old pages claim one."""
        given = callback.header(b"x-webhook-secret")
        # Every key is compared, so that the duration does not reveal which one nearly matched.
        if not any([hmac.compare_digest(given, key) for key in keys]):  # noqa: C419
            raise Unproved("bad_secret")

    def read(self, body: bytes) -> Outcome:
        payload = parsing.decode_object(body)
        if "workflow_id" in payload and "exec_id" not in payload:
            raise Unreadable("a workflow's callback, not a prediction's")
        return parsing.only_an_end(_outcome(payload), doubt=self.confirm)

    def poll(self, ticket: Ticket) -> httpx.Request:
        return self.api.get(f"/v1/prediction/{parsing.segment(ticket)}")

    def polled(self, ticket: Ticket, answer: ProviderResponse) -> Outcome:
        if settled := parsing.settle_poll(ticket, answer):
            return settled
        body = parsing.decode_object(answer.body)
        return replace(_outcome(body, ticket.input), cost=_cost(body))

    def bill(self, tickets: Sequence[Ticket]) -> httpx.Request:
        """Poll once more: a callback has no cost."""
        return self.poll(tickets[0])

    def billed(self, tickets: Sequence[Ticket], answer: ProviderResponse) -> dict[str, int]:
        if answer.status != httpx.codes.OK:
            raise parsing.unexpected(answer)
        cost = _cost(parsing.decode_object(answer.body))
        return {} if cost is None else {tickets[0].id: cost}

    def cancel(self, ticket: Ticket) -> httpx.Request:
        return self.api.post(f"/v1/prediction/{parsing.segment(ticket)}/cancel")

    def search(self, ticket: Ticket) -> Sequence[httpx.Request]:  # noqa: ARG002 - the protocol's
        """List the callbacks that were delivered: one of ours has our token in its URL."""
        return [self._deliveries(0)]

    def found(self, ticket: Ticket, answer: ProviderResponse) -> Found:
        """Return each delivery of a page; continue until they are older than our submit."""
        if not parsing.is_success(answer):
            raise parsing.unexpected(answer)
        page = parsing.decode_object(answer.body)
        rows = page.get("webhooks")
        if not isinstance(rows, list):
            raise Unreadable("no list of webhooks")
        rows = [row for row in rows if isinstance(row, dict)]
        candidates = [
            Candidate(provider_id, row["url"])
            for row in rows
            if isinstance(row.get("url"), str)
            and (provider_id := parsing.identifier(row.get("execution_id")))
        ]
        limit, offset = page.get("limit"), page.get("offset")
        if type(limit) is not int or type(offset) is not int or len(rows) < max(limit, 1):
            return Found(candidates)
        if _reaches_back(rows, ticket.submitted_at):
            return Found(candidates)
        return Found(candidates, self._deliveries(offset + len(rows)))

    def _deliveries(self, offset: int) -> httpx.Request:
        return self.api.get("/v1/webhooks", params={"limit": _LISTED, "offset": offset})

    def details(self, model: str) -> httpx.Request:
        return self.api.get(f"/v1/models/{parsing.model_path(model)}")

    def try_key(self) -> httpx.Request:
        """List the last delivery of a webhook, as a 404 for a prediction has two meanings."""
        return self.api.get("/v1/webhooks", params={"limit": 1})

    def key_works(self, answer: ProviderResponse) -> bool | None:
        body = parsing.error_body(answer.body)
        listed = answer.status == httpx.codes.OK and "webhooks" in body
        return parsing.key_accepted(answer, sign=listed)


def _reaches_back(rows: Sequence[dict[str, Any]], submitted_at: float | None) -> bool:
    """Return whether a page, the newest first, has deliveries from before our submit."""
    since = (submitted_at or 0.0) - _CLOCK_SKEW
    times = (parsing.time_of(row.get("created_at")) for row in rows)
    return any(at is not None and at < since for at in times)


def _id(payload: dict[str, Any]) -> str | None:
    return parsing.identifier(*(payload.get(name) for name in ("exec_id", "predictionID", "id")))


def _cost(payload: dict[str, Any]) -> int | None:
    """Return `metrics.cost`, which is in dollars, in microdollars; None before the end."""
    metrics = payload.get("metrics")
    ended = parsing.lookup(_KINDS, payload.get("status"), "processing") != "processing"
    return micro(metrics.get("cost")) if ended and isinstance(metrics, dict) else None


def _outcome(payload: dict[str, Any], sent: dict[str, Any] | None = None) -> Outcome:
    kind = parsing.lookup(_KINDS, payload.get("status"), "processing")
    provider_id = _id(payload)
    if kind == "succeeded":
        made = results.outputs(payload.get("output"), sent or payload.get("input"))
        return Outcome(kind=kind, provider_id=provider_id, output=made)
    error = parsing.failure(_reason(payload), *_hints(payload))
    return parsing.outcome_without_output(kind, provider_id, error, "canceled at Eachlabs")


def _reason(payload: dict[str, Any]) -> str:
    """Return the reason of a failure: `error`, `output[0].error`, or the envelope in `output`."""
    output = payload.get("output")
    envelope = output if isinstance(output, dict) else {}
    errors = (
        payload.get("error"),
        parsing.first(output).get("error"),
        envelope.get("error_message"),
        envelope.get("error"),
    )
    text = parsing.first_text(
        *map(parsing.error_text, errors), parsing.error_text(payload.get("message"))
    )
    return parsing.join(dict.fromkeys([text, parsing.error_text(payload.get("details"))]))


def _hints(payload: dict[str, Any]) -> list[str]:
    """Return the category and code of an error, in the envelope inside `output` or beside it."""
    output = payload.get("output")
    envelope = output if isinstance(output, dict) else parsing.first(output)
    return [hint for place in (envelope, payload) for hint in _named(place)]


def _named(place: dict[str, Any]) -> list[str]:
    classification = place.get("classification")
    category = classification.get("category") if isinstance(classification, dict) else None
    return [parsing.first_text(category), parsing.first_text(place.get("error_code"))]


def _make(given: Given) -> Eachlabs:
    # The old pages require X-API-Key, the new ones Bearer: sending both satisfies both.
    api = given.api(Authorization=f"Bearer {given.key}", X_API_Key=given.key)
    return Eachlabs(api, 60.0 if given.key else None, given.confirm)


DECLARED: Final = Declared(
    make=_make,
    key="EACHLABS_API_KEY",
    urls={"base": "https://api.eachlabs.ai"},
    path="/v1",
    example="nano-banana",
    secret_headers=frozenset({b"x-webhook-secret"}),
    max_in_flight=10,
    requests_per_minute=100,
    confirm="poll Eachlabs before accepting its callback",
)
