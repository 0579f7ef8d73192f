"""The clock: the wall clock's time, but without its steps.

If the wall clock is set by an hour, work must neither wait for an hour nor expire at once. So our
time advances evenly, by the monotonic clock. A watch compares the two every second; when the wall
clock has stepped, all stored future times are moved by the same amount, and the new time is used.

While a computer is suspended, the monotonic clock stops but time passes: work that falls due
meanwhile is due, but deadlines are moved by that time, in which no poll was possible.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, NoReturn, TypeAlias

import structlog

from receiver.model.errors import StoreUnavailable
from receiver.model.tasks import Wakeups, repeat
from receiver.model.values import Shift
from receiver.store.facade import Store

log = structlog.get_logger("receiver")

Clock: TypeAlias = Callable[[], float]

_EVERY: Final = 1.0
"""Seconds between two comparisons."""
_STEP: Final = 2.0
"""Seconds by which the wall clock may drift between comparisons; a larger change is a step."""


def suspended() -> float:
    """Return the seconds for which this computer has been suspended, as far as it can be known."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()


class SteadyClock:
    """The wall clock's time at the last comparison, plus the monotonic clock's time since then."""

    def __init__(
        self,
        wall: Clock = time.time,
        monotonic: Clock = time.monotonic,
        suspended: Clock = suspended,
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._suspended = suspended
        self._offset = wall() - monotonic()
        self._slept = suspended()

    def __call__(self) -> float:
        return self._monotonic() + self._offset

    def step(self) -> Shift | None:
        """Return by how much the wall clock has stepped; follow a drift, and return None."""
        ahead = self._wall() - self()
        if abs(ahead) <= _STEP:
            self._offset += ahead
            return None
        slept = min(max(self._suspended() - self._slept, 0.0), max(ahead, 0.0))
        return Shift(due=ahead - slept, deadline=ahead)

    def follow(self, step: Shift) -> None:
        """Use the wall clock's new time."""
        self._offset += step.deadline
        self._slept = self._suspended()


def clocks(wall: Clock, monotonic: Clock | None) -> tuple[Clock, Clock, SteadyClock | None]:
    """Return the clock for stored times, the clock for this process alone, and the steady one.

    A test's own `wall` clock is used as it is, without a steady one, unless a `monotonic` one is
    given too.
    """
    if wall is not time.time and monotonic is None:
        return wall, wall, None
    if monotonic is None:
        steady = SteadyClock()
        return steady, time.monotonic, steady
    steady = SteadyClock(wall, monotonic, suspended=lambda: 0.0)
    return steady, monotonic, steady


class Watch:
    """Follows the steps of the wall clock that the store accepts, and moves stored times."""

    def __init__(self, clock: SteadyClock, store: Store, owner: str, wakeups: Wakeups) -> None:
        self._clock = clock
        self._store = store
        self._owner = owner
        self._wakeups = wakeups
        self._ignored_step = 0.0
        """The last step that was not followed."""

    async def run(self) -> NoReturn:
        await repeat(self.compare, longest=_EVERY)

    async def compare(self) -> None:
        """Compare the clocks, and follow a step."""
        step = self._clock.step()
        if step is None:
            self._ignored_step = 0.0
            return
        if abs(step.deadline - self._ignored_step) <= _STEP:
            return
        followed = await self._store.should_follow_step(self._clock(), step)
        log.warning(
            "clock.stepped",
            seconds=round(step.deadline, 1),
            suspended=round(step.deadline - step.due, 1),
            followed=followed,
        )
        if not followed:
            self._ignored_step = step.deadline
            return
        # Rows written from here on have the new time; those written before are moved.
        self._clock.follow(step)
        while True:
            try:
                await self._store.shift(step, self._owner, self._clock())
                break
            except StoreUnavailable:
                await asyncio.sleep(_EVERY)
        self._wakeups.wake_all("handler")
        self._wakeups.wake_all("poll")
