"""The page of handlers: their states and pending deliveries; pause and resume."""

from __future__ import annotations

from receiver.dashboard.context import PageContext
from receiver.dashboard.declare import View, action, page
from receiver.http.parts import Parts
from receiver.http.routes.handlers import HandlerRoutes


class HandlerPages:
    """The pages about handlers."""

    def __init__(self, parts: Parts) -> None:
        self._routes = HandlerRoutes(parts, counts_few=True)
        self._registry = parts.deliveries.registry

    @page("/handlers")
    async def handlers(self) -> View:
        found = await self._routes.list_handlers()
        values = {"handlers": found.data, "registered": self._registry.handlers}
        return View("handlers.html", values)

    @action("/handlers/pause", "pause")
    async def pause(self, context: PageContext) -> None:
        await self._routes.pause(context.form.get("name", ""))

    @action("/handlers/resume", "resume")
    async def resume(self, context: PageContext) -> None:
        await self._routes.resume(context.form.get("name", ""))
