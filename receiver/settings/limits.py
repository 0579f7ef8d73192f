"""Limits: how many predictions, or how much money, in an hour, a day or a month.

The limits in `RECEIVER_LIMITS` are JSON, and apply to all submits:

    [{"by": "all", "per": "day", "cost": 20}, {"by": "key", "per": "hour", "count": 100}]
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final

import msgspec

from receiver.model.recipes import Limit
from receiver.model.text import did_you_mean
from receiver.settings.reader import Reader
from receiver.settings.toml import Table, money, number, one_of, tables_in, text, whole

NAME: Final = "RECEIVER_LIMITS"
_BY: Final = ("key", "provider", "model", "all")


def read_limits(reader: Reader) -> tuple[Limit, ...]:
    """Read the limits of all submits; errors are added to the reader's problems."""
    found = reader.get(NAME, _listed, [])
    tables = [
        Table(each, f"{NAME}: number {number}", reader.problems)
        for number, each in enumerate(found, 1)
    ]
    return tuple(read_limit(each, _BY, of_orders=False) for each in tables)


def _listed(text: str) -> list[Any]:
    try:
        return tables_in(msgspec.json.decode(text))
    except (ValueError, RecursionError):  # msgspec.DecodeError is a ValueError
        raise ValueError(
            'must be a list in JSON, as [{"by": "all", "per": "day", "cost": 20}]'
        ) from None


def read_limit(table: Table, words: Collection[str], *, of_orders: bool = True) -> Limit:
    limit = Limit(
        by=table.need("by", _by(words), "all"),
        per=table.need("per", one_of(("hour", "day", "month")), "day"),
        count=table.take("count", _count, None),
        cost=table.take("cost", money, None),
        of_orders=of_orders,
    )
    table.end()
    if not table.has("count") and not table.has("cost"):
        table.refuse("it needs count, cost (dollars), or both")
    return limit


def _by(words: Collection[str]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        word = text(value)
        if word in words or (word.startswith("metadata.") and len(word) > len("metadata.")):
            return word
        raise ValueError(f"must be {', '.join(words)} or metadata.NAME{did_you_mean(word, words)}")

    return read


def _count(value: Any) -> int:
    return 0 if isinstance(value, int) and number(value) == 0 else whole(value)
