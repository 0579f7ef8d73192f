"""Apps with a mounted receiver, for third-party servers to run: `tests.mounted:fastapi`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import receiver


@asynccontextmanager
async def lifespan(_: Any) -> AsyncIterator[dict[str, str]]:
    yield {"said": "the app's own lifespan ran"}


async def own(request: Request) -> JSONResponse:
    return JSONResponse(request.state.said)


starlette = Starlette(routes=[Route("/own", own)], lifespan=lifespan)
receiver.mount(starlette, "/predictions", handlers=[])

fastapi = FastAPI(lifespan=lifespan)
fastapi.add_route("/own", own)
receiver.mount(fastapi, "/predictions/", handlers=[])
