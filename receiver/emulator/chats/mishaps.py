"""Fault injection for the chat platforms: the next calls are refused, fail, or are not answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from fnmatch import fnmatchcase
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from receiver.emulator.chats.board import Platform
from receiver.emulator.wire import HangUp


class Mishap(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One fault for the next calls."""

    answer: Literal["limited", "error", "lost", "dropped"]
    """HTTP 429; HTTP 500; the work is done and no answer comes; nothing is done nor answered."""
    platform: Platform | None = None
    method: str = "*"
    """A pattern for the calls that it applies to, like `chat.*`."""
    times: int | None = 1
    """How often it still applies; None: always."""
    retry_after: int = 1
    """Seconds that `limited` asks to wait."""


class Mishaps:
    """The faults in force."""

    def __init__(self) -> None:
        self.in_force: list[Mishap] = []

    def take(self, platform: Platform, method: str) -> Mishap | None:
        """Return the one that applies to this call, having counted it as used."""
        for one in self.in_force:
            applies = one.platform in {None, platform} and fnmatchcase(method, one.method)
            if applies and one.times != 0:
                one.times = None if one.times is None else one.times - 1
                return one
        return None

    async def apply(
        self,
        platform: Platform,
        method: str,
        request: Request,
        work: Callable[[Request], Awaitable[Response]],
        limited: Callable[[int], Response],
    ) -> Response:
        """Answer a call, unless a mishap does; `limited` writes the platform's 429."""
        one = self.take(platform, method)
        if one is None:
            return await work(request)
        if one.answer == "limited":
            return limited(one.retry_after)
        if one.answer == "error":
            return Response("<html>Internal Server Error", 500, media_type="text/html")
        if one.answer == "lost":
            await work(request)
        return HangUp()
