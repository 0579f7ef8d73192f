"""The overview: running and failed predictions, backlog, costs of today, and manual actions."""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from receiver.dashboard.context import PageContext
from receiver.dashboard.declare import View, page
from receiver.dashboard.filters import PAGE, read_query
from receiver.http.parts import Parts
from receiver.http.routes.costs import CostRoutes, CostsAsked
from receiver.model.values import Status, utc
from receiver.providers import NAMES
from receiver.store.search import Wanted

_DAY: Final = 86400.0
_MAX_COUNTED: Final = 3000
"""Maximum number of a day's predictions that are counted."""
_LATEST: Final = 8


class AuditQuery(msgspec.Struct, frozen=True):
    """Where the list of actions continues."""

    cursor: Annotated[str, Meta(pattern="^act_[0-9a-f]{32}$")] | None = None


class OverviewPage:
    """The first page, and the list of all manual actions."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._costs = CostRoutes(parts)

    @page("/")
    async def overview(self, context: PageContext) -> View:
        search = self._store.search
        backlog, recent, latest, failures, audit, today = await asyncio.gather(
            self._store.backlog.few(NAMES),
            search.recent(context.now - _DAY, _MAX_COUNTED),
            search.page(Wanted(limit=_LATEST)),
            search.page(Wanted(status=Status.FAILED, limit=_LATEST)),
            self._store.audit.page(_LATEST),
            self._costs.costs(CostsAsked(since=utc(context.now).date())),
        )
        living = {
            status: sum(n for (_, each), n in backlog.living.items() if each == status)
            for status in ("queued", "submitting", "processing", "unconfirmed")
        }
        values = {
            "backlog": backlog,
            "living": living,
            "recent": recent,
            "counted_all": sum(recent.values()) < _MAX_COUNTED,
            "most": _MAX_COUNTED,
            "latest": latest.data,
            "failures": failures.data,
            "audit": audit.data,
            "today": today.total,
            "pending": sum(backlog.of_handlers().values()),
        }
        return View("overview.html", values)

    @page("/audit")
    async def audit(self, context: PageContext) -> View:
        query = read_query(context.query, AuditQuery)
        return View("audit.html", {"found": await self._store.audit.page(PAGE, query.cursor)})
