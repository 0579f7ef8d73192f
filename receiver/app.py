"""The composition root: the only file that knows everyone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import httpx
import msgspec
import structlog
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from receiver.deliveries.attempt import Tools
from receiver.deliveries.breaker import BreakerPolicy
from receiver.deliveries.containment import is_program
from receiver.deliveries.fetch import guarded_client
from receiver.deliveries.registry import Explained, Handler, Registry, handlers_of, load
from receiver.deliveries.replay import Replayer
from receiver.deliveries.worker import Worker, new_owner
from receiver.http import front
from receiver.http.auth import Guard
from receiver.http.declare import open_routes, routes
from receiver.http.drain import Drain, Drained
from receiver.http.front import Front
from receiver.http.limits import Limits
from receiver.http.live import LiveStream
from receiver.http.proxies import behind_proxies
from receiver.http.rejections import Rejections
from receiver.http.request_log import Requests
from receiver.http.routes.deliveries import DeliveryRoutes
from receiver.http.routes.discarded import DiscardedRoutes
from receiver.http.routes.docs import DocsRoutes
from receiver.http.routes.echo import EchoRoutes
from receiver.http.routes.events import EventRoutes
from receiver.http.routes.handlers import HandlerRoutes
from receiver.http.routes.health import AliveRoutes, ReadyRoutes
from receiver.http.routes.metrics import MetricsPage
from receiver.http.routes.predictions import PredictionRoutes
from receiver.http.routes.replays import ReplayRoutes
from receiver.http.signals import Ending
from receiver.http.sources import Ranges, Sources, keep_fresh, listed, published_ranges
from receiver.http.webhooks import WEBHOOK_PATH, WebhookRoute
from receiver.model.errors import KeysUnavailable, StoreUnavailable, StoreUnusable
from receiver.model.retry import Policy
from receiver.model.values import Prediction, Shift
from receiver.observability.clock import SteadyClock, Watch
from receiver.observability.events import Telemetry
from receiver.observability.tracing import Client, Tracing
from receiver.predictions.inbox import Inbox
from receiver.predictions.service import PredictionService
from receiver.predictions.stream import Listener
from receiver.predictions.tokens import Tokens
from receiver.providers import NAMES, make_providers
from receiver.providers.adapter import Provider, Streamed
from receiver.providers.egress import outward
from receiver.providers.fal import read_jwks, read_meta
from receiver.providers.published import published_keys
from receiver.settings import SHORTEST_SECRET, Secret, Settings, development
from receiver.store.deliveries import ReplayResult
from receiver.store.erasure import Erased
from receiver.store.facade import Chore, Store
from receiver.store.leases import Leader, LeaderTask, LeaseRequest
from receiver.store.retention import PACE, PACE_ON_A_SERVER, Retention
from receiver.store.sqlite.engine import SQLiteStore

log = structlog.get_logger("receiver")

_CONNECTIONS: Final = httpx.Limits(max_connections=200, max_keepalive_connections=50)

_ALWAYS: Final = open_routes([AliveRoutes(), DocsRoutes()])
"""The routes that need nothing that lives."""
_GROUPS: Final = (
    PredictionRoutes,
    DeliveryRoutes,
    EventRoutes,
    HandlerRoutes,
    ReplayRoutes,
    DiscardedRoutes,
    EchoRoutes,
    ReadyRoutes,
    MetricsPage,
)
"""What declares the others."""
_ONE_STEP: Final = 30.0
"""Seconds in which all processes have seen one and the same step of the clock."""

_Run: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


def create_app(
    settings: Settings | None = None,
    handlers: Sequence[str | Callable[..., Any] | Handler] | None = None,
    *,
    dispatch: bool = True,
    clock: Callable[[], float] = time.time,
    transport: httpx.AsyncBaseTransport | None = None,
    http: httpx.AsyncBaseTransport | None = None,
    results: httpx.AsyncBaseTransport | None = None,
    monotonic: Callable[[], float] | None = None,
) -> Starlette:
    """Build the receiver as an ASGI app with a lifespan, which may be started any number of times.

    `settings` default to the environment; `handlers` are names as in RECEIVER_HANDLERS or decorated
    functions, and default to the settings'. Without `dispatch` handlers run elsewhere, or when
    `POST /v1/drain` says so. `transport` stands in for the network to providers, `http` for that of
    `ctx.http` and `results` for that of `ctx.fetch`, guard included. A `clock` that is given is
    believed whatever it does, unless there is a `monotonic` one to hold against it.
    Raises SettingsError, HandlerError, or StoreUnusable where PostgreSQL's extra is not installed;
    the lifespan raises StoreUnusable and StoreUnavailable.
    """
    tasks = _SERVES if dispatch else _ACCEPTS
    network = _Network(transport, http, results)
    return _receiver(settings, handlers, tasks, _Clocks(clock, monotonic), network).app


async def work(settings: Settings, stop: asyncio.Event) -> None:
    """Run deliveries, and nothing else, until `stop` is set.

    Raises HandlerError, or StoreUnusable: this is for PostgreSQL, where others accept.
    """
    if settings.sqlite_path is not None:
        raise StoreUnusable(
            "a worker needs PostgreSQL: with SQLite one process does everything, and `receiver "
            "serve` is it; see RECEIVER_DATABASE_URL"
        )
    async with _receiver(settings, None, _WORKS).running():
        await stop.wait()


async def drain(settings: Settings, seconds: float, stop: asyncio.Event | None = None) -> Drained:
    """Run what is due, for so long at most or until `stop` is set, in a process of its own.

    Raises HandlerError or StoreUnusable.
    """
    async with _receiver(settings, None, _DRAINS).running() as life:
        stopping = asyncio.create_task((stop or asyncio.Event()).wait())
        stopping.add_done_callback(lambda _: life.drain.cancel())
        try:
            return await life.drain(seconds)
        finally:
            stopping.cancel()


async def migrate(settings: Settings) -> None:
    """Bring the database's schema up to date, and so find what is wrong with it.

    Raises StoreUnusable.
    """
    await _make_store(settings, lambda _: None).migrate()


class _Tasks(msgspec.Struct, frozen=True):
    """What a process does by itself."""

    outbound: bool
    """Submits what waits, asks about what is due, listens to streams."""
    deliveries: bool
    """Runs handlers."""
    sweeps: bool = True
    """Takes its turn at what is done once for all processes."""


class _Network(msgspec.Struct, frozen=True):
    """What stands in for the networks, where that is not the world."""

    providers: httpx.AsyncBaseTransport | None = None
    http: httpx.AsyncBaseTransport | None = None
    results: httpx.AsyncBaseTransport | None = None


class _Clocks:
    """What time it is, for what is stored and for what only this process knows."""

    def __init__(
        self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] | None = None
    ) -> None:
        self.steady: SteadyClock | None = None
        """Follows the wall clock's steps in its own time; None: `wall` is believed as it is."""
        if wall is time.time and monotonic is None:
            self.steady = SteadyClock()
        elif monotonic is not None:
            self.steady = SteadyClock(wall, monotonic, suspended=lambda: 0.0)
        self.wall = self.steady or wall
        self.monotonic = monotonic or (time.monotonic if self.steady else wall)


_SERVES: Final = _Tasks(outbound=True, deliveries=True)
_ACCEPTS: Final = _Tasks(outbound=True, deliveries=False)
_WORKS: Final = _Tasks(outbound=False, deliveries=True)
_DRAINS: Final = _Tasks(outbound=False, deliveries=False, sweeps=False)


def _receiver(
    settings: Settings | None,
    handlers: Sequence[str | Callable[..., Any] | Handler] | None,
    tasks: _Tasks,
    clocks: _Clocks | None = None,
    network: _Network | None = None,
) -> _Receiver:
    settings = settings or Settings.read(os.environ)
    registry = _registry(settings.handlers if handlers is None else handlers)
    settings = _with_secrets(settings)
    _store_maker(settings)  # tells at once what is not installed
    made = partial(_Parts, settings, registry, clocks or _Clocks(), network or _Network())
    return _Receiver(made, tasks)


def _make_store(settings: Settings, report: Callable[[StoreUnavailable | None], None]) -> Store:
    return _store_maker(settings)(report)


def _store_maker(
    settings: Settings,
) -> Callable[[Callable[[StoreUnavailable | None], None]], Store]:
    """Return what makes a store, or raise StoreUnusable where its extra is not installed."""
    if settings.sqlite_path is not None:
        return partial(SQLiteStore, settings.sqlite_path)
    try:
        from receiver.store.postgres.engine import SCHEMA, PostgresStore  # noqa: PLC0415
        from receiver.store.postgres.queue import PgQueuerJobs  # noqa: PLC0415 - paid for when used
    except ModuleNotFoundError as error:
        raise StoreUnusable(
            f"PostgreSQL needs more than is installed here ({error.name} is missing): "
            "pip install 'prediction-receiver[postgres]'"
        ) from error
    return lambda report: PostgresStore(settings.database_url, report, PgQueuerJobs(SCHEMA))


def _registry(handlers: Sequence[str | Callable[..., Any] | Handler]) -> Registry:
    registry = load([name for name in handlers if isinstance(name, str)])
    for given in handlers:
        if not isinstance(given, str):
            for handler in [given] if isinstance(given, Handler) else handlers_of(given):
                registry.add(handler)
    return registry


def _with_secrets(settings: Settings) -> Settings:
    """In development, make up the secrets that are missing."""
    if not settings.dev:
        return settings
    secret_keys = settings.secret_keys or (_made_up(settings),)
    key = Secret(development.api_key(secret_keys[0].reveal()))
    return replace(settings, secret_keys=secret_keys, api_keys=(*settings.api_keys, key))


def _made_up(settings: Settings) -> Secret:
    """Read the secret key beside the database file; make it up at the first start.

    A new one at each start would refuse the callbacks that are under way.
    """
    if settings.sqlite_path is None:
        raise StoreUnusable(
            "set RECEIVER_SECRET_KEY: processes that share PostgreSQL must share it too, and --dev "
            "makes one up for one process only"
        )
    path = development.secret_file(settings)
    if not path.exists():
        _write_secret(path)
    text = path.read_text()
    if len(text) < SHORTEST_SECRET:
        raise StoreUnusable(f"{path} holds no secret: remove it, and start again")
    return Secret(text)


def _write_secret(path: Path) -> None:
    """Write it whole or not at all; the second process leaves the first one's in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, part = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(fd, "w") as file:
        file.write(secrets.token_hex(32))
    with contextlib.suppress(FileExistsError):
        os.link(part, path)
    Path(part).unlink()


class _Parts:
    """What a receiver is made of, put together but not at work yet; HTTP is not in it."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        clocks: _Clocks,
        network: _Network,
    ) -> None:
        self.settings = settings
        self.registry = registry
        self.steady = clocks.steady
        self.clock = clock = clocks.wall
        self.monotonic = clocks.monotonic
        self.owner = new_owner()
        self.alone = settings.sqlite_path is not None
        self.telemetry = Telemetry()
        self.telemetry.expect(NAMES, registry.handlers)
        self.store = _make_store(settings, self.telemetry.store)
        self.tracing = Tracing(self.store.predictions.trace)
        self.tokens = Tokens([key.reveal() for key in settings.secret_keys])
        # Whatever compresses all the same is inflated in bounded pieces.
        self.client = Client(
            self.tracing,
            tells=False,
            transport=network.providers or outward(settings.proxies, limits=_CONNECTIONS),
            headers={"Accept-Encoding": "identity"},
        )
        world = network.http or outward(settings.proxies)
        self.http = Client(self.tracing, tells=True, transport=world, timeout=30.0)
        self.results = guarded_client(
            allow_private=settings.allow_private_fetch, instead=network.results
        )
        fal = settings.providers["fal"].urls
        self.keys = published_keys(self.client, fal["jwks"], read_jwks, self.monotonic)
        self.published = published_ranges(self.client, fal["meta"], read_meta, self.monotonic)
        providers = make_providers(settings.providers)
        self.inbox = self._make_inbox(providers)
        self.outbound = self._make_outbound(providers)
        self.listeners = {
            name: self._make_listener(name, provider)
            for name, provider in providers.items()
            if isinstance(provider, Streamed) and settings.providers[name].key is not None
        }
        self.gates = self.store.breakers
        self.dispatch = self._make_dispatch()
        self.replays = self.store.replays
        self.replayer = Replayer(self.replays, registry, wake=self.dispatch.wake, clock=clock)
        self.retention = Retention(
            self.store.disposal,
            settings.retention,
            scrub=self.store.scrub,
            clock=clock,
            pace=PACE if self.alone else PACE_ON_A_SERVER,
        )
        self.discarded = self.store.discarded
        self.rejections = Rejections(self.discarded.count, clock)
        self.journal = self.store.changes
        self.feed = LiveStream(self.journal)
        self.store.on_commit = self.telemetry.batch
        self.store.on_lost = self.telemetry.lost
        self.store.on_news = self._heard
        self.inbox.on_event = self._on_event
        self.inbox.on_change = self.outbound.changed

    def _make_inbox(self, providers: Mapping[str, Provider]) -> Inbox:
        return Inbox(
            self.store,
            providers,
            self.tokens,
            self.registry.match,
            self.keys,
            telemetry=self.telemetry,
            alone=self.alone,
            clock=self.clock,
            tracing=self.tracing,
        )

    def _make_outbound(self, providers: Mapping[str, Provider]) -> PredictionService:
        return PredictionService(
            self.store,
            self.inbox,
            providers,
            self.settings,
            self.tokens,
            self.client,
            telemetry=self.telemetry,
            alone=self.alone,
            clock=self.clock,
            monotonic=self.monotonic,
            tracing=self.tracing,
        )

    def _make_dispatch(self) -> Worker:
        settings = self.settings
        policy = Policy(
            attempts=settings.retry_attempts, base=settings.retry_base, cap=settings.retry_cap
        )
        return Worker(
            self.store,
            self.registry,
            Tools(
                self.store.deliveries,
                self.outbound.submit,
                self.http,
                self.results,
                settings.max_chain,
            ),
            self.gates,
            owner=self.owner,
            policy=policy,
            breaker=BreakerPolicy(failures=settings.breaker_failures),
            clock=self.clock,
            monotonic=self.monotonic,
            sweeps=self.alone,
            telemetry=self.telemetry,
            tracing=self.tracing,
        )

    def _make_listener(self, name: str, provider: Streamed) -> Listener | Leader:
        listener = Listener(
            name,
            provider,
            self.client,
            self.inbox,
            self.store,
            on_connect=self.outbound.look_now,
            clock=self.clock,
        )
        # Where others listen too, one of us suffices.
        duty = None if self.alone else self._duty(f"stream {name}", listener)
        self.outbound.listen_first(name, (duty or listener).ready)
        return duty or listener

    def replaying(self) -> Replayer | Leader:
        """Return what works on replays: where there are others, one of us does."""
        return self.replayer if self.alone else self._duty("replays", self.replayer)

    def _duty(self, name: str, work: LeaderTask) -> Leader:
        return Leader(name, self.owner, work, self.store.leases, self.clock, self.monotonic)

    def _on_event(self, handlers: Sequence[str]) -> None:
        self.dispatch.wake(handlers)
        self.feed.wake()

    def watch(self, steady: SteadyClock) -> Watch:
        """Return what follows the steps of the wall clock."""
        return Watch(steady, self.store.believes, self._move, self._moved)

    async def _move(self, step: Shift) -> None:
        """Move what is stored for later; one process does it, of all who see the step."""
        now = self.clock()
        role = LeaseRequest(name="clock", owner=self.owner, now=now, until=now + _ONE_STEP)
        if self.alone or await self.store.leases.hold(role):
            await self.store.shift(step)

    def _moved(self) -> None:
        self.dispatch.gates_changed()
        self.outbound.look_now()

    def _heard(self, handlers: Sequence[str] | None, ended: Sequence[str] | None) -> None:
        """Hear what another process committed; None: something may have been missed."""
        self.dispatch.wake(handlers)
        self.feed.wake()
        if ended is None:
            self.inbox.waiters.tell_all()
        else:
            for prediction_id in ended:
                self.inbox.waiters.tell(prediction_id)


class _Surface:
    """The routes that need what lives, and what stands before all routes."""

    def __init__(self, parts: _Parts, drain: Callable[[float], Awaitable[Drained]]) -> None:
        self._parts = parts
        self._limits = Limits(parts.settings)
        self._predictions = self._make_predictions()
        guard = Guard(parts.settings, self._limits)
        self.routes = [
            *routes(guard, self._groups(drain)),
            Route(WEBHOOK_PATH, self._webhooks(), methods=["POST"]),
        ]

    def stand_before(self, app: ASGIApp) -> ASGIApp:
        """Put before the routes what every request passes."""
        requests = Requests(app, self._parts.telemetry, [*self.routes, *_ALWAYS])
        return behind_proxies(requests, self._parts.settings.trusted_proxies)

    def release(self) -> None:
        """Answer those who wait for outcomes now, and end the streams."""
        self._predictions.stopping = True
        self._parts.feed.close()
        self._parts.inbox.waiters.tell_all()

    def _webhooks(self) -> WebhookRoute:
        parts = self._parts
        return WebhookRoute(
            parts.inbox,
            NAMES,
            parts.settings.max_body_bytes,
            self._limits,
            Sources(self._ranges()),
            parts.telemetry,
            parts.clock,
            parts.rejections.count,
        )

    def _ranges(self) -> dict[str, Ranges]:
        """Say where callbacks may come from, for the providers that are told."""
        parts = self._parts
        told = {name: given.allowed_sources for name, given in parts.settings.providers.items()}
        return {
            name: parts.published if allowed == "meta" else listed(allowed)
            for name, allowed in told.items()
            if allowed is not None
        }

    def _make_predictions(self) -> PredictionRoutes:
        parts = self._parts
        return PredictionRoutes(
            parts.store,
            parts.outbound,
            parts.inbox.waiters,
            replay=self._replay,
            wake=parts.dispatch.wake,
            explain=self._explain,
            tracing=parts.tracing,
            erase=self._erase,
            gates=parts.gates.all,
        )

    def _groups(self, drain: Callable[[float], Awaitable[Drained]]) -> list[object]:
        parts, clock = self._parts, self._parts.clock
        wake, changed = parts.dispatch.wake, parts.dispatch.gates_changed
        return [
            self._predictions,
            DeliveryRoutes(parts.store.deliveries, wake=wake, drain=drain, clock=clock),
            EventRoutes(parts.journal, parts.feed),
            HandlerRoutes(
                parts.gates, parts.store.deliveries, parts.registry, changed=changed, clock=clock
            ),
            ReplayRoutes(parts.replays, parts.replayer),
            DiscardedRoutes(parts.discarded),
            EchoRoutes(parts.tokens, parts.settings.max_body_bytes, self._limits, clock),
            ReadyRoutes(parts.store, clock),
            self._make_metrics_page(),
        ]

    def _make_metrics_page(self) -> MetricsPage:
        parts = self._parts
        return MetricsPage(
            parts.telemetry,
            parts.store.backlog,
            providers=NAMES,
            handlers=list(parts.registry.handlers),
            streams={name: each.somebody_is for name, each in parts.listeners.items()},
            clock=parts.clock,
        )

    def _explain(self, event_type: str, prediction: Prediction) -> list[Explained]:
        return self._parts.registry.explain(
            event_type, prediction.provider, prediction.model, prediction.metadata
        )

    async def _replay(self, prediction_id: str) -> ReplayResult:
        parts = self._parts
        return await parts.store.deliveries.replay(
            prediction_id, parts.registry.match, parts.clock()
        )

    async def _erase(self, prediction_id: str) -> Erased:
        erased = await self._parts.store.erasure.erase(prediction_id, self._parts.clock())
        if erased == "erased":
            log.info("prediction.erased", prediction=prediction_id)
        return erased


class _Receiver:
    """An app that may be started and stopped any number of times, but once at a time.

    Nothing that lives is here: each start makes all of it, and gives all back when it ends, also
    when it fails. So processes that are forked from one that has this in hand share no identity.
    """

    def __init__(self, parts: Callable[[], _Parts], does: _Tasks) -> None:
        self._parts = parts
        self._does = does
        self._life: _Life | None = None
        self._front = Front(self._lifespan, _ALWAYS, _GROUPS)
        self.app = self._front.app
        self.app.state.release = self._release

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        try:
            async with self.running():
                yield
        finally:
            getattr(self.app.state, "stopped", lambda: None)()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[_Life]:
        """Be at work until the block is left. Raises StoreUnusable."""
        if self._life is not None:
            raise StoreUnusable(
                "this receiver runs already: an app can be started again only after it has "
                "stopped; make another by create_app, with a database of its own"
            )
        life = self._life = _Life(self._parts(), self._does)
        self._front.close(front.STARTING)
        after = front.FAILED
        try:
            async with life.running():
                self._front.open(life.surface.routes, life.surface.stand_before)
                after = front.STOPPED
                try:
                    yield life
                finally:
                    self._front.close(front.STOPPING)
        finally:
            self._life = None
            self._front.close(after)

    def _release(self) -> None:
        """Answer those who wait for outcomes or a drain now, as we are about to stop."""
        if self._life is not None:
            self._life.release()


class _Life:
    """One run of a receiver: what starts, what goes on, and what stops in which order."""

    def __init__(self, parts: _Parts, does: _Tasks) -> None:
        self._parts = parts
        self._does = does
        self.drain = Drain(parts.outbound, parts.dispatch)
        self.surface = _Surface(parts, self.drain)
        self._is_asked_to_stop = False
        """Else attempts that are cut short count, as they may be what ends us."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Be at work until the block is left; whatever was begun ends, however far it came."""
        parts = self._parts
        async with AsyncExitStack() as stack:
            stack.push_async_callback(parts.tracing.stop)
            for client in (parts.client, parts.results, parts.http):
                stack.push_async_callback(client.aclose)
            await parts.store.start()
            stack.callback(lambda: log.info("receiver.stopped"))
            stack.push_async_callback(parts.store.stop)
            tasks: list[asyncio.Task[None]] = []
            stack.push_async_callback(self._stop, tasks)
            parts.tracing.start(parts.settings.trace_exporters)
            await parts.store.recover(parts.owner, parts.clock())
            await parts.dispatch.start(lanes=self._does.deliveries)
            runs = self._background()
            if not is_program(asyncio.get_running_loop()):  # our own program hears its signals
                ending = Ending(self.release)
                stack.callback(ending.stop)
                ending.listen()
                runs.append(ending.keep)
            tasks += [asyncio.create_task(run()) for run in runs]
            if self._does.outbound:
                await parts.outbound.start()
            self._announce()
            yield
            self._is_asked_to_stop = True

    def _background(self) -> list[_Run]:
        """Name what runs here until we stop, beside lanes and submits."""
        parts, does = self._parts, self._does
        sources = {given.allowed_sources for given in parts.settings.providers.values()}
        wanted: list[tuple[bool, _Run]] = [
            *((does.outbound, listener.run) for listener in parts.listeners.values()),
            (does.outbound, self._warm_keys),
            *((True, parts.watch(steady).run) for steady in [parts.steady] if steady),
            (does.outbound, parts.feed.run),
            (does.outbound, parts.rejections.run),
            (does.outbound and "meta" in sources, partial(keep_fresh, parts.published)),
            (does.sweeps, partial(parts.store.sweep, self._chores())),
            (does.sweeps, parts.replaying().run),
            (does.sweeps and parts.alone, parts.retention.run),
        ]
        return [run for is_wanted, run in wanted if is_wanted]

    def _chores(self) -> dict[str, Chore]:
        """Name what this process can do for all."""
        parts = self._parts
        chores: dict[str, Chore] = {
            "deliveries": parts.dispatch.reclaim,
            "retention": parts.retention.sweep,
        }
        if self._does.outbound:
            chores["submits"] = parts.outbound.sweep_submits
            chores["looks"] = parts.outbound.sweep_looks
        return chores

    async def _warm_keys(self) -> None:
        """Have fal's keys before its first callback needs them."""
        if self._parts.settings.providers["fal"].key is not None:
            with contextlib.suppress(KeysUnavailable):
                await self._parts.keys(False)

    async def _stop(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        log.info("receiver.stopping")
        self.release()
        await self.drain.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, self._parts.outbound.stop(), return_exceptions=True)
        await self._parts.inbox.stop()
        await self._parts.dispatch.stop(asked=self._is_asked_to_stop)
        await self._parts.rejections.stop()

    def release(self) -> None:
        """Answer those who wait for outcomes or a drain now, as we are about to stop."""
        self.drain.cancel()
        self.surface.release()

    def _announce(self) -> None:
        settings, registry = self._parts.settings, self._parts.registry
        on = [name for name, given in settings.providers.items() if given.key is not None]
        for handler in registry.handlers.values():
            log.info("handler.registered", handler=handler.name, place=handler.place)
        if self._does.outbound:
            for problem in _warnings(settings, on, registry):
                log.warning("settings.warning", problem=problem)
        log.info(
            "receiver.started",
            owner=self._parts.owner,
            database=settings.database,
            providers=on,
            handlers=list(registry.handlers),
            public_url=settings.public_url,
            tracing=self._parts.tracing.on,
        )


def _warnings(settings: Settings, on: Sequence[str], registry: Registry) -> list[str]:
    found = [
        f"handler {name} is to run after {other}, which is no handler here: it will not wait"
        for name, other in registry.strangers()
    ]
    if settings.public_url is None:
        found.append(
            "RECEIVER_PUBLIC_URL is not set: outcomes come by stream and poll only, no callbacks"
        )
    if not on:
        found.append(
            "no provider has a key: set OXEN_API_KEY, EACHLABS_API_KEY or FAL_KEY to submit"
        )
    if not settings.api_keys and not settings.dev:
        found.append("RECEIVER_API_KEYS is not set: every /v1 route answers 401")
    if not registry.handlers:
        found.append("no handler is registered: outcomes are recorded and nothing else happens")
    return found
