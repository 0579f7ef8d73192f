"""Client addresses: the peer of the connection, or the caller that a trusted proxy names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Literal

from starlette.types import ASGIApp, Receive, Scope, Send

from receiver.settings import Network

_LONGEST: Final = 64
"""Maximum characters of a name that is not an address: a proxy may write any text."""
_WITH_PORT: Final = re.compile(r"\[([^\]]*)\](?::\d*)?|([^:]*):\d+")


class Proxied:
    """ASGI middleware that makes `scope["client"]` the caller's own address.

    A proxy appends the address of its own peer to X-Forwarded-For, so the header is read from its
    end, up to the first address that is not a trusted proxy. If the server or a platform's adapter
    gives no peer, all requests have passed through it, and only the header's end distinguishes the
    callers.
    """

    def __init__(self, app: ASGIApp, trusted: Sequence[Network] | Literal["platform"]) -> None:
        self._app = app
        self._trusts_peer = trusted == "platform"
        self._trusted = () if trusted == "platform" else tuple(trusted)
        self._is_trusted = lru_cache(maxsize=4096)(self._find)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            peer = scope.get("client")
            if self._trusts_peer or not peer or self._is_trusted(str(peer[0])[:_LONGEST]):
                self._believe(scope)
        await self._app(scope, receive, send)

    def _believe(self, scope: Scope) -> None:
        hops: list[str] = []
        for name, value in scope["headers"]:
            if name == b"x-forwarded-for":
                hops += value.decode("latin-1").split(",")
            elif name == b"x-forwarded-proto":
                scheme = value.decode("latin-1").strip()
                if scheme in {"http", "https"}:
                    scope["scheme"] = scheme
        hosts = [_host(hop.strip())[:_LONGEST] for hop in hops]
        # If all are proxies, the first of them is the caller.
        found = next((one for one in reversed(hosts) if not self._is_trusted(one)), (*hosts, "")[0])
        if found:
            scope["client"] = (found, 0)

    def _find(self, host: str) -> bool:
        address = read_address(host)
        return address is not None and within(address, self._trusted)


def _host(text: str) -> str:
    """Return an address without the port that some proxies append."""
    found = _WITH_PORT.fullmatch(text)
    return text if found is None else found[1] or found[2] or ""


def client_of(scope: Scope) -> str:
    """Return the caller's address in its normal form, for limits and logs."""
    return _written(str((scope.get("client") or ("unknown",))[0]))


@lru_cache(maxsize=4096)
def _written(host: str) -> str:
    return str(read_address(host) or host[:_LONGEST])


def read_address(text: str) -> IPv4Address | IPv6Address | None:
    """Return a parsed address; None if it is not one. A mapped IPv4 address becomes IPv4."""
    try:
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def within(address: IPv4Address | IPv6Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)
