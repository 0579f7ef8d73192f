"""HTTP helpers of the emulated providers: requests, answers, streams, hanging up."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

CLOSE = "emulator.close"
"""The key of the connection's close function in the ASGI scope."""
KEEP_ALIVE = b": keep-alive\n\n"

Handler = Callable[[Request, str], Awaitable[Response]]
Calls = Sequence[tuple[str, str, str, Handler]]
"""For each call: its name, HTTP method, path and handler."""


class Refusal(Exception):
    """An exception that ends a request with its response."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.response = response


def routes(provider: str, authenticate: Callable[[Request], str], calls: Calls) -> list[BaseRoute]:
    """Return the routes of a provider's calls that need a key.

    Each passes the caller's account to its handler and answers refusals. Its name is the provider
    and the call, such as `fal.submit`.
    """

    def endpoint_of(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                return await handler(request, authenticate(request))
            except Refusal as refusal:
                return refusal.response

        return endpoint

    return [
        Route(path, endpoint_of(handler), methods=[method], name=f"{provider}.{name}")
        for name, method, path, handler in calls
    ]


def answer(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(
        msgspec.json.encode(content), status, headers=headers, media_type="application/json"
    )


async def read_object(request: Request) -> dict[str, Any] | None:
    """Return the JSON object in the body; None if the body is anything else."""
    try:
        document = msgspec.json.decode(await request.body())
    except msgspec.DecodeError:
        return None
    return document if isinstance(document, dict) else None


def text_of(value: object) -> str:
    return value if isinstance(value, str) else ""


def moment(at: float) -> str:
    """Return a time in ISO 8601, as most providers write it."""
    return datetime.fromtimestamp(at, UTC).isoformat()


def origin(request: Request) -> str:
    """Return the scheme and host of the request, for URLs in the answer."""
    host = request.headers.get("host") or "127.0.0.1"
    return f"{request.scope['scheme']}://{host}"


def credential(request: Request, scheme: str) -> str:
    """Return the credential in Authorization; empty if its scheme is another."""
    given, _, value = request.headers.get("authorization", "").partition(" ")
    return value.strip() if given.lower() == scheme.lower() else ""


class HangUp(Response):
    """A closed connection instead of an answer: the caller cannot know whether the call worked."""

    def __init__(self, after: float = 0) -> None:
        super().__init__()
        self.after = after

    async def __call__(self, scope: Scope, receive: Receive, _send: Send) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self.after):
                await _gone(receive)
        hang_up(scope)
        await _gone(receive)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def remember_connection(scope: MutableMapping[str, Any], send: Send) -> None:
    """Store the close function of uvicorn's transport: ASGI has no way to hang up."""
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if transport is not None:
        scope[CLOSE] = transport.close


def hang_up(scope: MutableMapping[str, Any]) -> None:
    """Close the connection of a request; raise ConnectionResetError if there is no socket."""
    close = scope.get(CLOSE)
    if close is None:
        raise ConnectionResetError("the emulator hung up")
    close()


class EventStream:
    """One open connection to an event stream."""

    def __init__(self, account: str) -> None:
        self.account = account
        self._chunks: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self._cut = self._ended = False

    @property
    def unread(self) -> bool:
        """Whether there are chunks that the client has not read."""
        return bool(self._chunks)

    def send(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._changed.set()

    def end(self) -> None:
        """End the response, as a stopping server does."""
        self._ended = True
        self._changed.set()

    def cut(self) -> None:
        self._cut = True
        self._changed.set()

    async def chunks(self, request: Request) -> AsyncIterator[bytes]:
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._cut:
                hang_up(request.scope)
                return
            waiting = b"".join(self._chunks)
            self._chunks.clear()
            yield waiting
            if self._ended:
                return


def event_stream(chunks: AsyncIterator[bytes]) -> Response:
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(chunks, headers=headers, media_type="text/event-stream")


def event(name: str, data: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))
