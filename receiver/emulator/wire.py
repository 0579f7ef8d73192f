"""What the providers share on the wire: reading a request, answering, streaming, hanging up."""

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
"""Where the connection's close function is kept in the ASGI scope."""
KEEP_ALIVE = b": keep-alive\n\n"

Handler = Callable[[Request, str], Awaitable[Response]]
Calls = Sequence[tuple[str, str, str, Handler]]
"""A name, an HTTP method, a path and what answers, each."""


class Refusal(Exception):
    """Ends a request with this answer."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.response = response


def route(
    kind: str, method: str, path: str, authenticate: Callable[[Request], str], handler: Handler
) -> Route:
    """Pass the caller's key to the handler, and turn refusals into answers.

    `kind` names what is asked: a provider and one of its calls.
    """

    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request, authenticate(request))
        except Refusal as refusal:
            return refusal.response

    return Route(path, endpoint, methods=[method], name=kind)


def routes(provider: str, authenticate: Callable[[Request], str], calls: Calls) -> list[BaseRoute]:
    """Return the routes of a provider's calls that need a key."""
    return [
        route(f"{provider}.{name}", method, path, authenticate, handler)
        for name, method, path, handler in calls
    ]


def answer(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(
        msgspec.json.encode(content), status, headers=headers, media_type="application/json"
    )


async def read_object(request: Request) -> dict[str, Any] | None:
    """Read a JSON object; None when the body is anything else."""
    try:
        document = msgspec.json.decode(await request.body())
    except msgspec.DecodeError:
        return None
    return document if isinstance(document, dict) else None


def text_of(value: object) -> str:
    return value if isinstance(value, str) else ""


def moment(at: float) -> str:
    """Write a time as most providers do."""
    return datetime.fromtimestamp(at, UTC).isoformat()


def origin(request: Request) -> str:
    """Return the scheme and host the caller used, for the URLs handed back."""
    host = request.headers.get("host") or "127.0.0.1"
    return f"{request.scope['scheme']}://{host}"


def credential(request: Request, scheme: str) -> str:
    """Return what follows the scheme in Authorization; empty when it is another one."""
    given, _, value = request.headers.get("authorization", "").partition(" ")
    return value.strip() if given.lower() == scheme.lower() else ""


class HangUp(Response):
    """Close the connection with no answer: the caller cannot know what became of the request."""

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
    """Keep a way to hang up: ASGI has none, but uvicorn's sender knows its transport."""
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if transport is not None:
        scope[CLOSE] = transport.close


def hang_up(scope: MutableMapping[str, Any]) -> None:
    """Close the connection this request came in on."""
    close = scope.get(CLOSE)
    if close is None:
        raise ConnectionResetError("the emulator hung up")
    close()


class EventStream:
    """One connected listener."""

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
        """End the response, as a server does that stops."""
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


def event(data: object, name: str = "") -> bytes:
    heading = f"event: {name}\n".encode() if name else b""
    return heading + b"data: " + msgspec.json.encode(data) + b"\n\n"
