"""Discarded items: listed with their reasons, filtered, counted and bounded, on both engines."""

from typing import Any

import pytest

from receiver.model.answers import DiscardedItem
from receiver.model.ids import event_id
from receiver.model.values import Recipients
from receiver.store.discarded import MOST_REJECTIONS, OTHER, BadCursor, DiscardedItems, Rejection
from receiver.store.facade import Store
from receiver.store.inbox import accept_outcome
from tests.store.parts import NOW, Engine, arrival, ended, new, pred

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]


async def listed(store: Store, **given: Any) -> list[DiscardedItem]:
    return (await DiscardedItems(store).page(100, **given)).data


async def everything(store: Store) -> None:
    """Create items of every kind, the oldest first; a list has the newest first."""
    await ended(store, 1)  # unmatched, at NOW + 10
    await ended(store, 2, "greet", at=NOW + 20)
    for seconds in (30, 40):
        await accept_outcome(store, arrival(2, at=NOW + seconds))  # the same bytes
    await accept_outcome(store, arrival(2, at=NOW + 50, body=b"the same in other words"))
    await accept_outcome(store, arrival(2, "failed", at=NOW + 60, body=b"late"))
    await accept_outcome(store, arrival(9, at=NOW + 70, provider="eachlabs", body=b"whose?"))
    await DiscardedItems(store).count([Rejection("fal", "bad_token", "9.9.9.9", 3, NOW, NOW + 80)])


async def test_each_kind_of_discarded_item_has_its_reason_count_and_times(store: Store) -> None:
    await everything(store)
    rejected, unknown, late, same_end, same_bytes, unmatched = await listed(store)
    seen = [
        (one.kind, one.provider, one.channel, one.source, one.prediction_id, one.event_id)
        for one in (rejected, unknown, late, same_end, same_bytes, unmatched)
    ]
    second = (pred(2), event_id(pred(2)))
    assert seen == [
        ("rejected", "fal", None, "9.9.9.9", None, None),
        ("unknown", "eachlabs", "webhook", None, pred(9), None),
        ("late", "fal", "webhook", None, *second),
        ("duplicate", "fal", "webhook", None, *second),
        ("duplicate", "fal", "webhook", None, *second),
        ("unmatched", "fal", "webhook", None, pred(1), event_id(pred(1))),
    ]
    assert [one.times for one in (rejected, unknown, late, same_end, same_bytes, unmatched)] == [
        3, 1, 1, 1, 2, 1,
    ]  # fmt: skip
    assert rejected.reason == "bad_token"
    assert unknown.reason == "no such prediction"
    assert late.reason == "already succeeded, then told failed"
    assert unmatched.reason == "no handler wants prediction.succeeded of fal-ai/flux"
    times = (same_bytes.first_at, same_bytes.last_at)
    assert times == ("2025-06-15T15:07:00Z", "2025-06-15T15:07:20Z")
    assert same_end.first_at == same_end.last_at == "2025-06-15T15:07:30Z"


FILTERS: list[tuple[dict[str, Any], list[str]]] = [
    ({"kind": "duplicate"}, ["duplicate", "duplicate"]),
    ({"kind": "late"}, ["late"]),
    ({"kind": "unknown"}, ["unknown"]),
    ({"kind": "rejected"}, ["rejected"]),
    ({"kind": "unmatched"}, ["unmatched"]),
    ({"provider": "eachlabs"}, ["unknown"]),
    ({"provider": "fal"}, ["rejected", "late", "duplicate", "duplicate", "unmatched"]),
    ({"prediction": pred(2)}, ["late", "duplicate", "duplicate"]),
    ({"prediction": pred(1)}, ["unmatched"]),
    ({"prediction": pred(9), "kind": "unknown"}, ["unknown"]),
    ({"prediction": pred(2), "kind": "rejected"}, []),
    ({"provider": "oxen"}, []),
]


async def test_filters_select_by_kind_provider_and_prediction(store: Store) -> None:
    await everything(store)
    for given, kinds in FILTERS:
        assert [one.kind for one in await listed(store, **given)] == kinds, given


async def test_pages_have_no_gap_and_no_duplicate(store: Store) -> None:
    for number in range(7):
        await ended(store, number)  # all at one time
        await accept_outcome(store, arrival(number, "failed", at=NOW + 10, body=b"late"))
    rejections = [Rejection("fal", "bad_token", f"1.1.1.{n}", 1, NOW, NOW + 10) for n in range(7)]
    await DiscardedItems(store).count(rejections)
    whole = await listed(store)
    assert len(whole) == 21
    found: list[DiscardedItem] = []
    cursor = None
    while True:
        page = await DiscardedItems(store).page(4, cursor=cursor)
        found += page.data
        if (cursor := page.next_cursor) is None:
            break
    assert found == whole


STRANGE = ("?", "=", "é", "1", "_61", "1e9_61", "-1_61", "1_6", "1_" + "61" * 501)


async def test_malformed_cursor_is_rejected(store: Store) -> None:
    for cursor in STRANGE:
        with pytest.raises(BadCursor):
            await DiscardedItems(store).page(1, cursor=cursor)


async def test_well_formed_cursor_with_any_values_is_accepted(store: Store) -> None:
    await everything(store)
    for cursor in ("0_61", "999999999999.999999999_", "99999999999_00ff61"):
        assert len((await DiscardedItems(store).page(10, cursor=cursor)).data) in {0, 6}


async def test_rejection_counts_add_up_by_provider_reason_and_source(engine: Engine) -> None:
    discarded = DiscardedItems(engine.store)
    first = Rejection("fal", "bad_token", "1.1.1.1", 2, NOW, NOW + 1)
    other = Rejection("fal", "stale", "1.1.1.1", 1, NOW + 2, NOW + 2)
    again = Rejection("fal", "bad_token", "1.1.1.1", 5, NOW + 3, NOW + 4)
    await discarded.count([first, other, again])
    await discarded.count([again])
    rows = engine.rows("SELECT * FROM rejections ORDER BY reason")
    assert rows == [
        ("fal", "bad_token", "1.1.1.1", 12, NOW, NOW + 4),
        ("fal", "stale", "1.1.1.1", 1, NOW + 2, NOW + 2),
    ]


async def test_number_of_rejection_rows_is_bounded_and_old_rows_are_deleted(engine: Engine) -> None:
    discarded = DiscardedItems(engine.store)
    crowd = [
        Rejection("fal", "bad_token", f"1.1.{n // 256}.{n % 256}", 1, NOW, NOW)
        for n in range(MOST_REJECTIONS + 20)
    ]
    await discarded.count(crowd)
    await discarded.count(crowd)
    assert engine.rows("SELECT count(*), sum(times) FROM rejections") == [
        (MOST_REJECTIONS + 1, 2 * len(crowd))
    ]
    [(others,)] = engine.rows("SELECT times FROM rejections WHERE source = ?", OTHER)
    assert others == 2 * 20
    month = NOW + 31 * 86400
    await discarded.count([Rejection("fal", "bad_token", "9.9.9.9", 1, month, month)])
    assert engine.rows("SELECT source FROM rejections") == [("9.9.9.9",)]


async def test_event_is_unmatched_until_a_replay_finds_a_handler(engine: Engine) -> None:
    store = engine.store
    await ended(store, 1)
    await ended(store, 2, "greet")
    await store.predictions.create(new(3))
    marks = "SELECT prediction_id FROM events WHERE unmatched = 1"
    assert engine.rows(marks) == [(pred(1),)]
    await store.deliveries.replay(pred(1), lambda *_: Recipients(()), NOW + 30)
    assert engine.rows(marks) == [(pred(1),)]
    await store.deliveries.replay(pred(1), lambda *_: Recipients(("greet",)), NOW + 30)
    assert engine.rows(marks) == []
    assert await listed(store) == []
