"""The route `/v1/discarded`: outcomes, callbacks and events that reached no handler."""

from __future__ import annotations

from typing import Annotated

import msgspec

from receiver.http.declare import PageSize, PredictionId, ProviderName, get
from receiver.http.parts import Parts
from receiver.model.answers import DiscardedItem, Kind, Page
from receiver.store.discarded import CURSOR


class DiscardedQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which discarded items to list."""

    kind: Kind | None = None
    provider: ProviderName | None = None
    prediction: PredictionId | None = None
    limit: PageSize = 50
    cursor: Annotated[str, msgspec.Meta(pattern=CURSOR.pattern)] | None = None
    """The `next_cursor` of the page before."""


class DiscardedRoutes:
    """The route about discarded items."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store.discarded

    @get("/v1/discarded", "a page of them", problems=["invalid-request"])
    async def list_discarded(self, query: DiscardedQuery) -> Page[DiscardedItem]:
        """List discarded items, the latest first.

        They reached no handler: duplicates, late and unknown outcomes, rejected callbacks, and
        events without a handler.
        """
        filters = msgspec.structs.asdict(query)
        return await self._store.page(filters.pop("limit"), **filters)
