"""OpenRouter: videos as jobs, with a callback that says what it cost; pictures by a blocking call.

Facts: OpenRouterTeam/docs (2026-08: guides to video and image generation, webhooks, API reference).
Callbacks are signed only if the workspace has a signing secret, which no call hands out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import httpx

from receiver.model.costs import micro
from receiver.model.states import cause_of
from receiver.model.values import Error, Outcome, Output, Ticket
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

_KINDS: Final = {
    "pending": "processing",
    "in_progress": "processing",
    "completed": "succeeded",
    "failed": "failed",
    "cancelled": "canceled",
    "expired": "failed",
}
_SIGNATURE: Final = Hmac(
    header=b"x-openrouter-signature",
    covers=(),
    own_time=True,
    joiner=b",",
    label=b"v1=",
    write=as_hex,
    key=as_text,
)


@dataclass(frozen=True)
class OpenRouter:
    """The adapter; `base_url` has no trailing slash and no `/api/v1`."""

    key: str
    base_url: str
    name: ClassVar[Literal["openrouter"]] = "openrouter"
    proof: ClassVar[Literal["account_secret"]] = "account_secret"
    stream_path: ClassVar[None] = None

    def check(self, model: str, input: dict[str, Any]) -> None:
        """Refuse nothing: models and their parameters change without us."""

    def request(self, ticket: Ticket, hook: CallbackTarget | None) -> httpx.Request:
        body = {**ticket.input, "model": ticket.model}
        if ticket.mode == "sync":
            return self._call("POST", "/images", json=body)
        if hook is not None:
            body["callback_url"] = hook.url
        return self._call("POST", "/videos", json=body)

    def accepted(self, ticket: Ticket, answer: ProviderResponse) -> Receipt:
        body = parsing.content(answer)
        if settled := parsing.settle_submit(answer, _reason(body)):
            return settled
        if ticket.mode == "sync":
            return _pictures(body)
        provider_id = parsing.identifier(body.get("id"))
        if provider_id is None:
            return Ambiguous("OpenRouter accepted the submit without an id")
        return Accepted(provider_id)

    def authenticate(self, callback: Callback, *, now: float, keys: Sequence[bytes]) -> None:
        """Verify the one header; whose job of the workspace it is, its body says."""
        _SIGNATURE.verify(callback, now=now, keys=keys)

    def read(self, body: bytes) -> Outcome:
        job = parsing.decode_object(body).get("data")
        outcome = self._outcome(job if isinstance(job, dict) else {})
        # The secret signs for all of the workspace: what names no job proves nothing of ours.
        if outcome.provider_id is None or cause_of(outcome) is None:
            return Outcome(kind="ask", provider_id=outcome.provider_id)
        return outcome

    def poll(self, ticket: Ticket) -> httpx.Request:
        return self._call("GET", f"/videos/{parsing.model_path(ticket.provider_id or '')}")

    def polled(self, ticket: Ticket, answer: ProviderResponse) -> Outcome:
        if answer.status == httpx.codes.NOT_FOUND:
            return Outcome(kind="missing", provider_id=ticket.provider_id)
        if answer.status != httpx.codes.OK:
            raise parsing.unexpected(answer, _reason(parsing.error_body(answer.body)))
        return self._outcome({"id": ticket.provider_id, **parsing.decode_object(answer.body)})

    def cancel(self, ticket: Ticket) -> None:
        """Return nothing: OpenRouter has no call that stops a job."""

    def details(self, model: str) -> None:
        """Return nothing: OpenRouter lists its video models, but describes none by itself."""

    def try_key(self) -> httpx.Request:
        """Ask about the key itself."""
        return self._call("GET", "/key")

    def key_works(self, answer: ProviderResponse) -> bool | None:
        told = parsing.error_body(answer.body).get("data")
        described = answer.status == httpx.codes.OK and isinstance(told, dict)
        return parsing.let_in(answer, sign=described)

    def authorization(self, url: str) -> str | None:
        """Give our key for a video, which is at the API itself."""
        ours = self.key and parsing.leads_to(url, (self.base_url,))
        return f"Bearer {self.key}" if ours else None

    def _outcome(self, job: dict[str, Any]) -> Outcome:
        provider_id = parsing.identifier(job.get("id"))
        status, said = job.get("status"), _reason(job)
        kind = parsing.lookup(_KINDS, status, "processing")
        more: dict[str, Any] = {"provider_id": provider_id, "cost": _cost(job)}
        if kind == "succeeded" and provider_id:
            return Outcome(kind=kind, output=self._videos(provider_id, job), **more)
        error = {
            "failed": parsing.failure(said, "timeout" if status == "expired" else ""),
            "canceled": Error(code="canceled", message=said or "canceled at OpenRouter"),
        }.get(kind)
        return Outcome(kind=kind if error else "processing", error=error, **more)

    def _videos(self, provider_id: str, job: dict[str, Any]) -> list[Output]:
        """Return where they are at the API, which needs our key; signed URLs do not last."""
        places = job.get("unsigned_urls") or job.get("urls")
        named = [video for video in results.outputs(places) if video.url]
        path = f"/api/v1/videos/{parsing.model_path(provider_id)}/content"
        return named or [Output(url=self.base_url + path)]

    def _call(self, method: str, path: str, **content: Any) -> httpx.Request:
        headers = {"Authorization": f"Bearer {self.key}", "Accept": "application/json"}
        url = f"{self.base_url}/api/v1{path}"
        return httpx.Request(method, url, headers=headers, **content)


def _pictures(body: dict[str, Any]) -> Outcome:
    """Read the answer of the blocking call: files as base64."""
    if made := results.outputs(body.get("data")):
        return Outcome(kind="succeeded", output=made, cost=_cost(body))
    error = parsing.failure(_reason(body) or "OpenRouter answered without a picture")
    return Outcome(kind="failed", error=error, cost=_cost(body))


def _cost(body: dict[str, Any]) -> int | None:
    usage = body.get("usage")
    return micro(usage.get("cost")) if isinstance(usage, dict) else None


def _reason(body: dict[str, Any]) -> str:
    """Find the words of an error: a text, or an object whose `code` is only the HTTP status."""
    error = body.get("error")
    said = error.get("message") if isinstance(error, dict) else error
    return parsing.words(parsing.spoken(said), parsing.spoken(body.get("message")))


DECLARED: Final = Declared(
    make=lambda given: OpenRouter(given.key, given.urls["base"]),
    key="OPENROUTER_API_KEY",
    urls={"base": "https://openrouter.ai"},
    path="/api/v1",
    example="google/veo-3.1",
    secret="OPENROUTER_WEBHOOK_SECRET",  # noqa: S106 - its variable
)
