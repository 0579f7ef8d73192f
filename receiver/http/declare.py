"""How routes are described: one row for each method and path, kept beside the route itself.

The same types read what comes in, encode what goes out, and make the document at /openapi.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from receiver.providers import NAMES

_ID: Final = "0199f3a6d2c1e4" + "5b7f1c9d3e8a260f4b"
PredictionId = Annotated[str, Meta(pattern="^pred_[0-9a-f]{32}$", examples=[f"pred_{_ID}"])]
EventId = Annotated[str, Meta(pattern="^evt_[0-9a-f]{32}$", examples=[f"evt_{_ID}"])]
DeliveryId = Annotated[str, Meta(pattern="^dlv_[0-9a-f]{40}$", examples=[f"dlv_{_ID}5c1d0e2f"])]
EventName = Annotated[str, Meta(pattern="^(pred|evt)_[0-9a-f]{32}$", examples=[f"evt_{_ID}"])]
"""A prediction's id or that of its event."""
ModelName = Annotated[
    str,
    Meta(
        pattern=r"^[!-\-0-~][!-.0-~]*(/[!-\-0-~][!-.0-~]*)*$",
        max_length=300,
        examples=["fal-ai/nano-banana"],
    ),
]
"""Segments of visible ASCII, none of which is empty or begins with a dot."""
ReplayId = Annotated[str, Meta(pattern="^rep_[0-9a-f]{32}$", examples=[f"rep_{_ID}"])]
HandlerName = Annotated[
    str, Meta(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=300, examples=["save"])
]
ProviderName = Annotated[str, Meta(extra_json_schema={"enum": list(NAMES)})]
PageSize = Annotated[int, Meta(ge=1, le=100)]
Place = Annotated[str, Meta(pattern="^[0-9]{1,18}$", examples=["1207"])]
"""A place in a sequence, as it was given out before."""


class Content(msgspec.Struct, frozen=True):
    """A body: its type, and one that is of it."""

    type: Any
    example: Any = None
    media_type: str = "application/json"
    also: Mapping[str, Any] = {}
    """What fits it beyond its type, as JSON Schema."""


class Answer(msgspec.Struct, frozen=True):
    """One way a route answers when all is well; what is not well is named by `problems`."""

    status: int
    meaning: str
    content: Content | None = None
    headers: tuple[str, ...] = ()
    """Of those that `openapi` describes."""
    leads_to: tuple[str, ...] = ()
    """Operations that take the `id` of this answer, or of the first of its list."""


class Endpoint(msgspec.Struct, frozen=True):
    """One row: a method of a path, what it takes and what it answers."""

    method: str
    path: str
    summary: str
    answers: tuple[Answer, ...]
    problems: tuple[str, ...] = ()
    """Of `answers.PROBLEMS`, beyond those that every route has."""
    detail: str = ""
    names: Mapping[str, Any] = {}
    """The types of what stands in the path."""
    query: type[msgspec.Struct] | None = None
    free: str = ""
    """How further parameters of the query begin, whatever comes after that."""
    headers: type[msgspec.Struct] | None = None
    body: tuple[Content, ...] = ()
    """More than one: in any of these forms."""
    is_open: bool = False
    """It wants no key."""


UNREADABLE: Final = (
    "invalid-json",
    "too-slow",
    "too-large",
    "unsupported-media-type",
    "invalid-request",
)
"""What may be wrong with any JSON body."""
