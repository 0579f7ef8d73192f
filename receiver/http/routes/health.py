"""Health checks: liveness and readiness, by two names each.

Google's Cloud Run reserves paths that end in z.
"""

from __future__ import annotations

from collections.abc import Callable

from receiver.http.declare import get
from receiver.model.answers import Health, Readiness
from receiver.store.facade import Store


class AliveRoutes:
    """The liveness route, which works whether or not the receiver has been started."""

    @get("/healthz", "it is", is_open=True)
    async def alive(self) -> Health:
        """Return whether the process is alive.

        It answers as long as the process answers at all, and does not use the database.
        """
        return Health()

    @get("/health", "it is", is_open=True)
    async def alive_too(self) -> Health:
        """Return whether the process is alive, as `/healthz` does.

        For platforms that reserve paths ending in z.
        """
        return await self.alive()


class ReadyRoutes:
    """The readiness route: whether the receiver can do its work."""

    def __init__(
        self,
        store: Store,
        locked: Callable[[], list[str]],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._locked = locked
        self._clock = clock

    @get("/readyz", "it does", problems=["unavailable"], is_open=True)
    async def ready(self) -> Readiness:
        """Return whether the database takes writes.

        503 while it does not: then callbacks are answered 503 too, and providers repeat them.
        Providers that have locked our account are named; the answer is still 200.
        """
        await self._store.try_write(self._clock())
        return Readiness(locked=self._locked())

    @get("/ready", "it does", problems=["unavailable"], is_open=True)
    async def ready_too(self) -> Readiness:
        """Return whether the database takes writes, as `/readyz` does.

        For platforms that reserve paths ending in z.
        """
        return await self.ready()
