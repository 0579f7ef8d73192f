"""The SSRF guard: an HTTP transport that connects to public addresses only.

The name is resolved once, and the connection goes to the checked address, so a name that resolves
differently the second time has no effect. Every redirect is checked again.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Final

import httpx

from receiver.settings.egress import outward
from receiver.settings.proxies import Proxies

_MAX_REDIRECTS: Final = 5
_LARGEST_PORT: Final = 65535


class ForbiddenAddress(httpx.RequestError):
    """The URL leads to an address that is not public, or to no host or no valid port."""


class GuardedTransport(httpx.AsyncBaseTransport):
    """Connects to public addresses only; wraps the transport that does the work."""

    def __init__(self, *, allow_private: bool, inner: httpx.AsyncBaseTransport) -> None:
        self._allow_private = allow_private
        self._inner = inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if (request.url.port or 0) > _LARGEST_PORT:
            raise ForbiddenAddress(f"no port has the number {request.url.port}", request=request)
        if not request.url.host:
            raise ForbiddenAddress("the URL names no host", request=request)
        if self._allow_private:
            return await self._inner.handle_async_request(request)
        host = request.url.raw_host.decode("ascii")
        address = await self._public_address(request, host)
        # The name stays in the Host header and in TLS; only the connection uses the address.
        pinned = httpx.Request(
            request.method,
            request.url.copy_with(host=address),
            headers=request.headers,
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": host},
        )
        return await self._inner.handle_async_request(pinned)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _public_address(self, request: httpx.Request, host: str) -> str:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, request.url.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(f"cannot resolve {host}", request=request) from error
        addresses = [str(entry[4][0]) for entry in found]
        private = [address for address in addresses if not is_public(address)]
        if private or not addresses:
            raise ForbiddenAddress(
                f"{host} leads to {', '.join(private) or 'no address'}, which is not public",
                request=request,
            )
        return addresses[0]


def is_public(address: str) -> bool:
    """Return whether an IP address is public.

    An IPv6 address that contains an IPv4 address is judged as the IPv4 address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is None:
            return ip in _UNICAST and ip.is_global
        ip = inner
    return ip.is_global and not ip.is_multicast and ip not in _SPECIAL


_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
"""All allocated global IPv6 addresses; older Pythons call some of the rest global."""
_SPECIAL: Final = ipaddress.IPv4Network("192.0.0.0/24")
"""IETF protocol assignments: one cloud has its metadata there; older Pythons know only a part."""


def guarded_client(
    *, allow_private: bool, instead: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """Return the client for results; it uses no proxy, which would connect without the guard.

    `instead` replaces the network and the guard, in tests.
    """
    return httpx.AsyncClient(
        transport=instead
        or GuardedTransport(allow_private=allow_private, inner=outward(Proxies())),
        follow_redirects=True,
        max_redirects=_MAX_REDIRECTS,
        timeout=httpx.Timeout(30.0),
        trust_env=False,
        headers={"User-Agent": "prediction-receiver", "Accept-Encoding": "identity"},
    )
