"""The pages of deliveries (dead letters and others) with their attempts, and of discarded items."""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias, get_args

import msgspec
from msgspec import Meta

from receiver.dashboard.context import PageContext
from receiver.dashboard.declare import View, action, page
from receiver.dashboard.filters import PAGE, read_query
from receiver.http.declare import DeliveryId, HandlerName
from receiver.http.parts import Parts
from receiver.http.routes.deliveries import DeliveriesAsked, DeliveryRoutes
from receiver.model.answers import Kind
from receiver.store.discarded import CURSOR, KINDS
from receiver.store.search import Found

State: TypeAlias = Literal["dead", "skipped", "pending", "running"]
STATES: Final = get_args(State)
"""The states that can be listed; done deliveries are on the pages of their predictions."""


class DeliveryQuery(msgspec.Struct, frozen=True):
    """Which deliveries to show."""

    state: State = "dead"
    handler: HandlerName | None = None
    cursor: DeliveryId | None = None


class DiscardedQuery(msgspec.Struct, frozen=True):
    """Which discarded items to show."""

    kind: Kind | None = None
    cursor: Annotated[str, Meta(pattern=CURSOR.pattern)] | None = None


class DeliveryPages:
    """The pages about deliveries."""

    def __init__(self, parts: Parts) -> None:
        self._routes = DeliveryRoutes(parts)
        self._search = parts.store.search
        self._discarded = parts.store.discarded

    @page("/deliveries")
    async def deliveries(self, context: PageContext) -> View:
        """List dead letters, or deliveries in another state."""
        query = read_query(context.query, DeliveryQuery)
        match query.state:
            case "running":
                page = await self._routes.list_deliveries(DeliveriesAsked(state="running"))
                found = Found(data=page.data, next_cursor=page.next_cursor)
            case "pending":
                first = await self._search.pending(query.handler, PAGE)
                found = Found(data=first, next_cursor=None)
            case failed:
                found = await self._search.failed(failed, query.handler, query.cursor, PAGE)
        return View("deliveries.html", {"found": found, "query": query, "states": STATES})

    @action("/deliveries/{id}/retry", "retry")
    async def retry(self, id: DeliveryId) -> None:
        await self._routes.retry(id)

    @page("/discarded")
    async def discarded(self, context: PageContext) -> View:
        query = read_query(context.query, DiscardedQuery)
        found = await self._discarded.page(PAGE, kind=query.kind, cursor=query.cursor)
        return View("discarded.html", {"found": found, "query": query, "kinds": KINDS})
