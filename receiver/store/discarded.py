"""Discarded items: arrivals that reached no handler, and the reasons.

Duplicates, late outcomes and callbacks of unknown predictions are rows of `callbacks`; an event
that no handler matched is marked in `events`. Callbacks that were not proved are only counted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from heapq import merge
from typing import Any, Final, TypeAlias

import msgspec

from receiver.model.answers import DiscardedItem, Kind, Page
from receiver.store.engine import Repository
from receiver.store.paging import rfc3339
from receiver.store.statement import Listing, Row, Run, Statements, Steps

sql: Final = Statements("discarded")

KINDS: Final[tuple[Kind, ...]] = ("duplicate", "late", "unknown", "rejected", "unmatched")
OTHER: Final = "other"
"""The source that stands for all sources without a count of their own."""
MOST_REJECTIONS: Final = 1000
"""The most counts that are stored by source; all further sources are counted as `other`."""
_MEMORY: Final = 30 * 86400.0
"""Seconds after which an unchanged count is deleted."""


class Rejection(msgspec.Struct, frozen=True):
    """A number of rejected callbacks of one provider, reason and source."""

    provider: str
    reason: str
    source: str
    times: int
    first_at: float
    last_at: float


Sort: TypeAlias = tuple[str, str, str]
"""Provider, reason and source."""


def add_up(sums: dict[Sort, Rejection], one: Rejection, counted: Collection[Sort]) -> Sort:
    """Add a count to its sum, or to that of `other` if there is no room; return the sum's key.

    `counted` contains the keys that already have a count of their own.
    """
    key = (one.provider, one.reason, one.source)
    if key not in counted and len(counted) >= MOST_REJECTIONS:
        key = (one.provider, one.reason, OTHER)
    before = sums.get(key)
    times = one.times + (before.times if before else 0)
    first_at = before.first_at if before else one.first_at
    sums[key] = Rejection(*key, times, first_at, one.last_at)
    return key


CURSOR: Final = re.compile(r"^[0-9]{1,12}(\.[0-9]{1,9})?_([0-9a-f]{2}){0,500}$", re.ASCII)
"""The syntax of a cursor; every text that matches is accepted."""


class BadCursor(ValueError):
    """A cursor with another syntax."""


# The kinds in each list.
_LISTS: Final[Mapping[Listing, tuple[Kind, ...]]] = {
    sql.lists["list_callbacks"]: ("duplicate", "late", "unknown"),
    sql.lists["list_rejections"]: ("rejected",),
    sql.lists["list_unmatched"]: ("unmatched",),
}


def count(items: Sequence[Sequence[Rejection]]) -> Steps[list[None]]:
    """Add counts to the stored ones."""
    found = [rejection for item in items for rejection in item]
    yield Run(sql.forget, {"before": max(one.last_at for one in found) - _MEMORY})
    counted = {
        (row["provider"], row["reason"], row["source"]) for row in (yield Run(sql.select_counted))
    }
    sums: dict[Sort, Rejection] = {}
    for one in found:
        counted.add(add_up(sums, one, counted))
    # Sorted, so that two transactions cannot deadlock.
    yield Run(sql.count, rows=[msgspec.structs.astuple(sums[key]) for key in sorted(sums)])
    return [None] * len(items)


class DiscardedItems(Repository):
    """The discarded items of one store."""

    async def count(self, rejections: Sequence[Rejection]) -> None:
        """Add counts in one small write; those of one source must be in order of their times."""
        await self._store.write(count, rejections)

    async def page(
        self,
        limit: int,
        *,
        kind: Kind | None = None,
        provider: str | None = None,
        prediction: str | None = None,
        cursor: str | None = None,
    ) -> Page[DiscardedItem]:
        """Return a page of items, the latest first. Raises BadCursor."""
        named = {"provider": provider, "prediction": prediction}
        given = {name: value for name, value in named.items() if value is not None}
        before = _opened(cursor) if cursor is not None else {}
        always = ["base", *(["cursor"] if before else [])]
        found: list[list[Row]] = []
        for listing, kinds in _LISTS.items():
            if kind in (None, *kinds) and given.keys() <= listing.names:
                wanted = given if kind is None or len(kinds) == 1 else {**given, "kind": kind}
                statement = listing.by([*always, *wanted])
                found.append(await self._store.read(statement, **before, **wanted, limit=limit + 1))
        rows = list(merge(*found, key=_order, reverse=True))
        more = len(rows) > limit
        rows = rows[:limit]
        return Page(
            data=[_discarded(row) for row in rows],
            next_cursor=_place(rows[-1]) if more else None,
        )


def _order(row: Row) -> tuple[float, str]:
    return row["last_at"], row["row_key"]


def _discarded(row: Row) -> DiscardedItem:
    item = {name: row[name] for name in DiscardedItem.__struct_fields__}
    times = {name: rfc3339(row[name]) for name in ("first_at", "last_at")}
    return DiscardedItem(**item | times)


def _place(row: Row) -> str:
    """Return the cursor of a page's last row: its time, and its key in hex."""
    at, key = _order(row)
    return f"{at!r}_{key.encode().hex()}"


def _opened(cursor: str) -> dict[str, Any]:
    if not CURSOR.fullmatch(cursor):
        raise BadCursor(cursor)
    at, _, key = cursor.partition("_")
    return {"before": float(at), "key": bytes.fromhex(key).decode(errors="replace")}
