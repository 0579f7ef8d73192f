"""The change log: every change of a prediction's status, in the order of the commits.

Triggers of the database write it (see `migrations/`); here it is read, with the events in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from receiver.model.values import Announcement, utc
from receiver.store.engine import Engine
from receiver.store.predictions import prediction_of
from receiver.store.statement import Row, Statements

sql: Final = Statements("changes")

_PAGE: Final = 50
"""Changes that are read at once; they are small, but for their metadata."""
_TOP: Final = 2**62
_MOST_WHOLE: Final = 16
"""Predictions that are read at once with all that is in them, which may be megabytes each."""


class StatusChange(msgspec.Struct, frozen=True):
    """A prediction came to a status; with what the filters of readers look at."""

    seq: int
    status: str
    time: float
    prediction_id: str
    provider: str
    model: str
    metadata: dict[str, Any]


class ChangeLog:
    """Reads changes of status, and events."""

    def __init__(self, store: Engine) -> None:
        self._store = store

    async def end(self) -> int:
        """Return the place up to which the change log is complete: none will come before it."""
        return await self._store.change_log_end()

    async def cut(self) -> int:
        """Return the place up to which the change log was trimmed, being old; 0: it is whole."""
        rows = await self._store.read(sql.select_watermark, name="changes")
        return int(rows[0]["value"]) if rows else 0

    async def page(self, after: int, end: int) -> tuple[list[StatusChange], int]:
        """Read changes after a place; return also up to where that was, `end` at the latest."""
        rows = await self._store.read(sql.select_changes, after=after, end=end, most=_PAGE)
        found = [_change(row) for row in rows]
        return found, found[-1].seq if len(found) == _PAGE else end

    async def events_below(self, place: int | None) -> list[StatusChange]:
        """Read the ends below a place among the events, newest first; None: from the top."""
        below = _TOP if place is None else place
        rows = await self._store.read(sql.select_events_below, below=below, most=_PAGE)
        return [_change(row) for row in rows]

    async def events(self, prediction_ids: Sequence[str]) -> Mapping[str, Announcement]:
        """Read the whole events of predictions, by prediction; one that was deleted is missing."""
        found: dict[str, Announcement] = {}
        for at in range(0, len(prediction_ids), _MOST_WHOLE):
            some = [(name,) for name in prediction_ids[at : at + _MOST_WHOLE]]
            for row in await self._store.read(sql.select_events, some):
                event = announcement_of(row)
                found[event.prediction.id] = event
        return found


def _change(row: Row) -> StatusChange:
    return StatusChange(**{**row, "metadata": msgspec.json.decode(row["metadata"])})


def announcement_of(row: Row) -> Announcement:
    return Announcement(
        id=row["event_id"],
        type=row["event_type"],
        time=utc(row["event_time"]),
        channel=row["event_channel"],
        prediction=prediction_of(row),
    )
