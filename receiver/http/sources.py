"""Allowed source addresses of callbacks, for providers that the operator restricts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, cast

import httpx

from receiver.http.proxies import read_address, within
from receiver.model.errors import SourcesUnavailable, Unproved
from receiver.model.tasks import repeat
from receiver.providers import DECLARED
from receiver.providers.published import REFRESH, Published, fixed
from receiver.settings import Network, Settings

_REFRESHED: Final = 3600.0
"""Seconds between two fetches of the address ranges that a provider publishes."""

Ranges = Callable[[bool], Awaitable[Sequence[Network]]]
"""Returns a provider's address ranges; True: fetch them anew if that is allowed again."""


class Sources:
    """The allowed source addresses of callbacks; without a list every address is allowed."""

    def __init__(
        self, settings: Settings, client: httpx.AsyncClient, clock: Callable[[], float]
    ) -> None:
        self._ranges: dict[str, Ranges] = {}
        self._published: list[Ranges] = []
        for name, given in settings.providers.items():
            if given.allowed_sources == "meta":
                published = _published(client, given.urls["meta"], name, clock)
                self._published.append(published)
                self._ranges[name] = published
            elif given.allowed_sources is not None:
                self._ranges[name] = fixed(given.allowed_sources)

    async def keep_fresh(self) -> None:
        """Fetch published ranges again every hour, or every minute while none are known."""
        await asyncio.gather(*(repeat(partial(_refresh, ranges)) for ranges in self._published))

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


def _published(
    client: httpx.AsyncClient, url: str, provider: str, clock: Callable[[], float]
) -> Published[Network]:
    """Return a cache of a provider's address ranges, which are valid until newer ones come.

    Calling it raises SourcesUnavailable while none are known.
    """
    # The setting may be `meta` only if the provider publishes its addresses.
    read = cast("Callable[[bytes], list[Network]]", DECLARED[provider].read_sources)
    return Published(
        client,
        lambda: httpx.Request("GET", url),
        read,
        name="sources",
        unavailable=SourcesUnavailable,
        kept=float("inf"),
        clock=clock,
    )


async def _refresh(ranges: Ranges) -> float:
    with contextlib.suppress(SourcesUnavailable):
        if await ranges(True):
            return _REFRESHED
    return REFRESH
