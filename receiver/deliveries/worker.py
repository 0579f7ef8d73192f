"""The lanes: one for each handler, claiming what it has room for and settling each end.

Their queue is the store's: in the rows themselves on SQLite, beside them on PostgreSQL.

A lane shares nothing with another but the process, so a handler that fails, hangs or is slow fills
its own lane only. Waking is a hint; the rows are the truth, and each lane also looks by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, NoReturn

import msgspec
import structlog

from receiver.deliveries.attempt import Attempt, Tools
from receiver.deliveries.breaker import BreakerCache, BreakerPermit, BreakerPolicy, HandlerBreaker
from receiver.deliveries.containment import is_program
from receiver.deliveries.handlers import Handler
from receiver.deliveries.registry import Registry
from receiver.model.errors import StoreUnavailable
from receiver.model.ids import delivery_id
from receiver.model.retry import DONE, Failure, Policy, decide
from receiver.model.tasks import TaskSet, repeat, start_thread
from receiver.observability.runtime import Runtime
from receiver.observability.tracing import Span
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
_CUT_SHORT: Final = Failure(kind="retry", after=0.0)
"""Counts neither for nor against a handler's breaker."""
_TO_GIVE_BACK: Final = 0.25
"""Seconds beyond its time that a request waits for what runs to be given back."""
_GOOD: Final = frozenset({"done", "skip"})
"""Results of attempts that are no failures."""


class Worker:
    """Runs what is pending for the registered handlers until it is stopped."""

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
        self._lanes = {name: self._lane(name) for name in registry.handlers}
        self._retired: dict[str, _HandlerWorker] = {}
        """Lanes of handlers that are gone; their attempts under way go on."""
        self._runs_lanes = False
        self._tasks = TaskSet()
        self._timeouts = {name: handler.timeout for name, handler in registry.handlers.items()}
        self._heart = _Heartbeat(store, runtime, self._running, self._timeouts, pace)
        self._beaten = 0
        """How many need the heartbeat."""

    def _lane(self, name: str) -> _HandlerWorker:
        handler = self._registry.handlers[name]
        breakers, clock = self._store.breakers, self._runtime.clock
        return _HandlerWorker(
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

    async def start(self, *, lanes: bool = True) -> None:
        """Begin to work; without `lanes` only what `drain` and `run_now` are asked for."""
        self._runs_lanes = lanes
        if not lanes:
            return
        await self._store.breakers.try_again(self._runtime.clock())
        await self._warn_of_what_waits()
        self._heart.start(asyncio.get_running_loop())
        for lane in self._lanes.values():
            self._tasks.start(lane.run())
        if self._runtime.single_process:
            self._tasks.start(self._reclaim())

    async def exchange(self) -> None:
        """Run the handlers that the registry has now, each from its next attempt on.

        Attempts under way go on as they began, and keep their places and their claims.
        """
        handlers = self._registry.handlers
        for name in self._lanes.keys() - handlers.keys():
            self._retired[name] = self._lanes.pop(name)
            self._retired[name].retire()
        for name, handler in handlers.items():
            self._timeouts[name] = handler.timeout
            lane = self._lanes.get(name) or self._retired.pop(name, None)
            if lane is not None:
                policy = handler.retry.policy(self._policy)
                lane.change(handler, policy, self._followers(name))
                self._lanes[name] = lane
                continue
            self._lanes[name] = self._lane(name)
            if self._runs_lanes:
                self._tasks.start(self._lanes[name].run())
        self._runtime.wakeups.wake_all("handler")
        await self._warn_of_what_waits()

    @property
    def attempts(self) -> int:
        """How many attempts have ended here."""
        return sum(lane.attempts for lane in self._lanes.values())

    @property
    def cut_short(self) -> int:
        """How many attempts were given back here, as the time of their drain was over."""
        return sum(lane.cut_short for lane in self._lanes.values())

    async def drain(self, names: Collection[str], until: float, seconds: float) -> None:
        """Run what is due to these handlers, until nothing is, or until then by the loop's clock.

        An attempt that is still running then is given back. So that this is rare none is begun that
        its handler's timeout would not let end, or, where that is longer than the whole drain of so
        many `seconds`, in the last fifth of it.
        """
        lanes = [lane for name, lane in self._lanes.items() if name in names]
        async with self._beating():
            await asyncio.gather(*(lane.exhaust(until, seconds) for lane in lanes))

    async def run_now(self, event: str, names: Collection[str], seconds: float) -> None:
        """Run one event's deliveries to those of these handlers that may run within a request.

        What has not ended after so many seconds is given back.
        """
        until = asyncio.get_running_loop().time() + seconds
        lanes = [self._lanes[name] for name in names if name in self._lanes]
        chosen = [lane for lane in lanes if lane.may_run_within(seconds)]
        # One that ends may let others go that waited for it.
        while any(await asyncio.gather(*(lane.run_now(event, until) for lane in chosen))):
            pass

    @asynccontextmanager
    async def _beating(self) -> AsyncIterator[None]:
        """Renew claims meanwhile, where nothing else does."""
        if self._runs_lanes:
            yield
            return
        self._beaten += 1
        if self._beaten == 1:
            self._heart.start(asyncio.get_running_loop())
        try:
            yield
        finally:
            self._beaten -= 1
            if not self._beaten:
                self._heart.stop()

    async def reclaim(self) -> None:
        """Make pending again what a process that is gone had claimed."""
        lost = await self._store.reclaim(self._runtime.owner, self._runtime.clock())
        self._runtime.telemetry.lost(lost)
        self._runtime.wakeups.wake("handler", *(one.handler for one in lost))
        await self._store.attempts.tell([(one.delivery, one.number) for one in lost])

    async def stop(self, *, asked: bool = True) -> None:
        """Claim no more, let running handlers end for a while, give back the rest.

        A stop that was not asked for may be the work of what runs: that is left to be found lost,
        so that its attempt counts, and it ends dead instead of ending every process.
        """
        await self._tasks.cancel()
        lanes = [*self._lanes.values(), *self._retired.values()]
        await asyncio.gather(*(lane.drain(self._pace.drain) for lane in lanes))
        self._heart.stop()
        if not asked:
            return
        with contextlib.suppress(StoreUnavailable):  # then the next start will find them
            lost = await self._store.release(self._runtime.owner, self._runtime.clock())
            self._runtime.telemetry.lost(lost)

    def _running(self) -> dict[str, list[str]]:
        """Return the ids of the deliveries under way, by handler."""
        lanes = {**self._lanes, **self._retired}  # no name is in both
        return {name: ids for name, lane in lanes.items() if (ids := lane.held())}

    async def _reclaim(self) -> NoReturn:
        await asyncio.sleep(self._pace.lease)
        await repeat(self._reclaim_once, longest=self._pace.lease)

    async def _reclaim_once(self) -> None:
        self._heart.renew()  # in case we were frozen: what still runs here is not lost
        await self.reclaim()

    def look_again(self) -> None:
        """Look at all there is, and at the breakers: one was set by hand, or the clock was."""
        self._known.forget()
        self._runtime.wakeups.wake_all("handler")

    async def _warn_of_what_waits(self) -> None:
        pending = await self._store.deliveries.pending()
        for name, count in pending.items():
            if name not in self._lanes:
                log.warning("handler.missing", handler=name, pending=count)
        for name, breaker in (await self._store.breakers.all()).items():
            state = breaker.state(self._runtime.clock())
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
        breaker: HandlerBreaker,
        runtime: Runtime,
        policy: Policy,
        pace: Timing,
        followers: Sequence[str],
    ) -> None:
        """Make one; `followers` are handlers that wait for this one's deliveries to end."""
        self._handler = handler
        self._store = store
        self._tools = tools
        self._breaker = breaker
        self._runtime = runtime
        self._owner = runtime.owner
        self._clock = runtime.clock
        self._policy = policy
        self._pace = pace
        self._followers = followers
        self._awake = asyncio.Event()
        self._running = TaskSet(self._ended)
        self._taking = asyncio.Lock()
        self._is_retired = False
        self._full = False
        """Whether more may be due than there was room for."""
        self.attempts = 0
        self.cut_short = 0

    def held(self) -> list[str]:
        """Return the ids of the deliveries under way; callable from any thread."""
        return self._running.names()

    def change(self, handler: Handler, policy: Policy, followers: Sequence[str]) -> None:
        """Run another handler of the same name from the next attempt on."""
        self._handler, self._policy, self._followers = handler, policy, followers
        self._breaker.timeout = handler.timeout
        self._is_retired = False

    def retire(self) -> None:
        """Begin no further attempt."""
        self._is_retired = True

    async def run(self) -> NoReturn:
        name = self._handler.name
        with self._runtime.wakeups.listen("handler", name, self._awake):
            await repeat(self._take, self._awake, longest=self._pace.nap, handler=name)

    async def drain(self, seconds: float) -> None:
        """Wait for what runs; what is still running then is cancelled."""
        await self._running.wait(seconds)
        await self._running.cancel()
        with contextlib.suppress(StoreUnavailable):
            await self._breaker.give_back()

    def may_run_within(self, seconds: float) -> bool:
        return self._handler.may_run_within(seconds)

    async def exhaust(self, until: float, seconds: float) -> None:
        """Start what is due, again and again, until nothing is or it is too late to begin."""
        loop = asyncio.get_running_loop()
        timeout = self._handler.timeout
        last_start = until - (timeout if timeout < seconds else seconds / 5)
        while loop.time() < last_start:
            await self._take(until)
            if not self._running:
                return
            left = max(until - loop.time(), 0.0)
            await asyncio.wait(
                list(self._running), timeout=left, return_when=asyncio.FIRST_COMPLETED
            )
        await self._running.wait(max(until - loop.time(), 0.0) + _TO_GIVE_BACK)

    async def run_now(self, event: str, until: float) -> bool:
        """Run the delivery of an event, if it is due; return whether it was."""
        clock = asyncio.get_running_loop().time
        if clock() >= until:
            return False
        delivery = delivery_id(f"pred_{event[4:]}", self._handler.name)
        await self._take(until, (delivery,))
        task = self._running.find(delivery)
        if task is None:
            return False
        await asyncio.wait({task}, timeout=until - clock() + _TO_GIVE_BACK)
        return True

    async def _take(self, until: float | None = None, only: tuple[str, ...] = ()) -> float:
        """Start as many deliveries as there is room for; give the seconds until the next look."""
        async with self._taking:
            return await self._take_alone(until, only)

    async def _take_alone(self, until: float | None, only: tuple[str, ...]) -> float:
        room = self._handler.concurrency - len(self._running)
        self._full = room <= 0 or self._is_retired
        if self._full:
            return self._pace.nap
        passage = await self._breaker.ask(room, self._pace.nap)
        if not passage.most:
            return passage.wait
        found = await self._claim(passage, only)
        for claim in found.claims:
            self._running.start(self._deliver(claim, until), claim.id)
        self._full = len(found.claims) == passage.most
        if self._full:
            # The end of an attempt wakes us, but for one that has ended while we claimed.
            is_free = len(self._running) < self._handler.concurrency and not passage.is_probe
            return 0.0 if is_free else self._pace.nap
        return self._pace.nap if found.next_due is None else found.next_due - self._clock()

    async def _claim(self, passage: BreakerPermit, only: tuple[str, ...]) -> Claims:
        now = self._clock()
        wanted = ClaimRequest(
            handler=self._handler.name,
            owner=self._owner,
            most=passage.most,
            now=now,
            lease_until=now + self._pace.lease,
            only=only,
        )
        try:
            found = await self._store.claim(wanted)
            self._runtime.telemetry.lost(found.lost)
            await self._store.attempts.tell([(one.delivery, one.number) for one in found.lost])
        except Exception:
            if passage.is_probe:
                await self._breaker.give_back()
            raise
        if passage.is_probe and found.claims:
            self._breaker.began(found.claims[0].id)
        elif passage.is_probe:
            await self._breaker.give_back()
        return found

    def _ended(self) -> None:
        if self._full:
            self._awake.set()

    async def _deliver(self, claim: Claim, until: float | None) -> None:
        started, policy = self._clock(), self._policy
        left = None if until is None else max(until - asyncio.get_running_loop().time(), 0.1)
        attempt = Attempt(self._handler, claim, self._tools, left)
        with self._runtime.tracing.attempt(claim) as span:
            try:
                failure = self._spent(claim) or await attempt.run()
            except asyncio.CancelledError:
                self._runtime.telemetry.interrupted(claim)  # it is given back when all have ended
                raise
            if failure and failure.kind == "timeout" and attempt.is_bounded:
                await self._give_back(claim)
            else:
                await self._end(claim, attempt, failure, policy, started, span)
        if failure and failure.kind == "timeout" and not attempt.ended.is_set():
            log.warning("handler.stuck", handler=claim.handler, delivery=claim.id)
            await attempt.ended.wait()  # it still takes up its place in this lane

    async def _end(
        self,
        claim: Claim,
        attempt: Attempt,
        failure: Failure | None,
        policy: Policy,
        started: float,
        span: Span,
    ) -> None:
        """Settle an attempt, and tell of its end."""
        chance = self._runtime.random()
        decision = decide(claim.attempt, failure, policy, chance) if failure else DONE
        result = failure.kind if failure else "done"
        settlement = Settlement(
            id=claim.id,
            owner=self._owner,
            number=claim.number,
            decision=decision,
            result=result,
            note=attempt.note,
            started_at=started,
            ended_at=self._clock(),
        )
        held = await self._settle(settlement)
        span.note(result=result, state=decision.state)
        if result not in _GOOD:
            span.fail(attempt.error or result)
        self.attempts += 1
        # It may be due before the next look; or its end makes others due.
        again = [claim.handler] if decision.state == "pending" else self._followers
        self._runtime.wakeups.wake("handler", *again)
        self._runtime.telemetry.attempt(claim, settlement, held=held, error=attempt.error)
        if held:
            await self._store.attempts.tell([(claim.id, claim.number)])
        await self._breaker.tell(claim.id, failure)  # late: it may have to wait for the disk
        if claim.private is not None and decision.state != "pending":
            await self._empty(claim.event.prediction.id)

    async def _give_back(self, claim: Claim) -> None:
        """Make a delivery pending again whose attempt was cut short: by us, so it does not count.

        If the store is away now its lease runs out, and then the attempt counts as lost.
        """
        self.cut_short += 1
        self._runtime.telemetry.interrupted(claim)
        with contextlib.suppress(StoreUnavailable):
            lost = await self._store.release(self._owner, self._clock(), (claim.id,))
            self._runtime.telemetry.lost(lost)
        await self._breaker.tell(claim.id, _CUT_SHORT)

    async def _empty(self, prediction_id: str) -> None:
        """Empty what only handlers see, if this was the last of them; retention does it too.

        In a transaction of its own: of two that end at once, the later one sees both at their end.
        """
        with contextlib.suppress(StoreUnavailable):
            await self._store.private.empty_after(prediction_id)

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
        runtime: Runtime,
        running: Callable[[], dict[str, list[str]]],
        timeouts: Mapping[str, float],
        pace: Timing,
    ) -> None:
        self._timeouts = timeouts
        self._store = store
        self._runtime = runtime
        self._running = running
        self._pace = pace
        self._stopped = threading.Event()
        self._turned = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._stopped.clear()
        self._thread = start_thread("receiver-heart", self._beat, loop, threading.get_ident())

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def renew(self) -> list[str]:
        """Keep the claims of what runs; name its handlers."""
        running = self._running()
        ids = [delivery_id for held in running.values() for delivery_id in held]
        if ids:
            lease_until = self._runtime.clock() + self._pace.lease
            self._store.renew(self._runtime.owner, ids, lease_until)
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
