"""Costs: prices by model, and the expected and the actual cost of a prediction.

All amounts are whole microdollars, because sums of floats drift.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple

import msgspec

from receiver.model.values import CostSource, Output

MICRO: Final = 1_000_000
"""Microdollars in a dollar."""
DEAREST: Final = 1_000_000 * MICRO
"""The highest possible price or cost, in microdollars."""
DAY: Final = 86400
"""Seconds; costs are added up by UTC day."""


class Price(NamedTuple):
    """An amount, and its source."""

    amount: int
    """Microdollars."""
    source: CostSource


class Account(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The values by which costs are grouped, besides day, provider and model."""

    recipe: str | None = None
    key: str | None = None
    """The name of the API key of the request; empty for a key without a name."""
    metadata: Mapping[str, str] = {}

    @classmethod
    def read(cls, text: str | None) -> Account:
        return msgspec.json.decode(text, type=cls) if text else cls()

    def text(self) -> str | None:
        """Return the JSON of an account, the same text for equal accounts; None if it is empty."""
        if self == Account():
            return None
        return msgspec.json.encode(self, order="deterministic").decode()


def micro(dollars: Any) -> int | None:
    """Return untrusted dollars, a number or its text, as microdollars; None if not an amount."""
    try:
        amount = float(dollars) if isinstance(dollars, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    if isinstance(dollars, bool) or not 0 <= amount * MICRO <= DEAREST:  # refuses nan, too
        return None
    return round(amount * MICRO)


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """The prices of the models that match a pattern, in microdollars; they are added up."""

    pattern: str
    """A shell pattern of `provider/model`."""
    call: int = 0
    image: int = 0
    second: int = 0
    megapixel: int = 0
    least: int = 0

    def of(self, images: float, seconds: float | None, megapixels: float | None) -> int | None:
        """Return the cost of these quantities; None if a priced quantity is unknown."""
        if (self.second and seconds is None) or (self.megapixel and megapixels is None):
            return None
        parts = (
            self.call,
            self.image * images,
            self.second * (seconds or 0.0),
            self.megapixel * (megapixels or 0.0),
        )
        return min(max(math.ceil(sum(parts) - _ROUNDING), self.least), DEAREST)


class PriceList(msgspec.Struct, frozen=True):
    """The table of prices; the first pattern that matches a model applies."""

    rates: tuple[Rate, ...] = ()

    def expected(self, provider: str, model: str, input: Mapping[str, Any]) -> int | None:
        """Return the expected cost of a submit, from its input; None if it is unknown.

        The default is one picture of one megapixel; the length of a video has no default.
        """
        rate = self._rate(provider, model)
        if rate is None:
            return None
        images = max(1.0, *(_number(input.get(name)) or 1.0 for name in _COUNTS))
        seconds = max((s for name in _SECONDS if (s := _number(input.get(name)))), default=None)
        size = _megapixels(input) or 1.0
        return rate.of(images, seconds and seconds * images, size * images)

    def measured(self, provider: str, model: str, made: Iterable[Output]) -> int | None:
        """Return the cost of a result; None if a price or a priced quantity is unknown."""
        rate = self._rate(provider, model)
        files = [each for each in made if each.url]
        if rate is None or not files:
            return None
        seconds = [each.duration for each in files]
        sizes = [_area(each.width, each.height) for each in files]
        return rate.of(
            float(len(files)),
            None if None in seconds else sum(max(s or 0.0, 0.0) for s in seconds),
            None if None in sizes else sum(size or 0.0 for size in sizes),
        )

    def _rate(self, provider: str, model: str) -> Rate | None:
        name = f"{provider}/{model}"
        return next((rate for rate in self.rates if fnmatchcase(name, rate.pattern)), None)


_ROUNDING: Final = 1e-6
_LARGEST: Final = 1e6
_COUNTS: Final = (
    *("num_images", "num_outputs", "num_videos", "num_samples", "num_generations"),
    *("number_of_images", "max_images", "batch_size", "n"),
)
"""Input fields of models with the number of requested results."""
_SECONDS: Final = ("duration", "seconds", "duration_seconds", "num_seconds")
_AMOUNT: Final = re.compile(r"\s*([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*(?:s|seconds)?\s*", re.ASCII)
_SIZE: Final = re.compile(r"([0-9]{1,6})\s*[x*]\s*([0-9]{1,6})")


def _number(value: Any) -> float | None:
    """Return the positive number in a field such as 4, "4" or "8s"; else None."""
    if isinstance(value, str) and (found := _AMOUNT.fullmatch(value)):
        value = float(found[1])
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if 0 < value <= _LARGEST else None


def _megapixels(input: Mapping[str, Any]) -> float | None:
    """Return the requested size in megapixels; None if the input gives none in pixels."""
    for name in ("image_size", "size", "resolution"):
        size = input.get(name)
        if isinstance(size, str) and (found := _SIZE.fullmatch(size)):
            return int(found[1]) * int(found[2]) / 1e6
        if isinstance(size, Mapping):
            return _area(_number(size.get("width")), _number(size.get("height")))
    return _area(_number(input.get("width")), _number(input.get("height")))


def _area(width: float | None, height: float | None) -> float | None:
    """Return megapixels."""
    if width is None or height is None:
        return None
    return min(max(width, 0), _LARGEST) * min(max(height, 0), _LARGEST) / 1e6
