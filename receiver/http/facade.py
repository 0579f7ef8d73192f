"""The facade of `http`: the routes of one run, and the middleware before them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from starlette.routing import Route
from starlette.types import ASGIApp

from receiver.deliveries.containment import is_program
from receiver.deliveries.facade import Deliveries
from receiver.deliveries.registry import Registry
from receiver.http.after import AfterCallback
from receiver.http.auth import Guard
from receiver.http.declare import routes
from receiver.http.drain import Drain
from receiver.http.limits import Limits
from receiver.http.live import LiveStream
from receiver.http.parts import Parts
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
from receiver.predictions.facade import Predictions
from receiver.settings import After, Settings
from receiver.store.facade import Housekeeping, Store

ALWAYS: Final = routes([AliveRoutes(), DocsRoutes()])
"""The routes that also work while the receiver does not run."""
GROUPS: Final[Sequence[type[Any]]] = (
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
"""The classes that declare the other routes; each is made from the parts of a run."""


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
        self._runs_sources = False
        """Whether the sources of plugins run here."""
        self.drain = Drain(store, predictions, deliveries, runtime, housekeeping)
        self.parts = parts = Parts(
            settings=settings,
            store=store,
            predictions=predictions,
            deliveries=deliveries,
            runtime=runtime,
            drain=self.drain,
            limits=Limits(settings),
            live=LiveStream(store.changes, store.attempts, runtime.wakeups),
        )
        self._rejections = Rejections(store.discarded.count, runtime.clock)
        self._callback_sources = Sources(settings, predictions.client, runtime.monotonic)
        self._after = AfterCallback(after, parts)
        self.callbacks = WebhookRoute(
            parts, self._callback_sources, self._rejections.count, self._after
        )
        self._plugins = PluginRoutes(parts, self._rejections.count)
        self._sources = PluginSources(self._plugins, parts)
        self.routes: list[Route] = [
            *routes([group(parts) for group in GROUPS], Guard(settings, parts.limits)),
            Route(WEBHOOK_PATH, self.callbacks, methods=["POST"]),
            Route(PLUGIN_PATH, self._plugins),
        ]

    def with_middleware(self, app: ASGIApp) -> ASGIApp:
        """Return the app inside the middleware that every request passes."""
        requests = Requests(app, self.parts.runtime.telemetry, [*self.routes, *ALWAYS])
        return Proxied(requests, self.parts.settings.trusted_proxies)

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
                tasks.start(self.parts.live.run())
                tasks.start(self._rejections.run())
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
        self.parts.predictions.exchange(settings)
        await self.parts.deliveries.replace_handlers(registry)
        if self._runs_sources:
            self._sources.start()

    def release(self) -> None:
        """Answer callers that wait for an outcome or a drain now, as we are about to stop."""
        self.drain.cancel()
        self._plugins.release()
        self._after.release()
        self.parts.stopping.set()
        self.parts.live.close()
        self.parts.runtime.wakeups.wake_all("prediction")
