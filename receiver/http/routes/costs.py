"""The route `/v1/costs`: the costs of predictions."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from receiver.http.declare import get
from receiver.http.parts import Parts
from receiver.model.answers import CostReport
from receiver.predictions.costs import as_csv, read_report

_GROUP: Final = r"(day|provider|model|recipe|key|metadata\.[!-+\--~]+)"


class CostsAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which costs to return, and how to group them."""

    since: date | None = None
    """The first day, in UTC; by default thirty days before `until`."""
    until: date | None = None
    """The day after the last one; by default the last day is today."""
    by: Annotated[
        str,
        Meta(pattern=rf"^{_GROUP}(,{_GROUP})*$", max_length=300, examples=["day,provider"]),
    ] = "day"
    """Names of groups, separated by commas: `day`, `provider`, `model`, `recipe`, `key`, and
    `metadata.NAME` if RECEIVER_COSTS_BY has the name."""


class CostRoutes:
    """The routes about costs."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._metadata = parts.settings.costs_by
        self._clock = parts.runtime.clock

    @get("/v1/costs", "costs by group", problems=["invalid-request"], csv=as_csv)
    async def costs(self, query: CostsAsked) -> CostReport:
        """Read costs by groups.

        The costs of predictions that ended on these days (UTC), including those erased or deleted
        since. `Accept: text/csv` returns the groups as a table.
        """
        return await read_report(
            self._store, query.by, self._metadata, query.since, query.until, self._clock()
        )
