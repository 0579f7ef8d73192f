"""`/v1/handlers`: who handles events, what each is owed, and who waits; pause and resume."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Final, Literal, Protocol

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.deliveries.registry import Registry
from receiver.http.auth import Guard
from receiver.http.body import Nothing, named, parameters
from receiver.http.declare import Answer, Content, Endpoint, HandlerName
from receiver.http.problems import as_json
from receiver.model.errors import Problem
from receiver.model.values import utc
from receiver.store.handlers import BreakerState
from receiver.store.values import Page

log = structlog.get_logger("receiver")


class Gates(Protocol):
    """What these routes need of the gates."""

    async def all(self) -> dict[str, BreakerState]: ...
    async def pause(self, name: str, now: float) -> None: ...
    async def resume(self, name: str) -> None: ...


class Owes(Protocol):
    """What these routes need of the store."""

    async def owed(self) -> dict[str, int]: ...


class HandlerState(msgspec.Struct, frozen=True, kw_only=True):
    """A handler as operators see it."""

    name: str
    state: Literal["running", "paused", "open", "probing"]
    """`open`: its deliveries wait after a run of failures; `probing`: the next one is a probe."""
    registered: bool
    """False: something is owed to it, or it is paused, and it is no handler here any more."""
    owed: int
    """Deliveries that are pending."""
    paused_at: datetime | None
    open_until: datetime | None
    reason: str
    """Of the last failure, where it is `open` or `probing`."""


class Handlers:
    """The routes about handlers."""

    def __init__(
        self,
        guard: Guard,
        gates: Gates,
        store: Owes,
        registry: Registry,
        *,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._guard = guard
        self._gates = gates
        self._store = store
        self._registry = registry
        self._changed = changed
        self._clock = clock

    def routes(self) -> list[Route]:
        route = self._guard.route
        return [
            route("/v1/handlers", GET=self.list_handlers),
            route("/v1/handlers/{name:path}/pause", POST=self.pause),
            route("/v1/handlers/{name:path}/resume", POST=self.resume),
        ]

    async def list_handlers(self, request: Request) -> Response:
        parameters(request, Nothing)
        return as_json(Page(data=list((await self._states()).values()), next_cursor=None))

    async def pause(self, request: Request) -> Response:
        """Let no delivery of a handler begin; what is owed to it waits, and what runs may end."""
        state = await self._known(request)
        await self._gates.pause(state.name, self._clock())
        log.warning("handler.paused", handler=state.name, owed=state.owed)
        return await self._now(state)

    async def resume(self, request: Request) -> Response:
        """Let a handler's deliveries run again, whether paused by hand or after failures."""
        state = await self._known(request)
        await self._gates.resume(state.name)
        log.info("handler.resumed", handler=state.name, owed=state.owed)
        return await self._now(state)

    async def _known(self, request: Request) -> HandlerState:
        missing = Problem(404, "not-found", "no such handler; `receiver handlers` names them")
        state = (await self._states()).get(named(request, "name", HandlerName, missing))
        if state is None:
            raise missing
        return state

    async def _now(self, before: HandlerState) -> Response:
        self._changed()
        # One that is no handler here is forgotten once nothing is owed to it.
        return as_json((await self._states()).get(before.name, before))

    async def _states(self) -> dict[str, HandlerState]:
        gates = await self._gates.all()
        owed = await self._store.owed()
        now = self._clock()
        states = {}
        for name in dict.fromkeys([*self._registry.handlers, *sorted({*owed, *gates})]):
            gate = gates.get(name, BreakerState(name))
            states[name] = HandlerState(
                name=name,
                state=gate.state(now),
                registered=name in self._registry.handlers,
                owed=owed.get(name, 0),
                paused_at=_time(gate.paused_at),
                open_until=_time(gate.open_until),
                reason=gate.reason,
            )
        return states


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else utc(seconds)


_EXAMPLE: Final = HandlerState(
    name="save",
    state="paused",
    registered=True,
    owed=12,
    paused_at=utc(1769860800),
    open_until=None,
    reason="",
)
OPERATIONS: Final = (
    Endpoint(
        "GET",
        "/v1/handlers",
        "List handlers: what each is owed, and whether it waits",
        (
            Answer(
                200,
                "all handlers there are",
                Content(Page[HandlerState], Page(data=[_EXAMPLE], next_cursor=None)),
            ),
        ),
        ("invalid-request",),
        query=Nothing,
    ),
    Endpoint(
        "POST",
        "/v1/handlers/{name}/pause",
        "Let no delivery of a handler begin; what is owed to it waits",
        (Answer(200, "it is paused", Content(HandlerState, _EXAMPLE)),),
        ("not-found",),
        names={"name": HandlerName},
    ),
    Endpoint(
        "POST",
        "/v1/handlers/{name}/resume",
        "Let a handler's deliveries run again, whether it was paused or failed",
        (Answer(200, "it is running", Content(HandlerState)),),
        ("not-found",),
        names={"name": HandlerName},
    ),
)
