"""The worker of one handler: claims as many deliveries as it has room for, runs, settles them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final, NoReturn, TypeVar

import structlog

from receiver.deliveries.attempt import Attempt
from receiver.deliveries.breaker import BreakerPermit, HandlerBreaker
from receiver.deliveries.context import Tools
from receiver.deliveries.handlers import Handler
from receiver.deliveries.heartbeat import Timing
from receiver.model.errors import StoreUnavailable
from receiver.model.ids import delivery_id, prediction_id_of
from receiver.model.retry import DONE, Failure, Policy, decide
from receiver.model.tasks import TaskSet, repeat
from receiver.observability.runtime import Runtime
from receiver.observability.tracing import Span
from receiver.store.deliveries import Claim, ClaimRequest, Claims, LostAttempt, Settlement
from receiver.store.facade import Store

log = structlog.get_logger("receiver")

T = TypeVar("T")

_CUT_SHORT: Final = Failure(kind="retry", after=0.0)
"""Counts neither for nor against a handler's breaker."""
_TO_GIVE_BACK: Final = 0.25
"""Seconds beyond its time that a request waits until unfinished deliveries are given back."""
_GOOD: Final = frozenset({"done", "skip"})
"""Results of attempts that are not failures."""


async def report_lost(store: Store, runtime: Runtime, lost: Sequence[LostAttempt]) -> None:
    """Report attempts that their own process did not end, and publish their ends."""
    runtime.telemetry.lost(lost)
    await store.attempts.publish([(one.delivery, one.number) for one in lost])


class HandlerWorker:
    """Claims, runs and settles the deliveries of one handler."""

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
        """Create a worker; `followers` are handlers that wait for this one's deliveries to end."""
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
        self._running = TaskSet(self._wake_if_full)
        self._taking = asyncio.Lock()
        self._is_retired = False
        self._settling = 0
        """Attempts that have ended and wait to be settled; up to `concurrency` take no place."""
        self._full = False
        """Whether more deliveries may be due than there was room for."""
        self.attempts = 0
        self.cut_short = 0

    def held(self) -> list[str]:
        """Return the ids of the deliveries under way; callable from any thread."""
        return self._running.names()

    def change(self, handler: Handler, policy: Policy, followers: Sequence[str]) -> None:
        """Run a new handler of the same name from the next attempt on."""
        self._handler, self._policy, self._followers = handler, policy, followers
        self._breaker.timeout = handler.timeout
        self._is_retired = False

    def retire(self) -> None:
        """Start no further attempt."""
        self._is_retired = True

    async def run(self) -> NoReturn:
        name = self._handler.name
        with self._runtime.wakeups.listen("handler", name, self._awake):
            await repeat(self._take, self._awake, longest=self._pace.nap, handler=name)

    async def shut_down(self, seconds: float) -> None:
        """Wait for running deliveries up to `seconds`, then cancel the rest."""
        await self._running.wait(seconds)
        await self._running.cancel()
        with contextlib.suppress(StoreUnavailable):
            await self._breaker.give_back()

    def may_run_within(self, seconds: float) -> bool:
        return self._handler.may_run_within(seconds)

    async def drain(self, until: float, seconds: float) -> None:
        """Start due deliveries until there are none, or too little time is left for an attempt."""
        loop = asyncio.get_running_loop()
        timeout = self._handler.timeout
        last_start = until - (timeout if timeout < seconds else seconds / 5)
        try:
            while loop.time() < last_start:
                await self._take(until)
                if not self._running:
                    return
                left = max(until - loop.time(), 0.0)
                await asyncio.wait(
                    list(self._running), timeout=left, return_when=asyncio.FIRST_COMPLETED
                )
        except Exception:
            await self._wait(until)  # claims are renewed only as long as the drain lasts
            raise
        await self._wait(until)

    async def _wait(self, until: float) -> None:
        """Wait for running deliveries up to `until`, and until unfinished ones are given back."""
        left = max(until - asyncio.get_running_loop().time(), 0.0)
        await self._running.wait(left + _TO_GIVE_BACK)

    async def run_now(self, event: str, until: float) -> bool:
        """Run the delivery of an event if it is due; return whether it was started."""
        clock = asyncio.get_running_loop().time
        if clock() >= until:
            return False
        delivery = delivery_id(prediction_id_of(event), self._handler.name)
        await self._take(until, (delivery,))
        task = self._running.find(delivery)
        if task is None:
            return False
        await asyncio.wait({task}, timeout=until - clock() + _TO_GIVE_BACK)
        return True

    async def _take(self, until: float | None = None, only: tuple[str, ...] = ()) -> float:
        """Start as many deliveries as there is room for; return the seconds until the next poll."""
        async with self._taking:
            return await self._take_alone(until, only)

    async def _take_alone(self, until: float | None, only: tuple[str, ...]) -> float:
        room = self._room()
        self._full = room <= 0 or self._is_retired
        if self._full:
            return self._pace.nap
        permit = await self._breaker.ask(room, self._pace.nap)
        if not permit.most:
            return permit.wait
        found = await self._claim(permit, only)
        for claim in found.claims:
            self._running.start(self._deliver(claim, until), claim.id)
        self._full = len(found.claims) == permit.most
        if self._full:
            # The end of an attempt wakes this worker, except one that ended during the claim.
            is_free = self._room() > 0 and not permit.is_probe
            return 0.0 if is_free else self._pace.nap
        return self._pace.nap if found.next_due is None else found.next_due - self._clock()

    async def _claim(self, permit: BreakerPermit, only: tuple[str, ...]) -> Claims:
        now = self._clock()
        wanted = ClaimRequest(
            handler=self._handler.name,
            owner=self._owner,
            most=permit.most,
            now=now,
            lease_until=now + self._pace.lease,
            only=only,
        )
        try:
            found = await self._store.claim(wanted)
            await report_lost(self._store, self._runtime, found.lost)
        except Exception:
            if permit.is_probe:
                await self._breaker.give_back()
            raise
        if permit.is_probe and found.claims:
            self._breaker.began(found.claims[0].id)
        elif permit.is_probe:
            await self._breaker.give_back()
        return found

    def _room(self) -> int:
        """Return the number of free places; up to `concurrency` unsettled attempts take none."""
        most = self._handler.concurrency
        return most - len(self._running) + min(self._settling, most)

    def _wake_if_full(self) -> None:
        if self._full:
            self._awake.set()

    @contextlib.contextmanager
    def _place_given_up(self) -> Iterator[None]:
        self._settling += 1
        self._wake_if_full()
        try:
            yield
        finally:
            self._settling -= 1

    async def _deliver(self, claim: Claim, until: float | None) -> None:
        started, policy = self._clock(), self._policy
        left = None if until is None else max(until - asyncio.get_running_loop().time(), 0.1)
        attempt = Attempt(self._handler, claim, self._tools, left)
        with self._runtime.tracing.attempt(claim) as span:
            try:
                failure = self._spent(claim) or await attempt.run()
            except asyncio.CancelledError:
                self._runtime.telemetry.interrupted(claim)  # `Worker.stop` gives it back
                raise
            if failure and failure.kind == "timeout" and attempt.is_bounded:
                await self._give_back(claim)
            elif failure is None and self._breaker.is_calm():
                with self._place_given_up():
                    await self._end(claim, attempt, failure, policy, started, span)
            else:
                await self._end(claim, attempt, failure, policy, started, span)
                await self._breaker.record(claim.id, failure)  # last: it may wait for the disk
        if failure and failure.kind == "timeout" and not attempt.ended.is_set():
            log.warning("handler.stuck", handler=claim.handler, delivery=claim.id)
            await attempt.ended.wait()  # it still takes a place

    async def _end(
        self,
        claim: Claim,
        attempt: Attempt,
        failure: Failure | None,
        policy: Policy,
        started: float,
        span: Span,
    ) -> None:
        """Settle an attempt, and report its end: to workers, logs, traces and `attempts`."""
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
        held = await self._retry_until_stored(lambda: self._store.settle(settlement))
        span.note(result=result, state=decision.state)
        if result not in _GOOD:
            span.fail(attempt.error or result)
        self.attempts += 1
        # A retry may be due before the next poll, and an end makes followers due.
        again = [claim.handler] if decision.state == "pending" else self._followers
        self._runtime.wakeups.wake("handler", *again)
        self._runtime.telemetry.attempt(claim, settlement, held=held, error=attempt.error)
        if held:
            await self._store.attempts.publish([(claim.id, claim.number)])
        if claim.private is not None and decision.state != "pending":
            await self._empty(claim.event.prediction.id)

    async def _give_back(self, claim: Claim) -> None:
        """Make a delivery pending again after we cut its attempt short: that does not count."""
        self.cut_short += 1
        self._runtime.telemetry.interrupted(claim)
        lost = await self._retry_until_stored(
            lambda: self._store.release(self._owner, self._clock(), (claim.id,))
        )
        await report_lost(self._store, self._runtime, lost)
        await self._breaker.record(claim.id, _CUT_SHORT)

    async def _empty(self, prediction_id: str) -> None:
        """Empty the private values if this was the last delivery; retention does it too.

        It is a separate transaction: if two deliveries end at once, the later one sees both ended.
        """
        with contextlib.suppress(StoreUnavailable):
            await self._store.private.empty_after(prediction_id)

    def _spent(self, claim: Claim) -> Failure | None:
        """Return a failure if the process died in every attempt that the policy allows."""
        lost = Failure(kind="lost", reason="its process died during every attempt")
        over = decide(claim.attempt - 1, lost, self._policy, 0.0).state == "dead"
        return lost if over else None

    async def _retry_until_stored(self, write: Callable[[], Awaitable[T]]) -> T:
        """Retry until it is stored: the handler has run, so its result must be settled."""
        while True:
            try:
                return await write()
            except StoreUnavailable:
                await asyncio.sleep(0.5)
