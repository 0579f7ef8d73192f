"""`/openapi.json` and `/docs`: what a receiver takes and answers, for programs and for people."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.http.body import wishes
from receiver.http.declare import Answer, Content, Endpoint
from receiver.http.openapi import Groups, Json, document
from receiver.http.page import HEADERS, page

_FRESH: Final = {"Cache-Control": "public, max-age=300", "X-Content-Type-Options": "nosniff"}


class IfNoneMatch(msgspec.Struct, frozen=True, rename={"tags": "If-None-Match"}):
    """What the caller has already."""

    tags: str | None = None
    """The ETag of an earlier answer."""


class Docs:
    """The two routes, which are open; what they answer is made when somebody first asks."""

    def __init__(self, groups: Groups, webhooks: Sequence[Endpoint]) -> None:
        self._groups = groups
        self._webhooks = webhooks

    def routes(self) -> list[Route]:
        return [Route("/openapi.json", self.openapi), Route("/docs", self.docs)]

    @cached_property
    def _document(self) -> Json:
        return document(self._groups, self._webhooks)

    @cached_property
    def _json(self) -> bytes:
        return msgspec.json.encode(self._document)

    @cached_property
    def _html(self) -> bytes:
        return page(self._document).encode()

    async def openapi(self, request: Request) -> Response:
        return _cached(request, self._json, "application/json", {})

    async def docs(self, request: Request) -> Response:
        return _cached(request, self._html, "text/html", HEADERS)


def _cached(request: Request, body: bytes, media_type: str, headers: dict[str, str]) -> Response:
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**_FRESH, **headers, "ETag": tag}
    known = re.findall(r'"[^"]*"|\*', wishes(request, IfNoneMatch).tags or "")
    if tag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=media_type)


OPERATIONS: Final = tuple(
    Endpoint(
        "GET",
        path,
        summary,
        (
            Answer(200, meaning, Content(kind, media_type=media_type), ("ETag",)),
            Answer(304, "as it was", headers=("ETag",)),
        ),
        headers=IfNoneMatch,
        is_open=True,
    )
    for path, summary, meaning, kind, media_type in (
        ("/openapi.json", "Describe it for programs", "OpenAPI 3.1", Json, "application/json"),
        ("/docs", "Describe it for people", "a page", str, "text/html"),
    )
)
