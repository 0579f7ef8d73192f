"""OpenRouter: videos as jobs, with the cost in the callback; pictures by a blocking call.

Facts: OpenRouterTeam/docs (2026-08: guides to video and image generation, webhooks, API reference).
Callbacks are signed only if the workspace has a signing secret, which no API call returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import httpx

from receiver.model.costs import micro
from receiver.model.values import Outcome, Output, Ticket
from receiver.providers import parsing, results
from receiver.providers.adapter import CallbackTarget, Proof, ProviderResponse, Receipt
from receiver.providers.declared import Api, Declared
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
    api: Api
    name: ClassVar[str] = "openrouter"
    proof: ClassVar[Proof] = "account_secret"

    def check(self, model: str, input: dict[str, Any]) -> None:
        """Refuse nothing: models and their parameters change without us."""

    def request(self, ticket: Ticket, hook: CallbackTarget | None) -> httpx.Request:
        body = {**ticket.input, "model": ticket.model}
        if ticket.mode == "sync":
            return self.api.post("/images", json=body)
        if hook is not None:
            body["callback_url"] = hook.url
        return self.api.post("/videos", json=body)

    def accepted(self, ticket: Ticket, answer: ProviderResponse) -> Receipt:
        body = parsing.content(answer)
        if settled := parsing.settle_submit(answer, _reason(body), blocks=ticket.mode == "sync"):
            return settled
        if ticket.mode == "sync":
            return _pictures(body)
        return parsing.accepted("OpenRouter", parsing.identifier(body.get("id")))

    authenticate = staticmethod(_SIGNATURE.verify)
    """The secret is the workspace's; the body names the job."""

    def read(self, body: bytes) -> Outcome:
        job = parsing.decode_object(body).get("data")
        outcome = self._outcome(job if isinstance(job, dict) else {})
        # A callback without a job's id proves nothing about ours.
        return parsing.only_an_end(outcome, doubt=outcome.provider_id is None)

    def poll(self, ticket: Ticket) -> httpx.Request:
        return self.api.get(f"/videos/{parsing.segment(ticket)}")

    def polled(self, ticket: Ticket, answer: ProviderResponse) -> Outcome:
        if settled := parsing.settle_poll(ticket, answer, _reason):
            return settled
        job = parsing.decode_object(answer.body)
        job["id"] = parsing.identifier(job.get("id"), ticket.provider_id)
        return self._outcome(job)

    def try_key(self) -> httpx.Request:
        """Ask about the key itself."""
        return self.api.get("/key")

    def key_works(self, answer: ProviderResponse) -> bool | None:
        account = parsing.error_body(answer.body).get("data")
        described = answer.status == httpx.codes.OK and isinstance(account, dict)
        return parsing.key_accepted(answer, sign=described)

    def authorization(self, url: str) -> str | None:
        """Return our key for the URL of a video, which is at the API itself."""
        ours = parsing.may_receive_key(url, [self.api.base])
        return self.api.headers.get("Authorization") if ours else None

    def _outcome(self, job: dict[str, Any]) -> Outcome:
        provider_id = parsing.identifier(job.get("id"))
        status, reason = job.get("status"), _reason(job)
        kind = parsing.lookup(_KINDS, status, "processing")
        if kind == "succeeded":
            made = self._videos(provider_id, job) if provider_id else []
            return Outcome(kind=kind, provider_id=provider_id, output=made, cost=_cost(job))
        error = parsing.failure(reason, "timeout" if status == "expired" else "")
        canceled = reason or "canceled at OpenRouter"
        return parsing.outcome_without_output(kind, provider_id, error, canceled, cost=_cost(job))

    def _videos(self, provider_id: str, job: dict[str, Any]) -> list[Output]:
        """Return the URLs at the API, which need our key; signed URLs expire."""
        places = job.get("unsigned_urls") or job.get("urls")
        named = [video for video in results.outputs(places) if video.url]
        path = f"/videos/{parsing.model_path(provider_id)}/content"
        return named or [Output(url=self.api.base + path)]


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
    """Return the message of an error: a text, or in an object whose `code` is the HTTP status."""
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return parsing.first_text(parsing.error_text(message), parsing.error_text(body.get("message")))


DECLARED: Final = Declared(
    make=lambda given: OpenRouter(given.api("/api/v1")),
    key="OPENROUTER_API_KEY",
    urls={"base": "https://openrouter.ai"},
    path="/api/v1",
    example="google/veo-3.1",
    secret="OPENROUTER_WEBHOOK_SECRET",  # noqa: S106 - its variable
)
