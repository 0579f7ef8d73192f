"""Eachlabs: predictions with a callback that carries a shared secret, in three shapes.

Facts: eachlabs/mintlify-docs (2026-08), eachlabs/docs (2025-12), the nano-banana page (2025-11).
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import httpx

from receiver.model.errors import Unproved, Unreadable
from receiver.model.states import cause_of
from receiver.model.values import Error, Outcome, Ticket
from receiver.providers import adapter as base
from receiver.providers.adapter import (
    Accepted,
    Ambiguous,
    Callback,
    CallbackTarget,
    ProviderResponse,
    Receipt,
)
from receiver.providers.declared import Declared

# One table for both channels is safe here, as no word means one thing when pushed and another when
# polled. "success" in the answer to a create means only "created"; that is read by `accepted`.
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

_VERSION: Final = "0.0.1"
"""Required by the old create call, ignored by the new one."""


@dataclass(frozen=True)
class Eachlabs:
    """The adapter; `base_url` has no trailing slash."""

    key: str
    base_url: str
    confirm: bool = False
    """Take a callback only as a reason to ask, since its secret does not cover its body."""
    name: ClassVar[Literal["eachlabs"]] = "eachlabs"
    proof: ClassVar[Literal["prediction_secret"]] = "prediction_secret"
    stream_path: ClassVar[None] = None

    def check(self, model: str, input: dict[str, Any]) -> None:
        """Refuse nothing: models and their parameters change without us."""

    def request(self, ticket: Ticket, hook: CallbackTarget | None) -> httpx.Request:
        body: dict[str, Any] = {"model": ticket.model, "version": _VERSION, "input": ticket.input}
        if ticket.mode == "sync":
            return self._call("POST", "/v1/prediction/run", json=body)
        if hook is not None:
            body |= {"webhook_url": hook.url, "webhook_secret": hook.secret}
        return self._call("POST", "/v1/prediction", json=body)

    def accepted(self, ticket: Ticket, answer: ProviderResponse) -> Receipt:
        body = base.content(answer)
        reason = _reason(body)
        hints = _hints(body)
        if settled := base.settle_submit(answer, reason, *hints):
            return settled
        provider_id = _id(body)
        if ticket.mode == "sync" and (provider_id or body.get("status")):
            return _outcome(body, ticket.input)
        if base.lookup(_KINDS, body.get("status"), "processing") in {"failed", "canceled"}:
            return base.refusal(reason or "not created", *hints)
        if provider_id is None:
            return Ambiguous("Eachlabs accepted the submit without a predictionID")
        return Accepted(provider_id)

    def authenticate(self, callback: Callback, *, now: float, keys: Sequence[bytes]) -> None:  # noqa: ARG002 - nothing is dated
        """Compare the secret, which travels as it is: there is no HMAC, though old pages say so."""
        given = callback.header(b"x-webhook-secret")
        # Every key is compared, so that the time taken does not tell which one was nearly right.
        if not any([hmac.compare_digest(given, key) for key in keys]):  # noqa: C419
            raise Unproved("bad_secret")

    def read(self, body: bytes) -> Outcome:
        payload = base.decode_object(body)
        if "workflow_id" in payload and "exec_id" not in payload:
            raise Unreadable("a workflow's callback, not a prediction's")
        outcome = _outcome(payload)
        if self.confirm or cause_of(outcome) is None:
            return Outcome(kind="ask", provider_id=outcome.provider_id)
        return outcome

    def poll(self, ticket: Ticket) -> httpx.Request:
        return self._call("GET", f"/v1/prediction/{base.model_path(ticket.provider_id or '')}")

    def polled(self, ticket: Ticket, answer: ProviderResponse) -> Outcome:
        if answer.status == httpx.codes.NOT_FOUND:
            return Outcome(kind="missing", provider_id=ticket.provider_id)
        if answer.status != httpx.codes.OK:
            raise base.unexpected(answer)
        return _outcome(base.decode_object(answer.body), ticket.input)

    def cancel(self, ticket: Ticket) -> httpx.Request:
        path = f"/v1/prediction/{base.model_path(ticket.provider_id or '')}/cancel"
        return self._call("POST", path)

    def details(self, model: str) -> None:
        """Eachlabs documents no call for one model."""

    def try_key(self) -> httpx.Request:
        """List the last delivery of a webhook, as a 404 for a prediction tells two things."""
        return self._call("GET", "/v1/webhooks", params={"limit": 1})

    def key_works(self, answer: ProviderResponse) -> bool | None:
        body = base.error_body(answer.body)
        listed = answer.status == httpx.codes.OK and "webhooks" in body
        return base.let_in(answer, sign=listed)

    def _call(self, method: str, path: str, **content: Any) -> httpx.Request:
        # The old pages want X-API-Key, the new ones Bearer: both with the same key suit both.
        headers = {"Authorization": f"Bearer {self.key}", "X-API-Key": self.key}
        return httpx.Request(method, self.base_url + path, headers=headers, **content)


def _id(payload: dict[str, Any]) -> str | None:
    return base.identifier(*(payload.get(name) for name in ("exec_id", "predictionID", "id")))


def _outcome(payload: dict[str, Any], sent: dict[str, Any] | None = None) -> Outcome:
    kind = base.lookup(_KINDS, payload.get("status"), "processing")
    provider_id = _id(payload)
    if kind == "succeeded":
        results = base.outputs(payload.get("output"), sent or payload.get("input"))
        return Outcome(kind=kind, provider_id=provider_id, output=results)
    error = {
        "failed": base.failure(_reason(payload), *_hints(payload)),
        "canceled": Error(code="canceled", message="canceled at Eachlabs"),
    }.get(kind)
    return Outcome(kind=kind, provider_id=provider_id, error=error)


def _reason(payload: dict[str, Any]) -> str:
    """Find why it failed: `error`, else `output[0].error`, else the envelope inside `output`."""
    output = payload.get("output")
    envelope = output if isinstance(output, dict) else {}
    errors = (
        payload.get("error"),
        base.first(output).get("error"),
        envelope.get("error_message"),
        envelope.get("error"),
    )
    return base.words(
        *map(base.spoken, errors),
        base.join(base.spoken(payload.get(name)) for name in ("message", "details")),
    )


def _hints(payload: dict[str, Any]) -> list[str]:
    """Return the category and code of an error, in the envelope inside `output` or beside it."""
    output = payload.get("output")
    envelope = output if isinstance(output, dict) else base.first(output)
    return [hint for place in (envelope, payload) for hint in _named(place)]


def _named(place: dict[str, Any]) -> list[str]:
    classification = place.get("classification")
    category = classification.get("category") if isinstance(classification, dict) else None
    return [base.words(category), base.words(place.get("error_code"))]


DECLARED: Final = Declared(
    make=lambda given: Eachlabs(given.key, given.urls["base"], confirm=given.confirm),
    key="EACHLABS_API_KEY",
    urls={"base": "https://api.eachlabs.ai"},
    path="/v1",
    example="nano-banana",
    secret_headers=frozenset({b"x-webhook-secret"}),
    max_in_flight=10,
    requests_per_minute=100,
    confirm="ask Eachlabs before believing its callback",
)
