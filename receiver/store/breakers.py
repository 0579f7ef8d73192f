"""Circuit breakers: they hold back a handler's deliveries, paused or after a run of failures.

They are in the database, and so the same for all processes.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from receiver.store.engine import Repository
from receiver.store.statement import Statements

sql: Final = Statements("breakers")


class BreakerState(msgspec.Struct, frozen=True):
    """Why the deliveries of a handler wait, and until when."""

    name: str
    paused_at: float | None = None
    failures: int = 0
    """How many times it has tripped in a row, failed probes included."""
    open_until: float | None = None
    """The time after which one delivery is tried (a probe); None: the breaker is closed."""
    probe_until: float | None = None
    """When the probe ends if its process dies during it."""
    reason: str = ""
    """The reason of the last failure, if the breaker is open."""

    @property
    def held(self) -> Literal["paused", "open"] | None:
        if self.paused_at is not None:
            return "paused"
        return None if self.open_until is None else "open"

    def state(self, now: float) -> Literal["paused", "open", "probing", "running"]:
        if self.paused_at is not None:
            return "paused"
        if self.open_until is None:
            return "running"
        return "open" if now < self.open_until else "probing"


class Breakers(Repository):
    """The breakers of all handlers of one store."""

    async def all(self) -> dict[str, BreakerState]:
        """Return the breakers by handler; a handler without one is running."""
        rows = await self._store.read(sql.select_breakers)
        return {row["name"]: BreakerState(**row) for row in rows}

    async def pause(self, name: str, now: float) -> None:
        await self._store.run(sql.pause, name=name, now=now)

    async def resume(self, name: str) -> None:
        """Let a handler's deliveries run again, paused or not."""
        await self._store.run(sql.resume, name=name)

    async def trip(self, name: str, now: float, until: float, reason: str) -> bool:
        """Open a handler's breaker; False if another process has just opened it."""
        opened = await self._store.run(sql.trip, name=name, now=now, until=until, reason=reason)
        return bool(opened)

    async def probe(self, name: str, now: float, until: float) -> bool:
        """Start a probe of an open breaker; False: too early, or another process probes it."""
        return bool(await self._store.run(sql.probe, name=name, now=now, until=until))

    async def end_probe(self, name: str, until: float) -> None:
        """End a probe without a result; `until` is when it would have ended at the latest."""
        await self._store.run(sql.end_probe, name=name, until=until)

    async def reset(self, name: str) -> bool:
        """Let deliveries run again after a success; False if they were not waiting."""
        return bool(await self._store.run(sql.reset, name=name))

    async def try_again(self, now: float) -> None:
        """Let every open breaker try one delivery now."""
        await self._store.run(sql.try_again, now=now)
