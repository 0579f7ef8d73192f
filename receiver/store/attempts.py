"""News of ended attempts, for the live streams of this and other processes; nothing is stored.

A notice is only a hint and contains only names: the rows contain how an attempt ended. A process
notifies others only for some seconds after one of them has subscribed, so that otherwise settling
costs nothing more.
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
from receiver.store.engine import AttemptName, Engine, Repository
from receiver.store.statement import Row, Statements

sql: Final = Statements("attempts")

_SUBSCRIBE_EVERY: Final = 5.0
"""Seconds between two subscriptions to the notices of other processes."""
_SUBSCRIBED_FOR: Final = 15.0
"""Seconds for which a process publishes to another that has subscribed."""
_MOST_WAITING: Final = 2000
"""Most ends that wait to be read; beyond that the oldest are dropped."""


class AttemptEnd(StatusChange, frozen=True, kw_only=True):
    """The end of an attempt, with the fields that readers filter by."""

    delivery_id: str
    handler: str
    number: int
    state: DeliveryState
    """The state of the delivery after it."""
    result: FailureKind | Literal["done"]
    reason: str
    due_at: float | None


class AttemptNotice(msgspec.Struct, frozen=True, tag="attempts"):
    """A notice between processes: ended attempts, or, if there are none, a subscription to them."""

    sender: str
    ended: list[AttemptName]


class AttemptNews(Repository):
    """The publisher of ended attempts to the streams of this and other processes."""

    def __init__(self, store: Engine, wakeups: Wakeups) -> None:
        super().__init__(store)
        self._wakeups = wakeups
        self._ended: deque[AttemptName] = deque(maxlen=_MOST_WAITING)
        self._followed_here = 0.0
        """Monotonic time until which a stream follows here; the next two are such times."""
        self._followed_elsewhere = 0.0
        self._subscribe_at = 0.0

    async def follow(self) -> None:
        """Subscribe to all ends for some seconds; call it repeatedly."""
        now = time.monotonic()
        self._followed_here = now + _SUBSCRIBED_FOR
        if now >= self._subscribe_at:
            self._subscribe_at = now + _SUBSCRIBE_EVERY
            await self._notify([])

    async def publish(self, ended: Sequence[AttemptName]) -> None:
        """Publish attempts whose ends are committed, if a stream or a process has subscribed."""
        if not ended:  # a notice without ends would be a subscription
            return
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
        """Return the ends received since the last call."""
        ended = list(self._ended)
        self._ended.clear()
        return ended

    async def read(self, ended: Sequence[AttemptName], seq: int) -> list[AttemptEnd]:
        """Return how attempts ended, in order; all get the position `seq` of the change log."""
        rows = await self._store.read(sql.select_attempts, sorted(set(ended)))
        return [_end(row, seq) for row in rows]

    def _take_in(self, ended: Sequence[AttemptName]) -> None:
        self._ended.extend(ended)
        self._wakeups.wake_all("changes")

    async def _notify(self, ended: Sequence[AttemptName]) -> None:
        with suppress(StoreUnavailable):  # readers find the end in the lists
            await self._store.notify(list(ended))


def _end(row: Row, seq: int) -> AttemptEnd:
    return AttemptEnd(**{**row, "seq": seq, "metadata": msgspec.json.decode(row["metadata"])})
