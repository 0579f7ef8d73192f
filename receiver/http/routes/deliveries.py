"""`/v1/deliveries`: what is owed, done and dead; try again; and `/v1/drain`: run what is due."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Final, Literal, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.http.auth import Guard
from receiver.http.body import named, parameters
from receiver.http.declare import (
    Answer,
    Content,
    DeliveryId,
    Endpoint,
    HandlerName,
    PageSize,
    PredictionId,
)
from receiver.http.drain import Drained
from receiver.http.problems import as_json
from receiver.model.errors import Problem
from receiver.store.values import AttemptRecord, Delivery, Page

_LONGEST_DRAIN: Final = 900
"""Seconds; serverless platforms end a request after so many at the latest."""


class Reads(Protocol):
    """What these routes need of the store."""

    async def deliveries(self, limit: int, **given: str | None) -> Page[Delivery]: ...
    async def retry(self, delivery_id: str, now: float) -> str | None: ...


class DeliveriesAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which deliveries to list."""

    state: Literal["pending", "running", "done", "skipped", "dead"] | None = None
    handler: HandlerName | None = None
    prediction: PredictionId | None = None
    limit: PageSize = 50
    cursor: DeliveryId | None = None
    """The `next_cursor` of the page before."""


class DrainAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to drain."""

    seconds: Annotated[int, msgspec.Meta(ge=1, le=_LONGEST_DRAIN)] = 25
    """For how long at most."""


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
        asked = msgspec.structs.asdict(parameters(request, DeliveriesAsked))
        return as_json(await self._store.deliveries(asked.pop("limit"), **asked))

    async def retry(self, request: Request) -> Response:
        missing = Problem(404, "not-found", "no such delivery")
        delivery_id = named(request, "id", DeliveryId, missing)
        handler = await self._store.retry(delivery_id, self._clock())
        found = await self._store.deliveries(1, id=delivery_id)
        if not found.data:
            raise missing
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
        return as_json(await self._drain(parameters(request, DrainAsked).seconds))


_EXAMPLE: Final = Delivery(
    id="dlv_0199f3a6d2c1e45b7f1c9d3e8a260f4b5c1d0e2f",
    event_id="evt_0199f3a6d2c1e45b7f1c9d3e8a260f4b",
    prediction_id="pred_0199f3a6d2c1e45b7f1c9d3e8a260f4b",
    handler="forward",
    state="dead",
    attempts=1,
    round=0,
    replay_id=None,
    reason="HTTP 410: gone",
    created_at="2026-01-31T12:00:03.600000Z",
    due_at=None,
    ended_at="2026-01-31T12:00:03.900000Z",
    history=[
        AttemptRecord(
            number=1,
            started_at="2026-01-31T12:00:03.610000Z",
            ended_at="2026-01-31T12:00:03.900000Z",
            result="dead",
            reason="HTTP 410: gone",
            note="",
        )
    ],
)
OPERATIONS: Final = (
    Endpoint(
        "GET",
        "/v1/deliveries",
        "List what is owed, done and dead, newest first",
        (
            Answer(
                200,
                "a page of deliveries",
                Content(Page[Delivery], Page(data=[_EXAMPLE], next_cursor=None)),
                leads_to=("postDeliveriesIdRetry",),
            ),
        ),
        ("invalid-request",),
        query=DeliveriesAsked,
    ),
    Endpoint(
        "POST",
        "/v1/deliveries/{id}/retry",
        "Try a dead or skipped delivery again, or a waiting one at once",
        (
            Answer(
                202,
                "it is owed again",
                Content(Delivery, msgspec.structs.replace(_EXAMPLE, state="pending", attempts=0)),
            ),
        ),
        ("not-found", "not-retryable", "erased"),
        names={"id": DeliveryId},
    ),
    Endpoint(
        "POST",
        "/v1/drain",
        "Run what is due, and answer when that is done or the time is over",
        (
            Answer(
                200,
                "what was done",
                Content(Drained, Drained(deliveries=3, submits=1, polls=2, more=False)),
            ),
        ),
        ("invalid-request",),
        "For where a process only lives while it answers: have a scheduler call this.",
        query=DrainAsked,
    ),
)
