"""Budgets: the counts and reservations under limits, and the ledger of their changes.

A price is reserved in the transaction that creates the prediction, and settled in the one that ends
it. Each locks the row of a count until its commit, so that no two together exceed a limit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final, Literal, TypeAlias

import msgspec

from receiver.store.engine import Repository
from receiver.store.statement import Run, Statements, Steps, Write, text

sql: Final = Statements("budgets")

Entry: TypeAlias = Literal["reserved", "settled", "released"]


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """One limit, as it applies to one prediction."""

    subject: str
    """A digest of what is counted and its period; bounds of equal subject and end share a count."""
    kind: str = ""
    """What it counts by, and its period, such as `person/day`."""
    until: float
    """When its hour, day or month ends."""
    count: int | None
    cost: int | None
    """Microdollars."""

    @property
    def key(self) -> str:
        """Return the name of its count, which covers one hour, day or month only.

        So a count made by a clock that was ahead blocks nothing once the clock is corrected, and of
        two servers whose clocks differ, neither resets the count of the other.
        """
        return f"{self.subject}/{self.until:.0f}"


class Excess(msgspec.Struct, frozen=True):
    """The bound that a prediction would have exceeded."""

    bound: int
    """Its index among the bounds of the prediction."""
    over: Literal["count", "cost"]
    until: float
    """When there is room again."""


class Counts:
    """The counts under the limits of a batch; their rows are locked."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, int]] = {}
        self._added: dict[str, tuple[int, int]] = {}
        self._reserved: list[tuple[str, Entry, int, float]] = []

    def hold(self, bounds: Iterable[Bound]) -> Steps[None]:
        """Lock the rows, sorted, so that two transactions cannot deadlock."""
        for key, bound in sorted({bound.key: bound for bound in bounds}.items()):
            params = {"subject": key, "until": bound.until, "kind": bound.kind}
            [row] = yield Run(sql.hold_count, params)
            self._held[key] = (row["orders"], row["spent"])

    def excess(self, bounds: Sequence[Bound], price: int | None) -> Excess | None:
        """Return the first bound that one more prediction would exceed."""
        for place, bound in enumerate(bounds):
            orders, spent = self._held[bound.key]
            if bound.count is not None and orders >= bound.count:
                return Excess(place, "count", bound.until)
            if bound.cost is not None and spent + (price or 0) > bound.cost:
                return Excess(place, "cost", bound.until)
        return None

    def reservation(self, bounds: Sequence[Bound], price: int | None) -> str | None:
        """Return the budgets to reserve a price from, as JSON; None: no price or no cost limit."""
        if price is None or all(bound.cost is None for bound in bounds):
            return None
        return text(sorted({(bound.key, bound.until) for bound in bounds}))

    def add(
        self, prediction_id: str, bounds: Sequence[Bound], price: int | None, at: float
    ) -> None:
        """Count a created prediction, and reserve its price."""
        money = price or 0
        for key in {bound.key for bound in bounds}:
            orders, spent = self._held[key]
            self._held[key] = (orders + 1, spent + money)
            more, added = self._added.get(key, (0, 0))
            self._added[key] = (more + 1, added + money)
        if self.reservation(bounds, price) is not None:
            self._reserved.append((prediction_id, "reserved", money, at))

    def write(self) -> Steps[None]:
        rows = [(key, *added) for key, added in sorted(self._added.items())]
        if rows:
            ledger = [(sql.insert_ledger, self._reserved)] if self._reserved else []
            yield Write([(sql.add_to_counts, rows), *ledger])


class Settlements:
    """The reservations that one batch settles or releases."""

    def __init__(self) -> None:
        self._ledger: list[tuple[str, Entry, int, float]] = []
        self._spent: dict[tuple[str, float], int] = defaultdict(int)

    def add(
        self, prediction_id: str, reserved: str | None, entry: Entry, amount: int, at: float
    ) -> None:
        """Settle a prediction if it has a reservation; `amount` is added to the sum spent."""
        if reserved is None:
            return
        self._ledger.append((prediction_id, entry, amount, at))
        if amount:
            for subject, until in msgspec.json.decode(reserved, type=list[tuple[str, float]]):
                self._spent[subject, until] += amount

    def write(self) -> Steps[None]:
        if not self._ledger:
            return
        if self._spent:  # empty if all cost as expected, and then no other server must wait
            yield Run(sql.hold_spent, rows=sorted((subject,) for subject, _ in self._spent))
            rows = [(*counted, amount) for counted, amount in sorted(self._spent.items())]
            yield Write([(sql.correct_spent, rows)])
        yield Write([(sql.insert_ledger, self._ledger)])


class BudgetStore(Repository):
    """The counts of limits of one store."""

    async def fullest(self, hour: float, day: float, month: float) -> dict[str, int]:
        """Return the highest sum spent from one budget of each kind, in microdollars.

        `hour`, `day` and `month` are the ends of the current ones.
        """
        rows = await self._store.read(sql.fullest, hour=hour, day=day, month=month)
        return {row["kind"]: row["spent"] for row in rows}

    async def forget_counts(self, now: float, age: float, most: int) -> None:
        """Delete counts whose period ended over `age` seconds ago, `most` at most."""
        await self._store.run(sql.forget_counts, before=now - age, age=age, most=most)
