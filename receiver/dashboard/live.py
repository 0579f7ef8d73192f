"""The stream that notifies open pages of changes; a page then loads its content again."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Final

from starlette.responses import Response, StreamingResponse

from receiver.dashboard.context import PageContext
from receiver.dashboard.declare import page
from receiver.dashboard.filters import read_query
from receiver.dashboard.guard import LONGEST, Guard
from receiver.http.live import StreamFilter
from receiver.http.parts import Parts
from receiver.http.routes.events import MEDIA_TYPE, LiveAsked
from receiver.model.errors import StoreUnavailable

_PAUSE: Final = 0.5
"""Seconds between two messages to a page: it loads all its content again after each."""
_PLACE: Final = re.compile(r"[0-9]{1,18}", re.ASCII)
_PLACES: Final = re.compile(rb"^id: ([0-9]+)$", re.MULTILINE)
_CHANGED: Final = b"event: changed\ndata: \n\n"
_HEADERS: Final = {"X-Accel-Buffering": "no"}


class LivePage:
    """The stream that pages listen to."""

    def __init__(self, parts: Parts, guard: Guard) -> None:
        self._live = parts.live
        self._changes = parts.store.changes
        self._guard = guard
        self._clock = parts.runtime.clock

    @page("/live", is_part=True)
    async def live(self, context: PageContext) -> Response:
        """Stream a message after each change, of one prediction or any, while the sign-in lasts."""
        query = read_query(context.query, LiveAsked)
        wanted = StreamFilter(prediction=query.prediction, deliveries=True)
        if context.request.method == "HEAD":  # a stream would not end
            return Response(headers=_HEADERS, media_type=MEDIA_TYPE)
        after = context.request.headers.get("last-event-id") or context.query.get("after", "")
        begins = int(after) if _PLACE.fullmatch(after) else await self._changes.end()
        frames = self._live.read(begins, wanted)
        first = await anext(frames, b"")  # errors come before the response begins
        began = context.session.at if context.session else 0
        return StreamingResponse(
            _messages(first, frames, began + LONGEST - self._clock()),
            headers=_HEADERS,
            media_type=MEDIA_TYPE,
        )


async def _messages(
    first: bytes, frames: AsyncGenerator[bytes], seconds: float
) -> AsyncIterator[bytes]:
    """Yield one message for all changes within half a second, for at most `seconds`."""
    until = asyncio.get_running_loop().time() + seconds
    async with aclosing(frames):
        yield b": open\n\n" if first else b""
        with suppress(StoreUnavailable, TimeoutError, StopAsyncIteration):
            while True:
                async with asyncio.timeout_at(until):
                    frame = await anext(frames)
                places = _PLACES.findall(frame)
                yield b"id: %b\n%b" % (places[-1], _CHANGED) if places else frame
                await asyncio.sleep(_PAUSE)
