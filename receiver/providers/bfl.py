"""Black Forest Labs (FLUX): callbacks signed with a secret of ours, results for ten minutes.

Facts: docs.bfl.ai (API reference) and black-forest-labs/skills (2026-02). Work is done by shards
of several regions: a submit's answer names the one to ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import httpx

from receiver.model.errors import Problem, Unreadable
from receiver.model.values import Outcome, OutcomeKind, Ticket
from receiver.providers import parsing, results
from receiver.providers.adapter import (
    Accepted,
    Ambiguous,
    Callback,
    CallbackTarget,
    ProviderResponse,
    Receipt,
)
from receiver.providers.declared import Declared
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
"""Shards are below it: api.eu2.bfl.ai and its like."""
_SIGNATURE: Final = Hmac(
    header=b"x-bfl-signature", covers=(), label=b"sha256=", write=as_hex, key=as_text
)
_MICROS: Final = 10_000
"""Millionths of a dollar in a cent, in which BFL counts."""
_MOST_CENTS: Final = 1_000_000


@dataclass(frozen=True)
class Bfl:
    """The adapter; `base_url` has no trailing slash and no `/v1`."""

    key: str
    base_url: str
    name: ClassVar[Literal["bfl"]] = "bfl"
    proof: ClassVar[Literal["prediction_secret"]] = "prediction_secret"
    stream_path: ClassVar[None] = None

    def check(self, model: str, input: dict[str, Any]) -> None:
        """Refuse what is no endpoint's name, and a callback that would take the place of ours."""
        if "/" in parsing.model_path(model):
            raise Problem(422, "invalid-model", "a model of BFL is one name, as flux-2-pro")
        if unfit := sorted(_OURS & input.keys()):
            detail = f"callbacks come to the receiver: leave out {', '.join(unfit)}"
            raise Problem(422, "unsupported-input", detail)

    def request(self, ticket: Ticket, hook: CallbackTarget | None) -> httpx.Request:
        body = dict(ticket.input)
        if hook is not None and ticket.mode == "queue":
            body |= {"webhook_url": hook.url, "webhook_secret": hook.secret}
        return self._call("POST", f"{self._api}/{parsing.model_path(ticket.model)}", json=body)

    def accepted(self, ticket: Ticket, answer: ProviderResponse) -> Receipt:  # noqa: ARG002 - nothing blocks
        body = parsing.content(answer)
        if settled := parsing.settle_submit(answer, _said(body), parsing.words(body.get("error"))):
            return settled
        provider_id = parsing.identifier(body.get("id"))
        if provider_id is None:
            return Ambiguous("BFL accepted the submit without an id")
        url = body.get("polling_url")
        links = {"polling_url": str(url)} if parsing.leads_to(url, [self.base_url], _DOMAIN) else {}
        return Accepted(provider_id, links, _cost(body.get("cost")))

    def authenticate(self, callback: Callback, *, now: float, keys: Sequence[bytes]) -> None:
        """Verify a signature without a time; its secret is of this prediction alone."""
        _SIGNATURE.verify(callback, now=now, keys=keys)

    def read(self, body: bytes) -> Outcome:
        outcome = _outcome(parsing.decode_object(body))
        if outcome.kind in {"processing", "missing"}:  # nothing but an end is told
            return Outcome(kind="ask", provider_id=outcome.provider_id)
        return outcome

    def poll(self, ticket: Ticket) -> httpx.Request:
        if "polling_url" in ticket.links:
            return self._call("GET", ticket.links["polling_url"])
        params = {"id": parsing.model_path(ticket.provider_id or "")}
        return self._call("GET", f"{self._api}/get_result", params=params)

    def polled(self, ticket: Ticket, answer: ProviderResponse) -> Outcome:
        if answer.status == httpx.codes.NOT_FOUND:
            return Outcome(kind="missing", provider_id=ticket.provider_id)
        if answer.status != httpx.codes.OK:
            raise parsing.unexpected(answer, _said(parsing.error_body(answer.body)))
        body = parsing.decode_object(answer.body)
        if not isinstance(body.get("status"), str):
            raise Unreadable("no status")
        return _outcome(body, ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Return nothing: there is no such call."""

    def details(self, model: str) -> None:
        """Return nothing: there is no such call."""

    def try_key(self) -> httpx.Request:
        """Ask what is left of the account's money."""
        return self._call("GET", f"{self._api}/credits")

    def key_works(self, answer: ProviderResponse) -> bool | None:
        told = "credits" in parsing.error_body(answer.body)
        return parsing.let_in(answer, sign=answer.status == httpx.codes.OK and told)

    @property
    def _api(self) -> str:
        return f"{self.base_url}/v1"

    def _call(self, method: str, url: str, **content: Any) -> httpx.Request:
        headers = {"x-key": self.key, "Accept": "application/json"}
        return httpx.Request(method, url, headers=headers, **content)


def _outcome(body: dict[str, Any], ticket: Ticket | None = None) -> Outcome:
    """Read an answer to a poll or a callback; in the end they differ only in an error's place."""
    status = parsing.words(body.get("status"))
    kind = parsing.lookup(_KINDS, status, "processing")
    provider_id = parsing.identifier(body.get("id"), ticket.provider_id if ticket else None)
    if kind == "succeeded":
        made = results.outputs(body.get("result"), ticket.input if ticket else None)
        return Outcome(kind=kind, provider_id=provider_id, output=made)
    if kind == "failed":
        if status.lower() in _MODERATED:
            error = parsing.failure(parsing.join([status, *_reasons(body.get("details"))]), status)
        else:
            error = parsing.failure(_said(body) or status, parsing.words(body.get("error")))
        return Outcome(kind=kind, provider_id=provider_id, error=error)
    return Outcome(kind=kind, provider_id=provider_id)


def _said(body: dict[str, Any]) -> str:
    """Return what went wrong in words; where there are none, in its code."""
    places = ("message", "details", "detail", "error")
    return parsing.words(*(parsing.spoken(body.get(name)) for name in places))


def _reasons(details: Any) -> list[str]:
    """Return what the details of a moderation say, under whatever names."""
    values = details.values() if isinstance(details, dict) else [details]
    return [said for value in values if (said := parsing.spoken(value))]


def _cost(cents: Any) -> int | None:
    fits = type(cents) in (int, float) and 0 <= cents <= _MOST_CENTS
    return round(cents * _MICROS) if fits else None


DECLARED: Final = Declared(
    make=lambda given: Bfl(given.key, given.urls["base"]),
    key="BFL_API_KEY",
    urls={"base": "https://api.bfl.ai"},
    path="/v1",
    example="flux-2-pro",
    max_in_flight=24,
    results_live=600.0,
)
