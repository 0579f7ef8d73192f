"""Retention: old predictions are deleted with all their rows; unfinished and pending ones stay."""

import asyncio
from collections.abc import Iterator

import pytest

from receiver.model.ids import oldest_id
from receiver.model.values import Recipients
from receiver.store.disposal import Cutoffs, DeleteBatch, DeleteResult, Disposal
from receiver.store.facade import Store
from receiver.store.inbox import accept_outcome
from tests.store.parts import (
    AGAIN,
    GIVEN_UP,
    NOW,
    Engine,
    arrival,
    claimed,
    ended,
    new,
    pred,
    processing,
    settlement,
    wanted,
)

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

OLD = Cutoffs(succeeded_before=NOW + 100, failed_before=NOW + 100, canceled_before=NOW + 100)
HORIZON = oldest_id("pred", NOW + 100)


async def dispose(store: Store, before: Cutoffs = OLD, most: int = 100) -> int:
    """Delete old predictions as retention does; return how many."""
    disposal = Disposal(store)
    cursor: str | None = ""
    deleted = 0
    while cursor is not None:
        rows, cursor = await disposal.old(cursor, HORIZON, before, most)
        while rows:
            gone = await disposal.delete(DeleteBatch(rows=rows, before=before, seconds=60.0))
            deleted += gone.deleted
            rows = rows[gone.handled :]
    return deleted


def left(engine: Engine) -> list[str]:
    return [row[0] for row in engine.rows("SELECT id FROM predictions ORDER BY id")]


async def newer(store: Store) -> None:
    """End one more prediction: the newest event always stays."""
    await ended(store, 999_999, at=NOW + 1000)


async def test_prediction_is_deleted_with_all_its_rows(engine: Engine, store: Store) -> None:
    claim = await claimed(store)
    await store.deliveries.remember(claim.id, "post", '"told"')
    await store.settle(settlement(claim))
    await accept_outcome(store, arrival(1, kind="failed"))
    await newer(store)
    assert await dispose(store) == 1
    assert left(engine) == [pred(999_999)]
    for table in ("events", "callbacks"):
        assert engine.rows(f"SELECT prediction_id FROM {table}") == [(pred(999_999),)]
    for table in ("deliveries", "attempts", "steps"):
        assert engine.rows(f"SELECT * FROM {table}") == []


async def test_only_predictions_that_ended_before_the_cutoff_are_deleted(
    engine: Engine, store: Store
) -> None:
    await ended(store, 1)
    await ended(store, 2, kind="failed")
    await ended(store, 3, kind="canceled")
    await ended(store, 4, at=NOW + 200)
    await processing(store, 5)
    await newer(store)
    assert await dispose(store, Cutoffs(failed_before=NOW + 9)) == 0
    assert await dispose(store, Cutoffs(failed_before=NOW + 10)) == 1
    assert await dispose(store, Cutoffs(canceled_before=NOW + 100)) == 1
    assert await dispose(store, OLD) == 1
    assert left(engine) == [pred(4), pred(5), pred(999_999)]


async def test_prediction_with_an_unfinished_delivery_is_not_deleted(
    engine: Engine, store: Store
) -> None:
    """The deliveries are pending, running, waiting for a retry or for another handler."""
    await ended(store, 1, "pending")
    await claimed(store, 2, "running")
    claim = await claimed(store, 3, "again")
    await store.settle(settlement(claim, AGAIN))
    await ended(store, 4, "first", "then", after={"then": ("first",)})
    [first] = (await store.claim(wanted("first"))).claims
    await store.settle(settlement(first))
    await newer(store)
    assert await dispose(store) == 0
    [then] = (await store.claim(wanted("then", now=NOW + 30))).claims
    await store.settle(settlement(then))
    assert await dispose(store) == 1
    assert pred(4) not in left(engine)


async def test_prediction_with_a_dead_delivery_stays_until_dead_before(
    engine: Engine, store: Store
) -> None:
    await store.settle(settlement(await claimed(store), GIVEN_UP))
    await newer(store)
    assert await dispose(store) == 0
    before = {"succeeded_before": NOW + 100}
    assert await dispose(store, Cutoffs(**before, dead_before=NOW + 20)) == 0
    assert await dispose(store, Cutoffs(**before, dead_before=NOW + 21)) == 1
    assert pred(1) not in left(engine)


async def test_child_prediction_stays_while_its_handler_may_retry_the_submit(
    engine: Engine, store: Store
) -> None:
    """Its idempotency key, which makes a second submit a duplicate, is deleted with it."""
    claim = await claimed(store)
    child = new(2, parent_id=pred(1), idempotency_key=f"{claim.id}/1", fingerprint="f")
    await store.predictions.create(child)
    await accept_outcome(store, arrival(2))
    await store.settle(settlement(claim, AGAIN))
    await newer(store)
    assert await dispose(store) == 0
    assert not (await store.predictions.create(child)).is_new
    [claim] = (await store.claim(wanted(now=NOW + 60, lease_until=NOW + 90))).claims
    await store.settle(settlement(claim))
    assert await dispose(store) == 2
    assert left(engine) == [pred(999_999)]


async def test_prediction_replayed_just_before_its_deletion_is_not_deleted(
    engine: Engine, store: Store
) -> None:
    """The deleting transaction checks again: a replay may follow the read of candidates."""
    await store.settle(settlement(await claimed(store)))
    await newer(store)
    disposal = Disposal(store)
    rows, _ = await disposal.old("", HORIZON, OLD, 100)
    assert rows == [(pred(1),)]
    replayed = await store.deliveries.replay(
        pred(1), lambda _known, _kind: Recipients(("greet",)), NOW + 50
    )
    assert replayed.pending == 1
    piece = DeleteBatch(rows=rows, before=OLD, seconds=60.0)
    assert await disposal.delete(piece) == DeleteResult(1, 0)
    assert pred(1) in left(engine)


async def test_newest_event_stays_so_that_no_event_number_is_used_twice(
    engine: Engine, store: Store
) -> None:
    await ended(store, 1)
    await ended(store, 2)
    assert await dispose(store) == 1
    await ended(store, 3)
    numbers = engine.rows("SELECT prediction_id, seq FROM events ORDER BY seq")
    assert numbers == [(pred(2), 2), (pred(3), 3)]


async def test_deletion_pages_through_candidates_and_skips_those_that_stay(
    engine: Engine, store: Store
) -> None:
    for number in range(1, 8):
        await ended(store, number, **({"kind": "failed"} if number % 2 else {}))
    await newer(store)
    assert await dispose(store, Cutoffs(succeeded_before=NOW + 100), most=2) == 3
    assert left(engine) == [pred(1), pred(3), pred(5), pred(7), pred(999_999)]


async def test_predictions_newer_than_the_horizon_are_not_candidates(store: Store) -> None:
    await ended(store, 1)
    await newer(store)
    assert await Disposal(store).old("", pred(1), OLD, 10) == ([], None)
    assert await Disposal(store).old(pred(1), HORIZON, OLD, 10) == ([], None)


async def test_delete_batch_ends_when_its_time_is_over(store: Store) -> None:
    for number in range(1, 9):
        await ended(store, number)
    await newer(store)
    ticks: Iterator[float] = iter([0.0, 0.4, 0.6])
    rows = [(pred(number),) for number in range(1, 9)]
    piece = DeleteBatch(rows=rows, before=OLD, seconds=1.0, clock=lambda: next(ticks))
    # One row, then two, and the time is over.
    assert await Disposal(store).delete(piece) == DeleteResult(3, 3)


async def test_idempotency_key_of_a_deleted_prediction_can_be_used_again(store: Store) -> None:
    keyed = new(1, idempotency_key="order-1", fingerprint="f")
    await store.predictions.create(keyed)
    await accept_outcome(store, arrival(1))
    await newer(store)
    await dispose(store)
    assert (
        await store.predictions.create(new(2, idempotency_key="order-1", fingerprint="f"))
    ).is_new


async def test_late_callback_of_a_deleted_prediction_is_unknown_and_stored(
    engine: Engine, store: Store
) -> None:
    await ended(store, 1)
    await newer(store)
    await dispose(store)
    taken = await accept_outcome(store, arrival(1, kind="failed"))
    assert (taken.verdict, taken.status) == ("unknown", None)
    rows = engine.rows("SELECT verdict FROM callbacks WHERE prediction_id = ?", pred(1))
    assert rows == [("unknown",)]


async def test_concurrent_deletes_and_accepts_neither_fail_nor_deadlock(
    engine: Engine, store: Store
) -> None:
    for number in range(1, 31):
        await ended(store, number)
    await newer(store)
    for number in range(101, 131):
        await store.predictions.create(new(number))
    late = [arrival(number, kind="failed") for number in range(1, 31)]
    fresh = [arrival(number, at=NOW + 500) for number in range(101, 131)]
    both = [one for pair in zip(late, fresh, strict=True) for one in pair]
    accepting = asyncio.gather(*(accept_outcome(store, one) for one in both))
    deleted, taken = await asyncio.gather(dispose(store), accepting)
    assert deleted == 30
    assert {one.verdict for one in taken[::2]} <= {"late", "unknown"}
    assert {one.verdict for one in taken[1::2]} == {"accepted"}
    assert len(left(engine)) == 31
    assert engine.reports == []


# --- the change log, and callbacks without effect ---


def times(engine: Engine, *given: float) -> None:
    """Set the times of the change log's rows, in their order."""
    for number, at in enumerate(given, 1):
        engine.write(f"UPDATE changes SET time = {at} WHERE seq = {number}")


async def test_change_log_is_trimmed_and_its_watermark_stored(engine: Engine, store: Store) -> None:
    for number in range(1, 5):
        await store.predictions.create(new(number))
    times(engine, 1.0, 2.0, 30.0, 4.0)
    disposal = Disposal(store)
    assert await disposal.trim_change_log(3.0, 1) == 1
    assert await disposal.watermark("changes") == 1
    assert await disposal.trim_change_log(3.0, 100) == 1
    assert await disposal.trim_change_log(3.0, 100) == 0
    assert await disposal.watermark("changes") == 2
    assert engine.rows("SELECT seq FROM changes ORDER BY seq") == [(3,), (4,)]


async def test_newest_row_of_the_change_log_stays(engine: Engine, store: Store) -> None:
    await store.predictions.create(new(1))
    await store.predictions.create(new(2))
    await Disposal(store).trim_change_log(NOW + 1, 100)
    await store.predictions.create(new(3))
    assert engine.rows("SELECT seq FROM changes ORDER BY seq") == [(2,), (3,)]
    assert await Disposal(store).watermark("changes") == 1


async def unneeded(store: Store, number: int, count: int, at: float = NOW) -> None:
    for turn in range(count):
        await accept_outcome(
            store, arrival(number, kind="processing", body=b"%d" % turn, at=at + turn)
        )


async def test_newest_callbacks_without_effect_stay(engine: Engine, store: Store) -> None:
    await ended(store, 1)
    await unneeded(store, 1, 4)
    disposal = Disposal(store)
    assert await disposal.unneeded(4, NOW, 10) == []
    rows = await disposal.unneeded(1, NOW, 2)
    assert len(rows) == 2
    await disposal.delete_callbacks(DeleteBatch(rows=rows, seconds=60.0))
    await disposal.delete_callbacks(
        DeleteBatch(rows=await disposal.unneeded(1, NOW, 9), seconds=60.0)
    )
    kept = engine.rows("SELECT received_at, verdict FROM callbacks ORDER BY received_at")
    assert kept == [(NOW + 3, "duplicate"), (NOW + 10, "accepted")]


@pytest.mark.parametrize(("young", "there"), [(NOW - 1, 0), (NOW, 3)])
async def test_all_callbacks_of_a_young_unfinished_prediction_stay(
    store: Store, young: float, there: int
) -> None:
    await processing(store, 1, provider_id=None)
    await unneeded(store, 1, 3)
    assert len(await Disposal(store).unneeded(0, young, 10)) == there


async def test_strays_are_old_callbacks_without_a_prediction(store: Store) -> None:
    await ended(store, 1)
    await accept_outcome(store, arrival(1, body=b"again"))
    await accept_outcome(store, arrival(2, at=NOW))
    await accept_outcome(store, arrival(3, at=NOW + 5))
    rows = await Disposal(store).orphans(NOW, 10)
    assert [row[0] for row in rows] == [pred(2)]


async def test_accepted_callback_is_never_deleted_as_unneeded(engine: Engine, store: Store) -> None:
    await ended(store, 1)
    rows = engine.rows("SELECT prediction_id, channel, digest FROM callbacks")
    await Disposal(store).delete_callbacks(DeleteBatch(rows=rows, seconds=60.0))
    assert len(engine.rows("SELECT * FROM callbacks")) == 1
