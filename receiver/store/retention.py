"""Retention: delete old predictions, if settings say so, and trim what would grow for ever.

A turn takes a few seconds. It deletes in transactions of a few milliseconds and pauses
after each, so that accepts, which share the writer, hardly notice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, NoReturn

import msgspec
import structlog

from receiver.model.ids import oldest_id
from receiver.model.states import TERMINAL
from receiver.model.tasks import repeat
from receiver.store.disposal import Cutoffs, DeleteBatch
from receiver.store.facade import Store
from receiver.store.statement import Cells

log = structlog.get_logger("receiver")

_DAY: Final = 86400.0
CHANGES_KEPT: Final = 7 * _DAY
AUDIT_KEPT: Final = 365 * _DAY
UNNEEDED_KEPT: Final = 10_000
"""Callbacks that decided nothing: repeated, late, or about what is not known."""
_YOUNG: Final = _DAY
"""Seconds for which nothing is taken from a prediction that still lives."""
_LONGEST_REST: Final = 3600.0
"""Seconds between two walks over what has ended; with a short retention they come more often."""


class RetentionPace(msgspec.Struct, frozen=True, kw_only=True):
    """How long things take here, in seconds, and how much is done at once."""

    turn: float = 2.0
    """It ends after so long, and the next goes on: a process must be able to stop."""
    nap: float = 5.0
    """Between turns, where there is one process."""
    rest: float = 60.0
    """Between two trims of what would grow for ever."""
    piece: float = 0.004
    """How long one of our transactions may delay others."""
    pause: float = 0.02
    """After each, for those others."""
    page: int = 500
    """Rows looked at at once."""


PACE: Final = RetentionPace()
PACE_ON_A_SERVER: Final = RetentionPace(piece=0.05)
"""There a transaction takes one of several connections, and mostly waits for the wire."""


class Retention:
    """Deletes what is old.

    `days` says for how many days a prediction is kept that ended `succeeded`, `failed` or
    `canceled`, and a delivery that is `dead`; what it does not name is kept for good. Private
    content is kept for `private_for` seconds at the most.
    """

    def __init__(
        self,
        store: Store,
        days: Mapping[str, float],
        private_for: float,
        *,
        clock: Callable[[], float],
        pace: RetentionPace,
    ) -> None:
        self._store = store
        self._disposal = store.disposal
        self._days = days
        self._private_for = private_for
        self._clock = clock
        self._pace = pace
        ends = [days[status] for status in TERMINAL if status in days]
        self._shortest = min(ends, default=0.0) * _DAY
        self._longest = max(ends, default=0.0) * _DAY
        self._walks = bool(ends)
        self._keeps_none = len(ends) == len(TERMINAL)
        self._next_look = 0.0
        self._cursor = ""
        """How far this process has walked; empty before the first step."""
        self._deleted = 0

    async def run(self) -> NoReturn:
        """Take turns for as long as we run, where one process does everything."""
        await repeat(self.take_turn, longest=self._pace.nap)

    async def take_turn(self) -> None:
        """Trim and delete for one turn."""
        started = asyncio.get_running_loop().time()
        until = started + self._pace.turn
        now = self._clock()
        if started >= self._next_look:
            if not await self._look(now, until):
                return
            self._next_look = started + self._pace.rest
        if self._walks and (self._cursor or await self._is_rested(now)):
            await self._walk(now, until)

    async def _look(self, now: float, until: float) -> bool:
        """Trim what would grow for ever; False: there was not enough time."""
        page = self._pace.page
        await self._store.budgets.forget_counts(now, _DAY, page)
        await self._store.audit.forget(now - AUDIT_KEPT, page)
        while await self._disposal.trim_change_log(now - CHANGES_KEPT, page) == page:
            if not await self._pause(until):
                return False
        while await self._store.private.empty(now - self._private_for, page) == page:
            if not await self._pause(until):
                return False
        if not await self._trim(
            lambda: self._disposal.unneeded(UNNEEDED_KEPT, now - _YOUNG, page), until
        ):
            return False
        if not self._keeps_none:
            return True
        # What came for predictions that are gone is not kept longer than they would have been.
        return await self._trim(lambda: self._disposal.strays(now - self._longest, page), until)

    async def _trim(self, find: Callable[[], Awaitable[Sequence[Cells]]], until: float) -> bool:
        while rows := await find():
            while rows:
                gone = await self._disposal.delete_callbacks(self._piece(rows))
                rows = rows[gone.handled :]
                if not await self._pause(until):
                    return False
        return True

    async def _is_rested(self, now: float) -> bool:
        """Return whether the last whole walk, of any process, is long enough ago."""
        rest = min(_LONGEST_REST, self._shortest / 24)
        # A time in the future comes of a clock that was wrong.
        return not 0.0 <= now - await self._disposal.watermark("retention") < rest

    async def _walk(self, now: float, until: float) -> None:
        """Go on from where the last turn ended, to the youngest that can be old enough."""
        before = self._before(now)
        horizon = oldest_id("pred", now - self._shortest)
        cursor: str | None = self._cursor
        while cursor is not None:
            rows, cursor = await self._disposal.old(cursor, horizon, before, self._pace.page)
            while rows:
                gone = await self._disposal.delete(self._piece(rows, before))
                self._deleted += gone.deleted
                rows = rows[gone.handled :]
                if not await self._pause(until):
                    return  # what is left of this page is found again
            self._cursor = cursor or ""
            if cursor is not None and not await self._pause(until):
                return
        await self._disposal.set_watermark("retention", int(now))
        if self._deleted:
            log.info("predictions.deleted", count=self._deleted)
            self._deleted = 0
            await self._store.scrub()

    def _before(self, now: float) -> Cutoffs:
        times = {f"{state}_before": now - days * _DAY for state, days in self._days.items()}
        return Cutoffs(**times)

    def _piece(self, rows: Sequence[Cells], before: Cutoffs | None = None) -> DeleteBatch:
        return DeleteBatch(rows=rows, before=before or Cutoffs(), seconds=self._pace.piece)

    async def _pause(self, until: float) -> bool:
        """Pause for other writes; False: this turn is over."""
        await asyncio.sleep(self._pace.pause)
        return asyncio.get_running_loop().time() < until
