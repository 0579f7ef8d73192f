"""The routes `/v1/deliveries`: list deliveries, and retry one."""

from __future__ import annotations

import msgspec

from receiver.http.declare import (
    DeliveryId,
    HandlerName,
    PageSize,
    PredictionId,
    get,
    post,
)
from receiver.http.parts import Parts
from receiver.model.answers import Delivery, DeliveryState, Page
from receiver.model.errors import Problem


class DeliveriesAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which deliveries to list."""

    state: DeliveryState | None = None
    handler: HandlerName | None = None
    prediction: PredictionId | None = None
    limit: PageSize = 50
    cursor: DeliveryId | None = None
    """The `next_cursor` of the page before."""


class DeliveryRoutes:
    """The routes about deliveries."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store.deliveries
        self._runtime = parts.runtime

    @get("/v1/deliveries", "a page of deliveries", problems=["invalid-request"])
    async def list_deliveries(self, query: DeliveriesAsked) -> Page[Delivery]:
        """List deliveries, newest first.

        A delivery is one event for one handler, with its state, its attempts and the reason of the
        last one. `next_cursor` leads to the next page.
        """
        filters = msgspec.structs.asdict(query)
        return await self._store.page(filters.pop("limit"), **filters)

    @post(
        "/v1/deliveries/{id}/retry",
        {202: "it is pending again"},
        problems=["not-found", "not-retryable", "erased"],
        missing="no such delivery",
    )
    async def retry(self, id: DeliveryId) -> Delivery:
        """Retry a dead or skipped delivery, or a pending one at once.

        A delivery that is running or done is answered 409.
        """
        handler = await self._store.retry(id, self._runtime.clock())
        found = await self._store.page(1, id=id)
        if not found.data:
            raise Problem(404, "not-found", "no such delivery")
        if handler is None:
            if found.data[0].state in {"skipped", "dead"}:
                raise Problem(409, "erased", "its prediction was erased: there is nothing to run")
            raise Problem(
                409, "not-retryable", f"the delivery is {found.data[0].state}: nothing to retry"
            )
        self._runtime.wakeups.wake("handler", handler)
        return found.data[0]
