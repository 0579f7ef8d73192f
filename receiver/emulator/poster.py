"""POST over kept connections: just enough HTTP/1.1 to deliver thousands of callbacks a second.

A general HTTP client spends about a millisecond on each request; this one spends a tenth of that.
"""

import asyncio
import re
import ssl
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import SplitResult, quote, urlsplit

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[ \t]*close", re.IGNORECASE)
_BODY_LIMIT = 65_536
_LINE_BREAK = re.compile(r"[\r\n]")

_FRESH = 2.0
"""Seconds a connection may lie idle; servers close theirs after five or so."""
_NO_CONTENT = 204

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the other side said; the text is empty unless its length was declared."""

    status_code: int
    text: str
    keep: bool


class Poster:
    """Sends one body to one URL; never follows a redirect, never tries twice."""

    def __init__(self) -> None:
        self._idle: dict[str, list[tuple[float, Connection]]] = defaultdict(list)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        parts = urlsplit(url)
        reader, writer = connection = await self._connection(parts)
        keep = False
        try:
            writer.write(_head(parts, headers, len(body)) + body)
            answer = await _read(reader)
            keep = answer.keep
            return answer
        finally:
            if keep:
                self._idle[_target(parts)].append((time.monotonic(), connection))
            else:
                writer.close()

    async def close(self) -> None:
        for _, (_, writer) in (one for idle in self._idle.values() for one in idle):
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        self._idle.clear()

    async def _connection(self, parts: SplitResult) -> Connection:
        idle = self._idle[_target(parts)]
        while idle:
            since, (reader, writer) = idle.pop()
            if not reader.at_eof() and time.monotonic() - since < _FRESH:
                return reader, writer
            writer.close()
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        return await asyncio.open_connection(
            parts.hostname, port, ssl=self._tls if secure else None
        )


def _target(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.netloc}"


def _head(parts: SplitResult, headers: Mapping[str, str], length: int) -> bytes:
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = "?" + quote(parts.query, safe="/?%:@!$&'()*+,;=~-._") if parts.query else ""
    lines = [f"POST {path}{query} HTTP/1.1", f"host: {parts.netloc.rpartition('@')[2]}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines.append(f"content-length: {length}")
    if any(_LINE_BREAK.search(line) for line in lines):
        raise ValueError("a header holds a line break")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


async def _read(reader: asyncio.StreamReader) -> Answer:
    head = await reader.readuntil(b"\r\n\r\n")
    length = _LENGTH.search(head)
    size = int(length[1]) if length else 0
    text = await reader.readexactly(min(size, _BODY_LIMIT))
    status_code = int(head[9:12])
    whole = size <= _BODY_LIMIT if length else status_code == _NO_CONTENT
    keep = whole and not _CLOSE.search(head)
    return Answer(status_code, text.decode("utf-8", "replace"), keep)
