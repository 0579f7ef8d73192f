"""The routes `/v1/handlers`: handlers with their state and pending deliveries; pause, resume."""

from __future__ import annotations

from typing import Final

import structlog

from receiver.http.declare import HandlerName, get, post
from receiver.http.parts import Parts
from receiver.model.answers import HandlerState, Page
from receiver.model.errors import Problem
from receiver.model.values import utc
from receiver.store.breakers import BreakerState

log = structlog.get_logger("receiver")

_MISSING: Final = "no such handler; `receiver handlers` names them"


class HandlerRoutes:
    """The routes about handlers."""

    def __init__(self, parts: Parts, *, counts_few: bool = False) -> None:
        self._counts_few = counts_few
        self._breakers = parts.store.breakers
        self._store = parts.store.deliveries
        self._registry = parts.deliveries.registry
        self._worker = parts.deliveries.worker
        self._clock = parts.runtime.clock

    @get("/v1/handlers", "all handlers there are")
    async def list_handlers(self) -> Page[HandlerState]:
        """List handlers, with their state and the number of pending deliveries.

        Those of this process, and others that have pending deliveries or are held back.
        """
        return Page(data=list((await self._states()).values()), next_cursor=None)

    @post(
        "/v1/handlers/{name:path}/pause", "it is paused", problems=["not-found"], missing=_MISSING
    )
    async def pause(self, name: HandlerName) -> HandlerState:
        """Pause a handler: no delivery of it begins, and all stay pending.

        It applies to every process, also after restarts. Running deliveries may end.
        """
        state = await self._known(name)
        await self._breakers.pause(state.name, self._clock())
        log.warning("handler.paused", handler=state.name, pending=state.pending)
        return await self._now(state)

    @post(
        "/v1/handlers/{name:path}/resume", "it is running", problems=["not-found"], missing=_MISSING
    )
    async def resume(self, name: HandlerName) -> HandlerState:
        """Resume a handler, whether it was paused or failed.

        This also closes a circuit breaker that a series of failures has opened.
        """
        state = await self._known(name)
        await self._breakers.resume(state.name)
        log.info("handler.resumed", handler=state.name, pending=state.pending)
        return await self._now(state)

    async def _known(self, name: str) -> HandlerState:
        state = (await self._states()).get(name)
        if state is None:
            raise Problem(404, "not-found", _MISSING)
        return state

    async def _now(self, before: HandlerState) -> HandlerState:
        self._worker.refresh()
        # A handler that is not registered here disappears once nothing is pending for it.
        return (await self._states()).get(before.name, before)

    async def _states(self) -> dict[str, HandlerState]:
        breakers = await self._breakers.all()
        pending = await self._store.pending(few=self._counts_few)
        now = self._clock()
        states = {}
        for name in dict.fromkeys([*self._registry.handlers, *sorted({*pending, *breakers})]):
            breaker = breakers.get(name, BreakerState(name))
            states[name] = HandlerState(
                name=name,
                state=breaker.state(now),
                registered=name in self._registry.handlers,
                pending=pending.get(name, 0),
                paused_at=utc(breaker.paused_at),
                open_until=utc(breaker.open_until),
                reason=breaker.reason,
            )
        return states
