"""The drain: a run of all due work with an end, for when nothing runs between requests."""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

from receiver.deliveries.facade import Deliveries
from receiver.model.answers import Drained
from receiver.model.tasks import wait_for_all
from receiver.observability.runtime import Runtime
from receiver.predictions.facade import Predictions
from receiver.store.due import Due
from receiver.store.facade import Housekeeping, Store

_OVERTIME: Final = 5.0
"""Seconds after a drain's time in which its last attempts are cancelled and settled."""
_PERIOD: Final = 600.0
"""Seconds between two rounds of housekeeping, of all processes together."""
_HOUSEKEEPING_RETRY: Final = 60.0
"""Seconds between two tries of one process to do the housekeeping."""


class _Counts(NamedTuple):
    """Counts of the work done since the start of this process."""

    deliveries: int
    submits: int
    polls: int
    cut_short: int


class Drain:
    """The runner of due work with a time limit, and of the housekeeping that nothing else does."""

    def __init__(
        self,
        store: Store,
        predictions: Predictions,
        deliveries: Deliveries,
        runtime: Runtime,
        housekeeping: Housekeeping,
    ) -> None:
        """Make one; `housekeeping` is empty if this process does it by itself."""
        self._store = store
        self._predictions = predictions
        self._deliveries = deliveries
        self._worker = deliveries.worker
        self._runtime = runtime
        self._housekeeping = housekeeping
        self._next_housekeeping = 0.0
        self._underway: asyncio.Task[Drained] | None = None
        self._looked_at = 0.0
        self._look_until = 0.0
        """By the loop's clock; a run ends only after it has looked for work later than this."""

    async def __call__(self, seconds: float, again: float = 0.0) -> Drained:
        """Drain, and look once more after `again` seconds; concurrent callers share one run.

        Work that was committed before the call is found, also by a run that is about to end.
        """
        self._look_until = max(self._look_until, asyncio.get_running_loop().time() + again)
        if self._underway is None or self._underway.done():
            self._underway = asyncio.create_task(self._run(seconds))
            seconds += _OVERTIME
        underway = self._underway
        await asyncio.wait({underway}, timeout=seconds)
        if not underway.done() or underway.cancelled():  # a shared run is longer, or we stop
            return Drained(0, 0, 0, more=True)
        return underway.result()

    def cancel(self) -> None:
        if self._underway is not None:
            self._underway.cancel()

    async def stop(self) -> None:
        """Cancel the run, and wait until it has ended."""
        self.cancel()
        if self._underway is not None:
            await asyncio.wait({self._underway})

    async def _run(self, seconds: float) -> Drained:
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        last_start = until - seconds / 5
        before = self._done()
        while True:
            due = await self._run_due(until, last_start, seconds)
            if self._housekeeping and clock() < last_start:
                await self._keep_house(last_start)
            pending = await self._count_pending(due)
            is_last = self._looked_at >= self._look_until
            if is_last or max(self._look_until, clock()) >= last_start:
                break
            await asyncio.sleep(self._look_until - clock())
        done = _Counts(*(now - then for now, then in zip(self._done(), before, strict=True)))
        return Drained(
            **done._asdict(),
            more=_is_work(due) or due.claimed or not is_last,
            next_due=due.next_due,
            pending=pending,
        )

    async def _run_due(self, until: float, last_start: float, seconds: float) -> Due:
        """Run due work until none is left or it is too late to begin; return the rest."""
        clock = asyncio.get_running_loop().time
        due = await self._due()
        if due.claimed:
            await self._worker.reclaim()
            due = await self._due()
        while clock() < last_start:
            replayed = bool(self._housekeeping) and await self._deliveries.replayer.step()
            if replayed:
                due = await self._due()
            elif not _is_work(due):
                break
            started, before = self._done(), _work(due)
            await wait_for_all(
                self._predictions.drain(until, last_start),
                self._worker.drain(due.handlers, until, seconds),
            )
            due = await self._due()  # the work may have made more work due
            if self._done() == started and _work(due) == before and not replayed:
                # Nothing could start: claims are lost, or there is no room, or others are at it.
                await self._worker.reclaim()
                break
        return due

    async def _due(self) -> Due:
        runtime = self._runtime
        self._looked_at = asyncio.get_running_loop().time()
        return await self._store.due(
            runtime.owner,
            self._deliveries.registry.handlers,
            self._predictions.on,
            runtime.clock(),
        )

    async def _count_pending(self, due: Due) -> int:
        if due.next_due is None and not due.claimed:
            return 0
        return sum((await self._store.backlog.depth([])).pending.values())

    async def _keep_house(self, last_start: float) -> None:
        """Do the housekeeping every ten minutes, in one of all processes (by a lease)."""
        clock = asyncio.get_running_loop().time
        if clock() < self._next_housekeeping:
            return
        self._next_housekeeping = clock() + _HOUSEKEEPING_RETRY
        now = self._runtime.clock()
        if not await self._store.leases.take_turn("housekeeping", now, _PERIOD):
            return
        for work in self._housekeeping.values():
            if clock() < last_start:
                await work()

    def _done(self) -> _Counts:
        worker, predictions = self._worker, self._predictions
        return _Counts(worker.attempts, predictions.submits, predictions.polls, worker.cut_short)


def _is_work(due: Due) -> bool:
    return any(_work(due))


def _work(due: Due) -> tuple[list[str], list[str], list[str]]:
    return due.handlers, due.submits, due.polls
