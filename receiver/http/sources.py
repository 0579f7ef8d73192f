"""Allowed source addresses of callbacks, for providers that the operator restricts."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, NoReturn

import httpx

from receiver.http.proxies import read_address, within
from receiver.model.errors import SourcesUnavailable, Unproved
from receiver.model.tasks import repeat
from receiver.providers.published import REFRESH, Published
from receiver.settings import Network

_REFRESHED: Final = 3600.0
"""Seconds between two fetches of the address ranges that a provider publishes."""

Ranges = Callable[[bool], Awaitable[Sequence[Network]]]
"""Returns a provider's address ranges; True: fetch them anew if that is allowed again."""


async def keep_fresh(ranges: Ranges) -> NoReturn:
    """Fetch published ranges again every hour, or every minute while none are known, for ever."""

    async def fetch() -> float:
        with contextlib.suppress(SourcesUnavailable):
            if await ranges(True):
                return _REFRESHED
        return REFRESH

    await repeat(fetch)


def published_ranges(
    client: httpx.AsyncClient,
    url: str,
    read: Callable[[bytes], list[Network]],
    clock: Callable[[], float],
) -> Published[Network]:
    """Return a cache of a provider's address ranges, which are valid until newer ones come.

    Calling it raises SourcesUnavailable while none are known.
    """
    return Published(
        client,
        lambda: httpx.Request("GET", url),
        read,
        name="sources",
        unavailable=SourcesUnavailable,
        kept=float("inf"),
        clock=clock,
    )


class Sources:
    """The allowed source addresses of callbacks; without a list every address is allowed."""

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
