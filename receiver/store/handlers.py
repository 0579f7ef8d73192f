"""Gates: handlers whose deliveries wait, by hand or after a run of failures, for all processes."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from receiver.store.dialect import Query, Row, Run, Tables, run_each

SELECT_GATES: Final = Query(
    "SELECT name, paused_at, failures, open_until, probe_until, reason FROM handlers"
)

PAUSE: Final = Query("""
INSERT INTO handlers (name, paused_at) VALUES (:name, :now)
ON CONFLICT (name) DO UPDATE SET paused_at = coalesce(handlers.paused_at, excluded.paused_at)
""")

RESUME: Final = Query("""
UPDATE handlers
SET paused_at = NULL, failures = 0, open_until = NULL, probe_until = NULL, reason = ''
WHERE name = :name
""")

# Of many that fail at once the first opens it; a failed probe opens it again, for longer.
OPEN: Final = Query("""
INSERT INTO handlers (name, failures, open_until, reason) VALUES (:name, 1, :until, :reason)
ON CONFLICT (name) DO UPDATE
SET failures = handlers.failures + 1, open_until = excluded.open_until, probe_until = NULL,
    reason = excluded.reason
WHERE handlers.open_until IS NULL OR handlers.open_until <= :now
RETURNING failures
""")

PROBE: Final = Query("""
UPDATE handlers SET probe_until = :until
WHERE name = :name AND open_until <= :now AND (probe_until IS NULL OR probe_until <= :now)
RETURNING name
""")

END_PROBE: Final = Query("UPDATE handlers SET probe_until = NULL WHERE name = :name")

CLOSE: Final = Query("""
UPDATE handlers SET failures = 0, open_until = NULL, probe_until = NULL, reason = ''
WHERE name = :name AND open_until IS NOT NULL
RETURNING name
""")

# Whoever starts may have mended what failed: the next delivery is tried at once, even if another
# was being tried, as its process may be the one that died before this one.
TRY_AGAIN: Final = Query("""
UPDATE handlers SET probe_until = NULL,
    open_until = CASE WHEN open_until > :now THEN :now ELSE open_until END
WHERE open_until IS NOT NULL
""")


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

    def __init__(self, store: Tables) -> None:
        self._store = store

    async def all(self) -> dict[str, BreakerState]:
        """Give the gates that there are, by handler; one that has none is running."""
        return {row[0]: BreakerState(*row) for row in await self._store.read(SELECT_GATES)}

    async def pause(self, name: str, now: float) -> None:
        await self._change(PAUSE, name=name, now=now)

    async def resume(self, name: str) -> None:
        """Let a handler's deliveries run again, whatever they waited for."""
        await self._change(RESUME, name=name)

    async def open(self, name: str, now: float, until: float, reason: str) -> bool:
        """Make deliveries wait; False if somebody else just did."""
        return bool(await self._change(OPEN, name=name, now=now, until=until, reason=reason))

    async def probe(self, name: str, now: float, until: float) -> bool:
        """Ask to try one delivery of an open handler; only one may at a time."""
        return bool(await self._change(PROBE, name=name, now=now, until=until))

    async def end_probe(self, name: str) -> None:
        """Give a probe back that found nothing to try."""
        await self._change(END_PROBE, name=name)

    async def close(self, name: str) -> bool:
        """Let deliveries run again after a success; False if they were not waiting."""
        return bool(await self._change(CLOSE, name=name))

    async def try_again(self, now: float) -> None:
        """Let every open handler try one delivery now."""
        await self._change(TRY_AGAIN, now=now)

    async def _change(self, query: Query, **params: Any) -> list[Row]:
        return await self._store.write(run_each, Run(query, params))
