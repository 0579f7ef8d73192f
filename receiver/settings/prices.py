"""The table of prices, read and checked as a whole: every problem names its table and key.

["fal/fal-ai/nano-banana*"]
image = 0.039

["eachlabs/*video*"]
second = 0.05
least = 0.25
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from receiver.model.costs import PriceList, Rate
from receiver.model.text import did_you_mean
from receiver.settings.reader import Reader
from receiver.settings.toml import Table, money, read_file

NAME: Final = "RECEIVER_PRICES"
_PARTS: Final = ("call", "image", "second", "megapixel")


def read_prices(reader: Reader, providers: Collection[str]) -> PriceList:
    """Read the file that the setting names; its errors are added to the reader's problems."""
    table = read_file(reader.get(NAME, str, ""), NAME, reader.problems)
    if table is None:
        return PriceList()
    tables = table.other_tables()
    return PriceList(tuple(_rate(name, each, providers) for name, each in tables.items()))


def _rate(pattern: str, table: Table, providers: Collection[str]) -> Rate:
    provider, slash, _ = pattern.partition("/")
    if not (slash or provider.endswith("*")):
        table.refuse("a pattern is of provider and model, as fal/fal-ai/*")
    elif not re.search(r"[*?\[]", provider) and provider not in providers:
        table.refuse(f"there is no provider {provider}{did_you_mean(provider, providers)}")
    rate = Rate(
        pattern=pattern,
        least=table.take("least", money, 0),
        **{name: table.take(name, money, 0) for name in _PARTS},
    )
    if not any(map(table.has, _PARTS)):
        table.refuse(f"it needs one of {', '.join(_PARTS)}, in dollars")
    table.end()
    return rate
