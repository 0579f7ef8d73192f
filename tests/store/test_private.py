"""Private content: for handlers alone, unreadable in the database, and gone in time."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import pytest

from receiver.model.sealing import Seals
from receiver.model.values import Recipients
from receiver.store.erasure import Erasure
from receiver.store.facade import Store
from receiver.store.inbox import accept_outcome
from receiver.store.retention import Retention, RetentionPace
from tests.store.parts import (
    AGAIN,
    NOW,
    Engine,
    arrival,
    judge,
    new,
    pred,
    progress,
    settlement,
    slots,
    wanted,
)
from tests.store.test_erasure import everything

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

SEALS: Final = Seals(["the-secret-key-of-a-test"])
TOKEN: Final = "sealing-wax"
PRIVATE: Final = {"token": TOKEN}
DAY: Final = 86400.0


async def created(store: Store, *numbers: int, **given: Any) -> None:
    for number in numbers:
        await store.predictions.create(new(number, private=SEALS.seal(PRIVATE), **given))


async def ended(store: Store, number: int, *handlers: str) -> None:
    await store.predictions.begin_submits(slots())
    await store.predictions.progress(
        progress(number, "accepted", NOW + 30, provider_id=f"req-{number}")
    )
    await accept_outcome(store, arrival(number, judge=judge(Recipients(handlers))))


def kept(engine: Engine) -> list[str]:
    found = engine.rows("SELECT id FROM predictions WHERE private IS NOT NULL ORDER BY id")
    return [row[0] for row in found]


def retention(store: Store, now: float) -> Retention:
    return Retention(store, {}, 7 * DAY, clock=lambda: now, pace=RetentionPace(pause=0.0, page=2))


async def test_no_page_of_the_database_has_it_in_clear(engine: Engine, store: Store) -> None:
    await created(store, 1)
    await ended(store, 1, "greet")
    assert TOKEN not in everything(engine)
    [claim] = (await store.claim(wanted())).claims
    assert SEALS.unseal(claim.private) == PRIVATE
    assert claim.private is not None
    assert TOKEN not in claim.private


async def test_it_is_emptied_when_the_last_of_its_deliveries_has_ended(
    engine: Engine, store: Store
) -> None:
    await created(store, 1)
    await ended(store, 1, "greet", "save")
    for handler, decision in (("greet", AGAIN), ("greet", None), ("save", None)):
        assert kept(engine) == [pred(1)]
        [claim] = (await store.claim(wanted(handler, now=NOW + 1000))).claims
        await store.settle(settlement(claim, **({"decision": decision} if decision else {})))
        await store.private.empty_after(pred(1))
    assert kept(engine) == []


async def test_of_two_that_end_at_once_the_later_one_empties_it(
    engine: Engine, store: Store
) -> None:
    await created(store, 1)
    await ended(store, 1, "greet", "save")

    async def end(handler: str) -> None:
        [claim] = (await store.claim(wanted(handler))).claims
        await store.settle(settlement(claim))
        await store.private.empty_after(pred(1))

    await asyncio.gather(end("greet"), end("save"))
    assert kept(engine) == []


async def test_an_erase_empties_it(engine: Engine, store: Store) -> None:
    await created(store, 1)
    await ended(store, 1, "greet")
    assert await Erasure(store).erase(pred(1), NOW) == "erased"
    assert kept(engine) == []


async def test_retention_empties_what_is_old_and_what_nobody_waits_for(
    engine: Engine, store: Store
) -> None:
    await created(store, 1, 2, 3, created_at=NOW - 7 * DAY)
    await created(store, 4, 5, 6)
    await ended(store, 5)
    await ended(store, 6, "greet")
    await retention(store, NOW).take_turn()
    assert kept(engine) == [pred(4), pred(6)]


async def test_a_key_keeps_its_first_prediction_and_what_that_has(
    engine: Engine, store: Store
) -> None:
    await created(store, 1, idempotency_key="k")
    await store.predictions.create(new(2, idempotency_key="k", private=SEALS.seal({"other": 1})))
    await ended(store, 1, "greet")
    [claim] = (await store.claim(wanted())).claims
    assert SEALS.unseal(claim.private) == PRIVATE
    assert kept(engine) == [pred(1)]
