"""What is owed and what is under way, counted; at a cost that does not grow with either."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Final

import msgspec

from receiver.model.states import TERMINAL
from receiver.model.values import Status
from receiver.store.dialect import Query, Reads

COUNTED: Final = 10_000
"""A count ends there: more is as bad. The age of so many is looked at, those due first."""
_HANDLERS: Final = 200

# From handler to handler by the index, however many deliveries each has. A delivery that is owed
# again after its end is as old as its due time, any other as its event.
_PENDING: Final = Query(f"""
WITH RECURSIVE h (name) AS (
    SELECT min(handler) FROM deliveries WHERE state = 'pending'
    UNION ALL
    SELECT (SELECT min(d.handler) FROM deliveries d
            WHERE d.state = 'pending' AND d.handler > h.name)
    FROM h WHERE h.name IS NOT NULL
)
SELECT h.name,
    (SELECT count(*) FROM (SELECT 1 FROM deliveries d
                           WHERE d.handler = h.name AND d.state = 'pending' LIMIT {COUNTED}) n),
    (SELECT min(CASE o.round WHEN 0 THEN o.created_at ELSE o.due_at END)
     FROM (SELECT d.round, d.created_at, d.due_at FROM deliveries d
           WHERE d.handler = h.name AND d.state = 'pending' ORDER BY d.due_at LIMIT {COUNTED}) o)
FROM h WHERE h.name IS NOT NULL LIMIT {_HANDLERS}
""")  # noqa: S608 - our own constants

_RUNNING: Final = Query("""
SELECT handler, count(*), min(CASE round WHEN 0 THEN created_at END) FROM deliveries
WHERE state = 'running' GROUP BY handler
""")

_LIVING: Final = Query(f"""
SELECT r.provider, r.status,
    (SELECT count(*) FROM (SELECT 1 FROM predictions p
                           WHERE p.provider = r.provider AND p.status = r.status
                             AND p.due_at IS NOT NULL
                           ORDER BY p.id LIMIT {COUNTED}) n)
FROM {{rows:provider text, status text}}
""")  # noqa: S608

_HELD: Final = Query("""
SELECT name, CASE WHEN paused_at IS NOT NULL THEN 'paused' ELSE 'open' END FROM handlers
WHERE paused_at IS NOT NULL OR open_until IS NOT NULL
""")

LIVING: Final = tuple(status for status in Status if status not in TERMINAL)


class Backlog(msgspec.Struct, frozen=True):
    """How much there is to do."""

    owed: dict[tuple[str, str], int]
    """Deliveries by handler and state, `pending` or `running`."""
    oldest: dict[str, float]
    """Since when the oldest of a handler's is owed, in unix seconds."""
    living: dict[tuple[str, str], int]
    """Predictions by provider and status."""
    held: dict[str, str]
    """Handlers whose deliveries wait: `paused` by hand, or `open` after a run of failures."""


class BacklogReader:
    """Counts in the database, and so the same in whatever process."""

    def __init__(self, store: Reads) -> None:
        self._store = store

    async def depth(self, providers: Sequence[str]) -> Backlog:
        """Count all of it. Raises StoreUnavailable."""
        owed: dict[tuple[str, str], int] = {}
        oldest: dict[str, float] = {}
        for state, query in (("pending", _PENDING), ("running", _RUNNING)):
            for handler, count, since in await self._store.read(query):
                owed[handler, state] = count
                if since is not None:
                    oldest[handler] = min(since, oldest.get(handler, since))
        rows = await self._store.read(_LIVING, list(product(providers, LIVING)))
        held = {row[0]: row[1] for row in await self._store.read(_HELD)}
        living = {(row[0], row[1]): row[2] for row in rows}
        return Backlog(owed, oldest, living, held)
