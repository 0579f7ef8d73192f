"""Budgets: what is counted and reserved under limits, and the ledger that says how it came to that.

A price is reserved in the transaction that makes the prediction, and settled in the one that ends
it. The row of a count is locked meanwhile, so that no two together go over a limit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final, Literal, TypeAlias

import msgspec

from receiver.store.engine import Engine
from receiver.store.statement import Run, Statements, Steps, Write, text

sql: Final = Statements("budgets")

Entry: TypeAlias = Literal["reserved", "settled", "released"]


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """One limit, as it holds for one prediction."""

    subject: str
    """Of what it is, and for how long: bounds with the same subject count together."""
    kind: str = ""
    """What it is by, and its time, as in `person/day`."""
    until: float
    """When its hour, day or month ends."""
    count: int | None
    cost: int | None
    """Microdollars."""


class Excess(msgspec.Struct, frozen=True):
    """The bound that a prediction would have gone over."""

    bound: int
    """Its place among those of the prediction."""
    over: Literal["count", "cost"]
    until: float
    """When there is room again."""


class Counts:
    """What was counted under the limits of a batch, whose rows are locked."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[float, int, int]] = {}
        self._added: dict[str, tuple[int, int]] = {}
        self._reserved: list[tuple[str, Entry, int, float]] = []

    def hold(self, bounds: Iterable[Bound]) -> Steps[None]:
        """Lock the rows, sorted, so that two transactions cannot deadlock."""
        latest: dict[str, Bound] = {}
        for bound in bounds:
            if bound.subject not in latest or bound.until > latest[bound.subject].until:
                latest[bound.subject] = bound
        for subject, bound in sorted(latest.items()):
            params = {"subject": subject, "until": bound.until, "kind": bound.kind}
            [row] = yield Run(sql.hold_count, params)
            self._held[subject] = (row["until"], row["orders"], row["spent"])

    def excess(self, bounds: Sequence[Bound], price: int | None) -> Excess | None:
        """Return the first bound that one more prediction would go over."""
        for place, bound in enumerate(bounds):
            until, orders, spent = self._held[bound.subject]
            if bound.count is not None and orders >= bound.count:
                return Excess(place, "count", until)
            if bound.cost is not None and spent + (price or 0) > bound.cost:
                return Excess(place, "cost", until)
        return None

    def reservation(self, bounds: Sequence[Bound], price: int | None) -> str | None:
        """Return of what budgets a price is to be reserved; None: no money is limited."""
        if price is None or all(bound.cost is None for bound in bounds):
            return None
        subjects = sorted({bound.subject for bound in bounds})
        return text([(subject, self._held[subject][0]) for subject in subjects])

    def add(
        self, prediction_id: str, bounds: Sequence[Bound], price: int | None, at: float
    ) -> None:
        """Count a prediction that was made, and reserve its price."""
        money = price or 0
        for subject in {bound.subject for bound in bounds}:
            until, orders, spent = self._held[subject]
            self._held[subject] = (until, orders + 1, spent + money)
            more, added = self._added.get(subject, (0, 0))
            self._added[subject] = (more + 1, added + money)
        if self.reservation(bounds, price) is not None:
            self._reserved.append((prediction_id, "reserved", money, at))

    def write(self) -> Steps[None]:
        rows = [(subject, *added) for subject, added in sorted(self._added.items())]
        if rows:
            ledger = [(sql.insert_ledger, self._reserved)] if self._reserved else []
            yield Write([(sql.add_to_counts, rows), *ledger])


class Settlements:
    """What is settled or released of reservations by one batch."""

    def __init__(self) -> None:
        self._ledger: list[tuple[str, Entry, int, float]] = []
        self._spent: dict[tuple[str, float], int] = defaultdict(int)

    def add(
        self, prediction_id: str, reserved: str | None, entry: Entry, amount: int, at: float
    ) -> None:
        """Settle a prediction, where something was reserved; `amount` is added to what is spent."""
        if reserved is None:
            return
        self._ledger.append((prediction_id, entry, amount, at))
        if amount:
            for subject, until in msgspec.json.decode(reserved, type=list[tuple[str, float]]):
                self._spent[subject, until] += amount

    def write(self) -> Steps[None]:
        if not self._ledger:
            return
        if self._spent:  # most cost what was expected, and then no other server need wait
            yield Run(sql.hold_spent, rows=sorted((subject,) for subject, _ in self._spent))
            rows = [(*counted, amount) for counted, amount in sorted(self._spent.items())]
            yield Write([(sql.correct_spent, rows)])
        yield Write([(sql.insert_ledger, self._ledger)])


def forget_counts(items: Sequence[tuple[float, int]]) -> Steps[list[None]]:
    for before, most in items:
        yield Run(sql.forget_counts, {"before": before, "most": most})
    return [None] * len(items)


class BudgetStore:
    """The counts of limits of one store."""

    def __init__(self, store: Engine) -> None:
        self._store = store

    async def fullest(self, now: float) -> dict[str, int]:
        """Return the most that was spent of one of each kind of budget, in microdollars."""
        return {row["kind"]: row["spent"] for row in await self._store.read(sql.fullest, now=now)}

    async def forget_counts(self, before: float, most: int) -> None:
        """Delete counts of a time that was over before then, so many at most."""
        await self._store.write(forget_counts, (before, most))
