"""WaveSpeed: tasks at `/api/v3`; callbacks are signed in a dialect of Standard Webhooks of its own.

Facts: wavespeed.ai/docs (webhooks, their verification, results, limits) and its Python client 2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import httpx
import msgspec

from receiver.model.errors import Problem
from receiver.model.values import Outcome, Output, Ticket
from receiver.providers import parsing, results
from receiver.providers.adapter import Callback, CallbackTarget, Proof, ProviderResponse, Receipt
from receiver.providers.declared import Api, Declared
from receiver.providers.signatures import WHSEC, Hmac, after_prefix, as_hex, read_whsec

_KINDS: Final = {
    "created": "processing",
    "processing": "processing",
    "completed": "succeeded",
    "failed": "failed",
    # These three are only in its client, which treats them as ends.
    "cancelled": "canceled",
    "timeout": "failed",
    "deleted": "failed",
}
_STILL_AT_WORK: Final = 5004
"""The code of a task that took longer than a blocking call waits."""
_OWN: Final = b"v3,"
_DIALECT: Final = Hmac(label=_OWN, write=as_hex, key=after_prefix)
_STANDARD: Final = Hmac()
"""For callbacks to its newer parameter, `standard_webhook`; we send the older, `webhook`."""


@dataclass(frozen=True)
class WaveSpeed:
    api: Api
    name: ClassVar[str] = "wavespeed"
    proof: ClassVar[Proof] = "account_secret"

    def check(self, model: str, input: dict[str, Any]) -> None:
        """Refuse a model that could not be a path, and a parameter that makes a submit block."""
        parsing.model_path(model)
        if input.get("enable_sync_mode"):
            message = "leave out enable_sync_mode: the mode `sync` of the submit sets it"
            raise Problem(422, "unsupported-input", message)

    def request(self, ticket: Ticket, hook: CallbackTarget | None) -> httpx.Request:
        path = f"/{parsing.model_path(ticket.model)}"
        if ticket.mode == "sync":
            return self.api.post(path, json={**ticket.input, "enable_sync_mode": True})
        params = {"webhook": hook.url} if hook else {}
        return self.api.post(path, json=ticket.input, params=params)

    def accepted(self, ticket: Ticket, answer: ProviderResponse) -> Receipt:
        body = parsing.content(answer)
        if settled := parsing.settle_submit(
            _coded(answer, body), _reason(body), blocks=ticket.mode == "sync"
        ):
            return settled
        task = _task(body)
        provider_id, urls = parsing.identifier(task.get("id")), task.get("urls")
        if provider_id is not None and ticket.mode == "sync":
            return _outcome(task, ticket.input)
        link = urls.get("get") if isinstance(urls, dict) else None
        ours = parsing.may_receive_key(link, [self.api.base])
        return parsing.accepted("WaveSpeed", provider_id, {"get": str(link)} if ours else {})

    def authenticate(self, callback: Callback, *, now: float, keys: Sequence[bytes]) -> None:
        """Verify the signature in its dialect; the body names the task."""
        own = callback.header(_DIALECT.header).startswith(_OWN)
        (_DIALECT if own else _STANDARD).verify(callback, now=now, keys=keys)

    def keys(self) -> httpx.Request:
        return self.api.get("/webhook/secret")

    def read_keys(self, body: bytes) -> list[bytes]:
        return read_whsec(_task(parsing.decode_object(body)).get("secret"))

    def read(self, body: bytes) -> Outcome:
        outcome = _outcome(_task(parsing.decode_object(body)))
        # The secret is the account's: a callback without a task's id proves nothing about ours.
        return parsing.only_an_end(outcome, doubt=outcome.provider_id is None)

    def poll(self, ticket: Ticket) -> httpx.Request:
        """Poll the URL that WaveSpeed returned: its pages differ in how it ends."""
        built = f"/predictions/{parsing.segment(ticket)}/result"
        return self.api.get(ticket.links.get("get", built))

    def polled(self, ticket: Ticket, answer: ProviderResponse) -> Outcome:
        body = parsing.content(answer)
        settled = parsing.settle_poll(ticket, _coded(answer, body), _reason)
        return settled or _outcome(_task(body), ticket.input)

    def try_key(self) -> httpx.Request:
        """Ask for the balance of the account."""
        return self.api.get("/account/balance")

    def key_works(self, answer: ProviderResponse) -> bool | None:
        body = parsing.error_body(answer.body)
        coded = _coded(answer, body)
        return parsing.key_accepted(
            coded, sign=parsing.is_success(coded) and "balance" in _task(body)
        )


def _coded(answer: ProviderResponse, body: dict[str, Any]) -> ProviderResponse:
    """Return an answer with the status in its body, if that is an error."""
    code = body.get("code")
    is_error = type(code) is int and 400 <= code <= 599  # noqa: PLR2004 - HTTP's errors
    if not parsing.is_success(answer) or not is_error:
        return answer
    return msgspec.structs.replace(answer, status=code)


def _task(body: dict[str, Any]) -> dict[str, Any]:
    """Return the content of `data` in an answer or a standard event; other callbacks have none."""
    data = body.get("data")
    return data if isinstance(data, dict) else body


def _outcome(task: dict[str, Any], sent: dict[str, Any] | None = None) -> Outcome:
    provider_id = parsing.identifier(task.get("id"))
    kind = parsing.lookup(_KINDS, task.get("status"), "processing")
    if kind == "succeeded":
        made = _made(task.get("outputs"), sent or task.get("input"))
        return Outcome(kind=kind, provider_id=provider_id, output=made)
    if task.get("code") == _STILL_AT_WORK:
        return Outcome(kind="processing", provider_id=provider_id)
    error = parsing.failure(_reason(task) or parsing.first_text(task.get("status")), *_hints(task))
    return parsing.outcome_without_output(kind, provider_id, error, "canceled at WaveSpeed")


def _made(outputs: Any, sent: Any) -> list[Output]:
    """Collect the results; a file may come as bare base64, if that was asked for."""
    if isinstance(outputs, list):
        outputs = [_file(each) for each in outputs]
    return results.outputs(outputs, sent)


def _file(output: Any) -> Any:
    file = results.data_uri(output) if isinstance(output, str) else None
    return file.url if file and file.content_type else output


def _reason(body: dict[str, Any]) -> str:
    return parsing.first_text(
        parsing.error_text(body.get("error")), parsing.error_text(body.get("message"))
    )


def _hints(task: dict[str, Any]) -> list[str]:
    """Return the status, which may be a reason by itself, and the result of the content check."""
    flags = task.get("has_nsfw_contents")
    found = isinstance(flags, list) and True in flags
    return [parsing.first_text(task.get("status")), "nsfw" if found else ""]


DECLARED: Final = Declared(
    make=lambda given: WaveSpeed(given.api("/api/v3")),
    key="WAVESPEED_API_KEY",
    urls={"base": "https://api.wavespeed.ai"},
    path="/api/v3",
    example="google/nano-banana-pro/text-to-image",
    secret="WAVESPEED_WEBHOOK_SECRET",  # noqa: S106 - its variable
    secret_begins=WHSEC,
)
