"""Recipes as values: named, described, limited submissions, and how an option's value is read."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeAlias

import msgspec

from receiver.model.text import meant
from receiver.model.values import plain

Kind: TypeAlias = Literal["text", "integer", "number", "boolean", "picture"]
Per: TypeAlias = Literal["hour", "day", "month"]

_WHOLE: Final = re.compile(r"[+-]?[0-9]{1,15}", re.ASCII)
_LARGEST: Final = 2**53
"""Beyond it not every program reads the same number out of JSON."""
_PICTURE: Final = re.compile(
    r"https?://[!-~]{1,2000}|data:image/[a-z0-9.+-]+;base64,[A-Za-z0-9+/=]+"
)
TRUTHS: Final[Mapping[str, bool]] = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that an order says."""

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
    """It takes the words of a command that are no option's."""

    def read(self, value: Any) -> Any:
        """Return a value as its kind has it; raise ValueError with what it must be."""
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
            raise ValueError(f"must be one of {listed}{meant(word, words)}")
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
    # Without the first part `isfinite` would raise for a whole number of 400 digits.
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
"""What reads a value of a kind: JSON of that type, or a word that a person typed."""


def placeholders(text: str) -> list[str]:
    """Return the names of a template's placeholders; raise ValueError where it is none."""
    names = []
    for _, name, form, conversion in string.Formatter().parse(text):
        if name is not None:
            if form or conversion or not name:
                raise ValueError(text)
            names.append(name)
    return names


class Button(msgspec.Struct, frozen=True, kw_only=True):
    """An order that a result offers: the same options, as far as the other recipe has them."""

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
    """Seconds after which an order that was not sent is not sent any more."""
    options: Mapping[str, Option] = {}
    buttons: Mapping[str, Button] = {}
    """By their labels."""

    @property
    def rest(self) -> str | None:
        """The option that takes the remaining words."""
        return next((name for name, option in self.options.items() if option.rest), None)


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """How many predictions, or how much money, in one hour, day or month of UTC."""

    by: str
    """`person`, `place`, `recipe`, `key`, `provider`, `model`, `metadata.NAME`, or `all`."""
    per: Per
    of_orders: bool = True
    """It is for orders by recipes only; False: for all that is submitted."""
    count: int | None = None
    cost: int | None = None
    """Microdollars."""


class Allow(msgspec.Struct, frozen=True, kw_only=True):
    """Who may order, and where: shell globs."""

    place: str = "*"
    person: str = "*"


class RecipeBook(msgspec.Struct, frozen=True, kw_only=True):
    """All that a file of recipes says."""

    recipes: Mapping[str, Recipe] = {}
    limits: tuple[Limit, ...] = ()
    allow: tuple[Allow, ...] = ()
    """Empty: no person may order anything."""
