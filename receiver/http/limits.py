"""Rate limits: token buckets by client address, in bounded memory.

A caller that can prove itself is never refused for the failures of others at its address: a
callback on a path that we made, and a key too long to guess, pass although the address's budget is
empty.
"""

from __future__ import annotations

import socket
import time
from collections import OrderedDict
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
"""Maximum seconds until a budget is full: requests under way when it ran out may overdraw it."""
_ROUNDING: Final = 1e-6
_MOST_NAMES: Final = 50_000
"""Maximum number of buckets of one limit, about 8 MB."""
_LOG_INTERVAL: Final = 10.0
"""Seconds between two log lines about refusals."""


class Budgets:
    """A token bucket for every name; the least recently used one is forgotten.

    A bucket is stored as the time when it is full again. A forgotten name has a full bucket. Only a
    client with more addresses than there are buckets gains by that, and each of its addresses has a
    budget anyway. With `per_minute` None nothing is ever spent.
    """

    def __init__(
        self,
        per_minute: int | None,
        clock: Callable[[], float],
        most: int = _MOST_NAMES,
    ) -> None:
        self._price = _WINDOW / per_minute if per_minute else 0.0
        self._clock = clock
        self._most = most
        self._full_at: OrderedDict[bytes, float] = OrderedDict()

    def wait(self, name: bytes) -> float:
        """Return the seconds until `name` can pay for one request; 0: now."""
        full_at = self._full_at.get(name)
        if full_at is None:
            return 0.0
        left = full_at - self._clock() - (_WINDOW - self._price)
        return left if left > _ROUNDING else 0.0

    def spend(self, name: bytes) -> None:
        """Charge one request, even if the budget is empty."""
        if not self._price:
            return
        now = self._clock()
        full_at = max(self._full_at.get(name, now), now) + self._price
        self._full_at[name] = min(full_at, now + _DEBT)
        self._full_at.move_to_end(name)
        if len(self._full_at) > self._most:
            self._full_at.popitem(last=False)


class Limits:
    """The rate limits of one process.

    `unproved`: failures of an address, in callbacks and /v1 together, and of one callback path.
    `callbacks`: proved callbacks of one provider. `api`: requests of an address with a valid key.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._unproved = Budgets(settings.limit_unproved_per_minute, clock)
        self._callbacks = Budgets(settings.limit_callbacks_per_minute, clock)
        self._api = Budgets(settings.limit_api_per_minute, clock)
        self._refused = 0
        self._said_at = float("-inf")

    def callback(self, client: str, provider: str, prediction_id: str | None) -> None:
        """Raise Limited if a limit refuses a callback; charge it here if its path is not ours."""
        if prediction_id is None:
            self._check("unproved", self._unproved.wait(address(client)), client)
            self._unproved.spend(address(client))
            return
        # The path may have leaked, so it has its own budget, which other failures at the address
        # do not spend. A path of ours is refused only if both budgets are empty.
        wait = self._unproved.wait(prediction_id.encode())
        if wait:
            self._check("unproved", min(wait, self._unproved.wait(address(client))), client)
        self._check("callbacks", self._callbacks.wait(provider.encode()), client)

    def callback_failed(self, client: str, prediction_id: str | None) -> None:
        """Charge a failed callback on a path of ours."""
        if prediction_id is not None:
            self._unproved.spend(address(client))
            self._unproved.spend(prediction_id.encode())

    def callback_proved(self, provider: str) -> None:
        self._callbacks.spend(provider.encode())

    def failure_wait(self, client: str) -> float:
        """Return the seconds for which an address has no more failures left; 0: it has some."""
        return self._unproved.wait(address(client))

    def unauthorized(self, client: str) -> None:
        """Charge a /v1 request without a valid key, or a plugin's failed call; raise Limited."""
        self._check("unproved", self._unproved.wait(address(client)), client)
        self._unproved.spend(address(client))

    def authorized(self, client: str) -> None:
        """Charge a /v1 request with a valid key, or raise Limited."""
        self._check("api", self._api.wait(address(client)), client)
        self._api.spend(address(client))

    def _check(self, limit: str, wait: float, client: str) -> None:
        if not wait:
            return
        self._refused += 1
        now = self._clock()
        # A flood does not fill the log: one line has the number of refusals since the last.
        if now - self._said_at >= _LOG_INTERVAL:
            log.warning("request.limited", limit=limit, client=client, refused=self._refused)
            self._refused, self._said_at = 0, now
        raise Limited(wait)


_MAPPED: Final = b"\0" * 10 + b"\xff\xff"


@lru_cache(maxsize=4096)
def address(client: str) -> bytes:
    """Return the network that shares a budget: an IPv4 address, or the /64 of an IPv6 one."""
    if ":" not in client:
        return client.encode()
    try:
        packed = socket.inet_pton(socket.AF_INET6, client.partition("%")[0])
    except (OSError, ValueError):
        return client.encode()
    if packed.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[12:]).encode()
    return packed[:8]
