"""Retention: deletes old predictions if the settings ask for it, and trims ever-growing tables.

A turn takes a few seconds. It deletes in transactions of a few milliseconds and pauses
after each, so that accepts, which share the writer, are hardly delayed.
"""

from __future__ import annotations

import asyncio
import contextlib
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
"""Kept callbacks that decided nothing: repeated, late, or of an unknown prediction."""
_YOUNG: Final = _DAY
"""Age in seconds up to which a living prediction keeps all its callbacks."""
_LONGEST_REST: Final = 3600.0
"""Most seconds between two walks over old predictions; fewer with a short retention."""


class RetentionPace(msgspec.Struct, frozen=True, kw_only=True):
    """The durations of retention, in seconds, and how much it does at once."""

    turn: float = 2.0
    """Length of a turn; the next one continues, as a process must be able to stop."""
    nap: float = 5.0
    """Pause between turns, if there is one process."""
    rest: float = 60.0
    """Pause between two trims of ever-growing tables."""
    piece: float = 0.004
    """How long one of our transactions may delay others."""
    pause: float = 0.02
    """Pause after each transaction, for other writes."""
    page: int = 500
    """Rows read at once."""


PACE: Final = RetentionPace()
PACE_ON_A_SERVER: Final = RetentionPace(piece=0.05)
"""On a server a transaction uses one of several connections, and mostly waits for the network."""


class _TurnOver(Exception):
    """The time of a turn is over: the next one continues."""


class Retention:
    """Deletes old rows.

    `days` contains how many days to keep a prediction that ended `succeeded`, `failed` or
    `canceled`, and a delivery that is `dead`; a state without an entry is kept for good. Private
    content is kept for `private_for` seconds at most.
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
        self._until = 0.0
        """When this turn ends."""
        self._cursor = ""
        """The id up to which this process has walked; empty before the first step."""
        self._deleted = 0

    async def run(self) -> NoReturn:
        """Take turns for as long as the process runs, if it is the only one."""
        await repeat(self.take_turn, longest=self._pace.nap)

    async def take_turn(self) -> None:
        """Trim and delete for one turn."""
        started = asyncio.get_running_loop().time()
        self._until = started + self._pace.turn
        now = self._clock()
        with contextlib.suppress(_TurnOver):
            if started >= self._next_look:
                await self._look(now)
                self._next_look = started + self._pace.rest
            if self._walks and (self._cursor or await self._is_rested(now)):
                await self._walk(now)

    async def _look(self, now: float) -> None:
        """Trim ever-growing tables."""
        page = self._pace.page
        await self._store.budgets.forget_counts(now, _DAY, page)
        await self._store.audit.forget(now - AUDIT_KEPT, page)
        while await self._disposal.trim_change_log(now - CHANGES_KEPT, page) == page:
            await self._pause()
        while await self._store.private.empty(now - self._private_for, page) == page:
            await self._pause()
        await self._trim(lambda: self._disposal.unneeded(UNNEEDED_KEPT, now - _YOUNG, page))
        if self._keeps_none:
            # Callbacks of deleted predictions are kept no longer than these would have been.
            await self._trim(lambda: self._disposal.orphans(now - self._longest, page))

    async def _trim(self, find: Callable[[], Awaitable[Sequence[Cells]]]) -> None:
        while rows := await find():
            while rows:
                batch = DeleteBatch(rows=rows, seconds=self._pace.piece)
                rows = rows[(await self._disposal.delete_callbacks(batch)).handled :]
                await self._pause()

    async def _is_rested(self, now: float) -> bool:
        """Return whether the last complete walk of any process is long enough ago."""
        rest = min(_LONGEST_REST, self._shortest / 24)
        # A time in the future comes from a clock that was wrong.
        return not 0.0 <= now - await self._disposal.watermark("retention") < rest

    async def _walk(self, now: float) -> None:
        """Continue where the last turn ended, up to the youngest that can be old enough."""
        before = self._before(now)
        horizon = oldest_id("pred", now - self._shortest)
        cursor: str | None = self._cursor
        while cursor is not None:
            rows, cursor = await self._disposal.old(cursor, horizon, before, self._pace.page)
            while rows:
                batch = DeleteBatch(rows=rows, before=before, seconds=self._pace.piece)
                gone = await self._disposal.delete(batch)
                self._deleted += gone.deleted
                rows = rows[gone.handled :]
                await self._pause()  # if the turn is over, the next reads the rest again
            self._cursor = cursor or ""
            if cursor is not None:
                await self._pause()
        await self._disposal.set_watermark("retention", int(now))
        if self._deleted:
            log.info("predictions.deleted", count=self._deleted)
            self._deleted = 0
            await self._store.scrub()

    def _before(self, now: float) -> Cutoffs:
        times = {f"{state}_before": now - days * _DAY for state, days in self._days.items()}
        return Cutoffs(**times)

    async def _pause(self) -> None:
        """Pause for other writes; raise _TurnOver at the end of this turn."""
        await asyncio.sleep(self._pace.pause)
        if asyncio.get_running_loop().time() >= self._until:
            raise _TurnOver
