"""Costs compared with a model: reservations, settlements and daily sums."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random
from typing import Any, Final

import pytest
from msgspec.structs import replace

from receiver.model.costs import DAY, Account, Price
from receiver.model.values import Status
from receiver.store.budgets import Bound
from receiver.store.costs import Figure
from receiver.store.disposal import Cutoffs, DeleteBatch
from receiver.store.facade import Store
from receiver.store.inbox import CurrentState, IncomingOutcome, Transition, accept_outcome
from tests.store.parts import NOW, Engine, arrival, new, pred, progress, submitting

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

CENT: Final = 10_000
"""In microdollars."""
UNTIL: Final = NOW + 1000.0
STEPS: Final = 120


def bound(subject: str, cost: int | None, until: float = UNTIL) -> Bound:
    return Bound(subject=subject, kind="all/day", until=until, count=None, cost=cost)


def costing(found: IncomingOutcome, cost: Price | None, ask_at: float | None) -> IncomingOutcome:
    """Return the arrival with a judge that adds this cost and the time to ask for one."""
    rule = found.judge

    def decide(known: Any, arrived: IncomingOutcome) -> Transition:
        ruled = rule(known, arrived)
        return replace(ruled, cost=cost, ask_at=ask_at) if ruled.event_type else ruled

    return replace(found, judge=decide)


class Model:
    """The expected counts and sums, in plain Python."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self.sums: dict[tuple[str, str], list[int]] = {}
        self.living: dict[int, dict[str, Any]] = {}
        self.ended: dict[int, dict[str, Any]] = {}

    def add(self, number: int, row: dict[str, Any]) -> bool:
        if any(self.spent[b.subject] + (row["price"] or 0) > b.cost for b in row["bounds"]):
            return False
        for each in row["bounds"]:
            self.spent[each.subject] += row["price"] or 0
        self.living[number] = row
        return True

    def correct(self, row: dict[str, Any], amount: int | None) -> None:
        """Correct the budgets, which count the cost, or the price while the cost is unknown."""
        counted = (row["price"] or 0) if row.get("cost") is None else row["cost"]
        for each in row["bounds"] if row["price"] is not None else ():
            self.spent[each.subject] += (counted if amount is None else amount) - counted

    def end(self, number: int, amount: int | None) -> None:
        row = self.ended[number] = self.living.pop(number)
        self.correct(row, amount)
        row["cost"] = amount
        self.sum(row, 1)

    def learn(self, number: int, cost: Price) -> None:
        """Learn a cost: a provider's figure replaces any, a computed one only an unknown cost."""
        amount, source = cost
        row = self.ended[number]
        if row.get("told") or (source == "computed" and row["cost"] is not None):
            return
        self.sum(row, -1)
        self.correct(row, amount)
        row |= {"cost": amount, "told": source == "provider"}
        self.sum(row, 1)

    def erase(self, number: int) -> None:
        row = self.ended[number]
        self.sum(row, -1)
        row["account"] = replace(row["account"], metadata={})
        self.sum(row, 1)

    def sum(self, row: dict[str, Any], sign: int) -> None:
        of = self.sums.setdefault((row["provider"], row["account"].text() or ""), [0, 0, 0])
        for place, more in enumerate((1, row["cost"] or 0, int(row["cost"] is None))):
            of[place] += sign * more


async def test_costs_equal_those_of_the_model(engine: Engine, store: Store) -> None:
    random = Random(17)
    model = Model()
    made = 0
    for number in range(STEPS):
        bounds = [bound("one", 200 * CENT), bound("two", 300 * CENT), bound("three", 150 * CENT)]
        some = tuple(random.sample(bounds, random.randint(0, 3)))
        account = Account(
            recipe=random.choice((None, "imagine")),
            key=random.choice((None, "web")),
            metadata=random.choice(({}, {"team": "a"}, {"team": "b"})),
        )
        price = 10 * CENT if some else random.choice((None, 10 * CENT))
        row = {"provider": "fal", "price": price, "bounds": some, "account": account}
        one = new(number, price=price, price_source=price and "computed", bounds=some)
        created = await store.predictions.create(replace(one, account=account.text()))
        assert created.is_new == model.add(number, row), number
        made += created.is_new
        for each in random.sample(sorted(model.living), min(len(model.living), 1)):
            await end(store, model, random, each)
        for each in random.sample(sorted(model.ended), min(len(model.ended), 1)):
            await later(store, model, random, each)
    for each in sorted(model.living):
        await end(store, model, random, each)
    assert STEPS // 3 < made < STEPS
    counts = dict(engine.rows("SELECT subject, spent FROM order_counts"))
    assert counts == {f"{name}/{UNTIL:.0f}": model.spent[name] for name in model.spent}
    # For each prediction that is not deleted, the ledger adds up to what the budgets count.
    for number, row in model.ended.items():
        of_one = engine.rows("SELECT amount FROM ledger WHERE prediction_id = ?", pred(number))
        counted = (row["price"] or 0) if row["cost"] is None else row["cost"]
        assert sum(amount for (amount,) in of_one) == (counted if row["bounds"] else 0)
    sums = await store.costs.sums(0, 10**6, 1000, by_account=True)
    assert {each.day for each in sums} == {int((NOW + 10) // DAY)}
    assert {
        (each.provider, each.account): [each.predictions, each.amount, each.unknown]
        for each in sums
    } == {key: values for key, values in model.sums.items() if values != [0, 0, 0]}


async def end(store: Store, model: Model, random: Random, number: int) -> None:
    row = model.living[number]
    ending = random.choice(("free", "told", "computed", "failed"))
    if ending == "failed":
        found = costing(arrival(number, "failed"), None, NOW + 10)
    elif ending == "free":
        found = costing(arrival(number, "failed", is_free=True), Price(0, "computed"), None)
    elif ending == "told":
        row["told"] = True
        found = costing(arrival(number), Price(random.randint(0, 20 * CENT), "provider"), None)
    else:
        found = costing(arrival(number), Price(row["price"] or CENT, "computed"), NOW + 10)
    cost = found.judge(known(number), found).cost
    results = await asyncio.gather(*(accept_outcome(store, found) for _ in range(2)))
    assert sorted(taken.verdict for taken in results) == ["accepted", "duplicate"]
    model.end(number, None if cost is None else cost.amount)


def known(number: int) -> Any:

    return CurrentState(pred(number), "fal", "m", Status.PROCESSING, None, "{}")


async def later(store: Store, model: Model, random: Random, number: int) -> None:
    """Do one random thing that can happen long after the end."""
    match random.choice(("figure", "again", "erase", "delete", "nothing")):
        case "figure":
            amount = random.randint(0, 30 * CENT)
            cost = Price(amount, random.choice(("provider", "computed")))
            await store.costs.learn(Figure(prediction_id=pred(number), cost=cost, at=NOW + 20))
            model.learn(number, cost)
        case "again":
            figure = Figure(prediction_id=pred(number), again_at=NOW + 99, at=NOW + 20)
            await store.costs.learn(figure)
        case "erase":
            if await store.erasure.erase(pred(number), NOW + 30) == "erased":
                model.erase(number)
        case "delete":
            gone = NOW + 1e6
            before = Cutoffs(succeeded_before=gone, failed_before=gone, canceled_before=gone)
            batch = DeleteBatch(rows=[(pred(number),)], before=before, seconds=1.0)
            if (await store.disposal.delete(batch)).deleted:
                del model.ended[number]


async def test_concurrent_submits_do_not_exceed_any_budget(engine: Engine, store: Store) -> None:
    """Every second prediction names the budgets in the other order; a duplicate key counts once."""
    bounds = (bound("one", 70 * CENT), bound("two", 500 * CENT))
    wanted = [
        new(n, price=10 * CENT, bounds=bounds[:: 1 if n % 2 else -1], idempotency_key=f"{n // 2}")
        for n in range(40)
    ]
    results = await asyncio.gather(*(store.predictions.create(one) for one in wanted))
    made = {result.prediction_id for result in results if result.excess is None}
    assert len(made) == sum(result.is_new for result in results) == 7
    assert dict(engine.rows("SELECT subject, spent FROM order_counts")) == {
        f"one/{UNTIL:.0f}": 70 * CENT,
        f"two/{UNTIL:.0f}": 70 * CENT,
    }
    again = await store.predictions.create(wanted[[r.is_new for r in results].index(True)])
    assert (again.is_new, again.excess) == (False, None)  # no limit applies to an existing one


async def test_settlement_in_a_later_period_leaves_the_budget_of_that_period(
    engine: Engine, store: Store
) -> None:
    """The unspent part of a reservation returns to the budget of its own period."""
    await store.predictions.create(
        new(1, price=10 * CENT, price_source="computed", bounds=(bound("one", 50 * CENT, 10.0),))
    )
    today = (bound("one", 50 * CENT, 20.0),)
    await store.predictions.create(new(2, price=CENT, price_source="computed", bounds=today))
    await accept_outcome(store, costing(arrival(1), Price(0, "provider"), None))
    counts = engine.rows("SELECT until, spent FROM order_counts ORDER BY until")
    assert counts == [(10.0, 0), (20.0, CENT)]
    entries = engine.rows("SELECT entry, amount FROM ledger WHERE prediction_id = ?", pred(1))
    assert entries == [("reserved", 10 * CENT), ("settled", -10 * CENT)]


async def test_provider_is_asked_for_a_cost_until_the_cost_is_known(store: Store) -> None:
    for number in (1, 2, 3):
        await store.predictions.create(new(number))
        await accept_outcome(store, costing(arrival(number), None, NOW + number))
    asked = await store.costs.questions("fal", NOW + 2, 10)
    assert [question.ticket.id for question in asked] == [pred(1), pred(2)]
    await store.costs.learn(Figure(prediction_id=pred(1), cost=Price(7, "provider"), at=NOW))
    await store.costs.learn(Figure(prediction_id=pred(2), again_at=NOW + 50, at=NOW))
    await store.costs.learn(Figure(prediction_id=pred(3), at=NOW))
    [left] = await store.costs.questions("fal", NOW + 100, 10)
    assert (left.ticket.id, left.tries) == (pred(2), 1)
    found = await store.predictions.get(pred(1))
    assert found is not None
    assert found.cost is not None
    assert (found.cost.amount, found.cost.source) == (7e-6, "provider")


async def test_cost_in_the_submit_answer_counts_at_the_end_and_no_later_one_does(
    store: Store,
) -> None:
    await submitting(store, 1)
    said = progress(1, "accepted", NOW + 30, provider_id="req-1", cost=7 * CENT)
    await store.predictions.progress(said)
    heard: list[int | None] = []
    found = arrival(1)

    def judge(known: CurrentState, arrived: IncomingOutcome) -> Transition:
        heard.append(known.cost)
        assert known.cost is not None
        ruled = found.judge(known, arrived)
        return replace(ruled, cost=Price(known.cost, "provider"))

    await accept_outcome(store, replace(found, judge=judge))
    late = progress(1, "accepted", NOW + 30, provider_id="req-1", cost=9 * CENT)
    await store.predictions.progress(late)
    assert heard == [7 * CENT]
    [total] = await store.costs.sums(0, 10**6, 10)
    assert (total.predictions, total.amount, total.unknown) == (1, 7 * CENT, 0)
    prediction = await store.predictions.get(pred(1))
    assert prediction is not None
    assert prediction.cost is not None
    assert prediction.cost.amount == pytest.approx(0.07)
