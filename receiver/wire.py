"""The wire to one provider: requests go out under its pace, answers come back whole."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

import httpx

from receiver.errors import Unreadable
from receiver.inflate import read_capped
from receiver.providers.base import Answer, retry_after
from receiver.settings import ProviderSettings

WINDOW: Final = 60.0
AT_ONCE: Final = 64
"""Requests in flight to a provider that sets no limit."""
ANSWER_TIMEOUT: Final = 60.0
"""Seconds for a whole answer; past it a submit is ambiguous."""
_LARGEST_ANSWER: Final = 32 * 1024 * 1024
_DEFAULT_PAUSE: Final = 1.0
_MOMENT: Final = 0.05
"""Seconds a reservation lasts, more or less."""


BROKEN: Final = (httpx.HTTPError, httpx.InvalidURL, UnicodeError, TimeoutError)
"""What a request can end in; httpx reads the target of a redirect even if it is not followed."""


class Pace:
    """At most so many requests in any minute; the window slides."""

    def __init__(self, per_minute: int | None) -> None:
        self._per_minute = per_minute
        self._times: deque[float] = deque()
        self._reserved = 0

    def seed(self, times: list[float]) -> None:
        """Remember requests of an earlier process, so that a restart is no way around the limit."""
        self._times.extend(times)

    def room(self, now: float) -> int:
        """Say how many requests may be sent now."""
        if self._per_minute is None:
            return AT_ONCE
        while self._times and self._times[0] <= now - WINDOW:
            self._times.popleft()
        return self._per_minute - len(self._times) - self._reserved

    def spend(self, now: float, requests: int = 1) -> None:
        if self._per_minute is not None:
            self._times.extend([now] * requests)

    def reserve(self, requests: int) -> None:
        """Keep room for requests while it is found out how many there will be."""
        self._reserved += requests

    def settle(self, reserved: int, now: float, requests: int) -> None:
        """Give a reservation back, and spend what is sent of it."""
        self._reserved -= reserved
        self.spend(now, requests)

    def wait(self, now: float) -> float:
        """Say how many seconds until there is room again."""
        if self.room(now) > 0:
            return 0.0
        if self._per_minute is None or len(self._times) < self._per_minute:
            return _MOMENT
        return self._times[0] + WINDOW - now


class Wire:
    """Sends an adapter's requests under the provider's pace, and reads the answers whole."""

    def __init__(
        self, client: httpx.AsyncClient, limits: ProviderSettings, clock: Callable[[], float]
    ) -> None:
        self._client = client
        self._clock = clock
        self.pace = Pace(limits.requests_per_minute)
        self.paused_until = 0.0
        """Until then the provider wants no requests (its 429)."""

    async def send(self, request: httpx.Request, seconds: float) -> Answer:
        """Send without following redirects: they would carry the key elsewhere, or bill twice."""
        timeout = httpx.Timeout(10.0, read=seconds).as_dict()
        request.extensions = {**request.extensions, "timeout": timeout}
        async with asyncio.timeout(seconds):
            response = await self._client.send(request, follow_redirects=False, stream=True)
            body = await read_capped(response, _LARGEST_ANSWER)
        return Answer(response.status_code, response.headers, body, self._clock())

    async def ask(self, request: httpx.Request) -> Answer:
        """Send a request that can be repeated; raise Unreadable if that gave no answer to read."""
        now = self._clock()
        self.pace.spend(now)
        try:
            answer = await self.send(request, ANSWER_TIMEOUT)
        except BROKEN as error:
            raise Unreadable(f"{type(error).__name__}: {error}") from error
        if answer.status == httpx.codes.TOO_MANY_REQUESTS:
            self.pause(retry_after(answer))
            raise Unreadable("HTTP 429")
        return answer

    def pause(self, seconds: float | None) -> None:
        """Send nothing for so long, and for a moment at least."""
        seconds = max(seconds or 0.0, _DEFAULT_PAUSE)
        self.paused_until = max(self.paused_until, self._clock() + seconds)

    def wait(self) -> float:
        """Say how many seconds until a request may be sent."""
        now = self._clock()
        return max(self.paused_until - now, self.pace.wait(now), 0.0)
