"""The facade of `http`: the routes of one run, and the middleware before them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn

from starlette.routing import Route
from starlette.types import ASGIApp

from receiver.deliveries.containment import is_program
from receiver.deliveries.facade import Deliveries
from receiver.deliveries.registry import Registry
from receiver.http.after import AfterCallback
from receiver.http.auth import Guard
from receiver.http.declare import routes
from receiver.http.door import Parts
from receiver.http.drain import Drain
from receiver.http.limits import Limits
from receiver.http.live import LiveStream
from receiver.http.plugins import PATH as PLUGIN_PATH
from receiver.http.plugins import PluginRoutes
from receiver.http.polled import PluginSources
from receiver.http.proxies import Proxied
from receiver.http.rejections import Rejections
from receiver.http.request_log import Requests
from receiver.http.routes.costs import CostRoutes
from receiver.http.routes.deliveries import DeliveryRoutes
from receiver.http.routes.discarded import DiscardedRoutes
from receiver.http.routes.docs import DocsRoutes
from receiver.http.routes.drain import DrainRoutes
from receiver.http.routes.echo import EchoRoutes
from receiver.http.routes.events import EventRoutes
from receiver.http.routes.handlers import HandlerRoutes
from receiver.http.routes.health import AliveRoutes, ReadyRoutes
from receiver.http.routes.metrics import MetricsPage
from receiver.http.routes.predictions import PredictionRoutes
from receiver.http.routes.recipes import RecipeRoutes
from receiver.http.routes.replays import ReplayRoutes
from receiver.http.signals import Ending
from receiver.http.sources import Sources
from receiver.http.webhooks import WEBHOOK_PATH, WebhookRoute
from receiver.model.tasks import TaskSet
from receiver.observability.runtime import Runtime
from receiver.predictions.costs import SpendingReader
from receiver.predictions.facade import Predictions
from receiver.providers import NAMES
from receiver.settings import After, Settings
from receiver.store.facade import Housekeeping, Store

ALWAYS: Final = routes([AliveRoutes(), DocsRoutes()])
"""The routes that also work while the receiver does not run."""
GROUPS: Final = (
    PredictionRoutes,
    RecipeRoutes,
    DeliveryRoutes,
    DrainRoutes,
    EventRoutes,
    HandlerRoutes,
    ReplayRoutes,
    DiscardedRoutes,
    CostRoutes,
    EchoRoutes,
    ReadyRoutes,
    MetricsPage,
)
"""The classes that declare the other routes."""


class Http:
    """The routes of one run of the receiver."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        predictions: Predictions,
        deliveries: Deliveries,
        runtime: Runtime,
        after: After,
        housekeeping: Housekeeping,
    ) -> None:
        """Make one; `after` and `housekeeping` are for work that no process does by itself."""
        self._settings = settings
        self._telemetry = runtime.telemetry
        self._wakeups = runtime.wakeups
        self._deliveries = deliveries
        self._exchange_recipes = predictions.exchange
        self._background_work: list[Callable[[], Coroutine[Any, Any, NoReturn]]] = []
        """The background work of pages."""
        self._runs_sources = False
        """Whether the sources of plugins run here."""
        self.drain = Drain(store, predictions, deliveries, runtime, housekeeping)
        self.limits = Limits(settings)
        self.live = LiveStream(store.changes, store.attempts, runtime.wakeups)
        self._rejections = Rejections(store.discarded.count, runtime.clock)
        self._callback_sources = Sources(settings, predictions.client, runtime.monotonic)
        self._predictions = PredictionRoutes(store, predictions.service, deliveries, runtime)
        groups = [
            self._predictions,
            RecipeRoutes(predictions.orders, self._predictions, deliveries, runtime),
            DeliveryRoutes(store.deliveries, runtime),
            DrainRoutes(self.drain, predictions.tokens, settings.max_body_bytes),
            EventRoutes(store.changes, self.live),
            HandlerRoutes(store, deliveries, runtime),
            ReplayRoutes(store.replays, deliveries.replayer),
            DiscardedRoutes(store.discarded),
            CostRoutes(store.costs, settings.costs_by, runtime.clock),
            EchoRoutes(predictions.tokens, settings.max_body_bytes, runtime.clock),
            ReadyRoutes(store, predictions.locked, runtime.clock),
            MetricsPage(
                runtime.telemetry,
                store.backlog,
                SpendingReader(store, predictions.limits, runtime.clock).read,
                deliveries.registry,
                locked=predictions.locked,
                streams={name: each.any_at_work for name, each in predictions.streams.items()},
                clock=runtime.clock,
            ),
        ]
        self._after = AfterCallback(
            after,
            deliveries,
            f"{settings.public_url}/wake/{predictions.tokens.wake()}",
            runtime.monotonic,
        )
        self.callbacks = WebhookRoute(
            predictions.inbox,
            NAMES,
            settings.max_body_bytes,
            self.limits,
            self._callback_sources,
            runtime.telemetry,
            runtime.clock,
            self._rejections.count,
            self._after,
        )
        parts = Parts(predictions=predictions, deliveries=deliveries, store=store, later=TaskSet())
        self._plugins = PluginRoutes(
            deliveries.registry, parts, self.limits, runtime, self._rejections.count
        )
        self._sources = PluginSources(deliveries.registry, self._plugins, parts, runtime)
        self.routes = [
            *routes(groups, Guard(settings, self.limits)),
            Route(WEBHOOK_PATH, self.callbacks, methods=["POST"]),
            Route(PLUGIN_PATH, self._plugins),
        ]

    def add(
        self, pages: Sequence[Route], work: Callable[[], Coroutine[Any, Any, NoReturn]]
    ) -> None:
        """Serve pages beside these routes, and do their background work."""
        self.routes += pages
        self._background_work.append(work)

    def with_middleware(self, app: ASGIApp) -> ASGIApp:
        """Return the app inside the middleware that every request passes."""
        requests = Requests(app, self._telemetry, [*self.routes, *ALWAYS])
        return Proxied(requests, self._settings.trusted_proxies)

    @asynccontextmanager
    async def running(self, *, accepts: bool, looks_ahead: bool) -> AsyncIterator[None]:
        """Serve live streams and record rejections until the block is left, if it `accepts`.

        If it also `looks_ahead`, it runs plugins' sources, and fetches the address ranges that
        providers publish before they are needed.
        """
        tasks = TaskSet()
        ending = Ending(self.release)
        try:
            if not is_program(asyncio.get_running_loop()):  # our own program handles its signals
                ending.listen()
                tasks.start(ending.keep())
            if accepts:
                tasks.start(self.live.run())
                tasks.start(self._rejections.run())
                for work in self._background_work:
                    tasks.start(work())
                self._runs_sources = looks_ahead
                if self._runs_sources:
                    self._sources.start()
                    tasks.start(self._callback_sources.keep_fresh())
            yield
        finally:
            self.release()
            ending.stop()
            await self._sources.stop()
            await self._plugins.stop()
            await self.drain.stop()
            await tasks.cancel()
            await self._rejections.stop()

    async def exchange(self, registry: Registry, settings: Settings) -> None:
        """Replace the handlers, routes, sources, and the recipes of orders, from now on."""
        await self._sources.stop()
        self._exchange_recipes(settings)
        await self._deliveries.replace_handlers(registry)
        if self._runs_sources:
            self._sources.start()

    def release(self) -> None:
        """Answer callers that wait for an outcome or a drain now, as we are about to stop."""
        self.drain.cancel()
        self._plugins.release()
        self._after.release()
        self._predictions.stopping = True
        self.live.close()
        self._wakeups.wake_all("prediction")
