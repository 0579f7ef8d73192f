"""What one process does for all: whoever holds the role does it, and another takes over in time.

The holder renews its role every few seconds. One that dies, freezes or is cut off does not, and so
loses it; when it comes back it finds that out, and stops.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final, Protocol

import structlog

from receiver.model.errors import StoreUnavailable
from receiver.store.values import LeaseRequest

log = structlog.get_logger("receiver")

LEASE: Final = 6.0
"""Seconds after which a role that was not renewed passes to another process."""
BEAT: Final = 2.0
_PATIENCE: Final = 5.0
"""Seconds for which it is worth waiting that somebody is at work."""
_RESIGNED: Final = 30.0
"""Seconds after waiting in vain in which nobody waits again."""


class Roles(Protocol):
    """What a duty needs of the store."""

    async def hold_role(self, role: LeaseRequest) -> bool: ...
    async def report_role(self, name: str, owner: str, *, at_work: bool) -> None: ...
    async def leave_role(self, name: str, owner: str) -> None: ...
    async def role_at_work(self, name: str, now: float) -> bool: ...


class LeaderTask(Protocol):
    """Something that runs until it is cancelled, and is at times unable to do its work."""

    on_change: Callable[[], None]

    @property
    def at_work(self) -> bool: ...
    async def run(self) -> None: ...


class Leader:
    """Does `work` in this process while it has the role of that name."""

    def __init__(
        self, name: str, owner: str, work: LeaderTask, roles: Roles, clock: Callable[[], float]
    ) -> None:
        self._name = name
        self._owner = owner
        self._work = work
        self._roles = roles
        self._clock = clock
        self._news = asyncio.Event()
        self._hopeless_until = 0.0
        work.on_change = self._news.set

    async def run(self) -> None:
        task: asyncio.Task[None] | None = None
        held_until = 0.0
        try:
            while True:
                self._news.clear()
                now = self._clock()
                try:
                    async with asyncio.timeout(BEAT):
                        held = await self._hold(now)
                except (StoreUnavailable, TimeoutError):
                    pass  # it is ours until then, whatever the database does
                except Exception:
                    log.exception("task.failed", role=self._name)
                else:
                    held_until = now + LEASE if held else 0.0
                    if held and (task is None or task.done()):
                        task = asyncio.create_task(self._work.run())
                if task is not None and self._clock() >= held_until:
                    await _end(task)
                    task = None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(BEAT):
                        await self._news.wait()
        finally:
            if task is not None:
                await _end(task)
                with contextlib.suppress(StoreUnavailable, TimeoutError):
                    async with asyncio.timeout(BEAT):
                        await self._roles.leave_role(self._name, self._owner)

    async def _hold(self, now: float) -> bool:
        role = LeaseRequest(name=self._name, owner=self._owner, now=now, until=now + LEASE)
        if not await self._roles.hold_role(role):
            return False
        await self._roles.report_role(self._name, self._owner, at_work=self._work.at_work)
        return True

    async def ready(self) -> bool:
        """Wait a moment until some process is able to do it; say whether one is."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _PATIENCE
        with contextlib.suppress(StoreUnavailable):
            while not await self.somebody_is():
                if loop.time() >= max(until, self._hopeless_until):
                    self._hopeless_until = loop.time() + _RESIGNED
                if loop.time() < self._hopeless_until:
                    return False
                await asyncio.sleep(_PATIENCE / 20)
            self._hopeless_until = 0.0
            return True
        return False

    async def somebody_is(self) -> bool:
        """Say whether any process is at work. Raises StoreUnavailable."""
        return self._work.at_work or await self._roles.role_at_work(self._name, self._clock())


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
