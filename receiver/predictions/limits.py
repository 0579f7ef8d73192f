"""Rate limits, budgets, prices and allow lists of predictions.

Hours, days and months are those of UTC; the count of a limit starts again with each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from hashlib import blake2s
from typing import Any, Final

import msgspec

from receiver.model.costs import MICRO, Account, Price
from receiver.model.errors import Problem
from receiver.model.recipes import METADATA, Allow, Limit, Per
from receiver.model.requests import SubmitRequest
from receiver.model.values import Order, plain
from receiver.settings import Settings
from receiver.store.budgets import Bound, Excess

_SECONDS: Final = {"hour": 3600.0, "day": 86400.0}
_EACH: Final = {
    "person": " for each person",
    "place": " in each place",
    "recipe": " of each recipe",
    "key": " for each API key",
    "provider": " at each provider",
    "model": " of each model",
    "all": " in all",
}
_LONGEST_LABEL: Final = 100
"""Characters of a metadata value that costs are added up by; the rest is cut off."""
_LARGEST_LABELS: Final = 1500
"""Bytes, as JSON, of all these values together, as an index has to hold them."""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """The expected price, the limits and the cost account of a prediction."""

    price: Price | None
    limits: tuple[Limit, ...]
    bounds: tuple[Bound, ...]
    """One for each of the limits, in their order."""
    account: str | None


class Limits:
    """All limits and prices of one run: limits of orders, and limits of all submits."""

    def __init__(self, settings: Settings) -> None:
        self._costs_by = settings.costs_by
        self.exchange(settings)

    def exchange(self, settings: Settings) -> None:
        """Use the limits and prices of these settings from now on."""
        self.all = (*settings.limits, *settings.recipes.limits)
        self.prices = settings.prices

    def terms(
        self, request: SubmitRequest, order: Order | None, price: int | None, now: float
    ) -> Terms:
        """Return the terms of a prediction; `price` is that of its recipe.

        Raises Problem if money is limited and there is no price. A limit by a value that the
        prediction does not have, such as a person, does not apply to it.
        """
        holding = [
            (limit, value)
            for limit in self.all
            if order is not None or not limit.of_orders
            if (value := _value(limit, request, order)) is not None
        ]
        limits = tuple(limit for limit, _ in holding)
        found = self._price(request, price)
        if found is None and any(limit.cost is not None for limit in limits):
            raise _unknown(request, order)
        return Terms(
            price=found,
            limits=limits,
            bounds=tuple(_bound(limit, value, now) for limit, value in holding),
            account=self._account(request, order),
        )

    def _price(self, request: SubmitRequest, price: int | None) -> Price | None:
        if price is not None:
            return Price(price, "recipe")
        amount = self.prices.expected(request.provider, request.model, request.input)
        return None if amount is None else Price(amount, "computed")

    def _account(self, request: SubmitRequest, order: Order | None) -> str | None:
        values = {name: request.metadata.get(name) for name in self._costs_by}
        return Account(
            recipe=order.recipe if order else None,
            key=request.caller,
            metadata={
                name: _label(value, _LARGEST_LABELS // len(values))
                for name, value in values.items()
                if value is not None
            },
        ).text()


def _label(value: Any, most: int) -> str:
    """Return the beginning of a value as text: `most` bytes as JSON."""
    label = plain(value)[:_LONGEST_LABEL]
    while len(msgspec.json.encode(label)) > most:
        label = label[:-1]
    return label


def _value(limit: Limit, request: SubmitRequest, order: Order | None) -> Any:
    """Return the value by which predictions are counted together; None if this one has none."""
    match limit.by:
        case "all":
            return "all"
        case "key":
            return request.caller
        case "provider" | "model":
            return getattr(request, limit.by)
        case by if by.startswith(METADATA):
            return request.metadata.get(by.removeprefix(METADATA))
    return getattr(order, limit.by, None)


def _bound(limit: Limit, value: Any, now: float) -> Bound:
    return Bound(
        subject=_subject(limit, value),
        kind=kind_of(limit),
        until=end_of(limit.per, now),
        count=limit.count,
        cost=limit.cost,
    )


def kind_of(limit: Limit) -> str:
    """Return what a limit is by, and its period, as `person/day`."""
    return f"{limit.by}/{limit.per}" + (" of orders" if limit.of_orders else "")


def _subject(limit: Limit, value: Any) -> str:
    """Return a digest of what is counted: it may be long, and no person's name may be stored."""
    scope = [] if limit.of_orders else ["all that is submitted"]
    meant = msgspec.json.encode([limit.per, limit.by, value, *scope], order="deterministic")
    return blake2s(meant, digest_size=16).hexdigest()


def end_of(per: Per, now: float) -> float:
    """Return when the current hour, day or month ends."""
    if per in _SECONDS:
        return (math.floor(now / _SECONDS[per]) + 1) * _SECONDS[per]
    at = datetime.fromtimestamp(now, UTC)
    year, month = (at.year, at.month + 1) if at.month < 12 else (at.year + 1, 1)  # noqa: PLR2004
    return datetime(year, month, 1, tzinfo=UTC).timestamp()


def _unknown(request: SubmitRequest, order: Order | None) -> Problem:
    named = order.recipe if order else f"{request.provider}/{request.model}"
    cure = "its recipe or RECEIVER_PRICES" if order else "RECEIVER_PRICES"
    detail = f"money is limited here, and {named} has no price: {cure} must say one"
    return Problem(402, "price-unknown", detail)


def refusal(limit: Limit, excess: Excess, now: float) -> Problem:
    """Return the Problem of a prediction that would exceed a limit."""
    wait = max(math.ceil(excess.until - now), 1)
    each = _EACH.get(limit.by, f" for each {limit.by.removeprefix(METADATA)}")
    again = f"try again in {_duration(wait)}"
    every = f"{'an' if limit.per == 'hour' else 'a'} {limit.per}"
    if excess.over == "count":
        most = f"{limit.count} {every}{each}"
        detail = f"that is enough for this {limit.per}: there may be {most}; {again}"
        return Problem(429, "over-limit", detail, retry_after=wait)
    most = f"${(limit.cost or 0) / MICRO:g} {every}{each}"
    detail = f"the money for this {limit.per} is spent: there is {most}; {again}"
    return Problem(402, "over-budget", detail, retry_after=wait)


def _duration(seconds: int) -> str:
    for name, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds > size:
            number = math.ceil(seconds / size)
            return f"{number} {name}{'s' if number > 1 else ''}"
    return f"{seconds} seconds" if seconds > 1 else "a second"


def check_allowed(allow: Iterable[Allow], order: Order) -> None:
    """Raise Problem for a person or a place that no entry allows.

    An order with neither comes from the program itself, whose key or signature was verified.
    """
    if order.person is None and order.place is None:
        return
    for each in allow:
        if fnmatchcase(order.place or "", each.place) and fnmatchcase(
            order.person or "", each.person
        ):
            return
    raise Problem(403, "not-allowed", "you may not order here: ask its operator")
