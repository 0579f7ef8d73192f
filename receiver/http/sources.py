"""Where callbacks may come from, for providers of which the operator says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import structlog

from receiver.http.proxies import read_address, within
from receiver.model.errors import ReceiverError, SourcesUnavailable, Unproved
from receiver.providers.published import REFRESH, Published
from receiver.settings import Network

log = structlog.get_logger("receiver")

_REFRESHED: Final = 3600.0
"""Seconds between two looks at what a provider publishes."""

Ranges = Callable[[bool], Awaitable[Sequence[Network]]]
"""Gives a provider's addresses; True: fetch them anew if that is allowed again."""


class PublishedRanges(Published[Network]):
    """The address ranges that a provider publishes; those once known are believed until newer come.

    Calling it raises SourcesUnavailable while none are known.
    """

    kept = float("inf")

    async def keep(self) -> None:
        """Look again from time to time, for ever."""
        while True:
            known = False
            with contextlib.suppress(SourcesUnavailable):
                known = bool(await self(True))
            await asyncio.sleep(_REFRESHED if known else REFRESH)

    def _unavailable(self) -> ReceiverError:
        return SourcesUnavailable(f"the address ranges at {self._url} cannot be fetched")

    def _fetched(self, count: int) -> None:
        log.info("sources.fetched", url=self._url, count=count)

    def _not_fetched(self, reason: str) -> None:
        log.warning("sources.failed", url=self._url, reason=reason)


class Sources:
    """Holds a callback's address against what its provider is allowed; without a list, anything."""

    def __init__(self, ranges: Mapping[str, Ranges]) -> None:
        self._ranges = ranges

    async def check(self, provider: str, client: str) -> None:
        """Raise Unproved for an address that is not on the list, or SourcesUnavailable."""
        ranges = self._ranges.get(provider)
        if ranges is None:
            return
        address = read_address(client)
        if address is None:
            raise Unproved("bad_source")
        for refresh in (False, True):
            if within(address, await ranges(refresh)):
                return
        raise Unproved("bad_source")


def listed(networks: Sequence[Network]) -> Ranges:
    """Make ranges of those that the operator wrote down."""

    async def given(_: bool) -> Sequence[Network]:
        return networks

    return given
