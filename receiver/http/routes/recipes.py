"""The routes `/v1/recipes`: list recipes, and order by one."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request

from receiver.http.body import prefer_wait
from receiver.http.declare import BODY_PROBLEMS, Reply, get, post
from receiver.http.parts import Parts
from receiver.http.routes.predictions import (
    SENT,
    PredictionRoutes,
    Submitting,
    caller_of,
    key_of,
)
from receiver.model.answers import OfferedRecipe, Page
from receiver.model.requests import OrderRequest, ReplyTo
from receiver.model.values import Prediction

RecipeName = Annotated[str, Meta(pattern="^[a-z][a-z0-9_-]*$", max_length=32, examples=["imagine"])]
Who = Annotated[str, Meta(min_length=1, max_length=200)]


class OrderBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to order, and for whom."""

    options: dict[str, Any] = {}
    """As the recipe describes them."""
    person: Annotated[Who, Meta(examples=["slack:T01/U01"])] | None = None
    """Who orders it; limits by person apply to them, and the recipes' allow lists."""
    place: Annotated[Who, Meta(examples=["slack:T01/C01"])] | None = None
    """Where it was ordered; limits by place apply to it, and the allow lists."""
    metadata: dict[str, Any] = {}
    """Your own, up to 256 KiB; the recipe's metadata overrides it."""
    reply_to: ReplyTo | None = None
    """POST the event there too, signed; its host must be one of `FORWARD_HOSTS`."""


class RecipeRoutes:
    """The routes about recipes."""

    def __init__(self, parts: Parts) -> None:
        self._orders = parts.predictions.orders
        self._predictions = PredictionRoutes(parts)
        self._deliveries = parts.deliveries
        self._runtime = parts.runtime

    @get("/v1/recipes", "all of them")
    async def list_recipes(self) -> Page[OfferedRecipe]:
        """List recipes.

        Each can be ordered by its name, and has a JSON Schema of its options.
        """
        return Page(data=self._orders.offered(), next_cursor=None)

    @post(
        "/v1/recipes/{name}",
        {202: "it has not ended", 200: "it has ended"},
        problems=[
            *BODY_PROBLEMS,
            "unknown-recipe",
            "bad-option",
            "not-allowed",
            "over-limit",
            "over-budget",
            "price-unknown",
            "too-late",
            "provider-off",
            "invalid-model",
            "unsupported-input",
            "reply-to-refused",
        ],
        missing=(404, "unknown-recipe", "there is no such recipe"),
        sends=SENT,
    )
    async def order(
        self, request: Request, name: RecipeName, body: OrderBody, headers: Submitting
    ) -> Reply[Prediction]:
        """Order by a recipe.

        The answer comes when the order is stored; it is sent to the provider later. The same
        Idempotency-Key always returns the same prediction, whatever else is given. An order without
        a person and a place is the caller's own, and no allow list applies to it.
        """
        with self._runtime.tracing.request(request, "/v1/recipes/{name}") as span:
            await self._deliveries.check_reply_to(body.reply_to)
            prediction = await self._orders.order(
                OrderRequest(
                    recipe=name,
                    **msgspec.structs.asdict(body),
                    key=key_of(headers.key),
                    caller=caller_of(request),
                )
            )
            wait = prefer_wait(headers.prefer or "")
            location = f"../predictions/{prediction.id}"
            return await self._predictions.reply(request, span, prediction, wait, location)
