"""Recipes as values: named submissions with options and limits, and parsers of option values."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeAlias

import msgspec

from receiver.model.text import did_you_mean
from receiver.model.values import plain

Kind: TypeAlias = Literal["text", "integer", "number", "boolean", "picture"]
Per: TypeAlias = Literal["hour", "day", "month"]

_WHOLE: Final = re.compile(r"[+-]?[0-9]{1,15}", re.ASCII)
_LARGEST: Final = 2**53
"""Above it, not every program reads the same number from JSON."""
_PICTURE: Final = re.compile(
    r"https?://[!-~]{1,2000}|data:image/[a-z0-9.+-]+;base64,[A-Za-z0-9+/=]+"
)
METADATA: Final = "metadata."
"""What a name of metadata has before it: in limits, groups of costs and query parameters."""
TRUTHS: Final[Mapping[str, bool]] = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """An option of an order."""

    about: str = ""
    kind: Kind = "text"
    required: bool = False
    choices: tuple[Any, ...] = ()
    default: Any = None
    least: float | None = None
    most: float | None = None
    longest: int | None = None
    """Characters."""
    rest: bool = False
    """True if it takes the words of a command that belong to no other option."""

    def read(self, value: Any) -> Any:
        """Return a value converted to this kind; raise ValueError with the requirement."""
        found = READERS[self.kind](value)
        if self.choices:
            return self._choice(found)
        if self.least is not None and found < self.least:
            raise ValueError(f"must be {self.least:g} or more")
        if self.most is not None and found > self.most:
            raise ValueError(f"must be {self.most:g} or less")
        if self.longest is not None and len(found) > self.longest:
            raise ValueError(f"must have at most {self.longest} characters, not {len(found)}")
        return found

    def _choice(self, value: Any) -> Any:
        words = {plain(choice).casefold(): choice for choice in self.choices}
        word = plain(value).casefold()
        if word not in words:
            listed = ", ".join(map(plain, self.choices))
            raise ValueError(f"must be one of {listed}{did_you_mean(word, words)}")
        return words[word]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text")  # noqa: TRY004 - a message for the person who orders
    return value


def _integer(value: Any) -> int:
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _LARGEST:
        raise ValueError("must be a whole number")
    return value


def _number(value: Any) -> int | float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Large integers are refused first: `isfinite` would raise for one of 400 digits.
    if not is_number or (isinstance(value, int) and abs(value) > _LARGEST):
        raise ValueError("must be a number")
    if not math.isfinite(value):
        raise ValueError("must be a number")
    return value  # type: ignore[no-any-return] # as was tested


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.strip().lower() not in TRUTHS:
        raise ValueError("must be yes or no")
    return TRUTHS[value.strip().lower()]


def _picture(value: Any) -> str:
    if not isinstance(value, str) or not _PICTURE.fullmatch(value.strip()):
        raise ValueError("must be the address of a picture, https://…, or a data URI")
    return value.strip()


READERS: Final[Mapping[Kind, Callable[[Any], Any]]] = {
    "text": _text,
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "picture": _picture,
}
"""Parsers of values by kind: they accept JSON of that type, or a word that a person typed."""


def placeholders(text: str) -> list[str]:
    """Return the names of a template's placeholders; raise ValueError if it is malformed."""
    names = []
    for _, name, form, conversion in string.Formatter().parse(text):
        if name is not None:
            if form or conversion or not name:
                raise ValueError(text)
            names.append(name)
    return names


class OfferedButton(msgspec.Struct, frozen=True, kw_only=True):
    """An order offered with a result: the previous order's options, if `recipe` has them too."""

    recipe: str
    result: str | None = None
    """The option that gets the first picture of the result."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """A named submission."""

    name: str
    about: str = ""
    provider: str
    model: str
    input: Mapping[str, Any] = {}
    """A template."""
    metadata: Mapping[str, Any] = {}
    """A template."""
    price: int | None = None
    """Microdollars."""
    latest: float | None = None
    """Seconds after which an order that is not yet submitted expires."""
    options: Mapping[str, Option] = {}
    buttons: Mapping[str, OfferedButton] = {}
    """Buttons by label."""

    @property
    def rest(self) -> str | None:
        """The option that takes the remaining words."""
        return next((name for name, option in self.options.items() if option.rest), None)


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """The most predictions, or the highest cost, in one UTC hour, day or month."""

    by: str
    """`person`, `place`, `recipe`, `key`, `provider`, `model`, `metadata.NAME`, or `all`."""
    per: Per
    of_orders: bool = True
    """True: it limits only orders by recipes; False: all submits."""
    count: int | None = None
    cost: int | None = None
    """Microdollars."""


class Allow(msgspec.Struct, frozen=True, kw_only=True):
    """A place and a person that may order, as shell globs."""

    place: str = "*"
    person: str = "*"


class RecipeBook(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a file of recipes."""

    recipes: Mapping[str, Recipe] = {}
    limits: tuple[Limit, ...] = ()
    allow: tuple[Allow, ...] = ()
    """Empty: no person may order anything."""
