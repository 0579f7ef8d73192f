"""The circuit breaker and the pause of a handler: deliveries wait, and none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from receiver import Context, Dead, Event, Retry, Skip, on
from receiver.deliveries.breaker import BreakerCache, BreakerPolicy, HandlerBreaker
from receiver.deliveries.heartbeat import Timing
from receiver.model.errors import StoreUnavailable
from receiver.model.retry import Failure
from receiver.store.breakers import Breakers, BreakerState
from tests.conftest import Logged
from tests.deliveries.parts import Dispatching, FailingStore, dispatching, eventually
from tests.patience import PATIENCE
from tests.postgres import Database

pytestmark = pytest.mark.anyio

RUN: Final = 5
BREAKER: Final = BreakerPolicy(failures=RUN, first_wait=0.8, longest_wait=2.0)
PATIENT: Final = Retry(attempts=1000, base=0.01, cap=0.01)


class Service:
    """The service that a test's handler calls: it raises `down` until that is None."""

    def __init__(self) -> None:
        self.down: Exception | None = ConnectionError("nobody there")
        self.calls = 0
        self.served: list[str] = []
        self.at_once = 0
        self.most_at_once = 0

    async def call(self, event: Event) -> None:
        self.calls += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        if self.down is not None:
            raise self.down
        self.served.append(event.prediction.id)


def handler_of(service: Service, **options: Any) -> Callable[..., Any]:
    @on("*", name="post", retry=PATIENT, **options)
    async def post(event: Event, _: Context) -> None:
        await service.call(event)

    return post


async def pending(station: Dispatching, count: int) -> list[str]:
    return [await station.enqueue("post") for _ in range(count)]


def said(logged: Logged, event: str) -> list[Any]:
    return [line for line in logged if line["event"] == event]


async def test_breaker_opens_after_a_run_of_failures_and_probes_one_delivery(
    place: Path | Database, logged: Logged
) -> None:
    service = Service()
    async with dispatching(place, handler_of(service, concurrency=4), breaker=BREAKER) as station:

        async def rest() -> int:
            """Wait until no claim and no attempt is under way; return the number of calls."""
            until = asyncio.get_running_loop().time() + PATIENCE
            await station.dispatch.drain(["post"], until, PATIENCE)
            return service.calls

        def move(seconds: float) -> None:
            station.clock.ahead += seconds
            station.dispatch.refresh()

        station.clock.stand()
        names = await pending(station, 12)
        await eventually(lambda: said(logged, "handler.held"))
        [line] = said(logged, "handler.held")
        assert line["log_level"] == "warning"
        assert (line["handler"], line["cause"], line["probe_in"]) == (
            "post",
            "5 failures in a row",
            0.8,
        )
        assert "nobody there" in line["reason"]
        breaker = (await station.breakers.all())["post"]
        assert breaker.state(station.clock()) == "open"
        calls = await rest()
        move(0.7)
        assert await rest() == calls  # too early for a probe
        move(0.2)
        await eventually(lambda: len(said(logged, "handler.held")) == 2)  # the probe failed
        assert await rest() == calls + 1
        assert said(logged, "handler.held")[1]["probe_in"] == 1.6  # twice as long
        service.down = None
        move(1.5)
        assert await rest() == calls + 1
        move(0.2)
        for name in names:
            await station.ends(name, "post", "done")
        assert sorted(service.served) == sorted(names)
        assert len(said(logged, "handler.released")) == 1
        assert (await station.breakers.all())["post"].state(station.clock()) == "running"


async def test_one_always_failing_delivery_does_not_open_the_breaker(
    place: Path | Database,
) -> None:
    service = Service()

    @on("*", name="post", retry=Retry(attempts=30, base=0.0, cap=0.0))
    async def post(event: Event) -> None:
        if event.prediction.metadata:
            await service.call(event)

    async with dispatching(place, post, breaker=BREAKER) as station:
        poison = await station.enqueue("post", metadata={"poison": True})
        assert (await station.ends(poison, "post")).state == "dead"
        assert service.calls == 30
        assert await station.breakers.all() == {}


@pytest.mark.parametrize("decision", [Skip("no"), Dead("never"), Retry("later", after=0)])
async def test_skip_dead_and_retry_after_do_not_open_the_breaker(
    place: Path | Database, decision: Exception
) -> None:
    service = Service()
    service.down = decision
    handler = handler_of(service)
    async with dispatching(place, handler, breaker=BREAKER, start=False) as station:
        await station.dispatch.start()
        names = await pending(station, 8)
        for name in names:
            await eventually(partial(has_ended_once, station, name))
        await station.dispatch.stop()  # waits until the breaker has counted these attempts
        assert await station.breakers.all() == {}


async def has_ended_once(station: Dispatching, name: str) -> bool:
    return bool((await station.delivery(name, "post")).history)


async def test_disabled_breaker_never_opens(place: Path | Database) -> None:
    service = Service()
    never = BreakerPolicy(failures=None)
    async with dispatching(place, handler_of(service), breaker=never) as station:
        await pending(station, 10)
        await eventually(lambda: service.calls > 50)
        assert await station.breakers.all() == {}


async def test_disabled_breaker_ignores_an_open_breaker_in_the_store(
    place: Path | Database,
) -> None:
    """An earlier or another process, whose breaker was enabled, had opened it."""
    service = Service()
    function, never = handler_of(service, concurrency=4), BreakerPolicy(failures=None)
    async with dispatching(place, function, breaker=never, start=False) as station:
        await station.breakers.trip("post", station.clock(), station.clock() + 3600, "it was down")
        names = await pending(station, 4)
        await station.dispatch.start()
        await eventually(lambda: service.calls > 20)
        service.down = None
        for name in names:
            await station.ends(name, "post", "done")
        await station.dispatch.stop()
        assert (await station.breakers.all())["post"].held is None


async def test_success_resets_the_run_of_failures(place: Path | Database) -> None:
    calls = 0

    @on("*", name="post", retry=PATIENT, concurrency=1)
    async def post(_: Event) -> None:
        nonlocal calls
        calls += 1
        if calls % RUN:  # four in a row, and then a success
            raise ConnectionError

    async with dispatching(place, post, breaker=BREAKER) as station:
        for name in await pending(station, 6):
            await station.ends(name, "post", "done")
        assert calls == 6 * RUN
        assert await station.breakers.all() == {}


async def test_paused_handler_keeps_its_deliveries_pending_and_runs_none(
    place: Path | Database,
) -> None:
    service = Service()
    service.down = None
    async with dispatching(place, handler_of(service), start=False) as station:
        await station.breakers.pause("post", station.clock())
        await station.dispatch.start()
        names = await pending(station, 5)
        loop = asyncio.get_running_loop()
        await station.dispatch.drain(["post"], loop.time() + 5, 5.0)
        assert service.calls == 0
        assert {(await station.delivery(name, "post")).state for name in names} == {"pending"}
        await station.breakers.resume("post")
        station.dispatch.refresh()
        for name in names:
            await station.ends(name, "post", "done")
        assert service.calls == 5
        await station.dispatch.stop()


async def test_stored_pause_applies_to_another_process_until_resumed(
    place: Path | Database, logged: Logged
) -> None:
    service = Service()
    service.down = None
    async with dispatching(place, handler_of(service), start=False) as station:
        await station.breakers.pause("post", station.clock())
        await station.dispatch.start()
        name = await station.enqueue("post")
        other = station.another("other")
        await other.start()
        try:
            *_, line = said(logged, "handler.waiting")
            assert (line["handler"], line["state"], line["pending"]) == ("post", "paused", 1)
            assert (await station.delivery(name, "post")).state == "pending"
            await station.breakers.resume("post")  # without a wake-up: the workers poll
            await station.ends(name, "post", "done")
        finally:
            await other.stop()
            await station.dispatch.stop()


async def test_only_one_of_two_processes_probes(
    place: Path | Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.deliveries.breaker._FRESH", 0.01)
    service = Service()
    slow = BreakerPolicy(failures=5, first_wait=0.2, longest_wait=0.2)
    async with dispatching(place, handler_of(service), breaker=slow) as station:
        other = station.another("other")
        await other.start()
        try:
            names = await pending(station, 10)
            await eventually(lambda: service.at_once == 0 and service.calls > 5)

            async def is_open() -> bool:
                breakers = await station.breakers.all()
                return "post" in breakers and breakers["post"].failures >= 2

            await eventually(is_open)
            service.most_at_once = 0
            calls = service.calls
            await eventually(lambda: service.calls >= calls + 3)
            assert service.most_at_once == 1
            service.down = None
            for name in names:
                await station.ends(name, "post", "done")
        finally:
            await other.stop()
        assert sorted(service.served) == sorted(names)


async def test_expired_probe_can_be_taken_by_another_process(place: Path | Database) -> None:
    service = Service()
    service.down = None
    async with dispatching(place, handler_of(service), start=False) as station:
        now = station.clock()
        assert await station.breakers.trip("post", now, now + 1, "")
        assert not await station.breakers.trip("post", now, now + 9, "")  # open already
        assert not await station.breakers.probe("post", now, now + 2)  # not due yet
        assert await station.breakers.probe("post", now + 1, now + 2)
        assert not await station.breakers.probe("post", now + 1.5, now + 3)  # probed already
        assert await station.breakers.probe("post", now + 2, now + 3)
        assert await station.breakers.reset("post")
        assert not await station.breakers.reset("post")


@pytest.mark.parametrize("in_a_probe", [False, True])
async def test_start_probes_an_open_breaker_at_once(
    place: Path | Database, in_a_probe: bool
) -> None:
    service = Service()
    service.down = None
    async with dispatching(place, handler_of(service), start=False) as station:
        now = station.clock()
        await station.breakers.trip("post", now, now if in_a_probe else now + 3600, "")
        if in_a_probe:  # of a process that was killed during it
            assert await station.breakers.probe("post", now, now + 3600)
        name = await station.enqueue("post")
        await station.dispatch.start()
        try:
            await station.ends(name, "post", "done")
        finally:
            await station.dispatch.stop()


@pytest.mark.parametrize("decision", [Dead("never"), Retry("later", after=60)])
async def test_inconclusive_probe_is_followed_by_another(
    place: Path | Database, decision: Exception
) -> None:
    calls = 0

    @on("*", name="post")
    async def post(_: Event) -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise decision

    async with dispatching(place, post, start=False) as station:
        now = station.clock()
        await station.breakers.trip("post", now, now + 3600, "it was down")
        names = await pending(station, 3)
        await station.dispatch.start()
        try:

            async def one_is_done() -> bool:
                states = [(await station.delivery(name, "post")).state for name in names]
                return states.count("done") == 1

            await eventually(one_is_done)
            assert calls == 3

            async def is_released() -> bool:
                return (await station.breakers.all())["post"].held is None

            await eventually(is_released)
        finally:
            await station.dispatch.stop()


async def probing(station: Dispatching) -> HandlerBreaker:
    """Return an open breaker whose probe is the delivery `dlv_1`."""
    now = station.clock()
    await station.breakers.trip("post", now - 1, now, "it was down")
    known = BreakerCache(station.breakers, station.clock)
    breaker = HandlerBreaker("post", 60.0, station.breakers, known, BREAKER, station.clock)
    assert (await breaker.ask(4, 1.0)).is_probe
    breaker.began("dlv_1")
    return breaker


async def test_asking_the_breaker_during_a_probe_does_not_end_the_probe(
    place: Path | Database,
) -> None:
    async with dispatching(place, start=False) as station:
        breaker = await probing(station)
        assert (await breaker.ask(3, 1.0)).most == 0
        await breaker.record("dlv_1", Failure(kind="dead"))
        assert (await breaker.ask(4, 1.0)).is_probe


async def test_only_the_probe_opens_an_open_breaker_again(place: Path | Database) -> None:
    async with dispatching(place, start=False) as station:
        breaker = await probing(station)
        failure = Failure(kind="error", reason="refused")
        await breaker.record("dlv_2", failure)  # its attempt began before the breaker opened
        assert (await station.breakers.all())["post"].failures == 1
        await breaker.record("dlv_1", failure)
        assert (await station.breakers.all())["post"].failures == 2


async def test_probe_that_outlasted_its_time_does_not_end_a_later_one(
    place: Path | Database,
) -> None:
    async with dispatching(place, start=False) as station:
        now = station.clock()
        await station.breakers.trip("post", now - 1, now, "it was down")
        assert await station.breakers.probe("post", now, now + 60)
        assert await station.breakers.probe("post", now + 60, now + 120)
        await station.breakers.end_probe("post", now + 60)
        assert (await station.breakers.all())["post"].probe_until == now + 120
        await station.breakers.end_probe("post", now + 120)
        assert (await station.breakers.all())["post"].probe_until is None


@pytest.mark.parametrize("away", [["claim"], ["claim", "end_probe"], ["reset"]], ids="+".join)
async def test_probe_interrupted_by_a_full_disk_is_followed_by_another(
    place: Path | Database, away: list[str]
) -> None:
    service = Service()
    service.down = None
    async with dispatching(place, handler_of(service), start=False) as station:
        await station.breakers.trip("post", station.clock(), station.clock() + 3600, "it was down")
        names = await pending(station, 2)
        troubles: dict[str, list[Exception]] = {name: [StoreUnavailable("full")] for name in away}
        store: Any = FailingStore(station.store, **troubles)
        store.breakers = FailingStore(station.breakers, **troubles)
        dispatch = station.another("me too", store=store)
        await dispatch.start()
        try:
            for name in names:
                await station.ends(name, "post", "done")
        finally:
            await dispatch.stop()
        assert not any(troubles.values())
        assert (await station.breakers.all())["post"].held is None


async def test_stop_releases_a_probe_under_way(place: Path | Database) -> None:
    begun = asyncio.Event()

    @on("*", name="post", timeout=3600)
    async def post(_: Event) -> None:
        begun.set()
        await asyncio.sleep(3600)

    pace = Timing(beat=0.05, nap=0.2, drain=0.05)
    async with dispatching(place, post, pace=pace, start=False) as station:
        await station.breakers.trip("post", station.clock(), station.clock() + 3600, "it was down")
        await station.enqueue("post")
        await station.dispatch.start()
        async with asyncio.timeout(PATIENCE):
            await begun.wait()
        assert (await station.breakers.all())["post"].probe_until is not None
        await station.dispatch.stop()
        assert (await station.breakers.all())["post"].probe_until is None


async def test_breaker_state_read_before_a_change_is_not_cached(
    place: Path | Database,
) -> None:
    async with dispatching(place, handler_of(Service()), start=False) as station:

        class Slow(Breakers):
            """Returns a state that may have changed since it was read."""

            async def all(self) -> dict[str, BreakerState]:
                found = await super().all()
                asked.set()
                await read.wait()
                return found

        asked, read = asyncio.Event(), asyncio.Event()
        known = BreakerCache(Slow(station.store), station.clock)
        asking = asyncio.create_task(known.of("post"))
        await asked.wait()
        await station.breakers.pause("post", station.clock())
        known.forget()
        read.set()
        await asking
        assert (await known.of("post")).held == "paused"


@pytest.mark.parametrize("most", [1, 2])
async def test_breaker_can_open_after_one_or_two_failures(
    place: Path | Database, most: int
) -> None:
    service = Service()
    short = BreakerPolicy(failures=most, first_wait=3600)
    async with dispatching(place, handler_of(service), breaker=short) as station:
        await pending(station, most)

        async def is_open() -> bool:
            return (await station.breakers.all())["post"].reason == "ConnectionError: nobody there"

        await eventually(lambda: service.calls >= most)
        await eventually(station.breakers.all)
        assert await is_open()
