"""The live stream: sends status changes and events to the clients of `/v1/events/stream`.

One task follows the change log for all readers of this process and encodes each message once. A
reader that reconnects names the last message it has seen, and reads from the store until it has
caught up, without a gap or a repeat. A reader that is too slow is disconnected; it can reconnect.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any, Final, NoReturn

import msgspec
import structlog

from receiver.model.answers import Attempted, Change, DeliveryChange, Gap, Moved
from receiver.model.errors import Problem
from receiver.model.states import TERMINAL
from receiver.model.tasks import Wakeups, repeat
from receiver.model.values import Status, plain, utc
from receiver.store.attempts import AttemptEnd, AttemptNews
from receiver.store.changes import ChangeLog, StatusChange

log = structlog.get_logger("receiver")

PREFIX: Final = "prediction."
DELIVERY: Final = "delivery."
KEEP_ALIVE: Final = 15.0
"""Seconds of silence after which a reader is sent a comment."""
MOST_READERS: Final = 1000
_MOST_WAITING: Final = 2000
_MOST_BYTES: Final = 8 * 1024 * 1024
"""Messages, and their bytes, that may wait for one reader before it is disconnected."""
_MOST_WRITTEN: Final = 16
"""Messages that are encoded at once for a reader that catches up."""
_POLL_INTERVAL: Final = 0.25
"""Seconds between two polls without a wake-up: other processes change predictions too."""


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """The start of every stream: the place to resume from before the first message."""

    at: int


class StreamFilter(msgspec.Struct, frozen=True, kw_only=True):
    """The filter of a reader; an empty field matches everything."""

    statuses: frozenset[str] = frozenset()
    providers: frozenset[str] = frozenset()
    metadata: Mapping[str, str] = {}
    """Compared as `@on` does: text as it is, other values by their JSON."""
    prediction: str | None = None
    deliveries: bool = False
    """Whether the ends of attempts match too."""

    def __contains__(self, change: StatusChange) -> bool:
        return (
            (self.deliveries or not isinstance(change, AttemptEnd))
            and (self.prediction is None or change.prediction_id == self.prediction)
            and (not self.statuses or change.status in self.statuses)
            and (not self.providers or change.provider in self.providers)
            and all(
                name in change.metadata and plain(change.metadata[name]) == value
                for name, value in self.metadata.items()
            )
        )


class Message(msgspec.Struct, frozen=True):
    """One change, and its encoded form for all readers whose filters match."""

    change: StatusChange
    frame: bytes


class _Reader:
    """The messages that wait for one reader."""

    def __init__(self, wanted: StreamFilter, after: int) -> None:
        self.wanted = wanted
        self._after = after
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self.news = asyncio.Event()
        self.is_cut = False

    def put(self, messages: Sequence[Message]) -> None:
        if self.is_cut:
            return
        for message in messages:
            if self._is_new(message.change) and message.change in self.wanted:
                self._waiting.append(message.frame)
                self._size += len(message.frame)
        if self._size > _MOST_BYTES or len(self._waiting) > _MOST_WAITING:
            self.is_cut = True
            log.warning("reader.cut", messages=len(self._waiting), bytes=self._size)
            self._waiting.clear()
        if self._waiting or self.is_cut:
            self.news.set()

    def _is_new(self, change: StatusChange) -> bool:
        """Return whether the reader has not read this yet; ends of attempts are sent live only."""
        return isinstance(change, AttemptEnd) or change.seq > self._after

    def take(self) -> bytes:
        frames = b"".join(self._waiting)
        self._waiting.clear()
        self._size = 0
        self.news.clear()
        return frames


class LiveStream:
    """A follower of the change log, while there are readers."""

    def __init__(self, changes: ChangeLog, attempts: AttemptNews, wakeups: Wakeups) -> None:
        self._changes = changes
        self._attempts = attempts
        self._wakeups = wakeups
        self._readers: set[_Reader] = set()
        self._count = 0
        self._position: int | None = None
        """The place up to which the readers were sent changes; None: there are no readers."""
        self._awake = asyncio.Event()
        self._following = asyncio.Event()
        self._stopping = asyncio.Event()

    def close(self) -> None:
        """End every reader's stream, as we are about to stop."""
        self._stopping.set()
        self._following.set()
        for reader in self._readers:
            reader.news.set()

    async def run(self) -> NoReturn:
        """Follow the change log as long as we run."""
        await repeat(self._look, self._awake)

    async def _look(self) -> float | None:
        if self._count:
            if any(reader.wanted.deliveries for reader in self._readers):
                await self._attempts.follow()
            ended = self._attempts.take()  # first, so that the log has their events
            position = await self._follow()
            if ended:
                await self._publish(await self._attempts.read(ended, position), position)
            return _POLL_INTERVAL
        self._position = None
        self._following.clear()
        return None  # until there is a reader

    async def _follow(self) -> int:
        """Send readers the new changes of the log; return the place up to which they were sent."""
        end = await self._changes.end()
        if self._position is None:
            self._position = end
            self._following.set()
        while self._position < end:
            await self._publish(*await self._changes.page(self._position, end))
        return self._position

    async def _publish(self, changes: Sequence[StatusChange], position: int) -> None:
        """Send changes to the readers; one that joins meanwhile has caught up to `position`."""
        readers = list(self._readers)
        before, self._position = self._position, position
        wanted = [
            change for change in changes if any(change in reader.wanted for reader in readers)
        ]
        try:
            messages = await self._written(wanted)
        except BaseException:
            self._position = before
            raise
        for reader in readers:
            reader.put(messages)

    async def read(self, after: int, wanted: StreamFilter) -> AsyncGenerator[bytes]:
        """Yield frames of server-sent events after a place of the change log.

        Raises Problem at once if there are too many readers, StoreUnavailable while it catches up.
        """
        if self._count >= MOST_READERS:
            raise Problem(503, "too-many-readers", "too many streams are open", retry_after=10)
        self._count += 1
        try:
            if wanted.deliveries:
                await self._attempts.follow()
            # Only while there are readers: else each outcome would wake a task for nothing.
            with self._wakeups.listen("changes", event=self._awake):
                self._awake.set()
                async for frames in self._read(after, wanted):
                    yield frames
        finally:
            self._count -= 1

    async def _read(self, after: int, wanted: StreamFilter) -> AsyncIterator[bytes]:
        end = await self._changes.end()
        cut = await self._changes.cut()
        if after < cut or after > end:
            # The place is too old, or of another database (perhaps one before a restore).
            until = cut if after < cut else end
            yield frame("stream.gap", until, Gap(after=after, until=until))
            after = until
        yield frame("stream.open", after, Opened(at=after))
        await self._following.wait()
        while self._position is not None and after < self._position:
            changes, after = await self._changes.page(after, self._position)
            changes = [change for change in changes if change in wanted]
            # An event may have megabytes: only few wait for a reader that does not read.
            for at in range(0, len(changes), _MOST_WRITTEN):
                for message in await self._written(changes[at : at + _MOST_WRITTEN]):
                    yield message.frame
            if self._stopping.is_set():
                return
        reader = _Reader(wanted, after)
        self._readers.add(reader)
        try:
            async for frames in self._live(reader):
                yield frames
        finally:
            self._readers.discard(reader)

    async def _live(self, reader: _Reader) -> AsyncIterator[bytes]:
        # No empty line after a comment: some clients take it for the end of an event.
        yield b": live\n"
        while not self._stopping.is_set():
            try:
                async with asyncio.timeout(KEEP_ALIVE):
                    await reader.news.wait()
            except TimeoutError:
                yield b": still here\n"
                continue
            if reader.is_cut:
                yield b": cut, being too slow; come back with Last-Event-ID\n"
                return
            if frames := reader.take():
                yield frames

    async def _written(self, changes: Sequence[StatusChange]) -> list[Message]:
        """Return changes with their encoded form; those of deleted predictions are skipped."""
        ended = [change.prediction_id for change in changes if _is_end(change)]
        events = await self._changes.events(ended) if ended else {}
        messages = []
        for change in changes:
            content = events.get(change.prediction_id) if _is_end(change) else _content(change)
            if content is not None:
                messages.append(Message(change, frame(content.type, change.seq, content)))
        return messages


def _is_end(change: StatusChange) -> bool:
    return change.status in TERMINAL and not isinstance(change, AttemptEnd)


def _content(change: StatusChange) -> Change | DeliveryChange:
    prediction = Moved(
        id=change.prediction_id,
        provider=change.provider,
        model=change.model,
        status=Status(change.status),
        metadata=change.metadata,
    )
    time = utc(change.time)
    if not isinstance(change, AttemptEnd):
        return Change(type=PREFIX + change.status, time=time, prediction=prediction)
    delivery = Attempted(
        id=change.delivery_id,
        handler=change.handler,
        state=change.state,
        number=change.number,
        result=change.result,
        reason=change.reason,
        due_at=utc(change.due_at),
    )
    return DeliveryChange(
        type=DELIVERY + change.state, time=time, delivery=delivery, prediction=prediction
    )


def frame(kind: str, seq: int, content: Any) -> bytes:
    """Return one server-sent event; its JSON has no line breaks."""
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (seq, kind.encode(), msgspec.json.encode(content))
