"""A load generator: prepared requests over keep-alive connections, each answer timed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

CONNECTIONS = 64
_LONGEST = 60.0


@dataclass
class Report:
    """The result of a run of requests; latencies are in seconds."""

    seconds: float
    latencies: list[float] = field(repr=False)
    statuses: Counter[int]
    cpu: float = 0.0
    """CPU seconds of the server per request."""

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


class _Connection(asyncio.Protocol):
    """A connection that sends the next request after the last answer, without pipelining."""

    def __init__(self, requests: Iterator[bytes], report: Report, done: asyncio.Future[None]):
        self._requests = requests
        self._report = report
        self._done = done
        self._sent = 0.0
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it
        self._next()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, body = self._buffer.partition(b"\r\n\r\n")
        if not blank or len(body) < _length(head):
            return
        self._buffer = b""
        self._report.latencies.append(time.perf_counter() - self._sent)
        self._report.statuses[int(head[9:12])] += 1
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(exc or ConnectionResetError("the server hung up"))

    def _next(self) -> None:
        assert self._transport is not None
        request = next(self._requests, None)
        if request is None:
            if not self._done.done():
                self._done.set_result(None)
            self._transport.close()
            return
        self._sent = time.perf_counter()
        self._transport.write(request)


def _length(head: bytes) -> int:
    _, _, rest = head.lower().partition(b"content-length: ")
    return int(rest.partition(b"\r\n")[0] or 0)


async def hammer(port: int, requests: Sequence[bytes], connections: int = CONNECTIONS) -> Report:
    """Send every request once, as fast as the answers come."""
    report = Report(0.0, [], Counter())
    feed = iter(requests)
    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in range(connections)]
    began = time.perf_counter()
    for future in futures:
        await loop.create_connection(
            lambda f=future: _Connection(feed, report, f),  # type: ignore[misc]
            "127.0.0.1",
            port,
        )
    async with asyncio.timeout(_LONGEST):
        await asyncio.gather(*futures)
    report.seconds = time.perf_counter() - began
    return report


async def drip(port: int, requests: Sequence[bytes], per_second: float) -> Report:
    """Send requests at a steady rate, independent of the answers."""
    report = Report(0.0, [], Counter())
    lanes = 32
    began = time.perf_counter()

    async def lane(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for index in range(number, len(requests), lanes):
            await asyncio.sleep(began + index / per_second - time.perf_counter())
            sent = time.perf_counter()
            writer.write(requests[index])
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(_length(head))
            report.latencies.append(time.perf_counter() - sent)
            report.statuses[int(head[9:12])] += 1
        writer.close()
        await writer.wait_closed()

    async with asyncio.TaskGroup() as group:
        for number in range(lanes):
            group.create_task(lane(number))
    report.seconds = time.perf_counter() - began
    return report


def post(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Return the bytes of one request."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
