"""Lifespan on demand: an ASGI app that starts with its first request.

Platforms' adapters run no lifespan, or one for each request, or several at once. A failed start is
logged, and tried again at the next request.
"""

from __future__ import annotations

import asyncio
import math
from contextvars import ContextVar
from typing import Final

import structlog
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from receiver.model.answers import Drained

log = structlog.get_logger("receiver")

CUT_OFF: Final[ContextVar[float]] = ContextVar("CUT_OFF", default=math.inf)
"""The time, by the loop's clock, when the platform ends a request: it must be answered before."""


class SelfStarting:
    """The app, which is started once, when it is first needed, and kept running."""

    def __init__(self, app: Starlette) -> None:
        self._app = app
        self._run: _Run | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; 503 if the receiver cannot be started."""
        if scope["type"] == "lifespan":
            # The platform's own lifespan does nothing, and ends at once.
            await receive()
            await send({"type": "lifespan.startup.complete"})
            return
        try:
            await self.start()
        except Exception as error:  # the app itself answers that it is not started
            log.exception("receiver.unstarted", reason=f"{type(error).__name__}: {error}")
        await self._app(scope, receive, send)

    async def start(self) -> None:
        """Start the app unless it runs; concurrent callers wait for the same start.

        Raises the errors of its lifespan.
        """
        if self._run is None:
            self._run = _Run(self._app)
        run = self._run
        try:
            # A caller that gives up waiting does not stop the start.
            await asyncio.shield(run.started)
        except BaseException:
            if run.started.done() and self._run is run:
                self._run = None
            raise

    async def drain(self, seconds: float) -> Drained:
        """Run due work for at most `seconds`; raise the errors of the start and of the drain."""
        await self.start()
        done: Drained = await self._app.state.drain(seconds)
        return done

    async def stop(self) -> None:
        """Stop the app, if it runs; it may be started again."""
        run, self._run = self._run, None
        if run is not None:
            await run.end()


class _Run:
    """One run of an app's lifespan, in a task of its own."""

    def __init__(self, app: Starlette) -> None:
        self._may_end = asyncio.Event()
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live(app))

    async def _live(self, app: Starlette) -> None:
        try:
            async with app.router.lifespan_context(app):
                self.started.set_result(None)
                await self._may_end.wait()
        except BaseException as error:
            if self.started.done():
                raise
            self.started.set_exception(error)

    async def end(self) -> None:
        self._may_end.set()
        await self._task
