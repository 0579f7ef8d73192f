"""The pages of bulk replays, which are counted first, then started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from receiver.dashboard.context import PageContext
from receiver.dashboard.declare import View, action, page
from receiver.dashboard.filters import PAGE, metadata, read_query
from receiver.http.declare import ReplayId
from receiver.http.parts import Parts
from receiver.http.routes.replays import ReplayRoutes, ReplaysAsked
from receiver.model.answers import Selection
from receiver.model.errors import Problem
from receiver.providers import NAMES


class ReplayPages:
    """The pages about replays."""

    def __init__(self, parts: Parts) -> None:
        self._routes = ReplayRoutes(parts)
        self._registry = parts.deliveries.registry

    @page("/replays")
    async def replays(self, context: PageContext) -> View:
        found = await self._routes.list_replays(read_query(context.query, ReplaysAsked, limit=PAGE))
        values = {
            "found": found,
            "providers": NAMES,
            "handlers": list(self._registry.handlers),
            "query": context.query,
        }
        return View("replays.html", values)

    @page("/replays/{id}")
    async def replay(self, id: ReplayId) -> View:
        return View("replay.html", {"replay": await self._routes.read(id)})

    @action("/replays", "count replay")
    async def count(self, context: PageContext) -> str:
        counted = await self._routes.count(_selection(context.form))
        return f"/replays/{counted.value.id}"

    @action("/replays/{id}/start", "start replay")
    async def start(self, id: ReplayId) -> None:
        await self._routes.start(id)

    @action("/replays/{id}/cancel", "cancel replay")
    async def cancel(self, id: ReplayId) -> None:
        await self._routes.cancel(id)


def _selection(form: Mapping[str, str]) -> Selection:
    """Return the selection of a form; times without a zone are in UTC."""
    given: dict[str, Any] = {
        name: form[name].strip()
        for name in Selection.__struct_fields__
        if name != "metadata" and form.get(name, "").strip()
    }
    for name in ("since", "until"):
        if name in given and not given[name].endswith("Z"):
            given[name] += "Z" if "T" in given[name] else "T00:00Z"
        if name in given and given[name].count(":") == 1:
            given[name] = given[name].removesuffix("Z") + ":00Z"
    if by := metadata(form):
        given["metadata"] = by
    try:
        return msgspec.convert(given, Selection)
    except msgspec.ValidationError as error:
        raise Problem(422, "invalid-request", str(error)) from None
