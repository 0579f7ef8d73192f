"""How our own HTTP clients reach the world: by the proxies and the authorities of the settings."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx

from receiver.settings.proxies import Proxies
from receiver.settings.tls import trusted


def outward(
    proxies: Proxies, verify: ssl.SSLContext | None = None, **given: Any
) -> httpx.AsyncBaseTransport:
    """Make the transport of a client; raise SettingsError where TLS cannot be set up."""
    make = partial(httpx.AsyncHTTPTransport, verify=verify or trusted(), **given)
    return _ByProxy(proxies, make) if proxies.by_scheme else make()


class _ByProxy(httpx.AsyncBaseTransport):
    """Hands each request to the proxy that is named for it, or sends it straight."""

    def __init__(self, proxies: Proxies, make: Callable[..., httpx.AsyncBaseTransport]) -> None:
        self._proxies = proxies
        self._ways = {url: make(proxy=url) for url in {None, *proxies.by_scheme.values()}}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        way = self._ways[self._proxies.of(url.scheme, url.host, url.port)]
        return await way.handle_async_request(request)

    async def aclose(self) -> None:
        for way in self._ways.values():
            await way.aclose()
