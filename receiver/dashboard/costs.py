"""The page of costs by day, provider, model, recipe, key or metadata."""

from __future__ import annotations

from typing import Final

from receiver.dashboard.context import PageContext
from receiver.dashboard.declare import View, page
from receiver.dashboard.filters import read_query
from receiver.http.parts import Parts
from receiver.http.routes.costs import CostRoutes, CostsAsked

GROUPS: Final = ("day", "provider", "model", "recipe", "key")


class CostPages:
    """The page about costs."""

    def __init__(self, parts: Parts) -> None:
        self._by = parts.settings.costs_by
        self._routes = CostRoutes(parts)

    @page("/costs")
    async def costs(self, context: PageContext) -> View:
        query = read_query(context.query, CostsAsked)
        found = await self._routes.costs(query)
        values = {
            "found": found,
            "groups": [*GROUPS, *(f"metadata.{name}" for name in self._by)],
            "by": query.by,
            "names": query.by.split(","),
            "most": max((row.amount for row in found.data), default=0.0) or 1.0,
        }
        return View("costs.html", values)
