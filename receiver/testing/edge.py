"""Replacements of the network: answers for `ctx.http`, and files for `ctx.fetch`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import httpx

Answer: TypeAlias = Callable[[httpx.Request], httpx.Response]


def responding(http: Answer | None) -> httpx.AsyncBaseTransport:
    """Return a transport that answers by a function; without one, no request can connect."""
    return httpx.MockTransport(http or _no_answer)


def serving_files(files: Mapping[str, bytes]) -> httpx.AsyncBaseTransport:
    """Return a transport that serves these contents by URL, and else answers 404."""

    def find(request: httpx.Request) -> httpx.Response:
        content = files.get(str(request.url))
        return httpx.Response(404) if content is None else httpx.Response(200, content=content)

    return httpx.MockTransport(find)


def _no_answer(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError(f"this test gave no answer for {request.url}", request=request)
