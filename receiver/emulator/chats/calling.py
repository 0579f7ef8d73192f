"""The calls of the emulated chat platforms to the app."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

from receiver.emulator.outgoing import Outgoing


@dataclass(slots=True)
class Exchange:
    """One request to the app, and its answer or error."""

    kind: str
    url: str
    headers: Mapping[str, str]
    body: bytes
    status: int = 0
    """0: there was no answer."""
    answer: bytes = b""
    answer_type: str = ""
    error: str = ""
    """Why there was no answer."""

    @property
    def is_ok(self) -> bool:
        return 200 <= self.status < 300  # noqa: PLR2004 - the 2xx

    def row(self) -> dict[str, object]:
        return {"kind": self.kind, "url": self.url, "status": self.status, "error": self.error}


class Caller(Outgoing):
    """A client of the app, over sockets or through the client in `given`."""

    given: httpx.AsyncClient | None = None

    async def call(
        self, kind: str, url: str, headers: Mapping[str, str], body: bytes, within: float
    ) -> Exchange:
        """Send a request once, and wait `within` seconds at most for its whole answer."""
        exchange = Exchange(kind, url, headers, body)
        client = self.given or self.client
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
