"""Handlers: what is pending for each and its state; pause and resume."""

from __future__ import annotations

from receiver.dashboard.declare import View, action, page
from receiver.dashboard.parts import Parts
from receiver.dashboard.visit import Visit
from receiver.http.body import Nothing
from receiver.http.routes.handlers import HandlerRoutes


class HandlerPages:
    """The pages about handlers."""

    def __init__(self, parts: Parts) -> None:
        self._routes = HandlerRoutes(parts.store, parts.deliveries, parts.runtime, counts_few=True)
        self._registry = parts.deliveries.registry

    @page("/handlers")
    async def handlers(self) -> View:
        found = await self._routes.list_handlers(Nothing())
        values = {"handlers": found.data, "registered": self._registry.handlers}
        return View("handlers.html", values)

    @action("/handlers/pause", "pause")
    async def pause(self, visit: Visit) -> None:
        await self._routes.pause(visit.form.get("name", ""))

    @action("/handlers/resume", "resume")
    async def resume(self, visit: Visit) -> None:
        await self._routes.resume(visit.form.get("name", ""))
