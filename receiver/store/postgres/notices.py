"""NOTIFY and LISTEN: each process notifies all others of its commits."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Sequence
from itertools import zip_longest
from typing import Final

import msgspec
import structlog

from receiver.model.tasks import Topic, Wakeups
from receiver.store.attempts import AttemptNews, AttemptNotice
from receiver.store.engine import AttemptName
from receiver.store.postgres.group_commit import Connection
from receiver.store.postgres.sessions import COMMAND_TIMEOUT
from receiver.store.statement import News

log = structlog.get_logger("receiver")

CHANNEL: Final = "receiver_news"
TOPICS: Final[tuple[Topic, ...]] = ("handler", "changes", "prediction")
"""The topics that other processes' commits wake."""
_MOST_BYTES: Final = 3_900
"""Most bytes of the handlers, and of the predictions, in one notice, whose text may have 8,000."""
_MOST_ATTEMPTS: Final = 100
"""Most attempts named in one notice, for the same reason."""


class Notices:
    """Creates the notices of this process, and passes on those of others."""

    def __init__(self, wakeups: Wakeups, attempts: AttemptNews) -> None:
        self._wakeups = wakeups
        self._attempts = attempts
        self.sender = secrets.token_hex(8)
        """The name of this process, which ignores its own notices when they come back."""

    def of_commit(self, news: News) -> list[str]:
        """Return the texts of the notices of a commit, as many as are needed."""
        handlers = _parts(sorted({handler for _, handler in news.pending}))
        parts = zip_longest(handlers, _parts(news.ended), fillvalue=list[str]())
        return [msgspec.json.encode([self.sender, *part]).decode() for part in parts]

    def of_attempts(self, items: Sequence[Sequence[AttemptName]]) -> list[str]:
        """Return the texts of the notices of ended attempts; an empty item subscribes."""
        named = [name for ended in items for name in ended]
        parts = [named[at : at + _MOST_ATTEMPTS] for at in range(0, len(named), _MOST_ATTEMPTS)]
        if not all(items):
            parts.append([])
        return [msgspec.json.encode(AttemptNotice(self.sender, part)).decode() for part in parts]

    async def listen(self, connect: Callable[[], Awaitable[Connection]]) -> None:
        """Listen for other processes' commits for as long as we run; wake all after a gap."""
        logged = ""
        while True:
            try:
                await self._listen_until_it_ends(connect)
            except Exception as error:  # noqa: BLE001 - we must listen again after any error
                reason = f"{type(error).__name__}: {error}"
                if reason != logged:  # once, not each second for as long as the server is away
                    log.warning("news.interrupted", reason=reason)
                logged = reason
            await asyncio.sleep(1.0)

    async def _listen_until_it_ends(self, connect: Callable[[], Awaitable[Connection]]) -> None:
        connection = await connect()
        ended = asyncio.Event()
        try:
            connection.add_termination_listener(lambda _: ended.set())
            await connection.add_listener(CHANNEL, self._receive)
            for topic in TOPICS:
                self._wakeups.wake_all(topic)
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), COMMAND_TIMEOUT)
                await connection.fetchval("SELECT 1")  # else a broken connection is never noticed
        finally:
            connection.terminate()

    def _receive(self, _connection: object, _pid: int, _channel: str, text: object) -> None:
        try:
            notice = msgspec.json.decode(
                str(text), type=tuple[str, list[str], list[str]] | AttemptNotice
            )
        except msgspec.DecodeError:
            return  # any role of this database may send a notice, even an invalid one
        if isinstance(notice, AttemptNotice):
            if notice.sender != self.sender:
                self._attempts.receive(notice)
            return
        sender, handlers, predictions = notice
        if sender != self.sender:
            self._wakeups.wake("handler", *handlers)
            self._wakeups.wake_all("changes")
            self._wakeups.wake("prediction", *predictions)


def _parts(names: Sequence[str]) -> list[list[str]]:
    """Split names into lists of at most `_MOST_BYTES` as JSON; at least one, which may be empty."""
    parts: list[list[str]] = [[]]
    size = 0
    for name in names:
        length = len(msgspec.json.encode(name)) + 1
        size += length
        if size > _MOST_BYTES and parts[-1]:
            parts.append([])
            size = length
        parts[-1].append(name)
    return parts
