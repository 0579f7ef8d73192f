"""What comes with a request, read and bounded: its body, its parameters, its wishes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.types import Receive

from receiver.errors import Problem

_LONGEST_WAIT: Final = 60.0
_MOST_LISTED: Final = 100
_LONGEST_NUMBER: Final = 18
"""Digits; more would be more than any number of ours, or of the database's."""


class Disconnected(Exception):
    """The sender went away in the middle of its request."""


class TooLarge(Exception):
    """More bytes came than we take."""


async def read_body(receive: Receive, most: int, *, keep: bool = True) -> bytes:
    """Read a request's body, counting while it streams; raise TooLarge at the first byte over.

    Without `keep` it is only counted: a stranger's bytes need no memory.
    """
    chunks: list[bytes] = []
    size = 0
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


def query(request: Request, *names: str, prefix: str | None = None) -> dict[str, str | None]:
    """Read the parameters of these names, and those whose names begin with `prefix`.

    One that is empty is as good as not given.
    """
    given = request.query_params
    more = [name for name in given if prefix and name.startswith(prefix)]
    unknown = sorted(set(given) - {*names, *more})
    if unknown:
        raise Problem(422, "invalid-request", f"unknown parameter {', '.join(unknown)}")
    return {name: given.get(name) or None for name in (*names, *more)}


def number(name: str, text: str | None, default: int, most: int) -> int:
    """Read a parameter as a whole number from 1 to `most`."""
    if text is None:
        return default
    if not _is_number(text) or not 1 <= int(text) <= most:
        raise Problem(422, "invalid-request", f"{name} must be 1 to {most}")
    return int(text)


def place(name: str, text: str | None) -> int | None:
    """Read a place in a sequence, as it was given out before."""
    if text is not None and not _is_number(text):
        raise Problem(422, "invalid-request", f"{name} must be one that was given here")
    return None if text is None else int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _LONGEST_NUMBER


def page_size(text: str | None) -> int:
    """Read how many items of a list are wanted."""
    return number("limit", text, 50, _MOST_LISTED)


def one_of(name: str, text: str | None, words: Collection[str]) -> str | None:
    """Read a parameter that is one of a few words, or not given."""
    if text is not None and text not in words:
        raise Problem(422, "invalid-request", f"{name} must be one of {', '.join(words)}")
    return text
