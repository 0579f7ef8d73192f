"""Orders by recipes, idempotent: the same key always gives the same prediction.

The permission and the options are checked, and then the limits and the row are committed in one
transaction, before anything is sent. A refused order costs nothing; it is counted as discarded.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from typing import Annotated, Any, Final

import msgspec
import structlog
from msgspec import Meta
from msgspec.structs import replace

from receiver.model.answers import OfferedRecipe
from receiver.model.errors import Problem, StoreUnavailable
from receiver.model.recipes import OfferedButton, Recipe, RecipeBook
from receiver.model.requests import OrderRequest, SubmitRequest, check_json
from receiver.model.values import Order, Prediction
from receiver.observability.runtime import Runtime
from receiver.predictions.limits import check_allowed
from receiver.predictions.recipes import fill, find, offered, read_options
from receiver.predictions.service import PredictionService
from receiver.store.discarded import OTHER, Rejection
from receiver.store.facade import Store
from receiver.store.orders import NewOrder

log = structlog.get_logger("receiver")

_LONGEST_SOURCE: Final = 64
_Who = Annotated[str, Meta(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$(?!\n)")] | None


class Wanted(msgspec.Struct, frozen=True):
    """The content of an order, for validation: it may come unchecked from a stranger's JSON."""

    recipe: str
    options: dict[str, Any]
    metadata: dict[str, Any]
    person: _Who
    place: _Who


class Orders:
    """Takes orders, and lists what can be ordered."""

    def __init__(
        self, book: RecipeBook, store: Store, service: PredictionService, runtime: Runtime
    ) -> None:
        self.book = book
        self._store = store
        self._service = service
        self._runtime = runtime

    def offered(self) -> list[OfferedRecipe]:
        """Return all recipes as the API shows them."""
        return [offered(recipe) for recipe in self.book.recipes.values()]

    async def order(self, request: OrderRequest) -> Prediction:
        """Order by a recipe; return the prediction when it is committed, before it is submitted.

        The same `key` of the same `via` always gives the same prediction, even if the recipe has
        changed; without a key each order is a new one. Raises Problem with a code and a text for
        the person who ordered, and StoreUnavailable.
        """
        digest = _digest(request.via, request.key or secrets.token_hex(16))
        prediction_id = await self._store.orders.find(digest)
        if prediction_id is None:
            wanted = _wanted(request)
            order = Order(
                recipe=request.recipe,
                person=request.person,
                place=request.place,
                via=request.via,
            )
            try:
                prediction_id = await self._new(digest, order, wanted)
            except Problem as problem:
                await self._record(problem, order)
                raise
        return await self._read(prediction_id)

    async def press(
        self, prediction_id: str, label: str | None, request: OrderRequest
    ) -> Prediction:
        """Order the recipe of a button of a prediction, for the person who presses it.

        Without a label the same recipe is ordered again.
        """
        ordered = await self._store.orders.ordered(prediction_id)
        if ordered is None:
            raise Problem(404, "not-found", "no such order")
        recipe = find(self.book, ordered.recipe)
        button = OfferedButton(recipe=recipe.name) if label is None else recipe.buttons.get(label)
        if button is None:
            raise Problem(404, "unknown-recipe", f"{recipe.name} has no button {label!r:.40}")
        wanted = find(self.book, button.recipe).options
        options = {name: value for name, value in ordered.options.items() if name in wanted}
        if button.result is not None:
            options[button.result] = await self._picture(prediction_id)
        return await self.order(replace(request, recipe=button.recipe, options=options))

    async def _picture(self, prediction_id: str) -> str:
        prediction = await self._read(prediction_id)
        found = (output.address for output in prediction.output or [])
        address = next(filter(None, found), "")
        if not address:
            raise Problem(409, "not-ended", "there is no picture of it, or not yet")
        return address

    async def _new(self, key: str, order: Order, request: OrderRequest) -> str:
        """Record an order that was not recorded before, or raise Problem."""
        check_allowed(self.book.allow, order)
        recipe = find(self.book, order.recipe)
        values = read_options(recipe, request.options)
        now = self._runtime.clock()
        latest_at = _latest(recipe, now if request.at is None else min(request.at, now), now)
        metadata = {**request.metadata, **fill(recipe.metadata, values)}
        prepared = await self._service.prepare(
            SubmitRequest(
                provider=recipe.provider,
                model=recipe.model,
                input=fill(recipe.input, values),
                caller=request.caller,
                metadata=metadata,
                private=request.private,
                reply_to=request.reply_to,
            ),
            order,
            price=recipe.price,
            latest_at=latest_at,
        )
        made = await self._store.orders.create(
            NewOrder(key=key, recipe=recipe.name, options=values, prediction=prepared.row)
        )
        if made.excess is not None:
            raise prepared.refusal(made.excess)
        if made.is_new:
            await self._service.begin_placed(prepared.submitter)
        return made.prediction_id

    async def _read(self, prediction_id: str) -> Prediction:
        prediction = await self._store.predictions.get(prediction_id)
        if prediction is None:
            detail = "this was ordered before; its prediction has been deleted since"
            raise Problem(409, "too-late", detail, prediction_id=prediction_id)
        return prediction

    async def _record(self, problem: Problem, order: Order) -> None:
        """Log a refusal and count it, if the store is available."""
        recipe = self.book.recipes.get(order.recipe)
        known = recipe.name if recipe else None
        log.info("order.refused", code=problem.type, recipe=known, via=order.via)
        source = " ".join(filter(None, (order.via, known, order.place, order.person)))
        source = source[:_LONGEST_SOURCE] if source.isprintable() else OTHER
        now = self._runtime.clock()
        provider = recipe.provider if recipe else ""
        with contextlib.suppress(StoreUnavailable):
            await self._store.discarded.count(
                [Rejection(provider, problem.type, source, 1, now, now)]
            )


def _digest(via: str, key: str) -> str:
    """Return a digest of a key: it is kept for good, and the key may hold names of people."""
    return hashlib.sha256(msgspec.json.encode([via, key])).hexdigest()


def _wanted(request: OrderRequest) -> OrderRequest:
    """Return an order with its content as JSON stores it; raise Problem if it is not an order."""
    fields = {name: getattr(request, name) for name in Wanted.__struct_fields__}
    try:
        wanted = msgspec.json.decode(msgspec.json.encode(fields), type=Wanted)
    except (TypeError, ValueError, RecursionError) as error:
        raise Problem(422, "invalid-request", f"this is no order: {error}") from None
    check_json("options", wanted.options, wanted.metadata)
    return replace(request, **msgspec.structs.asdict(wanted))


def _latest(recipe: Recipe, asked_at: float, now: float) -> float | None:
    """Return until when an order may be submitted; raise Problem if that time has passed."""
    if recipe.latest is None:
        return None
    if asked_at + recipe.latest <= now:
        detail = f"this order is too old: {recipe.name} must start within {recipe.latest:g} seconds"
        raise Problem(409, "too-late", detail)
    return asked_at + recipe.latest
