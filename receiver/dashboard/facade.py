"""The facade of the dashboard: `/ui`, whose pages are imported at the first request.

So a process that starts for a single callback does not import them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, NoReturn

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from receiver.dashboard.cache import PictureCache, folder_of
from receiver.http.front import DASHBOARD_PATHS
from receiver.http.parts import Parts
from receiver.model.tasks import repeat

if TYPE_CHECKING:
    from receiver.dashboard.site import Site

_PAGE: Final = 500
"""Predictions of one query."""
_TIDY: Final = 20.0
"""Seconds between two checks for copies of erased or deleted predictions."""


class Dashboard:
    """The dashboard of one run of the receiver."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._cache = PictureCache(folder_of(parts.settings))
        self._site: Site | None = None
        self._making = asyncio.Lock()
        is_on = parts.settings.shows_dashboard
        self.routes = [Route(path, self) for path in DASHBOARD_PATHS if is_on]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._making:
            if self._site is None:
                self._site = await asyncio.to_thread(_make_site, self._parts, self._cache)
        await self._site(scope, receive, send)

    async def run(self) -> NoReturn:
        """Remove the copies of erased or deleted predictions, as long as we run."""
        await repeat(self._tidy, longest=_TIDY)

    async def _tidy(self) -> None:
        held = await asyncio.to_thread(self._cache.predictions)
        for at in range(0, len(held), _PAGE):
            some = held[at : at + _PAGE]
            kept = await self._parts.store.search.with_content(some)
            await asyncio.to_thread(self._cache.drop, {*some} - kept)
        await asyncio.to_thread(self._cache.shrink)


def _make_site(parts: Parts, cache: PictureCache) -> Site:
    from receiver.dashboard.site import Site  # noqa: PLC0415 - at the first page, and not before

    cache.open()
    return Site(parts, cache)
