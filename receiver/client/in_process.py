"""An httpx transport that calls an ASGI app in this process, and streams its answer.

httpx's own transport waits for the end of an answer, but a live stream has none.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import httpx

_CLIENT: Final = ("127.0.0.1", 123)


class InProcess(httpx.AsyncBaseTransport):
    """A transport to an app whose lifespan runs in this event loop."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        messages: asyncio.Queue[Any] = asyncio.Queue()
        gone = asyncio.Event()
        unread = [{"type": "http.request", "body": await request.aread(), "more_body": False}]

        async def receive() -> Any:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.create_task(self._call(_scope(request), receive, messages))
        try:
            start = await messages.get()
        except BaseException:
            task.cancel()
            raise
        if start is None:
            await asyncio.wait([task])
            reason = repr(task.exception() or "no answer")
            raise httpx.RemoteProtocolError(f"the app failed: {reason}", request=request)
        return httpx.Response(
            start["status"],
            headers=start.get("headers", []),
            stream=_Body(messages, gone, task),
            request=request,
        )

    async def _call(self, scope: Any, receive: Any, messages: asyncio.Queue[Any]) -> None:
        try:
            await self._app(scope, receive, messages.put)
        finally:
            messages.put_nowait(None)


class _Body(httpx.AsyncByteStream):
    """The body of an answer, streamed."""

    def __init__(
        self, messages: asyncio.Queue[Any], gone: asyncio.Event, task: asyncio.Task[None]
    ) -> None:
        self._messages = messages
        self._gone = gone
        self._task = task

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (message := await self._messages.get()) is not None:
            yield message.get("body", b"")
            if not message.get("more_body", False):
                return
        raise httpx.RemoteProtocolError("the app ended in the middle of its answer")

    async def aclose(self) -> None:
        """Disconnect, and wait until the app has ended."""
        self._gone.set()
        with contextlib.suppress(Exception):  # the app has logged its error
            await self._task


def _scope(request: httpx.Request) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.split(b"?")[0],
        "query_string": request.url.query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "server": (request.url.host, request.url.port),
        "client": _CLIENT,
        "extensions": {},
    }
