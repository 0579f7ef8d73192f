"""`/v1/costs`: what was spent."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import date
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from receiver.http.declare import get
from receiver.model.answers import CostReport
from receiver.predictions.costs import (
    MOST_SUMS,
    as_csv,
    by_account,
    day_of,
    days,
    parts_of,
    report,
    too_many,
)
from receiver.store.costs import CostStore

_GROUP: Final = r"(day|provider|model|recipe|key|metadata\.[!-+\--~]+)"


class CostsAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which costs, and how they are put together."""

    since: date | None = None
    """The first day, in UTC; else thirty before `until`."""
    until: date | None = None
    """The day after the last one; else today is the last."""
    by: Annotated[
        str,
        Meta(pattern=rf"^{_GROUP}(,{_GROUP})*$", max_length=300, examples=["day,provider"]),
    ] = "day"
    """Names of groups, by comma: `day`, `provider`, `model`, `recipe`, `key`, and `metadata.NAME`
    where RECEIVER_COSTS_BY has the name."""


class CostRoutes:
    """The routes about costs."""

    def __init__(
        self, store: CostStore, metadata: Collection[str], clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._metadata = metadata
        self._clock = clock

    @get("/v1/costs", "costs by group", problems=["invalid-request"], csv=as_csv)
    async def costs(self, query: CostsAsked) -> CostReport:
        """Read what was spent, by groups.

        Of what has ended on days of UTC, also of predictions that were erased or deleted since.
        `Accept: text/csv` gives the groups as a table.
        """
        parts = parts_of(query.by, self._metadata)
        since, until = days(query.since, query.until, self._clock())
        rows = await self._store.sums(
            day_of(since), day_of(until), MOST_SUMS + 1, by_account=by_account(parts)
        )
        if len(rows) > MOST_SUMS:
            raise too_many()
        return report(rows, parts, since, until)
