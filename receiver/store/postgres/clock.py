"""The server's clock compared with ours: leases use the server's, which all processes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog

from receiver.store.postgres.group_commit import Connection
from receiver.store.statement import Statement

log = structlog.get_logger("receiver")

CLOCK: Final = Statement(
    "SELECT extract(epoch FROM clock_timestamp())::double precision AS seconds"
)
_SKEWED: Final = 2.0
"""Seconds between our clock and the server's that are worth a warning."""


class ServerClock:
    """How far the server's clock is ahead of `clock`, by which the times of claims are made."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.skew = 0.0
        """Seconds; 0 if the two are close enough."""

    def explains(self, step: float) -> bool:
        """Return whether a step of our clock, not compared since, corrects the known skew."""
        return abs(self.skew - step) < abs(self.skew)

    async def compare_on(self, connection: Connection) -> None:
        """Read the server's time, and compare it with ours."""
        asked_at = self._clock()
        self.compare(await connection.fetchval(CLOCK.postgres), asked_at)

    def compare(self, there: float, asked_at: float) -> None:
        """Update the skew, as either clock may have been set.

        `there` is the server's time, `asked_at` ours when it was asked for.
        """
        here = self._clock()
        skew = there - here
        # An answer that waited while our loop was busy is too old to compare with.
        if not 0.0 <= here - asked_at < _SKEWED / 2 or abs(skew - self.skew) <= _SKEWED:
            return
        self.skew = skew if abs(skew) > _SKEWED else 0.0
        if self.skew:
            log.warning("clock.skewed", seconds=round(self.skew, 1))
        else:
            log.info("clock.skewed", seconds=0.0)  # no longer skewed
