"""What is asked of us: a submit, or an order by a recipe, with all that comes with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from receiver.model.errors import Problem
from receiver.model.tolerant import depth_of
from receiver.model.values import DEEPEST, LARGEST_METADATA, Mode


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a submit and an order have in common."""

    key: str | None = None
    """The same key gives the same prediction."""
    caller: str | None = None
    """The name of the API key that it came with; empty for one without a name."""
    metadata: Mapping[str, Any] = {}
    private: bytes | None = None
    """What only handlers are to see, encrypted by `Seals`."""
    reply_to: str | None = None


class SubmitRequest(Asked, frozen=True, kw_only=True):
    """A prediction to be submitted."""

    provider: str
    model: str
    input: dict[str, Any]
    mode: Mode = "queue"
    parent_id: str | None = None
    """The prediction whose handler asks."""


class OrderRequest(Asked, frozen=True, kw_only=True):
    """An order by a recipe, or by a button, which says which recipe and most of the options."""

    recipe: str = ""
    options: Mapping[str, Any] = {}
    person: str | None = None
    place: str | None = None
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
        said = f"send the body as it is, not in Content-Encoding: {coding.strip()[:40]}"
        raise Problem(415, "unsupported-media-type", said)
