"""Gates: handlers whose deliveries wait, by hand or after a run of failures, for all processes."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from receiver.store.engine import Engine
from receiver.store.statement import Row, Run, Statement, Statements, run_each

sql: Final = Statements("handlers")


class BreakerState(msgspec.Struct, frozen=True):
    """Why the deliveries of a handler wait, and until when."""

    name: str
    paused_at: float | None = None
    failures: int = 0
    """How often it was opened or a probe failed, in a row."""
    open_until: float | None = None
    """After that one delivery is tried; None: it was not opened."""
    probe_until: float | None = None
    """When the probe is given up, if its process dies over it."""
    reason: str = ""
    """Of the last failure, where it was opened."""

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
    """Reads and sets the gates of all handlers."""

    def __init__(self, store: Engine) -> None:
        self._store = store

    async def all(self) -> dict[str, BreakerState]:
        """Return the gates that there are, by handler; one that has none is running."""
        return {row[0]: BreakerState(*row) for row in await self._store.read(sql.select_gates)}

    async def pause(self, name: str, now: float) -> None:
        await self._change(sql.pause, name=name, now=now)

    async def resume(self, name: str) -> None:
        """Let a handler's deliveries run again, whatever they waited for."""
        await self._change(sql.resume, name=name)

    async def open(self, name: str, now: float, until: float, reason: str) -> bool:
        """Make deliveries wait; False if somebody else just did."""
        return bool(await self._change(sql.open, name=name, now=now, until=until, reason=reason))

    async def probe(self, name: str, now: float, until: float) -> bool:
        """Ask to try one delivery of an open handler; only one may at a time."""
        return bool(await self._change(sql.probe, name=name, now=now, until=until))

    async def end_probe(self, name: str) -> None:
        """Give back a probe that found nothing to try."""
        await self._change(sql.end_probe, name=name)

    async def close(self, name: str) -> bool:
        """Let deliveries run again after a success; False if they were not waiting."""
        return bool(await self._change(sql.close, name=name))

    async def try_again(self, now: float) -> None:
        """Let every open handler try one delivery now."""
        await self._change(sql.try_again, now=now)

    async def _change(self, statement: Statement, **params: Any) -> list[Row]:
        return await self._store.write(run_each, Run(statement, params))
