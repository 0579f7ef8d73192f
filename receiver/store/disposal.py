"""What may go, and how: in small pieces, each with all that hangs on it, and never what is pending.

Candidates are found beside the writer, by walking the predictions in the order of their ids, which
is that of their creation. Whether one may go is asked again, with its rows held, where it goes.

Two newest rows always stay, of `journal` and of `events`: SQLite numbers the next row after the
last that is there, and a number must never come twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec

from receiver.store.changes import sql as changes_sql
from receiver.store.engine import Engine
from receiver.store.statement import Cells, Row, Run, Statements, Steps, Write

sql: Final = Statements("disposal")

NEVER: Final = -1.0
"""A time before which nothing has ended."""


# What hangs on a delivery or on a prediction goes before it.
_OF_DELIVERIES: Final = (sql.delete_steps, sql.delete_attempts, sql.delete_deliveries)
_OF_PREDICTIONS: Final = (
    sql.delete_events,
    sql.delete_callbacks_of,
    sql.delete_predictions,
)


class Cutoffs(msgspec.Struct, frozen=True, kw_only=True):
    """Until when a prediction must have ended to go, by how it did: unix seconds, or NEVER."""

    succeeded_before: float = NEVER
    failed_before: float = NEVER
    canceled_before: float = NEVER
    dead_before: float = NEVER
    """The same for its deliveries that are dead: somebody may still want to try them again."""


class DeleteBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Rows to be deleted in one transaction, as many as there is time for."""

    rows: Sequence[Cells]
    before: Cutoffs = Cutoffs()
    seconds: float
    clock: Callable[[], float] = time.monotonic


class DeleteResult(msgspec.Struct, frozen=True):
    """How many rows of a piece were looked at, and how many of them were deleted."""

    handled: int
    deleted: int


class Disposal:
    """Finds what is old, and deletes it piece by piece."""

    def __init__(self, store: Engine) -> None:
        self._store = store

    async def old(
        self, cursor: str, horizon: str, before: Cutoffs, most: int
    ) -> tuple[list[Cells], str | None]:
        """Walk on from `cursor`; give the predictions that may go, and the next cursor, if any."""
        params = msgspec.structs.asdict(before)
        found = await self._store.read(
            sql.select_old, cursor=cursor, horizon=horizon, most=most, **params
        )
        more = found[-1]["id"] if len(found) == most else None
        return [(row["id"],) for row in found if row["may_go"]], more

    async def delete(self, piece: DeleteBatch) -> DeleteResult:
        """Delete predictions with all that hangs on them, but for what may no longer go."""
        return await self._store.write(delete_predictions, piece)

    async def trim_change_log(self, before: float, most: int) -> int:
        """Cut off what is older, so many rows at most, and remember where; say how many went."""
        rows = await self._store.read(sql.select_changes, most=most)
        old = [row["seq"] for row in rows if row["time"] < before]
        if old:
            await self._store.write(cut_change_log, old[-1])
        return len(old)

    async def unneeded(self, kept: int, young: float, most: int) -> list[Cells]:
        """Name callbacks that decided nothing, but for the newest and those of living and young."""
        cut = await self._store.read(sql.select_cut, kept=kept)
        if not cut:
            return []
        latest = cut[0]["received_at"]
        found = await self._store.read(sql.select_unneeded, before=latest, young=young, most=most)
        return [_key(row) for row in found]

    async def strays(self, before: float, most: int) -> list[Cells]:
        """Name callbacks from before then whose predictions are gone."""
        found = await self._store.read(sql.select_strays, before=before, most=most)
        return [_key(row) for row in found]

    async def delete_callbacks(self, piece: DeleteBatch) -> DeleteResult:
        return await self._store.write(delete_callbacks, piece)

    async def watermark(self, name: str) -> int:
        """Return what was last remembered under a name, or 0."""
        rows = await self._store.read(changes_sql.select_watermark, name=name)
        return int(rows[0]["value"]) if rows else 0

    async def set_watermark(self, name: str, value: int) -> None:
        await self._store.write(set_watermarks, (name, value))


def _key(row: Row) -> Cells:
    return row["prediction_id"], row["channel"], row["digest"]


def delete_predictions(items: Sequence[DeleteBatch]) -> Steps[list[DeleteResult]]:
    results = []
    for item in items:
        handled = deleted = 0
        for rows in _growing(item):
            handled += len(rows)
            deleted += yield from _delete_some(rows, msgspec.structs.asdict(item.before))
        results.append(DeleteResult(handled, deleted))
    return results


def _delete_some(rows: Sequence[Cells], before: dict[str, float]) -> Steps[int]:
    # First held, then asked: a redelivery of one of them has committed by now, or finds none.
    held = [(row["id"],) for row in (yield Run(sql.hold_predictions, rows=rows))]
    deliveries = yield Run(sql.hold_deliveries, rows=held)
    free = {row["id"] for row in (yield Run(sql.select_free, before, held))}
    if free:
        predictions = [(name,) for name in sorted(free)]
        theirs = [(row["id"],) for row in deliveries if row["prediction_id"] in free]
        yield Write(
            [(statement, theirs) for statement in _OF_DELIVERIES if theirs]
            + [(statement, predictions) for statement in _OF_PREDICTIONS]
        )
    return len(free)


def delete_callbacks(items: Sequence[DeleteBatch]) -> Steps[list[DeleteResult]]:
    results = []
    for item in items:
        handled = 0
        for rows in _growing(item):
            handled += len(rows)
            yield Write([(sql.delete_callbacks, rows)])
        results.append(DeleteResult(handled, handled))
    return results


def _growing(piece: DeleteBatch) -> Iterator[Sequence[Cells]]:
    """Cut a piece into parts, each twice as large as the one before, until its time is over.

    One row may hold megabytes, which are all overwritten: how long it takes is known afterwards.
    """
    started = piece.clock()
    at, size = 0, 1
    while at < len(piece.rows):
        yield piece.rows[at : at + size]
        if piece.clock() - started >= piece.seconds / 2:  # the next may take as long again
            return
        at, size = at + size, size * 2


def cut_change_log(items: Sequence[int]) -> Steps[list[None]]:
    yield Run(sql.delete_changes, {"last": max(items)})
    yield Run(sql.set_watermark, {"name": "changes", "value": max(items)})
    return [None] * len(items)


def set_watermarks(items: Sequence[tuple[str, int]]) -> Steps[list[None]]:
    for name, value in sorted(items):
        yield Run(sql.set_watermark, {"name": name, "value": value})
    return [None] * len(items)
