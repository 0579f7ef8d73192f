"""A provider's public keys: fetched, kept for a day, and fetched again when a proof fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

import httpx
import structlog

from receiver.errors import KeysUnavailable, Unreadable
from receiver.inflate import read_capped

KEPT: Final = 86400.0
"""Seconds that fetched keys are believed."""
REFRESH: Final = 60.0
"""Seconds between two refreshes that a failed proof may cause."""
_AFTER_FAILURE: Final = 2.0
_TIMEOUT: Final = 10.0
_LARGEST: Final = 1024 * 1024

log = structlog.get_logger("receiver")


class PublicKeys:
    """Call with False for the keys, with True after a failed proof for newer ones if it is time.

    Raises KeysUnavailable when there are none to be had.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        url: str,
        read: Callable[[bytes], list[bytes]],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._url = url
        self._read = read
        self._clock = clock
        self._keys: tuple[bytes, ...] = ()
        self._fetched_at = float("-inf")
        self._refreshed_at = float("-inf")
        self._failed_at = float("-inf")
        self._fetching = asyncio.Lock()

    async def __call__(self, refresh: bool) -> Sequence[bytes]:
        now = self._clock()
        due = now - self._refreshed_at >= REFRESH
        if refresh and due:
            self._refreshed_at = now
        # Whoever wants newer keys while they are being fetched waits for them, for no new request.
        if (refresh and (due or self._fetching.locked())) or not self._fresh(now):
            await self._fetch(now)
        if not self._fresh(now):
            raise KeysUnavailable(f"the public keys at {self._url} cannot be fetched")
        return self._keys

    def _fresh(self, now: float) -> bool:
        return bool(self._keys) and now - self._fetched_at < KEPT

    async def _fetch(self, now: float) -> None:
        """Fetch once however many wait; a failure leaves what is known."""
        async with self._fetching:
            if self._fetched_at >= now or now - self._failed_at < _AFTER_FAILURE:
                return
            try:
                keys = tuple(self._read(await self._get()))
            except (httpx.HTTPError, Unreadable, UnicodeError, TimeoutError) as error:
                self._failed(f"{type(error).__name__}: {error}")
                return
            if not keys:
                self._failed("no Ed25519 key in it")
                return
            self._keys = keys
            self._fetched_at = self._clock()
            log.info("keys.fetched", url=self._url, count=len(keys))

    async def _get(self) -> bytes:
        async with asyncio.timeout(_TIMEOUT):
            request = self._client.build_request("GET", self._url)
            answer = await self._client.send(request, stream=True)
            body = await read_capped(answer, _LARGEST)
        answer.raise_for_status()
        return body

    def _failed(self, reason: str) -> None:
        self._failed_at = self._clock()
        log.warning("keys.failed", url=self._url, reason=reason)
