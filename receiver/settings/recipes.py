"""The file of recipes, read and checked as a whole: every problem with its table and its key.

[imagine]
provider = "fal"
model = "fal-ai/nano-banana"
input = { prompt = "{prompt}" }

[imagine.options.prompt]
required = true

[[allow]]
place = "slack:T01/*"
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from receiver.model.recipes import (
    MICRO,
    READERS,
    Allow,
    Button,
    Kind,
    Limit,
    Option,
    Recipe,
    RecipeBook,
    placeholders,
)
from receiver.model.text import meant
from receiver.model.values import MODEL_NAME
from receiver.settings.reader import Reader

T = TypeVar("T")
D = TypeVar("D")

NAME: Final = "RECEIVER_RECIPES"
_WORD: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}", re.ASCII)
"""A name of a recipe or an option, which every chat platform takes."""
_RESERVED: Final = frozenset({"help", "limits", "allow"})
_LONGEST_LABEL: Final = 40
_DEAREST: Final = 1_000_000.0
_BY: Final = ("person", "place", "recipe", "all")
_TEXTS: Final[tuple[Kind, ...]] = ("text",)
_BOUNDS: Final[Mapping[str, Collection[Kind]]] = {
    "least": ("integer", "number"),
    "most": ("integer", "number"),
    "longest": _TEXTS,
    "rest": _TEXTS,
}
"""Kinds of options that a key is for."""


def read_recipes(reader: Reader, providers: Collection[str]) -> RecipeBook:
    """Read the file that the setting names; what is wrong with it goes to the reader's problems."""
    path = reader.get(NAME, str, "")
    if not path:
        return RecipeBook()
    try:
        found = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        reader.problems.append(f"{NAME}: {path} cannot be read: {error.strerror}")
        return RecipeBook()
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one, and UnicodeDecodeError
        reader.problems.append(f"{NAME}: {path} is no TOML: {error}")
        return RecipeBook()
    return _book(_Table(found, f"{NAME}: {path}", reader.problems), providers)


class _Table:
    """One table of the file: gives the values of its keys, and collects what is wrong."""

    def __init__(
        self, found: Mapping[str, Any], place: str, problems: list[str], name: str = ""
    ) -> None:
        self._found = found
        self._place = place
        self._problems = problems
        self._name = name
        """As it stands in brackets; empty for the whole file, and where nothing is inside."""
        self._known: list[str] = []

    def take(self, key: str, read: Callable[[Any], T], default: D) -> T | D:
        """Return what a key says; the default where it is not there, or wrong."""
        self._known.append(key)
        if key not in self._found:
            return default
        try:
            return read(self._found[key])
        except ValueError as error:
            self.refuse(f"{key} {error}")
            return default

    def need(self, key: str, read: Callable[[Any], T], default: T) -> T:
        """Return what a key says that must be there."""
        if key not in self._found:
            self.refuse(f"{key} is missing")
        return self.take(key, read, default)

    def tables(self, key: str) -> dict[str, _Table]:
        """Return the tables inside a key, by name."""
        found: Mapping[str, Any] = self.take(key, _mapping, {})
        return self._inside(found, f"{self._name}.{key}.")

    def other_tables(self) -> dict[str, _Table]:
        """Return the tables that no key was taken of, by name."""
        return self._inside(self._left(), "")

    def _inside(self, found: Mapping[str, Any], before: str) -> dict[str, _Table]:
        file = self._place.removesuffix(f", [{self._name}]")
        made = {}
        for name, value in found.items():
            at = f"{before}{name}"
            if isinstance(value, dict):
                made[name] = _Table(value, f"{file}, [{at}]", self._problems, at)
            else:
                self.refuse(f"{name} must be a table, [{at}]")
        return made

    def list_of(self, key: str) -> list[_Table]:
        """Return the tables of an array, `[[key]]`."""
        found: list[Any] = self.take(key, _tables_in, [])
        return [
            _Table(each, f"{self._place}, [[{key}]] number {number}", self._problems)
            for number, each in enumerate(found, 1)
        ]

    def has(self, key: str) -> bool:
        return key in self._found

    def end(self) -> None:
        """Refuse the keys that nobody has asked for."""
        for name in self._left():
            self.refuse(f"{name}: there is no such key{meant(name, self._known)}")

    def _left(self) -> Mapping[str, Any]:
        return {name: value for name, value in self._found.items() if name not in self._known}

    def refuse(self, problem: str) -> None:
        self._problems.append(f"{self._place}: {problem}")


def _book(table: _Table, providers: Collection[str]) -> RecipeBook:
    limits = [_limit(each) for each in table.list_of("limits")]
    allow = [_allow(each) for each in table.list_of("allow")]
    tables = table.other_tables()
    recipes = {name: _recipe(name, each, providers) for name, each in tables.items()}
    for recipe in recipes.values():
        _check_buttons(recipe, recipes, tables[recipe.name])
    return RecipeBook(recipes=recipes, limits=tuple(limits), allow=tuple(allow))


# --- recipes ---


def _recipe(name: str, table: _Table, providers: Collection[str]) -> Recipe:
    _check_name(name, table)
    options = {each: _option(each, inside) for each, inside in table.tables("options").items()}
    if sum(option.rest for option in options.values()) > 1:
        table.refuse("only one option can take the rest")
    template = _template(options)
    recipe = Recipe(
        name=name,
        about=table.take("about", _text, ""),
        provider=table.need("provider", _one_of(providers), ""),
        model=table.need("model", _model, ""),
        input=table.need("input", template, {}),
        metadata=table.take("metadata", template, {}),
        price=table.take("price", _money, None),
        latest=table.take("latest", _positive, None),
        options=options,
        buttons=table.take("buttons", _buttons, {}),
    )
    table.end()
    return recipe


def _check_name(name: str, table: _Table) -> None:
    if not _WORD.fullmatch(name) or name in _RESERVED:
        table.refuse(
            "a name is a small letter, then up to 31 of a-z, 0-9, _ and -, and not "
            + ", ".join(sorted(_RESERVED))
        )


def _option(name: str, table: _Table) -> Option:
    _check_name(name, table)
    bare = Option(
        about=table.take("about", _text, ""),
        kind=table.take("kind", _one_of(READERS), "text"),
        required=table.take("required", _switch, False),
        rest=table.take("rest", _switch, False),
        least=table.take("least", _number, None),
        most=table.take("most", _number, None),
        longest=table.take("longest", _whole, None),
    )
    for key, kinds in _BOUNDS.items():
        if getattr(bare, key) not in {None, False} and bare.kind not in kinds:
            table.refuse(f"{key} is for options of kind {' or '.join(kinds)}")
            return Option()
    choices: tuple[Any, ...] = table.take("choices", _choices(bare), ())
    option = Option(**_fields(bare) | {"choices": choices})
    default = table.take("default", option.read, None)
    if default is not None and bare.required:
        table.refuse("default: what is required has none")
    if bare.least is not None and bare.most is not None and bare.least > bare.most:
        table.refuse("least is more than most")
    table.end()
    return Option(**_fields(option) | {"default": default})


def _fields(option: Option) -> dict[str, Any]:
    return {name: getattr(option, name) for name in option.__struct_fields__}


def _choices(option: Option) -> Callable[[Any], tuple[Any, ...]]:
    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not value:
            raise ValueError('must be a list, as ["1:1", "16:9"]')
        return tuple(map(option.read, value))

    return read


def _buttons(value: Any) -> dict[str, Button]:
    return {_label(label): _button(button) for label, button in _mapping(value).items()}


def _label(label: str) -> str:
    if not label.strip() or len(label) > _LONGEST_LABEL or not label.isprintable():
        raise ValueError(f"must have labels of 1 to {_LONGEST_LABEL} characters")
    return label


def _button(value: Any) -> Button:
    found = {"recipe": value} if isinstance(value, str) else value
    texts = isinstance(found, dict) and all(isinstance(each, str) for each in found.values())
    if not texts or not {"recipe"} <= found.keys() <= {"recipe", "result"}:
        raise ValueError(
            'must be recipes by label: Again = "imagine", or Larger = { recipe = "upscale", result '
            '= "image" } with the option that gets the picture'
        )
    return Button(**found)


def _check_buttons(recipe: Recipe, recipes: Mapping[str, Recipe], table: _Table) -> None:
    """Refuse buttons whose orders could not be right."""
    for label, button in recipe.buttons.items():
        other = recipes.get(button.recipe)
        if other is None:
            near = meant(button.recipe, recipes)
            table.refuse(f"buttons: {label}: there is no recipe {button.recipe}{near}")
            continue
        result = button.result
        if result is not None and (
            result not in other.options or other.options[result].kind != "picture"
        ):
            pictures = [name for name, each in other.options.items() if each.kind == "picture"]
            near = meant(result, pictures)
            table.refuse(f"buttons: {label}: {other.name} has no picture option {result}{near}")
        given = {*recipe.options, result}
        for name, option in other.options.items():
            if option.required and name not in given:
                table.refuse(f"buttons: {label}: {other.name} needs {name}, which nobody says")


# --- limits, and who may order ---


def _limit(table: _Table) -> Limit:
    limit = Limit(
        by=table.need("by", _by, "all"),
        per=table.need("per", _one_of(("hour", "day", "month")), "day"),
        count=table.take("count", _count, None),
        cost=table.take("cost", _money, None),
    )
    table.end()
    if not table.has("count") and not table.has("cost"):
        table.refuse("it needs count, cost (dollars), or both")
    return limit


def _allow(table: _Table) -> Allow:
    allow = Allow(
        place=table.take("place", _pattern, "*"), person=table.take("person", _pattern, "*")
    )
    table.end()
    return allow


def _by(value: Any) -> str:
    text = _text(value)
    if text in _BY or (text.startswith("metadata.") and len(text) > len("metadata.")):
        return text
    raise ValueError(f"must be {', '.join(_BY)} or metadata.NAME{meant(text, _BY)}")


# --- values ---


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text in quotes")  # noqa: TRY004 - said of a file
    return value.strip()


def _pattern(value: Any) -> str:
    if not _text(value):
        raise ValueError('must be a name or a pattern, as "slack:T01/*"')
    return _text(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a table")  # noqa: TRY004
    return value


def _tables_in(value: Any) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError("must be tables, each begun by its name in double brackets")
    return value


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")  # noqa: TRY004
    return value


def _number(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) < float(2**53):  # also refuses nan
        raise ValueError("must be a number")
    return value  # type: ignore[no-any-return] # as was tested


def _whole(value: Any) -> int:
    if not isinstance(value, int) or _number(value) < 1:
        raise ValueError("must be a whole number, 1 or more")
    return value


def _count(value: Any) -> int:
    return 0 if value == 0 and isinstance(value, int) else _whole(value)


def _positive(value: Any) -> float:
    if _number(value) <= 0:
        raise ValueError("must be a number of seconds above 0")
    return float(value)


def _money(value: Any) -> int:
    dollars = _number(value)
    if not 0 <= dollars <= _DEAREST:
        raise ValueError("must be dollars, as 0.04")
    return round(dollars * MICRO)


def _one_of(words: Collection[str]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if _text(value) not in words:
            raise ValueError(f"must be one of {', '.join(words)}{meant(_text(value), words)}")
        return _text(value)

    return read


def _model(value: Any) -> str:
    if len(_text(value)) > 300 or not re.fullmatch(MODEL_NAME, _text(value)):  # noqa: PLR2004
        raise ValueError("must be a path like owner/name")
    return _text(value)


def _template(options: Collection[str]) -> Callable[[Any], Mapping[str, Any]]:
    def read(value: Any) -> Mapping[str, Any]:
        for text in _texts_in(_mapping(value)):
            _check_placeholders(text, options)
        return _mapping(value)

    return read


def _texts_in(value: Any) -> list[str]:
    """Return all texts of a template; raise ValueError for what is no JSON."""
    match value:
        case str():
            return [value]
        case dict():
            return [text for each in value.values() for text in _texts_in(each)]
        case list():
            return [text for each in value for text in _texts_in(each)]
        case bool():
            return []
        case int() | float() if math.isfinite(value) and abs(value) <= float(2**53):
            return []
    raise ValueError(f"holds {value}, which JSON has not: put it in quotes")


def _check_placeholders(text: str, options: Collection[str]) -> None:
    try:
        names = placeholders(text)
    except ValueError:
        raise ValueError(
            f"has {text!r}: a placeholder is an option's name in braces, and a brace itself is "
            "written {{ or }}"
        ) from None
    for name in names:
        if name not in options:
            raise ValueError(f"has {text!r}: there is no option {name}{meant(name, options)}")
