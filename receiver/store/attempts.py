"""Publish the ends of attempts to live streams, in this process and in others; nothing is kept.

What is published is a hint, by names alone: the rows say how an attempt has ended. A process
notifies others only for a while after one of them has asked, so that settling costs nothing more
otherwise.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Literal

import msgspec

from receiver.model.answers import DeliveryState
from receiver.model.errors import StoreUnavailable
from receiver.model.retry import FailureKind
from receiver.model.tasks import Wakeups
from receiver.store.changes import StatusChange
from receiver.store.engine import AttemptName, Engine
from receiver.store.statement import Row, Statements

sql: Final = Statements("attempts")

_SUBSCRIBE_EVERY: Final = 5.0
"""Seconds between two subscriptions to what other processes publish."""
_SUBSCRIBED_FOR: Final = 15.0
"""Seconds for which a process publishes to another that has subscribed."""
_MOST_WAITING: Final = 2000
"""Ends that wait to be read; beyond that the oldest are dropped."""


class AttemptEnd(StatusChange, frozen=True, kw_only=True):
    """An attempt has ended; with what the filters of readers look at."""

    delivery_id: str
    handler: str
    number: int
    state: DeliveryState
    """Of the delivery since."""
    result: FailureKind | Literal["done"]
    reason: str
    due_at: float | None


class AttemptNotice(msgspec.Struct, frozen=True, tag="attempts"):
    """What processes tell each other: ends of attempts; or, naming none, that one follows them."""

    sender: str
    ended: list[AttemptName]


class AttemptNews:
    """Passes on which attempts have ended, to the streams here and in other processes."""

    def __init__(self, store: Engine, wakeups: Wakeups) -> None:
        self._store = store
        self._wakeups = wakeups
        self._ended: deque[AttemptName] = deque(maxlen=_MOST_WAITING)
        self._followed_here = 0.0
        """Until when; so are the next two."""
        self._followed_elsewhere = 0.0
        self._subscribe_at = 0.0

    async def follow(self) -> None:
        """Subscribe to all ends for some seconds; to be called again and again."""
        now = time.monotonic()
        self._followed_here = now + _SUBSCRIBED_FOR
        if now >= self._subscribe_at:
            self._subscribe_at = now + _SUBSCRIBE_EVERY
            await self._notify([])

    async def publish(self, ended: Sequence[AttemptName]) -> None:
        """Publish attempts whose ends are committed, where somebody has subscribed."""
        now = time.monotonic()
        if now < self._followed_here:
            self._take_in(ended)
        if now < self._followed_elsewhere:
            await self._notify(ended)

    def receive(self, notice: AttemptNotice) -> None:
        """Receive the notice of another process."""
        now = time.monotonic()
        if not notice.ended:
            self._followed_elsewhere = now + _SUBSCRIBED_FOR
        elif now < self._followed_here:
            self._take_in(notice.ended)

    def take(self) -> list[AttemptName]:
        """Return the ends that came since the last time."""
        ended = list(self._ended)
        self._ended.clear()
        return ended

    async def read(self, ended: Sequence[AttemptName], seq: int) -> list[AttemptEnd]:
        """Read how attempts ended, in their order; all get the place `seq` of the change log."""
        rows = await self._store.read(sql.select_attempts, sorted(set(ended)))
        return [_end(row, seq) for row in rows]

    def _take_in(self, ended: Sequence[AttemptName]) -> None:
        self._ended.extend(ended)
        self._wakeups.wake_all("changes")

    async def _notify(self, ended: Sequence[AttemptName]) -> None:
        with suppress(StoreUnavailable):  # readers find it in the lists
            await self._store.notify(list(ended))


def _end(row: Row, seq: int) -> AttemptEnd:
    return AttemptEnd(**{**row, "seq": seq, "metadata": msgspec.json.decode(row["metadata"])})
