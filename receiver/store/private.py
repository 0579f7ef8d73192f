"""Private content of predictions: kept encrypted for their handlers, and emptied after them.

It is emptied by the settlement of the last delivery, by an erase, and by retention: where it has
expired, where no handler wanted the event, and where the last two ended at once.
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


def empty(items: Sequence[tuple[Sequence[str], float]]) -> Steps[list[None]]:
    for predictions, before in items:
        yield from empty_spent(predictions, before)
    return [None] * len(items)


def empty_spent(predictions: Sequence[str], before: float = _NEVER) -> Steps[None]:
    """Empty the private content of those predictions whose handlers have all ended."""
    yield Run(sql.empty_spent, {"before": before}, [(name,) for name in predictions])
