"""The client of a receiver: `Receiver` blocks, `AsyncReceiver` is awaited; both do the same.

    with Receiver("https://hooks.example.org", key) as receiver:
        prediction = receiver.submit("fal", "fal-ai/nano-banana", {"prompt": "a lighthouse"})
        print(receiver.wait(prediction.id).output)

It needs only httpx, msgspec and `receiver.model`.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, closing
from typing import Any, Final, Self, TypeVar

import httpx

from receiver.client.files import file
from receiver.client.follow import Message
from receiver.client.operations import Operations
from receiver.client.signatures import verify
from receiver.client.steps import (
    Answer,
    ClientError,
    Done,
    Emit,
    OpenStream,
    ReadChunk,
    Request,
    Sleep,
    Step,
    Steps,
    advance,
)

__all__ = ["AsyncReceiver", "ClientError", "Message", "Receiver", "file", "verify"]

T = TypeVar("T")

_HERE: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_TIMEOUT: Final = 90.0
"""Seconds; a request may ask the receiver to wait for 60."""


class Receiver(Operations):
    """A blocking client of a receiver; threads may share one."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        patience: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        **options: Any,
    ) -> None:
        """Create a client; nothing is sent yet.

        `key` is one of RECEIVER_API_KEYS. While the receiver is unreachable or answers 429 or 503,
        a call is repeated if that is safe; its waits add up to `patience` seconds at most.
        `options` are httpx.Client's (`proxy`, `verify`, …). Raises ClientError.
        """
        self.url = url.rstrip("/")
        self._patience = patience
        self._sleep = sleep
        self._http = httpx.Client(transport=transport, **_options(self.url, key, options))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def run(self, steps: Steps[T]) -> T:
        """Execute the steps of one call, and return its result."""
        with closing(_Driver(self._http, self._sleep)) as driver:
            step = advance(steps, None)
            while not isinstance(step, Done):
                step = advance(steps, driver.do(step))
            return step.value  # type: ignore[no-any-return] # what the generator returns

    def iterate(self, steps: Steps[Any]) -> Iterator[Any]:
        """Execute the steps of an endless call, and yield the values that they emit."""
        with closing(_Driver(self._http, self._sleep)) as driver:
            step = advance(steps, None)
            while not isinstance(step, Done):
                if isinstance(step, Emit):
                    yield step.value
                step = advance(steps, driver.do(step))


class AsyncReceiver(Operations):
    """An asynchronous client of a receiver, which may also run in this process.

    In process: `AsyncReceiver("http://receiver", key, transport=httpx.ASGITransport(app))`.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        patience: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
        **options: Any,
    ) -> None:
        """Create a client, as `Receiver` does."""
        self.url = url.rstrip("/")
        self._patience = patience
        from asyncio import sleep as for_real  # noqa: PLC0415 - a Receiver needs no asyncio

        self._sleep = sleep or for_real
        if isinstance(transport, httpx.ASGITransport):  # it would wait for the end of a stream
            from receiver.client.in_process import InProcess  # noqa: PLC0415 - likewise

            transport = InProcess(transport.app)
        self._http = httpx.AsyncClient(transport=transport, **_options(self.url, key, options))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def run(self, steps: Steps[T]) -> T:
        """Execute the steps of one call, and return its result."""
        async with aclosing(_AsyncDriver(self._http, self._sleep)) as driver:
            step = advance(steps, None)
            while not isinstance(step, Done):
                step = advance(steps, await driver.do(step))
            return step.value  # type: ignore[no-any-return] # what the generator returns

    async def iterate(self, steps: Steps[Any]) -> AsyncIterator[Any]:
        """Execute the steps of an endless call, and yield the values that they emit."""
        async with aclosing(_AsyncDriver(self._http, self._sleep)) as driver:
            step = advance(steps, None)
            while not isinstance(step, Done):
                if isinstance(step, Emit):
                    yield step.value
                step = advance(steps, await driver.do(step))


def _options(url: str, key: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of either httpx client; raise ClientError for a bad URL or key."""
    try:
        base = httpx.URL(url)
        host = base.host  # its Punycode is decoded, which may fail
    except (httpx.InvalidURL, ValueError) as error:
        raise ClientError("unfit", f"{url!r} is not a URL: {error}") from error
    if base.scheme not in {"http", "https"} or not host:
        raise ClientError("unfit", f"{url!r} must begin with https:// or http://, and name a host")
    key = key and key.strip()
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ClientError("unfit", "the key must be printable ASCII, as it travels in a header")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # Without TLS, do not load the certificates: that takes longer than all the rest here.
    verify = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if base.scheme == "http" else True
    return {
        "base_url": base,
        "timeout": _TIMEOUT,
        "verify": verify,
        "trust_env": host not in _HERE,  # a proxy cannot reach this machine
        **options,
        "headers": {**headers, **options.get("headers", {})},
    }


def _request(http: httpx.Client | httpx.AsyncClient, step: Request) -> httpx.Request:
    timeout = http.timeout if step.silence is None else httpx.Timeout(10.0, read=step.silence)
    try:
        return http.build_request(
            step.method,
            step.path,
            params=step.params or None,
            headers=step.headers,
            content=step.content,
            timeout=timeout,
        )
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ClientError("unfit", f"this cannot be sent: {error}") from error


class _Driver:
    """The executor of one call's steps, with a blocking client."""

    def __init__(self, http: httpx.Client, sleep: Callable[[float], None]) -> None:
        self._http = http
        self._sleep = sleep
        self._stream: httpx.Response | None = None
        self._chunks: Iterator[bytes]

    def do(self, step: Step) -> Any:
        """Do a step; return its result, or the error of its request."""
        try:
            match step:
                case Request():
                    answer = self._http.send(_request(self._http, step))
                    return Answer(answer.status_code, answer.headers, answer.content)
                case Sleep():
                    self._sleep(step.seconds)
                case OpenStream():
                    self.close()
                    answer = self._http.send(_request(self._http, step.request), stream=True)
                    self._stream, self._chunks = answer, answer.iter_bytes()
                    content = b"" if answer.is_success else answer.read()
                    return Answer(answer.status_code, answer.headers, content)
                case ReadChunk():
                    return next(self._chunks, b"")
        except httpx.RequestError as error:
            return error

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


class _AsyncDriver:
    """The executor of one call's steps, with an asynchronous client."""

    def __init__(self, http: httpx.AsyncClient, sleep: Callable[[float], Awaitable[None]]) -> None:
        self._http = http
        self._sleep = sleep
        self._stream: httpx.Response | None = None
        self._chunks: AsyncIterator[bytes]

    async def do(self, step: Step) -> Any:
        """Do a step; return its result, or the error of its request."""
        try:
            match step:
                case Request():
                    answer = await self._http.send(_request(self._http, step))
                    return Answer(answer.status_code, answer.headers, answer.content)
                case Sleep():
                    await self._sleep(step.seconds)
                case OpenStream():
                    await self.aclose()
                    answer = await self._http.send(_request(self._http, step.request), stream=True)
                    self._stream, self._chunks = answer, answer.aiter_bytes()
                    content = b"" if answer.is_success else await answer.aread()
                    return Answer(answer.status_code, answer.headers, content)
                case ReadChunk():
                    return await anext(self._chunks, b"")
        except httpx.RequestError as error:
            return error

    async def aclose(self) -> None:
        if self._stream is not None:
            await self._stream.aclose()
