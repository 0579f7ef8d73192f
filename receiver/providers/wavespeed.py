"""WaveSpeed: tasks at `/api/v3`; callbacks are signed in a dialect of Standard Webhooks of its own.

Facts: wavespeed.ai/docs (webhooks, their verification, results, limits) and its Python client 2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import httpx
import msgspec

from receiver.model.errors import Problem, Unreadable
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
from receiver.providers.signatures import Hmac, after_prefix, as_hex

_KINDS: Final = {
    "created": "processing",
    "processing": "processing",
    "completed": "succeeded",
    "failed": "failed",
    # These three are only in its client, which takes them for the end.
    "cancelled": "canceled",
    "timeout": "failed",
    "deleted": "failed",
}
_STILL_AT_WORK: Final = 5004
"""The code of a task that took longer than a blocking call waits."""
_SECRET: Final = "whsec_"  # noqa: S105 - how one begins
_OWN: Final = b"v3,"
_DIALECT: Final = Hmac(label=_OWN, write=as_hex, key=after_prefix)
_STANDARD: Final = Hmac()
"""For callbacks to its newer parameter, `standard_webhook`; we send the older, `webhook`."""


@dataclass(frozen=True)
class WaveSpeed:
    """The adapter; `base_url` has no trailing slash and no `/api/v3`."""

    key: str
    base_url: str
    name: ClassVar[Literal["wavespeed"]] = "wavespeed"
    proof: ClassVar[Literal["account_secret"]] = "account_secret"
    stream_path: ClassVar[None] = None

    def check(self, model: str, input: dict[str, Any]) -> None:
        """Refuse a model that could not be a path, and what would make a submit block."""
        parsing.model_path(model)
        if input.get("enable_sync_mode"):
            said = "leave out enable_sync_mode: the mode `sync` of the submit sets it"
            raise Problem(422, "unsupported-input", said)

    def request(self, ticket: Ticket, hook: CallbackTarget | None) -> httpx.Request:
        url = f"{self.base_url}/api/v3/{parsing.model_path(ticket.model)}"
        if ticket.mode == "sync":
            return self._call("POST", url, json={**ticket.input, "enable_sync_mode": True})
        params = {"webhook": hook.url} if hook else {}
        return self._call("POST", url, json=ticket.input, params=params)

    def accepted(self, ticket: Ticket, answer: ProviderResponse) -> Receipt:
        body = parsing.content(answer)
        if settled := parsing.settle_submit(_coded(answer, body), _reason(body)):
            return settled
        task = _task(body)
        provider_id = parsing.identifier(task.get("id"))
        if provider_id is None:
            return Ambiguous("WaveSpeed accepted the submit without an id")
        if ticket.mode == "sync":
            return _outcome(task, ticket.input)
        urls = task.get("urls")
        link = urls.get("get") if isinstance(urls, dict) else None
        ours = parsing.leads_to(link, (self.base_url,))
        return Accepted(provider_id, {"get": link} if link and ours else {})

    def authenticate(self, callback: Callback, *, now: float, keys: Sequence[bytes]) -> None:
        """Verify the dialect that the signature is in; whose task it is, its body says."""
        own = callback.header(_DIALECT.header).startswith(_OWN)
        (_DIALECT if own else _STANDARD).verify(callback, now=now, keys=keys)

    def keys(self) -> httpx.Request:
        return self._call("GET", f"{self.base_url}/api/v3/webhook/secret")

    def read_keys(self, body: bytes) -> list[bytes]:
        secret = parsing.words(_task(parsing.decode_object(body)).get("secret"))
        if not secret.startswith(_SECRET):
            raise Unreadable("no secret")
        return [secret.encode()]

    def read(self, body: bytes) -> Outcome:
        outcome = _outcome(_task(parsing.decode_object(body)))
        # The secret signs for all of the account: what names no task proves nothing of ours.
        if outcome.provider_id is None or cause_of(outcome) is None:
            return Outcome(kind="ask", provider_id=outcome.provider_id)
        return outcome

    def poll(self, ticket: Ticket) -> httpx.Request:
        """Use the URL that WaveSpeed returned: its pages differ in how it ends."""
        task = parsing.model_path(ticket.provider_id or "")
        built = f"{self.base_url}/api/v3/predictions/{task}/result"
        return self._call("GET", ticket.links.get("get", built))

    def polled(self, ticket: Ticket, answer: ProviderResponse) -> Outcome:
        body = parsing.content(answer)
        coded = _coded(answer, body)
        if coded.status == httpx.codes.NOT_FOUND:
            return Outcome(kind="missing", provider_id=ticket.provider_id)
        if coded.status != httpx.codes.OK:
            raise parsing.unexpected(coded, _reason(body))
        return _outcome(_task(body), ticket.input)

    def cancel(self, ticket: Ticket) -> None:
        """Return nothing: WaveSpeed has no call that stops a task."""

    def details(self, model: str) -> None:
        """Return nothing: WaveSpeed describes its models on pages alone."""

    def try_key(self) -> httpx.Request:
        """Ask for the balance of the account."""
        return self._call("GET", f"{self.base_url}/api/v3/account/balance")

    def key_works(self, answer: ProviderResponse) -> bool | None:
        body = parsing.error_body(answer.body)
        coded = _coded(answer, body)
        return parsing.let_in(coded, sign=parsing.is_yes(coded) and "balance" in _task(body))

    def _call(self, method: str, url: str, **content: Any) -> httpx.Request:
        headers = {"Authorization": f"Bearer {self.key}", "Accept": "application/json"}
        return httpx.Request(method, url, headers=headers, **content)


def _coded(answer: ProviderResponse, body: dict[str, Any]) -> ProviderResponse:
    """Return an answer with the status that its body has, where that is an error's."""
    code = body.get("code")
    is_error = type(code) is int and 400 <= code <= 599  # noqa: PLR2004 - HTTP's errors
    if not parsing.is_yes(answer) or not is_error:
        return answer
    return msgspec.structs.replace(answer, status=code)


def _task(body: dict[str, Any]) -> dict[str, Any]:
    """Return what is in the wrapper of an answer, or of a standard event; callbacks have none."""
    data = body.get("data")
    return data if isinstance(data, dict) else body


def _outcome(task: dict[str, Any], sent: dict[str, Any] | None = None) -> Outcome:
    provider_id = parsing.identifier(task.get("id"))
    kind = parsing.lookup(_KINDS, task.get("status"), "processing")
    if kind == "succeeded":
        results = _results(task.get("outputs"), sent or task.get("input"))
        return Outcome(kind=kind, provider_id=provider_id, output=results)
    if task.get("code") == _STILL_AT_WORK:
        return Outcome(kind="processing", provider_id=provider_id)
    error = {
        "failed": parsing.failure(
            _reason(task) or parsing.words(task.get("status")), *_hints(task)
        ),
        "canceled": Error(code="canceled", message="canceled at WaveSpeed"),
    }.get(kind)
    return Outcome(kind=kind, provider_id=provider_id, error=error)


def _results(outputs: Any, sent: Any) -> list[Output]:
    """Collect the results; a file may come as bare base64, if that was asked for."""
    if isinstance(outputs, list):
        outputs = [_file(each) for each in outputs]
    return results.outputs(outputs, sent)


def _file(output: Any) -> Any:
    file = results.data_uri(output) if isinstance(output, str) else None
    return file.url if file and file.content_type else output


def _reason(body: dict[str, Any]) -> str:
    return parsing.words(parsing.spoken(body.get("error")), parsing.spoken(body.get("message")))


def _hints(task: dict[str, Any]) -> list[str]:
    """Return the status, which may be a reason by itself, and what its checker found."""
    flags = task.get("has_nsfw_contents")
    found = isinstance(flags, list) and True in flags
    return [parsing.words(task.get("status")), "nsfw" if found else ""]


DECLARED: Final = Declared(
    make=lambda given: WaveSpeed(given.key, given.urls["base"]),
    key="WAVESPEED_API_KEY",
    urls={"base": "https://api.wavespeed.ai"},
    path="/api/v3",
    example="google/nano-banana-pro/text-to-image",
    secret="WAVESPEED_WEBHOOK_SECRET",  # noqa: S106 - its variable
    secret_begins=_SECRET,
)
