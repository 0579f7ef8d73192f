"""Who asks: the peer of the connection, or the caller that a trusted proxy names.

uvicorn's own middleware reads X-Forwarded-For; what is here tells it whom to trust.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from typing import Any, Final

from starlette.types import ASGIApp, Scope
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from receiver.settings import Network

_LONGEST: Final = 64
"""Characters of a name that is no address: a proxy may have written anything."""


def trusted_hosts(networks: Sequence[Network]) -> list[str]:
    """Write networks as uvicorn's ProxyHeadersMiddleware takes them.

    An IPv4 peer on an IPv6 socket has a mapped address, which is trusted as its own is.
    """
    mapped = [
        f"::ffff:{network.network_address}/{96 + network.prefixlen}"
        for network in networks
        if isinstance(network, IPv4Network)
    ]
    return [*map(str, networks), *mapped]


def behind_proxies(app: ASGIApp, networks: Sequence[Network]) -> ASGIApp:
    """Put the middleware before an app that makes `scope["client"]` the caller's own address."""
    middleware: Any = ProxyHeadersMiddleware  # its types are uvicorn's own
    return middleware(app, trusted_hosts(networks))  # type: ignore[no-any-return]


def client_of(scope: Scope) -> str:
    """Return the caller's address, written in one way, as limits and logs know it."""
    return _written(str((scope.get("client") or ("unknown",))[0]))


@lru_cache(maxsize=4096)
def _written(host: str) -> str:
    return str(read_address(host) or host[:_LONGEST])


def read_address(text: str) -> IPv4Address | IPv6Address | None:
    """Read an address; None where it is none. A mapped IPv4 address is read as that."""
    try:
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def within(address: IPv4Address | IPv6Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)
