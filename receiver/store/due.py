"""What is due now, and when the next thing falls due, as a drain reads it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

import msgspec

from receiver.store.statement import Row, Statements

sql: Final = Statements("due")


class Due(msgspec.Struct, frozen=True, kw_only=True):
    """What was due at one moment, of the handlers and providers that were asked for."""

    handlers: list[str]
    """With deliveries to run now, also those whose claim was lost with its process."""
    submits: list[str]
    """Providers with queued predictions; there may be no room for them."""
    polls: list[str]
    """Providers with predictions to be polled now."""
    claimed: bool
    """Whether others hold deliveries, whose processes may be alive or not."""
    next_due: float | None
    """Seconds until the first of all falls due, lost claims too; 0: now; None: there is nothing."""


def due_of(
    rows: Iterable[Row],
    handlers: Collection[str],
    providers: Collection[str],
    now: float,
    *,
    ahead: float,
) -> Due:
    """Put the rows of `select_due` together.

    Leases are kept by the server's clock, which is so many seconds ahead of ours.
    """
    wanted = {"delivery": handlers, "claim": handlers, "submit": providers, "poll": providers}
    times: dict[str, dict[str, float]] = {kind: {} for kind in wanted}
    for row in rows:
        if row["due_at"] is not None and row["name"] in wanted[row["kind"]]:
            at = row["due_at"] - (ahead if row["kind"] == "claim" else 0.0)
            times[row["kind"]][row["name"]] = at
    now_due = {
        kind: {name for name, at in found.items() if at <= now} for kind, found in times.items()
    }
    first = min((at for found in times.values() for at in found.values()), default=None)
    return Due(
        handlers=sorted(now_due["delivery"] | now_due["claim"]),
        submits=sorted(now_due["submit"]),
        polls=sorted(now_due["poll"]),
        claimed=bool(times["claim"]),
        next_due=None if first is None else max(first - now, 0.0),
    )
