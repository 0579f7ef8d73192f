"""What may go, and how: in small pieces, each with all that hangs on it, and never what is owed.

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

from receiver.store.changes import SELECT_MARK
from receiver.store.dialect import Query, Row, Run, Steps, Tables, Write

NEVER: Final = -1.0
"""A time before which nothing has ended."""

# All ids of a prediction's deliveries start alike, which the primary key can find.
_HANGS_ON: Final = "d.id > 'dlv_' || substr({0}, 6) AND d.id < 'dlv_' || substr({0}, 6) || '~'"

# What led to others stays as long as it may be run again: a handler that submits does so by a key,
# and that key goes with the prediction which has it.
_MAY_GO: Final = f"""
p.completed_at <= CASE p.status WHEN 'succeeded' THEN :succeeded_before
                  WHEN 'failed' THEN :failed_before WHEN 'canceled' THEN :canceled_before END
AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE {_HANGS_ON.format("p.id")}
    AND (d.state IN ('pending', 'running')
         OR d.state = 'dead' AND d.ended_at > :dead_before AND p.erased_at IS NULL))
AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE {_HANGS_ON.format("p.parent_id")}
    AND (d.state IN ('pending', 'running') OR d.state = 'dead' AND d.ended_at > :dead_before))
AND EXISTS (SELECT 1 FROM events e
            WHERE e.prediction_id = p.id AND e.seq < (SELECT max(seq) FROM events))
"""  # noqa: S608 - our own constants, here and below

SELECT_OLD: Final = Query(f"""
SELECT p.id, CASE WHEN {_MAY_GO} THEN 1 ELSE 0 END FROM predictions p
WHERE p.id > :cursor AND p.id < :horizon ORDER BY p.id LIMIT :most
""")  # noqa: S608

HOLD_PREDICTIONS: Final = Query("""
SELECT id FROM predictions WHERE id IN (SELECT r.id FROM {rows:id text}) ORDER BY id {lock}
""")

HOLD_DELIVERIES: Final = Query(f"""
SELECT d.id, d.prediction_id FROM {{rows:id text}} CROSS JOIN deliveries d
WHERE {_HANGS_ON.format("r.id")} ORDER BY d.id {{lock}}
""")  # noqa: S608

SELECT_FREE: Final = Query(f"""
SELECT p.id FROM predictions p WHERE p.id IN (SELECT r.id FROM {{rows:id text}}) AND {_MAY_GO}
""")  # noqa: S608


def _delete(table: str, column: str) -> Query:
    return Query(f"DELETE FROM {table} WHERE {column} IN (SELECT r.id FROM {{rows:id text}})")  # noqa: S608


_OF_DELIVERIES: Final = (
    _delete("steps", "delivery_id"),
    _delete("attempts", "delivery_id"),
    _delete("deliveries", "id"),
)
_OF_PREDICTIONS: Final = (
    _delete("events", "prediction_id"),
    _delete("callbacks", "prediction_id"),
    _delete("predictions", "id"),
)

SELECT_JOURNAL: Final = Query("""
SELECT seq, time FROM journal WHERE seq < (SELECT max(seq) FROM journal) ORDER BY seq LIMIT :most
""")

DELETE_JOURNAL: Final = Query("DELETE FROM journal WHERE seq <= :last")

SET_MARK: Final = Query("""
INSERT INTO marks (name, value) VALUES (:name, :value)
ON CONFLICT (name) DO UPDATE SET value = excluded.value WHERE marks.value < excluded.value
""")

SELECT_CUT: Final = Query("""
SELECT received_at FROM callbacks WHERE verdict <> 'accepted'
ORDER BY received_at DESC LIMIT 1 OFFSET :kept
""")

_UNNEEDED: Final = """
SELECT c.prediction_id, c.channel, c.digest FROM callbacks c
WHERE c.verdict <> 'accepted' AND c.received_at <= :before AND NOT EXISTS (
    SELECT 1 FROM predictions p WHERE p.id = c.prediction_id{young})
ORDER BY c.received_at LIMIT :most
"""

SELECT_UNNEEDED: Final = Query(
    _UNNEEDED.replace("{young}", " AND p.due_at IS NOT NULL AND p.created_at > :young")
)

SELECT_STRAYS: Final = Query(_UNNEEDED.replace("{young}", ""))

DELETE_CALLBACKS: Final = Query("""
DELETE FROM callbacks WHERE verdict <> 'accepted' AND (prediction_id, channel, digest) IN
    (SELECT r.prediction_id, r.channel, r.digest
     FROM {rows:prediction_id text, channel text, digest text})
""")


class Cutoffs(msgspec.Struct, frozen=True, kw_only=True):
    """Until when a prediction must have ended to go, by how it did: unix seconds, or NEVER."""

    succeeded_before: float = NEVER
    failed_before: float = NEVER
    canceled_before: float = NEVER
    dead_before: float = NEVER
    """The same for its deliveries that are dead: somebody may still want to try them again."""


class DeleteBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Rows to be deleted in one transaction, as many as there is time for."""

    rows: Sequence[Row]
    before: Cutoffs = Cutoffs()
    seconds: float
    clock: Callable[[], float] = time.monotonic


class DeleteResult(msgspec.Struct, frozen=True):
    """How many rows of a piece were looked at, and how many of them were deleted."""

    handled: int
    deleted: int


class Disposal:
    """Finds what is old, and deletes it piece by piece."""

    def __init__(self, store: Tables) -> None:
        self._store = store

    async def old(
        self, cursor: str, horizon: str, before: Cutoffs, most: int
    ) -> tuple[list[Row], str | None]:
        """Walk on from `cursor`; give the predictions that may go, and the next cursor, if any."""
        params = msgspec.structs.asdict(before)
        found = await self._store.read(
            SELECT_OLD, cursor=cursor, horizon=horizon, most=most, **params
        )
        more = found[-1][0] if len(found) == most else None
        return [(row[0],) for row in found if row[1]], more

    async def delete(self, piece: DeleteBatch) -> DeleteResult:
        """Delete predictions with all that hangs on them, but for what may no longer go."""
        return await self._store.write(delete_predictions, piece)

    async def trim_journal(self, before: float, most: int) -> int:
        """Cut off what is older, so many rows at most, and remember where; say how many went."""
        rows = await self._store.read(SELECT_JOURNAL, most=most)
        old = [seq for seq, at in rows if at < before]
        if old:
            await self._store.write(cut_journal, old[-1])
        return len(old)

    async def unneeded(self, kept: int, young: float, most: int) -> list[Row]:
        """Name callbacks that decided nothing, but for the newest and those of living and young."""
        cut = await self._store.read(SELECT_CUT, kept=kept)
        if not cut:
            return []
        return await self._store.read(SELECT_UNNEEDED, before=cut[0][0], young=young, most=most)

    async def strays(self, before: float, most: int) -> list[Row]:
        """Name callbacks from before then whose predictions are gone."""
        return await self._store.read(SELECT_STRAYS, before=before, most=most)

    async def delete_callbacks(self, piece: DeleteBatch) -> DeleteResult:
        return await self._store.write(delete_callbacks, piece)

    async def mark(self, name: str) -> int:
        """Give what was last remembered under a name, or 0."""
        rows = await self._store.read(SELECT_MARK, name=name)
        return rows[0][0] if rows else 0

    async def set_mark(self, name: str, value: int) -> None:
        await self._store.write(set_marks, (name, value))


def delete_predictions(items: Sequence[DeleteBatch]) -> Steps[list[DeleteResult]]:
    results = []
    for item in items:
        handled = deleted = 0
        for rows in _growing(item):
            handled += len(rows)
            deleted += yield from _delete_some(rows, msgspec.structs.asdict(item.before))
        results.append(DeleteResult(handled, deleted))
    return results


def _delete_some(rows: Sequence[Row], before: dict[str, float]) -> Steps[int]:
    # First held, then asked: whoever owes one of them again has done so by now, or finds none.
    held = yield Run(HOLD_PREDICTIONS, rows=rows)
    deliveries = yield Run(HOLD_DELIVERIES, rows=held)
    free = {row[0] for row in (yield Run(SELECT_FREE, before, held))}
    if free:
        predictions = [(name,) for name in sorted(free)]
        theirs = [(name,) for name, prediction in deliveries if prediction in free]
        yield Write(
            [(query, theirs) for query in _OF_DELIVERIES if theirs]
            + [(query, predictions) for query in _OF_PREDICTIONS]
        )
    return len(free)


def delete_callbacks(items: Sequence[DeleteBatch]) -> Steps[list[DeleteResult]]:
    results = []
    for item in items:
        handled = 0
        for rows in _growing(item):
            handled += len(rows)
            yield Write([(DELETE_CALLBACKS, rows)])
        results.append(DeleteResult(handled, handled))
    return results


def _growing(piece: DeleteBatch) -> Iterator[Sequence[Row]]:
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


def cut_journal(items: Sequence[int]) -> Steps[list[None]]:
    yield Run(DELETE_JOURNAL, {"last": max(items)})
    yield Run(SET_MARK, {"name": "journal", "value": max(items)})
    return [None] * len(items)


def set_marks(items: Sequence[tuple[str, int]]) -> Steps[list[None]]:
    for name, value in sorted(items):
        yield Run(SET_MARK, {"name": name, "value": value})
    return [None] * len(items)
