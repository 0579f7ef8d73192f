"""The poller of one process among many: polls are on time, and a stop releases claimed ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from receiver.observability.runtime import Runtime
from receiver.predictions.poller import Poller
from receiver.predictions.submitter import Schedule
from receiver.settings import Settings
from receiver.store.facade import Store
from receiver.store.predictions import Job, PredictionStore
from receiver.store.sqlite.engine import SQLiteStore
from tests.clocks import ManualClock
from tests.conftest import Start
from tests.patience import PATIENCE
from tests.receiving import ENV, Network, eventually

pytestmark = pytest.mark.anyio


class RecordedClaims(PredictionStore):
    """A store that records the times of claims; each takes `duration`, as on a database server."""

    def __init__(self, store: Store, clock: ManualClock) -> None:
        super().__init__(store)
        self._clock = clock
        self.times: list[float] = []
        self.duration = 0.0

    async def claim_due(self, provider: str, now: float, hold_until: float, most: int) -> list[Job]:
        self.times.append(now)
        self._clock.now += self.duration
        return await super().claim_due(provider, now, hold_until, most)


@pytest.fixture
def no_housekeeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the poller wake only for its own predictions."""
    monkeypatch.setattr("receiver.predictions.poller.BACKSTOP", 3600.0)


@asynccontextmanager
async def polling(path: Path) -> AsyncIterator[tuple[ManualClock, RecordedClaims, Poller]]:
    """Create the poller of one process among many; it does not run yet."""
    clock = ManualClock()
    store = SQLiteStore(str(path / "receiver.db"), lambda _: None)
    claims = store.predictions = RecordedClaims(store, clock)
    provider: Any = object()
    inbox: Any = object()
    client: Any = object()
    runtime = Runtime(single_process=False, clock=clock, monotonic=clock, random=lambda: 0.5)
    schedule = Schedule(Settings.read(ENV), runtime)
    await store.start()
    yield (
        clock,
        claims,
        Poller(
            store,
            inbox,
            {"fal": provider},
            {"fal": client},
            schedule,
            runtime,
            timeout=3600.0,
        ),
    )
    await store.stop()


@asynccontextmanager
async def running(poller: Poller) -> AsyncIterator[None]:
    task = asyncio.create_task(poller.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.usefixtures("no_housekeeping")
async def test_poll_that_falls_due_during_a_claim_is_made_next(tmp_path: Path) -> None:
    async with polling(tmp_path) as (clock, claims, poller):
        poller.due(clock.now + 0.5)
        claims.duration = 1.0  # so it falls due during the claim of earlier ones
        async with running(poller):
            await eventually(lambda: len(claims.times) == 2)
        assert claims.times == [1000.0, 1001.0]


@pytest.mark.usefixtures("no_housekeeping")
async def test_poll_that_falls_due_later_is_made_at_its_time_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with polling(tmp_path) as (clock, claims, poller):

        async def repeat(
            step: Callable[[], Awaitable[float]], awake: asyncio.Event, *, longest: float
        ) -> None:
            """Move the clock instead of waiting."""
            while True:
                awake.clear()
                nap = await step()
                assert nap <= longest
                clock.now += 0.0 if awake.is_set() else nap

        monkeypatch.setattr("receiver.predictions.poller.repeat", repeat)
        poller.due(clock.now + 500)
        poller.due(clock.now + 0.25)
        async with running(poller):
            await eventually(lambda: len(claims.times) >= 3)
        assert claims.times[:3] == [1000.0, 1000.25, 1500.0]


@pytest.mark.usefixtures("no_housekeeping")
async def test_poll_that_is_due_at_once_wakes_a_sleeping_poller(tmp_path: Path) -> None:
    async with polling(tmp_path) as (clock, claims, poller):
        poller.due(clock.now + 1000)
        async with running(poller):
            await eventually(lambda: claims.times)
            clock.now += 1
            poller.due(clock.now)
            await eventually(lambda: len(claims.times) == 2)
        assert claims.times == [1000.0, 1001.0]


@pytest.mark.both_engines
async def test_poll_interrupted_by_shutdown_is_due_at_once(start: Start, network: Network) -> None:
    asked = asyncio.Event()

    async def hangs(_: httpx.Request) -> httpx.Response:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    network.script("fal.poll", hangs)
    async with start(RECEIVER_POLL_AFTER="0.02") as station:
        await station.submitted("fal")
        await asyncio.wait_for(asked.wait(), PATIENCE)
        assert station.one("SELECT due_at FROM predictions") > station.clock()
    assert station.one("SELECT due_at FROM predictions") <= station.clock()


@pytest.mark.both_engines
async def test_poll_claimed_during_shutdown_is_due_at_once(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed, stopping = asyncio.Event(), asyncio.Event()
    claim, stop = PredictionStore.claim_due, Poller.stop

    async def claim_slowly(self: PredictionStore, *given: Any) -> list[Job]:
        jobs = await claim(self, *given)
        if jobs:
            claimed.set()
            await stopping.wait()
        return jobs

    async def stop_then(self: Poller) -> None:
        stopping.set()
        await stop(self)

    monkeypatch.setattr(PredictionStore, "claim_due", claim_slowly)
    monkeypatch.setattr(Poller, "stop", stop_then)
    async with start(RECEIVER_POLL_AFTER="0.02") as station:
        await station.submitted("fal")
        await asyncio.wait_for(claimed.wait(), PATIENCE)
        assert station.one("SELECT due_at FROM predictions") > station.clock()
    assert station.one("SELECT due_at FROM predictions") <= station.clock()
