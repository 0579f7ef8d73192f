"""The overview: what runs, what fails, what is held back, and what was done by hand."""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from receiver.dashboard.declare import View, page
from receiver.dashboard.filters import PAGE, asked
from receiver.dashboard.parts import Parts
from receiver.dashboard.visit import Visit
from receiver.http.routes.costs import CostRoutes, CostsAsked
from receiver.model.values import Status, utc
from receiver.providers import NAMES
from receiver.store.search import Wanted

_DAY: Final = 86400.0
_MOST: Final = 3000
"""Predictions of a day that are counted."""
_LATEST: Final = 8


class Asked(msgspec.Struct, frozen=True):
    """Where a list goes on."""

    cursor: Annotated[str, Meta(pattern="^act_[0-9a-f]{32}$")] | None = None


class OverviewPage:
    """The first page, and all that was done by hand."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._costs = CostRoutes(parts.store.costs, parts.settings.costs_by, parts.runtime.clock)

    @page("/")
    async def overview(self, visit: Visit) -> View:
        search = self._store.search
        backlog, recent, latest, failures, deeds, today = await asyncio.gather(
            self._store.backlog.few(NAMES),
            search.recent(visit.now - _DAY, _MOST),
            search.page(Wanted(limit=_LATEST)),
            search.page(Wanted(status=Status.FAILED, limit=_LATEST)),
            self._store.audit.page(_LATEST),
            self._costs.costs(CostsAsked(since=utc(visit.now).date())),
        )
        living = {
            status: sum(n for (_, each), n in backlog.living.items() if each == status)
            for status in ("queued", "submitting", "processing", "unconfirmed")
        }
        values = {
            "backlog": backlog,
            "living": living,
            "recent": recent,
            "counted_all": sum(recent.values()) < _MOST,
            "most": _MOST,
            "latest": latest.data,
            "failures": failures.data,
            "deeds": deeds.data,
            "today": today.total,
            "pending": sum(backlog.of_handlers().values()),
        }
        return View("overview.html", values)

    @page("/audit")
    async def audit(self, visit: Visit) -> View:
        query = asked(visit.query, Asked)
        return View("audit.html", {"found": await self._store.audit.page(PAGE, query.cursor)})
