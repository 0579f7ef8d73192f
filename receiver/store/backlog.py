"""What is pending and what is under way, counted; at a cost that does not grow with either."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Final

import msgspec

from receiver.model.states import TERMINAL
from receiver.model.values import Status
from receiver.store.engine import Engine
from receiver.store.statement import Statements

sql: Final = Statements("backlog")

LIVING: Final = tuple(status for status in Status if status not in TERMINAL)


class Backlog(msgspec.Struct, frozen=True):
    """How much there is to do."""

    pending: dict[tuple[str, str], int]
    """Deliveries by handler and state, `pending` or `running`."""
    oldest: dict[str, float]
    """Since when the oldest of a handler's is pending, in unix seconds."""
    living: dict[tuple[str, str], int]
    """Predictions by provider and status."""
    held: dict[str, str]
    """Handlers whose deliveries wait: `paused` by hand, or `open` after a run of failures."""


class BacklogReader:
    """Counts in the database, and so the same in whatever process."""

    def __init__(self, store: Engine) -> None:
        self._store = store

    async def depth(self, providers: Sequence[str]) -> Backlog:
        """Count all of it. Raises StoreUnavailable."""
        pending: dict[tuple[str, str], int] = {}
        oldest: dict[str, float] = {}
        for state, query in (("pending", sql.pending), ("running", sql.running)):
            for handler, count, since in await self._store.read(query):
                pending[handler, state] = count
                if since is not None:
                    oldest[handler] = min(since, oldest.get(handler, since))
        rows = await self._store.read(sql.living, list(product(providers, LIVING)))
        held = {row[0]: row[1] for row in await self._store.read(sql.held)}
        living = {(row[0], row[1]): row[2] for row in rows}
        return Backlog(pending, oldest, living, held)
