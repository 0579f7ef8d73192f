"""The routes `/v1/events`: the list of events, newest first, and the live stream of changes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Annotated, Any, Final, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from receiver.http.declare import PageSize, Position, PredictionId, get
from receiver.http.live import PREFIX, StreamFilter
from receiver.http.parts import Parts
from receiver.model.answers import Page
from receiver.model.errors import StoreUnavailable
from receiver.model.states import TERMINAL
from receiver.model.values import Announcement, Status
from receiver.providers import NAMES
from receiver.store.changes import StatusChange

_MOST_LOOKED_AT: Final = 2000
"""Events that one request looks through; a page may hold fewer than its limit."""
_STATUSES: Final = tuple(Status)
_ENDS: Final = tuple(status for status in Status if status in TERMINAL)
MEDIA_TYPE: Final = "text/event-stream"
_HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def _list_of(words: Sequence[str], before: str = "") -> msgspec.Meta:
    one = f"{before}({'|'.join(words)})"
    return msgspec.Meta(pattern=f"^{one}(,{one})*$", examples=list(words))


def _types(statuses: Sequence[Status]) -> msgspec.Meta:
    return _list_of(statuses, r"(prediction\.)?")


class StreamAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which events and changes to return."""

    type: Annotated[str, _types(_STATUSES)] | None = None
    """One or several, separated by commas, with or without `prediction.` before them."""
    provider: Annotated[str, _list_of(NAMES)] | None = None
    """One or several, separated by commas."""


class LiveAsked(StreamAsked, frozen=True, forbid_unknown_fields=True):
    """Which events and changes to send live."""

    prediction: PredictionId | None = None
    deliveries: Literal["true", "false"] = "false"
    """`true`: also the end of every attempt of a handler, from now on, as `delivery.done`,
    `delivery.pending` (it failed and is retried), `delivery.skipped` or `delivery.dead`."""


class EventsAsked(StreamAsked, frozen=True, forbid_unknown_fields=True):
    """Which events to list."""

    type: Annotated[str, _types(_ENDS)] | None = None
    """One or several, separated by commas, with or without `prediction.` before them."""
    limit: PageSize = 50
    cursor: Position | None = None
    """The `next_cursor` of the page before."""


class Resuming(msgspec.Struct, frozen=True, rename={"last": "Last-Event-ID"}):
    """The place to resume from."""

    last: Annotated[str, msgspec.Meta(pattern="^[0-9]{0,18}$", examples=["1207"])] | None = None
    """The `id` of the last message that was read; 0: everything stored. Without it: from now on."""


class EventRoutes:
    """The routes about events.

    `metadata.NAME=VALUE` selects predictions whose metadata has this text, or value as JSON.
    """

    def __init__(self, parts: Parts) -> None:
        self._changes = parts.store.changes
        self._live = parts.live

    @get(
        "/v1/events",
        "a page of events; it may hold fewer than `limit`: go on by `next_cursor`",
        problems=["invalid-request"],
    )
    async def list_events(self, query: EventsAsked, metadata: dict[str, str]) -> Page[Announcement]:
        """List events, newest first."""
        wanted = _wanted(query, metadata, _ENDS)
        below = None if query.cursor is None else int(query.cursor)
        found, below = await self._look(wanted, query.limit, below)
        events = await self._changes.events([change.prediction_id for change in found])
        data = [events[change.prediction_id] for change in found if change.prediction_id in events]
        return Page(data=data, next_cursor=None if below is None else str(below))

    @get(
        "/v1/events/stream",
        "server-sent events, without an end; `id` is a place, `event` a type, `data` JSON",
        problems=["invalid-request", "too-many-readers"],
        sends=["Last-Event-ID"],
        media_type=MEDIA_TYPE,
    )
    async def stream(
        self, request: Request, query: LiveAsked, metadata: dict[str, str], headers: Resuming
    ) -> Response:
        """Stream every event, and every other change of a status, live.

        With `Last-Event-ID` it resumes after that place, without a gap or a repeat. If the changes
        after it are not stored any more, the first message is `stream.gap`. Then comes
        `stream.open`, whose `id` is the place where the stream begins. Ends of attempts are sent
        live only: `/v1/deliveries` has the earlier ones.
        """
        wanted = _wanted(
            query,
            metadata,
            _STATUSES,
            prediction=query.prediction,
            deliveries=query.deliveries == "true",
        )
        begins = int(headers.last) if headers.last else await self._changes.end()
        sent = {**_HEADERS, "Last-Event-ID": str(begins)}
        if request.method == "HEAD":
            return Response(media_type=MEDIA_TYPE, headers=sent)
        frames = self._live.read(begins, wanted)
        # Errors are raised before the response begins.
        first = await anext(frames, b"")
        return StreamingResponse(_frames(first, frames), media_type=MEDIA_TYPE, headers=sent)

    async def _look(
        self, wanted: StreamFilter, limit: int, below: int | None
    ) -> tuple[list[StatusChange], int | None]:
        """Look through a limited number of events; return where to go on, or None at the end."""
        found: list[StatusChange] = []
        looked_at = 0
        while looked_at < _MOST_LOOKED_AT:
            page = await self._changes.events_below(below)
            for change in page:
                if change in wanted:
                    if len(found) == limit:
                        return found, below
                    found.append(change)
                below = change.seq
            looked_at += len(page)
            if not page:
                return found, None
        return found, below


async def _frames(first: bytes, more: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """Yield frames until they end or the store is unavailable: then the reader reconnects."""
    async with aclosing(more):
        yield first
        with suppress(StoreUnavailable):
            async for frame in more:
                yield frame


def _wanted(
    query: StreamAsked,
    metadata: Mapping[str, str],
    statuses: Sequence[Status],
    **more: Any,
) -> StreamFilter:
    types = (query.type or "").replace(PREFIX, "")
    return StreamFilter(
        statuses=frozenset(types.split(",") if types else statuses),
        providers=frozenset(query.provider.split(",") if query.provider else ()),
        metadata=metadata,
        **more,
    )
