"""Stand-ins for the network: what answers `ctx.http`, and what `ctx.fetch` finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import httpx

Answer: TypeAlias = Callable[[httpx.Request], httpx.Response]


def answers(http: Answer | None) -> httpx.AsyncBaseTransport:
    """Answer as a function says; without one, every request fails to connect."""
    return httpx.MockTransport(http or _nobody)


def finds(files: Mapping[str, bytes]) -> httpx.AsyncBaseTransport:
    """Find these contents by their URLs, and nothing else."""

    def find(request: httpx.Request) -> httpx.Response:
        content = files.get(str(request.url))
        return httpx.Response(404) if content is None else httpx.Response(200, content=content)

    return httpx.MockTransport(find)


def _nobody(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError(f"this test gave no answer for {request.url}", request=request)
