"""Proxies for our own requests, from HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY.

httpx reads these variables too, but it raises on ranges and on IPv6 addresses in brackets, and
its error names no variable. This machine is always reached without a proxy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Final
from urllib.parse import urlsplit

from receiver.settings.reader import Reader

BY_SCHEME: Final = {
    scheme: (f"{scheme.upper()}_PROXY", "ALL_PROXY") for scheme in ("http", "https")
}
"""Variables that name the proxy, by scheme of a request; the first that is set counts."""
NAMES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_SCHEMES: Final = {
    "http": "http",
    "https": "https",
    "socks": "socks5",  # as GNOME writes it
    "socks5": "socks5",
    "socks5h": "socks5h",
}
_HOST: Final = re.compile(r"[\w.*-]*[\w*][\w.*-]*")
_HIGHEST_PORT: Final = 65535


@dataclass(frozen=True)
class Direct:
    """One entry of NO_PROXY: hosts that are reached without a proxy."""

    host: str = "*"
    """A name in lower case, which includes its subdomains, or a pattern of names."""
    network: IPv4Network | IPv6Network | None = None
    scheme: str = ""
    port: int | None = None

    def covers(self, scheme: str, host: str, port: int) -> bool:
        if self.scheme not in {"", scheme} or self.port not in {None, port}:
            return False
        if self.network is not None:
            address = _address(host)
            return address is not None and address in self.network
        return fnmatchcase(host, self.host) or host.endswith(f".{self.host.lstrip('*.')}")


@dataclass(frozen=True)
class Proxies:
    """The proxies of requests, and the hosts that need none."""

    by_scheme: Mapping[str, str] = field(default_factory=dict, repr=False)
    """URLs of proxies, which may hold a password, by `http` and `https`."""
    direct: tuple[Direct, ...] = ()

    def of(self, scheme: str, host: str, port: int | None) -> str | None:
        """Return the URL of the proxy for a request; None: it is sent without one."""
        proxy = self.by_scheme.get(scheme)
        if proxy is None or is_loopback(host):
            return None
        host, port = host.lower().rstrip("."), port or {"http": 80}.get(scheme, 443)
        return None if any(one.covers(scheme, host, port) for one in self.direct) else proxy


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine, judged by the text alone."""
    address = _address(host)
    if address is not None:
        return address.is_loopback or address.is_unspecified
    return re.fullmatch(r"(.+\.)?localhost\.?", host, re.IGNORECASE) is not None


def read_proxies(reader: Reader) -> Proxies:
    """Read the variables that curl, httpx and others read; unused ones are not checked."""
    found = {}
    for scheme, names in BY_SCHEME.items():
        for name in map(reader.spelled, names):
            if url := reader.get(name, read_proxy, None):
                found[scheme] = url
            if reader.is_set(name):
                break
    direct = reader.get(reader.spelled("NO_PROXY"), read_direct, ()) if found else ()
    return Proxies(found, direct)


def read_proxy(text: str) -> str:
    """Return the URL of a proxy; errors do not quote it, as it may hold a password."""
    import httpx  # noqa: PLC0415 - paid for if there is a proxy

    scheme, slashes, rest = text.rpartition("://")
    wanted = scheme.lower() if slashes else "http"
    if wanted not in _SCHEMES:
        raise ValueError(
            f"{wanted}:// is not a kind of proxy that can be used: only http, https and socks5 are"
        )
    try:
        url = httpx.URL(f"{_SCHEMES[wanted]}://{rest}")
    except (httpx.InvalidURL, UnicodeError):
        url = httpx.URL()
    port = 1 if url.port is None else url.port
    if not url.host or "%" in url.host or not 0 < port <= _HIGHEST_PORT:
        raise ValueError(
            "must be the address of a proxy, as http://proxy.example:3128 (percent-encode special "
            "characters in its password)"
        )
    if url.scheme.startswith("socks") and find_spec("socksio") is None:
        raise ValueError(
            "a SOCKS proxy needs more than is installed here: pip install 'httpx[socks]', name an "
            "HTTP proxy, or unset it"
        )
    return str(url)


def read_direct(text: str) -> tuple[Direct, ...]:
    """Read NO_PROXY: hosts, domains, addresses and ranges, separated by comma or blank."""
    return tuple(_direct(entry) for entry in re.split(r"[,;\s]+", text) if entry)


def _direct(entry: str) -> Direct:
    scheme, _, rest = entry.lower().rpartition("://")
    scheme = "" if scheme == "all" else scheme
    if network := _network(rest):
        return Direct(network=network, scheme=scheme)
    try:
        parts = urlsplit(f"//{rest}")
        host, port = "" if parts.path.strip("/") else parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if network := _network(host):
        return Direct(network=network, scheme=scheme, port=port)
    if not _HOST.fullmatch(host):
        raise ValueError(f"{entry!r} is not a host, domain, address or range like 10.0.0.0/8")
    return Direct(host.rstrip("."), scheme=scheme, port=port)


def _network(text: str) -> IPv4Network | IPv6Network | None:
    try:
        return ip_network(text.replace("[", "").replace("]", ""), strict=False)
    except ValueError:
        return None


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return None
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address
