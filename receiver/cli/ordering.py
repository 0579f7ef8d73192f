"""Recipes and orders on the command line: list, explain, and parse the words of an order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from receiver.cli.client import Client
from receiver.client import file
from receiver.model.answers import OfferedRecipe, Page
from receiver.model.recipes import Recipe, RecipeBook
from receiver.predictions.commands import read_words, words_of
from receiver.predictions.recipes import find, recipe_of


def book_of(client: Client) -> RecipeBook:
    """Return the recipes of a running receiver."""
    page = msgspec.convert(client.fetch("recipes"), Page[OfferedRecipe])
    return RecipeBook(recipes={shown.name: recipe_of(shown) for shown in page.data})


def listed(client: Client) -> Iterator[dict[str, Any]]:
    """Yield the recipes as rows of a table."""
    for row in client.fetch("recipes")["data"]:
        price = None if row["price"] is None else f"${row['price']:g}"
        yield {**row, "price": price, "options": " ".join(row["options"]["properties"])}


def options_of(client: Client, name: str, words: Sequence[str]) -> dict[str, Any]:
    """Parse the words of an order into the recipe's options; raise ReceiverError."""
    recipe = find(book_of(client), name)
    options = read_words(recipe, words_of(words))
    return {each: _sent(recipe, each, value) for each, value in options.items()}


def _sent(recipe: Recipe, name: str, value: Any) -> Any:
    """Return a value to send: a picture given as @FILE becomes a data URI."""
    is_picture = recipe.options[name].kind == "picture"
    is_file = is_picture and isinstance(value, str) and value.startswith("@")
    return file(value[1:]) if is_file else value
