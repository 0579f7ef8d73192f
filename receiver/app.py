"""The composition root: joins store, predictions, deliveries and http into one app."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import httpx
import structlog
from starlette.applications import Starlette

from receiver.dashboard.facade import Dashboard
from receiver.deliveries.facade import Deliveries
from receiver.deliveries.importing import register
from receiver.deliveries.registry import Registered, Registry
from receiver.http.facade import Http
from receiver.http.front import Front
from receiver.model.answers import Drained
from receiver.model.errors import StoreUnusable
from receiver.model.roles import ROLES, Role, role_of
from receiver.model.tasks import TaskSet, Wakeups
from receiver.observability import logging as logs
from receiver.observability.clock import Clock, Watch, clocks
from receiver.observability.events import Telemetry
from receiver.observability.runtime import Runtime
from receiver.predictions.facade import Predictions
from receiver.providers import NAMES
from receiver.settings import INLINE, After, Settings, advice, development
from receiver.store.opening import store_maker
from receiver.store.retention import PACE, PACE_ON_A_SERVER, Retention

log = structlog.get_logger("receiver")


def create_app(
    settings: Settings | None = None,
    handlers: Sequence[str | Callable[..., Any] | Registered] | None = None,
    *,
    dispatch: bool | Literal["inline"] = True,
    mode: Literal["server", "serverless"] | None = None,
    clock: Clock = time.time,
    transport: httpx.AsyncBaseTransport | None = None,
    http: httpx.AsyncBaseTransport | None = None,
    results: httpx.AsyncBaseTransport | None = None,
    monotonic: Clock | None = None,
) -> Starlette:
    """Build the receiver as an ASGI app, whose lifespan may be started any number of times.

    `settings` default to the environment; `handlers` are names as in RECEIVER_HANDLERS or decorated
    functions, and default to those of the settings. Without `dispatch` handlers run in other
    processes, or when `/v1/drain` is called; "inline": also within a callback's request, as
    RECEIVER_AFTER specifies, or for two seconds at most. `mode` overrides RECEIVER_MODE.
    `transport` replaces the network to providers, `http` that of `ctx.http`, and `results` that of
    `ctx.fetch` with its guard. A given `clock` is used as it is; with `monotonic`, its steps are
    detected. Raises SettingsError, HandlerError, ValueError for an unknown `dispatch` or `mode`, or
    StoreUnusable if PostgreSQL's extra is not installed; the lifespan raises StoreUnusable and
    StoreUnavailable.
    """
    settings = Settings.read(os.environ) if settings is None else settings
    logs.configure_unless_done(settings.log_format, settings.log_level)
    run = partial(
        _running, clock=clock, monotonic=monotonic, transport=transport, http=http, results=results
    )
    settings = replace(settings, mode=mode or settings.mode)
    if dispatch == "inline" and settings.after.how == "drain":
        settings = replace(settings, after=INLINE)
    return _front(role_of(dispatch, settings.mode), settings, handlers, run).app


async def work(settings: Settings, stop: asyncio.Event) -> None:
    """Run deliveries and housekeeping until `stop` is set; other processes answer requests.

    Raises HandlerError, or StoreUnusable with SQLite, where one process does everything.
    """
    if settings.sqlite_path is not None:
        raise StoreUnusable(
            "a worker needs PostgreSQL: with SQLite one process does everything, and `receiver "
            "serve` is it; see RECEIVER_DATABASE_URL"
        )
    async with _front(ROLES["worker"], settings).running():
        await stop.wait()


async def drain(settings: Settings, seconds: float, stop: asyncio.Event | None = None) -> Drained:
    """Run due work for at most `seconds`, or until `stop` is set, in a process of its own.

    Raises HandlerError or StoreUnusable.
    """
    async with _front(ROLES["drain"], settings).running() as http:
        stopping = asyncio.create_task((stop or asyncio.Event()).wait())
        stopping.add_done_callback(lambda _: http.drain.cancel())
        try:
            return await http.drain(seconds)
        finally:
            stopping.cancel()


async def migrate(settings: Settings) -> None:
    """Bring the database's schema up to date; raise StoreUnusable with the reason if it fails."""
    await store_maker(settings)(lambda _: None, lambda _: None, Wakeups()).migrate()


def _front(
    role: Role,
    settings: Settings,
    handlers: Sequence[str | Callable[..., Any] | Registered] | None = None,
    run: Callable[[Role, Settings, Registry], AbstractAsyncContextManager[Http]] | None = None,
) -> Front:
    registry = register(settings.handlers if handlers is None else handlers)
    settings = development.with_secrets(settings).with_absolute_path()
    store_maker(settings)  # raises now if the extra for PostgreSQL is missing
    return Front(partial(run or _running, role, settings, registry), settings)


@asynccontextmanager
async def _running(
    role: Role,
    settings: Settings,
    registry: Registry,
    *,
    clock: Clock = time.time,
    monotonic: Clock | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
    http: httpx.AsyncBaseTransport | None = None,
    results: httpx.AsyncBaseTransport | None = None,
) -> AsyncIterator[Http]:
    """Make all parts of one run, start them in order, and stop them in reverse."""
    wall, own, steady = clocks(clock, monotonic)
    telemetry = Telemetry()
    telemetry.expect(NAMES, registry.handlers)
    wakeups = Wakeups()
    store = store_maker(settings, steady or time.time)(telemetry.store, telemetry.batch, wakeups)
    alone = settings.sqlite_path is not None
    runtime = Runtime(
        single_process=alone, clock=wall, monotonic=own, telemetry=telemetry, wakeups=wakeups
    )
    predictions = Predictions(settings, store, registry.match, runtime, transport)
    submit = predictions.service.submit
    deliveries = Deliveries(settings, store, registry, submit, runtime, http=http, results=results)
    pace = PACE if runtime.single_process else PACE_ON_A_SERVER
    retention = Retention(store, settings.retention, settings.private_for, clock=wall, pace=pace)
    housekeeping = {"deliveries": deliveries.worker.reclaim, "retention": retention.take_turn}
    # If no process does the housekeeping by itself, a drain does it.
    due = {**housekeeping, "queue": store.trim_queue, "bills": predictions.bills.drain}
    after = After() if role.handlers else settings.after
    of_drains = {} if role.housekeeping else due
    surface = Http(settings, store, predictions, deliveries, runtime, after, of_drains)
    pages = Dashboard(surface.parts)
    surface.routes += pages.routes
    async with AsyncExitStack() as stack:
        for close in (runtime.tracing.stop, predictions.close, deliveries.close):
            stack.push_async_callback(close)
        await store.start()
        stack.callback(lambda: log.info("receiver.stopped"))
        stack.push_async_callback(store.stop)
        runtime.tracing.start(settings.trace_exporters)
        if role.housekeeping or runtime.single_process:
            telemetry.lost(await store.recover(runtime.owner, wall()))
        await stack.enter_async_context(deliveries.running(handlers=role.handlers))
        tasks = TaskSet()
        stack.push_async_callback(tasks.cancel)
        if role.accepts:
            tasks.start(pages.run())
        if steady is not None and role.housekeeping:
            tasks.start(Watch(steady, store, runtime.owner, wakeups).run())
        if role.housekeeping:
            tasks.start(deliveries.replays().run())
            more = predictions.housekeeping() if role.outbound else {}
            tasks.start(store.keep_house({**housekeeping, **more}))
            if runtime.single_process:
                tasks.start(retention.run())
        await stack.enter_async_context(predictions.running(outbound=role.outbound))
        await stack.enter_async_context(
            surface.running(accepts=role.accepts, looks_ahead=role.outbound)
        )
        _announce(role, settings, registry, runtime)
        stack.callback(lambda: log.info("receiver.stopping"))
        yield surface


def _announce(role: Role, settings: Settings, registry: Registry, runtime: Runtime) -> None:
    if role.accepts:
        problems = [*registry.warnings(NAMES), *advice.warnings(settings, registry.handlers)]
        for problem in [*problems, *advice.misspelled(os.environ)]:
            log.warning("settings.warning", problem=problem)
    log.info(
        "receiver.started",
        owner=runtime.owner,
        database=settings.database,
        providers=[name for name, given in settings.providers.items() if given.key is not None],
        handlers=list(registry.handlers),
        public_url=settings.public_url,
        tracing=runtime.tracing.on,
    )
