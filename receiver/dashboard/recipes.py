"""The pages of recipes: the list, and a form to order by each of them."""

from __future__ import annotations

import secrets

from receiver.dashboard.context import PageContext
from receiver.dashboard.declare import View, action, page
from receiver.http.parts import Parts
from receiver.http.routes.recipes import RecipeName
from receiver.model.errors import Problem
from receiver.model.recipes import Recipe
from receiver.model.requests import OrderRequest
from receiver.predictions.recipes import find

_OPTION = "option."
"""The prefix of the fields of options, which keeps them apart from other fields of the form."""


class RecipePages:
    """The pages about recipes."""

    def __init__(self, parts: Parts) -> None:
        self._orders = parts.predictions.orders

    @page("/recipes")
    async def recipes(self) -> View:
        return View("recipes.html", {"recipes": list(self._orders.book.recipes.values())})

    @page("/recipes/{id}")
    async def recipe(self, context: PageContext, id: RecipeName) -> View:
        return self._form(context, find(self._orders.book, id))

    @action("/recipes/{id}", "order")
    async def order(self, context: PageContext, id: RecipeName) -> str | View:
        """Order by a recipe; a form that is sent twice orders once."""
        recipe = find(self._orders.book, id)
        given = {
            name: context.form[_OPTION + name]
            for name in recipe.options
            if context.form.get(_OPTION + name, "").strip()
        }
        key = context.form.get("key", "")[:64] or secrets.token_hex(16)
        try:
            made = await self._orders.order(
                OrderRequest(recipe=id, options=given, key=key, via="ui", caller=context.caller)
            )
        except Problem as problem:
            return self._form(context, recipe, problem)
        return f"/predictions/{made.id}"

    def _form(self, context: PageContext, recipe: Recipe, problem: Problem | None = None) -> View:
        values = {
            "recipe": recipe,
            "key": secrets.token_hex(16),
            "problem": problem,
            "form": context.form,
        }
        return View("recipe.html", values, 200 if problem is None else problem.status)
