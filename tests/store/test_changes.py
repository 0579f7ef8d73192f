"""The change log: every status change once, in commit order, with no later insertions."""

import asyncio
from typing import Final

import asyncpg
import pytest

from receiver.model.ids import event_id
from receiver.model.values import Status
from receiver.store.changes import ChangeLog, StatusChange
from receiver.store.facade import Store
from receiver.store.inbox import accept_outcome
from tests.receiving import eventually
from tests.store.parts import (
    NOW,
    Postgres,
    arrival,
    ended,
    new,
    pred,
    processing,
    stand,
    submitting,
)

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

WAYS: Final = {
    Status.QUEUED: ["queued"],
    Status.SUBMITTING: ["queued", "submitting"],
    Status.PROCESSING: ["queued", "submitting", "processing"],
    Status.UNCONFIRMED: ["queued", "submitting", "unconfirmed"],
    Status.SUCCEEDED: ["queued", "succeeded"],
}


async def moves(store: Store, after: int = 0) -> list[StatusChange]:
    log = ChangeLog(store)
    found, end = await log.page(after, await log.end())
    assert end == await log.end()
    return found


@pytest.mark.parametrize("status", WAYS)
async def test_every_status_change_is_logged_once(store: Store, status: Status) -> None:
    await stand(store, 1, status)
    found = await moves(store)
    assert [move.status for move in found] == WAYS[status]
    assert {move.prediction_id for move in found} == {pred(1)}
    assert [move.seq for move in found] == sorted({move.seq for move in found})


async def test_duplicate_outcome_and_hastened_poll_are_not_logged(store: Store) -> None:
    await ended(store, 1)
    before = await moves(store)
    await accept_outcome(store, arrival(1))
    await store.predictions.hasten("fal", NOW)
    assert await moves(store) == before


async def test_pages_have_no_gap_and_no_duplicate(store: Store) -> None:
    for number in range(80):
        await store.predictions.create(new(number))
    log = ChangeLog(store)
    end = await log.end()
    first, place = await log.page(0, end)
    second, last = await log.page(place, end)
    assert [move.prediction_id for move in first + second] == [pred(n) for n in range(80)]
    assert (len(first), last) == (50, end)


async def test_terminal_change_has_an_event_with_the_same_time_and_type(store: Store) -> None:
    await ended(store, 1)
    [*_, end] = await moves(store)
    [(name, event)] = (await ChangeLog(store).events([pred(1), pred(2)])).items()
    assert (name, event.id, event.type) == (pred(1), event_id(pred(1)), f"prediction.{end.status}")
    assert event.time.timestamp() == pytest.approx(end.time)
    assert event.prediction == await store.predictions.get(pred(1))


async def test_events_are_listed_newest_first(store: Store) -> None:
    for number in (3, 1, 2):
        await ended(store, number)
    await processing(store, 4, "req-4")
    log = ChangeLog(store)
    found = await log.events_below(None)
    assert [move.prediction_id for move in found] == [pred(2), pred(1), pred(3)]
    below = await log.events_below(found[0].seq)
    assert below == found[1:]


@pytest.mark.pooled
@pytest.mark.usefixtures("on_postgres")
async def test_log_end_waits_for_an_uncommitted_transaction_with_a_lower_number(
    engine: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite has one writer, so that numbers and commits have the same order."""
    store = engine.store
    looks: list[set[str]] = []
    look = store._writing  # noqa: SLF001 - nothing else shows how often it has looked

    async def counted() -> set[str]:
        looks.append(await look())
        return looks[-1]

    monkeypatch.setattr(store, "_writing", counted)
    slow = await asyncpg.connect(
        engine.database.url, server_settings={"search_path": "clock, receiver"}
    )
    try:
        transaction = slow.transaction()
        await transaction.start()
        await slow.execute(
            "INSERT INTO changes (prediction_id, status, time) VALUES ($1, 'queued', 0)", pred(9)
        )
        await submitting(store, 1)  # higher numbers, committed earlier
        end = asyncio.create_task(store.change_log_end())
        await eventually(lambda: engine.rows("SELECT count(*) FROM changes"), lambda n: n == [(2,)])
        await eventually(lambda: end.done() or len(looks) >= 3)
        assert not end.done()
        await transaction.commit()
        assert await end == 3
    finally:
        await slow.close()
    assert [move.status for move in await moves(store)] == ["queued", "submitting"]


@pytest.mark.usefixtures("on_postgres")
async def test_change_log_is_read_past_a_number_lost_in_a_rollback(engine: Postgres) -> None:
    """A rollback on SQLite returns the number."""
    await submitting(engine.store, 1)
    engine.database.execute(
        "BEGIN",
        "INSERT INTO receiver.changes (prediction_id, status, time) VALUES ('x', 'queued', 0)",
        "ROLLBACK",
    )
    await submitting(engine.store, 2)
    found = await moves(engine.store)
    assert [move.seq for move in found] == [1, 2, 4, 5]
    assert [move.prediction_id for move in found] == [pred(1)] * 2 + [pred(2)] * 2
