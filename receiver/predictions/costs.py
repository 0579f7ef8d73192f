"""Cost reports: sums of costs by day, provider, model, recipe, key and metadata."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any, Final, NamedTuple, get_args

from receiver.model.answers import CostReport, CostRow
from receiver.model.costs import MICRO, Account
from receiver.model.errors import Problem
from receiver.model.recipes import METADATA, Per
from receiver.predictions.limits import Limits, end_of, kind_of
from receiver.store.costs import DaySum
from receiver.store.facade import Store

_MOST_ROWS: Final = 10_000
_MOST_SUMS: Final = 100_000
"""The most daily sums that one report reads."""
_USUAL: Final = 30
"""Days of a report whose first day is not given."""
_EPOCH: Final = date(1970, 1, 1).toordinal()
_OF_DAYS: Final = frozenset({"day", "provider", "model"})
"""Groupings that do not need the accounts of sums."""
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001 - wide ones
"""First characters of a text that a spreadsheet would take for a formula."""


class Spending(NamedTuple):
    """The costs of today so far, and the used part of budgets."""

    today: Mapping[str, float]
    """Dollars by provider."""
    unknown: Mapping[str, int]
    """Number of predictions without a known cost, by provider."""
    used: Mapping[str, float]
    """The used part (1.0: all) of the fullest budget of each kind, as `person/day`."""


async def read_spending(store: Store, limits: Limits, now: float) -> Spending:
    """Read the spending from the database, so that it is the same in every process."""
    day = _day_of(_today(now))
    amounts: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for row in await store.costs.sums(day, day + 1, _MOST_SUMS):
        amounts[row.provider] += row.amount
        unknown[row.provider] += row.unknown
    costs = [(kind_of(each), each.cost) for each in limits.all if each.cost is not None]
    ends = [end_of(per, now) for per in get_args(Per)]
    fullest = await store.budgets.fullest(*ends) if costs else {}
    used: dict[str, float] = {}
    for kind, most in costs:
        part = fullest.get(kind, 0) / most if most else 1.0
        used[kind] = max(part, used.get(kind, 0.0))
    return Spending({name: each / MICRO for name, each in amounts.items()}, unknown, used)


Part = Callable[[DaySum, Account], str | None]
_PARTS: Final[Mapping[str, Part]] = {
    "day": lambda row, _: date.fromordinal(_EPOCH + row.day).isoformat(),
    "provider": lambda row, _: row.provider,
    "model": lambda row, _: row.model,
    "recipe": lambda _, account: account.recipe,
    "key": lambda _, account: account.key or None,
}


def _day_of(when: date) -> int:
    """Return the number of days from 1970-01-01 to a date."""
    return when.toordinal() - _EPOCH


def _today(now: float) -> date:
    return datetime.fromtimestamp(now, UTC).date()


async def read_report(
    store: Store,
    by: str,
    metadata: Collection[str],
    since: date | None,
    until: date | None,
    now: float,
) -> CostReport:
    """Return the costs from one day to before another, by groups; by default of thirty days.

    Raises Problem for an unknown group, or if there are too many sums or groups.
    """
    parts = {name: _part(name, metadata) for name in by.split(",")}
    end = until or date.fromordinal(_today(now).toordinal() + 1)
    begin = since or date.fromordinal(max(end.toordinal() - _USUAL, 1))
    by_account = not parts.keys() <= _OF_DAYS
    rows = await store.costs.sums(
        _day_of(begin), _day_of(end), _MOST_SUMS + 1, by_account=by_account
    )
    if len(rows) > _MOST_SUMS:
        raise _too_many()
    return _report(rows, parts, begin, end)


def _part(name: str, metadata: Collection[str]) -> Part:
    if name in _PARTS:
        return _PARTS[name]
    label = name.removeprefix(METADATA)
    if label == name:
        words = ", ".join(_PARTS)
        raise Problem(422, "invalid-request", f"by must be of {words}, metadata.NAME, by comma")
    if label not in metadata:
        detail = f"by: costs are not added up by {name}: RECEIVER_COSTS_BY names what they are"
        raise Problem(422, "invalid-request", detail)
    return lambda _, account: account.metadata.get(label)


def _report(
    rows: Iterable[DaySum], parts: Mapping[str, Part], since: date, until: date
) -> CostReport:
    """Return daily sums grouped by these parts; raise Problem if there are too many groups."""
    accounts: dict[str, Account] = {}
    sums: dict[tuple[str | None, ...], list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in rows:
        if row.account not in accounts:
            accounts[row.account] = Account.read(row.account)
        account = accounts[row.account]
        of = sums[tuple(part(row, account) for part in parts.values())]
        for place, more in enumerate((row.amount, row.predictions, row.unknown)):
            of[place] += more
    if len(sums) > _MOST_ROWS:
        raise _too_many()
    names = list(parts)
    ordered = sorted(sums, key=lambda of: [value or "" for value in of])
    return CostReport(
        since=since,
        until=until,
        data=[_row(dict(zip(names, of, strict=True)), sums[of]) for of in ordered],
        total=_row({}, [sum(each) for each in zip(*sums.values(), strict=True)] or [0, 0, 0]),
    )


def _too_many() -> Problem:
    return Problem(422, "invalid-request", "that is too much at once: ask for fewer days or groups")


def _row(of: dict[str, str | None], sums: Sequence[int]) -> CostRow:
    amount, predictions, unknown = sums
    return CostRow(of=of, amount=amount / MICRO, predictions=predictions, unknown=unknown)


def as_csv(found: CostReport) -> str:
    """Return the rows of a report as CSV."""
    text = io.StringIO()
    writer = csv.writer(text)
    names = list(found.data[0].of) if found.data else []
    writer.writerow([*names, "amount", "currency", "predictions", "unknown"])
    for row in found.data:
        of = [_cell(row.of[name]) for name in names]
        amount = f"{row.amount:.6f}".rstrip("0").rstrip(".")
        writer.writerow([*of, amount, found.currency, row.predictions, row.unknown])
    return text.getvalue()


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
