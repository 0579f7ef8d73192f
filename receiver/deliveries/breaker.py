"""The circuit breaker of a handler: a run of failures makes its deliveries wait, as a pause does.

    closed ──a run of failures──▶ open ──after a wait───▶ one delivery is probed
      ▲                            ▲                        │        │
      └────────it succeeds─────────┼────────────────────────┘        │
                                   └─────it fails: twice as long─────┘

Pending deliveries stay in their rows unchanged; no attempts are spent on a service that is down.
The state is in the store, so that all processes obey it and only one of them probes.
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
"""Seconds for which the cached breakers are used."""
_FEWEST_DELIVERIES: Final = 3
"""Different deliveries that a run of failures needs: one may fail always, and the others not."""
_MARGIN: Final = 10.0
"""Seconds beyond a handler's time-out in which its probe may still be settled."""


class BreakerPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When a handler's breaker trips, and for how long."""

    failures: int | None = 20
    """Failures in a row that trip it; None: it never trips."""
    first_wait: float = 15.0
    longest_wait: float = 300.0
    """Limits of the seconds before a probe; each failed probe doubles the wait."""


class BreakerCache:
    """The breakers of all handlers, as this process last read them."""

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
            async with self._reading:  # one read serves all attempts that end meanwhile
                while not self._is_fresh(now):
                    forgotten = self._forgotten
                    found = await self._breakers.all()
                    if forgotten == self._forgotten:  # else a breaker has changed meanwhile
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
    """How many deliveries may be claimed now; if 0, ask again in `wait` seconds."""

    most: int
    wait: float = 0.0
    is_probe: bool = False


class HandlerBreaker:
    """The breaker of one handler: allows its deliveries, or makes them wait."""

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
        """The failed deliveries of the current run of failures, one item per failure."""
        self._probe: str | None = None
        """The delivery that is our probe, empty before it is claimed; None: in the store, the probe
        is not ours."""
        self._probe_ends = 0.0
        """When the probe ends at the latest, in Unix seconds."""
        self._owes_probe = False
        """Whether the probe has ended and that is not stored yet."""

    async def ask(self, room: int, nap: float) -> BreakerPermit:
        """Return how many deliveries may start. Raises StoreUnavailable."""
        if self._owes_probe:
            await self.give_back()
        found = await self._known.of(self._name)
        now = self._clock()
        state = found.state(now)
        if state != "paused" and self._policy.failures is None:
            state = "running"  # even if another process, or an earlier one, has set a breaker
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
        # Our probe may end, another process may close the breaker, or a probe may become due.
        return BreakerPermit(0, min(nap, _FRESH))

    async def give_back(self) -> None:
        """End a probe without a result; if the store is unavailable, `ask` does it later."""
        if self._probe is not None:
            self._owes_probe = True
            await self._breakers.end_probe(self._name, self._probe_ends)
            self._probe, self._owes_probe = None, False

    def began(self, delivery: str) -> None:
        """Note which delivery is the probe."""
        self._probe = delivery

    def is_calm(self) -> bool:
        """Return whether a success would change nothing: no failure, probe or open breaker."""
        return not self._failed and self._probe is None and not self._known.is_open(self._name)

    async def record(self, delivery: str, failure: Failure | None) -> None:
        """Record how an attempt ended; if the store is unavailable, the breaker stays as it is."""
        is_probe = delivery == self._probe
        try:
            if failure is None or failure.kind == "skip":
                await self._succeeded()
            elif _is_trouble(failure):
                await self._troubled(delivery, failure, is_probe=is_probe)
            elif is_probe:
                await self.give_back()  # this failure is no sign that other deliveries fail
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

    async def _troubled(self, delivery: str, failure: Failure, *, is_probe: bool) -> None:
        most = self._policy.failures
        if most is None:
            return
        found = await self._known.of(self._name)
        is_open = found.open_until is not None
        self._failed = [*self._failed, delivery][-most:]
        fewest = min(_FEWEST_DELIVERIES, most)
        is_run = len(self._failed) >= most and len(set(self._failed)) >= fewest
        # An attempt that began before the breaker opened says nothing new.
        if not (is_probe if is_open else is_run):
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
    """Return whether a failure counts for the breaker: not Dead, nor a Retry with `after`."""
    return failure.kind in {"error", "timeout", "lost"} or (
        failure.kind == "retry" and failure.after is None
    )
