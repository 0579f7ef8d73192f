"""A cache of data that a provider publishes, such as its keys: refreshed when a proof fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, Literal, TypeVar

import httpx
import structlog

from receiver.model.errors import KeysUnavailable, ReceiverError, Unreadable
from receiver.providers.transport import BROKEN, read_capped

KEYS_KEPT: Final = 86400.0
"""Seconds for which fetched keys are used."""
REFRESH: Final = 60.0
"""The least seconds between two refreshes after failures."""
_AFTER_FAILURE: Final = 2.0
_TIMEOUT: Final = 10.0
_LARGEST: Final = 1024 * 1024

log = structlog.get_logger("receiver")


T = TypeVar("T")


class Published(Generic[T]):
    """Published data: call with False for the cached data, with True after a failure to refresh it.

    `name` is its name in logs; `kept` is the seconds for which fetched data is used. A call raises
    `unavailable` if there is no usable data.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        request: Callable[[], httpx.Request],
        read: Callable[[bytes], list[T]],
        *,
        name: Literal["keys", "sources"],
        unavailable: type[ReceiverError],
        kept: float,
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._request = request
        self._url = str(request().url)
        self._read = read
        self._name = name
        self._unavailable = unavailable
        self._kept = kept
        self._clock = clock
        self._known: tuple[T, ...] = ()
        self._fetched_at = float("-inf")
        self._refreshed_at = float("-inf")
        self._failed_at = float("-inf")
        self._fetching = asyncio.Lock()

    async def __call__(self, refresh: bool) -> Sequence[T]:
        now = self._clock()
        due = now - self._refreshed_at >= REFRESH
        if refresh and due:
            self._refreshed_at = now
        # While newer keys are being fetched, callers wait for them and make no new request.
        if (refresh and (due or self._fetching.locked())) or not self._fresh(now):
            await self._fetch(now)
        if not self._fresh(now):
            raise self._unavailable(f"the {self._name} at {self._url} cannot be fetched")
        return self._known

    def _fresh(self, now: float) -> bool:
        return bool(self._known) and now - self._fetched_at < self._kept

    async def _fetch(self, now: float) -> None:
        """Fetch once for all waiting callers; a failure keeps the cached data."""
        async with self._fetching:
            if self._fetched_at >= now or now - self._failed_at < _AFTER_FAILURE:
                return
            try:
                known = tuple(self._read(await self._get()))
            except (*BROKEN, Unreadable) as error:
                self._failed(f"{type(error).__name__}: {error}")
                return
            if not known:
                self._failed("nothing of use in it")
                return
            self._known = known
            self._fetched_at = self._clock()
            log.info("published.fetched", what=self._name, url=self._url, count=len(known))

    async def _get(self) -> bytes:
        async with asyncio.timeout(_TIMEOUT):
            answer = await self._client.send(self._request(), stream=True, follow_redirects=False)
            body = await read_capped(answer, _LARGEST)
        answer.raise_for_status()
        return body

    def _failed(self, reason: str) -> None:
        self._failed_at = self._clock()
        log.warning("published.failed", what=self._name, url=self._url, reason=reason)


def fixed(values: Sequence[T]) -> Callable[[bool], Awaitable[Sequence[T]]]:
    """Return the values of an operator as an object that is called like `Published`."""

    async def given(_: bool) -> Sequence[T]:
        return values

    return given


def published_keys(
    client: httpx.AsyncClient,
    request: Callable[[], httpx.Request],
    read: Callable[[bytes], list[bytes]],
    clock: Callable[[], float],
) -> Published[bytes]:
    """Return a cache, for a day, of the keys that prove callbacks; it raises KeysUnavailable."""
    return Published(
        client, request, read, name="keys", unavailable=KeysUnavailable, kept=KEYS_KEPT, clock=clock
    )
