"""`/v1/deliveries`: what is owed, done and dead; try again; and `/v1/drain`: run what is due."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.errors import Problem
from receiver.inbound.answers import as_json
from receiver.inbound.guard import Guard
from receiver.inbound.reading import number, one_of, page_size, query
from receiver.store.values import Found

_DRAIN: Final = 25
_LONGEST_DRAIN: Final = 900
"""Seconds; serverless platforms end a request after so many at the latest."""
_STATES: Final = ("pending", "running", "done", "skipped", "dead")


class Reads(Protocol):
    """What these routes need of the store."""

    async def deliveries(self, limit: int, **given: str | None) -> Found: ...
    async def retry(self, delivery_id: str, now: float) -> str | None: ...


class Drained(msgspec.Struct, frozen=True):
    """What a drain has done: attempts ended, submits and looks at providers begun."""

    deliveries: int
    submits: int
    polls: int
    more: bool
    """The time was over before there was nothing left to do."""


class Deliveries:
    """The routes about deliveries."""

    def __init__(
        self,
        guard: Guard,
        store: Reads,
        *,
        wake: Callable[[tuple[str, ...]], None],
        drain: Callable[[float], Awaitable[Drained]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._guard = guard
        self._store = store
        self._wake = wake
        self._drain = drain
        self._clock = clock

    def routes(self) -> list[Route]:
        route = self._guard.route
        return [
            route("/v1/deliveries", GET=self.list_deliveries),
            route("/v1/deliveries/{id}/retry", POST=self.retry),
            route("/v1/drain", POST=self.drain),
        ]

    async def list_deliveries(self, request: Request) -> Response:
        params = query(request, "state", "handler", "prediction", "limit", "cursor")
        limit = page_size(params.pop("limit"))
        one_of("state", params["state"], _STATES)
        return as_json(await self._store.deliveries(limit, **params))

    async def retry(self, request: Request) -> Response:
        delivery_id = request.path_params["id"]
        handler = await self._store.retry(delivery_id, self._clock())
        found = await self._store.deliveries(1, id=delivery_id)
        if not found.data:
            raise Problem(404, "not-found", "no such delivery")
        if handler is None:
            if found.data[0].state in {"skipped", "dead"}:
                raise Problem(409, "erased", "its prediction was erased: there is nothing to run")
            raise Problem(
                409, "not-retryable", f"the delivery is {found.data[0].state}: nothing to retry"
            )
        self._wake((handler,))
        return as_json(found.data[0], 202)

    async def drain(self, request: Request) -> Response:
        """Run what is due and answer when that is done, or when the time is over."""
        text = query(request, "seconds")["seconds"]
        seconds = number("seconds", text, _DRAIN, _LONGEST_DRAIN)
        return as_json(await self._drain(seconds))
