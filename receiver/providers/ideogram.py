"""Ideogram: pictures and videos by one endpoint for each model; callbacks are signed as fal's are.

Facts: developer.ideogram.ai (v2: generate, generations, errors, webhooks). A failure is told to
nobody, so it is found by asking; a picture that its safety check withholds is paid for, too.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import httpx

from receiver.model.states import cause_of
from receiver.model.values import Error, Outcome, Ticket, plain
from receiver.providers import adapter as base
from receiver.providers.adapter import (
    Accepted,
    Ambiguous,
    Callback,
    CallbackTarget,
    ProviderResponse,
    Receipt,
    Refused,
)
from receiver.providers.declared import Declared
from receiver.providers.signatures import read_jwks, verify_ed25519

_KINDS: Final = {"pending": "processing", "completed": "succeeded", "failed": "failed"}
_WITHHELD: Final = "withheld by Ideogram's safety check"
_CHOOSES: Final = "auto"
"""The model that takes no webhook."""
_TAKE_FORMS: Final = frozenset({"nano-banana-2", "ideogram-4-6"})
"""Those whose pages know a form of parts alone; the others take JSON where there is no file."""
_DEAREST: Final = 10**12
"""Microdollars; no cost is higher."""
_NO_GENERATION: Final = "AAAAAAAAAAAAAAAAAAAAAA"
Part = tuple[str, bytes, str] | tuple[None, str]
"""A file's name, content and type, or a text."""
_FILE: Final = re.compile(r"data:([\w.+-]+/([\w.+-]+));base64,([A-Za-z0-9+/\s]+={0,2}\s*)")


@dataclass(frozen=True)
class Ideogram:
    """The adapter; `base_url` has no trailing slash and no `/v2`."""

    key: str
    base_url: str
    jwks_url: str
    name: ClassVar[Literal["ideogram"]] = "ideogram"
    proof: ClassVar[Literal["public_keys"]] = "public_keys"
    stream_path: ClassVar[None] = None

    def check(self, model: str, input: dict[str, Any]) -> None:  # noqa: ARG002 - the protocol's
        """Refuse only a model that could not be a path."""
        base.model_path(model)

    def request(self, ticket: Ticket, hook: CallbackTarget | None) -> httpx.Request:
        path, fields = _path(ticket.model), dict(ticket.input)
        if ticket.mode == "queue":
            if hook is not None and ticket.model != _CHOOSES:
                fields["webhook_url"] = hook.url
            elif path.startswith("image/"):  # the others never block, and may not know the word
                fields["async"] = True
        parts = _parts(fields)
        is_form = ticket.model in _TAKE_FORMS or any(file for _, (file, *_) in parts)
        content: dict[str, Any] = {"files": parts} if is_form else {"json": fields}
        return self._call("POST", f"/v2/{path}", **content)

    def accepted(self, ticket: Ticket, answer: ProviderResponse) -> Receipt:
        body = base.content(answer)
        if answer.status == httpx.codes.UNPROCESSABLE_ENTITY:  # its safety check says no more
            return Refused(_reason(body) or "refused by Ideogram's safety check", "content_policy")
        if settled := base.settle_submit(answer, _reason(body)):
            return settled
        outcome = _outcome(body, ticket.input)
        if ticket.mode == "sync" and cause_of(outcome):
            return outcome
        if outcome.provider_id is None:
            return Ambiguous("Ideogram accepted the submit without a generation_id")
        return outcome if ticket.mode == "sync" else Accepted(outcome.provider_id)

    def authenticate(self, callback: Callback, *, now: float, keys: Sequence[bytes]) -> str:
        prefix = b"x-ideogram-webhook-"
        return verify_ed25519(callback, prefix, b"generation-id", now=now, keys=keys)

    def keys(self) -> httpx.Request:
        return httpx.Request("GET", self.jwks_url)

    def read_keys(self, body: bytes) -> list[bytes]:
        return read_jwks(body)

    def read(self, body: bytes) -> Outcome:
        outcome = _outcome(base.decode_object(body))
        if cause_of(outcome) is None:
            return Outcome(kind="ask", provider_id=outcome.provider_id)
        return outcome

    def poll(self, ticket: Ticket) -> httpx.Request:
        return self._call("GET", f"/v2/generations/{base.model_path(ticket.provider_id or '')}")

    def polled(self, ticket: Ticket, answer: ProviderResponse) -> Outcome:
        if answer.status == httpx.codes.NOT_FOUND:
            return Outcome(kind="missing", provider_id=ticket.provider_id)
        if answer.status != httpx.codes.OK:
            raise base.unexpected(answer, _reason(base.error_body(answer.body)))
        return _outcome(base.decode_object(answer.body), ticket.input)

    def cancel(self, ticket: Ticket) -> None:
        """Return nothing: Ideogram has no call that stops a generation."""

    def details(self, model: str) -> None:
        """Return nothing: Ideogram describes its models on pages alone."""

    def try_key(self) -> httpx.Request:
        """Ask for a generation that does not exist."""
        return self._call("GET", f"/v2/generations/{_NO_GENERATION}")

    def key_works(self, answer: ProviderResponse) -> bool | None:
        """Take Ideogram's own 404 for a yes: a bad key gets a 401 before anything is looked up."""
        said = answer.status == httpx.codes.NOT_FOUND and _reason(base.error_body(answer.body))
        return base.let_in(answer, sign=bool(said))

    def _call(self, method: str, path: str, **content: Any) -> httpx.Request:
        headers = {"Api-Key": self.key, "Accept": "application/json"}
        return httpx.Request(method, self.base_url + path, headers=headers, **content)


def _path(model: str) -> str:
    """Return where a model is: a bare name generates pictures, any other is a path by itself."""
    path = base.model_path(model)
    return path if "/" in path else f"image/generate/{path}"


def _parts(fields: dict[str, Any]) -> list[tuple[str, Part]]:
    """Write a form: files, which come as data URIs, as Ideogram fetches none; all else as text."""
    return [
        (name, _file(name, value) or (None, plain(value)))
        for name, given in fields.items()
        for value in (given if isinstance(given, list) else [given])
    ]


def _file(name: str, value: Any) -> Part | None:
    found = _FILE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return None
    try:
        content = base64.b64decode("".join(found[3].split()), validate=True)
    except ValueError:
        return None
    return f"{name}.{found[2]}", content, found[1]


def _outcome(body: dict[str, Any], sent: dict[str, Any] | None = None) -> Outcome:
    """Read what all channels have in common; only the poll says a status and what it cost."""
    made = body.get("data")
    status = body.get("status", "completed" if made else None)
    kind = base.lookup(_KINDS, status, "processing")
    cost = body.get("usage_cost_usd_micros")
    more: dict[str, Any] = {
        "provider_id": base.identifier(body.get("generation_id")),
        "cost": cost if type(cost) is int and 0 <= cost <= _DEAREST else None,
    }
    if kind == "failed":
        return Outcome(kind=kind, error=base.failure(_reason(body)), **more)
    if kind != "succeeded" or not isinstance(made, list):
        return Outcome(kind="processing", **more)
    if results := base.outputs(made, sent):
        return Outcome(kind="succeeded", output=results, **more)
    if any(isinstance(item, dict) and item.get("is_image_safe") is False for item in made):
        error = Error(code="content_policy", message=_WITHHELD)
    else:
        error = base.failure("Ideogram completed it without a result")
    return Outcome(kind="failed", error=error, **more)


def _reason(body: dict[str, Any]) -> str:
    """Find the words of an error, with the code that Ideogram gives to some."""
    code = base.words(body.get("reject_reason"))
    return base.join(filter(None, (base.spoken(body.get("failure_reason")) or _said(body), code)))


def _said(body: dict[str, Any]) -> str:
    return base.words(*(base.spoken(body.get(name)) for name in ("error", "message", "detail")))


DECLARED: Final = Declared(
    make=lambda given: Ideogram(given.key, given.urls["base"], given.urls["jwks"]),
    key="IDEOGRAM_API_KEY",
    urls={
        "base": "https://api.ideogram.ai",
        "jwks": "https://api.ideogram.ai/v1/.well-known/jwks.json",
    },
    path="/v2",
    example="nano-banana-2",
    max_in_flight=10,
)
