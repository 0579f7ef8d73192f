"""Looking where others look too: a process sees by itself to what it has in hand."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from receiver.predictions.poller import Poller
from receiver.predictions.submitter import Schedule
from receiver.settings import Settings
from receiver.store.predictions import Job, Progress
from tests.receiving import ENV, eventually

pytestmark = pytest.mark.anyio


class Hands:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Books:
    """A store for which every question takes a while, as one on a server does."""

    def __init__(self, clock: Hands) -> None:
        self._clock = clock
        self.asked: list[float] = []
        self.takes = 0.0

    async def claim_due(self, provider: str, now: float, hold_until: float, most: int) -> list[Job]:
        del provider, hold_until, most
        self.asked.append(now)
        self._clock.now += self.takes
        return []

    async def next_due(self, provider: str) -> float | None:
        del provider
        return None

    async def stale(self, provider: str, before: float, most: int) -> list[str]:
        del provider, before, most
        return []

    async def find(self, provider: str, provider_id: str) -> str | None:
        raise AssertionError((provider, provider_id))

    async def progress(self, progress: Progress) -> bool:
        raise AssertionError(progress)


def overdue(clock: Hands, books: Books, *, alone: bool) -> Poller:
    provider: Any = object()
    inbox: Any = object()
    schedule = Schedule(Settings.read(ENV), clock, lambda: 0.5)
    return Poller(
        books,
        inbox,
        {"fal": provider},
        {"fal"},
        {},
        schedule,
        timeout=3600.0,
        clock=clock,
        alone=alone,
    )


async def test_what_falls_due_during_a_look_is_looked_at_next() -> None:
    clock = Hands()
    books = Books(clock)
    looking = overdue(clock, books, alone=False)
    looking.due(clock.now + 0.5)
    books.takes = 1.0  # so it falls due while the database is asked for what was due before
    task = asyncio.create_task(looking.run())
    try:
        await eventually(lambda: books.asked)
        assert books.asked[0] < 1000.5
        await eventually(lambda: books.asked[-1] >= 1000.5)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_falls_due_later_is_looked_at_then_and_not_before() -> None:
    clock = Hands()
    books = Books(clock)
    looking = overdue(clock, books, alone=False)
    looking.due(clock.now + 0.2)
    looking.due(clock.now + 1000)
    task = asyncio.create_task(looking.run())
    try:
        await eventually(lambda: books.asked)
        clock.now += 0.3
        await eventually(lambda: len(books.asked) == 2)
        looking.due(clock.now)
        await eventually(lambda: len(books.asked) == 3)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
