"""`/v1/events`: the events there were, newest first, and the live stream of all that happens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Annotated, Final, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from receiver.http.auth import Guard
from receiver.http.body import free, parameters, wishes
from receiver.http.declare import Answer, Content, Endpoint, PageSize, Place
from receiver.http.live import PREFIX, Change, Moved, StreamFilter, frame
from receiver.http.problems import as_json
from receiver.model.errors import StoreUnavailable
from receiver.model.states import TERMINAL
from receiver.model.values import Announcement, Status, utc
from receiver.providers import NAMES
from receiver.store.changes import StatusChange
from receiver.store.values import Page

_METADATA: Final = "metadata."
_MOST_LOOKED_AT: Final = 2000
"""Events that one request looks through; a page may hold fewer than were asked for."""
_STATUSES: Final = tuple(Status)
_ENDS: Final = tuple(status for status in Status if status in TERMINAL)
_MEDIA_TYPE: Final = "text/event-stream"
_HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def _list_of(words: Sequence[str], before: str = "") -> msgspec.Meta:
    one = f"{before}({'|'.join(words)})"
    return msgspec.Meta(pattern=f"^{one}(,{one})*$", examples=list(words))


def _types(statuses: Sequence[Status]) -> msgspec.Meta:
    return _list_of(statuses, r"(prediction\.)?")


class Reads(Protocol):
    """What the list needs of the journal."""

    async def events_below(self, place: int | None) -> list[StatusChange]: ...
    async def events(self, prediction_ids: Sequence[str]) -> Mapping[str, Announcement]: ...


class Live(Protocol):
    """What the stream needs of the feed."""

    async def now(self) -> int: ...
    def read(self, after: int, wanted: StreamFilter) -> AsyncGenerator[bytes]: ...


class StreamAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to hear of."""

    type: Annotated[str, _types(_STATUSES)] | None = None
    """One or several by comma, with or without `prediction.` before them."""
    provider: Annotated[str, _list_of(NAMES)] | None = None
    """One or several by comma."""


class EventsAsked(StreamAsked, frozen=True, forbid_unknown_fields=True):
    """Which events to list."""

    type: Annotated[str, _types(_ENDS)] | None = None
    """One or several by comma, with or without `prediction.` before them."""
    limit: PageSize = 50
    cursor: Place | None = None
    """The `next_cursor` of the page before."""


class Resuming(msgspec.Struct, frozen=True, rename={"last": "Last-Event-ID"}):
    """Where to go on."""

    last: Annotated[str, msgspec.Meta(pattern="^[0-9]{0,18}$", examples=["1207"])] | None = None
    """The `id` of the last message that was read; 0: all there is. Without it: from now on."""


class Events:
    """The routes about events."""

    def __init__(self, guard: Guard, journal: Reads, feed: Live) -> None:
        self._guard = guard
        self._journal = journal
        self._feed = feed

    def routes(self) -> list[Route]:
        route = self._guard.route
        return [
            route("/v1/events", GET=self.list_events),
            route("/v1/events/stream", GET=self.stream),
        ]

    async def list_events(self, request: Request) -> Response:
        asked = parameters(request, EventsAsked, apart=_METADATA)
        wanted = _wanted(request, asked, _ENDS)
        below = None if asked.cursor is None else int(asked.cursor)
        found, below = await self._look(wanted, asked.limit, below)
        events = await self._journal.events([move.prediction_id for move in found])
        data = [events[move.prediction_id] for move in found if move.prediction_id in events]
        return as_json(Page(data=data, next_cursor=None if below is None else str(below)))

    async def _look(
        self, wanted: StreamFilter, limit: int, below: int | None
    ) -> tuple[list[StatusChange], int | None]:
        """Look for events, for so long; give where to go on, or None where there are no more."""
        found: list[StatusChange] = []
        looked_at = 0
        while looked_at < _MOST_LOOKED_AT:
            page = await self._journal.events_below(below)
            for move in page:
                if move in wanted:
                    if len(found) == limit:
                        return found, below
                    found.append(move)
                below = move.seq
            looked_at += len(page)
            if not page:
                return found, None
        return found, below

    async def stream(self, request: Request) -> Response:
        wanted = _wanted(request, parameters(request, StreamAsked, apart=_METADATA), _STATUSES)
        after = wishes(request, Resuming).last
        if request.method == "HEAD":
            return Response(media_type=_MEDIA_TYPE, headers=_HEADERS)
        begins = int(after) if after else await self._feed.now()
        frames = self._feed.read(begins, wanted)
        # What speaks against it is said before the stream has begun.
        first = await anext(frames, b"")
        # Whoever loses the connection before the first message knows where that would have been.
        headers = {**_HEADERS, "Last-Event-ID": str(begins)}
        return StreamingResponse(_frames(first, frames), media_type=_MEDIA_TYPE, headers=headers)


async def _frames(first: bytes, more: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """Give frames until there are no more, or none to be had: the reader comes back."""
    async with aclosing(more):
        yield first
        with suppress(StoreUnavailable):
            async for frame in more:
                yield frame


def _wanted(request: Request, asked: StreamAsked, statuses: Sequence[Status]) -> StreamFilter:
    types = (asked.type or "").replace(PREFIX, "")
    return StreamFilter(
        statuses=frozenset(types.split(",") if types else statuses),
        providers=frozenset(asked.provider.split(",") if asked.provider else ()),
        metadata=free(request, _METADATA),
    )


_NO_END: Final = Change(
    type="prediction.processing",
    time=utc(1769860800),
    prediction=Moved(
        id="pred_0199f3a6d2c1e45b7f1c9d3e8a260f4b",
        provider="fal",
        model="fal-ai/nano-banana",
        status=Status.PROCESSING,
        metadata={"channel": "#art"},
    ),
)
_FREE: Final = (
    "`metadata.NAME=VALUE` wants predictions whose metadata has this; JSON as it is written."
)
OPERATIONS: Final = (
    Endpoint(
        "GET",
        "/v1/events",
        "List events, newest first",
        (
            Answer(
                200,
                "a page of events; it may hold fewer than `limit`: go on by `next_cursor`",
                Content(Page[Announcement]),
            ),
        ),
        ("invalid-request",),
        detail=_FREE,
        query=EventsAsked,
        free=_METADATA,
    ),
    Endpoint(
        "GET",
        "/v1/events/stream",
        "Follow what happens, live: every event, and every other change of a status",
        (
            Answer(
                200,
                "server-sent events, without an end; `id` is a place, `event` a type, `data` JSON",
                Content(str, frame(_NO_END.type, 1207, _NO_END).decode(), _MEDIA_TYPE),
                headers=("Last-Event-ID",),
            ),
        ),
        ("invalid-request", "too-many-readers"),
        detail=(
            "With `Last-Event-ID` it goes on after that place, without a gap or a repeat. Where "
            "what came after it is not there any more, the first event is `stream.gap`. "
        )
        + _FREE,
        query=StreamAsked,
        headers=Resuming,
        free=_METADATA,
    ),
)
