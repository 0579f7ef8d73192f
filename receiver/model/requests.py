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
    """What a submit says, in the JSON of callers as in the prediction's row.

    A new field is None where it is not given, so that the stored digests of older submits hold.
    """

    provider: str
    model: ModelName
    input: dict[str, Any]
    """As the provider describes it, at most 64 deep."""
    metadata: dict[str, Any] = {}
    """Yours, up to 256 KiB: it is kept, handlers can match on it, the provider never sees it."""
    mode: Mode = "queue"
    """`sync`: by the provider's blocking endpoint."""
    reply_to: ReplyTo | None = None
    """POST the event there too, signed; its host must be one of `FORWARD_HOSTS`."""


class SubmitRequest(SubmitFields, frozen=True, kw_only=True):
    """A prediction to be submitted, with what does not stand in a caller's JSON."""

    key: str | None = None
    """The same key gives the same prediction."""
    caller: str | None = None
    """The name of the API key that it came with; empty for one without a name."""
    private: bytes | None = None
    """What only handlers are to see, encrypted by `Seals`."""
    parent_id: str | None = None
    """The prediction whose handler asks."""


class OrderRequest(msgspec.Struct, frozen=True, kw_only=True):
    """An order by a recipe, or by a button, which says which recipe and most of the options."""

    recipe: str = ""
    options: Mapping[str, Any] = {}
    person: str | None = None
    place: str | None = None
    metadata: Mapping[str, Any] = {}
    reply_to: str | None = None
    key: str | None = None
    """The same key of the same `via` gives the same prediction."""
    caller: str | None = None
    """As that of a submit."""
    private: bytes | None = None
    """As that of a submit."""
    via: str = "api"
    at: float | None = None
    """When it was asked for, in unix seconds, where that is known."""


def check_json(name: str, value: Any, metadata: Any) -> None:
    """Raise a Problem for JSON that nests too deep, or metadata that are too large."""
    if depth_of(value) > DEEPEST or depth_of(metadata) > DEEPEST:
        raise Problem(422, "invalid-request", f"{name} and metadata nest at most {DEEPEST} deep")
    if len(msgspec.json.encode(metadata)) > LARGEST_METADATA:
        raise Problem(422, "invalid-request", f"metadata has at most {LARGEST_METADATA} bytes")


def refuse_coding(coding: str) -> None:
    """Raise Problem for a body whose Content-Encoding says that it is compressed."""
    if coding.strip().lower() not in {"", "identity"}:
        message = f"send the body as it is, not in Content-Encoding: {coding.strip()[:40]}"
        raise Problem(415, "unsupported-media-type", message)
