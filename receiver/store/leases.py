"""Leader election by leases: one process does a task for all, and another takes over in time.

The holder renews its lease every few seconds. A process that dies, freezes or loses the database
does not, and another process takes the lease; the old holder stops as soon as it finds that out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from math import inf
from typing import Final, Protocol

import msgspec
import structlog

from receiver.model.errors import StoreUnavailable
from receiver.model.ids import new_id
from receiver.model.tasks import Wakeups
from receiver.store.engine import Repository
from receiver.store.statement import Statements

log = structlog.get_logger("receiver")

LEASE: Final = 6.0
"""Seconds after which a lease that was not renewed passes to another process."""
BEAT: Final = 2.0
"""Seconds between two renewals."""
_ANSWER: Final = 2.0
"""Seconds for which a leader waits for an answer of the store."""
_PATIENCE: Final = 5.0
"""Seconds for which `ready` waits for a process that is at work."""
_PAUSE: Final = 0.25
"""Seconds between two checks for such a process."""
_RESIGNED: Final = 30.0
"""Seconds after a failed wait in which other callers do not wait."""


sql: Final = Statements("leases")


class LeaseRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to become or stay the leader for a task."""

    name: str
    owner: str
    now: float
    until: float
    at_work: bool = False
    """Whether the owner is able to do its task."""


class LeaseStore(Repository):
    """The leases of one store: each has one owner, until it is not renewed in time."""

    async def hold(self, request: LeaseRequest) -> bool:
        """Take a lease, or renew it; False while another process has it."""
        return bool(await self._store.run(sql.hold, **msgspec.structs.asdict(request)))

    async def take_turn(self, name: str, now: float, seconds: float) -> bool:
        """Take a lease that is not renewed; False if anyone took it less than `seconds` ago."""
        owner = new_id("turn", now)
        return await self.hold(LeaseRequest(name=name, owner=owner, now=now, until=now + seconds))

    async def release(self, name: str, owner: str) -> None:
        await self._store.run(sql.release, name=name, owner=owner)

    async def is_at_work(self, name: str, now: float) -> bool:
        """Return whether some process holds a lease and is able to do its task."""
        rows = await self._store.read(sql.select_lease, name=name, now=now)
        return bool(rows and rows[0]["at_work"])


class LeaderTask(Protocol):
    """A task that runs until it is cancelled, and at times cannot do its work.

    It wakes ("role", its name) when it becomes able to do its work, or unable.
    """

    @property
    def name(self) -> str: ...
    @property
    def at_work(self) -> bool: ...
    async def run(self) -> None: ...


class Leader:
    """Runs `work` in this process while it holds the lease of that name."""

    def __init__(
        self,
        owner: str,
        work: LeaderTask,
        leases: LeaseStore,
        wakeups: Wakeups,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._name = work.name
        self._owner = owner
        self._work = work
        self._leases = leases
        self._wakeups = wakeups
        self._clock = clock
        self._monotonic = monotonic
        self._hopeless_until = 0.0

    async def run(self) -> None:
        with self._wakeups.listen("role", self._name) as news:
            await self._run(news)

    async def _run(self, news: asyncio.Event) -> None:
        task: asyncio.Task[None] | None = None
        held_until = 0.0
        try:
            while True:
                news.clear()
                began = self._monotonic()
                if task is not None and began >= held_until:
                    await _end(task)
                    task = None
                left = inf if task is None else held_until - began
                try:
                    async with asyncio.timeout(min(_ANSWER, left)):
                        held = await self._hold(self._clock())
                except (StoreUnavailable, TimeoutError):
                    pass  # the lease is ours until it expires
                except Exception:
                    log.exception("task.failed", role=self._name)
                else:
                    held_until = began + LEASE if held else 0.0
                    if held and (task is None or task.done()):
                        task = asyncio.create_task(self._work.run())
                left = inf if task is None else max(held_until - self._monotonic(), 0.0)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(BEAT, left)):
                        await news.wait()
        finally:
            if task is not None:
                await _end(task)
                with contextlib.suppress(StoreUnavailable, TimeoutError):
                    async with asyncio.timeout(_ANSWER):
                        await self._leases.release(self._name, self._owner)

    async def _hold(self, now: float) -> bool:
        return await self._leases.hold(
            LeaseRequest(
                name=self._name,
                owner=self._owner,
                now=now,
                until=now + LEASE,
                at_work=self._work.at_work,
            )
        )

    async def ready(self) -> bool:
        """Wait a moment for a process that is able to do the task; return whether there is one."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _PATIENCE
        with contextlib.suppress(StoreUnavailable):
            while not await self.any_at_work():
                if loop.time() >= max(until, self._hopeless_until):
                    self._hopeless_until = loop.time() + _RESIGNED
                if loop.time() < self._hopeless_until:
                    return False
                await asyncio.sleep(_PAUSE)
            self._hopeless_until = 0.0
            return True
        return False

    async def any_at_work(self) -> bool:
        """Return whether any process is at work. Raises StoreUnavailable."""
        return self._work.at_work or await self._leases.is_at_work(self._name, self._clock())


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
