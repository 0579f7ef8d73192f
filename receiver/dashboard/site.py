"""The pages below `/ui`: routing, sign-in, actions, rendering, security headers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final

import structlog
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from receiver.dashboard.cache import PictureCache
from receiver.dashboard.context import UI, PageContext
from receiver.dashboard.costs import CostPages
from receiver.dashboard.declare import Declared, View, arguments, pages
from receiver.dashboard.deliveries import DeliveryPages
from receiver.dashboard.guard import Guard, Session, SignedOut
from receiver.dashboard.handlers import HandlerPages
from receiver.dashboard.live import LivePage
from receiver.dashboard.overview import OverviewPage
from receiver.dashboard.pictures import PicturePages
from receiver.dashboard.predictions import PredictionPages
from receiver.dashboard.recipes import RecipePages
from receiver.dashboard.rendering import TYPES, Static, render
from receiver.dashboard.replays import ReplayPages
from receiver.dashboard.sign_in import SignInPages
from receiver.http.parts import Parts
from receiver.http.proxies import client_of
from receiver.model.errors import Problem, StoreUnavailable
from receiver.model.ids import new_id
from receiver.store.audit import AuditEntry

log = structlog.get_logger("receiver")

_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_CACHED: Final = {"Cache-Control": "public, max-age=31536000, immutable"}
_LONGEST_TARGET: Final = 300
Answer = Callable[[Request], Awaitable[Response]]


class Site:
    """The ASGI app of all pages."""

    def __init__(self, parts: Parts, cache: PictureCache) -> None:
        self._clock = parts.runtime.clock
        self._audit = parts.store.audit
        self._changes = parts.store.changes
        self._static = Static()
        self._guard = Guard(parts.settings, parts.limits, self._clock)
        groups = [
            SignInPages(self._guard),
            OverviewPage(parts),
            PredictionPages(parts, cache),
            DeliveryPages(parts),
            HandlerPages(parts),
            ReplayPages(parts),
            RecipePages(parts),
            CostPages(parts),
            LivePage(parts, self._guard),
            PicturePages(parts, cache, self._static),
        ]
        routes = [
            Route(
                UI + declared.path.rstrip("/"),
                self._answering(declared, method),
                methods=[declared.method],
            )
            for group in groups
            for declared, method in pages(group)
        ]
        routes.append(Route(UI + "/static/{name}", self._file))
        self._router = Router(routes, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        inside = {**scope, "path": scope["path"].rstrip("/"), "path_params": {}}
        request = Request(inside, receive)
        try:
            # A copy of the scope: the request's log line names the one route of all pages.
            await self._router(inside, receive, guarded)
        except (Problem, StoreUnavailable, HTTPException) as error:
            await self._problem(request, error)(inside, receive, guarded)

    def _answering(self, declared: Declared, method: Callable[..., Awaitable[Any]]) -> Answer:
        async def answer(request: Request) -> Response:
            session = self._guard.session(request)
            try:
                context = self._context(request, session, declared)
            except SignedOut:
                return _sign_in_first(request)
            try:
                given = arguments(method, context)
                if declared.action:
                    context.form = await self._guard.form(request, session)
                    found = await self._act(context, declared, method, given)
                else:
                    if not (declared.is_open or declared.is_part):
                        context.place = await self._changes.end()
                    found = await method(**given)
            except (Problem, StoreUnavailable) as error:
                return self._problem(request, error, context)
            return found if isinstance(found, Response) else self._page(context, found)

        return answer

    def _context(self, request: Request, session: Session, declared: Declared) -> PageContext:
        token = self._guard.token(session)
        key = None
        if not declared.is_open:
            key = self._guard.key(session)
            if not declared.is_part:
                self._guard.charge(request)
        return PageContext(request, self._clock(), key, session, token)

    async def _act(
        self,
        context: PageContext,
        declared: Declared,
        method: Callable[..., Awaitable[Any]],
        given: Mapping[str, Any],
    ) -> Response | View:
        """Run the action of a form, and redirect back unless it returns an answer."""
        if declared.is_open:
            found = await method(**given)
        elif context.may_act:
            target = str(given.get("id", "")) or context.form.get("name", "")
            found = await self._recorded(context, declared.action, target, partial(method, **given))
        else:
            raise Problem(403, "read-only", "this key may look, and nothing else")
        if isinstance(found, Response | View):
            return found
        path = found if isinstance(found, str) else context.form.get("back", "/")
        return RedirectResponse(context.back_to(path, declared.action), 303)

    async def _recorded(
        self, context: PageContext, action: str, target: str, do: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Run an action, recorded in the audit trail before it begins and with its result."""
        now = self._clock()
        entry = AuditEntry(
            id=new_id("act", now),
            at=now,
            who=context.caller or "a key without a name",
            client=client_of(context.request.scope),
            action=action,
            target=target[:_LONGEST_TARGET],
        )
        await self._audit.begin(entry)
        result = "failed"
        try:
            found = await do()
            result = "refused" if isinstance(found, View) else "done"
        except Problem as problem:
            result = problem.type
            raise
        else:
            return found
        finally:
            await self._audit.end(entry.id, result)
            log.info(
                "dashboard.action",
                action=action,
                target=entry.target,
                who=entry.who,
                client=entry.client,
                result=result,
            )

    def _page(self, context: PageContext, view: View) -> Response:
        values = {"context": context, "to": context.to, "static": self._static.tags, **view.values}
        response = HTMLResponse(render(view.template, values), view.status)
        if context.key is None and context.session is not None:
            self._guard.set_cookie(context.request, response, context.session)
        return response

    def _problem(
        self, request: Request, error: Exception, context: PageContext | None = None
    ) -> Response:
        status, detail, after = _describe(error)
        view = View("problem.html", {"status": status, "detail": detail}, status)
        response = self._page(context or PageContext(request, self._clock()), view)
        if after is not None:
            response.headers["Retry-After"] = str(after)
        return response

    async def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._static.files:
            raise HTTPException(404)
        kind = TYPES[name.rpartition(".")[2]]
        return Response(self._static.files[name], headers=_CACHED, media_type=kind)


def _sign_in_first(request: Request) -> Response:
    context = PageContext(request, 0.0)
    where = context.to("/sign-in", next=context.here if request.method == "GET" else "")
    if "hx-request" in request.headers:
        return Response(status_code=401, headers={"HX-Redirect": where})
    if request.headers.get("sec-fetch-dest", "document") != "document":
        return Response(status_code=401)
    return RedirectResponse(where, 303)


def _describe(error: Exception) -> tuple[int, str, int | None]:
    """Return the status, the detail and the Retry-After of an error."""
    match error:
        case Problem():
            return error.status, error.args[0], error.retry_after
        case StoreUnavailable():
            return 503, "the database does not answer, or takes no writes", 5
        case HTTPException():
            return error.status_code, "there is no such page", None
    raise error
