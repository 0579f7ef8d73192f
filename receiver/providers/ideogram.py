"""Ideogram (API v2): one endpoint for each model, callbacks signed by Ed25519, files as parts.

Facts: developer.ideogram.ai, v2 pages and webhooks (2026-10). A callback contains only results:
failures and costs are found by polls.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final
from urllib.parse import unquote_to_bytes

import httpx
import msgspec

from receiver.model.costs import DEAREST
from receiver.model.errors import Problem, Unreadable
from receiver.model.values import Outcome, OutcomeKind, Ticket
from receiver.providers import parsing, results
from receiver.providers.adapter import Callback, CallbackTarget, Proof, ProviderResponse, Receipt
from receiver.providers.declared import Api, Declared
from receiver.providers.signatures import read_jwks, verify_ed25519

_KINDS: Final[dict[str, OutcomeKind]] = {
    "pending": "processing",
    "completed": "succeeded",
    "failed": "failed",
}
_OURS: Final = frozenset({"webhook_url", "async"})
_IN_PARTS: Final = frozenset({"nano-banana-2", "ideogram-4-6"})
"""Models that need parts even if no file is among them."""
_NO_HOOK: Final = frozenset({"auto"})
_FILES: Final = re.compile(r"(?:\w+_)?images?|mask")
_DATA: Final = re.compile(r"data:([\w.+-]+/[\w.+-]+)[^,]*?(;base64)?,", re.IGNORECASE)
_GENERATIONS: Final = "/v2/generations"
_NOBODYS: Final = "00000000-0000-0000-0000-000000000000"
_WITHHELD: Final = "Ideogram's safety check has withheld every image"

Part = tuple[str, tuple[str | None, bytes, str | None]]
"""A part of a form: its name, and a file's name, content and type; a text has no file name."""


@dataclass(frozen=True)
class Ideogram:
    api: Api
    bills_after: float | None
    name: ClassVar[str] = "ideogram"
    proof: ClassVar[Proof] = "public_keys"
    most_billed: ClassVar[int] = 1

    def check(self, model: str, input: dict[str, Any]) -> None:
        """Refuse files that are given by URL, and parameters that would replace our callback."""
        parsing.model_path(model)
        if unfit := sorted(_OURS & input.keys()):
            detail = f"how the outcome comes is the receiver's part: leave out {', '.join(unfit)}"
            raise Problem(422, "unsupported-input", detail)
        if _is_in_parts(model, input) and (far := sorted(set(_elsewhere(input)))):
            detail = f"Ideogram takes files: give {', '.join(far)} as data URIs, not as URLs"
            raise Problem(422, "unsupported-input", detail)

    def request(self, ticket: Ticket, hook: CallbackTarget | None) -> httpx.Request:
        fields, model = dict(ticket.input), parsing.model_path(ticket.model)
        path = f"/v2/{model}" if "/" in model else f"/v2/image/generate/{model}"
        if ticket.mode == "queue":
            if hook is not None and ticket.model not in _NO_HOOK:
                fields["webhook_url"] = hook.url
            elif path.startswith("/v2/image/"):  # the others never block, and may not know `async`
                fields["async"] = True
        if not _is_in_parts(ticket.model, fields):
            return self.api.post(path, json=fields)
        parts = list(_parts(fields))
        kind = f"multipart/form-data; boundary={_boundary(parts)}"
        return self.api.post(path, files=parts, headers={"Content-Type": kind})

    def accepted(self, ticket: Ticket, answer: ProviderResponse) -> Receipt:
        body = parsing.content(answer)
        unsafe = answer.status == httpx.codes.UNPROCESSABLE_ENTITY
        if settled := parsing.settle_submit(
            answer, _reason(body), "safety" if unsafe else "", blocks=ticket.mode == "sync"
        ):
            return settled
        provider_id = parsing.identifier(body.get("generation_id"))
        if provider_id is None or ticket.mode == "queue":
            return parsing.accepted("Ideogram", provider_id)
        if not isinstance(body.get("data"), list):  # some models never block
            return Outcome(kind="processing", provider_id=provider_id)
        return _made(body, provider_id, ticket.input)

    def authenticate(self, callback: Callback, *, now: float, keys: Sequence[bytes]) -> str:
        prefix, id_header = b"x-ideogram-webhook-", b"generation-id"
        return verify_ed25519(callback, prefix, id_header, now=now, keys=keys)

    def keys(self) -> httpx.Request:
        return httpx.Request("GET", f"{self.api.base}/v1/.well-known/jwks.json")

    def read_keys(self, body: bytes) -> list[bytes]:
        return read_jwks(body)

    def read(self, body: bytes) -> Outcome:
        payload = parsing.decode_object(body)
        provider_id = parsing.identifier(payload.get("generation_id"))
        if payload.get("status") is not None:  # no status is documented, so it may be `failed`
            return parsing.only_an_end(_outcome(payload, provider_id))
        outcome = _made(payload, provider_id)
        return parsing.only_an_end(outcome, doubt=not isinstance(payload.get("data"), list))

    def poll(self, ticket: Ticket) -> httpx.Request:
        return self.api.get(f"{_GENERATIONS}/{parsing.segment(ticket)}")

    def polled(self, ticket: Ticket, answer: ProviderResponse) -> Outcome:
        if settled := parsing.settle_poll(ticket, answer, _reason):
            return settled
        body = parsing.with_status(answer.body)
        provider_id = parsing.identifier(body.get("generation_id"), ticket.provider_id)
        return _outcome(body, provider_id, ticket)

    def bill(self, tickets: Sequence[Ticket]) -> httpx.Request:
        """Poll once more: neither a callback nor a blocking call has a cost."""
        return self.poll(tickets[0])

    def billed(self, tickets: Sequence[Ticket], answer: ProviderResponse) -> dict[str, int]:
        if answer.status != httpx.codes.OK:
            raise parsing.unexpected(answer, _reason(parsing.error_body(answer.body)))
        cost = _cost(parsing.decode_object(answer.body))
        return {} if cost is None else {tickets[0].id: cost}

    def try_key(self) -> httpx.Request:
        """Ask for a generation that does not exist."""
        return self.api.get(f"{_GENERATIONS}/{_NOBODYS}")

    def key_works(self, answer: ProviderResponse) -> bool | None:
        """Take its own 404 as a valid key: a bad key gets a 401 before anything is looked up."""
        looked_up = answer.status == httpx.codes.NOT_FOUND and bool(_reason(_object(answer)))
        return parsing.key_accepted(answer, sign=looked_up)


def _object(answer: ProviderResponse) -> dict[str, Any]:
    """Return the object in an answer; empty if there is none."""
    try:
        return parsing.decode_object(answer.body)
    except Unreadable:
        return {}


def _outcome(
    body: dict[str, Any], provider_id: str | None, ticket: Ticket | None = None
) -> Outcome:
    kind = parsing.lookup(_KINDS, body.get("status"), "processing")
    if kind == "succeeded":
        return _made(body, provider_id, ticket.input if ticket else None)
    error = parsing.failure(parsing.error_text(body.get("failure_reason")) or _reason(body))
    return parsing.outcome_without_output(kind, provider_id, error, cost=_cost(body))


def _made(body: dict[str, Any], provider_id: str | None, sent: Any = None) -> Outcome:
    """Read the result; an image that is withheld has an empty URL, and is billed too."""
    images = body.get("data")
    made = results.outputs(images, sent)
    if not made and isinstance(images, list) and any(map(_is_withheld, images)):
        error = parsing.failure(_WITHHELD, "safety")
        return Outcome(kind="failed", provider_id=provider_id, error=error, cost=_cost(body))
    return Outcome(kind="succeeded", provider_id=provider_id, output=made, cost=_cost(body))


def _is_withheld(image: Any) -> bool:
    return isinstance(image, dict) and image.get("is_image_safe") is False


def _cost(body: dict[str, Any]) -> int | None:
    """Return the billed microdollars; 0 for a failure, for which Ideogram reports no cost."""
    if parsing.lookup(_KINDS, body.get("status"), "processing") == "failed":
        return 0
    micros = body.get("usage_cost_usd_micros")
    return micros if type(micros) is int and 0 <= micros <= DEAREST else None


def _reason(body: dict[str, Any]) -> str:
    places = ("message", "error", "detail", "reject_reason")
    return parsing.join(dict.fromkeys(parsing.error_text(body.get(name)) for name in places))


# --- parts ---


def _is_in_parts(model: str, fields: dict[str, Any]) -> bool:
    return model in _IN_PARTS or any(_DATA.match(text) for _, text in _files(fields))


def _files(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name and text of every field that is named like a file."""
    for name, value in fields.items():
        if _FILES.fullmatch(name):
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, str):
                    yield name, each


def _elsewhere(fields: dict[str, Any]) -> Iterator[str]:
    return (name for name, text in _files(fields) if not _DATA.match(text))


def _parts(fields: dict[str, Any]) -> Iterator[Part]:
    for name, value in fields.items():
        for number, each in enumerate(value if isinstance(value, list) else [value]):
            found = _DATA.match(each) if isinstance(each, str) and _FILES.fullmatch(name) else None
            if found:
                kind = found[1].lower()
                file = f"{name}-{number}.{kind.partition('/')[2]}"
                yield name, (file, _content(each[found.end() :], is_base64=bool(found[2])), kind)
            elif each is not None:
                yield name, (None, _text(each), None)


def _content(text: str, *, is_base64: bool) -> bytes:
    raw = unquote_to_bytes(text)
    try:
        return base64.b64decode(b"".join(raw.split()), validate=True) if is_base64 else raw
    except ValueError:
        raise Unreadable("a data URI whose content is not base64") from None


def _text(value: Any) -> bytes:
    """Return a value for a form: text as it is, anything else as JSON."""
    return value.encode() if isinstance(value, str) else msgspec.json.encode(value)


def _boundary(parts: list[Part]) -> str:
    """Return the boundary between parts: no part can contain the digest of all parts."""
    digest = hashlib.sha256()
    for name, (_, content, _) in parts:
        digest.update(b"%d/%d/" % (len(name), len(content)) + name.encode() + content)
    return digest.hexdigest()[:48]


DECLARED: Final = Declared(
    make=lambda given: Ideogram(given.api(api_key=given.key), 60.0 if given.key else None),
    key="IDEOGRAM_API_KEY",
    urls={"base": "https://api.ideogram.ai"},
    path="/v2",
    example="nano-banana-2",
    max_in_flight=10,
)
