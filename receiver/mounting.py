"""A receiver mounted below a path of another ASGI app, which starts and stops it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette

from receiver.app import create_app
from receiver.deliveries.registry import Handler
from receiver.settings import Settings


def mount(
    app: Starlette,
    path: str,
    settings: Settings | None = None,
    handlers: Sequence[str | Callable[..., Any] | Handler] | None = None,
    **options: Any,
) -> Starlette:
    """Mount a receiver below `path` of a Starlette or FastAPI app; return it.

    It starts before the app's own lifespan and stops after it. A RECEIVER_PUBLIC_URL without a path
    is the address of the whole app, so `path` is appended for callbacks; one with a path is taken
    for the receiver's own. All else is as in `create_app`.
    """
    path = path.rstrip("/")
    settings = settings or Settings.read(os.environ)
    if settings.public_url and not urlsplit(settings.public_url).path:
        settings = replace(settings, public_url=f"{settings.public_url}{path}")
    receiver = create_app(settings, handlers, **options)
    own = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(outer: Any) -> AsyncIterator[Any]:
        async with receiver.router.lifespan_context(receiver), own(outer) as state:
            yield state

    app.mount(path, receiver)
    app.router.lifespan_context = lifespan
    return receiver
