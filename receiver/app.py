"""The composition root: the only file that knows everyone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from receiver.dispatch.embedded import Dispatch, new_owner
from receiver.dispatch.fetch import guarded_client
from receiver.dispatch.gate import Breaker
from receiver.dispatch.registry import Explained, Handler, Registry, handlers_of, load
from receiver.dispatch.runner import Tools
from receiver.duty import Duty
from receiver.errors import KeysUnavailable, StoreUnavailable, StoreUnusable
from receiver.feed import Feed
from receiver.inbound import (
    ERROR_HANDLERS,
    OPERATIONS,
    WEBHOOKS,
    Deliveries,
    Docs,
    Drained,
    Events,
    Guard,
    Handlers,
    Hook,
    Limits,
    MetricsPage,
    Predictions,
    Proxies,
    PublishedRanges,
    Ranges,
    ReplayRoutes,
    Requests,
    Sources,
    echo_route,
    health_routes,
    listed,
    undelivered_routes,
)
from receiver.inbox import Inbox
from receiver.keys import PublicKeys
from receiver.listener import Listener
from receiver.model import Policy, Prediction
from receiver.outbound import Outbound
from receiver.providers import NAMES, make_providers
from receiver.providers.base import Streamed
from receiver.providers.fal import read_jwks, read_meta
from receiver.rejections import Rejections
from receiver.replayer import Replayer
from receiver.retention import Retention
from receiver.settings import SHORTEST_SECRET, Secret, Settings
from receiver.store.backlog import Backlog
from receiver.store.base import Chore, Store
from receiver.store.disposal import Disposal
from receiver.store.erasure import Erased, Erasure
from receiver.store.gates import Gates
from receiver.store.journal import Journal
from receiver.store.replays import Replays
from receiver.store.sqlite import SQLiteStore
from receiver.store.traces import Traces
from receiver.store.undelivered import NonDeliveries
from receiver.telemetry import Telemetry
from receiver.tokens import Tokens
from receiver.tracing import Client, Tracing

log = structlog.get_logger("receiver")

_OVERTIME: Final = 5.0
"""Seconds beyond its time in which a drain's last attempts may be cancelled and settled."""
_CONNECTIONS: Final = httpx.Limits(max_connections=200, max_keepalive_connections=50)


def create_app(
    settings: Settings | None = None,
    handlers: Sequence[str | Callable[..., Any] | Handler] | None = None,
    *,
    dispatch: bool = True,
    clock: Callable[[], float] = time.time,
    transport: httpx.AsyncBaseTransport | None = None,
    http: httpx.AsyncBaseTransport | None = None,
    results: httpx.AsyncBaseTransport | None = None,
) -> Starlette:
    """Build the receiver as an ASGI app with a lifespan.

    `settings` default to the environment; `handlers` are names as in RECEIVER_HANDLERS or decorated
    functions, and default to the settings'. Without `dispatch` handlers run elsewhere, or when
    `POST /v1/drain` says so. `transport` stands in for the network to providers, `http` for that of
    `ctx.http` and `results` for that of `ctx.fetch`, guard included.
    Raises SettingsError, HandlerError, or StoreUnusable where PostgreSQL's extra is not installed;
    the lifespan raises StoreUnusable and StoreUnavailable.
    """
    tasks = _SERVES if dispatch else _ACCEPTS
    return _receiver(settings, handlers, tasks, clock, _Network(transport, http, results)).app


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


async def drain(settings: Settings, seconds: float) -> Drained:
    """Run what is due, for so long at most, in a process of its own.

    Raises HandlerError or StoreUnusable.
    """
    receiver = _receiver(settings, None, _DRAINS)
    async with receiver.running():
        return await receiver.drain(seconds)


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


_SERVES: Final = _Tasks(outbound=True, deliveries=True)
_ACCEPTS: Final = _Tasks(outbound=True, deliveries=False)
_WORKS: Final = _Tasks(outbound=False, deliveries=True)
_DRAINS: Final = _Tasks(outbound=False, deliveries=False, sweeps=False)


def _receiver(
    settings: Settings | None,
    handlers: Sequence[str | Callable[..., Any] | Handler] | None,
    tasks: _Tasks,
    clock: Callable[[], float] = time.time,
    network: _Network | None = None,
) -> _Receiver:
    settings = settings or Settings.read(os.environ)
    registry = _registry(settings.handlers if handlers is None else handlers)
    return _Receiver(_with_secrets(settings), registry, tasks, clock, network or _Network())


def _make_store(settings: Settings, report: Callable[[StoreUnavailable | None], None]) -> Store:
    if settings.sqlite_path is not None:
        return SQLiteStore(settings.sqlite_path, report)
    try:
        from receiver.dispatch.postgres import PgQueuerJobs  # noqa: PLC0415 - paid for when used
        from receiver.store.postgres import SCHEMA, PostgresStore  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise StoreUnusable(
            f"PostgreSQL needs more than is installed here ({error.name} is missing): "
            "pip install 'prediction-receiver[postgres]'"
        ) from error
    return PostgresStore(settings.database_url, report, PgQueuerJobs(SCHEMA))


def _registry(handlers: Sequence[str | Callable[..., Any] | Handler]) -> Registry:
    registry = load([name for name in handlers if isinstance(name, str)])
    for given in handlers:
        if not isinstance(given, str):
            for handler in [given] if isinstance(given, Handler) else handlers_of(given):
                registry.add(handler)
    return registry


def _with_secrets(settings: Settings) -> Settings:
    """In development, make up a secret key and keep it beside the database file.

    A new one at each start would make strangers of the callbacks that are under way.
    """
    if settings.secret_keys:
        return settings
    if settings.sqlite_path is None:
        raise StoreUnusable(
            "set RECEIVER_SECRET_KEY: processes that share PostgreSQL must share it too, and --dev "
            "makes one up for one process only"
        )
    path = Path(f"{settings.sqlite_path}.dev-secret")
    if not path.exists():
        _write_secret(path)
    text = path.read_text()
    if len(text) < SHORTEST_SECRET:
        raise StoreUnusable(f"{path} holds no secret: remove it, and start again")
    return replace(settings, secret_keys=(Secret(text),))


def _write_secret(path: Path) -> None:
    """Write it whole or not at all; whoever comes second leaves the first one's in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, part = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(fd, "w") as file:
        file.write(secrets.token_hex(32))
    with contextlib.suppress(FileExistsError):
        os.link(part, path)
    Path(part).unlink()


class _Receiver:
    """Holds the parts together for the life of one app."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        tasks: _Tasks,
        clock: Callable[[], float],
        network: _Network,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._does = tasks
        self._clock = clock
        self._owner = new_owner()
        self._telemetry = Telemetry()
        self._telemetry.expect(NAMES, registry.handlers)
        self._store = _make_store(settings, self._telemetry.store)
        self._store.on_commit = self._telemetry.batch
        self._tracing = Tracing(Traces(self._store).of)
        self._alone = settings.sqlite_path is not None
        self._draining: asyncio.Task[Drained] | None = None
        # Whatever compresses all the same is inflated in bounded pieces.
        plain = {"Accept-Encoding": "identity"}
        self._client = Client(
            self._tracing,
            tells=False,
            transport=network.providers,
            limits=_CONNECTIONS,
            headers=plain,
        )
        self._results = guarded_client(
            allow_private=settings.allow_private_fetch, instead=network.results
        )
        self._http = Client(self._tracing, tells=True, transport=network.http, timeout=30.0)
        providers = make_providers(settings.providers)
        self._tokens = tokens = Tokens([key.reveal() for key in settings.secret_keys])
        jwks = settings.providers["fal"].urls["jwks"]
        self._keys = PublicKeys(self._client, jwks, read_jwks, clock=clock)
        self._inbox = Inbox(
            self._store,
            providers,
            tokens,
            registry,
            self._keys,
            telemetry=self._telemetry,
            alone=self._alone,
            clock=clock,
            tracing=self._tracing,
        )
        self._outbound = Outbound(
            self._store,
            self._inbox,
            providers,
            settings,
            tokens,
            self._client,
            telemetry=self._telemetry,
            alone=self._alone,
            clock=clock,
            tracing=self._tracing,
        )
        gates = Gates(self._store)
        self._dispatch = Dispatch(
            self._store,
            registry,
            Tools(
                self._store,
                self._outbound.submit,
                self._http,
                self._results,
                settings.max_chain,
            ),
            gates,
            owner=self._owner,
            policy=Policy(
                attempts=settings.retry_attempts, base=settings.retry_base, cap=settings.retry_cap
            ),
            breaker=Breaker(failures=settings.breaker_failures),
            clock=clock,
            sweeps=self._alone,
            telemetry=self._telemetry,
            tracing=self._tracing,
        )
        self._retention = Retention(
            Disposal(self._store), settings.retention, scrub=self._store.scrub, clock=clock
        )
        self._erasure = Erasure(self._store)
        self._undelivered = NonDeliveries(self._store)
        self._rejections = Rejections(self._undelivered.count, clock)
        self._replays = Replays(self._store)
        self._replayer = Replayer(
            self._replays, registry, self._inbox.match, wake=self._dispatch.wake, clock=clock
        )
        self._listeners = {
            name: self._listener(name, provider)
            for name, provider in providers.items()
            if isinstance(provider, Streamed) and settings.providers[name].key is not None
        }
        journal = Journal(self._store)
        self._feed = Feed(journal)
        self._inbox.on_event = self._on_event
        self._inbox.on_change = self._outbound.changed
        self._store.on_news = self._heard
        self._limits = Limits(settings)
        self._published = PublishedRanges(
            self._client, settings.providers["fal"].urls["meta"], read_meta, clock=clock
        )
        guard = Guard(settings, self._limits)
        self._predictions = Predictions(
            guard,
            self._store,
            self._outbound,
            self._inbox.waiters,
            replay=self._replay,
            wake=self._dispatch.wake,
            explain=self._explain,
            tracing=self._tracing,
            erase=self._erase,
        )
        self._deliveries = Deliveries(
            guard, self._store, wake=self._dispatch.wake, drain=self.drain, clock=clock
        )
        self._handlers = Handlers(
            guard,
            gates,
            self._store,
            registry,
            changed=self._dispatch.gates_changed,
            clock=clock,
        )
        self._events = Events(guard, journal, self._feed)
        self._replay_routes = ReplayRoutes(guard, self._replays, self._replayer)
        self._undelivered_routes = undelivered_routes(guard, self._undelivered)
        routes = self._routes()
        self.app = Starlette(
            routes=routes,
            middleware=[
                Middleware(Proxies, trusted=settings.trusted_proxies),
                Middleware(Requests, self._telemetry, routes),
            ],
            exception_handlers=ERROR_HANDLERS,
            lifespan=self._lifespan,
        )
        self.app.state.release = self.release_waiters
        # A slash too many is a 404: providers take the redirect of a framework for a refusal.
        self.app.router.redirect_slashes = False

    def _routes(self) -> list[Route]:
        hook = Hook(
            self._inbox,
            NAMES,
            self._settings.max_body_bytes,
            self._limits,
            Sources(self._ranges()),
            self._telemetry,
            self._clock,
            self._rejections.count,
        )
        page = MetricsPage(
            self._telemetry,
            Backlog(self._store),
            providers=NAMES,
            handlers=list(self._registry.handlers),
            streams={name: each.somebody_is for name, each in self._listeners.items()},
            clock=self._clock,
        )
        return [
            echo_route(self._tokens, self._settings.max_body_bytes, self._limits, self._clock),
            Route("/webhooks/{provider}/{token}", hook, methods=["POST"]),
            *self._predictions.routes(),
            *self._deliveries.routes(),
            *self._events.routes(),
            *self._handlers.routes(),
            *self._replay_routes.routes(),
            *self._undelivered_routes,
            *health_routes(self._store, self._clock),
            *page.routes(),
            *Docs(OPERATIONS, WEBHOOKS).routes(),
        ]

    def _ranges(self) -> dict[str, Ranges]:
        """Say where callbacks may come from, for the providers that are told."""
        told = {name: given.allowed_sources for name, given in self._settings.providers.items()}
        return {
            name: self._published if allowed == "meta" else listed(allowed)
            for name, allowed in told.items()
            if allowed is not None
        }

    def _listener(self, name: str, provider: Streamed) -> Listener | Duty:
        listener = Listener(
            name,
            provider,
            self._client,
            self._inbox,
            self._store,
            on_connect=self._outbound.look_now,
            clock=self._clock,
        )
        # Where others listen too, one of us suffices.
        duty = None
        if not self._alone:
            duty = Duty(f"stream {name}", self._owner, listener, self._store, self._clock)
        self._outbound.listen_first(name, (duty or listener).ready)
        return duty or listener

    def _replaying(self) -> Replayer | Duty:
        """Give what works on replays: where there are others, one of us does."""
        if self._alone:
            return self._replayer
        return Duty("replays", self._owner, self._replayer, self._store, self._clock)

    def _explain(self, event_type: str, prediction: Prediction) -> list[Explained]:
        return self._registry.explain(
            event_type, prediction.provider, prediction.model, prediction.metadata
        )

    async def _replay(self, prediction_id: str) -> Any:
        return await self._store.replay(prediction_id, self._inbox.match, self._clock())

    def _on_event(self, handlers: Sequence[str]) -> None:
        self._dispatch.wake(handlers)
        self._feed.wake()

    async def _erase(self, prediction_id: str) -> Erased:
        erased = await self._erasure.erase(prediction_id, self._clock())
        if erased == "erased":
            log.info("prediction.erased", prediction=prediction_id)
        return erased

    def _heard(self, handlers: Sequence[str] | None, ended: Sequence[str] | None) -> None:
        """Hear what another process committed; None: something may have been missed."""
        self._dispatch.wake(handlers)
        self._feed.wake()
        if ended is None:
            self._inbox.waiters.tell_all()
        else:
            for prediction_id in ended:
                self._inbox.waiters.tell(prediction_id)

    async def drain(self, seconds: float) -> Drained:
        """Run what is due, for so long at most; who asks meanwhile shares in the same run."""
        if self._draining is None or self._draining.done():
            self._draining = asyncio.create_task(self._drain(seconds))
            seconds += _OVERTIME
        draining = self._draining
        await asyncio.wait({draining}, timeout=seconds)
        if not draining.done() or draining.cancelled():  # another's is longer, or we stop
            return Drained(0, 0, 0, more=True)
        return draining.result()

    async def _drain(self, seconds: float) -> Drained:
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        last_start = until - seconds / 5
        before = self._done()
        while True:
            started = self._done()
            ends = await asyncio.gather(
                self._outbound.drain(until, last_start),
                self._dispatch.drain(until, last_start),
                return_exceptions=True,  # neither goes on alone while we are told of the other
            )
            for error in filter(None, ends):
                raise error
            # What has run may have made more due.
            if self._done() == started or clock() >= last_start:
                break
        attempts, submits, looks = (
            now - then for now, then in zip(self._done(), before, strict=True)
        )
        more = clock() >= last_start
        return Drained(deliveries=attempts, submits=submits, polls=looks, more=more)

    def _done(self) -> tuple[int, int, int]:
        return self._dispatch.attempts, self._outbound.submits, self._outbound.looks

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        try:
            async with self.running():
                yield
        finally:
            getattr(self.app.state, "stopped", lambda: None)()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Be at work until the block is left. Raises StoreUnusable."""
        await self._store.start()
        tasks: list[asyncio.Task[None]] = []
        try:
            self._tracing.start(self._settings.trace_exporters)
            await self._store.recover(self._owner, self._clock())
            await self._dispatch.start(lanes=self._does.deliveries)
            if self._does.outbound:
                tasks += [
                    asyncio.create_task(listener.run()) for listener in self._listeners.values()
                ]
                tasks.append(asyncio.create_task(self._warm_keys()))
                tasks.append(asyncio.create_task(self._feed.run()))
                tasks.append(asyncio.create_task(self._rejections.run()))
                if "meta" in {given.allowed_sources for given in self._settings.providers.values()}:
                    tasks.append(asyncio.create_task(self._published.keep()))
                await self._outbound.start()
            if self._does.sweeps:
                tasks.append(asyncio.create_task(self._store.sweep(self._chores())))
                tasks.append(asyncio.create_task(self._replaying().run()))
            if self._does.sweeps and self._alone:
                tasks.append(asyncio.create_task(self._retention.run()))
            self._announce()
            yield
        finally:
            await self._stop(tasks)
            for client in (self._client, self._results, self._http):
                await client.aclose()
            await self._store.stop()
            await self._tracing.stop()
            log.info("receiver.stopped")

    def _chores(self) -> dict[str, Chore]:
        """Name what this process can do for all."""
        chores: dict[str, Chore] = {
            "deliveries": self._dispatch.reclaim,
            "retention": self._retention.sweep,
        }
        if self._does.outbound:
            chores["submits"] = self._outbound.sweep_submits
            chores["looks"] = self._outbound.sweep_looks
        return chores

    async def _warm_keys(self) -> None:
        """Have fal's keys before its first callback needs them."""
        if self._settings.providers["fal"].key is not None:
            with contextlib.suppress(KeysUnavailable):
                await self._keys(False)

    async def _stop(self, listening: Sequence[asyncio.Task[None]]) -> None:
        log.info("receiver.stopping")
        self.release_waiters()
        if self._draining is not None:
            self._draining.cancel()
            await asyncio.wait({self._draining})
        for task in listening:
            task.cancel()
        await asyncio.gather(*listening, self._outbound.stop(), return_exceptions=True)
        await self._dispatch.stop()
        await self._rejections.stop()

    def release_waiters(self) -> None:
        """Answer those who wait for outcomes or a drain now, as we are about to stop."""
        if self._draining is not None:
            self._draining.cancel()
        self._predictions.stopping = True
        self._feed.close()
        self._inbox.waiters.tell_all()

    def _announce(self) -> None:
        settings = self._settings
        on = [name for name, given in settings.providers.items() if given.key is not None]
        for handler in self._registry.handlers.values():
            log.info("handler.registered", handler=handler.name, place=handler.place)
        if self._does.outbound:
            for problem in _warnings(settings, on, self._registry):
                log.warning("settings.warning", problem=problem)
        log.info(
            "receiver.started",
            owner=self._owner,
            database=settings.database,
            providers=on,
            handlers=list(self._registry.handlers),
            public_url=settings.public_url,
            tracing=self._tracing.on,
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
