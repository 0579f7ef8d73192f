"""Orders: limits, key and prediction in one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from receiver.store.engine import Engine
from receiver.store.predictions import NewPrediction, insert
from receiver.store.statement import Run, Statements, Steps, Write, in_order, text

sql: Final = Statements("orders")


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """One limit, as it holds for one order."""

    subject: str
    """Of what it is, and for how long: bounds with the same subject count together."""
    until: float
    """When its hour, day or month ends."""
    count: int | None
    cost: int | None
    """Microdollars."""


class NewOrder(msgspec.Struct, frozen=True, kw_only=True):
    """An order to be recorded, with the prediction that it makes."""

    key: str
    recipe: str
    options: dict[str, Any]
    price: int | None
    """Microdollars; None counts as nothing."""
    bounds: tuple[Bound, ...] = ()
    prediction: NewPrediction


class Excess(msgspec.Struct, frozen=True):
    """The bound that an order would have gone over."""

    bound: int
    """Its place among those of the order."""
    over: str
    """`count` or `cost`."""
    until: float
    """When there is room again."""


class OrderResult(msgspec.Struct, frozen=True):
    """What became of an order: its prediction, new or of an earlier order by that key, or no."""

    prediction_id: str | None
    is_new: bool = False
    excess: Excess | None = None


class Ordered(msgspec.Struct, frozen=True):
    """What a prediction was ordered with."""

    recipe: str
    options: dict[str, Any]


class _Counts:
    """What was ordered under the limits of a batch, whose rows are locked."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[float, int, int]] = {}
        self._added: dict[str, tuple[int, int]] = {}

    def hold(self, bounds: Sequence[Bound]) -> Steps[None]:
        """Lock the rows, sorted, so that two transactions cannot deadlock."""
        latest: dict[str, float] = {}
        for bound in bounds:
            latest[bound.subject] = max(bound.until, latest.get(bound.subject, 0.0))
        for subject, until in sorted(latest.items()):
            [row] = yield Run(sql.hold_count, {"subject": subject, "until": until})
            self._held[subject] = (row["until"], row["orders"], row["spent"])

    def excess(self, order: NewOrder) -> Excess | None:
        """Return the first bound that one more order would go over."""
        for place, bound in enumerate(order.bounds):
            until, orders, spent = self._held[bound.subject]
            if bound.count is not None and orders >= bound.count:
                return Excess(place, "count", until)
            if bound.cost is not None and spent + (order.price or 0) > bound.cost:
                return Excess(place, "cost", until)
        return None

    def add(self, order: NewOrder) -> None:
        price = order.price or 0
        for subject in {bound.subject for bound in order.bounds}:
            until, orders, spent = self._held[subject]
            self._held[subject] = (until, orders + 1, spent + price)
            more, money = self._added.get(subject, (0, 0))
            self._added[subject] = (more + 1, money + price)

    def write(self) -> Steps[None]:
        rows = [(subject, *added) for subject, added in sorted(self._added.items())]
        if rows:
            yield Write([(sql.add_to_counts, rows)])


def create(items: Sequence[NewOrder]) -> Steps[list[OrderResult]]:
    counts = _Counts()
    yield from counts.hold([bound for item in items for bound in item.bounds])
    results = yield from in_order(items, lambda item: item.key, lambda item: _create(item, counts))
    yield from counts.write()
    return results


def _create(order: NewOrder, counts: _Counts) -> Steps[OrderResult]:
    row = {
        "key": order.key,
        "prediction_id": order.prediction.id,
        "recipe": order.recipe,
        "options": text(order.options),
        "price": order.price,
        "created_at": order.prediction.created_at,
    }
    for first in (yield Run(sql.select_by_key, row)):
        return OrderResult(first["prediction_id"])
    if excess := counts.excess(order):
        return OrderResult(None, excess=excess)
    if not (yield Run(sql.insert_order, row)):  # by another process since; it is kept for good
        [first] = yield Run(sql.select_by_key, row)
        return OrderResult(first["prediction_id"])
    yield from insert(order.prediction)
    counts.add(order)
    return OrderResult(order.prediction.id, is_new=True)


def forget_counts(items: Sequence[tuple[float, int]]) -> Steps[list[None]]:
    for before, most in items:
        yield Run(sql.forget_counts, {"before": before, "most": most})
    return [None] * len(items)


class OrderStore:
    """The orders of one store."""

    def __init__(self, store: Engine) -> None:
        self._store = store

    async def create(self, order: NewOrder) -> OrderResult:
        """Record an order and its prediction, unless its key is taken or a limit is reached."""
        return await self._store.write(create, order)

    async def find(self, key: str) -> str | None:
        """Return the prediction that was ordered by a key; it may be deleted by now."""
        rows = await self._store.read(sql.select_by_key, key=key)
        return rows[0]["prediction_id"] if rows else None

    async def ordered(self, prediction_id: str) -> Ordered | None:
        """Return what a prediction was ordered with, if it was."""
        rows = await self._store.read(sql.select_order, prediction_id=prediction_id)
        if not rows:
            return None
        return Ordered(rows[0]["recipe"], msgspec.json.decode(rows[0]["options"]))

    async def forget_counts(self, before: float, most: int) -> None:
        """Delete counts of a time that was over before then, so many at most."""
        await self._store.write(forget_counts, (before, most))
