"""Black Forest Labs (FLUX): callbacks signed with our secret, results kept for ten minutes.

Facts: docs.bfl.ai (API reference) and black-forest-labs/skills (2026-02). Work is done by shards
of several regions: a submit's answer names the one to poll.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import httpx

from receiver.model.errors import Problem
from receiver.model.values import Outcome, OutcomeKind, Ticket
from receiver.providers import parsing, results
from receiver.providers.adapter import CallbackTarget, Proof, ProviderResponse, Receipt
from receiver.providers.declared import Api, Declared
from receiver.providers.signatures import Hmac, as_hex, as_text

_KINDS: Final[dict[str, OutcomeKind]] = {
    "pending": "processing",
    "queued": "processing",
    "processing": "processing",
    "ready": "succeeded",
    "error": "failed",
    "failed": "failed",
    "request moderated": "failed",
    "content moderated": "failed",
    "task not found": "missing",
}
_MODERATED: Final = frozenset({"request moderated", "content moderated"})
_OURS: Final = frozenset({"webhook_url", "webhook_secret"})
_DOMAIN: Final = "bfl.ai"
"""The domain of the shards, such as api.eu2.bfl.ai."""
_SIGNATURE: Final = Hmac(
    header=b"x-bfl-signature", covers=(), label=b"sha256=", write=as_hex, key=as_text
)
_MICROS: Final = 10_000
"""Microdollars in a cent, the unit of BFL's costs."""
_MOST_CENTS: Final = 1_000_000


@dataclass(frozen=True)
class Bfl:
    api: Api
    name: ClassVar[str] = "bfl"
    proof: ClassVar[Proof] = "prediction_secret"

    def check(self, model: str, input: dict[str, Any]) -> None:
        """Refuse a model that is no endpoint, and callback parameters that would replace ours."""
        if "/" in parsing.model_path(model):
            raise Problem(422, "invalid-model", "a model of BFL is one name, as flux-2-pro")
        if unfit := sorted(_OURS & input.keys()):
            detail = f"callbacks come to the receiver: leave out {', '.join(unfit)}"
            raise Problem(422, "unsupported-input", detail)

    def request(self, ticket: Ticket, hook: CallbackTarget | None) -> httpx.Request:
        body = dict(ticket.input)
        if hook is not None and ticket.mode == "queue":
            body |= {"webhook_url": hook.url, "webhook_secret": hook.secret}
        return self.api.post(f"/{parsing.model_path(ticket.model)}", json=body)

    def accepted(self, ticket: Ticket, answer: ProviderResponse) -> Receipt:  # noqa: ARG002 - nothing blocks
        body = parsing.content(answer)
        if settled := parsing.settle_submit(
            answer, _reason(body), parsing.first_text(body.get("error")), blocks=False
        ):
            return settled
        url, provider_id = body.get("polling_url"), parsing.identifier(body.get("id"))
        links = (
            {"polling_url": str(url)}
            if parsing.may_receive_key(url, [self.api.base], _DOMAIN)
            else {}
        )
        return parsing.accepted("BFL", provider_id, links, _cost(body.get("cost")))

    authenticate = staticmethod(_SIGNATURE.verify)
    """No time is signed; the secret is used for this prediction only."""

    def read(self, body: bytes) -> Outcome:
        return parsing.only_an_end(_outcome(parsing.decode_object(body)))

    def poll(self, ticket: Ticket) -> httpx.Request:
        if "polling_url" in ticket.links:
            return self.api.get(ticket.links["polling_url"])
        return self.api.get("/get_result", params={"id": parsing.segment(ticket)})

    def polled(self, ticket: Ticket, answer: ProviderResponse) -> Outcome:
        if settled := parsing.settle_poll(ticket, answer, _reason):
            return settled
        return _outcome(parsing.with_status(answer.body), ticket)

    def try_key(self) -> httpx.Request:
        """Ask for the remaining credits of the account."""
        return self.api.get("/credits")

    def key_works(self, answer: ProviderResponse) -> bool | None:
        has_credits = "credits" in parsing.error_body(answer.body)
        return parsing.key_accepted(answer, sign=answer.status == httpx.codes.OK and has_credits)


def _outcome(body: dict[str, Any], ticket: Ticket | None = None) -> Outcome:
    """Read a poll's answer or a callback: they differ only in the place of the error."""
    status = parsing.first_text(body.get("status"))
    kind = parsing.lookup(_KINDS, status, "processing")
    provider_id = parsing.identifier(body.get("id"), ticket.provider_id if ticket else None)
    if kind == "succeeded":
        made = results.outputs(body.get("result"), ticket.input if ticket else None)
        return Outcome(kind=kind, provider_id=provider_id, output=made)
    if status.lower() in _MODERATED:
        error = parsing.failure(parsing.join([status, *_reasons(body.get("details"))]), status)
    else:
        error = parsing.failure(_reason(body) or status, parsing.first_text(body.get("error")))
    return parsing.outcome_without_output(kind, provider_id, error)


def _reason(body: dict[str, Any]) -> str:
    """Return the message of an error, or else its code."""
    places = ("message", "details", "detail", "error")
    return parsing.first_text(*(parsing.error_text(body.get(name)) for name in places))


def _reasons(details: Any) -> list[str]:
    """Return the texts in the details of a moderation, under any names."""
    values = details.values() if isinstance(details, dict) else [details]
    return [text for value in values if (text := parsing.error_text(value))]


def _cost(cents: Any) -> int | None:
    fits = type(cents) in (int, float) and 0 <= cents <= _MOST_CENTS
    return round(cents * _MICROS) if fits else None


DECLARED: Final = Declared(
    make=lambda given: Bfl(given.api("/v1", x_key=given.key)),
    key="BFL_API_KEY",
    urls={"base": "https://api.bfl.ai"},
    path="/v1",
    example="flux-2-pro",
    max_in_flight=24,
    results_live=600.0,
)
