"""The HTTP client of one provider: under its rate limits, with bounded responses."""

from __future__ import annotations

import asyncio
from typing import Final

import httpx

from receiver.model.errors import Unreadable
from receiver.observability.runtime import Runtime
from receiver.providers.adapter import ProviderResponse
from receiver.providers.parsing import retry_after, unexpected
from receiver.providers.transport import BROKEN, read_capped
from receiver.store.limits import LimitStore, RequestPermit

AT_ONCE: Final = 64
"""The most submits under way at once to one provider."""
ANSWER_TIMEOUT: Final = 60.0
"""Seconds for a whole answer; past it a submit is ambiguous."""
_LARGEST_ANSWER: Final = 32 * 1024 * 1024
_DEFAULT_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 86400.0
"""Seconds that one answer can stop all requests to a provider for."""


class Busy(Unreadable):
    """The provider takes no more requests for `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no more requests for {seconds:.1f} s", seconds)
        self.seconds = seconds


class ProviderClient:
    """Sends an adapter's requests under the provider's limits, and reads the answers whole."""

    def __init__(
        self,
        provider: str,
        per_minute: int | None,
        client: httpx.AsyncClient,
        limits: LimitStore,
        runtime: Runtime,
    ) -> None:
        self._provider = provider
        self._per_minute = per_minute
        self._client = client
        self._limits = limits
        self._clock = runtime.clock
        self._monotonic = runtime.monotonic
        self._paused_until = 0.0

    async def send(self, request: httpx.Request, seconds: float) -> ProviderResponse:
        """Send without following redirects: they would carry the key elsewhere, or bill twice."""
        timeout = httpx.Timeout(10.0, read=seconds).as_dict()
        request.extensions = {**request.extensions, "timeout": timeout}
        async with asyncio.timeout(seconds):
            response = await self._client.send(request, follow_redirects=False, stream=True)
            body = await read_capped(response, _LARGEST_ANSWER)
        return ProviderResponse(response.status_code, response.headers, body, self._clock())

    async def ask(self, request: httpx.Request, *, is_counted: bool = False) -> ProviderResponse:
        """Send a request that can be repeated; raise Unreadable if there is no usable answer.

        Raises Busy, and sends nothing, if the provider takes no request now. One that `is_counted`
        needs no permit of its own.
        """
        await self._take_permit(is_counted=is_counted)
        try:
            answer = await self.send(request, ANSWER_TIMEOUT)
        except BROKEN as error:
            raise Unreadable(f"{type(error).__name__}: {error}") from error
        if answer.status == httpx.codes.TOO_MANY_REQUESTS:
            self.pause(retry_after(answer))
            raise unexpected(answer)
        return answer

    def pause(self, seconds: float | None) -> None:
        """Send nothing for `seconds`, a second at least and a day at most, as after a 429."""
        seconds = min(max(seconds or 0.0, _DEFAULT_PAUSE), LONGEST_PAUSE)
        self._paused_until = max(self._paused_until, self._monotonic() + seconds)

    def paused(self) -> float:
        """Return for how many seconds nothing may be sent."""
        return max(self._paused_until - self._monotonic(), 0.0)

    async def _take_permit(self, *, is_counted: bool) -> None:
        wait = self.paused()
        if wait == 0.0 and self._per_minute is not None and not is_counted:
            permit = RequestPermit(
                provider=self._provider, now=self._clock(), per_minute=self._per_minute
            )
            wait = await self._limits.take(permit)
        if wait > 0.0:
            raise Busy(wait)
