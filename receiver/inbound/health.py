"""Two questions about health."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.inbound.answers import as_json


class Probed(Protocol):
    """What the question about readiness needs of the store."""

    async def probe(self, now: float) -> None: ...


def health_routes(store: Probed, clock: Callable[[], float] = time.time) -> list[Route]:
    async def healthz(_: Request) -> Response:
        return as_json({"status": "ok"})

    async def readyz(_: Request) -> Response:
        await store.probe(clock())
        return as_json({"status": "ok"})

    return [Route("/healthz", healthz), Route("/readyz", readyz)]
