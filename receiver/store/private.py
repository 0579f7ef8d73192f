"""Private content of predictions: stored encrypted for their handlers, and deleted after them.

It is deleted after the last delivery, by an erase, and by retention: if it has expired, if no
handler matched the event, and if the process died before deleting it.
"""

from __future__ import annotations

from typing import Final

from receiver.store.engine import Repository
from receiver.store.statement import Statements

sql: Final = Statements("private")

_NEVER: Final = -1.0
"""A time before which no prediction was created."""


class PrivateContent(Repository):
    """The private content in one store."""

    async def empty(self, before: float, most: int) -> int:
        """Delete content from before `before` or no longer needed; return how many were found."""
        rows = await self._store.read(sql.select_spent, before=before, most=most)
        if rows:
            await self._store.run(sql.empty_spent, [(row["id"],) for row in rows], before=before)
        return len(rows)

    async def empty_after(self, prediction_id: str) -> None:
        """Delete the content of a prediction if its handlers have all ended."""
        await self._store.run(sql.empty_spent, [(prediction_id,)], before=_NEVER)
