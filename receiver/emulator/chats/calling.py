"""HTTP client of the emulated chat platforms: calls the app, and keeps each exchange."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import httpx

IDLE = 2.0
"""Seconds a connection may lie idle."""


@dataclass(slots=True)
class Exchange:
    """One request to the app, and what came of it."""

    kind: str
    url: str
    headers: Mapping[str, str]
    body: bytes
    status: int = 0
    """0: there was no answer."""
    answer: bytes = b""
    answer_type: str = ""
    error: str = ""
    """Why there was none."""

    @property
    def is_ok(self) -> bool:
        return 200 <= self.status < 300  # noqa: PLR2004 - the 2xx

    def row(self) -> dict[str, object]:
        return {"kind": self.kind, "url": self.url, "status": self.status, "error": self.error}


@dataclass
class Caller:
    """Sends requests, over sockets or through the client it is given, and keeps the exchanges."""

    given: httpx.AsyncClient | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    _tasks: set[asyncio.Task[object]] = field(default_factory=set)

    @cached_property
    def _client(self) -> httpx.AsyncClient:
        # No proxy: what it calls is on this machine.
        limits = httpx.Limits(keepalive_expiry=IDLE)
        context = ssl.create_default_context()
        return httpx.AsyncClient(verify=context, trust_env=False, limits=limits)

    async def call(
        self, kind: str, url: str, headers: Mapping[str, str], body: bytes, within: float
    ) -> Exchange:
        """Send a request once, and wait so many seconds for its whole answer."""
        exchange = Exchange(kind, url, headers, body)
        self.exchanges.append(exchange)
        client = self.given or self._client
        try:
            async with asyncio.timeout(within):
                answer = await client.post(url, content=body, headers=headers, timeout=within)
        except (TimeoutError, httpx.TimeoutException):
            exchange.error = "timeout"
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            exchange.error = f"{type(error).__name__}: {error}"
        else:
            exchange.status, exchange.answer = answer.status_code, answer.content
            exchange.answer_type = answer.headers.get("content-type", "").partition(";")[0]
        return exchange

    def start(self, work: Callable[[], object]) -> None:
        """Do something beside what is being answered; it is cancelled when the emulator stops."""
        task = asyncio.ensure_future(work())  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if "_client" in vars(self):
            await self._client.aclose()
