"""The backlog: pending, running, overdue and held-back work, counted at a bounded cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Final

import msgspec

from receiver.model.states import TERMINAL
from receiver.model.values import Status
from receiver.store.engine import Repository
from receiver.store.statement import Row, Statements

sql: Final = Statements("backlog")

LIVING: Final = tuple(status for status in Status if status not in TERMINAL)


class Backlog(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of the open work; each stops at 10,000, as more is just as bad."""

    pending: dict[tuple[str, str], int] = {}
    """Deliveries by handler and state, `pending` or `running`."""
    oldest: dict[str, float] = {}
    """Since when each handler's oldest delivery is open, in unix seconds."""
    living: dict[tuple[str, str], int] = {}
    """Predictions by provider and status."""
    held: dict[str, str] = {}
    """Handlers whose deliveries wait: `paused` by hand, or `open` after a run of failures."""
    reasons: dict[str, str] = {}
    """The last failure of each held handler."""
    dead: int = 0
    """Dead deliveries."""
    overdue_deliveries: int = 0
    """Overdue deliveries of handlers that are not held."""
    overdue_predictions: int = 0
    """Predictions whose poll is overdue."""

    def of_handlers(self) -> dict[str, int]:
        """Return the pending deliveries by handler, without the running ones."""
        return {name: count for (name, state), count in self.pending.items() if state == "pending"}


class BacklogReader(Repository):
    """The counts, made in the database and so the same in every process."""

    async def depth(self, providers: Sequence[str], before: float = 0.0) -> Backlog:
        """Count all open work, and with `before`, as overdue, what has been due since then.

        Raises StoreUnavailable.
        """
        rows = await self._store.read(sql.count_all, wanted(providers), before=before)
        return backlog_of(rows, before)

    async def few(self, providers: Sequence[str]) -> Backlog:
        """Count at a lower cost, for display: pending deliveries up to 1,000, and no ages."""
        rows = await self._store.read(sql.count_few, wanted(providers), before=0.0)
        return backlog_of(rows, 0.0)


def wanted(providers: Sequence[str]) -> list[tuple[str, str]]:
    """Return the rows for `count_all`: the pairs of provider and status to count predictions by."""
    return list(product(providers, LIVING))


def backlog_of(rows: Iterable[Row], before: float) -> Backlog:
    """Return the backlog that the rows of `count_all` contain."""
    found: dict[str, list[Row]] = {"delivery": [], "dead": [], "prediction": [], "breaker": []}
    for row in rows:
        found[row["kind"]].append(row)
    breakers = found["breaker"]
    waiting = {row["name"] for row in breakers if row["state"] == "paused" or row["since"] > before}
    oldest: dict[str, float] = {}
    for row in found["delivery"]:
        if (since := row["since"]) is not None:
            oldest[row["name"]] = min(since, oldest.get(row["name"], since))
    return Backlog(
        pending={(row["name"], row["state"]): row["number"] for row in found["delivery"]},
        oldest=oldest,
        living={(row["name"], row["state"]): row["number"] for row in found["prediction"]},
        held={row["name"]: row["state"] for row in breakers},
        reasons={row["name"]: row["reason"] for row in breakers},
        dead=sum(row["number"] for row in found["dead"]),
        overdue_deliveries=sum(
            row["overdue"] for row in found["delivery"] if row["name"] not in waiting
        ),
        overdue_predictions=sum(row["overdue"] for row in found["prediction"]),
    )
