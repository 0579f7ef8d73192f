"""Orders and their limits, compared with a model: concurrent, duplicate, and at any time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from typing import Final

import pytest

from receiver.store.budgets import Bound, Excess
from receiver.store.facade import Store
from receiver.store.orders import NewOrder, create
from receiver.store.predictions import CreateResult
from receiver.store.statement import Steps
from tests.store.parts import Engine, new, pred

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

BATCHES: Final = 60
CENTS: Final = 10_000
"""In microdollars."""


def order(number: int, *bounds: Bound, key: str = "", price: int | None = 40 * CENTS) -> NewOrder:
    return NewOrder(
        key=key or f"key-{number:04}",
        recipe="imagine",
        options={},
        prediction=new(number, price=price, bounds=bounds),
    )


def bound(subject: str, until: float = 100.0, **most: int) -> Bound:
    return Bound(subject=subject, until=until, count=most.get("count"), cost=most.get("cost"))


def together(batches: Sequence[Sequence[NewOrder]]) -> Steps[list[list[CreateResult]]]:
    """Create all batches in one transaction, as a group commit does."""
    results = []
    for batch in batches:
        results.append((yield from create(batch)))  # noqa: PERF401 - a generator yields for it
    return results


class Model:
    """The expected orders and counts, in plain Python; each period has its own count."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, float], tuple[int, int]] = {}
        self.made: dict[str, str] = {}

    def create(self, batch: Sequence[NewOrder]) -> list[CreateResult]:
        for each in (bound for order in batch for bound in order.prediction.bounds):
            self.counts.setdefault((each.subject, each.until), (0, 0))
        by_key = {order.key: self._create(order) for order in sorted(batch, key=lambda o: o.key)}
        return [by_key[order.key] for order in batch]

    def _create(self, order: NewOrder) -> CreateResult:
        if order.key in self.made:
            return CreateResult(self.made[order.key])
        price = order.prediction.price or 0
        for place, each in enumerate(order.prediction.bounds):
            orders, spent = self.counts[each.subject, each.until]
            if each.count is not None and orders + 1 > each.count:
                return CreateResult("", excess=Excess(place, "count", each.until))
            if each.cost is not None and spent + price > each.cost:
                return CreateResult("", excess=Excess(place, "cost", each.until))
        for counted in {(each.subject, each.until) for each in order.prediction.bounds}:
            orders, spent = self.counts[counted]
            self.counts[counted] = (orders + 1, spent + price)
        self.made[order.key] = order.prediction.id
        return CreateResult(order.prediction.id, is_new=True)


def counted(engine: Engine) -> dict[tuple[str, float], tuple[int, int]]:
    rows = engine.rows("SELECT subject, until, orders, spent FROM order_counts")
    return {(key.partition("/")[0], until): (orders, spent) for key, until, orders, spent in rows}


async def test_orders_equal_those_of_the_model(engine: Engine, store: Store) -> None:
    """The clocks step back, keys repeat, and several limits share a count."""
    random = Random(16)
    model = Model()
    now = 0
    for number in range(BATCHES):
        now = max(now + random.choice((-2, 0, 0, 0, 1)), 0)
        batch = {}
        for place in range(random.randint(1, 4)):
            until = 10.0 * (now + random.randint(0, 1))  # as on servers whose clocks differ
            bounds = [
                bound("one", until, count=4),
                bound("one", until, cost=100 * CENTS),
                bound("two", until, count=5, cost=150 * CENTS + 1),
                bound("three", until, cost=100 * CENTS - 1),
            ]
            one = order(
                10 * number + place,
                *random.sample(bounds, random.randint(0, 4)),
                key=f"key-{random.randint(0, 3 * number + 3):04}",
                price=random.choice((None, 1, 50 * CENTS, 50 * CENTS)),
            )
            batch[one.key] = one
        orders = list(batch.values())
        assert await store.write(together, orders) == model.create(orders), number
        assert counted(engine) == model.counts
    assert dict(engine.rows("SELECT key, prediction_id FROM orders")) == model.made
    assert len(model.made) == engine.rows("SELECT count(*) FROM predictions")[0][0]
    assert BATCHES < 2 * len(model.made) < 4 * BATCHES  # many are created, many are not


async def test_concurrent_orders_do_not_exceed_any_limit(engine: Engine, store: Store) -> None:
    """Every second order names the limits in the other order; a duplicate key counts once."""
    bounds = [bound("count", count=9), bound("cost", cost=280 * CENTS)]
    orders = [order(n, *bounds[:: 1 if n % 2 else -1], key=f"key-{n // 2}") for n in range(40)]
    results = await asyncio.gather(*(store.orders.create(one) for one in orders))
    made = {result.prediction_id for result in results} - {""}
    assert len(made) == sum(result.is_new for result in results) == 7
    assert counted(engine) == {
        ("count", 100.0): (7, 280 * CENTS),
        ("cost", 100.0): (7, 280 * CENTS),
    }


async def test_only_counts_of_expired_periods_are_deleted(engine: Engine, store: Store) -> None:
    await store.orders.create(order(1, bound("past", 10.0), bound("present", 20.0)))
    await store.budgets.forget_counts(21.0, 1.0, 10)
    assert counted(engine) == {("present", 20.0): (1, 40 * CENTS)}
    assert (await store.orders.create(order(2, key="key-0001"))).prediction_id == pred(1)
