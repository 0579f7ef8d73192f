"""The use of recipes: an order's options, its filled templates, and the command that orders it.

    input = { prompt = "{prompt}, as a poster", num_images = "{count}" }

A value that is one placeholder keeps its type, and is left out if the option has no value.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from receiver.model.answers import OfferedRecipe
from receiver.model.costs import MICRO
from receiver.model.errors import Problem
from receiver.model.recipes import Kind, Option, Recipe, RecipeBook
from receiver.model.text import did_you_mean, nearest
from receiver.model.values import plain

_TYPES: Final[Mapping[Kind, Mapping[str, Any]]] = {
    "text": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "picture": {"type": "string", "format": "uri"},
}
_BOUNDS: Final = {"least": "minimum", "most": "maximum", "longest": "maxLength"}
REST: Final = "x-rest"
"""The schema key of the option that takes the remaining words of a command."""
_LEFT_OUT: Final = object()
_LONGEST_SHOWN: Final = 200
"""Characters of a value in a line that is shown."""


def find(book: RecipeBook, name: str) -> Recipe:
    """Return a recipe; raise Problem with the nearest name if there is none."""
    if name in book.recipes:
        return book.recipes[name]
    known = ", ".join(book.recipes)
    near = f"{name[:40]!r}{did_you_mean(name[:40], book.recipes)}; there is {known}"
    detail = f"there is no recipe {near}" if known else "there are no recipes here yet"
    raise Problem(404, "unknown-recipe", detail)


def read_options(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return an order's options, each as a value of its kind, with the defaults.

    Raises Problem with all errors and a correct example.
    """
    values: dict[str, Any] = {}
    right: dict[str, Any] = {}
    wrong = [
        f"there is no option {name[:40]!r}{did_you_mean(name[:40], recipe.options)}"
        for name in given.keys() - recipe.options.keys()
    ]
    for name, option in recipe.options.items():
        value = given.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            if option.required:
                wrong.append(f"{name} is missing")
                right[name] = _example(name, option)
            elif option.default is not None:
                values[name] = option.default
            continue
        try:
            values[name] = right[name] = option.read(value)
        except ValueError as error:
            wrong.append(f"{name} {error}")
            right[name] = _example(name, option, value)
    if wrong:
        raise bad_option(recipe, sorted(wrong), right)
    return values


def bad_option(recipe: Recipe, wrong: list[str], right: Mapping[str, Any]) -> Problem:
    """Return the Problem of wrong options, with a correct example."""
    return Problem(
        422, "bad-option", f"{'; '.join(wrong)}. This would be right: {line(recipe, right)}"
    )


def line(recipe: Recipe, options: Mapping[str, Any]) -> str:
    """Return an order as a command that a person can type."""
    words = [recipe.name]
    words += [_shortened(value) for name, value in options.items() if name == recipe.rest]
    for name, value in options.items():
        if name != recipe.rest:
            words.append(f"--{name} {_quoted(_shortened(value))}")
    return " ".join(words)


def _quoted(text: str) -> str:
    """Return a text as one word of a command."""
    if text.split() == [text] and '"' not in text:
        return text
    escaped = text.replace('"', '\\"')
    return f'"{escaped}"'


def _shortened(value: Any) -> str:
    text = plain(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 1]}…"


def _example(name: str, option: Option, given: Any = None) -> Any:
    """Return a valid value of an option, near the given one."""
    if option.choices:
        words = {plain(choice).casefold(): choice for choice in option.choices}
        near = nearest(plain(given).casefold(), words)
        return option.choices[0] if near is None else words[near]
    if option.kind in {"integer", "number"}:
        return _bounded(option, given)
    return {"boolean": "yes", "picture": "https://…"}.get(option.kind, f"<{name}>")


def _bounded(option: Option, given: Any) -> Any:
    """Return the number within an option's bounds that is nearest to the given one, or to 1."""
    try:
        number = msgspec.structs.replace(option, least=None, most=None).read(given)
    except ValueError:
        number = 1
    if option.least is not None:
        number = max(number, option.least)
    if option.most is not None:
        number = min(number, option.most)
    return int(number) if option.kind == "integer" else number


# --- templates ---


def fill(template: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a template with its placeholders replaced by the values of options."""
    filled = _filled(template, values)
    return filled if isinstance(filled, dict) else {}


def _filled(template: Any, values: Mapping[str, Any]) -> Any:
    match template:
        case str():
            return _filled_text(template, values)
        case Mapping():
            found = {name: _filled(value, values) for name, value in template.items()}
            return {name: value for name, value in found.items() if value is not _LEFT_OUT}
        case list():
            items = [_filled(value, values) for value in template]
            return [value for value in items if value is not _LEFT_OUT]
    return template


def _filled_text(text: str, values: Mapping[str, Any]) -> Any:
    parts = list(string.Formatter().parse(text))
    if len(parts) == 1 and not parts[0][0] and parts[0][1] is not None:
        return values.get(parts[0][1], _LEFT_OUT)
    return "".join(
        literal + ("" if name is None else plain(values.get(name, "")))
        for literal, name, _, _ in parts
    )


# --- recipes as the API shows them ---


def offered(recipe: Recipe) -> OfferedRecipe:
    """Return a recipe as the API shows it."""
    return OfferedRecipe(
        name=recipe.name,
        about=recipe.about,
        provider=recipe.provider,
        model=recipe.model,
        price=None if recipe.price is None else recipe.price / MICRO,
        latest=recipe.latest,
        options={
            "type": "object",
            "properties": {name: _schema(each) for name, each in recipe.options.items()},
            "required": [name for name, each in recipe.options.items() if each.required],
            "additionalProperties": False,
        },
        buttons=recipe.buttons,
    )


def _schema(option: Option) -> dict[str, Any]:
    schema = dict(_TYPES[option.kind])
    if option.about:
        schema["description"] = option.about
    if option.choices:
        schema["enum"] = list(option.choices)
    if option.default is not None:
        schema["default"] = option.default
    for name, word in _BOUNDS.items():
        if (bound := getattr(option, name)) is not None:
            schema[word] = bound
    return schema | ({REST: True} if option.rest else {})


def recipe_of(shown: OfferedRecipe) -> Recipe:
    """Return the recipe that the API showed, as far as an order needs it."""
    schemas = shown.options.get("properties", {})
    required = shown.options.get("required", ())
    return Recipe(
        name=shown.name,
        about=shown.about,
        provider=shown.provider,
        model=shown.model,
        options={name: _option(each, name in required) for name, each in schemas.items()},
    )


def _option(schema: Mapping[str, Any], required: bool) -> Option:
    type_of = {name: schema[name] for name in ("type", "format") if name in schema}
    return Option(
        about=schema.get("description", ""),
        kind=next((kind for kind, words in _TYPES.items() if words == type_of), "text"),
        required=required,
        choices=tuple(schema.get("enum", ())),
        default=schema.get("default"),
        rest=schema.get(REST, False),
        **{name: schema.get(word) for name, word in _BOUNDS.items()},
    )
