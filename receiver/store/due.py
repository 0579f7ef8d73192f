"""Due work: what a drain can run now, and when the next work falls due."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

import msgspec

from receiver.store.statement import Row, Statements

sql: Final = Statements("due")


class Due(msgspec.Struct, frozen=True, kw_only=True):
    """The due work at one moment, of the requested handlers and providers."""

    handlers: list[str]
    """Handlers with deliveries to run now, also with claims that were lost with their process."""
    submits: list[str]
    """Providers with due queued predictions, even if there is no room for them."""
    polls: list[str]
    """Providers with predictions to be polled now."""
    claimed: bool
    """Whether other processes, alive or dead, hold claims on deliveries."""
    next_due: float | None
    """Seconds until the first work falls due, lost claims included; 0: now; None: no work."""


def due_of(
    rows: Iterable[Row],
    handlers: Collection[str],
    providers: Collection[str],
    now: float,
    *,
    ahead: float,
) -> Due:
    """Return the due work that the rows of `select_due` contain.

    Leases use the server's clock, which is `ahead` seconds ahead of ours.
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
