"""The change log: every change of a prediction's status, in the order of the commits.

Database triggers write it (see `migrations/`); this module reads it, with the events in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from receiver.model.values import Announcement, utc
from receiver.store.engine import Repository
from receiver.store.predictions import prediction_of
from receiver.store.statement import Row, Statements

sql: Final = Statements("changes")

_PAGE: Final = 50
"""Changes read at once; they are small, except for their metadata."""
_TOP: Final = 2**62
_MOST_WHOLE: Final = 16
"""Predictions read at once with all their content, which may be megabytes each."""


class StatusChange(msgspec.Struct, frozen=True):
    """A change of a prediction's status, with the fields that readers filter by."""

    seq: int
    status: str
    time: float
    prediction_id: str
    provider: str
    model: str
    metadata: dict[str, Any]


class ChangeLog(Repository):
    """The changes of status and the events of one store."""

    async def end(self) -> int:
        """Return the position up to which the change log is complete: no change will precede it."""
        return await self._store.change_log_end()

    async def cut(self) -> int:
        """Return the position up to which old changes were deleted; 0: none were."""
        rows = await self._store.read(sql.select_watermark, name="changes")
        return int(rows[0]["value"]) if rows else 0

    async def page(self, after: int, end: int) -> tuple[list[StatusChange], int]:
        """Return changes after a position, and the position read up to, `end` at the latest."""
        rows = await self._store.read(sql.select_changes, after=after, end=end, most=_PAGE)
        found = [_change(row) for row in rows]
        return found, found[-1].seq if len(found) == _PAGE else end

    async def events_below(self, place: int | None) -> list[StatusChange]:
        """Return ends before a position among the events, newest first; None: from the newest."""
        below = _TOP if place is None else place
        rows = await self._store.read(sql.select_events_below, below=below, most=_PAGE)
        return [_change(row) for row in rows]

    async def events(self, prediction_ids: Sequence[str]) -> Mapping[str, Announcement]:
        """Return the complete events by prediction; a deleted prediction is missing."""
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
