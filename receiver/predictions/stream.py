"""The SSE client: listens to a provider's event stream for as long as the app runs.

The stream buffers nothing: events that are sent while no process listens are lost. So after every
connection, also the first, all predictions at the provider are polled, and submits wait a moment
for the connection.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import re
import time
from collections.abc import Iterator
from typing import Final

import httpx
import structlog

from receiver.model.errors import StoreUnavailable, Unproved, Unreadable
from receiver.model.retry import backoff
from receiver.model.tolerant import text_of
from receiver.observability.runtime import Runtime
from receiver.predictions.inbox import Inbox
from receiver.providers.adapter import Streamed
from receiver.providers.transport import BROKEN
from receiver.store.facade import Store

log = structlog.get_logger("receiver")

SILENCE: Final = 45.0
"""Seconds without a byte after which a stream is dead: keep-alives come about every 15."""
_LARGEST_EVENT: Final = 1024 * 1024
_BASE: Final = 0.5
_CAP: Final = 30.0
_DOWN: Final = 3
"""Failures in a row after which submits no longer wait for the stream."""
_READY_TIMEOUT: Final = 5.0
"""Seconds a submit waits for the stream; after that it relies on polls."""


class Events:
    """A parser of event streams by their standard, for chunks that are cut anywhere.

    A line ends with its CR, without waiting for an LF.
    """

    def __init__(self, last_id: bytes = b"") -> None:
        self.last_id = last_id
        """The last `id` of a complete event; it holds until an event has another."""
        self._id = last_id
        self._waiting = bytearray()
        """The line whose end has not come yet."""
        self._began = False
        self._after_cr = False
        self._event = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> Iterator[tuple[str, str]]:
        """Yield the events, each a type and its data, that end in this chunk."""
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        *lines, rest = _LINE_END.split(chunk)
        if lines:
            lines[0] = bytes(self._waiting) + lines[0]
            self._waiting.clear()
        self._waiting += rest
        for line in lines:
            yield from self._line(line)
        if self._size + len(self._waiting) > _LARGEST_EVENT:
            raise Unreadable(f"an event of more than {_LARGEST_EVENT} bytes")

    def _line(self, line: bytes) -> Iterator[tuple[str, str]]:
        if not self._began:
            line = line.removeprefix(codecs.BOM_UTF8)
            self._began = True
        if not line:
            if self._data:
                yield text_of(self._event), text_of(b"\n".join(self._data))
            self._event, self._data, self._size = b"", [], 0
            self.last_id = self._id
            return
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        self._size += len(line)
        if self._size > _LARGEST_EVENT:
            raise Unreadable(f"an event of more than {_LARGEST_EVENT} bytes")
        if name == b"event":
            self._event = value
        elif name == b"data":
            self._data.append(value)
        elif name == b"id" and _ID.fullmatch(value):
            self._id = value


_ID: Final = re.compile(rb"[!-~]{0,200}")
"""An id that can be sent back in a header; an empty one resets it."""
_LINE_END: Final = re.compile(rb"\r\n|\r|\n")


class Listener:
    """One connection to one provider's stream, made again whenever it ends."""

    def __init__(
        self,
        name: str,
        provider: Streamed,
        client: httpx.AsyncClient,
        inbox: Inbox,
        store: Store,
        runtime: Runtime,
        *,
        silence: float = SILENCE,
    ) -> None:
        self._name = name
        self._provider = provider
        self._client = client
        self._inbox = inbox
        self._store = store
        self._runtime = runtime
        self._silence = silence
        self.name = f"stream {name}"
        """The name of its lease, if several processes could listen."""
        self.at_work = False
        """Whether it is connected."""
        self._failures = 0
        self._last_id = b""
        """Sent with the next connection; Oxen.ai documents no resuming, so nothing relies on it."""
        self._known = asyncio.Event()
        """Set while no submit has to wait: it is connected, down, or not run in this process."""
        self._known.set()

    async def ready(self) -> bool:
        """Wait a moment for the stream, unless it is down; return whether it is connected."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_READY_TIMEOUT):
                await self._known.wait()
        return self.at_work

    async def any_at_work(self) -> bool:
        """Return whether any process is connected; without a leader there is only this one."""
        return self.at_work

    async def run(self) -> None:
        self._known.clear()
        while True:
            began = time.monotonic()
            try:
                await self._listen()
                reason = "the provider ended it"
            except (*BROKEN, Unreadable) as error:
                reason = f"{type(error).__name__}: {error}"
            except StoreUnavailable:
                reason = "the database is unavailable"
            except Exception:
                log.exception("task.failed", provider=self._name)
                reason = "a fault of ours"
            finally:
                self.at_work = False
                self._runtime.wakeups.wake("role", self.name)
            long_lived = time.monotonic() - began > self._silence
            self._failures = 1 if long_lived else self._failures + 1
            if self._failures < _DOWN:
                self._known.clear()
            else:
                self._known.set()
            wait = backoff(self._failures, _BASE, _CAP, 0.5 + self._runtime.random() / 2)
            log.warning("stream.lost", provider=self._name, reason=reason, again_in=round(wait, 2))
            await asyncio.sleep(wait)

    async def _listen(self) -> None:
        request = self._provider.stream()
        timeout = httpx.Timeout(10.0, read=self._silence)
        request.extensions = {**request.extensions, "timeout": timeout.as_dict()}
        if self._last_id:
            request.headers["Last-Event-ID"] = self._last_id.decode()
        response = await self._client.send(request, stream=True, follow_redirects=False)
        try:
            if response.status_code != httpx.codes.OK:
                self._last_id = b""  # it may be the reason of the refusal
                raise Unreadable(f"HTTP {response.status_code}")
            kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "text/event-stream":
                raise Unreadable(f"no event stream, but {kind[:100]!r}")
            self.at_work = True
            self._known.set()
            self._runtime.wakeups.wake("role", self.name)
            log.info("stream.connected", provider=self._name)
            await self._store.predictions.hasten(self._name, self._runtime.clock())
            self._runtime.wakeups.wake_all("poll")
            events = Events(self._last_id)
            async for chunk in response.aiter_bytes():
                for event, data in events.feed(chunk):
                    await self._take(event, data)
                self._last_id = events.last_id
        finally:
            await response.aclose()

    async def _take(self, event: str, data: str) -> None:
        try:
            outcome = self._provider.streamed(event, data)
            if outcome is not None:
                await self._inbox.stream_event(self._name, outcome, data.encode("utf-8", "replace"))
        except (Unreadable, Unproved) as error:
            log.warning("stream.unknown", provider=self._name, reason=str(error))
