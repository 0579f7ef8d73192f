"""The pages of predictions: the list, one prediction with all its details, and its actions."""

from __future__ import annotations

import asyncio
import secrets

from receiver.dashboard.cache import PictureCache
from receiver.dashboard.context import PageContext
from receiver.dashboard.declare import View, action, page
from receiver.dashboard.filters import chips, wanted
from receiver.dashboard.media import kind_of
from receiver.dashboard.timeline import timeline
from receiver.http.declare import PredictionId
from receiver.http.parts import Parts
from receiver.http.routes.predictions import ExplanationAsked, PredictionRoutes, Waiting
from receiver.model.errors import Problem
from receiver.model.requests import OrderRequest, SubmitRequest
from receiver.model.states import TERMINAL
from receiver.model.values import Status
from receiver.providers import NAMES


class PredictionPages:
    """The pages about predictions."""

    def __init__(self, parts: Parts, cache: PictureCache) -> None:
        self._cache = cache
        self._search = parts.store.search
        self._service = parts.predictions.service
        self._orders = parts.predictions.orders
        self._routes = PredictionRoutes(parts)

    @page("/predictions")
    async def predictions(self, context: PageContext) -> View:
        """List predictions; `view=grid` shows their pictures."""
        found = await self._search.page(wanted(context.query))
        values = {
            "found": found,
            "chips": chips(context.query),
            "grid": context.query.get("view") == "grid",
            "statuses": list(Status),
            "providers": NAMES,
            "kind_of": kind_of,
        }
        return View("predictions.html", values)

    @page("/predictions/{id}")
    async def prediction(self, id: PredictionId) -> View:
        """Show all details of one prediction."""
        found = await self._routes.read(id, Waiting())
        explained, family, arrivals = await asyncio.gather(
            self._routes.explain(id, ExplanationAsked()),
            self._search.family(id),
            self._search.arrivals(id),
        )
        parents, children = family
        deliveries = [each.delivery for each in explained.handlers if each.delivery is not None]
        values = {
            "prediction": found,
            "kind_of": kind_of,
            "gone": [
                number
                for number in range(len(found.output or []))
                if self._cache.find(id, number, ("gone",)) is not None
            ],
            "explained": explained,
            "parents": parents,
            "children": children,
            "arrivals": arrivals,
            "timeline": timeline(found, arrivals, deliveries),
            "has_ended": found.status in TERMINAL,
            "again": secrets.token_hex(16),
        }
        return View("prediction.html", values)

    @action("/predictions/{id}/cancel", "cancel")
    async def cancel(self, id: PredictionId) -> None:
        await self._routes.cancel(id)

    @action("/predictions/{id}/replay", "replay")
    async def replay(self, id: PredictionId) -> None:
        await self._routes.replay(id)

    @action("/predictions/{id}/erase", "erase")
    async def erase(self, id: PredictionId) -> None:
        await self._routes.erase(id)

    @action("/predictions/{id}/again", "again")
    async def again(self, context: PageContext, id: PredictionId) -> str:
        """Submit or order the same again; a form that is sent twice does it once."""
        before = await self._routes.read(id, Waiting())
        if before.erased_at is not None:
            raise Problem(409, "erased", "the prediction was erased: there is nothing to submit")
        key = f"ui/{context.form.get('key', '')[:64]}"
        if before.order is not None:
            again = OrderRequest(key=key, via="ui", caller=context.caller)
            made = await self._orders.press(id, None, again)
        else:
            made = await self._service.submit(
                SubmitRequest(
                    provider=before.provider,
                    model=before.model,
                    input=before.input,
                    metadata=before.metadata,
                    key=key,
                    caller=context.caller,
                )
            )
        return f"/predictions/{made.id}"
