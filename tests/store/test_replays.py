"""Bulk replays: each event is replayed once, also after a crash, and none after a cancel."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from receiver.model.answers import Selection
from receiver.model.ids import delivery_id
from receiver.model.retry import DONE
from receiver.model.values import Recipients
from receiver.store import replays as module
from receiver.store.facade import Store
from receiver.store.inbox import CurrentState, accept_outcome
from receiver.store.replays import CountedReplay, Replays, ReplayStep, ReplayStepResult
from receiver.store.statement import Run, Statement
from tests.store.parts import (
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


def all_to(*handlers: str) -> Any:
    def choose(_known: CurrentState, _type: str, states: Mapping[str, str]) -> Recipients:
        return Recipients(tuple(name for name in handlers if states.get(name) != "pending"))

    return choose


async def counted(store: Store, replay_id: str = "rep_1", **given: Any) -> Replays:
    replays = Replays(store)
    first, last = await replays.bounds()
    given = {"events": 2, "matched": 2, "next": first, "last": last, "now": NOW, **given}
    await replays.create(CountedReplay(id=replay_id, wanted=Selection(state="dead"), **given))
    return replays


def step(begin: int, end: int, predictions: Sequence[str], **given: Any) -> ReplayStep:
    given = {"choose": all_to("greet"), "now": NOW + 100, **given}
    return ReplayStep(replay_id="rep_1", begin=begin, end=end, predictions=predictions, **given)


@pytest.mark.pooled
async def test_replay_step_makes_deliveries_pending_and_records_progress(engine: Engine) -> None:
    store = engine.store
    for number in (1, 2):
        claim = await claimed(store, number)
        await store.deliveries.remember(claim.id, "posted", "1")
        await store.settle(settlement(claim, GIVEN_UP))
    replays = await counted(store)
    assert await replays.start("rep_1")
    [running] = await replays.running()
    assert (running.id, running.wanted, running.next) == ("rep_1", Selection(state="dead"), 0)

    middle = running.last - 1
    assert await replays.take_step(step(0, middle, [pred(1)])) == ReplayStepResult(
        ("greet",), "running"
    )
    found = await replays.find("rep_1")
    assert found is not None
    assert (found.state, found.replayed, found.ended_at) == ("running", 1, None)
    last = step(middle, running.last, [pred(2)])
    assert await replays.take_step(last) == ReplayStepResult(("greet",), "done")
    found = await replays.find("rep_1")
    assert found is not None
    assert (found.state, found.replayed, found.matched, found.events) == ("done", 2, 2, 2)
    assert (found.wanted, found.ended_at) == ({"state": "dead"}, "2025-06-15T15:08:20Z")
    assert await replays.running() == []

    columns = "SELECT state, round, attempts, replay_id, reason FROM deliveries"
    assert engine.rows(columns) == [("pending", 1, 0, "rep_1", "replayed")] * 2
    assert engine.rows("SELECT * FROM steps") == []
    assert await replays.due("rep_1", NOW + 100, 10) == 2
    assert await replays.due("rep_1", NOW + 100, 1) == 1
    claims = (await store.claim(wanted(now=NOW + 101, lease_until=NOW + 130))).claims
    assert sorted((claim.id, claim.attempt, claim.round) for claim in claims) == [
        (delivery_id(pred(number), "greet"), 1, 1) for number in (1, 2)
    ]
    # A later replay of one prediction by hand replaces the id of the bulk replay.
    for claim in claims:
        await store.settle(settlement(claim, DONE, ended_at=NOW + 110))
    await store.deliveries.replay(pred(1), lambda *_: Recipients(("greet",)), NOW + 120)
    lineage = engine.rows("SELECT round, replay_id FROM deliveries ORDER BY id")
    assert lineage == [(2, None), (1, "rep_1")]


async def test_replay_step_that_fails_before_its_commit_changes_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = engine.store
    await store.settle(settlement(await claimed(store), GIVEN_UP))
    replays = await counted(store)
    await replays.start("rep_1")
    before = engine.dump()

    def fail(*_: object) -> None:
        raise RuntimeError("a fault after the last statement")

    with monkeypatch.context() as patch:
        patch.setattr(module, "ReplayStepResult", fail)
        with pytest.raises(RuntimeError, match="after the last statement"):
            await replays.take_step(step(0, 1, [pred(1)]))
    assert engine.dump() == before
    assert await replays.take_step(step(0, 1, [pred(1)])) == ReplayStepResult(("greet",), "done")


async def test_replay_step_from_another_position_changes_nothing(engine: Engine) -> None:
    store = engine.store
    await ended(store, 1)
    replays = await counted(store, last=9)
    before = step(0, 5, [pred(1)])
    assert (await replays.take_step(before)).state == "counted"  # the replay has not started
    await replays.start("rep_1")
    assert not await replays.start("rep_1")
    await replays.take_step(before)
    everything = engine.dump()
    for other in (before, step(1, 9, [pred(1)]), step(9, 9, [pred(1)])):
        assert await replays.take_step(other) == ReplayStepResult((), "running")
    assert engine.dump() == everything
    assert engine.rows("SELECT next, replayed FROM replays") == [(5, 1)]


async def test_canceled_replay_adds_no_more_deliveries(engine: Engine) -> None:
    store = engine.store
    for number in (1, 2):
        await ended(store, number)
    replays = await counted(store, last=9)
    await replays.start("rep_1")
    await replays.take_step(step(0, 5, [pred(1)]))
    assert await replays.cancel("rep_1", NOW + 200)
    assert not await replays.cancel("rep_1", NOW + 300)
    assert await replays.take_step(step(5, 9, [pred(2)])) == ReplayStepResult((), "canceled")
    assert [row[0] for row in engine.rows("SELECT prediction_id FROM deliveries")] == [pred(1)]
    found = await replays.find("rep_1")
    assert found is not None
    assert (found.state, found.replayed, found.ended_at) == ("canceled", 1, "2025-06-15T15:10:00Z")
    assert not await replays.start("rep_1")
    assert await replays.find("rep_2") is None
    assert not await replays.cancel("rep_2", NOW)


async def test_replay_skips_active_erased_and_unended_predictions(engine: Engine) -> None:
    store = engine.store
    await claimed(store, 2)
    await ended(store, 1, "greet")
    await ended(store, 3)
    await erase(store, 3)
    await processing(store, 4, "req-4")
    replays = await counted(store)
    await replays.start("rep_1")
    before = engine.dump()
    everyone: Any = lambda *_: Recipients(("greet",))  # noqa: E731
    every = [pred(number) for number in range(1, 6)]
    assert (await replays.take_step(step(0, 9, every, choose=everyone))).handlers == ()
    assert (await store.deliveries.replay(pred(3), everyone, NOW + 50)).pending == 0
    assert engine.dump() == {**before, "replays": engine.dump()["replays"]}
    assert engine.rows("SELECT replayed, next FROM replays") == [(0, 9)]


async def erase(store: Store, number: int) -> None:
    query = Statement("UPDATE predictions SET erased_at = :now::float WHERE id = :id")

    def erased(items: Sequence[str]) -> Any:
        for name in items:
            yield Run(query, {"id": name, "now": NOW})
        return [None] * len(items)

    await store.write(erased, pred(number))


async def test_replayed_handler_waits_again_for_the_handler_before_it(store: Store) -> None:
    await ended(store, 1, "save", "post", after={"post": ("save",)})
    for name in ("save", "post"):
        [claim] = (await store.claim(wanted(name, now=NOW + 22))).claims
        await store.settle(settlement(claim))
    replays = await counted(store)
    await replays.start("rep_1")
    both = Recipients(("post", "save"), {"post": ("save",)})
    stepped = await replays.take_step(step(0, 9, [pred(1)], choose=lambda *_: both))
    assert sorted(stepped.handlers) == ["post", "save"]
    later: dict[str, Any] = {"now": NOW + 101, "lease_until": NOW + 130}
    assert (await store.claim(wanted("post", **later))).claims == []
    [claim] = (await store.claim(wanted("save", **later))).claims
    await store.settle(settlement(claim, ended_at=NOW + 102))
    assert len((await store.claim(wanted("post", **later | {"now": NOW + 103}))).claims) == 1


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(NOW + seconds, UTC)


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ({}, [1, 2, 3, 4]),
        ({"since": at(20)}, [2, 3, 4]),
        ({"until": at(20)}, [1]),
        ({"since": at(20), "until": at(30)}, [2]),
        ({"provider": "eachlabs"}, [3]),
        ({"state": "dead"}, [2]),
        ({"state": "done"}, []),
        ({"since": datetime.min.replace(tzinfo=UTC)}, [1, 2, 3, 4]),
        ({"until": datetime.max.replace(tzinfo=UTC), "provider": "a\0b"}, []),
    ],
)
async def test_replay_search_finds_the_selected_events(
    store: Store, given: dict[str, Any], numbers: list[int]
) -> None:
    await looked_at(store)
    replays = Replays(store)
    first, last = await replays.bounds()
    page = await replays.candidates(Selection(**given), first, last, 10)
    assert [found.known.id for found in page.candidates] == [pred(number) for number in numbers]
    assert page.end == last


async def looked_at(store: Store) -> None:
    await ended(store, 1, "greet", "post")
    await ended(store, 2, "other", at=NOW + 20)
    [claim] = (await store.claim(wanted("other"))).claims
    await store.settle(settlement(claim, GIVEN_UP))
    await store.predictions.create(new(3, provider="eachlabs", metadata={"kind": "x\0y"}))
    await accept_outcome(store, arrival(3, "failed", provider="eachlabs", at=NOW + 30))
    await ended(store, 4, at=NOW + 40)
    await ended(store, 5, at=NOW + 50)
    await erase(store, 5)


async def test_replay_search_continues_where_the_last_one_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await looked_at(store)
    replays = Replays(store)
    _, last = await replays.bounds()
    for window, most in ((1, 10), (2, 1), (20_000, 2), (3, 2)):
        monkeypatch.setattr(module, "_WINDOW", window)
        at, found = 0, []
        while at < last:
            page = await replays.candidates(Selection(), at, last, most)
            assert at < page.end <= at + window
            found += page.candidates
            at = page.end
        assert [one.known.id for one in found] == [pred(number) for number in range(1, 5)]
        assert [one.states for one in found] == [
            {"greet": "pending", "post": "pending"}, {"other": "dead"}, {}, {},
        ]  # fmt: skip


async def test_only_the_newest_and_the_running_replays_are_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_KEPT", 3)
    replays = await counted(store, "rep_0")
    await replays.start("rep_0")
    for number in range(1, 6):
        await counted(store, f"rep_{number}")
    page = await replays.page(3, None)
    assert [one.id for one in page.data] == ["rep_5", "rep_4", "rep_3"]
    page = await replays.page(3, page.next_cursor)
    assert ([one.id for one in page.data], page.next_cursor) == (["rep_0"], None)
