"""Replicate: models, versions and deployments; callbacks signed with the account's secret.

Facts: replicate.com's docs (webhooks, prediction lifecycle, rate limits) and its Python and
JavaScript clients (2025-12). Results are deleted an hour after the end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Final

import httpx

from receiver.model.errors import Problem, Unreadable
from receiver.model.values import Outcome, Output, Ticket
from receiver.providers import parsing, results
from receiver.providers.adapter import (
    CallbackTarget,
    Candidate,
    Found,
    Proof,
    ProviderResponse,
    Receipt,
)
from receiver.providers.declared import Api, Declared
from receiver.providers.signatures import WHSEC, Hmac, read_whsec

_KINDS: Final = {
    "starting": "processing",
    "processing": "processing",
    "succeeded": "succeeded",
    "failed": "failed",
    "canceled": "canceled",
    "cancelled": "canceled",
    # Its deadline passed before it began; the official Python client does not know this status.
    "aborted": "canceled",
}
_DEPLOYMENTS: Final = "deployments/"
_VERSION: Final = re.compile(r"(?:[\w.-]+/[\w.-]+:)?[\da-f]{64}")
_BLOCKING: Final = "wait=60"
"""The longest that a submit may block; a prediction that has not ended by then is polled."""
_LOOKED_FOR: Final = (-30, 90)
"""Seconds before and after a lost submit in which to look for it."""


@dataclass(frozen=True)
class Replicate:
    api: Api
    name: ClassVar[str] = "replicate"
    proof: ClassVar[Proof] = "account_secret"

    def check(self, model: str, input: dict[str, Any]) -> None:  # noqa: ARG002 - the protocol's
        """Refuse a model name in a form that Replicate does not have."""
        _submit_to(model)

    def request(self, ticket: Ticket, hook: CallbackTarget | None) -> httpx.Request:
        path, body = _submit_to(ticket.model)
        body["input"] = ticket.input
        if ticket.mode == "sync":
            return self.api.post(path, json=body, headers={"Prefer": _BLOCKING})
        if hook is not None:
            body |= {"webhook": hook.url, "webhook_events_filter": ["completed"]}
        return self.api.post(path, json=body)

    def accepted(self, ticket: Ticket, answer: ProviderResponse) -> Receipt:
        body = parsing.content(answer)
        if settled := parsing.settle_submit(answer, _refusal(body), blocks=ticket.mode == "sync"):
            return settled
        provider_id = parsing.identifier(body.get("id"))
        if provider_id is None or ticket.mode == "queue":
            return parsing.accepted("Replicate", provider_id)
        return _outcome(body, ticket)

    authenticate = staticmethod(Hmac().verify)
    """The secret is the account's; the body names the prediction."""

    def keys(self) -> httpx.Request:
        return self.api.get("/webhooks/default/secret")

    def read_keys(self, body: bytes) -> list[bytes]:
        return read_whsec(parsing.decode_object(body).get("key"))

    def read(self, body: bytes) -> Outcome:
        payload = parsing.decode_object(body)
        outcome = _outcome(payload)
        # The secret is the account's: a callback without an id or status proves nothing about ours.
        if outcome.provider_id is None or not isinstance(payload.get("status"), str):
            return Outcome(kind="ask", provider_id=outcome.provider_id)
        return outcome

    def poll(self, ticket: Ticket) -> httpx.Request:
        return self.api.get(f"/predictions/{parsing.segment(ticket)}")

    def polled(self, ticket: Ticket, answer: ProviderResponse) -> Outcome:
        if settled := parsing.settle_poll(ticket, answer, _refusal):
            return settled
        return _outcome(parsing.decode_object(answer.body), ticket)

    def search(self, ticket: Ticket) -> Sequence[httpx.Request]:
        """List the predictions that the account created around the submit."""
        if ticket.submitted_at is None:
            return []
        begin = datetime.fromtimestamp(ticket.submitted_at, UTC)
        after, before = ((begin + timedelta(seconds=each)).isoformat() for each in _LOOKED_FOR)
        params = {"created_after": after, "created_before": before}
        return [self.api.get("/predictions", params=params)]

    def found(self, ticket: Ticket, answer: ProviderResponse) -> Found:
        """Return all with a callback, as its URL shows whose they are, and others like ours."""
        if not parsing.is_success(answer):
            raise parsing.unexpected(answer)
        page = parsing.decode_object(answer.body)
        rows, following = page.get("results"), parsing.first_text(page.get("next"))
        if not isinstance(rows, list):
            raise Unreadable("no list of predictions")
        candidates = [_candidate(ticket, row) for row in reversed(rows) if isinstance(row, dict)]
        more = (
            self.api.get(following) if parsing.may_receive_key(following, [self.api.base]) else None
        )
        return Found([candidate for candidate in candidates if candidate], more)

    def cancel(self, ticket: Ticket) -> httpx.Request:
        return self.api.post(f"/predictions/{parsing.segment(ticket)}/cancel")

    def details(self, model: str) -> httpx.Request | None:
        name = model.partition(":")[0]
        if "/" not in name:
            return None  # a version alone does not name its model
        path = parsing.model_path(name if name.startswith(_DEPLOYMENTS) else f"models/{name}")
        return self.api.get(f"/{path}")

    def try_key(self) -> httpx.Request:
        """Ask for the account of the key."""
        return self.api.get("/account")

    def key_works(self, answer: ProviderResponse) -> bool | None:
        named = isinstance(parsing.error_body(answer.body).get("username"), str)
        return parsing.key_accepted(answer, sign=answer.status == httpx.codes.OK and named)


def _submit_to(model: str) -> tuple[str, dict[str, Any]]:
    """Return the path of a submit and the fields that name the model, or raise Problem."""
    if _VERSION.fullmatch(model):
        return "/predictions", {"version": model}
    kind, name = "models", model
    if model.startswith(_DEPLOYMENTS):
        kind, name = "deployments", model.removeprefix(_DEPLOYMENTS)
    path = parsing.model_path(name)
    if path.count("/") != 1 or ":" in name:
        raise Problem(
            422,
            "invalid-model",
            "a Replicate model is owner/name, owner/name:version, a version's id of 64 digits, or "
            "deployments/owner/name",
        )
    return f"/{kind}/{path}/predictions", {}


def _outcome(payload: dict[str, Any], ticket: Ticket | None = None) -> Outcome:
    """Read a prediction: callbacks, polls and submits contain it in the same form."""
    kind = parsing.lookup(_KINDS, payload.get("status"), "processing")
    provider_id = parsing.identifier(payload.get("id"), ticket.provider_id if ticket else None)
    if kind == "succeeded" and payload.get("output") is None and payload.get("data_removed"):
        kind = "failed"
        payload = {"error": "Replicate had deleted the result before it was asked for"}
    if kind == "succeeded":
        sent = ticket.input if ticket else payload.get("input")
        return Outcome(
            kind=kind, provider_id=provider_id, output=_made(payload.get("output"), sent)
        )
    status = parsing.first_text(payload.get("status"))
    error = parsing.failure(parsing.error_text(payload.get("error")))
    return parsing.outcome_without_output(kind, provider_id, error, f"{status} at Replicate")


def _made(output: Any, sent: Any) -> list[Output]:
    """Return the files of an output, or its text, which may come as a list of pieces."""
    pieces = isinstance(output, list) and all(isinstance(piece, str) for piece in output)
    found = results.outputs(output, sent)
    if pieces and not any(each.url for each in found):
        return results.outputs("".join(output), sent)
    return found


def _refusal(body: dict[str, Any]) -> str:
    """Return the message of a refusal, with the invalid fields that it lists."""
    text, fields = parsing.error_text(body), body.get("invalid_fields")
    listed = [each for each in fields if isinstance(each, dict)] if isinstance(fields, list) else []
    wrong = [_located(each) for each in listed]
    return parsing.join([text, *(each for each in wrong if each not in text)])


def _located(field: dict[str, Any]) -> str:
    """Return the description of an invalid field, after its name."""
    parts = (parsing.first_text(field.get(name)) for name in ("field", "description"))
    return ": ".join(filter(None, parts))


def _candidate(ticket: Ticket, row: dict[str, Any]) -> Candidate | None:
    provider_id = parsing.identifier(row.get("id"))
    hook = parsing.first_text(row.get("webhook")) or None
    if provider_id is None or (hook is None and not _is_same(ticket, row)):
        return None
    return Candidate(provider_id, hook)


def _is_same(ticket: Ticket, row: dict[str, Any]) -> bool:
    """Return whether a prediction has a ticket's input, and its model, version or deployment."""
    name, value = "model", ticket.model
    if _VERSION.fullmatch(value):
        name, value = "version", value.rpartition(":")[2]
    elif value.startswith(_DEPLOYMENTS):
        name, value = "deployment", value.removeprefix(_DEPLOYMENTS)
    return row.get(name) == value and row.get("input") == ticket.input


DECLARED: Final = Declared(
    make=lambda given: Replicate(given.api("/v1")),
    key="REPLICATE_API_TOKEN",
    urls={"base": "https://api.replicate.com"},
    path="/v1",
    example="google/nano-banana",
    secret="REPLICATE_WEBHOOK_SIGNING_SECRET",  # noqa: S106 - the name of one
    secret_begins=WHSEC,
    requests_per_minute=600,
    results_live=3600.0,
)
