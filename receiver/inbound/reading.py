"""What comes with a request, read and bounded: its body, its parameters, its wishes."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.types import Receive

from receiver.errors import Problem

_LONGEST_WAIT: Final = 60.0
_MOST_LISTED: Final = 100
_LONGEST_NUMBER: Final = 9


class Disconnected(Exception):
    """The sender went away in the middle of its request."""


class TooLarge(Exception):
    """More bytes came than we take."""


class TooSlow(Exception):
    """Fewer bytes came than a body must bring in its time."""


_GRACE: Final = 10.0
_PACE: Final = 1024
"""A body may take 10 seconds, and one more for each KiB that has come, …"""
SLOWEST: Final = 60.0
"""… and so many at the most; a provider's own patience is shorter."""


async def read_body(receive: Receive, most: int, *, keep: bool = True) -> bytes:
    """Read a request's body, counting while it streams; raise TooLarge at the first byte over.

    Raises TooSlow for a body that trickles, and Disconnected. Without `keep` it is only counted: a
    stranger's bytes need no memory.
    """
    chunks: list[bytes] = []
    size = 0
    begun = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(begun + _GRACE) as patience:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > most:
                    raise TooLarge
                if keep or not chunks:
                    chunks.append(chunk)
                if not message.get("more_body", False):
                    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
                patience.reschedule(begun + min(_GRACE + size / _PACE, SLOWEST))
    except TimeoutError:
        raise TooSlow from None


def depth_of(value: Any) -> int:
    """Measure how deep a JSON value nests, without recursion."""
    deepest = 0
    left = [(value, 1)]
    while left:
        item, depth = left.pop()
        deepest = max(deepest, depth)
        if isinstance(item, dict):
            left.extend((inner, depth + 1) for inner in item.values())
        elif isinstance(item, list):
            left.extend((inner, depth + 1) for inner in item)
    return deepest


def prefer_wait(headers: Mapping[str, str]) -> float | None:
    """Read `Prefer: wait=N` (RFC 7240) in seconds; what we do not understand is ignored."""
    for preference in headers.get("prefer", "").lower().split(","):
        name, _, value = preference.partition(";")[0].strip().partition("=")
        if name.strip() == "wait":
            digits = value.strip().strip('"') or "60"
            if digits.isdecimal() and digits.isascii():
                return min(max(float(digits), 1.0), _LONGEST_WAIT)
    return None


def query(request: Request, *names: str) -> dict[str, str | None]:
    unknown = sorted(set(request.query_params) - set(names))
    if unknown:
        raise Problem(422, "invalid-request", f"unknown parameter {', '.join(unknown)}")
    return {name: request.query_params.get(name) or None for name in names}


def number(name: str, text: str | None, default: int, most: int) -> int:
    """Read a parameter as a whole number from 1 to `most`."""
    if text is None:
        return default
    digits = text.isascii() and text.isdecimal() and len(text) <= _LONGEST_NUMBER
    if not digits or not 1 <= int(text) <= most:
        raise Problem(422, "invalid-request", f"{name} must be 1 to {most}")
    return int(text)


def page_size(text: str | None) -> int:
    """Read how many items of a list are wanted."""
    return number("limit", text, 50, _MOST_LISTED)


def one_of(name: str, text: str | None, words: Collection[str]) -> str | None:
    """Read a parameter that is one of a few words, or not given."""
    if text is not None and text not in words:
        raise Problem(422, "invalid-request", f"{name} must be one of {', '.join(words)}")
    return text
