"""Costs: what was spent, by day, provider, model, recipe or key."""

from __future__ import annotations

from typing import Final

from receiver.dashboard.declare import View, page
from receiver.dashboard.filters import asked
from receiver.dashboard.parts import Parts
from receiver.dashboard.visit import Visit
from receiver.http.routes.costs import CostRoutes, CostsAsked

GROUPS: Final = ("day", "provider", "model", "recipe", "key")


class CostPages:
    """The page about costs."""

    def __init__(self, parts: Parts) -> None:
        self._by = parts.settings.costs_by
        self._routes = CostRoutes(parts.store.costs, self._by, parts.runtime.clock)

    @page("/costs")
    async def costs(self, visit: Visit) -> View:
        query = asked(visit.query, CostsAsked)
        found = await self._routes.costs(query)
        values = {
            "found": found,
            "groups": [*GROUPS, *(f"metadata.{name}" for name in self._by)],
            "by": query.by,
            "names": query.by.split(","),
            "most": max((row.amount for row in found.data), default=0.0) or 1.0,
        }
        return View("costs.html", values)
