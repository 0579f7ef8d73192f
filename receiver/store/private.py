"""Private content of predictions: stored encrypted for their handlers, and deleted after them.

It is deleted after the last delivery, by an erase, and by retention: if it has expired, if no
handler matched the event, and if the process died before deleting it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from receiver.store.engine import Engine
from receiver.store.statement import Run, Statements, Steps

sql: Final = Statements("private")

_NEVER: Final = -1.0
"""A time before which no prediction was created."""


class PrivateContent:
    """The private content in one store."""

    def __init__(self, store: Engine) -> None:
        self._store = store

    async def empty(self, before: float, most: int) -> int:
        """Delete content from before `before` or no longer needed; return how many were found."""
        rows = await self._store.read(sql.select_spent, before=before, most=most)
        if rows:
            await self._store.write(empty, ([row["id"] for row in rows], before))
        return len(rows)

    async def empty_after(self, prediction_id: str) -> None:
        """Delete the content of a prediction if its handlers have all ended."""
        await self._store.write(empty, ([prediction_id], _NEVER))


def empty(items: Sequence[tuple[Sequence[str], float]]) -> Steps[list[None]]:
    for predictions, before in items:
        yield Run(sql.empty_spent, {"before": before}, [(name,) for name in predictions])
    return [None] * len(items)
