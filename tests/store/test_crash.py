"""Crash consistency: a kill or an error at any statement leaves all of a transaction or none."""

import asyncio
import os
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from receiver.model.answers import Selection
from receiver.model.errors import StoreUnavailable
from receiver.model.retry import DONE
from receiver.model.values import Recipients
from receiver.store.facade import Store
from receiver.store.inbox import accept_outcome
from receiver.store.replays import CountedReplay, Replays, ReplayStep
from receiver.store.sqlite.engine import SQLiteStore
from tests.forked import run_to_end
from tests.store.parts import (
    AGAIN,
    GIVEN_UP,
    NOW,
    SQLite,
    Watch,
    arrival,
    claimed,
    copy,
    dump,
    ended,
    new,
    pred,
    processing,
    progress,
    settlement,
    slots,
    submitting,
    wanted,
)

pytestmark = pytest.mark.anyio

Act = Callable[[], Awaitable[Any]]


async def creating(store: Store) -> Act:
    await store.predictions.create(new(1, idempotency_key="k"))
    return lambda: asyncio.gather(
        store.predictions.create(new(2, idempotency_key="k")),
        store.predictions.create(new(3)),
        store.predictions.create(new(4)),
    )


async def beginning(store: Store) -> Act:
    for number in range(3):
        await store.predictions.create(new(number))
    return lambda: asyncio.gather(
        store.predictions.begin_submits(slots(most=1)),
        store.predictions.begin_submits(slots(max_in_flight=2)),
    )


async def progressing(store: Store) -> Act:
    for number in range(4):
        await submitting(store, number)
    return lambda: asyncio.gather(
        store.predictions.progress(progress(0, "accepted", NOW + 30, provider_id="req-0")),
        store.predictions.progress(progress(1, "postponed", NOW + 30)),
        store.predictions.progress(progress(2, "ambiguous", NOW + 30)),
        store.predictions.progress(progress(3, "polled", NOW + 30)),
    )


async def accepting(store: Store) -> Act:
    for number in range(4):
        await submitting(store, number)
    return lambda: asyncio.gather(
        accept_outcome(store, arrival(0, handlers=("a", "b"), provider_id="req-0")),
        accept_outcome(store, arrival(0, handlers=("a", "b"), provider_id="req-0")),
        accept_outcome(store, arrival(1, "failed", handlers=("a",), body=b"\xff" * 40_000)),
        accept_outcome(store, arrival(1, "succeeded")),
        accept_outcome(store, arrival(2, "ask", provider_id="req-2")),
        accept_outcome(store, arrival(404)),
    )


async def claiming(store: Store) -> Act:
    for number in range(3):
        await ended(store, number, "greet", "other")
    return lambda: asyncio.gather(store.claim(wanted(most=2)), store.claim(wanted("other")))


async def settling(store: Store) -> Act:
    for number in range(3):
        await ended(store, number, "greet")
    claims = (await store.claim(wanted())).claims
    return lambda: asyncio.gather(
        *(
            store.settle(settlement(claim, decision))
            for claim, decision in zip(claims, (DONE, AGAIN, GIVEN_UP), strict=True)
        )
    )


async def releasing(store: Store) -> Act:
    await claimed(store)
    return lambda: store.release("me", NOW + 30)


async def reclaiming(store: Store) -> Act:
    await claimed(store)
    return lambda: store.reclaim("other", NOW + 50)


async def renewing(store: Store) -> Act:
    claim = await claimed(store)

    async def renew() -> None:
        store.renew("me", [claim.id], NOW + 99)
        await store.try_write(NOW)

    return renew


async def replaying(store: Store) -> Act:
    claim = await claimed(store)
    await store.deliveries.remember(claim.id, "post", "1")
    await store.settle(settlement(claim))
    return lambda: store.deliveries.replay(
        pred(1), lambda _known, _type: Recipients(("greet", "fresh")), NOW + 30
    )


async def replaying_in_bulk(store: Store) -> Act:
    for number in (1, 2):
        await ended(store, number)
    replays = Replays(store)
    nothing = Selection()
    await replays.create(
        CountedReplay(id="rep_1", wanted=nothing, events=2, matched=2, next=0, last=9, now=NOW)
    )
    await replays.start("rep_1")
    step = ReplayStep(
        replay_id="rep_1",
        begin=0,
        end=9,
        predictions=[pred(1), pred(2)],
        choose=lambda _known, _type, _states: Recipients(("greet",)),
        now=NOW + 30,
    )
    return lambda: replays.take_step(step)


async def retrying(store: Store) -> Act:
    claim = await claimed(store)
    await store.settle(settlement(claim, GIVEN_UP))
    return lambda: store.deliveries.retry(claim.id, NOW + 30)


async def remembering(store: Store) -> Act:
    claim = await claimed(store)
    return lambda: asyncio.gather(
        store.deliveries.remember(claim.id, "a", "1"), store.deliveries.remember(claim.id, "b", "2")
    )


async def looking(store: Store) -> Act:
    await processing(store, 1)
    return lambda: store.predictions.claim_due("fal", NOW + 30, NOW + 90, 10)


async def hastening(store: Store) -> Act:
    await processing(store, 1)
    return lambda: store.predictions.hasten("fal", NOW)


async def canceling(store: Store) -> Act:
    await processing(store, 1)
    return lambda: store.predictions.mark_cancel(pred(1))


async def recovering(store: Store) -> Act:
    await claimed(store)
    await submitting(store, 2)
    return lambda: store.recover("next", NOW + 30)


OPERATIONS = [
    creating,
    beginning,
    progressing,
    accepting,
    claiming,
    settling,
    releasing,
    reclaiming,
    renewing,
    replaying,
    replaying_in_bulk,
    retrying,
    remembering,
    looking,
    hastening,
    canceling,
    recovering,
]
each_operation = pytest.mark.parametrize("prepare", OPERATIONS, ids=lambda step: step.__name__)


@pytest.fixture
def engine(watch: Watch, engine: SQLite) -> SQLite:  # noqa: ARG001 - to be watched from the start
    return engine


async def in_one_batch(watch: Watch, store: Store, act: Act, before: Callable[[str], None]) -> Any:
    """Run all that `act` starts in one transaction; call `before` with its statements."""
    with watch.busy(store):
        waiting = asyncio.ensure_future(act())
        for _ in range(3):
            await asyncio.sleep(0)
        begun = 0

        def hear(sql: str) -> None:
            # The first COMMIT is that of the transaction that kept the writer busy.
            nonlocal begun
            begun += sql == "BEGIN IMMEDIATE"
            if begun:
                before(sql)

        watch.before = hear
    return await asyncio.gather(waiting, return_exceptions=True)


@each_operation
async def test_kill_between_any_two_statements_leaves_all_or_nothing(
    engine: SQLite, watch: Watch, tmp_path: Path, prepare: Callable[[Store], Awaitable[Act]]
) -> None:
    store = engine.store
    act = await prepare(store)
    before = engine.dump()
    copies: list[Path] = []

    def keep(_: str) -> None:
        copies.append(tmp_path / "killed" / f"{len(copies)}.db")
        copy(engine.path, copies[-1])

    [error] = await in_one_batch(watch, store, act, keep)
    assert not isinstance(error, BaseException)
    keep("the end")
    after = engine.dump()

    assert before != after
    assert watch.statements[-1] == "COMMIT"
    assert len(copies) >= 3
    for killed in copies[:-1]:
        assert dump(killed) == before, killed.name
    assert dump(copies[-1]) == after


@each_operation
async def test_database_left_by_a_kill_opens_and_accepts_work(
    engine: SQLite, watch: Watch, tmp_path: Path, prepare: Callable[[Store], Awaitable[Act]]
) -> None:
    act = await prepare(engine.store)
    killed = tmp_path / "killed.db"

    def keep(sql: str) -> None:
        if sql == "COMMIT" and not killed.exists():
            copy(engine.path, killed)

    await in_one_batch(watch, engine.store, act, keep)
    reports: list[StoreUnavailable | None] = []
    reopened = SQLiteStore(str(killed), reports.append)
    reopened.open()
    try:
        await reopened.recover("next", NOW + 500)
        await accept_outcome(reopened, arrival(1, handlers=("greet",)))
        await reopened.claim(wanted(now=NOW + 900))
    finally:
        reopened.close()
    assert reports == []


@each_operation
@pytest.mark.parametrize("unavailable", [True, False])
async def test_error_at_any_statement_rolls_back_and_is_raised(
    engine: SQLite,
    watch: Watch,
    prepare: Callable[[Store], Awaitable[Act]],
    *,
    unavailable: bool,
) -> None:
    store = engine.store
    act = await prepare(store)
    before = engine.dump()
    error = sqlite3.OperationalError("no")
    if unavailable:
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
    step = 0
    while True:
        left = step

        def break_down(_: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:  # and at all later ones: the rollback fails too
                raise error

        [answer] = await in_one_batch(watch, store, act, break_down)
        watch.before = lambda _sql: None
        if not isinstance(answer, BaseException):
            break
        assert isinstance(answer, StoreUnavailable if unavailable else sqlite3.OperationalError)
        await store.try_write(NOW)  # the next write succeeds
        assert engine.dump() == before
        step += 1
    assert step >= 3
    assert engine.dump() != before
    assert bool(engine.reports) == unavailable


DYING = Path(__file__).with_name("dying.py")


@pytest.mark.parametrize("name", ["accept", "begin_submits", "settle"])
def test_process_killed_at_any_statement_leaves_all_or_nothing(tmp_path: Path, name: str) -> None:
    """Real processes end, one at each statement, and leave their files to be compared."""
    process = run_to_end([str(DYING), name, str(tmp_path)], tmp_path, os.environ)
    assert process.stderr == ""
    deaths = int(process.stdout)
    assert deaths >= 4
    states = [dump(tmp_path / f"{number}.db") for number in range(deaths + 1)]
    before, after = states[0], states[-1]
    assert before != after
    assert all(state == before for state in states[:-1])
