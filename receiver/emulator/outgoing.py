"""What the emulator sends to the receiver: one HTTP client, and the tasks that go on beside."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Coroutine
from functools import cached_property
from typing import Any, Final

import httpx

AT_ONCE: Final = 256
"""Connections at once, at the most."""
_LONGEST: Final = 300.0
"""Seconds for an answer, unless a request says another time."""
_IDLE: Final = 2.0
"""Seconds a connection may lie idle; servers close theirs after five or so."""


class Outgoing:
    """A client for the receiver, and tasks that end with the emulator."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()

    @cached_property
    def client(self) -> httpx.AsyncClient:
        """Made for the first request: it takes long, and some emulators send none."""
        limits = httpx.Limits(max_connections=AT_ONCE, keepalive_expiry=_IDLE)
        # It obeys SSL_CERT_FILE, but no proxy: what it calls is on this machine.
        return httpx.AsyncClient(
            verify=ssl.create_default_context(), timeout=_LONGEST, limits=limits, trust_env=False
        )

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside what is being answered."""
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
