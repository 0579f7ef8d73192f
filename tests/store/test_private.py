"""Private content: given to handlers only, encrypted in the database, and deleted in time."""

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


async def test_private_content_is_not_stored_in_plain_text(engine: Engine, store: Store) -> None:
    await created(store, 1)
    await ended(store, 1, "greet")
    assert TOKEN not in everything(engine)
    [claim] = (await store.claim(wanted())).claims
    assert SEALS.unseal(claim.private) == PRIVATE
    assert claim.private is not None
    assert TOKEN not in claim.private


async def test_private_content_is_deleted_after_the_last_delivery_ends(
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


async def test_private_content_is_deleted_if_two_deliveries_end_at_once(
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


async def test_erase_deletes_private_content(engine: Engine, store: Store) -> None:
    await created(store, 1)
    await ended(store, 1, "greet")
    assert await Erasure(store).erase(pred(1), NOW) == "erased"
    assert kept(engine) == []


async def test_retention_deletes_private_content_if_expired_or_not_needed(
    engine: Engine, store: Store
) -> None:
    await created(store, 1, 2, 3, created_at=NOW - 7 * DAY)
    await created(store, 4, 5, 6)
    await ended(store, 5)
    await ended(store, 6, "greet")
    await retention(store, NOW).take_turn()
    assert kept(engine) == [pred(4), pred(6)]


async def test_repeated_idempotency_key_keeps_the_first_private_content(
    engine: Engine, store: Store
) -> None:
    await created(store, 1, idempotency_key="k")
    await store.predictions.create(new(2, idempotency_key="k", private=SEALS.seal({"other": 1})))
    await ended(store, 1, "greet")
    [claim] = (await store.claim(wanted())).claims
    assert SEALS.unseal(claim.private) == PRIVATE
    assert kept(engine) == [pred(1)]
