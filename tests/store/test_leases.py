"""Leader election by leases: one process leads, another takes over, and the old leader stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from receiver.model.errors import StoreUnavailable
from receiver.model.tasks import Wakeups
from receiver.store import leases as module
from receiver.store.facade import Store
from receiver.store.leases import Leader, LeaseRequest, LeaseStore
from receiver.store.postgres.engine import PostgresStore
from receiver.store.postgres.queue import PgQueuerJobs
from receiver.store.sqlite.engine import SQLiteStore
from tests.patience import PATIENCE
from tests.postgres import Database
from tests.receiving import Clock, eventually

pytestmark = pytest.mark.anyio

NAME = "stream oxen"
LEASE: Final = 600.0
"""Seconds, more than a test takes: a lease expires only by its clock."""


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renew often, so that a test waits for nothing but its clock."""
    monkeypatch.setattr(module, "BEAT", 0.02)
    monkeypatch.setattr(module, "LEASE", LEASE)


@pytest.fixture(params=["sqlite", "postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    made: Store = SQLiteStore(str(tmp_path / "receiver.db"), lambda _: None)
    if request.param == "postgres":
        database: Database = request.getfixturevalue("database")
        jobs = PgQueuerJobs()
        made = PostgresStore(database.url, lambda _: None, jobs, access=database.made)
    await made.start()
    yield made
    await made.stop()


class Work:
    """A leader task that records whether it runs."""

    name = NAME

    def __init__(self, wakeups: Wakeups) -> None:
        self._wakeups = wakeups
        self.able = True
        self.begun = 0
        self.running = 0

    @property
    def at_work(self) -> bool:
        return bool(self.running) and self.able

    async def run(self) -> None:
        self.begun += 1
        self.running += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.running -= 1
            self.changed()

    def changed(self) -> None:
        self._wakeups.wake("role", NAME)


class FailingStore(LeaseStore):
    """The leases of the real store, with failures on request."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.away = False
        self.hangs = False
        self.deaf_to_leaving = False
        self.asked = 0

    def _check(self) -> None:
        self.asked += 1
        if self.away:
            raise StoreUnavailable("away")

    async def hold(self, request: LeaseRequest) -> bool:
        self._check()
        if self.hangs:
            await asyncio.Event().wait()
        return await super().hold(request)

    async def release(self, name: str, owner: str) -> None:
        self._check()
        if not self.deaf_to_leaving:
            await super().release(name, owner)

    async def is_at_work(self, name: str, now: float) -> bool:
        self._check()
        return await super().is_at_work(name, now)


class One:
    """A process with a leader task."""

    def __init__(self, store: Store, owner: str) -> None:
        self.roles = FailingStore(store)
        wakeups = Wakeups()
        self.work = Work(wakeups)
        self.clock = Clock()
        self.duty = Leader(owner, self.work, self.roles, wakeups, self.clock, self.clock)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self.duty.run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


@asynccontextmanager
async def two(store: Store) -> AsyncIterator[tuple[One, One]]:
    first, second = One(store, "first"), One(store, "second")
    first.start()
    await eventually(lambda: first.work.running)
    second.start()
    await eventually(lambda: second.roles.asked >= 3)
    yield first, second
    await first.stop()
    await second.stop()


async def test_only_one_of_two_processes_becomes_leader(store: Store) -> None:
    async with two(store) as (first, second):
        asked = second.roles.asked
        await eventually(lambda: second.roles.asked > asked + 3)
        assert (first.work.running, second.work.begun) == (1, 0)
        assert first.work.begun == 1  # a renewal does not restart it


async def test_stopping_leader_releases_its_lease_at_once(store: Store) -> None:
    async with two(store) as (first, second):
        await first.stop()
        assert first.work.running == 0
        await eventually(lambda: second.work.running)  # no clock was moved to the lease's end


async def test_another_process_takes_over_when_the_lease_of_a_dead_leader_expires(
    store: Store,
) -> None:
    async with two(store) as (first, second):
        first.roles.deaf_to_leaving = True
        await first.stop()
        asked = second.roles.asked
        await eventually(lambda: second.roles.asked > asked + 3)
        assert second.work.begun == 0
        second.clock.ahead = LEASE + 1
        await eventually(lambda: second.work.running)


async def test_frozen_leader_stops_when_it_finds_that_it_lost_its_lease(store: Store) -> None:
    async with two(store) as (first, second):
        first.roles.away = True  # as a frozen process, it renews nothing
        second.clock.ahead = LEASE + 1
        await eventually(lambda: second.work.running)
        assert first.work.running == 1
        first.clock.ahead = LEASE + 1
        first.roles.away = False
        await eventually(lambda: first.work.running == 0)
        assert second.work.running == 1
        # It becomes leader again when the other one stops.
        await second.stop()
        await eventually(lambda: first.work.running == 1)
        assert first.work.begun == 2


async def test_leader_works_until_its_lease_expires_while_the_store_is_unavailable(
    store: Store,
) -> None:
    async with two(store) as (first, _):
        first.roles.away = True
        asked = first.roles.asked
        await eventually(lambda: first.roles.asked > asked + 3)
        assert first.work.running == 1
        first.clock.ahead = LEASE + 1  # by now another process may hold the lease
        await eventually(lambda: first.work.running == 0)
        first.roles.away = False
        await eventually(lambda: first.work.running == 1)


async def test_leader_can_stop_while_the_store_is_unavailable(store: Store) -> None:
    async with two(store) as (first, _):
        first.roles.away = True
        async with asyncio.timeout(PATIENCE):
            await first.stop()
        assert first.work.running == 0


async def test_leader_that_is_unable_to_work_reports_it_and_keeps_its_lease(store: Store) -> None:
    async with two(store) as (first, second):
        assert await second.duty.ready()
        first.work.able = False
        first.work.changed()
        await eventually(lambda: _at_work(store, first), lambda found: not found)
        first.work.able = True
        first.work.changed()
        await eventually(lambda: _at_work(store, first))
        assert second.work.begun == 0


async def _at_work(store: Store, one: One) -> bool:
    return await store.leases.is_at_work(NAME, one.clock())


class TestReady:
    @pytest.fixture(autouse=True)
    def _impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_PATIENCE", 0.2)
        monkeypatch.setattr(module, "_PAUSE", 0.01)

    async def test_working_leader_is_ready_without_asking_the_store(self, store: Store) -> None:
        async with two(store) as (first, _):
            first.roles.away = True
            assert await first.duty.ready()

    async def test_ready_waits_until_another_process_is_at_work(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_PATIENCE", PATIENCE)
        one = One(store, "one")
        waiting = asyncio.create_task(one.duty.ready())
        await eventually(lambda: one.roles.asked >= 2)
        assert not waiting.done()
        other = One(store, "other")
        other.start()
        assert await waiting
        await other.stop()

    async def test_ready_times_out_and_later_calls_return_at_once(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loop = asyncio.get_running_loop()
        one = One(store, "one")
        began = loop.time()
        assert not await one.duty.ready()
        assert loop.time() - began >= 0.2
        asked = one.roles.asked
        for _ in range(3):
            assert not await one.duty.ready()
        assert one.roles.asked == asked + 3  # each call asked once, and did not wait
        other = One(store, "other")
        other.start()
        await eventually(one.duty.ready)
        await other.stop()
        # Once a process was at work, a later call waits again.
        monkeypatch.setattr(module, "_PATIENCE", PATIENCE)
        waiting = asyncio.create_task(one.duty.ready())
        asked = one.roles.asked
        other = One(store, "other")
        other.start()
        assert await waiting
        await other.stop()

    async def test_ready_waits_again_some_time_after_a_timeout(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_RESIGNED", 0.1)
        one = One(store, "one")
        assert not await one.duty.ready()
        asked = one.roles.asked

        async def waits_again() -> bool:
            before = one.roles.asked
            assert not await one.duty.ready()
            return one.roles.asked > before + 1

        await eventually(waits_again)
        assert one.roles.asked > asked + 1

    async def test_ready_is_false_while_the_store_is_unavailable(self, store: Store) -> None:
        one = One(store, "one")
        one.roles.away = True
        assert not await one.duty.ready()

    async def test_leader_with_an_expired_lease_is_not_at_work(self, store: Store) -> None:
        async with two(store) as (first, second):
            await eventually(second.duty.ready)
            first.roles.away = True
            second.clock.ahead = LEASE + 1
            second.roles.deaf_to_leaving = True
            await second.stop()
            await store.leases.release(NAME, "second")
            third = One(store, "third")
            third.clock.ahead = LEASE + 1
            assert not await third.duty.ready()


async def test_leader_whose_store_hangs_stops_when_its_lease_expires(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may then lead, and the store's answer may come only later."""
    monkeypatch.setattr(module, "LEASE", 0.3)
    one = One(store, "one")
    one.start()
    await eventually(lambda: one.work.running)
    one.roles.hangs = True
    for name in ("BEAT", "_ANSWER"):  # only the end of the lease may end the wait
        monkeypatch.setattr(module, name, 10 * PATIENCE)
    try:
        await eventually(lambda: not one.work.running)
    finally:
        await one.stop()


async def test_leases_of_different_names_are_independent(store: Store) -> None:
    now = 1000.0

    def role(name: str, owner: str, **more: Any) -> LeaseRequest:
        return LeaseRequest(
            **{"name": name, "owner": owner, "now": now, "until": now + LEASE, **more}
        )

    assert await store.leases.hold(role("a", "me"))
    assert await store.leases.hold(role("b", "you"))
    assert not await store.leases.hold(role("a", "you"))
    await store.leases.release("a", "you")  # of another owner: no effect
    assert not await store.leases.hold(role("a", "you", at_work=True))
    assert not await store.leases.is_at_work("a", now)
    assert await store.leases.hold(role("a", "me", at_work=True))
    assert await store.leases.is_at_work("a", now)
    assert not await store.leases.is_at_work("a", now + LEASE)
    assert await store.leases.hold(role("a", "you", now=now + LEASE, until=now + 2 * LEASE))
    assert not await store.leases.is_at_work("a", now + LEASE)  # the new owner is not yet
