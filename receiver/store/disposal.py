"""Deletion of old predictions: in small batches, each with all its rows, and never pending ones.

Candidates are read outside of the writing transaction, in the order of their ids, which is that of
their creation. The deleting transaction locks them and checks them again.

The newest row of `changes` and of `events` always stays: SQLite numbers the next row after the last
existing one, and no number may be used twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec

from receiver.store.budgets import sql as budgets_sql
from receiver.store.changes import sql as changes_sql
from receiver.store.costs import sql as costs_sql
from receiver.store.deliveries import sql as deliveries_sql
from receiver.store.engine import Repository, each
from receiver.store.orders import sql as orders_sql
from receiver.store.statement import Cells, Row, Run, Statements, Steps, Write

sql: Final = Statements("disposal")

NEVER: Final = -1.0
"""A time before which no prediction ended."""


# Rows that refer to a delivery or to a prediction are deleted before it.
_OF_DELIVERIES: Final = (deliveries_sql.forget_steps, sql.delete_attempts, sql.delete_deliveries)
_OF_PREDICTIONS: Final = (
    sql.delete_events,
    sql.delete_callbacks_of,
    orders_sql.blank_options,
    budgets_sql.delete_ledger,
    costs_sql.delete_questions,
    sql.delete_predictions,
)


class Cutoffs(msgspec.Struct, frozen=True, kw_only=True):
    """The time before which a prediction must have ended to be deleted, by status; or NEVER."""

    succeeded_before: float = NEVER
    failed_before: float = NEVER
    canceled_before: float = NEVER
    dead_before: float = NEVER
    """The same for its dead deliveries, which an operator may want to retry."""


class DeleteBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Rows to be deleted in one transaction, as many as `seconds` allow."""

    rows: Sequence[Cells]
    before: Cutoffs = Cutoffs()
    seconds: float
    clock: Callable[[], float] = time.monotonic


class DeleteResult(msgspec.Struct, frozen=True):
    """How many rows of a batch were checked, and how many of them were deleted."""

    handled: int
    deleted: int


class Disposal(Repository):
    """Finds old rows, and deletes them batch by batch."""

    async def old(
        self, cursor: str, horizon: str, before: Cutoffs, most: int
    ) -> tuple[list[Cells], str | None]:
        """Return predictions after `cursor` that may be deleted, and the next cursor, if any."""
        params = msgspec.structs.asdict(before)
        found = await self._store.read(
            sql.select_old, cursor=cursor, horizon=horizon, most=most, **params
        )
        more = found[-1]["id"] if len(found) == most else None
        return [(row["id"],) for row in found if row["may_go"]], more

    async def delete(self, batch: DeleteBatch) -> DeleteResult:
        """Delete predictions with all their rows, except those that by now must stay."""
        return await self._store.write(delete_predictions, batch)

    async def trim_change_log(self, before: float, most: int) -> int:
        """Delete rows from before `before`, `most` at most, and store how far; return how many."""
        rows = await self._store.read(sql.select_changes, most=most)
        old = [row["seq"] for row in rows if row["time"] < before]
        if old:
            await self._store.write(cut_change_log, old[-1])
        return len(old)

    async def unneeded(self, kept: int, young: float, most: int) -> list[Cells]:
        """Return callbacks that decided nothing: no recent ones, and none of young predictions."""
        cut = await self._store.read(sql.select_cut, kept=kept)
        if not cut:
            return []
        latest = cut[0]["received_at"]
        found = await self._store.read(sql.select_unneeded, before=latest, young=young, most=most)
        return [_key(row) for row in found]

    async def orphans(self, before: float, most: int) -> list[Cells]:
        """Return callbacks from before `before` whose predictions are deleted."""
        found = await self._store.read(sql.select_orphans, before=before, most=most)
        return [_key(row) for row in found]

    async def delete_callbacks(self, batch: DeleteBatch) -> DeleteResult:
        return await self._store.write(delete_callbacks, batch)

    async def watermark(self, name: str) -> int:
        """Return the number stored under a name, or 0."""
        rows = await self._store.read(changes_sql.select_watermark, name=name)
        return int(rows[0]["value"]) if rows else 0

    async def set_watermark(self, name: str, value: int) -> None:
        await self._store.run(sql.set_watermark, name=name, value=value)


def _key(row: Row) -> Cells:
    return row["prediction_id"], row["channel"], row["digest"]


@each()
def delete_predictions(batch: DeleteBatch) -> Steps[DeleteResult]:
    handled = deleted = 0
    for rows in _growing(batch):
        handled += len(rows)
        deleted += yield from _delete_some(rows, msgspec.structs.asdict(batch.before))
    return DeleteResult(handled, deleted)


def _delete_some(rows: Sequence[Cells], before: dict[str, float]) -> Steps[int]:
    # Locked before the check: a redelivery has committed by then, or finds nothing.
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


@each()
def delete_callbacks(batch: DeleteBatch) -> Steps[DeleteResult]:
    handled = 0
    for rows in _growing(batch):
        handled += len(rows)
        yield Write([(sql.delete_callbacks, rows)])
    return DeleteResult(handled, handled)


def _growing(batch: DeleteBatch) -> Iterator[Sequence[Cells]]:
    """Yield parts of a batch, each twice as large as the one before, until its time is over.

    One row may contain megabytes, which are all overwritten: its cost is known only afterwards.
    """
    started = batch.clock()
    at, size = 0, 1
    while at < len(batch.rows):
        yield batch.rows[at : at + size]
        if batch.clock() - started >= batch.seconds / 2:  # the next part may take as long again
            return
        at, size = at + size, size * 2


def cut_change_log(items: Sequence[int]) -> Steps[list[None]]:
    yield Run(sql.delete_changes, {"last": max(items)})
    yield Run(sql.set_watermark, {"name": "changes", "value": max(items)})
    return [None] * len(items)
