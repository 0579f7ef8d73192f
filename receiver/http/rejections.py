"""Counts of callbacks that were not proved, by provider, reason and address.

A flood must not cost a write per request or wait for the disk, so the counts are kept in memory and
written together every few seconds. A process that is killed loses the latest ones.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NoReturn

from receiver.model.errors import StoreUnavailable
from receiver.model.tasks import repeat
from receiver.store.discarded import OTHER, Rejection, Sort, add_up

_REST: Final = 2.0
"""Seconds between two writes."""
_PATIENCE: Final = 2.0
"""Seconds that the last write may take, when we stop."""
_LONGEST: Final = 64
"""Maximum characters of an address; a proxy may pass on any text as one."""


class Rejections:
    """Counts in memory; `keep` adds them to the stored ones."""

    def __init__(
        self,
        keep: Callable[[Sequence[Rejection]], Awaitable[None]],
        clock: Callable[[], float],
    ) -> None:
        self._keep = keep
        self._clock = clock
        self._counts: dict[Sort, Rejection] = {}
        self._news = asyncio.Event()

    def count(self, provider: str, reason: str, source: str) -> None:
        """Count a callback; beyond a thousand counts, new addresses are counted as `other`."""
        now = self._clock()
        source = source[:_LONGEST] if source.isprintable() else OTHER
        add_up(self._counts, Rejection(provider, reason, source, 1, now, now), self._counts)
        self._news.set()

    async def run(self) -> NoReturn:
        """Write the new counts every few seconds, if there are any."""
        await repeat(self._write)

    async def _write(self) -> float:
        await self._news.wait()
        await asyncio.sleep(_REST)
        await self._flush()
        return 0.0

    async def stop(self) -> None:
        """Write the remaining counts, if the database takes them now."""
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await self._flush()

    async def _flush(self) -> None:
        taken, self._counts = self._counts, {}
        self._news.clear()
        if not taken:
            return
        try:
            await self._keep(list(taken.values()))
        except StoreUnavailable:
            newer, self._counts = self._counts, taken
            for one in newer.values():
                add_up(self._counts, one, self._counts)
            self._news.set()
            raise
