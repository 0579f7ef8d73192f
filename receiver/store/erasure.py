"""Erase what one prediction was about; that it was, and how it ended, stays.

What stays is the skeleton: ids, provider, model, status, times, the error's code, the channel, the
states of its deliveries, and of each callback when it came, its digest and what was made of it. The
key of an idempotent request stays too, so that none is submitted twice, but not the digest of what
was asked: whoever guesses the words could tell by it that they are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, Protocol, TypeAlias

from receiver.model.states import TERMINAL
from receiver.model.values import Status
from receiver.store.dialect import News, Query, Run, Steps, Write, Writes
from receiver.store.disposal import HOLD_DELIVERIES

Erased: TypeAlias = Literal["erased", "already", "missing", "living", "running"]
"""What became of the wish; `running`: a handler is at work on it."""

HOLD_PREDICTION: Final = Query("""
SELECT status, erased_at FROM predictions WHERE id = :id {lock}
""")

# A blank text where the schema wants one: a success has an output, though there is none in it.
BLANK_PREDICTION: Final = Query("""
UPDATE predictions
SET input = '{}', metadata = '{}', links = '{}', trace = NULL, fingerprint = NULL,
    output = CASE WHEN output IS NOT NULL THEN '[]' END,
    error_message = CASE WHEN error_code IS NOT NULL THEN '' END, erased_at = :now
WHERE id = :id
""")

BLANK_CALLBACKS: Final = Query("""
UPDATE callbacks SET headers = '[]', body = '' WHERE prediction_id = :id
""")

SELECT_RUNNING: Final = Query("""
SELECT id FROM deliveries WHERE id IN (SELECT r.id FROM {rows:id text}) AND state = 'running'
""")

SKIP_DELIVERIES: Final = Query("""
UPDATE deliveries
SET state = 'skipped', due_at = NULL, ended_at = :now, after = '[]', reason = 'erased'
WHERE id IN (SELECT r.id FROM {rows:id text}) AND state = 'pending'
RETURNING id
""")

BLANK_DELIVERIES: Final = Query("""
UPDATE deliveries SET reason = '' WHERE id IN (SELECT r.id FROM {rows:id text}) AND reason <> ''
""")

# Where a handler is held back, the reason of its last failure stands there too.
BLANK_GATES: Final = Query("""
UPDATE handlers SET reason = '' WHERE reason <> '' AND reason IN (
    SELECT a.reason FROM attempts a
    WHERE a.delivery_id IN (SELECT r.id FROM {rows:id text}))
""")

BLANK_ATTEMPTS: Final = Query("""
UPDATE attempts SET reason = '', note = '' WHERE delivery_id IN (SELECT r.id FROM {rows:id text})
""")

FORGET_STEPS: Final = Query(
    "DELETE FROM steps WHERE delivery_id IN (SELECT r.id FROM {rows:id text})"
)


class Tables(Writes, Protocol):
    """What erasing needs of the store."""

    async def scrub(self) -> bool: ...


class Erasure:
    """Erases, and sees to it that nothing is left in the files beside the database."""

    def __init__(self, store: Tables) -> None:
        self._store = store

    async def erase(self, prediction_id: str, now: float) -> Erased:
        """Erase a prediction's content, all of it or nothing; to do it twice changes nothing."""
        erased = await self._store.write(erase, (prediction_id, now))
        if erased in {"erased", "already"}:
            await self._store.scrub()
        return erased


def erase(items: Sequence[tuple[str, float]]) -> Steps[list[Erased]]:
    ends: dict[tuple[str, float], Erased] = {}
    for item in sorted(set(items)):  # in one order, as whoever takes several rows does
        ends[item] = yield from _erase_one(*item)
    return [ends[item] for item in items]


def _erase_one(prediction_id: str, now: float) -> Steps[Erased]:
    params = {"id": prediction_id, "now": now}
    found = yield Run(HOLD_PREDICTION, params)
    if not found:
        return "missing"
    [[status, erased_at]] = found
    if Status(status) not in TERMINAL:
        return "living"
    if erased_at is not None:
        return "already"
    held = yield Run(HOLD_DELIVERIES, rows=[(prediction_id,)])
    deliveries = [(row[0],) for row in held]
    if (yield Run(SELECT_RUNNING, rows=deliveries)):
        return "running"
    yield Run(BLANK_GATES, rows=deliveries)  # knows a gate's reason by the attempt's
    yield Write([(query, deliveries) for query in (BLANK_DELIVERIES, BLANK_ATTEMPTS, FORGET_STEPS)])
    skipped = yield Run(SKIP_DELIVERIES, params, deliveries)
    yield Write([], News([], over=[row[0] for row in skipped]))
    yield Run(BLANK_CALLBACKS, params)
    yield Run(BLANK_PREDICTION, params)
    return "erased"
