"""Circuit breakers: handlers whose deliveries wait, paused or after a run of failures.

They are in the database, and so the same for all processes.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from receiver.store.engine import Engine
from receiver.store.statement import Row, Run, Statement, Statements, run_each

sql: Final = Statements("breakers")


class BreakerState(msgspec.Struct, frozen=True):
    """Why the deliveries of a handler wait, and until when."""

    name: str
    paused_at: float | None = None
    failures: int = 0
    """How often it has tripped in a row, failed probes included."""
    open_until: float | None = None
    """After that one delivery is tried (a probe); None: it is closed."""
    probe_until: float | None = None
    """When the probe is over, if its process dies during it."""
    reason: str = ""
    """Of the last failure, where it is open."""

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


class Breakers:
    """Reads and sets the breakers of all handlers."""

    def __init__(self, store: Engine) -> None:
        self._store = store

    async def all(self) -> dict[str, BreakerState]:
        """Return the breakers by handler; a handler that has none is running."""
        rows = await self._store.read(sql.select_breakers)
        return {row["name"]: BreakerState(**row) for row in rows}

    async def pause(self, name: str, now: float) -> None:
        await self._change(sql.pause, name=name, now=now)

    async def resume(self, name: str) -> None:
        """Let a handler's deliveries run again, paused or not."""
        await self._change(sql.resume, name=name)

    async def trip(self, name: str, now: float, until: float, reason: str) -> bool:
        """Make deliveries wait; False if another process just did."""
        return bool(await self._change(sql.trip, name=name, now=now, until=until, reason=reason))

    async def probe(self, name: str, now: float, until: float) -> bool:
        """Ask to try one delivery of an open breaker; only one process may at a time."""
        return bool(await self._change(sql.probe, name=name, now=now, until=until))

    async def end_probe(self, name: str) -> None:
        """End a probe that found nothing to try."""
        await self._change(sql.end_probe, name=name)

    async def reset(self, name: str) -> bool:
        """Let deliveries run again after a success; False if they were not waiting."""
        return bool(await self._change(sql.reset, name=name))

    async def try_again(self, now: float) -> None:
        """Let every open breaker try one delivery now."""
        await self._change(sql.try_again, now=now)

    async def _change(self, statement: Statement, **params: Any) -> list[Row]:
        return await self._store.write(run_each, Run(statement, params))
