"""Oxen.ai: a queue without callbacks; outcomes come on our account's event stream or by polls.

Facts: docs.oxen.ai, inference-api reference (async queue, image generation and editing, video
generation).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NoReturn

import httpx
from msgspec.structs import replace

from receiver.model.costs import micro
from receiver.model.errors import Problem, Unproved, Unreadable
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
    Refused,
)
from receiver.providers.declared import Api, Declared

_KINDS: Final = {
    "queued": "processing",
    "processing": "processing",
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "canceled",
    "canceled": "canceled",
}

# Oxen passes an unknown parameter to the model, which may fail and be billed: refuse it here.
_HOOK_PARAMETERS: Final = frozenset({"webhook", "webhook_url", "webhook_secret", "fal_webhook"})

_SERVED_AT: Final = "served_at"
_VIDEOS, _IMAGES, _EDIT = "/videos/generate", "/images/generate", "/images/edit"
_BLOCKING: Final = (_VIDEOS, _IMAGES, _EDIT)
"""Calls that wait for the end, as named in a model's `endpoint`."""
_OF_VIDEOS: Final = frozenset({"duration", "generate_audio", "input_video", "multi_prompt"})
_NO_MODEL: Final = re.compile("model not found", re.IGNORECASE)

_CLOCK_SKEW: Final = 120.0
"""Seconds by which Oxen's clock and ours may differ when looking for a lost submit."""


@dataclass(frozen=True)
class Oxen:
    api: Api
    bills_after: float | None
    name: ClassVar[str] = "oxen"
    proof: ClassVar[Proof] = "none"
    most_billed: ClassVar[int] = 1

    def check(self, model: str, input: dict[str, Any]) -> None:  # noqa: ARG002 - the protocol's
        """Refuse several generations in one prediction, and parameters for a webhook."""
        number = input.get("num_generations", 1)
        if number != 1 or isinstance(number, bool):
            raise Problem(
                422,
                "unsupported-input",
                "num_generations must be 1: one prediction is one generation; "
                "submit several predictions instead",
            )
        unfit = sorted(_HOOK_PARAMETERS & input.keys())
        if unfit:
            raise Problem(
                422, "unsupported-input", f"Oxen.ai has no webhooks: leave out {', '.join(unfit)}"
            )

    def request(self, ticket: Ticket, hook: CallbackTarget | None) -> httpx.Request:  # noqa: ARG002 - no webhooks
        body = {**ticket.input, "model": ticket.model}
        return self.api.post(_submit_path(ticket), json=body)

    def addressed(self, ticket: Ticket, answer: ProviderResponse) -> Ticket | Refused | Postponed:
        """Choose the blocking call: a wrong one, as of pictures for a video, may be billed too."""
        body = parsing.content(answer)
        if answer.status == httpx.codes.NOT_FOUND and not _NO_MODEL.match(_reason(body)):
            # A replacement for Oxen.ai (another base URL) describes no models.
            return replace(ticket, links={_SERVED_AT: _shaped(ticket.input)})
        if settled := parsing.declined(answer, _reason(body), _type(body)):
            return settled
        path = _served_at(body, ticket.input)
        if path is None:
            return Refused(_no_blocking_call(ticket.model))
        return replace(ticket, links={_SERVED_AT: path})

    def accepted(self, ticket: Ticket, answer: ProviderResponse) -> Receipt:
        body = parsing.content(answer)
        if settled := parsing.settle_submit(
            answer, _reason(body), _type(body), blocks=ticket.mode == "sync"
        ):
            return settled
        if ticket.mode == "sync":
            return _made(body, ticket)
        row = parsing.first(body.get("generations"))
        return parsing.accepted("Oxen.ai", parsing.identifier(row.get("generation_id")))

    def authenticate(self, callback: Callback, *, now: float, keys: Sequence[bytes]) -> NoReturn:  # noqa: ARG002 - the protocol's
        raise Unproved("no_webhooks")

    def read(self, body: bytes) -> Outcome:  # noqa: ARG002 - the protocol's
        raise Unreadable("Oxen.ai sends no callbacks")

    def stream(self) -> httpx.Request:
        return self.api.get("/api/events", headers={"Accept": "text/event-stream"})

    def streamed(self, event: str, data: str) -> Outcome | None:
        """Read one stream event; None for the types of other products on the same stream."""
        if event != "media_generation_completed":
            return None
        return _outcome(parsing.decode_object(data), url="url", reason="error")

    def poll(self, ticket: Ticket) -> httpx.Request:
        return self.api.get(f"/api/ai/queue/{parsing.segment(ticket)}")

    def polled(self, ticket: Ticket, answer: ProviderResponse) -> Outcome:
        """Read a row; rows vanished at their end before May 2026, so a 404 is no failure."""
        if settled := parsing.settle_poll(ticket, answer):
            return settled
        row = parsing.decode_object(answer.body)
        if parsing.identifier(row.get("generation_id")) is None:
            row["generation_id"] = ticket.provider_id  # we asked for this one
        return _outcome(row, url="result_url", reason="error_message")

    def bill(self, tickets: Sequence[Ticket]) -> httpx.Request:
        return self.api.get(f"/api/ai/generations/{parsing.segment(tickets[0])}")

    def billed(self, tickets: Sequence[Ticket], answer: ProviderResponse) -> dict[str, int]:
        """Read the cost of a generation: a number or its text, in dollars like all its prices."""
        if answer.status != httpx.codes.OK:
            raise parsing.unexpected(answer)
        generation = parsing.decode_object(answer.body).get("generation")
        cost = micro(generation.get("cost")) if isinstance(generation, dict) else None
        return {} if cost is None else {tickets[0].id: cost}

    def search(self, ticket: Ticket) -> Sequence[httpx.Request]:
        """List the rows of this model: those in the queue, then those that have ended."""
        return [
            self.api.get("/api/ai/queue", params={"model": ticket.model, **status})
            for status in ({}, {"status": "succeeded"}, {"status": "failed"})
        ]

    def found(self, ticket: Ticket, answer: ProviderResponse) -> Found:
        """Return the rows with the same model and input, enqueued around our submit."""
        if not parsing.is_success(answer):
            raise parsing.unexpected(answer)
        rows = parsing.decode_object(answer.body).get("generations")
        if not isinstance(rows, list):
            raise Unreadable("no list of generations")
        matching = [row for row in rows if _same(ticket, row)]
        matching.sort(key=lambda row: float(row["enqueued_at"]))
        ids = (parsing.identifier(row.get("generation_id")) for row in matching)
        return Found([Candidate(provider_id) for provider_id in ids if provider_id])

    def cancel(self, ticket: Ticket) -> httpx.Request:
        return self.api.call("DELETE", f"/api/ai/queue/{parsing.segment(ticket)}")

    def details(self, model: str) -> httpx.Request:
        return self.api.get(f"/api/ai/models/{parsing.model_path(model)}")

    def try_key(self) -> httpx.Request:
        """List the queue."""
        return self.api.get("/api/ai/queue")

    def key_works(self, answer: ProviderResponse) -> bool | None:
        body = parsing.error_body(answer.body)
        if _type(body) == "unauthenticated":  # its HTTP status is not documented
            return False
        listed = answer.status == httpx.codes.OK and isinstance(body.get("generations"), list)
        return parsing.key_accepted(answer, sign=listed)


def _submit_path(ticket: Ticket) -> str:
    if ticket.mode == "queue":
        return "/api/ai/queue"
    if _SERVED_AT not in ticket.links:  # a guess would be billed even if wrong
        raise Problem(422, "unsupported-input", _no_blocking_call(ticket.model))
    return f"/api/ai{ticket.links[_SERVED_AT]}"


def _served_at(model: dict[str, Any], input: dict[str, Any]) -> str | None:
    """Return the blocking call that serves a model: the one it names, or the one of its output."""
    named = parsing.first_text(model.get("endpoint"))
    if named:
        return next((path for path in _BLOCKING if named.endswith(path)), None)
    can = model.get("capabilities")
    made = can.get("output") if isinstance(can, dict) else None
    if made == ["video"]:
        return _VIDEOS
    return _shaped(input) if made == ["image"] else None


def _shaped(input: dict[str, Any]) -> str:
    """Return the blocking call that an input is for, by parameters that only this call has."""
    if _OF_VIDEOS & input.keys():
        return _VIDEOS
    return _EDIT if "input_image" in input else _IMAGES


def _no_blocking_call(model: str) -> str:
    return (
        f"Oxen.ai does not say which of its blocking calls serves {model[:200]!r}: "
        "leave out the mode `sync`, as its queue takes every model that makes pictures or videos"
    )


def _outcome(row: dict[str, Any], *, url: str, reason: str) -> Outcome:
    """Read a row of the queue or an event: they differ only in the names of their fields."""
    provider_id = parsing.identifier(row.get("generation_id"))
    kind = parsing.lookup(_KINDS, row.get("status"), "processing")
    if provider_id is None:
        raise Unreadable("no generation_id")
    if kind == "succeeded":
        made = [file for file in results.outputs(row.get(url)) if file.url]
        if not made:
            return Outcome(kind="ask", provider_id=provider_id)
        return Outcome(kind=kind, provider_id=provider_id, output=made)
    error = parsing.failure(parsing.error_text(row.get(reason)) or _reason(row), _type(row))
    return parsing.outcome_without_output(kind, provider_id, error, "canceled at Oxen.ai")


def _made(body: dict[str, Any], ticket: Ticket) -> Outcome:
    """Read the answer of a blocking call: URLs, or files as base64."""
    places = {name: body.get(name) for name in ("images", "videos")}
    made = results.outputs(places, ticket.input)
    if not made:
        reason = _reason(body) if parsing.is_error(body.get("error")) else ""
        error = parsing.failure(reason or "Oxen.ai answered without a result", _type(body))
        return Outcome(kind="failed", error=error)
    return Outcome(kind="succeeded", output=made)


def _reason(body: dict[str, Any]) -> str:
    """Return the message of an error: form A (title, detail) or form B (message)."""
    error = body.get("error")
    if isinstance(error, dict):
        detail = parsing.first_text(error.get("detail"), error.get("message"))
        text = parsing.join([parsing.first_text(error.get("title")), detail])
        return text or parsing.first_text(error.get("type"))
    places = (error, body.get("error_message"), body.get("status_message"))
    return parsing.first_text(*map(parsing.error_text, places))


def _type(body: dict[str, Any]) -> str:
    """Return the type or code of an error: of form A, or of the upstream that form B passes on."""
    error = body.get("error")
    return (
        parsing.first_text(error.get("type"), error.get("code")) if isinstance(error, dict) else ""
    )


def _same(ticket: Ticket, row: Any) -> bool:
    """Return whether a row can be of this submit: it repeats the input, and was queued then."""
    if not isinstance(row, dict) or ticket.submitted_at is None:
        return False
    enqueued = row.get("enqueued_at")
    if not isinstance(enqueued, int | float) or isinstance(enqueued, bool):
        return False
    return (
        row.get("model_name", row.get("model")) == ticket.model
        and row.get("prompt") == ticket.input.get("prompt")
        and all(row.get(name, value) == value for name, value in ticket.input.items())
        and ticket.submitted_at - _CLOCK_SKEW <= enqueued <= ticket.submitted_at + _CLOCK_SKEW
    )


DECLARED: Final = Declared(
    make=lambda given: Oxen(given.api(), 60.0 if given.key else None),
    key="OXEN_API_KEY",
    urls={"base": "https://hub.oxen.ai"},
    path="/api",
    example="nano-banana",
)
