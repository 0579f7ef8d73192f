"""Recipes as forms: each of them orders."""

from __future__ import annotations

import secrets

from receiver.dashboard.declare import View, action, page
from receiver.dashboard.parts import Parts
from receiver.dashboard.visit import Visit
from receiver.http.routes.recipes import RecipeName
from receiver.model.errors import Problem
from receiver.model.recipes import Recipe
from receiver.model.requests import OrderRequest
from receiver.predictions.recipes import find

_OPTION = "option."
"""How the fields of options begin, so that they meet no other field of the form."""


class RecipePages:
    """The pages about recipes."""

    def __init__(self, parts: Parts) -> None:
        self._orders = parts.predictions.orders

    @page("/recipes")
    async def recipes(self) -> View:
        return View("recipes.html", {"recipes": list(self._orders.book.recipes.values())})

    @page("/recipes/{id}")
    async def recipe(self, visit: Visit, id: RecipeName) -> View:
        return self._form(visit, find(self._orders.book, id))

    @action("/recipes/{id}", "order")
    async def order(self, visit: Visit, id: RecipeName) -> str | View:
        """Order it; a form that is sent twice orders once."""
        recipe = find(self._orders.book, id)
        given = {
            name: visit.form[_OPTION + name]
            for name in recipe.options
            if visit.form.get(_OPTION + name, "").strip()
        }
        key = visit.form.get("key", "")[:64] or secrets.token_hex(16)
        try:
            made = await self._orders.order(
                OrderRequest(recipe=id, options=given, key=key, via="ui", caller=visit.caller)
            )
        except Problem as problem:
            return self._form(visit, recipe, problem)
        return f"/predictions/{made.id}"

    def _form(self, visit: Visit, recipe: Recipe, problem: Problem | None = None) -> View:
        values = {
            "recipe": recipe,
            "key": secrets.token_hex(16),
            "problem": problem,
            "form": visit.form,
        }
        return View("recipe.html", values, 200 if problem is None else problem.status)
