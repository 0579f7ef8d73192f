"""The circuit breaker of a handler: a run of failures makes its deliveries wait, as a pause does.

    closed ──a run of failures──▶ open ──after a while──▶ one delivery is probed
      ▲                            ▲                        │        │
      └────────it succeeds─────────┼────────────────────────┘        │
                                   └─────it fails: twice as long─────┘

Pending deliveries stay in their rows, whole; attempts are not spent on a service that is down. The
state is in the store, so that all processes obey it and one of them tries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec
import structlog

from receiver.model.errors import StoreUnavailable
from receiver.model.retry import Failure, backoff
from receiver.store.breakers import Breakers, BreakerState

log = structlog.get_logger("receiver")

_FRESH: Final = 1.0
"""Seconds for which what was read of the breakers is used."""
_FEWEST_DELIVERIES: Final = 3
"""A run of failures must be of so many deliveries: one that is poison says nothing of others."""
_MARGIN: Final = 10.0
"""Seconds beyond a handler's time-out in which its probe may still be settled."""


class BreakerPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When a handler's breaker trips, and for how long."""

    failures: int | None = 20
    """In a row; None: never."""
    first_wait: float = 15.0
    longest_wait: float = 300.0
    """Seconds before a probe; each that fails doubles them."""


class BreakerCache:
    """The breakers of all handlers, as this process read them a moment ago."""

    def __init__(self, breakers: Breakers, clock: Callable[[], float]) -> None:
        self._breakers = breakers
        self._clock = clock
        self._found: dict[str, BreakerState] = {}
        self._read_at = float("-inf")
        self._forgotten = 0
        self._reading = asyncio.Lock()

    async def of(self, name: str) -> BreakerState:
        now = self._clock()
        if not self._is_fresh(now):
            async with self._reading:  # one reads for all the attempts that end meanwhile
                while not self._is_fresh(now):
                    forgotten = self._forgotten
                    found = await self._breakers.all()
                    if forgotten == self._forgotten:  # else it may be older than what we were told
                        self._found, self._read_at = found, now
        return self._found.get(name) or BreakerState(name)

    def is_open(self, name: str) -> bool:
        """Return whether a breaker was open when last read."""
        found = self._found.get(name)
        return found is not None and found.open_until is not None

    def _is_fresh(self, now: float) -> bool:
        return 0 <= now - self._read_at < _FRESH

    def forget(self) -> None:
        self._forgotten += 1
        self._read_at = float("-inf")


class BreakerPermit(msgspec.Struct, frozen=True):
    """How many deliveries may be claimed now; None are: look again in so many seconds."""

    most: int
    wait: float = 0.0
    is_probe: bool = False


class HandlerBreaker:
    """Lets one handler's deliveries through, or makes them wait."""

    def __init__(
        self,
        name: str,
        timeout: float,
        breakers: Breakers,
        known: BreakerCache,
        policy: BreakerPolicy,
        clock: Callable[[], float],
    ) -> None:
        self._name = name
        self.timeout = timeout
        self._breakers = breakers
        self._known = known
        self._policy = policy
        self._clock = clock
        self._failed: list[str] = []
        """The deliveries of the present run of failures, one for each."""
        self._probe: str | None = None
        """The delivery that is our probe, empty before there is one; None: the probe is not ours,
        as far as the store may know."""
        self._probe_ends = 0.0
        """When it is over in any case."""
        self._owes_probe = False
        """Whether the probe is over and the store does not know it yet."""

    async def ask(self, room: int, nap: float) -> BreakerPermit:
        """Return how many deliveries may be begun. Raises StoreUnavailable."""
        if self._owes_probe:
            await self.give_back()
        found = await self._known.of(self._name)
        now = self._clock()
        state = found.state(now)
        if state != "paused" and self._policy.failures is None:
            state = "running"  # though another process, or an earlier one, has a breaker
        match state:
            case "running":
                return BreakerPermit(room)
            case "probing" if self._probe is None or now >= self._probe_ends:
                self._probe, self._owes_probe = "", True  # until the answer is known
                self._probe_ends = now + self.timeout + _MARGIN
                is_ours = await self._breakers.probe(self._name, now, self._probe_ends)
                self._owes_probe = False
                if is_ours:
                    return BreakerPermit(1, is_probe=True)
                self._probe = None
        # Our probe may end, another process may let them go, or the time for one may come.
        return BreakerPermit(0, min(nap, _FRESH))

    async def give_back(self) -> None:
        """End a probe that found nothing out; where the store is away, `ask` does it later."""
        if self._probe is not None:
            self._owes_probe = True
            await self._breakers.end_probe(self._name)
            self._probe, self._owes_probe = None, False

    def began(self, delivery: str) -> None:
        """Record which delivery the probe is."""
        self._probe = delivery

    def is_calm(self) -> bool:
        """Return whether there is nothing that a success would change."""
        return not self._failed and self._probe is None and not self._known.is_open(self._name)

    async def record(self, delivery: str, failure: Failure | None) -> None:
        """Record how an attempt ended; a breaker that cannot be set stays as it is."""
        is_probe = delivery == self._probe
        try:
            if failure is None or failure.kind == "skip":
                await self._succeeded()
            elif _is_trouble(failure):
                await self._troubled(delivery, failure)
            elif is_probe:
                await self.give_back()  # it says nothing of the others
            if is_probe:
                self._probe = None
        except StoreUnavailable:
            self._owes_probe |= is_probe

    async def _succeeded(self) -> None:
        self._failed.clear()
        found = await self._known.of(self._name)
        if found.open_until is not None and await self._breakers.reset(self._name):
            self._known.forget()
            log.info("handler.released", handler=self._name)

    async def _troubled(self, delivery: str, failure: Failure) -> None:
        most = self._policy.failures
        if most is None:
            return
        found = await self._known.of(self._name)
        is_open = found.open_until is not None
        self._failed = [*self._failed, delivery][-most:]
        fewest = min(_FEWEST_DELIVERIES, most)
        is_run = len(self._failed) >= most and len(set(self._failed)) >= fewest
        if not is_open and not is_run:
            return
        wait = backoff(found.failures + 1, self._policy.first_wait, self._policy.longest_wait, 1.0)
        now = self._clock()
        if await self._breakers.trip(self._name, now, now + wait, failure.reason):
            log.warning(
                "handler.held",
                handler=self._name,
                cause="a probe failed" if is_open else f"{len(self._failed)} failures in a row",
                reason=failure.reason,
                probe_in=round(wait, 1),
            )
            self._failed.clear()
            self._known.forget()


def _is_trouble(failure: Failure) -> bool:
    """Tell what speaks against the handler from what it decided about its event."""
    return failure.kind in {"error", "timeout", "lost"} or (
        failure.kind == "retry" and failure.after is None
    )
