"""Parts of the test kit: a clock, one run of the receiver, and a hold on returning handlers."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, Final

import httpx
from starlette.applications import Starlette

from receiver.deliveries.handlers import Handler

PATIENCE: Final = 30.0
"""Seconds after which a test that waits has failed."""
URL: Final = "https://receiver.test"
API_KEY: Final = "api-key-of-a-test"


class Clock:
    """A wall clock that stands still until a test moves it, so that a slow machine retries nothing.

    Each reading is a microsecond later than the one before: ids keep their order.
    """

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds


class Life:
    """One run of the receiver, from its start to its stop."""

    def __init__(self, app: Starlette) -> None:
        self._app = app
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        make = partial(httpx.AsyncClient, base_url=URL, transport=httpx.ASGITransport(app))
        key = {"authorization": f"Bearer {API_KEY}", "content-type": "application/json"}
        self.caller = make(headers=key, timeout=PATIENCE)
        self.anonymous = make()

    async def start(self) -> None:
        """Start the app; raise the error that prevents the start."""
        ready = asyncio.Event()
        self._task = asyncio.create_task(self._run(ready))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({self._task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            waiting.cancel()
            await self._task

    async def _run(self, ready: asyncio.Event) -> None:
        async with self._app.router.lifespan_context(self._app), self.caller, self.anonymous:
            ready.set()
            await self._stop.wait()

    async def stop(self) -> None:
        self._stop.set()
        if self._task is not None:
            await self._task


class ReturnHold:
    """Holds back the results of returned handlers until it is released."""

    def __init__(self) -> None:
        self._held: Future[None] | None = None
        self._returned: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def on(self, handler: Handler) -> Handler:
        function = handler.function

        async def on_loop(*arguments: Any) -> Any:
            result = await function(*arguments)
            if (held := self._report_return()) is not None:
                await asyncio.wrap_future(held)
            return result

        def in_thread(*arguments: Any) -> Any:
            result = function(*arguments)
            if (held := self._report_return()) is not None:
                held.result()
            return result

        return replace(handler, function=on_loop if handler.is_async else in_thread)

    def hold(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Hold handlers that return from now on; return a future that is done when one has."""
        self._loop = loop
        self._held = Future()
        self._returned = loop.create_future()
        return self._returned

    def release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.set_result(None)

    def _report_return(self) -> Future[None] | None:
        if self._held is None or self._loop is None or self._returned is None:
            return None
        self._loop.call_soon_threadsafe(_done, self._returned)
        return self._held


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
