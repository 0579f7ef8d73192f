"""Costs: sums by day, and the figures that providers give when they are asked later.

The transaction that ends a prediction adds it to the sums. A later figure changes the prediction,
its day's sum and the counts of its budgets together, or nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from receiver.model.costs import DAY, Price
from receiver.model.values import Ticket
from receiver.store.budgets import Settlements
from receiver.store.engine import Repository
from receiver.store.statement import Row, Run, Statements, Steps, Write

sql: Final = Statements("costs")


class Spent(NamedTuple):
    """The fields that a cost is added up by."""

    provider: str
    model: str
    account: str | None
    at: float
    """When the prediction ended."""


class Sums:
    """The additions of one batch to the daily sums."""

    def __init__(self) -> None:
        self._added: dict[tuple[int, str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])

    def add(self, spent: Spent, predictions: int, amount: int, unknown: int) -> None:
        key = (int(spent.at // DAY), spent.provider, spent.model, spent.account or "")
        sums = self._added[key]
        sums[0] += predictions
        sums[1] += amount
        sums[2] += unknown

    def rows(self) -> list[tuple[Any, ...]]:
        """Return the rows, sorted, so that two transactions cannot deadlock."""
        return [(*key, *sums) for key, sums in sorted(self._added.items())]


class DaySum(msgspec.Struct, frozen=True):
    """The sum of the predictions of one provider, model and account that ended on one day."""

    day: int
    """Days since 1970."""
    provider: str
    model: str
    account: str
    predictions: int
    amount: int
    """Microdollars."""
    unknown: int
    """How many of the predictions have no known cost."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """An ended prediction whose provider is to be asked for its cost."""

    ticket: Ticket
    tries: int
    units: float | None = None
    """The units that the provider bills, if the outcome contained them."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """The result of asking for a cost: the cost, another try, or no more tries."""

    prediction_id: str
    cost: Price | None = None
    """As reported by the provider, or computed if no other figure is known."""
    again_at: float | None = None
    """When to ask again; None: never."""
    at: float


def learn(items: Sequence[Figure]) -> Steps[list[None]]:
    """Record figures; a cost that does not replace the known one changes nothing."""
    known = {item.prediction_id: item for item in items if item.cost is not None}
    ids = [(name,) for name in sorted(known)]
    sums, settlements, costs = Sums(), Settlements(), []
    for row in (yield Run(sql.hold_costs, rows=ids)) if ids else []:
        figure = known[row["id"]]
        if figure.cost is not None and _says_more(row, figure.cost):
            _correct(row, figure.cost.amount, figure.at, sums, settlements)
            costs.append((row["id"], *figure.cost))
    later = sorted((i.prediction_id, i.again_at) for i in items if i.again_at is not None)
    ended = sorted({(i.prediction_id,) for i in items if i.again_at is None})
    batches = [
        (sql.set_costs, costs),
        (sql.add_sums, sums.rows()),
        (sql.postpone_questions, later),
        (sql.delete_questions, ended),
    ]
    yield Write([(statement, rows) for statement, rows in batches if rows])
    yield from settlements.write()
    return [None] * len(items)


def _says_more(row: Row, cost: Price) -> bool:
    """Return whether a cost replaces the known one: a provider's figure replaces all others."""
    if row["completed_at"] is None or row["cost_source"] == "provider":
        return False
    return cost.source == "provider" or row["cost"] is None


def _correct(row: Row, amount: int, at: float, sums: Sums, settlements: Settlements) -> None:
    """Replace the known cost by another in the sums and the budgets."""
    before = row["cost"]
    sums.add(_spent(row), 0, amount - (before or 0), -int(before is None))
    counted = (row["price"] or 0) if before is None else before
    settlements.add(row["id"], row["reserved"], "settled", amount - counted, at)


def _spent(row: Row) -> Spent:
    return Spent(row["provider"], row["model"], row["account"], row["completed_at"])


def move(row: Row, account: str | None) -> Steps[None]:
    """Move the cost of a prediction to another account in its day's sum."""
    old = _spent(row)
    before = {**old._asdict(), "day": int(old.at // DAY), "account": old.account or ""}
    amount, unknown = row["cost"] or 0, int(row["cost"] is None)
    held = yield Run(sql.hold_sums, before)
    sums = Sums()
    sums.add(old._replace(account=account), 1, amount, unknown)
    if sum(each["predictions"] for each in held) > 1:
        sums.add(old, -1, -amount, -unknown)
    else:  # it was the only one, and the old account must not remain
        yield Run(sql.delete_sums, before, [(each["shard"],) for each in held])
    yield Write([(sql.add_sums, sums.rows())])
    yield Run(sql.set_account, {"id": row["id"], "account": account})


class CostStore(Repository):
    """The costs of one store."""

    async def sums(
        self, first: int, end: int, most: int, *, by_account: bool = False
    ) -> list[DaySum]:
        """Return the sums of the days from `first` up to before `end`, `most` at most."""
        statement = sql.select_sums if by_account else sql.select_totals
        rows = await self._store.read(statement, first=first, end=end, most=most)
        return [DaySum(**row) for row in rows]

    async def questions(self, provider: str, now: float, most: int) -> list[Question]:
        """Return the predictions whose cost a provider is to be asked for now."""
        rows = await self._store.read(sql.select_questions, provider=provider, now=now, most=most)
        return [_question(row) for row in rows]

    async def learn(self, figure: Figure) -> None:
        """Record the result of asking for a cost."""
        await self._store.write(learn, figure)


def _question(row: Row) -> Question:
    ticket = Ticket(
        id=row["id"],
        model=row["model"],
        mode=row["mode"],
        input={},
        provider_id=row["provider_id"],
        links=msgspec.json.decode(row["links"], type=dict[str, str]),
        submitted_at=row["submitted_at"],
    )
    return Question(ticket=ticket, tries=row["tries"], units=row["units"])
