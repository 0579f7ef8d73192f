"""Run what is due and come to an end, for processes that live only while they are asked to."""

from __future__ import annotations

import asyncio
from typing import Final

from receiver.deliveries.worker import Worker
from receiver.model.answers import Drained
from receiver.predictions.facade import Predictions

_OVERTIME: Final = 5.0
"""Seconds beyond its time in which a drain's last attempts may be cancelled and settled."""


class Drain:
    """Runs what is due, for so long at most."""

    def __init__(self, predictions: Predictions, worker: Worker) -> None:
        self._predictions = predictions
        self._worker = worker
        self._underway: asyncio.Task[Drained] | None = None

    async def __call__(self, seconds: float) -> Drained:
        """Drain; who asks meanwhile shares in the same run."""
        if self._underway is None or self._underway.done():
            self._underway = asyncio.create_task(self._run(seconds))
            seconds += _OVERTIME
        underway = self._underway
        await asyncio.wait({underway}, timeout=seconds)
        if not underway.done() or underway.cancelled():  # another's is longer, or we stop
            return Drained(0, 0, 0, more=True)
        return underway.result()

    def cancel(self) -> None:
        if self._underway is not None:
            self._underway.cancel()

    async def stop(self) -> None:
        """Cancel it, and wait until it has ended."""
        self.cancel()
        if self._underway is not None:
            await asyncio.wait({self._underway})

    async def _run(self, seconds: float) -> Drained:
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        last_start = until - seconds / 5
        before = self._done()
        while True:
            started = self._done()
            ends = await asyncio.gather(
                self._predictions.drain(until, last_start),
                self._worker.drain(until, last_start),
                return_exceptions=True,  # neither goes on alone while we are told of the other
            )
            for error in filter(None, ends):
                raise error
            # What has run may have made more due.
            if self._done() == started or clock() >= last_start:
                break
        attempts, submits, looks = (
            now - then for now, then in zip(self._done(), before, strict=True)
        )
        more = clock() >= last_start
        return Drained(deliveries=attempts, submits=submits, polls=looks, more=more)

    def _done(self) -> tuple[int, int, int]:
        return self._worker.attempts, self._predictions.submits, self._predictions.looks
