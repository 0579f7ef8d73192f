"""The composition root: the only file that knows everyone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import httpx
import structlog
from starlette.applications import Starlette
from starlette.routing import Route

from receiver.dispatch.embedded import Dispatch, new_owner
from receiver.dispatch.fetch import guarded_client
from receiver.dispatch.registry import Registry, handlers_of, load
from receiver.dispatch.runner import Tools
from receiver.errors import KeysUnavailable, StoreUnavailable, StoreUnusable
from receiver.inbound import ERROR_HANDLERS, Api, Hook, health_routes
from receiver.inbox import Inbox
from receiver.keys import PublicKeys
from receiver.listener import Listener
from receiver.model import Policy
from receiver.outbound import Outbound
from receiver.providers import NAMES, make_providers
from receiver.providers.base import Streamed
from receiver.providers.fal import read_jwks
from receiver.settings import SHORTEST_SECRET, Secret, Settings
from receiver.store.sqlite import SQLiteStore
from receiver.tokens import Tokens

log = structlog.get_logger("receiver")

_CONNECTIONS: Final = httpx.Limits(max_connections=200, max_keepalive_connections=50)


def create_app(
    settings: Settings | None = None,
    handlers: Sequence[str | Callable[..., Any]] | None = None,
    *,
    clock: Callable[[], float] = time.time,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Starlette:
    """Build the receiver as an ASGI app with a lifespan.

    `settings` default to the environment; `handlers` are names as in RECEIVER_HANDLERS or decorated
    functions, and default to the settings'. `transport` stands in for the network to providers.
    Raises SettingsError or HandlerError; the lifespan raises StoreUnusable.
    """
    settings = settings or Settings.read(os.environ)
    registry = _registry(settings.handlers if handlers is None else handlers)
    settings = _with_secrets(settings)
    return _Receiver(settings, registry, clock, transport).app


def check_database(settings: Settings) -> None:
    """Open and close the database, so that what is wrong with it is said before anything runs.

    Raises StoreUnusable.
    """
    store = SQLiteStore(settings.sqlite_path, _report)
    store.open()
    store.close()


def _registry(handlers: Sequence[str | Callable[..., Any]]) -> Registry:
    registry = load([name for name in handlers if isinstance(name, str)])
    for function in handlers:
        if not isinstance(function, str):
            for handler in handlers_of(function):
                registry.add(handler)
    return registry


def _with_secrets(settings: Settings) -> Settings:
    """In development, make up a secret key and keep it beside the database.

    A new one at each start would make strangers of the callbacks that are under way.
    """
    if settings.secret_keys:
        return settings
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
        clock: Callable[[], float],
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._clock = clock
        self._owner = new_owner()
        self._store = SQLiteStore(settings.sqlite_path, _report)
        # Whatever compresses all the same is inflated in bounded pieces.
        plain = {"Accept-Encoding": "identity"}
        self._client = httpx.AsyncClient(transport=transport, limits=_CONNECTIONS, headers=plain)
        self._results = guarded_client(allow_private=settings.allow_private_fetch)
        self._http = httpx.AsyncClient(timeout=30.0)
        providers = make_providers(settings.providers)
        tokens = Tokens([key.reveal() for key in settings.secret_keys])
        jwks = settings.providers["fal"].urls["jwks"]
        self._keys = PublicKeys(self._client, jwks, read_jwks, clock=clock)
        self._inbox = Inbox(self._store, providers, tokens, registry, self._keys, clock=clock)
        self._outbound = Outbound(
            self._store, self._inbox, providers, settings, tokens, self._client, clock=clock
        )
        self._dispatch = Dispatch(
            self._store,
            registry,
            Tools(self._store, self._outbound.submit, self._http, self._results),
            owner=self._owner,
            policy=Policy(
                attempts=settings.retry_attempts, base=settings.retry_base, cap=settings.retry_cap
            ),
            clock=clock,
        )
        self._listeners = [
            self._listener(name, provider)
            for name, provider in providers.items()
            if isinstance(provider, Streamed) and settings.providers[name].key is not None
        ]
        self._inbox.on_event = self._dispatch.wake
        self._inbox.on_change = self._outbound.changed
        self._api = Api(
            settings,
            self._store,
            self._outbound,
            self._inbox.waiters,
            replay=self._replay,
            wake=self._dispatch.wake,
            clock=clock,
        )
        self.app = Starlette(
            routes=self._routes(), exception_handlers=ERROR_HANDLERS, lifespan=self._lifespan
        )
        self.app.state.release = self.release_waiters
        # A slash too many is a 404: providers take the redirect of a framework for a refusal.
        self.app.router.redirect_slashes = False

    def _routes(self) -> list[Route]:
        hook = Hook(self._inbox, NAMES, self._settings.max_body_bytes, self._clock)
        return [
            Route("/webhooks/{provider}/{token}", hook, methods=["POST"]),
            *self._api.routes(),
            *health_routes(self._store, self._clock),
        ]

    def _listener(self, name: str, provider: Streamed) -> Listener:
        listener = Listener(
            name,
            provider,
            self._client,
            self._inbox,
            self._store,
            on_connect=self._outbound.look_now,
            clock=self._clock,
        )
        self._outbound.listen_first(name, listener.ready)
        return listener

    async def _replay(self, prediction_id: str) -> Any:
        return await self._store.replay(prediction_id, self._inbox.match, self._clock())

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._store.open()
        listening: list[asyncio.Task[None]] = []
        try:
            await self._store.recover(self._owner, self._clock())
            listening = [asyncio.create_task(listener.run()) for listener in self._listeners]
            listening.append(asyncio.create_task(self._warm_keys()))
            await self._dispatch.start()
            await self._outbound.start()
            self._announce()
            yield
        finally:
            await self._stop(listening)
            for client in (self._client, self._results, self._http):
                await client.aclose()
            self._store.close()
            log.info("receiver.stopped")
            getattr(self.app.state, "stopped", lambda: None)()

    async def _warm_keys(self) -> None:
        """Have fal's keys before its first callback needs them."""
        if self._settings.providers["fal"].key is not None:
            with contextlib.suppress(KeysUnavailable):
                await self._keys(False)

    async def _stop(self, listening: Sequence[asyncio.Task[None]]) -> None:
        log.info("receiver.stopping")
        self.release_waiters()
        for task in listening:
            task.cancel()
        await asyncio.gather(*listening, self._outbound.stop(), return_exceptions=True)
        await self._dispatch.stop()

    def release_waiters(self) -> None:
        """Answer those who wait for outcomes now, as we are about to stop."""
        self._api.stopping = True
        self._inbox.waiters.tell_all()

    def _announce(self) -> None:
        settings = self._settings
        on = [name for name, given in settings.providers.items() if given.key is not None]
        for handler in self._registry.handlers.values():
            log.info("handler.registered", handler=handler.name, place=handler.place)
        for problem in _warnings(settings, on, self._registry.handlers):
            log.warning("settings.warning", problem=problem)
        log.info(
            "receiver.started",
            owner=self._owner,
            database=settings.sqlite_path,
            providers=on,
            handlers=list(self._registry.handlers),
            public_url=settings.public_url,
        )


def _warnings(settings: Settings, on: Sequence[str], handlers: Mapping[str, object]) -> list[str]:
    found = []
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
    if not handlers:
        found.append("no handler is registered: outcomes are recorded and nothing else happens")
    return found


def _report(trouble: StoreUnavailable | None) -> None:
    if trouble is None:
        log.info("store.recovered")
    else:
        log.error("store.unavailable", reason=str(trouble))
