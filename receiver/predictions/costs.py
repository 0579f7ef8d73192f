"""What was spent, by day, provider, model, recipe, key and metadata: the sums put together."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any, Final

from receiver.model.answers import CostReport, CostRow
from receiver.model.costs import MICRO, Account
from receiver.model.errors import Problem
from receiver.store.costs import DaySum

METADATA: Final = "metadata."
_MOST_ROWS: Final = 10_000
_USUAL: Final = 30
"""Days that are told of where nobody says which."""
_EPOCH: Final = date(1970, 1, 1).toordinal()
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")
"""How a text begins that a spreadsheet would take for a formula."""

Part = Callable[[DaySum, Account], str | None]
_PARTS: Final[Mapping[str, Part]] = {
    "day": lambda row, _: date.fromordinal(_EPOCH + row.day).isoformat(),
    "provider": lambda row, _: row.provider,
    "model": lambda row, _: row.model,
    "recipe": lambda _, account: account.recipe,
    "key": lambda _, account: account.key or None,
}


def day_of(when: date) -> int:
    """Return the number of a day, since 1970."""
    return when.toordinal() - _EPOCH


def today(now: float) -> date:
    return datetime.fromtimestamp(now, UTC).date()


def parts_of(by: str, metadata: Collection[str]) -> dict[str, Part]:
    """Return what costs are to be added up by; raise Problem for what they are not."""
    return {name: _part(name, metadata) for name in by.split(",")}


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


def report(
    rows: Iterable[DaySum], parts: Mapping[str, Part], since: date, until: date
) -> CostReport:
    """Put the sums of days together by these parts."""
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
        raise Problem(422, "invalid-request", f"more than {_MOST_ROWS} rows: ask for less at once")
    names = list(parts)
    ordered = sorted(sums, key=lambda of: [value or "" for value in of])
    return CostReport(
        since=since,
        until=until,
        data=[_row(dict(zip(names, of, strict=True)), sums[of]) for of in ordered],
        total=_row({}, [sum(each) for each in zip(*sums.values(), strict=True)] or [0, 0, 0]),
    )


def _row(of: dict[str, str | None], sums: Sequence[int]) -> CostRow:
    amount, predictions, unknown = sums
    return CostRow(of=of, amount=amount / MICRO, predictions=predictions, unknown=unknown)


def as_csv(found: CostReport) -> str:
    """Write the rows of a report as CSV."""
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


def days(since: date | None, until: date | None, now: float) -> tuple[date, date]:
    """Return from which day and up to before which; the last thirty where nothing is said."""
    end = until or date.fromordinal(today(now).toordinal() + 1)
    return since or date.fromordinal(max(end.toordinal() - _USUAL, 1)), end
