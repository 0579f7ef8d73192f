"""The route `GET /metrics`: the counters, and gauges of the backlog from the database."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Final

from prometheus_client.metrics_core import GaugeMetricFamily
from starlette.responses import Response

from receiver.http.declare import get
from receiver.http.parts import Parts
from receiver.model.errors import StoreUnavailable
from receiver.observability.metrics import CONTENT_TYPE, gauge
from receiver.predictions.costs import Spending, read_spending
from receiver.providers import NAMES
from receiver.store.backlog import Backlog

_FRESH: Final = 1.0
"""Seconds for which one page is returned to all callers, as the route needs no key."""
_SHARE: Final = 10
"""A page is returned for this many times as long as it took to make, if that is longer."""
_PATIENCE: Final = 3.0
"""Seconds that the database has to answer; Prometheus gives up after ten."""


class MetricsPage:
    """The page of metrics, made once a second at most, for all callers."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._predictions = parts.predictions
        self._registry = parts.deliveries.registry
        self._telemetry = parts.runtime.telemetry
        self._clock = parts.runtime.clock
        self._made: asyncio.Task[bytes] | None = None
        self._stale_at = 0.0

    @get("/metrics", "as Prometheus reads it", media_type="text/plain", is_open=True)
    async def answer(self) -> Response:
        """Return metrics for Prometheus.

        Counters and histograms of this process, and gauges read from the database.
        """
        return Response(await self._page(), headers={"Content-Type": CONTENT_TYPE})

    async def _page(self) -> bytes:
        now = asyncio.get_running_loop().time()
        if self._made is None or (self._made.done() and now >= self._stale_at):
            self._stale_at = 0.0
            self._made = asyncio.create_task(self._make())
        return await asyncio.shield(self._made)

    async def _make(self) -> bytes:
        clock = asyncio.get_running_loop().time
        began = clock()
        depth, connected, spending = None, None, None
        try:
            async with asyncio.timeout(_PATIENCE):
                depth = await self._store.backlog.depth(NAMES)
                spending = await read_spending(self._store, self._predictions.limits, self._clock())
                streams = self._predictions.streams.items()
                connected = {name: await each.any_at_work() for name, each in streams}
        except (StoreUnavailable, TimeoutError):
            pass  # the page reports this, and has the metrics of this process
        gauges = list(self._gauges(depth, connected, spending))
        # Many processes have many files; reading them would block the loop.
        page = await asyncio.to_thread(self._telemetry.metrics.expose, gauges)
        ended = clock()
        self._stale_at = ended + max(_FRESH, _SHARE * (ended - began))
        return page

    def _gauges(
        self,
        depth: Backlog | None,
        connected: Mapping[str, bool] | None,
        spending: Spending | None,
    ) -> Iterator[GaugeMetricFamily]:
        """Yield all gauges but those the database did not give: a zero would be misleading."""
        available = connected is not None and self._telemetry.writable
        yield gauge(
            "receiver_database_available",
            "Whether the database answers and takes writes.",
            (),
            {(): available},
        )
        locked = self._predictions.locked()
        yield gauge(
            "receiver_provider_locked",
            "Whether a provider has locked our account, so that its submits wait.",
            ("provider",),
            {(name,): name in locked for name in NAMES},
        )
        if connected is not None:
            yield gauge(
                "receiver_stream_connected",
                "Whether some process listens to the provider's stream.",
                ("provider",),
                {(name,): up for name, up in connected.items()},
            )
        if depth is not None:
            yield from self._depths(depth)
        if spending is not None:
            yield from self._spent(spending)

    def _spent(self, spending: Spending) -> Iterator[GaugeMetricFamily]:
        yield gauge(
            "receiver_cost_today_dollars",
            "What predictions cost that have ended today (UTC), as far as it is known.",
            ("provider",),
            {(name,): spending.today.get(name, 0.0) for name in NAMES},
        )
        yield gauge(
            "receiver_cost_unknown_today",
            "Predictions that have ended today, whose cost is not known.",
            ("provider",),
            {(name,): spending.unknown.get(name, 0) for name in NAMES},
        )
        yield gauge(
            "receiver_budget_used_ratio",
            "The part that the fullest budget of a kind is used; at 1 it is spent.",
            ("budget",),
            {(kind,): used for kind, used in spending.used.items()},
        )

    def _depths(self, depth: Backlog) -> Iterator[GaugeMetricFamily]:
        handlers = sorted(
            {*self._registry.handlers, *(name for name, _ in depth.pending), *depth.held}
        )
        pending = {(name, state): 0 for name in handlers for state in ("pending", "running")}
        yield gauge(
            "receiver_deliveries_pending",
            "Deliveries that have not come to their end.",
            ("handler", "state"),
            {**pending, **depth.pending},
        )
        now = self._clock()
        yield gauge(
            "receiver_oldest_pending_delivery_age_seconds",
            "Since when the oldest delivery of a handler is pending; 0 where none is.",
            ("handler",),
            {(name,): max(now - depth.oldest.get(name, now), 0.0) for name in handlers},
        )
        yield gauge(
            "receiver_handler_held",
            "Whether a handler's deliveries wait: paused by hand, or open after a run of failures.",
            ("handler", "state"),
            {
                (name, state): depth.held.get(name) == state
                for name, state in product(handlers, ("paused", "open"))
            },
        )
        yield gauge(
            "receiver_predictions_living",
            "Predictions that have not come to their end.",
            ("provider", "status"),
            depth.living,
        )
