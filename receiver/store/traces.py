"""The traces of predictions: each is the W3C traceparent of the span that submitted one."""

from __future__ import annotations

from typing import Final

from receiver.store.dialect import Query, Reads

_SELECT_TRACE: Final = Query("SELECT trace FROM predictions WHERE id = :id")


class Traces:
    """Reads back what a prediction was created with."""

    def __init__(self, store: Reads) -> None:
        self._store = store

    async def of(self, prediction_id: str) -> str | None:
        """Give a prediction's trace; None where it has none. Raises StoreUnavailable."""
        rows = await self._store.read(_SELECT_TRACE, id=prediction_id)
        return rows[0][0] if rows else None
