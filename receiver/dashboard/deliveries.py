"""Deliveries: dead letters and the others, with their attempts; and what reached no handler."""

from __future__ import annotations

import msgspec

from receiver.dashboard.declare import View, action, page
from receiver.dashboard.filters import PAGE, asked
from receiver.dashboard.parts import Parts
from receiver.dashboard.visit import Visit
from receiver.http.declare import DeliveryId
from receiver.http.routes.deliveries import DeliveriesAsked, DeliveryRoutes
from receiver.http.routes.discarded import DiscardedQuery
from receiver.store.discarded import KINDS


class DeliveryPages:
    """The pages about deliveries."""

    def __init__(self, parts: Parts) -> None:
        self._routes = DeliveryRoutes(parts.store.deliveries, parts.runtime)
        self._discarded = parts.store.discarded

    @page("/deliveries")
    async def deliveries(self, visit: Visit) -> View:
        """List dead letters, or deliveries in another state."""
        given = {"state": "dead", **visit.query}
        query = asked(given, DeliveriesAsked, limit=PAGE)
        found = await self._routes.list_deliveries(query)
        states = ("dead", "skipped", "pending", "running", "done")
        return View("deliveries.html", {"found": found, "asked": query, "states": states})

    @action("/deliveries/{id}/retry", "retry")
    async def retry(self, id: DeliveryId) -> None:
        await self._routes.retry(id)

    @page("/discarded")
    async def discarded(self, visit: Visit) -> View:
        query = asked(visit.query, DiscardedQuery, limit=PAGE)
        given = msgspec.structs.asdict(query)
        found = await self._discarded.page(given.pop("limit"), **given)
        return View("discarded.html", {"found": found, "asked": query, "kinds": KINDS})
