"""Inline dispatch: an event's handlers run in the request of its callback, or right after it.

It is for platforms that may freeze a process as soon as it has answered (RECEIVER_AFTER). The
outcome is committed before; deliveries that do not run here are run by the next drain.
"""

from __future__ import annotations

import asyncio
from typing import Final
from urllib.parse import urlsplit

import httpx
import structlog

from receiver.http.parts import Parts
from receiver.model.errors import StoreUnavailable
from receiver.model.tasks import TaskSet
from receiver.settings import After
from receiver.store.inbox import AcceptResult

log = structlog.get_logger("receiver")

_SEND_TIMEOUT: Final = 0.2
"""Seconds in which a request to ourselves must be sent; a later answer is not waited for."""
_REST: Final = 1
"""Seconds between two such requests of one process; the drain looks again after them."""


class AfterCallback:
    """The work for a recorded event, before and after the answer to its callback."""

    def __init__(self, after: After, parts: Parts) -> None:
        self._after = after
        self._deliveries = parts.deliveries
        base, token = parts.settings.public_url, parts.predictions.tokens.wake()
        self._place = urlsplit(base or "").netloc
        self._wake_url = f"{base}/wake/{token}?again={_REST}"
        self._monotonic = parts.runtime.monotonic
        self._next_wake = 0.0
        self._running = TaskSet()

    def release(self) -> None:
        """Let all requests end, as we are about to stop; running attempts still have some time."""
        for task in self._running:
            task.cancel()

    async def before_answer(self, taken: AcceptResult) -> None:
        if taken.event_id is None or not taken.handlers:
            return
        match self._after.how:
            case "inline":
                await self._run(taken.event_id, taken.handlers)
            case "wake":
                await self._wake()

    async def after_answer(self, taken: AcceptResult) -> None:
        if taken.event_id is not None and self._after.how == "after":
            await self._run(taken.event_id, taken.handlers)

    async def _run(self, event_id: str, handlers: tuple[str, ...]) -> None:
        """Run handlers in a separate task: a server may cancel a request whose sender is gone."""
        await asyncio.wait({self._running.start(self._run_now(event_id, handlers))})

    async def _run_now(self, event_id: str, handlers: tuple[str, ...]) -> None:
        try:
            await self._deliveries.worker.run_now(event_id, handlers, self._after.seconds)
        except StoreUnavailable:  # logged already; the next drain runs them
            pass
        except Exception:
            log.exception("task.failed", event_id=event_id)

    async def _wake(self) -> None:
        """Send a drain request to our own URL, which another process answers."""
        now = self._monotonic()
        if now < self._next_wake:
            return
        self._next_wake = now + _REST
        try:
            status = await self._deliveries.send(self._wake_url, _SEND_TIMEOUT)
        except (httpx.HTTPError, TimeoutError) as error:
            log.warning("wake.failed", reason=f"{type(error).__name__}: {error}")
        else:
            if status is not None and status != httpx.codes.OK:
                log.warning("wake.failed", reason=f"{self._place} answered {status}")
