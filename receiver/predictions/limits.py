"""Rate limits, budgets and allow lists of orders.

Hours, days and months are those of UTC: a limit begins anew with the next one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from hashlib import blake2s
from typing import Any, Final

import msgspec

from receiver.model.errors import Problem
from receiver.model.recipes import MICRO, Allow, Limit, Per
from receiver.model.values import Order
from receiver.store.orders import Bound, Excess

_SECONDS: Final = {"hour": 3600.0, "day": 86400.0}
_METADATA: Final = "metadata."
_EACH: Final = {
    "person": " for each person",
    "place": " in each place",
    "recipe": " of each recipe",
    "all": " in all",
}


def end_of(per: Per, now: float) -> float:
    """Return when the hour, day or month that it is now ends."""
    if per in _SECONDS:
        return (math.floor(now / _SECONDS[per]) + 1) * _SECONDS[per]
    at = datetime.fromtimestamp(now, UTC)
    year, month = (at.year, at.month + 1) if at.month < 12 else (at.year + 1, 1)  # noqa: PLR2004
    return datetime(year, month, 1, tzinfo=UTC).timestamp()


def bounds_of(
    limits: Iterable[Limit], order: Order, metadata: Mapping[str, Any], now: float
) -> tuple[tuple[Limit, ...], tuple[Bound, ...]]:
    """Return the limits that hold for an order, and beside them what is counted for each.

    A limit by what the order does not say, as a person, does not hold for it.
    """
    holding = [
        (limit, value) for limit in limits if (value := _value(limit, order, metadata)) is not None
    ]
    bounds = tuple(
        Bound(
            subject=_subject(limit, value),
            until=end_of(limit.per, now),
            count=limit.count,
            cost=limit.cost,
        )
        for limit, value in holding
    )
    return tuple(limit for limit, _ in holding), bounds


def _value(limit: Limit, order: Order, metadata: Mapping[str, Any]) -> Any:
    """Return whose orders are counted together; None: the order says nothing of the kind."""
    if limit.by == "all":
        return "all"
    if limit.by.startswith(_METADATA):
        return metadata.get(limit.by.removeprefix(_METADATA))
    return getattr(order, limit.by)


def _subject(limit: Limit, value: Any) -> str:
    """Digest what is counted: it may be long, and a person's name is not to be kept for it."""
    meant = msgspec.json.encode([limit.per, limit.by, value], order="deterministic")
    return blake2s(meant, digest_size=16).hexdigest()


def check_price(limits: Iterable[Limit], recipe: str, price: int | None) -> None:
    """Refuse an order without a price where money is limited."""
    if price is None and any(limit.cost is not None for limit in limits):
        detail = f"money is limited here, and {recipe} has no price: its recipe must say one"
        raise Problem(402, "price-unknown", detail)


def refusal(limit: Limit, excess: Excess, now: float) -> Problem:
    """Return what to say of an order that would have gone over a limit."""
    wait = max(math.ceil(excess.until - now), 1)
    each = _EACH.get(limit.by, f" for each {limit.by.removeprefix(_METADATA)}")
    again = f"try again in {_spoken(wait)}"
    if excess.over == "count":
        most = f"{limit.count} a {limit.per}{each}"
        detail = f"that is enough for this {limit.per}: there may be {most}; {again}"
        return Problem(429, "over-limit", detail, retry_after=wait)
    most = f"${(limit.cost or 0) / MICRO:g} a {limit.per}{each}"
    detail = f"the money for this {limit.per} is spent: there is {most}; {again}"
    return Problem(402, "over-budget", detail, retry_after=wait)


def _spoken(seconds: int) -> str:
    for name, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds > size:
            number = math.ceil(seconds / size)
            return f"{number} {name}{'s' if number > 1 else ''}"
    return f"{seconds} seconds" if seconds > 1 else "a second"


def check_allowed(allow: Iterable[Allow], order: Order) -> None:
    """Refuse a person or a place that no entry allows.

    An order that names neither is that of the program itself, whose key or signature was proved.
    """
    if order.person is None and order.place is None:
        return
    for each in allow:
        if fnmatchcase(order.place or "", each.place) and fnmatchcase(
            order.person or "", each.person
        ):
            return
    raise Problem(403, "not-allowed", "you may not order here; whoever runs this can allow it")
