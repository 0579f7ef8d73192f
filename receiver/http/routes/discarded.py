"""`/v1/undelivered`: what came and was delivered to nobody."""

from __future__ import annotations

from typing import Annotated, Final, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.http.auth import Guard
from receiver.http.body import one_of, parameters
from receiver.http.declare import Answer, Content, Endpoint, PageSize, PredictionId, ProviderName
from receiver.http.problems import as_json
from receiver.providers import NAMES
from receiver.store.discarded import CURSOR, DiscardedItem, Kind
from receiver.store.values import Page


class Reads(Protocol):
    """What this route needs of the store."""

    async def page(
        self,
        limit: int,
        *,
        kind: Kind | None = None,
        provider: str | None = None,
        prediction: str | None = None,
        cursor: str | None = None,
    ) -> Page[DiscardedItem]: ...


class UndeliveredAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which of them to list."""

    kind: Kind | None = None
    provider: ProviderName | None = None
    prediction: PredictionId | None = None
    limit: PageSize = 50
    cursor: Annotated[str, msgspec.Meta(pattern=CURSOR.pattern)] | None = None
    """The `next_cursor` of the page before."""


def undelivered_routes(guard: Guard, store: Reads) -> list[Route]:
    async def list_undelivered(request: Request) -> Response:
        asked = msgspec.structs.asdict(parameters(request, UndeliveredAsked))
        one_of("provider", asked["provider"], NAMES)
        return as_json(await store.page(asked.pop("limit"), **asked))

    return [guard.route("/v1/undelivered", GET=list_undelivered)]


_EXAMPLE: Final = DiscardedItem(
    kind="rejected",
    reason="bad_signature",
    provider="fal",
    channel=None,
    source="203.0.113.9",
    prediction_id=None,
    event_id=None,
    times=17,
    first_at="2026-01-31T12:00:00.000000Z",
    last_at="2026-01-31T12:20:00.000000Z",
)
OPERATIONS: Final = (
    Endpoint(
        "GET",
        "/v1/undelivered",
        "List what came and was delivered to nobody, the latest first",
        (
            Answer(
                200,
                "a page of them",
                Content(Page[DiscardedItem], Page(data=[_EXAMPLE], next_cursor=None)),
            ),
        ),
        ("invalid-request",),
        query=UndeliveredAsked,
    ),
)
