"""The outer ASGI app: its routes open and close with the lifespan.

Each start creates everything anew, routes included. Without a run every request is answered 503 at
once: otherwise the callers of a server that runs no lifespan would wait for ever.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cached_property, partial
from typing import Final, NoReturn, TypeAlias

import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from receiver.deliveries.registry import Registry
from receiver.deliveries.ways_in import METHODS
from receiver.http.access_logs import guard_access_logs, hide_token
from receiver.http.declare import endpoints
from receiver.http.facade import ALWAYS, GROUPS, Http
from receiver.http.plugins import PATH as PLUGIN_PATH
from receiver.http.problems import ERROR_HANDLERS
from receiver.http.webhooks import WEBHOOK_PATH
from receiver.model.answers import Drained
from receiver.model.errors import Problem, SettingsError, StoreUnavailable, StoreUnusable
from receiver.observability.logging import flush
from receiver.settings import Settings

log = structlog.get_logger("receiver")

Wrap: TypeAlias = Callable[[ASGIApp], ASGIApp]

NO_LIFESPAN: Final = (
    "the receiver has not been started: its server ran no lifespan, or does not wait for it "
    "(uvicorn: --lifespan on; mounted: enter app.router.lifespan_context in the outer lifespan)"
)
_STARTING: Final = "the receiver has not been started yet: it is just starting"
_FAILED: Final = (
    "the receiver has not been started: its start failed, and the server's log says why"
)
_STOPPING: Final = "the receiver is stopping"
_STOPPED: Final = "the receiver has not been started again since it stopped"
_SOON: Final = 5
"""Seconds after which a refused caller should try again."""
_CALLBACK: Final = re.compile(r"/webhooks/(?P<provider>(?!echo/)[^/]+)/(?P<token>[^/]+)", re.DOTALL)
DASHBOARD_PATHS: Final = ("/ui", "/ui/{path:path}")
_LAST_PARAMETER: Final = re.compile(r"\{(\w+)\}$")


class Front:
    """An ASGI app with the routes of the current run; some work without one."""

    def __init__(
        self, run: Callable[[], AbstractAsyncContextManager[Http]], settings: Settings
    ) -> None:
        """Make one; `run` starts a run of the receiver, and yields its routes."""
        declared = [(one.method, one.path) for group in GROUPS for one, _ in endpoints(group)]
        self._closed = [
            Route(_LAST_PARAMETER.sub(r"{\1:path}", path), self._refuse, methods=[method])
            for method, path in [*declared, ("POST", WEBHOOK_PATH)]
        ]
        self._closed.append(Route(PLUGIN_PATH, self._refuse, methods=METHODS))
        if settings.shows_dashboard:
            self._closed += [Route(path, self._refuse) for path in DASHBOARD_PATHS]
        self._routes: Sequence[BaseRoute] = self._closed
        self._run = run
        self._http: Http | None = None
        self._why = NO_LIFESPAN
        self._is_running = False
        self._logged = ""
        self.wrap: Wrap | None = None
        """Wraps the routes in their middleware while they are open; None: they are closed."""
        self.app = _App(
            routes=[*ALWAYS, *self._closed],
            middleware=[Middleware(_Entrance, self)],
            exception_handlers=ERROR_HANDLERS,
            lifespan=self._lifespan,
        )
        # A trailing slash is a 404: providers take a redirect for a refusal.
        self.app.router.redirect_slashes = False
        self.app.prefix = settings.prefix
        self.app.state.public_url = settings.public_url
        self.app.state.shows_dashboard = settings.shows_dashboard
        self.app.state.release = self._release
        self.app.state.drain = self._drain
        self.app.state.exchange = self._exchange_handlers
        guard_access_logs()

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        try:
            async with self.running():
                yield
        except (SettingsError, StoreUnusable, StoreUnavailable) as error:
            self.app.unusable = str(error)
            raise
        finally:
            getattr(self.app.state, "stopped", lambda: None)()
            flush()  # some servers now end the process by a signal, which waits for no thread

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Http]:
        """Run the receiver until the block is left, any number of times but once at a time.

        This object keeps no resources: each start creates them, and they are released when it
        ends or fails. So processes that are forked from one with this object share no identity.
        Raises StoreUnusable.
        """
        if self._is_running:
            raise StoreUnusable(
                "this receiver runs already: an app can be started again only after it has "
                "stopped; make another by create_app, with a database of its own"
            )
        self._is_running = True
        self._close(_STARTING)
        after = _FAILED
        try:
            async with self._run() as self._http:
                self._exchange(self._http.routes, self._http.with_middleware)
                self.app.callbacks = ServerErrorMiddleware(
                    self._http.with_middleware(self._http.callbacks), ERROR_HANDLERS[Exception]
                )
                after = _STOPPED
                try:
                    yield self._http
                finally:
                    self._close(_STOPPING)
        finally:
            self._is_running = False
            self._http = None
            self._close(after)

    def _release(self) -> None:
        """Answer callers that wait for an outcome or a drain now, as we are about to stop."""
        if self._http is not None:
            self._http.release()

    async def _drain(self, seconds: float) -> Drained:
        """Run due work for at most `seconds`; raise StoreUnusable if we do not run."""
        if self._http is None:
            raise StoreUnusable(self._why)
        return await self._http.drain(seconds)

    async def _exchange_handlers(self, registry: Registry, settings: Settings) -> None:
        """Replace the handlers and recipes from now on, if we run."""
        if self._http is not None:
            await self._http.exchange(registry, settings)

    def _close(self, why: str) -> None:
        """Answer 503 with this reason from now on; requests under way continue."""
        self._why = why
        self.app.callbacks = None
        self._exchange(self._closed, None)

    def _exchange(self, routes: Sequence[BaseRoute], wrap: Wrap | None) -> None:
        """Replace our routes; routes that an embedding program has added stay."""
        ours = {id(route) for route in self._routes}
        others = [route for route in self.app.router.routes if id(route) not in ours]
        self.app.router.routes[:] = [*routes, *others]
        self._routes, self.wrap = routes, wrap

    async def _refuse(self, request: Request) -> NoReturn:
        hide_token(request.scope)
        if self._logged != self._why:
            self._logged = self._why
            log.error("receiver.unstarted", reason=self._why)
        raise Problem(503, "unavailable", self._why, retry_after=_SOON)


class _App(Starlette):
    """The app, with a short cut for callbacks: to route one costs more than to handle it."""

    callbacks: ASGIApp | None = None
    """Handles callbacks while the receiver runs; None: it does not."""
    prefix: str = ""
    """A path that may precede our paths."""
    unusable: str = ""
    """The reason for a failed start, if it was a setting or the database."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            send = partial(self._send_refusal, send)
        if scope["type"] == "http":
            if self.prefix:
                self._enter(scope)
            if scope["path"].endswith("\n"):  # before which the `$` of a route's pattern matches
                scope["path"], scope["raw_path"] = "", b""  # no route has it, and no log its token
        # Middleware that an embedding program has added must see callbacks too.
        if (
            self.callbacks is not None
            and scope["type"] == "http"
            and scope["method"] == "POST"
            and len(self.user_middleware) == 1
            and (
                found := _CALLBACK.fullmatch(scope["path"].removeprefix(scope.get("root_path", "")))
            )
        ):
            scope["app"] = self
            scope["path_params"] = found.groupdict()
            await self.callbacks(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def _send_refusal(self, send: Send, message: Message) -> None:
        """Send the server the reason for a failed start, in place of Starlette's traceback."""
        if message["type"] == "lifespan.startup.failed" and self.unusable:
            message = {**message, "message": f"receiver: {self.unusable}"}
        await send(message)

    def _enter(self, scope: Scope) -> None:
        """Move the prefix of a path to `root_path`, unless the path is one of ours with it.

        A server in front may have removed the prefix already: then `/v1/…` is a path of ours, even
        if the prefix is `/v1`.
        """
        root = scope.get("root_path", "")
        path = scope["path"].removeprefix(root)
        rest = path.removeprefix(self.prefix)
        if rest == path or rest[:1] not in {"", "/"}:
            return
        if _first(path) not in self._firsts or _first(rest) in self._firsts:
            scope["root_path"] = root + self.prefix
            if not rest:
                scope["path"] += "/"

    @cached_property
    def _firsts(self) -> frozenset[str]:
        """The first segments of our own paths."""
        return frozenset(_first(getattr(route, "path", "")) for route in self.routes)


def _first(path: str) -> str:
    """Return the first segment of a path."""
    return path.split("/", 2)[1] if "/" in path else ""


class _Entrance:
    """ASGI middleware that applies the current run's own middleware, if there is a run."""

    def __init__(self, app: ASGIApp, front: Front) -> None:
        self._app = app
        self._front = front
        self._wrap: Wrap | None = None
        self._inside = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wrap = self._front.wrap
        if wrap is not self._wrap:
            self._wrap, self._inside = wrap, wrap(self._app) if wrap else self._app
        await self._inside(scope, receive, send)
