"""Private content of predictions: kept encrypted for their handlers, and emptied after them.

It is emptied after the last delivery, by an erase, and by retention: where it has expired, where no
handler wanted the event, and where the process died before it came to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from receiver.store.engine import Engine
from receiver.store.statement import Run, Statements, Steps

sql: Final = Statements("private")

_NEVER: Final = -1.0
"""A time before which nothing was created."""


class PrivateContent:
    """The private content in one store."""

    def __init__(self, store: Engine) -> None:
        self._store = store

    async def empty(self, before: float, most: int) -> int:
        """Empty what was created before then, or is needed no more; return how many were found."""
        rows = await self._store.read(sql.select_spent, before=before, most=most)
        if rows:
            await self._store.write(empty, ([row["id"] for row in rows], before))
        return len(rows)

    async def empty_after(self, prediction_id: str) -> None:
        """Empty a prediction's, if its handlers have all ended."""
        await self._store.write(empty, ([prediction_id], _NEVER))


def empty(items: Sequence[tuple[Sequence[str], float]]) -> Steps[list[None]]:
    for predictions, before in items:
        yield Run(sql.empty_spent, {"before": before}, [(name,) for name in predictions])
    return [None] * len(items)
