"""The servers that a PostgreSQL URL names, read as libpq does: several are tried in turn."""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

_SERVER: Final = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]]*)(?::(\d*))?")
_ADDRESS: Final = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%.+)?")
_USUAL: Final = "5432"
_LARGEST: Final = 65535


class Servers(NamedTuple):
    """The servers of a database; neither hosts nor ports: the local socket."""

    hosts: tuple[str, ...]
    """Names, addresses (IPv6 in brackets) and folders of sockets, in the order to try them."""
    ports: tuple[str, ...]
    """Empty, one for all hosts, or one for each."""


class MisnamedServers(ValueError):
    """A problem of the servers, in a text that cannot hold a password."""


def servers(url: str) -> Servers:
    """Read the servers of a URL; those in its query replace those before its path.

    Raises ValueError for an invalid URL, and MisnamedServers.
    """
    parts = urlsplit(url)
    if "@" in parts.path + parts.fragment + parts.query.partition("=")[0]:
        raise ValueError("a password with a /, # or ? that is not encoded")
    given = dict(parse_qsl(parts.query))
    hosts, ports = _in_front(parts.netloc.rpartition("@")[2])
    if host := given.get("host"):
        hosts = [_bracketed(name) for name in host.split(",")]
    if port := given.get("port"):
        ports = [number or _USUAL for number in port.split(",")]
    if not all(hosts):
        raise MisnamedServers("has a comma without a host before and after it")
    if not all(map(_is_port, ports)):
        raise MisnamedServers(f"has a port that is not a number from 1 to {_LARGEST}")
    if len(ports) > 1 and len(ports) != len(hosts):
        raise MisnamedServers(
            f"names {len(ports)} ports for {len(hosts)} hosts: give one for all, or one for each"
        )
    return Servers(tuple(hosts), tuple(ports))


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and 0 < int(text) <= _LARGEST


def _in_front(text: str) -> tuple[list[str], list[str]]:
    found = [_SERVER.fullmatch(one) for one in text.split(",")]
    pairs = [(unquote(one[1]), one[2]) for one in found if one]
    if len(pairs) < len(found):
        raise ValueError("no hosts and ports")
    ports = [port or _USUAL for _, port in pairs] if any(port for _, port in pairs) else []
    return [host for host, _ in pairs] if text and text[0] != ":" else [], ports


def _bracketed(host: str) -> str:
    """Return a host; an IPv6 address in brackets, which a query may omit."""
    return f"[{host}]" if _ADDRESS.fullmatch(host) else host
