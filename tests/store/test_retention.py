"""Retention deletes old predictions in short turns, and an erase blanks one prediction."""

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from receiver import Context, Dead, Event, on
from receiver.model.errors import StoreUnavailable
from receiver.store.disposal import Disposal
from receiver.store.inbox import accept_outcome
from receiver.store.retention import UNNEEDED_KEPT, Retention, RetentionPace
from receiver.store.sqlite.engine import SQLiteStore
from tests.clocks import StoppedClock
from tests.conftest import Logged, Start
from tests.receiving import Clock, Network, Station, eventually, write
from tests.store.parts import NOW, SQLite, arrival, ended

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

DAY = 86400.0
MONTH = {"succeeded": 30.0, "failed": 30.0, "canceled": 30.0}


async def two_ended(station: Station) -> list[str]:
    sent = [await station.submitted("eachlabs", prompt) for prompt in ("first", "second")]
    for one in sent:
        assert (await station.push(one)).status_code == 200
    return [one.prediction_id for one in sent]


async def test_old_predictions_are_deleted_and_late_callbacks_accepted(
    start: Start, network: Network, logged: Logged
) -> None:
    async with start() as station:
        first, second = await two_ended(station)
    clock = Clock()
    clock.ahead = 2 * DAY
    async with start(clock=clock, RECEIVER_RETENTION_DAYS="succeeded=1") as station:
        path = f"/v1/predictions/{first}"
        await eventually(lambda: station.http.get(path), lambda answer: answer.status_code == 404)
        assert (await station.read(second))["status"] == "succeeded"  # the newest event stays
        await eventually(
            lambda: [line for line in logged if line["event"] == "predictions.deleted"]
        )
        letter = write(network, network.of("first"), ok=False)
        for _ in range(2):
            assert (await station.post(letter)).json() == {"status": "accepted"}
        kept = "SELECT verdict, repeats FROM callbacks WHERE prediction_id = ?"
        assert station.rows(kept, first) == [("unknown", 1)]
        assert [line["verdict"] for line in logged if line["event"] == "outcome.taken"][
            -1
        ] == "unknown"


@pytest.mark.usefixtures("on_sqlite")
async def test_predictions_without_a_retention_setting_are_kept(start: Start) -> None:
    async with start() as station:
        made = await two_ended(station)
    clock = Clock()
    clock.ahead = 1000 * DAY
    async with start(clock=clock, RECEIVER_RETENTION_DAYS="canceled=1") as station:
        await eventually(lambda: station.rows("SELECT * FROM watermarks WHERE name = 'retention'"))
        for one in made:
            assert (await station.read(one))["status"] == "succeeded"


# --- the pace ---


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[SQLite]:
    engine = SQLite(tmp_path / "receiver.db")
    await engine.store.start()
    yield engine
    await engine.store.stop()


def retention(
    engine: SQLite, clock: Clock, days: dict[str, float] = MONTH, **pace: Any
) -> Retention:
    pace = {"pause": 0.0, "nap": 0.0, **pace}
    return Retention(
        engine.store,
        days,
        7 * DAY,
        clock=clock,
        pace=RetentionPace(**pace),
    )


def count(engine: SQLite, table: str = "predictions") -> int:
    return int(engine.rows(f"SELECT count(*) FROM {table}")[0][0])


async def fill(engine: SQLite, many: int) -> None:
    for number in range(1, many + 1):
        await ended(engine.store, number)


async def test_retention_turn_is_bounded_and_the_next_one_continues(engine: SQLite) -> None:
    await fill(engine, 12)
    keeper = retention(engine, Clock(), turn=0.0, page=5, piece=0.0)
    left = [count(engine)]
    while left[-1] > 1:
        await keeper.take_turn()
        left.append(count(engine))
        assert len(left) < 100
    assert left[0] == 12
    assert all(before - after <= 5 for before, after in pairwise(left))


async def test_full_retention_walk_runs_once_an_hour_across_processes(engine: SQLite) -> None:
    clock = StoppedClock()  # the stored time is rounded by at most a second
    await retention(engine, clock).take_turn()
    await fill(engine, 3)
    await retention(engine, clock).take_turn()  # another process
    clock.ahead += 3599
    await retention(engine, clock).take_turn()
    assert count(engine) == 3
    clock.ahead += 2
    await retention(engine, clock).take_turn()
    assert count(engine) == 1


async def test_retention_continues_after_the_clock_was_far_ahead(engine: SQLite) -> None:
    clock = Clock()
    clock.ahead = 1000 * DAY
    keeper = retention(engine, clock)
    await keeper.take_turn()
    await fill(engine, 3)
    clock.ahead = 0
    await retention(engine, clock).take_turn()
    assert count(engine) == 1


async def test_change_log_and_unneeded_callbacks_are_trimmed_without_a_setting(
    engine: SQLite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.store.retention.UNNEEDED_KEPT", 2)
    assert UNNEEDED_KEPT == 10_000
    await fill(engine, 5)
    for number in range(7):
        await accept_outcome(
            engine.store, arrival(1, "failed", body=b"%d" % number, at=NOW + number)
        )
    await retention(engine, Clock(), {}, page=3).take_turn()
    assert count(engine) == 5
    assert count(engine, "callbacks WHERE verdict <> 'accepted'") == 2
    assert count(engine, "changes") == 1
    assert await Disposal(engine.store).watermark("changes") == 9


async def test_trimming_continues_over_many_short_turns(
    engine: SQLite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.store.retention.UNNEEDED_KEPT", 0)
    await fill(engine, 5)
    for number in range(7):
        await accept_outcome(engine.store, arrival(1, "failed", body=b"%d" % number))
    keeper = retention(engine, Clock(), {}, page=2, turn=0.0, piece=0.0)
    for _ in range(30):
        await keeper.take_turn()
    assert count(engine, "changes") == 1
    assert count(engine, "callbacks WHERE verdict <> 'accepted'") == 0


async def test_callback_of_an_unknown_prediction_is_deleted_by_retention(engine: SQLite) -> None:
    await accept_outcome(engine.store, arrival(1, at=NOW))
    clock = Clock()
    for days, left in ((29.0, 1), (31.0, 0)):
        clock.ahead = NOW - Clock()() + days * DAY
        await retention(engine, clock, {"succeeded": 30.0}).take_turn()
        assert count(engine, "callbacks") == 1  # failed ones are kept for good, and this may be one
        await retention(engine, clock).take_turn()
        assert count(engine, "callbacks") == left


async def test_retention_continues_after_errors(
    engine: SQLite, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(engine, 3)
    troubles: list[Exception] = [StoreUnavailable("no disk"), RuntimeError("a fault")]
    read = SQLiteStore.read

    async def troubled(*args: Any, **given: Any) -> Any:
        if troubles:
            raise troubles.pop(0)
        return await read(*args, **given)

    monkeypatch.setattr(SQLiteStore, "read", troubled)
    running = asyncio.create_task(retention(engine, Clock()).run())
    await eventually(lambda: count(engine), lambda left: left == 1)
    running.cancel()
    await asyncio.wait({running})


# --- erasing ---


@pytest.mark.usefixtures("on_sqlite")
async def test_erase_blanks_a_prediction_and_blocks_replay_retry_and_resubmit(
    start: Start, network: Network, logged: Logged
) -> None:
    @on("succeeded", name="bad")
    async def bad(event: Event) -> None:
        raise Dead(event.prediction.input["prompt"])

    async with start(bad) as station:
        key = {"Idempotency-Key": "order-1"}
        made = await station.submit("eachlabs", "sealing-wax", headers=key, metadata={"a": "b"})
        one = f"/v1/predictions/{made['id']}"
        refused = await station.http.post(f"{one}/erase")
        assert (refused.status_code, refused.json()["type"]) == (
            409,
            "urn:receiver:problem:not-ended",
        )
        await station.push(network.of("sealing-wax"))
        await eventually(lambda: station.rows("SELECT * FROM deliveries WHERE state = 'dead'"))
        before = await station.read(made["id"])
        assert before["erased_at"] is None
        erased = await station.http.post(f"{one}/erase")
        assert erased.status_code == 200
        after = await station.read(made["id"])
        assert erased.json() == after
        blank = {"input": {}, "metadata": {}, "output": [], "erased_at": after["erased_at"]}
        assert after == {**before, **blank}
        assert after["erased_at"].endswith("Z")
        assert [line["prediction"] for line in logged if line["event"] == "prediction.erased"] == [
            made["id"]
        ]
        assert (await station.http.post(f"{one}/erase")).json() == after
        [delivery] = (await station.http.get("/v1/deliveries")).json()["data"]
        assert delivery["reason"] == ""
        ways = [
            station.http.post(f"{one}/replay"),
            station.http.post(f"/v1/deliveries/{delivery['id']}/retry"),
            station.http.post(
                "/v1/predictions",
                headers=key,
                json={"provider": "eachlabs", "model": "m", "input": {"prompt": "sealing-wax"}},
            ),
        ]
        for way in ways:
            answer = await way
            assert answer.status_code == 409
            assert answer.json()["type"] == "urn:receiver:problem:erased"
        assert (await station.push(network.of("sealing-wax"))).json() == {"status": "duplicate"}
        assert network.count("eachlabs.submit") == 1
        assert isinstance(station.database, Path)
        for file in station.database.parent.glob("receiver.db*"):
            assert b"sealing-wax" not in file.read_bytes(), file


@pytest.mark.usefixtures("on_sqlite")
async def test_erase_is_rejected_while_a_handler_runs(start: Start) -> None:
    may_end = asyncio.Event()
    began = asyncio.Event()

    @on("succeeded", name="slow")
    async def slow(event: Event, ctx: Context) -> None:
        began.set()
        await may_end.wait()
        await ctx.annotate(seen=event.id)

    async with start(slow) as station:
        sent = await station.submitted("eachlabs")
        await station.push(sent)
        await began.wait()
        path = f"/v1/predictions/{sent.prediction_id}/erase"
        refused = await station.http.post(path)
        assert refused.status_code == 409
        assert refused.json()["type"] == "urn:receiver:problem:delivery-running"
        may_end.set()
        await eventually(lambda: station.http.post(path), lambda answer: answer.status_code == 200)
        assert (await station.http.post("/v1/predictions/pred_0/erase")).status_code == 404
