"""Who asks: the peer of the connection, or whom the proxies that we trust name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from receiver.settings import Network

_FOR: Final = re.compile(r'(?:^|[;,\s])for\s*=\s*("[^"]*"|[^;,\s]+)', re.IGNORECASE)


class Proxies:
    """ASGI middleware: makes `scope["client"]` the caller's own address, for limits and logs alike.

    The headers are left as they are: that there are any is what tells a proxied caller from a local
    one.
    """

    def __init__(self, app: ASGIApp, trusted: Sequence[Network]) -> None:
        self._app = app
        self._trusts: Callable[[str], bool] = lru_cache(maxsize=4096)(
            lambda host: (found := read_address(host)) is not None and within(found, trusted)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if client := scope.get("client"):
            host = self.caller(client[0], scope.get("headers", ()))
            if host != client[0]:
                scope["client"] = (host, 0)
        await self._app(scope, receive, send)

    def caller(self, peer: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Walk from the right to the first address that is no proxy of ours.

        A proxy that writes one of the two headers passes the other on as a stranger wrote it: where
        they differ neither is believed.
        """
        peer = plain(peer)
        if not self._trusts(peer):
            return peer
        headers = list(headers)
        told = {
            self._walk(peer, chain)
            for name, hops in _HOPS.items()
            if (chain := hops(_joined(headers, name)))
        }
        return told.pop() if len(told) == 1 else peer

    def _walk(self, peer: str, chain: Sequence[str]) -> str:
        for hop in reversed(chain):
            found = read_address(hop)
            if found is None:  # "unknown", or nonsense: whoever said so is the last we know
                return peer
            peer = str(found)
            if not self._trusts(peer):
                return peer
        return peer


def client_of(scope: Scope) -> str:
    """Name the caller's address, as limits and logs know it."""
    return str((scope.get("client") or ("unknown",))[0])


def _joined(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> str:
    return ",".join(value.decode("latin-1") for name, value in headers if name == wanted)


_HOPS: Final[dict[bytes, Callable[[str], list[str]]]] = {
    b"x-forwarded-for": lambda text: text.split(",") if text else [],
    b"forwarded": _FOR.findall,
}


def plain(host: str) -> str:
    """Write an IPv4 address as such, though it came in on an IPv6 socket."""
    if not host.startswith("::ffff:"):
        return host
    found = read_address(host)
    return host if found is None else str(found)


def read_address(text: str) -> IPv4Address | IPv6Address | None:
    """Read an address as a proxy writes it: with a port, brackets or quotes, or with none."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def within(address: IPv4Address | IPv6Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)
