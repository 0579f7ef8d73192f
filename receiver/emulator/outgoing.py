"""The emulator's HTTP client for the receiver, and its background tasks."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Coroutine
from functools import cached_property
from typing import Any, Final

import httpx

AT_ONCE: Final = 256
"""Maximum of concurrent connections."""
_LONGEST: Final = 300.0
"""Seconds to wait for an answer, unless a request sets another timeout."""
_IDLE: Final = 2.0
"""Seconds a connection may be idle; servers close theirs after about five."""


class Outgoing:
    """A client for the receiver, and tasks that end with the emulator."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()

    @cached_property
    def client(self) -> httpx.AsyncClient:
        """The client, created at first use: this is slow, and some emulators send no request."""
        limits = httpx.Limits(max_connections=AT_ONCE, keepalive_expiry=_IDLE)
        # It uses SSL_CERT_FILE, but no proxy: the receiver is on this machine.
        return httpx.AsyncClient(
            verify=ssl.create_default_context(), timeout=_LONGEST, limits=limits, trust_env=False
        )

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the background."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def close(self) -> None:
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if "client" in vars(self):
            await self.client.aclose()
