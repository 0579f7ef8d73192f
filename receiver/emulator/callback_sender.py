"""Send callbacks, and retry them by the schedule of each provider."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httpx

from receiver.emulator.ledger import Attempt, Prediction
from receiver.emulator.options import Schedule
from receiver.emulator.outgoing import AT_ONCE, Outgoing

_LARGE = 10_000
_ERROR_KEPT = 200


class Timers:
    """The clock, and delayed calls, which are dropped when the emulator stops."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self.now = now
        self.closed = False

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(seconds, self._act, act)

    def _act(self, act: Callable[[], None]) -> None:
        if not self.closed:
            act()


@dataclass(slots=True)
class Callback:
    """A callback to be sent, and its attempts so far."""

    prediction: Prediction
    body: bytes
    headers: Callable[[], Mapping[str, str]]
    """Called for each attempt, because a signature contains the time."""
    schedule: Schedule
    tries: int = 0
    waited: float = 0

    def wait_after(self, status_code: int | None) -> float | None:
        """Return the seconds until the next attempt; None if there is none."""
        schedule = self.schedule
        wait = schedule.waits[self.tries - 1] if self.tries <= len(schedule.waits) else None
        lifetime = schedule.lifetime_large if len(self.body) >= _LARGE else schedule.lifetime
        if wait is None or self.waited + wait > lifetime or self._settled(status_code):
            return None
        return wait

    def _settled(self, status_code: int | None) -> bool:
        if status_code is None:
            return False
        redirected = self.schedule.redirect_is_final and httpx.codes.is_redirect(status_code)
        return httpx.codes.is_success(status_code) or redirected


class CallbackSender(Outgoing):
    """The sender of callbacks, with a limit on concurrent attempts."""

    def __init__(self, timers: Timers, time_scale: float) -> None:
        super().__init__()
        self._timers = timers
        self._scale = time_scale
        self._backlog: deque[Callback] = deque()

    def send(self, callback: Callback) -> None:
        self._backlog.append(callback)
        if len(self.tasks) < AT_ONCE:
            self.start(self._work())

    async def _work(self) -> None:
        while self._backlog:
            await self._try(self._backlog.popleft())

    async def _try(self, callback: Callback) -> None:
        callback.tries += 1
        attempt = await self._attempt(callback)
        callback.prediction.record_attempt(attempt)
        wait = callback.wait_after(attempt.status_code)
        if wait is not None:
            callback.waited += wait
            self._timers.after(wait * self._scale, lambda: self.send(callback))

    async def _attempt(self, callback: Callback) -> Attempt:
        at = self._timers.now()
        try:
            answer = await self._post(callback)
        except TimeoutError:
            return Attempt(at, error="timeout")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            return Attempt(at, error=f"{type(error).__name__}: {error}"[:_ERROR_KEPT])
        return Attempt(at, answer.status_code)

    async def _post(self, callback: Callback) -> httpx.Response:
        schedule = callback.schedule
        timeout = schedule.first_timeout if callback.tries == 1 else schedule.later_timeout
        async with asyncio.timeout(timeout):
            url = callback.prediction.callback_url
            return await self.client.post(url, content=callback.body, headers=callback.headers())
