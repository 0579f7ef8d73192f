"""Parsers of settings: each reads a text, or raises ValueError that states what it must be."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, cast
from urllib.parse import SplitResult, urlsplit

from receiver.model.recipes import TRUTHS
from receiver.model.text import clean
from receiver.settings import toml
from receiver.settings.proxies import is_loopback
from receiver.settings.reader import Secret
from receiver.settings.servers import MisnamedServers, servers

Network = IPv4Network | IPv6Network

SHORTEST_SECRET: Final = 32
_LARGEST_PORT: Final = 65535
_MOST_NAMES: Final = 8
_MOST_SECONDS: Final = 999_999_999.0
_MOST_WHOLE: Final = 2**31 - 1
"""The largest `int` of PostgreSQL; SQLite's is larger."""
LOOPBACK: Final = (ip_network("127.0.0.0/8"), ip_network("::1"))


def texts(text: str) -> tuple[str, ...]:
    return tuple(part for part in map(clean, text.split(",")) if part)


def names(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(texts(text)))
    if len(found) > _MOST_NAMES:
        raise ValueError(f"must be {_MOST_NAMES} names at most, as sums are kept for each value")
    return found


def hosts(text: str) -> tuple[str, ...]:
    found = tuple(part.lower() for part in texts(text))
    if not found or not all(map(_is_host, found)):
        raise ValueError("must be hosts by comma, as in bot.example or bot.example:8443")
    return found


def _is_host(text: str) -> bool:
    parts = _split(f"//{text}")
    return parts is not None and parts.netloc == text and not re.search(r"[^!-~]|[@*\\]", text)


def _split(text: str) -> SplitResult | None:
    """Return the parts of a URL; None if it has no host to send to."""
    try:
        parts = urlsplit(text)
        is_sendable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return None
    return parts if is_sendable else None


def secrets(text: str) -> tuple[Secret, ...]:
    return tuple(Secret(part) for part in texts(text))


def account_secrets(begin: str, text: str) -> tuple[Secret, ...]:
    if not all(part.startswith(begin) for part in texts(text)):
        raise ValueError(f"must be what the provider shows, beginning with {begin}")
    return secrets(text)


def strong_secrets(text: str) -> tuple[Secret, ...]:
    if any(len(part) < SHORTEST_SECRET for part in texts(text)):
        raise ValueError(f"every key must have {SHORTEST_SECRET} characters or more")
    return secrets(text)


def header_safe(text: str) -> Secret | None:
    if not text.isascii() or not text.isprintable():
        raise ValueError("must be printable ASCII, as it travels in a header")
    return Secret(text)


def collector_url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise ValueError("must be an http(s) URL, as http://collector:4318")
    return text


def url(text: str) -> str:
    if "://" not in text:
        raise ValueError("must begin with https:// or http://")
    if not _is_plain_url(text):
        raise ValueError("must be an http(s) URL without user, query or fragment")
    return text.rstrip("/")


def base_url(path: str, text: str) -> str:
    """Read a base URL, without the path, or a first part of it, that an SDK adds."""
    base = url(text)
    while path and not base.endswith(path):
        path = path.rpartition("/")[0]
    return base.removesuffix(path)


def receivers_url(text: str) -> str:
    """Read a URL; for this machine http:// may be left out."""
    try:
        host = urlsplit(f"//{text}").hostname or ""
    except ValueError:
        host = ""
    return url(f"http://{text}" if "://" not in text and is_loopback(host) else text)


def _is_plain_url(text: str) -> bool:
    parts = _split(text)
    if parts is None or parts.username or parts.password or re.search(r"[?#\\ ]", text):
        return False
    return parts.scheme in {"http", "https"} and text.isprintable()


def database_url(text: str) -> str:
    if text.startswith(("postgresql://", "postgres://")):
        return _postgres_url(text)
    path = text.removeprefix("sqlite:///")
    if path == text or not path or path.endswith("/") or path == ":memory:":
        raise ValueError(
            "must be sqlite:///path of a file (four slashes for an absolute path), or "
            "postgresql://user@host/name"
        )
    return text


def migrate_url(text: str) -> str:
    if not text.startswith(("postgresql://", "postgres://")):
        raise ValueError("must be postgresql://user@host/name")
    return _postgres_url(text)


def _postgres_url(text: str) -> str:
    try:
        servers(text)
    except MisnamedServers:
        raise
    except ValueError:
        # The error may quote the password, so it is left out.
        raise ValueError(
            "is not a URL: percent-encode special characters in the password (@ as %40, / as %2F)"
        ) from None
    return text


def whole(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or not 1 <= int(text) <= _MOST_WHOLE:
        raise ValueError(f"must be a whole number from 1 to {_MOST_WHOLE}")
    return int(text)


def limit(text: str) -> int | None:
    return None if text.lower() == "none" else whole(text)


def networks(text: str) -> tuple[Network, ...]:
    try:
        networks = tuple(map(ip_network, texts(text)))
    except ValueError as error:
        raise ValueError(f"must be addresses and ranges like 203.0.113.0/24: {error}") from None
    if not networks:
        raise ValueError("must be an address or a range like 203.0.113.0/24")
    return networks


def trusted(text: str) -> tuple[Network, ...] | Literal["platform"]:
    if text.lower() == "platform":
        return "platform"
    return () if text.lower() == "none" else networks(text)


def path(text: str) -> str:
    """Read a path prefix; `/` and `none` are an empty one."""
    if text.lower() in {"/", "none"}:
        return ""
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+/?", text):
        raise ValueError("must be a path like /prod or /api/receiver, or none")
    return text.rstrip("/")


def port(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) > _LARGEST_PORT:
        raise ValueError(f"must be a port to listen on, a number from 0 to {_LARGEST_PORT}")
    return int(text)


def listening_host(text: str) -> str:
    if re.search(r"[^!-~]|[/@]", text):
        raise ValueError("must be an address or a name to listen on, as 0.0.0.0")
    return text


def sources(text: str) -> tuple[Network, ...] | Literal["meta"]:
    return "meta" if text.lower() == "meta" else networks(text)


def seconds(text: str) -> float:
    """Read a number of seconds above 0."""
    return _above_0(text, _MOST_SECONDS, "must be a number of seconds above 0")


def _above_0(text: str, most: float, problem: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 < number <= most:  # also refuses nan and inf
        raise ValueError(problem)
    return number


class After(NamedTuple):
    """What runs an event's deliveries after its callback, if nothing runs between requests."""

    how: Literal["drain", "inline", "after", "wake"] = "drain"
    seconds: float = 0.0
    """For `inline` and `after`: the most seconds that deliveries may extend the request."""


INLINE: Final = After("inline", 2.0)
"""Short, as Eachlabs requires an answer soon."""


def after(text: str) -> After:
    how, equals, number = text.lower().partition("=")
    if how in {"inline", "after"} and equals:
        return After(cast("Literal['inline', 'after']", how), seconds(number))
    if how in {"drain", "wake"} and not equals:
        return After(cast("Literal['drain', 'wake']", how))
    raise ValueError("must be drain, inline=2, after=20 (seconds) or wake")


_ENDS = ("succeeded", "failed", "canceled")
_MOST_DAYS = 36525.0


def retention_days(text: str) -> dict[str, float]:
    """Read `30`, `failed=90,canceled=0.5`, or both: a number without a name is for every end."""
    days: dict[str, float] = {}
    for part in texts(text):
        name, equals, number = part.rpartition("=")
        name = name.strip().lower()
        if equals and name not in {*_ENDS, "dead"}:
            raise ValueError(f"must name {', '.join(_ENDS)} or dead, as in 30,failed=90")
        problem = "must be days above 0, as in 30 or succeeded=30,failed=90,canceled=7"
        days |= dict.fromkeys([name] if equals else _ENDS, _above_0(number, _MOST_DAYS, problem))
    return days


def switch(text: str) -> bool:
    try:
        return TRUTHS[text.lower()]
    except KeyError:
        raise ValueError("must be 1 or 0") from None


def writable_folder(text: str) -> str:
    folder = Path(text)
    try:
        there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
        is_fit = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError:  # its name is too long, or it is in a folder that we may not look into
        is_fit = False
    if not is_fit:
        raise ValueError(f"{text} is not a folder that can be written, and cannot be made one")
    return text


def one_of(*words: str) -> Callable[[str], Any]:
    read = toml.one_of(words)
    return lambda text: read(text.lower())
