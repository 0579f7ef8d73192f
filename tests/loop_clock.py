"""The clock of the event loop, which a test moves instead of waiting for a timeout."""

from __future__ import annotations

import asyncio


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
