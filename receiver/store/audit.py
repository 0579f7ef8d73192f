"""The audit trail: who did what by hand, one row for each action."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

import msgspec

from receiver.model.answers import Page
from receiver.model.ids import oldest_id
from receiver.model.values import utc
from receiver.store.engine import Repository
from receiver.store.paging import listed, page_of
from receiver.store.statement import Statements

sql: Final = Statements("audit")


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One action of a person."""

    id: str
    at: float
    who: str
    """The name of the key."""
    client: str
    """The address of the client."""
    action: str
    target: str
    """The id or name of the object of the action."""
    result: str | None = None
    """`done`, or the type of the problem; None: it is under way, or its process died."""

    @property
    def time(self) -> datetime:
        return utc(self.at)


class Audit(Repository):
    """The audit trail of one store."""

    async def begin(self, entry: AuditEntry) -> None:
        """Record an action before it is done."""
        params: dict[str, Any] = msgspec.structs.asdict(entry)
        del params["result"]
        await self._store.run(sql.begin, **params)

    async def end(self, entry_id: str, result: str) -> None:
        """Record the result of an action."""
        await self._store.run(sql.end, id=entry_id, result=result)

    async def page(self, limit: int, cursor: str | None = None) -> Page[AuditEntry]:
        """Return a page of actions, newest first."""
        rows = await listed(self._store, sql.lists["list"], {"cursor": cursor}, limit)
        return page_of([AuditEntry(**row) for row in rows], limit)

    async def forget(self, before: float, most: int) -> None:
        """Delete actions from before `before`, `most` at most."""
        await self._store.run(sql.forget, before=oldest_id("act", before), most=most)
