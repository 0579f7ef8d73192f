"""The poller of one process among many: polls are on time, and a stop releases claimed ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
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
from tests.conftest import Start
from tests.patience import PATIENCE
from tests.receiving import ENV, Network, eventually

pytestmark = pytest.mark.anyio


class Hands:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Books(PredictionStore):
    """A store in which a claim takes a while, as on a database server."""

    def __init__(self, store: Store, clock: Hands) -> None:
        super().__init__(store)
        self._clock = clock
        self.asked: list[float] = []
        self.takes = 0.0

    async def claim_due(self, provider: str, now: float, hold_until: float, most: int) -> list[Job]:
        self.asked.append(now)
        self._clock.now += self.takes
        return await super().claim_due(provider, now, hold_until, most)


@asynccontextmanager
async def polling(path: Path) -> AsyncIterator[tuple[Hands, Books, Poller]]:
    """Create the poller of one process among many; it does not run yet."""
    clock = Hands()
    store = SQLiteStore(str(path / "receiver.db"), lambda _: None)
    books = store.predictions = Books(store, clock)
    provider: Any = object()
    inbox: Any = object()
    runtime = Runtime(single_process=False, clock=clock, monotonic=clock, random=lambda: 0.5)
    schedule = Schedule(Settings.read(ENV), runtime)
    await store.start()
    yield (
        clock,
        books,
        Poller(
            store,
            inbox,
            {"fal": provider},
            {"fal"},
            {},
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


async def test_poll_that_falls_due_during_a_claim_is_made_next(tmp_path: Path) -> None:
    async with polling(tmp_path) as (clock, books, poller):
        poller.due(clock.now + 0.5)
        books.takes = 1.0  # so it falls due during the claim of earlier ones
        async with running(poller):
            await eventually(lambda: books.asked)
            assert books.asked[0] < 1000.5
            await eventually(lambda: books.asked[-1] >= 1000.5)


async def test_poll_that_falls_due_later_is_made_at_its_time(tmp_path: Path) -> None:
    async with polling(tmp_path) as (clock, books, poller):
        poller.due(clock.now + 0.2)
        poller.due(clock.now + 1000)
        async with running(poller):
            await eventually(lambda: books.asked)
            clock.now += 0.3
            await eventually(lambda: len(books.asked) == 2)
            poller.due(clock.now)
            await eventually(lambda: len(books.asked) == 3)


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
