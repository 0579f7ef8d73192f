"""The sources of plugins (`@source`): each runs in one process at a time, again after an error."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

import structlog

from receiver.deliveries.attempt import plain_error
from receiver.deliveries.containment import Charge, charged, contain
from receiver.deliveries.ways_in import Call, PluginSource, Reply
from receiver.http.door import Door
from receiver.http.parts import Parts
from receiver.http.plugins import PluginRoutes
from receiver.model.errors import StoreUnavailable
from receiver.model.retry import backoff
from receiver.model.tasks import TaskSet, repeat

log = structlog.get_logger("receiver")

_CAP: Final = 60.0
"""Maximum seconds until a failed source starts again."""
_REST: Final = 1.0
"""Seconds until a source that ended without an error starts again; the minimum after an error."""
_GRACE: Final = 1.0
"""Seconds that a source has to end after it was cancelled."""


class PluginSources:
    """The sources of one run."""

    def __init__(self, routes: PluginRoutes, parts: Parts) -> None:
        self._routes = routes
        self._parts = parts
        self._tasks = TaskSet()

    def start(self) -> None:
        """Start all registered sources; with other processes, each source runs in one of all."""
        runtime = self._parts.runtime
        for source in self._parts.deliveries.registry.sources.values():
            work = SourceTask(source, self._routes, self._parts)
            leader = runtime.leader(work, self._parts.store.leases)
            self._tasks.start((work if runtime.single_process else leader).run())

    async def stop(self) -> None:
        await self._tasks.cancel()


class SourceTask:
    """One source: its generator is run again and again, in one of all processes."""

    def __init__(self, source: PluginSource, routes: PluginRoutes, parts: Parts) -> None:
        self.name = f"source {source.name}"
        self.at_work = True
        """Always true: only the source itself knows whether it can do its work."""
        self._source = source
        self._routes = routes
        self._parts = parts
        self._random = parts.runtime.random
        self._failures = 0

    async def run(self) -> None:
        await repeat(self._step, source=self._source.name)

    async def _step(self) -> float:
        """Run the generator to its end; return the seconds until its next start."""
        try:
            await self._contained()
        except StoreUnavailable:
            raise
        except Exception as error:
            self._failures += 1
            log.exception("source.failed", plugin=self._source.name, exc_info=plain_error(error))
            return max(backoff(self._failures, _REST * 2, _CAP, 0.5 + self._random() / 2), _REST)
        return _REST

    async def _contained(self) -> None:
        contain(asyncio.get_running_loop())
        charge = Charge()
        with charged(charge, on_loop=True) as inside:
            task = asyncio.create_task(self._poll(), context=inside)
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                task.cancel()
                await asyncio.wait({task}, timeout=_GRACE)
                raise
        if charge.error is not None:
            raise charge.error
        if task.cancelled():
            raise RuntimeError("it cancelled itself")
        task.result()

    async def _poll(self) -> None:
        """Answer each call that the generator yields, as the route of the same name does."""
        door = Door(f"in/{self._source.name}", self._parts)
        polling: AsyncIterator[Any] = self._source.function(door)
        reply: Reply | None = None
        async with contextlib.aclosing(polling):  # type: ignore[type-var]
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    found = await polling.asend(reply)  # type: ignore[attr-defined]
                    self._failures = 0
                    reply = None
                    if isinstance(found, Call):
                        reply = await self._routes.answer(self._source.name, found)
