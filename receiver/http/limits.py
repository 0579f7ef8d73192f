"""How much may be asked: budgets that take the same memory however many spend them.

Whoever can prove itself is never refused for what others at its address do: a callback on a path
that we made, and a key too long to guess, pass an address's empty budget.
"""

from __future__ import annotations

import os
import socket
import time
from array import array
from collections.abc import Callable
from functools import lru_cache
from typing import Final

import structlog

from receiver.model.errors import Limited
from receiver.settings import Settings

log = structlog.get_logger("receiver")

_WINDOW: Final = 60.0
"""Seconds in which an empty budget fills; a full one may be spent at once."""
_DEBT: Final = 2 * _WINDOW
"""Seconds to a full budget at the most: what was under way when it ran out may overdraw it."""
_ROUNDING: Final = 1e-6
_SLOTS: Final = 1 << 16
_SAY_AGAIN: Final = 10.0
"""Seconds between two lines about refusals."""


class Budgets:
    """A token bucket for every name, in two rows of slots whose number is fixed.

    A slot holds the moment at which its bucket is full again. A name has one slot in each row, by a
    secret hash, and the fuller one counts (a count-min sketch). So a flood of names takes no memory
    and pushes nobody out; names that share both slots are held to be poorer, never richer, than
    they are. With `per_minute` None nothing is ever spent.
    """

    def __init__(
        self,
        per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
        slots: int = _SLOTS,
    ) -> None:
        self._price = _WINDOW / per_minute if per_minute else 0.0
        self._clock = clock
        self._salt = os.urandom(16)
        self._slots = slots
        size = slots if per_minute else 1
        self._rows = (array("d", [0.0]) * size, array("d", [0.0]) * size)

    def wait(self, name: bytes) -> float:
        """Give the seconds until `name` can pay for one request; 0: now."""
        if not self._price:
            return 0.0
        one, other = self._places(name)
        full_at = min(self._rows[0][one], self._rows[1][other])
        left = full_at - self._clock() - (_WINDOW - self._price)
        return left if left > _ROUNDING else 0.0

    def spend(self, name: bytes) -> None:
        """Take one request's price, also where there is none left."""
        if not self._price:
            return
        now = self._clock()
        first, second = self._rows
        one, other = self._places(name)
        full_at = max(min(first[one], second[other]), now) + self._price
        full_at = min(full_at, now + _DEBT)
        first[one] = max(first[one], full_at)
        second[other] = max(second[other], full_at)

    def _places(self, name: bytes) -> tuple[int, int]:
        mixed = hash(self._salt + name)
        return mixed % self._slots, (mixed >> 32) % self._slots


class Limits:
    """What may be asked of us, by whom.

    `unproved`: failures of an address, over callbacks and /v1 together, and of one callback path.
    `callbacks`: what reaches the database from one provider. `api`: good requests of an address.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._unproved = Budgets(settings.limit_unproved_per_minute, clock)
        self._callbacks = Budgets(settings.limit_callbacks_per_minute, clock)
        self._api = Budgets(settings.limit_api_per_minute, clock)
        self._refused = 0
        self._said_at = float("-inf")

    def callback(self, client: str, provider: str, prediction_id: str | None) -> None:
        """Let a callback in, or raise Limited; what is on no path of ours is paid for here."""
        if prediction_id is None:
            self._check("unproved", self._unproved.wait(address(client)), client)
            self._unproved.spend(address(client))
            return
        # The path may have leaked: then it has a budget too, which others at its address do not
        # spend. A path of ours is refused only where both are empty.
        wait = self._unproved.wait(prediction_id.encode())
        if wait:
            self._check("unproved", min(wait, self._unproved.wait(address(client))), client)
        self._check("callbacks", self._callbacks.wait(provider.encode()), client)

    def callback_failed(self, client: str, prediction_id: str | None) -> None:
        """Charge a callback on a path of ours that came to nothing."""
        if prediction_id is not None:
            self._unproved.spend(address(client))
            self._unproved.spend(prediction_id.encode())

    def callback_proved(self, provider: str) -> None:
        self._callbacks.spend(provider.encode())

    def strangers_wait(self, client: str) -> float:
        """Give the seconds for which an address has no more failures left on /v1."""
        return self._unproved.wait(address(client))

    def unauthorized(self, client: str) -> None:
        """Charge a /v1 request without a good key, or raise Limited."""
        self._check("unproved", self._unproved.wait(address(client)), client)
        self._unproved.spend(address(client))

    def authorized(self, client: str) -> None:
        """Charge a /v1 request with a good key, or raise Limited."""
        self._check("api", self._api.wait(address(client)), client)
        self._api.spend(address(client))

    def _check(self, limit: str, wait: float, client: str) -> None:
        if not wait:
            return
        self._refused += 1
        now = self._clock()
        # A flood writes no log: one line says how many there were since the last.
        if now - self._said_at >= _SAY_AGAIN:
            log.warning("request.limited", limit=limit, client=client, refused=self._refused)
            self._refused, self._said_at = 0, now
        raise Limited(wait)


_MAPPED: Final = b"\0" * 10 + b"\xff\xff"


@lru_cache(maxsize=4096)
def address(client: str) -> bytes:
    """Name whom an address belongs to: all of an IPv4 address, the /64 of an IPv6 one."""
    if ":" not in client:
        return client.encode()
    try:
        packed = socket.inet_pton(socket.AF_INET6, client.partition("%")[0])
    except (OSError, ValueError):
        return client.encode()
    if packed.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[12:]).encode()
    return packed[:8]
