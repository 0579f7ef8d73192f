"""Clocks that only a test moves."""

from __future__ import annotations

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
