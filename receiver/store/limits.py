"""Rate limits of providers: requests are counted in the database, for all processes together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from receiver.store.engine import Repository
from receiver.store.statement import Run, Statements, Steps, short

sql: Final = Statements("limits")


class RequestPermit(msgspec.Struct, frozen=True, kw_only=True):
    """A request for permission to send one request to a provider with a limit per minute."""

    provider: str
    now: float
    per_minute: int


WINDOW: Final = 60.0
"""Seconds over which a provider's requests are counted; the window slides."""


def hold_limits(providers: Iterable[str]) -> Steps[None]:
    """Lock the providers' limit rows, sorted, so that two transactions cannot deadlock."""
    for provider in sorted(set(providers)):
        yield Run(sql.hold_limits, {"provider": provider})


def room_for(provider: str, now: float, per_minute: int) -> Steps[tuple[int, float]]:
    """Return how many requests may be sent now, and the seconds until there is room if none."""
    params = {"provider": provider, "since": now - WINDOW}
    yield Run(sql.forget_requests, params)
    [row] = yield Run(sql.count_requests, params)
    room = per_minute - row["sent"]
    return room, 0.0 if room > 0 else row["first"] + WINDOW - now


@short()
def take_permits(items: Sequence[RequestPermit]) -> Steps[list[float]]:
    yield from hold_limits(permit.provider for permit in items)
    results = []
    for permit in items:
        room, wait = yield from room_for(permit.provider, permit.now, permit.per_minute)
        if room > 0:
            yield from count_requests(permit.provider, permit.now, 1)
        results.append(wait)
    return results


def count_requests(provider: str, now: float, requests: int) -> Steps[None]:
    """Count requests that are about to be sent."""
    yield Run(sql.insert_requests, {"provider": provider, "now": now, "requests": requests})


class LimitStore(Repository):
    """The rate limits of one store."""

    async def take(self, permit: RequestPermit) -> float:
        """Count one request to a provider and return 0, or return the seconds until it has room."""
        return await self._store.write(take_permits, permit)
