"""Request bodies: a submit, or an order by a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from receiver.model.errors import Problem
from receiver.model.tolerant import depth_of
from receiver.model.values import DEEPEST, LARGEST_METADATA, MODEL_NAME, Mode

ModelName = Annotated[
    str, Meta(pattern=MODEL_NAME, max_length=300, examples=["fal-ai/nano-banana"])
]
ReplyTo = Annotated[
    str, Meta(pattern="^https?://[!-~]+$", max_length=2000, examples=["https://bot.example/done"])
]


class SubmitFields(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a submit, in the JSON of callers and in the prediction's row.

    A new field must default to None, so that the stored digests of older submits stay valid.
    """

    provider: str
    model: ModelName
    input: dict[str, Any]
    """The input as the provider documents it, nested at most 64 levels deep."""
    metadata: dict[str, Any] = {}
    """Your own data, up to 256 KiB: stored, matched by handlers, never sent to the provider."""
    mode: Mode = "queue"
    """`sync` uses the provider's blocking endpoint."""
    reply_to: ReplyTo | None = None
    """A URL to which the event is also sent, signed; its host must be one of `FORWARD_HOSTS`."""


class SubmitRequest(SubmitFields, frozen=True, kw_only=True):
    """A submit, with the fields that are not in a caller's JSON."""

    key: str | None = None
    """The idempotency key: the same key gives the same prediction."""
    caller: str | None = None
    """The name of the API key of the request; empty for a key without a name."""
    private: bytes | None = None
    """The private content, for handlers only, encrypted by `Seals`."""
    parent_id: str | None = None
    """The prediction whose handler submits this one."""


class OrderRequest(msgspec.Struct, frozen=True, kw_only=True):
    """An order by a recipe, or by a button, which determines the recipe and most options."""

    recipe: str = ""
    options: Mapping[str, Any] = {}
    person: str | None = None
    place: str | None = None
    metadata: Mapping[str, Any] = {}
    reply_to: str | None = None
    key: str | None = None
    """The same key of the same `via` gives the same prediction."""
    caller: str | None = None
    """As in SubmitRequest."""
    private: bytes | None = None
    """As in SubmitRequest."""
    via: str = "api"
    at: float | None = None
    """Unix seconds at which it was ordered, if known."""


def check_json(name: str, value: Any, metadata: Any) -> None:
    """Raise Problem for JSON that is nested too deep, or metadata that is too large."""
    if depth_of(value) > DEEPEST or depth_of(metadata) > DEEPEST:
        raise Problem(422, "invalid-request", f"{name} and metadata nest at most {DEEPEST} deep")
    if len(msgspec.json.encode(metadata)) > LARGEST_METADATA:
        raise Problem(422, "invalid-request", f"metadata has at most {LARGEST_METADATA} bytes")


def refuse_coding(coding: str) -> None:
    """Raise Problem if the Content-Encoding of a body means that it is compressed."""
    if coding.strip().lower() not in {"", "identity"}:
        message = f"send the body as it is, not in Content-Encoding: {coding.strip()[:40]}"
        raise Problem(415, "unsupported-media-type", message)
