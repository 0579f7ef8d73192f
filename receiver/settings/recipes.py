"""The file of recipes, read and checked as a whole: every problem names its table and key.

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

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final, TypeVar

from msgspec.structs import replace

from receiver.model.recipes import (
    READERS,
    Allow,
    Kind,
    OfferedButton,
    Option,
    Recipe,
    RecipeBook,
    placeholders,
)
from receiver.model.text import did_you_mean
from receiver.model.values import DEEPEST, MODEL_NAME, plain
from receiver.settings.limits import read_limit
from receiver.settings.reader import Reader
from receiver.settings.toml import (
    Table,
    mapping,
    money,
    number,
    one_of,
    positive,
    read_file,
    switch,
    text,
    whole,
)

T = TypeVar("T")
D = TypeVar("D")

NAME: Final = "RECEIVER_RECIPES"
_WORD: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}", re.ASCII)
"""A name of a recipe or an option that every chat platform accepts."""
_RESERVED: Final = frozenset({"help", "limits", "allow"})
_LONGEST_LABEL: Final = 40
_BY: Final = ("person", "place", "recipe", "key", "all")
_TEXTS: Final[tuple[Kind, ...]] = ("text",)
_BOUNDS: Final[Mapping[str, Collection[Kind]]] = {
    "least": ("integer", "number"),
    "most": ("integer", "number"),
    "longest": _TEXTS,
    "rest": _TEXTS,
}
"""The kinds of options that may have a key."""


def read_recipes(reader: Reader, providers: Collection[str]) -> RecipeBook:
    """Read the file that the setting names; its errors are added to the reader's problems."""
    table = read_file(reader.get(NAME, str, ""), NAME, reader.problems)
    return RecipeBook() if table is None else _book(table, providers)


def _book(table: Table, providers: Collection[str]) -> RecipeBook:
    limits = [read_limit(each, _BY) for each in table.list_of("limits")]
    allow = [_allow(each) for each in table.list_of("allow")]
    tables = table.other_tables()
    recipes = {name: _recipe(name, each, providers) for name, each in tables.items()}
    for recipe in recipes.values():
        _check_buttons(recipe, recipes, tables[recipe.name])
    return RecipeBook(recipes=recipes, limits=tuple(limits), allow=tuple(allow))


# --- recipes ---


def _recipe(name: str, table: Table, providers: Collection[str]) -> Recipe:
    _check_name(name, table)
    options = {each: _option(each, inside) for each, inside in table.tables("options").items()}
    if sum(option.rest for option in options.values()) > 1:
        table.refuse("only one option can take the rest")
    template = _template(options)
    recipe = Recipe(
        name=name,
        about=table.take("about", text, ""),
        provider=table.need("provider", one_of(providers), ""),
        model=table.need("model", _model, ""),
        input=table.need("input", template, {}),
        metadata=table.take("metadata", template, {}),
        price=table.take("price", money, None),
        latest=table.take("latest", positive, None),
        options=options,
        buttons=_buttons(table.table("buttons")),
    )
    table.end()
    return recipe


def _check_name(name: str, table: Table) -> None:
    if not _WORD.fullmatch(name) or name in _RESERVED:
        table.refuse(
            "a name is a small letter, then up to 31 of a-z, 0-9, _ and -, and not "
            + ", ".join(sorted(_RESERVED))
        )


def _option(name: str, table: Table) -> Option:
    _check_name(name, table)
    bare = Option(
        about=table.take("about", text, ""),
        kind=table.take("kind", one_of(READERS), "text"),
        required=table.take("required", switch, False),
        rest=table.take("rest", switch, False),
        least=table.take("least", number, None),
        most=table.take("most", number, None),
        longest=table.take("longest", whole, None),
    )
    unfit = [
        key
        for key, kinds in _BOUNDS.items()
        if getattr(bare, key) not in {None, False} and bare.kind not in kinds
    ]
    for key in unfit:
        table.refuse(f"{key} is for options of kind {' or '.join(_BOUNDS[key])}")
    bare = replace(bare, **{key: getattr(Option(), key) for key in unfit})
    choices: tuple[Any, ...] = table.take("choices", _choices(bare), ())
    option = replace(bare, choices=choices)
    default = table.take("default", option.read, None)
    if default is not None and bare.required:
        table.refuse("default: a required option cannot have one")
    if bare.least is not None and bare.most is not None and bare.least > bare.most:
        table.refuse("least is more than most")
    table.end()
    return replace(option, default=default)


def _choices(option: Option) -> Callable[[Any], tuple[Any, ...]]:
    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not value:
            raise ValueError('must be a list, as ["1:1", "16:9"]')
        choices = tuple(map(option.read, value))
        if len({plain(choice).casefold() for choice in choices}) < len(choices):
            raise ValueError("must differ by more than small and capital letters")
        return choices

    return read


def _buttons(table: Table) -> dict[str, OfferedButton]:
    read = {label: table.take(label, _button, None) for label in table.keys()}  # noqa: SIM118
    for label in read:
        if not label.strip() or len(label) > _LONGEST_LABEL or not label.isprintable():
            table.refuse(f"{label!r}: a label has 1 to {_LONGEST_LABEL} characters")
    return {label: button for label, button in read.items() if button is not None}


def _button(value: Any) -> OfferedButton:
    found = {"recipe": value} if isinstance(value, str) else value
    texts = isinstance(found, dict) and all(isinstance(each, str) for each in found.values())
    if not texts or not {"recipe"} <= found.keys() <= {"recipe", "result"}:
        raise ValueError(
            'must be a recipe in quotes, or { recipe = "upscale", result = "image" } with the '
            "option that gets the picture"
        )
    return OfferedButton(**found)


def _check_buttons(recipe: Recipe, recipes: Mapping[str, Recipe], table: Table) -> None:
    """Refuse buttons whose orders can never be valid."""
    for label, button in recipe.buttons.items():
        other = recipes.get(button.recipe)
        if other is None:
            near = did_you_mean(button.recipe, recipes)
            table.refuse(f"button {label}: there is no recipe {button.recipe}{near}")
            continue
        result = button.result
        if result is not None and (
            result not in other.options or other.options[result].kind != "picture"
        ):
            pictures = [name for name, each in other.options.items() if each.kind == "picture"]
            near = did_you_mean(result, pictures)
            table.refuse(f"button {label}: {other.name} has no picture option {result}{near}")
        given = {*recipe.options, result}
        for name, option in other.options.items():
            if option.required and name not in given:
                table.refuse(
                    f"button {label}: {other.name} requires {name}, which the button does not set"
                )


# --- limits, and who may order ---


def _allow(table: Table) -> Allow:
    allow = Allow(
        place=table.take("place", _pattern, "*"), person=table.take("person", _pattern, "*")
    )
    table.end()
    return allow


# --- values ---


def _pattern(value: Any) -> str:
    if not text(value):
        raise ValueError('must be a name or a pattern, as "slack:T01/*"')
    return text(value)


def _model(value: Any) -> str:
    if len(text(value)) > 300 or not re.fullmatch(MODEL_NAME, text(value)):  # noqa: PLR2004
        raise ValueError("must be a path like owner/name")
    return text(value)


def _template(options: Collection[str]) -> Callable[[Any], Mapping[str, Any]]:
    def read(value: Any) -> Mapping[str, Any]:
        problems = list(_problems_in(mapping(value), options))
        if problems:
            raise ValueError(*problems)
        return mapping(value)

    return read


def _problems_in(value: Any, options: Collection[str], depth: int = 1) -> Iterator[str]:
    """Yield the problems of a template, text by text."""
    if depth > DEEPEST:
        yield f"nests at most {DEEPEST} deep"
        return
    match value:
        case str():
            yield from _wrong_placeholders(value, options)
        case dict():
            for each in value.values():
                yield from _problems_in(each, options, depth + 1)
        case list():
            for each in value:
                yield from _problems_in(each, options, depth + 1)
        case int() | float() if abs(value) <= float(2**53):  # false for nan
            return
        case _:
            yield f"holds {value}, which JSON cannot express: put it in quotes"


def _wrong_placeholders(text: str, options: Collection[str]) -> Iterator[str]:
    try:
        names = placeholders(text)
    except ValueError:
        yield (
            f"has {text!r}: a placeholder is an option's name in braces, and a brace itself is "
            "written {{ or }}"
        )
        return
    for name in names:
        if name not in options:
            yield f"has {text!r}: there is no option {name}{did_you_mean(name, options)}"
