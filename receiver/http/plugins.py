"""The routes of plugins, `/in/{name}`: a body is limited, then proved, and only then parsed."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from receiver.deliveries.attempt import plain_error
from receiver.deliveries.containment import Charge, charged, contain, contained
from receiver.deliveries.ways_in import Call, PluginRoute, Reply
from receiver.http.body import Disconnected, TooLarge, TooSlow, read_body
from receiver.http.door import Door
from receiver.http.parts import Parts
from receiver.http.problems import problem_answer
from receiver.http.proxies import client_of
from receiver.http.request_log import about
from receiver.http.webhooks import LATER
from receiver.model.errors import Limited, Problem, Unproved
from receiver.model.tasks import TaskSet

log = structlog.get_logger("receiver")

T = TypeVar("T")

PATH: Final = "/in/{name:path}"
_UNKNOWN: Final = "unknown"
"""The name of any unknown route, in counts."""
_CHALLENGE: Final = "Proof"
"""What a 401 must name; each route has its own kind of proof."""
_FRAMING: Final = {"content-length", "transfer-encoding"}
"""Headers of an answer that are ours to set."""
_BODILESS: Final = {204, 304}
_SOON: Final = 5
_REASON: Final = re.compile(r"[a-z0-9_]{1,40}", re.ASCII)
_MOST_REASONS: Final = 100
_GRACE: Final = 1.0
"""Seconds that plugins' tasks have to end when we stop, and again once they are cancelled."""
_CANCELLED: Final = "it cancelled itself"
_MISREAD: Final = (ValueError, LookupError, TypeError, msgspec.MsgspecError, Problem)
"""Errors of a proof that cannot parse a call, as in `call.json()`: the call is not proved."""
_NO_FAULT: Final[tuple[type[Exception], ...]] = (*LATER, TimeoutError)
"""Errors of a proof that are not the sender's fault."""
_ANSWERED_ERRORS: Final[tuple[type[Exception], ...]] = (*_NO_FAULT, Problem, Unproved)
"""Errors of a route that have their own answers."""
_UNPROVED: Final = Problem(401, "unproved", "this call could not be proved")
_OUR_FAULT: Final = Problem(500, "route-failed", "the route failed; the reason is in the log")


class Refused(Exception):
    """A call that is not answered by its plugin."""

    def __init__(
        self, problem: Problem, reason: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(reason)
        self.problem = problem
        self.reason = reason
        self.headers = headers or {}


class PluginRoutes:
    """The routes of plugins as one plain ASGI app, in which nothing precedes the proof."""

    def __init__(self, parts: Parts, on_rejected: Callable[[str, str, str], None]) -> None:
        self._registry = parts.deliveries.registry
        self._parts = parts
        self._limits = parts.limits
        self._runtime = parts.runtime
        self._on_rejected = on_rejected
        self._reasons: set[str] = set()
        self._running = TaskSet(is_awaited=True)
        self._is_cut = False

    def release(self) -> None:
        """Cancel plugins' tasks soon, with an answer that asks their callers to try again.

        The server would cancel them later without an answer.
        """
        asyncio.get_running_loop().call_later(_GRACE, self._cut)

    def _cut(self) -> None:
        self._is_cut = True
        for task in self._running:
            task.cancel()

    async def stop(self) -> None:
        """Cancel plugins' remaining tasks; those that do not end in time are abandoned."""
        for tasks in (self._running, self._parts.later):
            for task in tasks:
                task.cancel()
            await tasks.wait(_GRACE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            reply = await self._take(scope, receive)
        except Disconnected:
            return
        headers = {
            name: value for name, value in reply.headers.items() if name.lower() not in _FRAMING
        }
        body = b"" if reply.status in _BODILESS else reply.body
        await Response(body, reply.status, headers)(scope, receive, send)

    async def _take(self, scope: Scope, receive: Receive) -> Reply:
        """Return the answer to a call; a refused one is charged to its sender."""
        name = _UNKNOWN
        try:
            route = self._find(scope)
            name = f"/in/{route.name}"
            about(scope, plugin=route.name)
            call = await self._read(scope, receive, route)
            door = Door(f"in/{route.name}", self._parts, lambda **facts: about(scope, **facts))
            await self._prove(route, call, door)
        except Refused as refused:
            return self._refuse(scope, name, refused)
        except Disconnected:
            self._reject(scope, name, "disconnected")
            with suppress(Limited):
                self._limits.unauthorized(client_of(scope))
            raise
        except _NO_FAULT as error:
            about(scope, reason=type(error).__name__)
            return _failed(error)
        with self._runtime.tracing.request(Request(scope), f"/in/{route.name}") as span:
            about(scope, **span.ids)
            reply = await self._called(route, call, door)
            span.answered(reply.status)
            return reply

    def _find(self, scope: Scope) -> PluginRoute:
        name, slash, _ = scope["path_params"]["name"].partition("/")
        route = self._registry.routes.get(name)
        if route is None or (slash and not route.rest):
            raise Refused(Problem(404, "not-found", "no such route"), "unknown_route")
        if scope["method"] not in route.methods:
            allow = {"Allow": ", ".join(route.methods)}
            problem = Problem(405, "method-not-allowed", "Method Not Allowed")
            raise Refused(problem, "method", allow)
        return route

    async def _read(self, scope: Scope, receive: Receive, route: PluginRoute) -> Call:
        try:
            body = await read_body(scope, receive, route.longest)
        except TooSlow:
            problem = Problem(408, "too-slow", "the body came too slowly")
            raise Refused(problem, "too_slow") from None
        except TooLarge:
            problem = Problem(413, "too-large", f"more than {route.longest} bytes")
            raise Refused(problem, "too_large", {"Connection": "close"}) from None
        headers: dict[str, str] = {}
        for raw, value in scope["headers"]:
            name, text = raw.decode("latin-1").lower(), value.decode("latin-1")
            headers[name] = f"{headers[name]}, {text}" if name in headers else text
        return Call(
            method=scope["method"],
            query=dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)),
            headers=headers,
            body=body,
            at=self._runtime.clock(),
            client=client_of(scope),
            rest=scope["path_params"]["name"].partition("/")[2],
        )

    async def _prove(self, route: PluginRoute, call: Call, door: Door) -> None:
        """Raise Refused if a call is not proved, or if its proof fails."""
        try:
            found = await self._bounded(route.timeout, _proved(route, call, door))
        except Unproved as error:
            reason = self._word(error.reason)
        except _MISREAD:
            reason = "misread"
        except _NO_FAULT:
            raise
        except Exception as error:
            log.exception("route.failed", plugin=route.name, exc_info=plain_error(error))
            reason = "proof_failed"
        else:
            if found is None:
                return
            # Whether it means yes or no is not defined.
            log.error("route.failed", plugin=route.name, reason="its proof returned something")
            reason = "proof_failed"
        raise Refused(_UNPROVED, reason)

    async def answer(self, name: str, call: Call) -> Reply:
        """Return the answer of the route `name` to a call that was proved elsewhere."""
        route = self._registry.routes.get(name)
        if route is None:
            log.error("route.failed", plugin=name, reason="it has a source, and no route")
            return _problem(_OUR_FAULT)
        return await self._called(route, call, Door(f"in/{name}", self._parts))

    async def _called(self, route: PluginRoute, call: Call, door: Door) -> Reply:
        try:
            reply: Any = await self._answered(route, call, door)
            if isinstance(reply, Reply):  # a new one is checked: its headers may have changed
                return Reply(reply.status, bytes(reply.body), dict(reply.headers))
            log.error("route.failed", plugin=route.name, reason=f"it returned {type(reply)}")
        except Exception as error:
            log.exception("route.failed", plugin=route.name, exc_info=plain_error(error))
        return _problem(_OUR_FAULT)

    async def _answered(self, route: PluginRoute, call: Call, door: Door) -> Any:
        try:
            return await self._bounded(route.timeout, route.function(call, door))
        except _ANSWERED_ERRORS as error:
            return _failed(error)  # may fail itself: a plugin can put anything into a Problem

    async def _bounded(self, seconds: float, work: Coroutine[Any, Any, T]) -> T:
        """Run a plugin's code, contained as a handler's is; raise TimeoutError after `seconds`.

        A cancelled task may run on for some time: the caller does not wait for it.
        """
        contain(asyncio.get_running_loop())
        charge = Charge()
        with charged(charge, on_loop=True) as inside:
            task = self._running.start(work, context=inside)
            try:
                done, _ = await asyncio.wait({task}, timeout=seconds)
            except asyncio.CancelledError:
                task.cancel()
                raise
        if not done:
            task.cancel()
            log.warning("route.slow", seconds=seconds)
            raise TimeoutError
        if task.cancelled():
            raise charge.error or (TimeoutError() if self._is_cut else RuntimeError(_CANCELLED))
        if error := charge.error or task.exception():
            raise contained(error)
        found: T = task.result()
        return found

    def _refuse(self, scope: Scope, name: str, refused: Refused) -> Reply:
        self._reject(scope, name, refused.reason)
        try:  # only after the proof: a proved call is never refused for others' failures
            self._limits.unauthorized(client_of(scope))
        except Limited as error:
            return _failed(error)
        return _problem(refused.problem, refused.headers)

    def _reject(self, scope: Scope, name: str, reason: str) -> None:
        about(scope, verdict="rejected", reason=reason)
        self._runtime.telemetry.refused(name, reason)
        self._on_rejected(name, reason, client_of(scope))

    def _word(self, reason: Any) -> str:
        """Return a proof's reason, if it is one of a few words: each has its own count."""
        if type(reason) is not str:
            return "unproved"
        if reason not in self._reasons:
            if not _REASON.fullmatch(reason) or len(self._reasons) >= _MOST_REASONS:
                return "unproved"
            self._reasons.add(reason)
        return reason


async def _proved(route: PluginRoute, call: Call, door: Door) -> Any:
    """Call a proof, which may be plain or async, and return its result."""
    found = route.proof(call, door) if route.proof_takes_door else route.proof(call)
    return await found if inspect.isawaitable(found) else found


def _failed(error: Exception) -> Reply:
    """Return our answer to an error that a plugin raised."""
    match error:
        case Problem():
            return _problem(error)
        case Unproved():
            return _problem(_UNPROVED)
        case TimeoutError():
            message = "this took too long: repeat the call"
            return _problem(Problem(503, "route-too-slow", message, retry_after=_SOON))
    return _problem(Problem(503, LATER[type(error)], "try again later", retry_after=_SOON))


def _problem(problem: Problem, headers: Mapping[str, str] | None = None) -> Reply:
    body, own = problem_answer(problem, _CHALLENGE)
    return Reply(problem.status, body, {**own, **(headers or {})})
