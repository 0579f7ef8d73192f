"""The gate before a lane: it is shut by hand, or by a run of failures (a circuit breaker).

    closed ──a run of failures──▶ open ──after a while──▶ one delivery is probed
      ▲                            ▲                        │        │
      └────────it succeeds─────────┼────────────────────────┘        │
                                   └─────it fails: twice as long─────┘

Pending deliveries stay in their rows, whole; attempts are not spent on a service that is down. The
state is in the store, so that all processes obey it and one of them tries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
import structlog

from receiver.model.errors import StoreUnavailable
from receiver.model.retry import Failure, backoff
from receiver.store.breakers import Breakers, BreakerState

log = structlog.get_logger("receiver")

_FRESH: Final = 1.0
"""Seconds that what was read of the gates is believed."""
_FEWEST_DELIVERIES: Final = 3
"""A run of failures must be of so many deliveries: one that is poison says nothing of others."""
_MARGIN: Final = 10.0
"""Seconds beyond a handler's time-out in which its probe may still be settled."""


class BreakerPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When a handler's gate opens, and for how long."""

    failures: int | None = 20
    """In a row; None: never."""
    first_wait: float = 15.0
    longest_wait: float = 300.0
    """Seconds before a probe; each that fails doubles them."""


class BreakerCache:
    """What this process knows of the gates; read anew when it is old, or when told to."""

    def __init__(self, gates: Breakers, clock: Callable[[], float]) -> None:
        self._gates = gates
        self._clock = clock
        self._found: dict[str, BreakerState] = {}
        self._read_at = float("-inf")
        self._forgotten = 0

    async def of(self, name: str) -> BreakerState:
        now = self._clock()
        while not 0 <= now - self._read_at < _FRESH:
            forgotten = self._forgotten
            found = await self._gates.all()
            if forgotten == self._forgotten:  # else it may be older than what we were told
                self._found, self._read_at = found, now
        return self._found.get(name) or BreakerState(name)

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
        gates: Breakers,
        known: BreakerCache,
        breaker: BreakerPolicy,
        clock: Callable[[], float],
    ) -> None:
        self._name = name
        self.timeout = timeout
        self._gates = gates
        self._known = known
        self._breaker = breaker
        self._clock = clock
        self._failed: list[str] = []
        """The deliveries of the present run of failures, one for each."""
        self._probe: str | None = None
        """The delivery that is our probe, empty before there is one; None: the probe is not ours,
        as far as the store may know."""
        self._owes_probe = False
        """Whether that is over, and the store has not heard it."""

    async def ask(self, room: int, nap: float) -> BreakerPermit:
        """Return how many deliveries may be begun. Raises StoreUnavailable."""
        if self._owes_probe:
            await self.give_back()
        gate = await self._known.of(self._name)
        now = self._clock()
        state = gate.state(now)
        if state != "paused" and self._breaker.failures is None:
            state = "running"  # though another process, or an earlier one, has a breaker
        match state:
            case "running":
                return BreakerPermit(room)
            case "probing":
                self._probe, self._owes_probe = "", True  # until the answer is known
                is_ours = await self._gates.probe(self._name, now, now + self.timeout + _MARGIN)
                self._owes_probe = False
                if is_ours:
                    return BreakerPermit(1, is_probe=True)
                self._probe = None
        # Another process may let them go, or the time for a probe may come.
        return BreakerPermit(0, min(nap, _FRESH))

    async def give_back(self) -> None:
        """Say that there was nothing to try, or that it told nothing; insist, if need be later."""
        if self._probe is not None:
            self._owes_probe = True
            await self._gates.end_probe(self._name)
            self._probe, self._owes_probe = None, False

    def began(self, delivery: str) -> None:
        """Hear which delivery the probe is."""
        self._probe = delivery

    async def tell(self, delivery: str, failure: Failure | None) -> None:
        """Hear how an attempt ended; a gate that cannot be set stays as it is."""
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
        gate = await self._known.of(self._name)
        if gate.open_until is not None and await self._gates.close(self._name):
            self._known.forget()
            log.info("handler.released", handler=self._name)

    async def _troubled(self, delivery: str, failure: Failure) -> None:
        most = self._breaker.failures
        if most is None:
            return
        gate = await self._known.of(self._name)
        is_open = gate.open_until is not None
        self._failed = [*self._failed, delivery][-most:]
        fewest = min(_FEWEST_DELIVERIES, most)
        is_run = len(self._failed) >= most and len(set(self._failed)) >= fewest
        if not is_open and not is_run:
            return
        breaker = self._breaker
        wait = backoff(gate.failures + 1, breaker.first_wait, breaker.longest_wait, 1.0)
        now = self._clock()
        if await self._gates.open(self._name, now, now + wait, failure.reason):
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
