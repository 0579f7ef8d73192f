"""Two questions about health."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Literal, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.http.declare import Answer, Content, Endpoint
from receiver.http.problems import as_json


class Probed(Protocol):
    """What the question about readiness needs of the store."""

    async def try_write(self, now: float) -> None: ...


class Health(msgspec.Struct, frozen=True):
    """A good answer; any other is a problem."""

    status: Literal["ok"] = "ok"


def health_routes(store: Probed, clock: Callable[[], float] = time.time) -> list[Route]:
    async def healthz(_: Request) -> Response:
        return as_json(Health())

    async def readyz(_: Request) -> Response:
        await store.try_write(clock())
        return as_json(Health())

    return [Route("/healthz", healthz), Route("/readyz", readyz)]


OPERATIONS: Final = (
    Endpoint(
        "GET",
        "/healthz",
        "Say whether the process is alive",
        (Answer(200, "it is", Content(Health, Health())),),
        is_open=True,
    ),
    Endpoint(
        "GET",
        "/readyz",
        "Say whether the database takes writes",
        (Answer(200, "it does", Content(Health, Health())),),
        ("unavailable",),
        is_open=True,
    ),
)
