"""Due work, as a drain reads it: by one statement, from the rows alone."""

import pytest

from receiver.store.due import Due
from receiver.store.facade import Store
from tests.store.parts import AGAIN, NOW, claimed, ended, new, processing, settlement, wanted

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines, pytest.mark.pooled]

NOTHING = Due(handlers=[], submits=[], polls=[], claimed=False, next_due=None)


async def look(store: Store, now: float = NOW + 20, owner: str = "me") -> Due:
    return await store.due(owner, ["greet", "post"], ["fal", "oxen"], now)


async def test_nothing_is_due_in_an_empty_store(store: Store) -> None:
    assert await look(store) == NOTHING


async def test_only_requested_handlers_with_due_deliveries_are_listed(
    store: Store,
) -> None:
    for number in range(3):
        await ended(store, number, "greet", "post", "gone")
    found = await look(store)
    assert (found.handlers, found.next_due) == (["greet", "post"], 0.0)
    assert (await store.due("me", [], [], NOW + 20)) == NOTHING


async def test_retry_is_due_after_its_delay(store: Store) -> None:
    claim = await claimed(store)
    assert await store.settle(settlement(claim, AGAIN, ended_at=NOW + 21))
    found = await look(store, NOW + 30)
    assert (found.handlers, found.claimed) == ([], False)
    assert found.next_due == pytest.approx(21.0)
    assert (await look(store, NOW + 52)).handlers == ["greet"]


async def test_claim_of_another_process_is_reported_and_due_when_its_lease_expires(
    store: Store,
) -> None:
    await claimed(store)
    assert await look(store, owner="me") == NOTHING
    found = await look(store, owner="other")
    assert (found.handlers, found.claimed, found.next_due) == ([], True, 30.0)
    found = await look(store, NOW + 51, owner="other")
    assert (found.handlers, found.claimed, found.next_due) == (["greet"], True, 0.0)
    await store.reclaim("other", NOW + 51)
    found = await look(store, NOW + 51, owner="other")
    assert (found.handlers, found.claimed) == (["greet"], False)


async def test_delivery_behind_an_open_circuit_breaker_is_due_at_the_next_probe(
    store: Store,
) -> None:
    await ended(store, 1, "greet", "post")
    await store.breakers.trip("greet", NOW, NOW + 60, "no luck")
    await store.breakers.pause("post", NOW)
    found = await look(store)
    assert (found.handlers, found.next_due) == ([], 40.0)
    await store.breakers.resume("post")
    assert (await look(store)).handlers == ["post"]


async def test_due_submits_and_polls_are_listed_by_provider(store: Store) -> None:
    await processing(store, 1)
    found = await look(store)
    assert (found.submits, found.polls, found.next_due) == ([], [], 10.0)
    await store.predictions.create(new(2, provider="oxen"))
    found = await look(store, NOW + 30)
    assert (found.submits, found.polls, found.next_due) == (["oxen"], ["fal"], 0.0)


async def test_all_of_forty_handlers_with_due_deliveries_are_listed(store: Store) -> None:
    names = [f"handler-{number:02}" for number in range(40)]
    await ended(store, 1, *names)
    found = await store.due("me", names, ["fal"], NOW + 20)
    assert found.handlers == names
    assert len((await store.claim(wanted("handler-07"))).claims) == 1
