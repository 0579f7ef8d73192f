"""Health checks: liveness and readiness, by two names each.

Google's Cloud Run reserves paths that end in z.
"""

from __future__ import annotations

from receiver.http.declare import get
from receiver.http.parts import Parts
from receiver.model.answers import Health, Readiness


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

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    @get("/readyz", "it does", problems=["unavailable"], is_open=True)
    async def ready(self) -> Readiness:
        """Return whether the database takes writes.

        503 while it does not: then callbacks are answered 503 too, and providers repeat them.
        Providers that have locked our account are named; the answer is still 200.
        """
        await self._parts.store.try_write(self._parts.runtime.clock())
        return Readiness(locked=self._parts.predictions.locked())

    @get("/ready", "it does", problems=["unavailable"], is_open=True)
    async def ready_too(self) -> Readiness:
        """Return whether the database takes writes, as `/readyz` does.

        For platforms that reserve paths ending in z.
        """
        return await self.ready()
