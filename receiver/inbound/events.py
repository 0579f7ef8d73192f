"""`/v1/events`: the events there were, newest first, and the live stream of all that happens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Final, Protocol

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from receiver.errors import Problem, StoreUnavailable
from receiver.feed import PREFIX, Wanted
from receiver.inbound.answers import as_json
from receiver.inbound.guard import Guard
from receiver.inbound.reading import page_size, place, query
from receiver.model import TERMINAL, Announcement, Status
from receiver.store.journal import Move
from receiver.store.values import Found

_METADATA: Final = "metadata."
_MOST_LOOKED_AT: Final = 2000
"""Events that one request looks through; a page may hold fewer than were asked for."""
_ENDS: Final = tuple(status for status in Status if status in TERMINAL)
_MEDIA_TYPE: Final = "text/event-stream"
_HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Reads(Protocol):
    """What the list needs of the journal."""

    async def events_below(self, place: int | None) -> list[Move]: ...
    async def events(self, prediction_ids: Sequence[str]) -> Mapping[str, Announcement]: ...


class Live(Protocol):
    """What the stream needs of the feed."""

    def read(self, after: int | None, wanted: Wanted) -> AsyncGenerator[bytes]: ...


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
        params = query(request, "type", "provider", "limit", "cursor", prefix=_METADATA)
        wanted = _wanted(params, _ENDS)
        limit = page_size(params["limit"])
        found, below = await self._look(wanted, limit, place("cursor", params["cursor"]))
        events = await self._journal.events([move.prediction_id for move in found])
        data = [events[move.prediction_id] for move in found if move.prediction_id in events]
        return as_json(Found(data=data, next_cursor=None if below is None else str(below)))

    async def _look(
        self, wanted: Wanted, limit: int, below: int | None
    ) -> tuple[list[Move], int | None]:
        """Look for events, for so long; give where to go on, or None where there are no more."""
        found: list[Move] = []
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
        params = query(request, "type", "provider", prefix=_METADATA)
        after = place("Last-Event-ID", request.headers.get("last-event-id") or None)
        wanted = _wanted(params, tuple(Status))
        if request.method == "HEAD":
            return Response(media_type=_MEDIA_TYPE, headers=_HEADERS)
        frames = self._feed.read(after, wanted)
        # What speaks against it is said before the stream has begun.
        first = await anext(frames, b"")
        return StreamingResponse(_frames(first, frames), media_type=_MEDIA_TYPE, headers=_HEADERS)


async def _frames(first: bytes, more: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """Give frames until there are no more, or none to be had: the reader comes back."""
    async with aclosing(more):
        yield first
        with suppress(StoreUnavailable):
            async for frame in more:
                yield frame


def _wanted(params: Mapping[str, str | None], statuses: Sequence[Status]) -> Wanted:
    types = [kind.removeprefix(PREFIX) for kind in _texts(params["type"])]
    if unknown := sorted(set(types) - set(statuses)):
        raise Problem(
            422,
            "invalid-request",
            f"unknown type {', '.join(unknown)}: use {', '.join(PREFIX + s for s in statuses)}",
        )
    return Wanted(
        statuses=frozenset(types or statuses),
        providers=frozenset(_texts(params["provider"])),
        metadata={
            name.removeprefix(_METADATA): value or ""
            for name, value in params.items()
            if name.startswith(_METADATA)
        },
    )


def _texts(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]
