"""The clock, fault injection and calls to the app, shared by the three chat platforms."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.emulator.chats.board import Platform
from receiver.emulator.chats.calling import Caller, Exchange
from receiver.emulator.faults import Faults
from receiver.emulator.wire import HangUp

WITHIN: Final = 3.0
"""Seconds in which Slack and Discord require an answer."""


@dataclass
class Scene:
    """The state that the platforms share."""

    receiver: str
    """URL of the app that they call, at `/in/<platform>`."""
    own: str
    """The emulator's own URL, the base of URLs that it sends."""
    wall: Callable[[], float] = time.time
    ahead: float = 0
    """Seconds by which the platforms' clock is ahead."""
    scale: float | None = 1
    """Factor for the waits before a platform's retries; None: no retries."""
    within: float = WITHIN
    """Seconds to wait for the app's answer to Slack or Discord."""
    faults: Faults = field(default_factory=lambda: Faults(random.Random()))  # noqa: S311
    caller: Caller = field(default_factory=Caller)
    _named: int = 0

    def now(self) -> float:
        return self.wall() + self.ahead

    def move(self, seconds: float) -> None:
        """Move the platforms' clock forward, by which tokens expire."""
        self.ahead += seconds

    def number(self) -> int:
        """Return the next number, for a unique id."""
        self._named += 1
        return self._named

    async def call(
        self, kind: str, platform: str, headers: Mapping[str, str], body: bytes
    ) -> Exchange:
        """Send a platform's request to the app, and wait `self.within` seconds for the answer."""
        url = f"{self.receiver}/in/{platform}"
        return await self.caller.call(kind, url, headers, body, self.within)

    def route(
        self,
        platform: Platform,
        path: str,
        work: Callable[[Request], Awaitable[Response]],
        limited: Callable[[int], Response],
        call: str = "",
        methods: Sequence[str] = ("POST",),
    ) -> Route:
        """Return the route of a bot's call, which faults may affect; `limited` writes the 429.

        Without a name of the `call`, it is the `method` in the path.
        """

        async def answer(request: Request) -> Response:
            name = call or request.path_params["method"]
            if rule := self.faults.take("limit_call", platform, name):
                return limited(rule.retry_after or 1)
            if self.faults.take("fail_call", platform, name):
                return Response("<html>Internal Server Error", 500, media_type="text/html")
            if self.faults.take("drop_call", platform, name):
                return HangUp()
            response = await work(request)
            return HangUp() if self.faults.take("lose_answer", platform, name) else response

        return Route(path, answer, methods=list(methods))

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds * (self.scale or 0))
