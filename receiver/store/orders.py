"""Orders: limits, key and prediction in one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from receiver.store.budgets import Counts
from receiver.store.engine import Repository
from receiver.store.predictions import CreateResult, NewPrediction, insert
from receiver.store.statement import Run, Statements, Steps, in_order, text

sql: Final = Statements("orders")


class NewOrder(msgspec.Struct, frozen=True, kw_only=True):
    """An order to be recorded, with the prediction that it makes."""

    key: str
    recipe: str
    options: dict[str, Any]
    prediction: NewPrediction


class Ordered(msgspec.Struct, frozen=True):
    """The recipe and the options that a prediction was ordered with."""

    recipe: str
    options: dict[str, Any]


def create(items: Sequence[NewOrder]) -> Steps[list[CreateResult]]:
    counts = Counts()
    yield from counts.hold(bound for item in items for bound in item.prediction.bounds)
    results = yield from in_order(items, lambda item: item.key, lambda item: _create(item, counts))
    yield from counts.write()
    return results


def _create(order: NewOrder, counts: Counts) -> Steps[CreateResult]:
    new = order.prediction
    row = {
        "key": order.key,
        "prediction_id": new.id,
        "recipe": order.recipe,
        "options": text(order.options),
        "price": new.price,
        "created_at": new.created_at,
    }
    for first in (yield Run(sql.select_by_key, row)):
        return CreateResult(first["prediction_id"])
    if excess := counts.excess(new.bounds, new.price):
        return CreateResult("", excess=excess)
    if not (yield Run(sql.insert_order, row)):  # another process was first; orders stay for good
        [first] = yield Run(sql.select_by_key, row)
        return CreateResult(first["prediction_id"])
    yield from insert(new, counts)
    return CreateResult(new.id, is_new=True)


class OrderStore(Repository):
    """The orders of one store."""

    async def create(self, order: NewOrder) -> CreateResult:
        """Record an order and its prediction, unless its key is taken or a limit is reached."""
        return await self._store.write(create, order)

    async def find(self, key: str) -> str | None:
        """Return the prediction that was ordered by a key; it may be deleted by now."""
        rows = await self._store.read(sql.select_by_key, key=key)
        return rows[0]["prediction_id"] if rows else None

    async def ordered(self, prediction_id: str) -> Ordered | None:
        """Return the recipe and options of a prediction; None if it was not ordered."""
        rows = await self._store.read(sql.select_order, prediction_id=prediction_id)
        if not rows:
            return None
        return Ordered(rows[0]["recipe"], msgspec.json.decode(rows[0]["options"]))
