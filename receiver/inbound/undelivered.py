"""`/v1/undelivered`: what came and was delivered to nobody."""

from __future__ import annotations

from typing import Protocol, cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.errors import Problem
from receiver.inbound.answers import as_json
from receiver.inbound.guard import Guard
from receiver.inbound.reading import one_of, page_size, query
from receiver.store.undelivered import KINDS, BadCursor, Kind
from receiver.store.values import Found


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
    ) -> Found: ...


def undelivered_routes(guard: Guard, store: Reads) -> list[Route]:
    async def list_undelivered(request: Request) -> Response:
        params = query(request, "kind", "provider", "prediction", "limit", "cursor")
        limit = page_size(params.pop("limit"))
        kind = cast("Kind | None", one_of("kind", params.pop("kind"), KINDS))
        try:
            return as_json(await store.page(limit, kind=kind, **params))
        except BadCursor:
            raise Problem(422, "invalid-request", "cursor is none that a list gave") from None

    return [guard.route("/v1/undelivered", GET=list_undelivered)]
