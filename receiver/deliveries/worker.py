"""The worker of a process: one worker for each handler, and what they share.

The queue is in the store: in the delivery rows on SQLite, beside them on PostgreSQL. Two handlers
share only the process, so a handler that fails, hangs or is slow delays only its own deliveries.
A wake-up is a hint; the rows decide, and each worker also polls them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Final, NoReturn

import structlog

from receiver.deliveries.breaker import BreakerCache, BreakerPolicy, HandlerBreaker
from receiver.deliveries.context import Tools
from receiver.deliveries.handler_worker import HandlerWorker, report_lost
from receiver.deliveries.heartbeat import TIMING, Heartbeat, Timing
from receiver.deliveries.registry import Registry
from receiver.model.errors import StoreUnavailable
from receiver.model.retry import Policy
from receiver.model.tasks import TaskSet, repeat, wait_for_all
from receiver.observability.runtime import Runtime
from receiver.store.facade import Store

log = structlog.get_logger("receiver")

BREAKER: Final = BreakerPolicy()


class Worker:
    """Runs pending deliveries of the registered handlers until it is stopped."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        tools: Tools,
        runtime: Runtime,
        *,
        policy: Policy,
        breaker: BreakerPolicy = BREAKER,
        pace: Timing = TIMING,
    ) -> None:
        self._store = store
        self._registry = registry
        self._tools = tools
        self._runtime = runtime
        self._policy = policy
        self._breaker = breaker
        self._pace = pace
        self._known = BreakerCache(store.breakers, runtime.monotonic)
        self._workers = {name: self._make(name) for name in registry.handlers}
        self._retired: dict[str, HandlerWorker] = {}
        """Workers of handlers that were removed; their attempts under way continue."""
        self._runs_by_itself = False
        self._tasks = TaskSet()
        self._timeouts = {name: handler.timeout for name, handler in registry.handlers.items()}
        self._heartbeat = Heartbeat(store, runtime, self._running, self._timeouts, pace)
        self._drains_under_way = 0
        """Drains and requests under way that need the heartbeat."""

    def _make(self, name: str) -> HandlerWorker:
        handler = self._registry.handlers[name]
        breakers, clock = self._store.breakers, self._runtime.clock
        return HandlerWorker(
            handler,
            self._store,
            self._tools,
            HandlerBreaker(name, handler.timeout, breakers, self._known, self._breaker, clock),
            self._runtime,
            handler.retry.policy(self._policy),
            self._pace,
            self._followers(name),
        )

    def _followers(self, name: str) -> list[str]:
        handlers = self._registry.handlers.items()
        return [other for other, given in handlers if name in given.after]

    async def start(self, *, by_itself: bool = True) -> None:
        """Start to work; if not `by_itself`, only when `drain` or `run_now` is called."""
        self._runs_by_itself = by_itself
        if not by_itself:
            return
        await self._store.breakers.try_again(self._runtime.clock())
        await self._warn_of_what_waits()
        self._heartbeat.start(asyncio.get_running_loop())
        for worker in self._workers.values():
            self._tasks.start(worker.run())
        if self._runtime.single_process:
            self._tasks.start(self._reclaim())

    async def replace_handlers(self) -> None:
        """Run the handlers that the registry has now, each from its next attempt on.

        Attempts under way continue unchanged, and keep their places and claims.
        """
        handlers = self._registry.handlers
        for name in self._workers.keys() - handlers.keys():
            self._retired[name] = self._workers.pop(name)
            self._retired[name].retire()
        for name, handler in handlers.items():
            self._timeouts[name] = handler.timeout
            worker = self._workers.get(name) or self._retired.pop(name, None)
            if worker is not None:
                policy = handler.retry.policy(self._policy)
                worker.change(handler, policy, self._followers(name))
                self._workers[name] = worker
                continue
            self._workers[name] = self._make(name)
            if self._runs_by_itself:
                self._tasks.start(self._workers[name].run())
        self._runtime.wakeups.wake_all("handler")
        await self._warn_of_what_waits()

    @property
    def attempts(self) -> int:
        """Attempts that have ended in this process."""
        return sum(worker.attempts for worker in self._workers.values())

    @property
    def cut_short(self) -> int:
        """Attempts of this process that were given back because their time was over."""
        return sum(worker.cut_short for worker in self._workers.values())

    async def drain(self, names: Collection[str], until: float, seconds: float) -> None:
        """Run due deliveries of these handlers until there are none, or until `until`.

        That is a time of the loop's clock; an attempt that is still running then is given back. To
        make this rare, no attempt starts later than its handler's timeout before `until`, or, if
        that is as long as the whole drain of `seconds`, none starts in its last fifth.
        """
        workers = [worker for name, worker in self._workers.items() if name in names]
        async with self._beating():
            await wait_for_all(*(worker.drain(until, seconds) for worker in workers))

    async def run_now(self, event: str, names: Collection[str], seconds: float) -> None:
        """Run one event's deliveries to those of these handlers that may run within a request.

        A delivery that has not ended after `seconds` is given back.
        """
        until = asyncio.get_running_loop().time() + seconds
        workers = [self._workers[name] for name in names if name in self._workers]
        chosen = [worker for worker in workers if worker.may_run_within(seconds)]
        # The end of a delivery may make others due that waited for it.
        async with self._beating():
            while any(await wait_for_all(*(worker.run_now(event, until) for worker in chosen))):
                pass

    @asynccontextmanager
    async def _beating(self) -> AsyncIterator[None]:
        """Renew claims until the block ends, unless the worker already does."""
        if self._runs_by_itself:
            yield
            return
        self._drains_under_way += 1
        if self._drains_under_way == 1:
            self._heartbeat.start(asyncio.get_running_loop())
        try:
            yield
        finally:
            self._drains_under_way -= 1
            if not self._drains_under_way:
                self._heartbeat.stop()

    async def reclaim(self) -> None:
        """Make the deliveries pending again that a dead process had claimed."""
        lost = await self._store.reclaim(self._runtime.owner, self._runtime.clock())
        self._runtime.wakeups.wake("handler", *(one.handler for one in lost))
        await report_lost(self._store, self._runtime, lost)

    async def stop(self, *, asked: bool = True) -> None:
        """Claim no more, wait `Timing.drain` for running handlers, and give back the rest.

        If an error stops the process (not `asked`), a running handler may have caused it. Its claim
        is then kept, to be found lost: the attempt counts, and a delivery that ends every process
        becomes dead.
        """
        await self._tasks.cancel()
        workers = [*self._workers.values(), *self._retired.values()]
        await asyncio.gather(*(worker.shut_down(self._pace.drain) for worker in workers))
        self._heartbeat.stop()
        if not asked:
            return
        with contextlib.suppress(StoreUnavailable):  # the next start will find them
            lost = await self._store.release(self._runtime.owner, self._runtime.clock())
            await report_lost(self._store, self._runtime, lost)

    def _running(self) -> dict[str, list[str]]:
        """Return the ids of the deliveries under way, by handler."""
        workers = {**self._workers, **self._retired}  # no name is in both
        return {name: ids for name, worker in workers.items() if (ids := worker.held())}

    async def _reclaim(self) -> NoReturn:
        await asyncio.sleep(self._pace.lease)
        await repeat(self._reclaim_once, longest=self._pace.lease)

    async def _reclaim_once(self) -> None:
        self._heartbeat.renew()  # if the process was frozen: its running deliveries are not lost
        await self.reclaim()

    def refresh(self) -> None:
        """Read deliveries and breakers again: a breaker was set by hand, or the clock stepped."""
        self._known.forget()
        self._runtime.wakeups.wake_all("handler")

    async def _warn_of_what_waits(self) -> None:
        pending = await self._store.deliveries.pending()
        for name, count in pending.items():
            if name not in self._workers:
                log.warning("handler.missing", handler=name, pending=count)
        for name, breaker in (await self._store.breakers.all()).items():
            state = breaker.state(self._runtime.clock())
            if state != "running" and name in self._workers:
                log.warning(
                    "handler.waiting", handler=name, state=state, pending=pending.get(name, 0)
                )
