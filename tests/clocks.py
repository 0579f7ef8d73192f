"""Clocks that a test moves instead of waiting."""

from __future__ import annotations

import asyncio
import time

from tests.receiving import Clock


class ManualClock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class StoppedClock(Clock):
    """A receiver's clock that moves only with `ahead`."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.time()

    def __call__(self) -> float:
        return self.began + self.ahead


class LoopClock:
    """The clock of the running loop, `ahead` seconds ahead: timeouts and sleeps end earlier.

    Make it before what keeps a reference to the loop's own clock.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.ahead = 0.0
        self._time = loop.time
        loop.time = self  # type: ignore[method-assign]

    def __call__(self) -> float:
        return self._time() + self.ahead
