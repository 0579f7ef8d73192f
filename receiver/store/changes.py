"""The journal: every move of every prediction, in the order of the commits, and the events in it.

The database writes it by itself (see `schema`); here it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec

from receiver.model.values import Announcement
from receiver.store import rows as to
from receiver.store.dialect import Query, Reads, Row
from receiver.store.queries import EVENT_COLUMNS

_PAGE: Final = 50
"""Moves that are read at once; they are small, but for their metadata."""
_TOP: Final = 2**62
_MOST_WHOLE: Final = 16
"""Predictions that are read at once with all that is in them, which may be megabytes each."""

SELECT_MOVES: Final = Query("""
SELECT j.seq, j.status, j.time, p.id, p.provider, p.model, p.metadata
FROM journal j JOIN predictions p ON p.id = j.prediction_id
WHERE j.seq > :after AND j.seq <= :end ORDER BY j.seq LIMIT :most
""")

SELECT_EVENTS_BELOW: Final = Query("""
SELECT e.seq, substr(e.type, 12), e.time, p.id, p.provider, p.model, p.metadata
FROM events e JOIN predictions p ON p.id = e.prediction_id
WHERE e.seq < :below ORDER BY e.seq DESC LIMIT :most
""")

SELECT_EVENTS: Final = Query(f"""
SELECT {EVENT_COLUMNS}
FROM {{rows:prediction_id text}} JOIN events e ON e.prediction_id = r.prediction_id
JOIN predictions p ON p.id = e.prediction_id
""")  # noqa: S608 - our own constants

SELECT_MARK: Final = Query("SELECT value FROM marks WHERE name = :name")


class StatusChange(msgspec.Struct, frozen=True):
    """A prediction came to a status; what is needed to know who wants to hear of it."""

    seq: int
    status: str
    time: float
    prediction_id: str
    provider: str
    model: str
    metadata: dict[str, Any]


class Tables(Reads, Protocol):
    """What the journal needs of the store."""

    async def journal_end(self) -> int: ...


class ChangeLog:
    """Reads moves and events."""

    def __init__(self, store: Tables) -> None:
        self._store = store

    async def end(self) -> int:
        """Give the place up to which the journal is complete: nothing will be put in before it."""
        return await self._store.journal_end()

    async def cut(self) -> int:
        """Give the place up to which the journal was cut off, being old; 0: it is whole."""
        rows = await self._store.read(SELECT_MARK, name="journal")
        return int(rows[0][0]) if rows else 0

    async def page(self, after: int, end: int) -> tuple[list[StatusChange], int]:
        """Read moves after a place, and say up to where that was, `end` at the latest."""
        rows = await self._store.read(SELECT_MOVES, after=after, end=end, most=_PAGE)
        moves = [_move(row) for row in rows]
        return moves, moves[-1].seq if len(moves) == _PAGE else end

    async def events_below(self, place: int | None) -> list[StatusChange]:
        """Read the ends below a place among the events, newest first; None: from the top."""
        below = _TOP if place is None else place
        rows = await self._store.read(SELECT_EVENTS_BELOW, below=below, most=_PAGE)
        return [_move(row) for row in rows]

    async def events(self, prediction_ids: Sequence[str]) -> Mapping[str, Announcement]:
        """Read the whole events of predictions, by prediction; one that was deleted is missing."""
        found: dict[str, Announcement] = {}
        for at in range(0, len(prediction_ids), _MOST_WHOLE):
            some = [(name,) for name in prediction_ids[at : at + _MOST_WHOLE]]
            for row in await self._store.read(SELECT_EVENTS, some):
                event = to.announcement(row)
                found[event.prediction.id] = event
        return found


def _move(row: Row) -> StatusChange:
    seq, status, time, name, provider, model, metadata = row
    return StatusChange(seq, status, time, name, provider, model, msgspec.json.decode(metadata))
