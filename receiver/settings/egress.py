"""Egress: the proxies and CA bundle of our own HTTP clients."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Final

import httpx

from receiver.settings.proxies import Proxies
from receiver.settings.tls import require, trusted

_SMALL_POOL: Final = httpx.Limits(max_connections=None, max_keepalive_connections=4)
"""Idle connections to a few hosts; one request at a time needs no more."""


def outward(
    proxies: Proxies, verify: ssl.SSLContext | None = None, *, lanes: bool = False
) -> httpx.AsyncBaseTransport:
    """Return the transport of a client; raise SettingsError if TLS cannot be set up.

    `lanes`: for many requests at once, which the caller bounds.
    """
    if verify is None:
        require(os.environ)
    make: Callable[..., httpx.AsyncBaseTransport] = partial(_connecting, verify)
    return _ByProxy(proxies, partial(_PoolPerRequest, make) if lanes else make)


def _connecting(verify: ssl.SSLContext | None, **given: Any) -> httpx.AsyncBaseTransport:
    return httpx.AsyncHTTPTransport(verify=verify or trusted(), **given)


class _ByProxy(httpx.AsyncBaseTransport):
    """Sends each request by its proxy, or directly.

    Each transport is made by its first request: the CA bundle and httpcore take 60 ms to load,
    which a process that only accepts must not wait for.
    """

    def __init__(self, proxies: Proxies, make: Callable[..., httpx.AsyncBaseTransport]) -> None:
        self._proxies = proxies
        self._make = make
        self._transports: dict[str | None, httpx.AsyncBaseTransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        proxy = self._proxies.of(url.scheme, url.host, url.port)
        if proxy not in self._transports:
            self._transports[proxy] = self._make(proxy=proxy)
        return await self._transports[proxy].handle_async_request(request)

    async def aclose(self) -> None:
        for transport in self._transports.values():
            await transport.aclose()


class _PoolPerRequest(httpx.AsyncBaseTransport):
    """As many pools of connections as there are requests at once, each for one request at a time.

    A pool of httpcore checks all its connections at the beginning and the end of each request, and
    closes each idle one while there are more than may be idle: 64 submits at once would all open
    new connections.
    """

    def __init__(self, make: Callable[..., httpx.AsyncBaseTransport], **given: Any) -> None:
        self._make = partial(make, limits=_SMALL_POOL, **given)
        self._all: list[httpx.AsyncBaseTransport] = []
        self._free: list[httpx.AsyncBaseTransport] = []
        """The pool that was used last is taken first, as its connections are the youngest."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        pool = self._free.pop() if self._free else self._new()
        try:
            response = await pool.handle_async_request(request)
        except BaseException:
            self._free.append(pool)
            raise
        response.stream = _PooledStream(response.stream, partial(self._free.append, pool))
        return response

    def _new(self) -> httpx.AsyncBaseTransport:
        pool = self._make()
        self._all.append(pool)
        return pool

    async def aclose(self) -> None:
        for pool in self._all:
            await pool.aclose()


class _PooledStream(httpx.AsyncByteStream):
    """The body of a response, which releases its pool when it is closed."""

    def __init__(self, stream: Any, release: Callable[[], None]) -> None:
        self._stream = stream
        self._release: Callable[[], None] | None = release

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._stream.__aiter__()  # type: ignore[no-any-return]

    async def aclose(self) -> None:
        release, self._release = self._release, None
        try:
            await self._stream.aclose()
        finally:
            if release is not None:
                release()
