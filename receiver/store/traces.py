"""The traces of predictions: each is the W3C traceparent of the span that submitted one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

from receiver.store.dialect import Query, Row

_SELECT_TRACE: Final = Query("SELECT trace FROM predictions WHERE id = :id")


class Reads(Protocol):
    """What is needed of the store."""

    async def read(
        self, query: Query, rows: Sequence[Row] | None = None, **params: Any
    ) -> list[Row]: ...


class Traces:
    """Reads back what a prediction was created with."""

    def __init__(self, store: Reads) -> None:
        self._store = store

    async def of(self, prediction_id: str) -> str | None:
        """Give a prediction's trace; None where it has none. Raises StoreUnavailable."""
        rows = await self._store.read(_SELECT_TRACE, id=prediction_id)
        return rows[0][0] if rows else None
