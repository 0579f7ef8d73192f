"""The lanes: one for each handler, claiming what it has room for and settling each end.

Their queue is the store's: in the rows themselves on SQLite, beside them on PostgreSQL.

A lane shares nothing with another but the process, so a handler that fails, hangs or is slow fills
its own lane only. Waking is a hint; the rows are the truth, and each lane also looks by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import msgspec
import structlog

from receiver.deliveries.attempt import Attempt, Tools
from receiver.deliveries.breaker import BreakerCache, BreakerPermit, BreakerPolicy, HandlerBreaker
from receiver.deliveries.containment import is_program
from receiver.deliveries.registry import Handler, Registry
from receiver.model.errors import StoreUnavailable
from receiver.model.retry import DONE, Failure, Policy, decide
from receiver.observability.events import Telemetry
from receiver.observability.tracing import OFF, Tracing
from receiver.store.breakers import Breakers
from receiver.store.deliveries import Claim, ClaimRequest, Claims, Settlement
from receiver.store.facade import Store

log = structlog.get_logger("receiver")


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How long things take here, in seconds."""

    lease: float = 30.0
    """A claim lasts so long without being renewed; as often, the claims of others are looked at."""
    beat: float = 5.0
    """Between renewals; a loop that does not turn for so long is reported."""
    stuck: float = 60.0
    """A loop that has not turned for this and the time-out of what it runs never will again."""
    nap: float = 5.0
    """A lane that nobody wakes looks again."""
    drain: float = 5.0
    """Running handlers get this to end when we stop."""


TIMING: Final = Timing()
_LAST_LINE: Final = 1.0
"""Seconds to say where the loop is stuck, before the process ends."""
_MOST_FRAMES: Final = 20
BREAKER: Final = BreakerPolicy()
_GOOD: Final = frozenset({"done", "skip"})
"""Results of attempts that are no failures."""


def new_owner() -> str:
    """Name this process so that no other, earlier or later, has the same name."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


class Worker:
    """Runs what is pending for the registered handlers until it is stopped."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        tools: Tools,
        gates: Breakers,
        *,
        owner: str,
        policy: Policy,
        breaker: BreakerPolicy = BREAKER,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] | None = None,
        chance: Callable[[], float] = random.random,
        pace: Timing = TIMING,
        sweeps: bool = True,
        tracing: Tracing = OFF,
        telemetry: Telemetry | None = None,
    ) -> None:
        telemetry = telemetry or Telemetry()
        self._store = store
        self._owner = owner
        self._clock = clock
        self._pace = pace
        self._sweeps = sweeps
        self._gates = gates
        self._known = BreakerCache(gates, monotonic or clock)
        self._lanes = {
            name: _HandlerWorker(
                handler,
                store,
                tools,
                HandlerBreaker(name, handler.timeout, gates, self._known, breaker, clock),
                telemetry,
                owner,
                handler.retry.policy(policy),
                clock,
                chance,
                pace,
                tracing,
            )
            for name, handler in registry.handlers.items()
        }
        for name, lane in self._lanes.items():
            for other in registry.handlers[name].after:
                if other in self._lanes:
                    self._lanes[other].followers.append(lane.awake)
        self._tasks: list[asyncio.Task[None]] = []
        timeouts = {name: handler.timeout for name, handler in registry.handlers.items()}
        self._heart = _Heartbeat(store, owner, clock, self._running, timeouts, pace)

    async def start(self, *, lanes: bool = True) -> None:
        """Begin to work; without `lanes` only what `drain` is asked for."""
        await self._gates.try_again(self._clock())
        await self._warn_of_what_waits()
        self._heart.start(asyncio.get_running_loop())
        if lanes:
            self._tasks = [asyncio.create_task(lane.run()) for lane in self._lanes.values()]
        if lanes and self._sweeps:
            self._tasks.append(asyncio.create_task(self._reclaim()))

    @property
    def attempts(self) -> int:
        """How many attempts have ended here."""
        return sum(lane.attempts for lane in self._lanes.values())

    def wake(self, handlers: Iterable[str] | None) -> None:
        """Tell lanes that there may be something for them; None tells all."""
        for name in self._lanes if handlers is None else handlers:
            lane = self._lanes.get(name)
            if lane is not None:
                lane.awake.set()

    async def drain(self, until: float, last_start: float) -> None:
        """Run what is due, until nothing is, or until then by the loop's clock.

        An attempt that this begins gets no more time than that; none is begun after `last_start`.
        """
        await asyncio.gather(*(lane.exhaust(until, last_start) for lane in self._lanes.values()))

    async def reclaim(self) -> None:
        """Make pending again what a process that is gone had claimed."""
        self.wake(await self._store.reclaim(self._owner, self._clock()))

    async def stop(self, *, asked: bool = True) -> None:
        """Claim no more, let running handlers end for a while, give back the rest.

        A stop that was not asked for may be the work of what runs: that is left to be found lost,
        so that its attempt counts, and it ends dead instead of ending every process.
        """
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(lane.drain(self._pace.drain) for lane in self._lanes.values()))
        self._heart.stop()
        if not asked:
            return
        with contextlib.suppress(StoreUnavailable):  # then the next start will find them
            await self._store.release(self._owner, self._clock())

    def _running(self) -> dict[str, list[str]]:
        """Name the deliveries under way, by handler."""
        return {name: ids for name, lane in self._lanes.items() if (ids := lane.held())}

    async def _reclaim(self) -> None:
        while True:
            await asyncio.sleep(self._pace.lease)
            self._heart.renew()  # in case we were frozen: what still runs here is not lost
            try:
                await self.reclaim()
            except StoreUnavailable:
                continue  # the store says so itself; the leases will still be over next time
            except Exception:
                log.exception("task.failed")

    def gates_changed(self) -> None:
        """Hear that gates were set by hand."""
        self._known.forget()
        self.wake(None)

    async def _warn_of_what_waits(self) -> None:
        pending = await self._store.deliveries.pending()
        for name, count in pending.items():
            if name not in self._lanes:
                log.warning("handler.missing", handler=name, pending=count)
        for name, gate in (await self._gates.all()).items():
            state = gate.state(self._clock())
            if state != "running" and name in self._lanes:
                log.warning(
                    "handler.waiting", handler=name, state=state, pending=pending.get(name, 0)
                )


class _HandlerWorker:
    """Everything that happens for one handler."""

    def __init__(
        self,
        handler: Handler,
        store: Store,
        tools: Tools,
        gate: HandlerBreaker,
        telemetry: Telemetry,
        owner: str,
        policy: Policy,
        clock: Callable[[], float],
        chance: Callable[[], float],
        pace: Timing,
        tracing: Tracing,
    ) -> None:
        self._tracing = tracing
        self._handler = handler
        self._store = store
        self._tools = tools
        self._gate = gate
        self._telemetry = telemetry
        self._owner = owner
        self._policy = policy
        self._clock = clock
        self._chance = chance
        self._pace = pace
        self._running: dict[asyncio.Task[None], str] = {}
        self._taking = asyncio.Lock()
        self._full = False
        """Whether more may be due than there was room for."""
        self.attempts = 0
        self.awake = asyncio.Event()
        self.followers: list[asyncio.Event] = []
        """Of lanes whose handler waits for this one's deliveries to end."""

    def held(self) -> list[str]:
        """Name the deliveries under way; callable from any thread."""
        return list(self._running.values())

    async def run(self) -> None:
        while True:
            self.awake.clear()
            try:
                nap = await self._take()
            except StoreUnavailable:
                nap = 1.0
            except Exception:
                # Whatever it is, the lane must go on: nobody else would run this handler.
                log.exception("task.failed", handler=self._handler.name)
                nap = self._pace.nap
            await self._nap(nap)

    async def drain(self, seconds: float) -> None:
        """Wait for what runs; what is still running then is cancelled."""
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)
        left = list(self._running)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        with contextlib.suppress(StoreUnavailable):
            await self._gate.give_back()

    async def exhaust(self, until: float, last_start: float) -> None:
        """Start what is due, again and again, until nothing is or it is too late to begin."""
        loop = asyncio.get_running_loop()
        while loop.time() < last_start:
            await self._take(until)
            if not self._running:
                return
            left = max(until - loop.time(), 0.0)
            await asyncio.wait(self._running, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if self._running:
            await asyncio.wait(self._running, timeout=max(until - loop.time(), 0.0))

    async def _take(self, until: float | None = None) -> float:
        """Start as many deliveries as there is room for; give the seconds until the next look."""
        async with self._taking:
            return await self._take_alone(until)

    async def _take_alone(self, until: float | None) -> float:
        room = self._handler.concurrency - len(self._running)
        self._full = room <= 0
        if self._full:
            return self._pace.nap
        passage = await self._gate.ask(room, self._pace.nap)
        if not passage.most:
            return passage.wait
        found = await self._claim(passage)
        for claim in found.claims:
            task = asyncio.create_task(self._deliver(claim, until))
            self._running[task] = claim.id
            task.add_done_callback(self._ended)
        self._full = len(found.claims) == passage.most
        if self._full:
            # The end of an attempt wakes us, but for one that has ended while we claimed.
            is_free = len(self._running) < self._handler.concurrency and not passage.is_probe
            return 0.0 if is_free else self._pace.nap
        return self._pace.nap if found.next_due is None else found.next_due - self._clock()

    async def _claim(self, passage: BreakerPermit) -> Claims:
        now = self._clock()
        wanted = ClaimRequest(
            handler=self._handler.name,
            owner=self._owner,
            most=passage.most,
            now=now,
            lease_until=now + self._pace.lease,
        )
        try:
            found = await self._store.claim(wanted)
        except Exception:
            if passage.is_probe:
                await self._gate.give_back()
            raise
        if passage.is_probe and found.claims:
            self._gate.began(found.claims[0].id)
        elif passage.is_probe:
            await self._gate.give_back()
        return found

    async def _nap(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(min(max(seconds, 0.0), self._pace.nap)):
                await self.awake.wait()
        except TimeoutError:
            return

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        if self._full:
            self.awake.set()
        if not task.cancelled() and (error := task.exception()):
            log.error("task.failed", handler=self._handler.name, exc_info=error)

    async def _deliver(self, claim: Claim, until: float | None) -> None:
        started = self._clock()
        left = None if until is None else max(until - asyncio.get_running_loop().time(), 0.1)
        attempt = Attempt(self._handler, claim, self._tools, left)
        with self._tracing.attempt(claim) as span:
            try:
                failure = self._spent(claim) or await attempt.run()
            except asyncio.CancelledError:
                self._telemetry.interrupted(claim)  # it is given back when all have ended
                raise
            ended = self._clock()
            decision = (
                decide(claim.attempt, failure, self._policy, self._chance()) if failure else DONE
            )
            result = failure.kind if failure else "done"
            settlement = Settlement(
                id=claim.id,
                owner=self._owner,
                number=claim.number,
                decision=decision,
                result=result,
                note=attempt.note,
                started_at=started,
                ended_at=ended,
            )
            held = await self._settle(settlement)
            span.note(result=result, state=decision.state)
            if result not in _GOOD:
                span.fail(attempt.error or result)
            self.attempts += 1
            # It may be due before the next look; or its end makes others due.
            for awake in (self.awake,) if decision.state == "pending" else self.followers:
                awake.set()
            self._telemetry.attempt(claim, settlement, held=held, error=attempt.error)
            await self._gate.tell(claim.id, failure)  # last: it may have to wait for the disk
        if result == "timeout" and not attempt.ended.is_set():
            log.warning("handler.stuck", handler=claim.handler, delivery=claim.id)
            await attempt.ended.wait()  # it still takes up its place in this lane

    def _spent(self, claim: Claim) -> Failure | None:
        """Refuse a claim beyond the policy: the process died over this delivery again and again."""
        lost = Failure(kind="lost", reason="its process died during every attempt")
        over = decide(claim.attempt - 1, lost, self._policy, 0.0).state == "dead"
        return lost if over else None

    async def _settle(self, settlement: Settlement) -> bool:
        """Insist: the handler has run, so it must be settled whatever the disk says now."""
        while True:
            try:
                return await self._store.settle(settlement)
            except StoreUnavailable:
                await asyncio.sleep(0.5)


class _Heartbeat:
    """A thread that renews our claims, also while a handler blocks the loop, and reports that.

    A loop that is stuck ends a program of ours, which is all that can be done: the attempt is lost
    and counts, and the supervisor starts us again. Another's program is only told of it.
    """

    def __init__(
        self,
        store: Store,
        owner: str,
        clock: Callable[[], float],
        running: Callable[[], dict[str, list[str]]],
        timeouts: Mapping[str, float],
        pace: Timing,
    ) -> None:
        self._timeouts = timeouts
        self._store = store
        self._owner = owner
        self._clock = clock
        self._running = running
        self._pace = pace
        self._stopped = threading.Event()
        self._turned = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._thread = threading.Thread(
            target=self._beat,
            args=(loop, threading.get_ident()),
            name="receiver-heart",
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def renew(self) -> list[str]:
        """Keep the claims of what runs; name its handlers."""
        running = self._running()
        ids = [delivery_id for held in running.values() for delivery_id in held]
        if ids:
            self._store.renew(self._owner, ids, self._clock() + self._pace.lease)
        return list(running)

    def _beat(self, loop: asyncio.AbstractEventLoop, thread: int) -> None:
        silent = 0.0  # counted in beats: a process that was frozen for hours has missed one
        while True:
            running = self.renew()
            self._turned.clear()
            try:
                loop.call_soon_threadsafe(self._turned.set)
            except RuntimeError:
                return
            if self._stopped.wait(self._pace.beat):
                return
            if self._turned.is_set():
                silent = 0.0
                continue
            silent += self._pace.beat
            log.warning("loop.blocked", seconds=self._pace.beat, running=running)
            longest = max((self._timeouts[name] for name in running), default=0.0)
            if silent - self._pace.beat < self._pace.stuck + longest <= silent:
                self._give_up(loop, thread, silent, running)

    def _give_up(
        self, loop: asyncio.AbstractEventLoop, thread: int, seconds: float, running: list[str]
    ) -> None:
        if is_program(loop):
            end = threading.Timer(_LAST_LINE, os._exit, (1,))  # even if nobody reads the log
            end.daemon = True
            end.start()
        frame = sys._current_frames().get(thread)  # noqa: SLF001 - the documented name
        stack = traceback.format_stack(frame)[-_MOST_FRAMES:] if frame else []
        log.error("loop.stuck", seconds=round(seconds, 3), running=running, stack="".join(stack))
