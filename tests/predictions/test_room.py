"""Backpressure of a provider: a locked account, a full account, and the limits learnt from them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from receiver.emulator.faults import Rule
from receiver.emulator.inprocess import EmulatedProviders
from receiver.predictions.room import LEARNT_FOR, LOCKED, QUIET, Room
from tests.clocks import ManualClock
from tests.conftest import Start
from tests.receiving import OPTIONS, Clock, Network, Station, eventually

pytestmark = pytest.mark.anyio

LOCK = [Rule(fault="lock_account")]
SOON = {"RECEIVER_POLL_AFTER": "0.02"}


async def statuses(station: Station) -> list[str]:
    return [row[0] for row in station.rows("SELECT status FROM predictions ORDER BY id")]


async def locked(station: Station) -> tuple[Any, bool]:
    """Return the locked providers by /readyz, and whether /metrics has fal as locked."""
    ready = await station.world.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "ok")
    page = (await station.world.get("/metrics")).text
    return ready.json()["locked"], 'receiver_provider_locked{provider="fal"} 1.0' in page


# --- a locked account ---


@pytest.mark.both_engines
async def test_locked_account_queues_submits_and_is_reported(
    start: Start, network: Network
) -> None:
    network.emulator.faults.replace(LOCK)
    async with start() as station:
        for prompt in ("first", "second", "third"):
            assert (await station.submit("fal", prompt))["status"] == "queued"
        assert (await station.submit("eachlabs"))["status"] == "processing"
        assert network.count("fal.submit") == 1
        assert await locked(station) == (["fal"], True)
        reason = "SELECT error_message FROM predictions WHERE error_message IS NOT NULL"
        assert station.one(reason).startswith("User is locked. Reason: Exhausted balance.")
        assert station.count("events") == 0


async def test_locked_account_is_tested_by_one_submit_at_a_time_until_it_unlocks(
    start: Start, network: Network
) -> None:
    clock = Clock()
    network.emulator.faults.replace(LOCK)
    async with start(clock=clock) as station:
        began = clock()
        made = [await station.submit("fal", prompt) for prompt in ("first", "second", "third")]
        assert await locked(station) == (["fal"], True)
        # It is due after the next submit that tests the lock, as that one may be accepted.
        assert station.one("SELECT due_at FROM predictions WHERE submits > 0") > began + LOCKED
        clock.ahead += LOCKED + 1
        await station.http.post("/v1/drain?seconds=1")
        assert network.count("fal.submit") == 2
        network.emulator.faults.replace([])
        clock.ahead += LOCKED + 1
        await station.http.post("/v1/drain?seconds=1")
        clock.ahead += LOCKED + 1  # each also waits for its own due time
        await station.http.post("/v1/drain?seconds=1")
        for prediction in made:
            await station.until(prediction["id"], "processing")
        await eventually(lambda: locked(station), lambda said: said == ([], False))


async def test_locked_account_does_not_stop_polls(start: Start, network: Network) -> None:
    async with start(**SOON) as station:
        running = await station.submit("fal", "running")
        network.emulator.faults.replace(LOCK)
        await station.submit("fal", "refused")
        assert await locked(station) == (["fal"], True)
        network.always("fal.poll", network.ends)
        assert (await station.until(running["id"], "succeeded"))["channel"] == "poll"


async def test_blocking_call_to_a_locked_account_is_queued(start: Start, network: Network) -> None:
    network.emulator.faults.replace(LOCK)
    async with start() as station:
        prediction = await station.submit("fal", mode="sync", headers={"prefer": "wait=1"})
        await eventually(lambda: network.count("fal.run"))
        assert (await station.until(prediction["id"], "queued"))["error"] is None
        assert await locked(station) == (["fal"], True)


# --- a full account ---


def few(network: Network, clock: Clock, most: int, shut: float = 0) -> None:
    """Emulate an Eachlabs that takes `most` at once, and nothing for `shut` seconds after more."""
    options = msgspec.structs.replace(OPTIONS, eachlabs_in_flight=most, eachlabs_shut=shut)
    network.emulator = EmulatedProviders(clock, options)


@pytest.mark.both_engines
async def test_submit_refused_by_a_full_account_is_sent_when_another_ends(
    start: Start, network: Network
) -> None:
    few(network, Clock(), 2)
    async with start() as station:
        for number in range(5):
            await station.submit(prompt=f"{number}")
        assert sorted(await statuses(station)) == ["processing"] * 2 + ["queued"] * 3
        assert network.count("eachlabs.submit") == 3
        for ended in range(5):
            await eventually(lambda: len(network.sent) == min(ended + 2, 5))  # noqa: B023 - read at once
            network.emulator.end(network.sent[ended].prediction)
            await station.push(network.sent[ended])
        assert await statuses(station) == ["succeeded"] * 5
        assert network.count("eachlabs.submit") == 6  # the limit is learnt from one refusal


async def test_full_account_gets_no_submit_for_a_while_after_a_second_refusal(
    start: Start, network: Network
) -> None:
    clock = Clock()
    few(network, clock, 1, shut=60)
    async with start(clock=clock) as station:
        first = await station.submitted("eachlabs", "first")
        second = await station.submit(prompt="second")
        assert (second["status"], network.count("eachlabs.submit")) == ("queued", 2)
        network.emulator.end(first.prediction)
        await station.push(first)
        await eventually(lambda: network.count("eachlabs.submit") == 3)
        await station.until(second["id"], "queued")  # refused although nothing is in progress
        for _ in range(3):
            clock.ahead += QUIET / 4
            await station.http.post("/v1/drain?seconds=1")
        assert network.count("eachlabs.submit") == 3
        clock.ahead += QUIET / 4 + 1
        await station.http.post("/v1/drain?seconds=1")
        await station.until(second["id"], "processing")
        assert network.count("eachlabs.submit") == 4


async def test_reserved_balance_postpones_a_submit_and_an_empty_one_rejects_it(
    start: Start, network: Network
) -> None:
    network.emulator.faults.replace([Rule(fault="reserve_money")])
    async with start() as station:
        first = await station.submitted("eachlabs", "first")
        second = await station.submit(prompt="second")
        assert (second["status"], network.count("eachlabs.submit")) == ("queued", 2)
        network.emulator.end(first.prediction)
        await station.push(first)
        await station.until(second["id"], "processing")
        await station.push(network.of("second"))
        network.emulator.faults.replace([])
        refused = await station.submit(prompt="[refuse]")
        assert (refused["status"], refused["error"]["message"]) == (
            "failed",
            "payment required; the balance is used up",
        )


# --- limits learnt from refusals ---


def test_learnt_in_flight_limit_holds_for_a_while() -> None:
    clock = ManualClock()
    room = Room(clock)
    assert (room.in_flight(None), room.in_flight(10), room.wait()) == (None, 10, 0.0)
    room.note_full(3, clock.now, None)
    assert (room.in_flight(None), room.in_flight(10), room.in_flight(2)) == (3, 3, 2)
    assert (room.wait(), room.at_once(64)) == (0.0, 64)
    clock.now += LEARNT_FOR
    assert room.in_flight(10) == 3
    clock.now += 1
    assert room.in_flight(10) == 10


def test_concurrent_refusals_count_as_one_with_the_lowest_number() -> None:
    clock = ManualClock()
    room = Room(clock)
    began = clock.now
    for at_work in (9, 8, 2, 3):
        clock.now += 0.1
        room.note_full(at_work, began, None)
    assert (room.in_flight(10), room.wait()) == (2, 0.0)


def test_learnt_in_flight_limit_is_at_least_one() -> None:
    clock = ManualClock()
    room = Room(clock)
    room.note_full(0, clock.now, None)
    assert room.in_flight(None) == 1


def test_second_refusal_in_a_row_pauses_submits_unless_one_was_taken() -> None:
    clock = ManualClock()
    room = Room(clock)
    room.note_full(2, clock.now, None)
    clock.now += 5
    room.note_accepted(clock.now)
    clock.now += 5
    room.note_full(2, clock.now, None)
    assert room.wait() == 0.0
    clock.now += 5
    room.note_accepted(clock.now - 6)  # it was begun before the refusal, so it does not count
    room.note_full(2, clock.now, None)
    assert room.wait() == QUIET


def test_wait_given_by_a_refusal_is_not_shortened() -> None:
    clock = ManualClock()
    room = Room(clock)
    room.note_full(2, clock.now, 30.0)
    assert room.wait() == 30.0
    room.note_full(2, clock.now - 1, 5.0)
    assert room.wait() == 30.0


def test_lock_allows_one_submit_at_a_time_and_ends_with_a_later_accepted_one() -> None:
    clock = ManualClock()
    room = Room(clock)
    assert not room.note_accepted(clock.now)
    room.note_lock("User is locked")
    assert (room.locked, room.at_once(64), room.wait()) == ("User is locked", 1, LOCKED)
    assert not room.note_accepted(clock.now - 1)
    assert room.locked
    clock.now += LOCKED
    assert room.wait() == 0.0
    assert room.note_accepted(clock.now)
    assert (room.locked, room.at_once(64)) == ("", 64)
