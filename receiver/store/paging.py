"""Pagination: lists by page, newest first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

from receiver.model.answers import Page
from receiver.model.states import TERMINAL
from receiver.model.values import Status, utc
from receiver.store.engine import Engine
from receiver.store.statement import Listing, Row

T = TypeVar("T")


# For values that few rows have, the clause repeats the condition of a partial index.
_NARROWER: Final[dict[tuple[str, str], str]] = {
    **{("status", status): "living" for status in Status if status not in TERMINAL},
    ("status", Status.FAILED): "unsuccessful",
    ("status", Status.CANCELED): "unsuccessful",
    ("state", "dead"): "failed",
    ("state", "skipped"): "failed",
    ("state", "running"): "running",
}


def page_of(rows: list[T], limit: int) -> Page[T]:
    """Return a page of rows; there is another page if there are more than `limit` rows."""
    data = rows[:limit]
    return Page(data=data, next_cursor=data[-1].id if len(rows) > limit else None)  # type: ignore[attr-defined] # each listed item has an id


async def listed(
    store: Engine, listing: Listing, given: Mapping[str, str | None], limit: int
) -> list[Row]:
    """Return the rows that match the given filters, up to one more than `limit`."""
    params = {name: value for name, value in given.items() if value is not None}
    return await store.read(listing.by(narrowed(params)), **params, limit=limit + 1)


def narrowed(given: Mapping[str, str]) -> list[str]:
    """Return the names of the filters for values, each the narrowest with a partial index."""
    return [_NARROWER.get((name, value), name) for name, value in given.items()]


def rfc3339(seconds: float | None) -> str | None:
    return None if seconds is None else utc(seconds).isoformat().replace("+00:00", "Z")
