"""Deliveries: claimed by one process, settled once, and protected from a claim that was lost."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from receiver.model.ids import delivery_id
from receiver.model.retry import DONE, Decision
from receiver.model.values import Recipients
from receiver.store.breakers import Breakers
from receiver.store.deliveries import LostAttempt
from receiver.store.facade import Store
from receiver.store.inbox import CurrentState, IncomingOutcome, accept
from receiver.store.paging import rfc3339
from receiver.store.statement import Steps
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
    settlement,
    wanted,
)

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

GREET = delivery_id(pred(1), "greet")


def greet_only(_known: CurrentState, _type: str) -> Recipients:
    return Recipients(("greet",))


async def state(store: Store, delivery_id: str = GREET) -> tuple[str, int, str]:
    [delivery] = (await store.deliveries.page(1, id=delivery_id)).data
    return delivery.state, delivery.attempts, delivery.reason


async def test_claim_contains_the_whole_event(store: Store) -> None:
    claim = await claimed(store)
    prediction = await store.predictions.get(pred(1))
    assert claim.event.prediction == prediction
    assert (claim.id, claim.handler, claim.attempt, claim.round, claim.number) == (
        GREET,
        "greet",
        1,
        0,
        1,
    )
    assert (claim.event.type, claim.event.channel, claim.event.raw) == (
        "prediction.succeeded",
        "webhook",
        {"status": "succeeded"},
    )


@pytest.mark.pooled
@pytest.mark.parametrize("text", [r"\xZZ not found", r"\x4142", "\\x"])
async def test_text_payload_that_looks_like_hex_stays_text(store: Store, text: str) -> None:
    await ended(store, 1, "greet", body=text.encode())
    [claim] = (await store.claim(wanted())).claims
    assert claim.event.raw == text


async def test_event_may_have_many_handlers_with_long_names(store: Store) -> None:
    names = [f"{number:02}{'h' * 298}" for number in range(30)]
    await ended(store, 1, *names)
    for name in (names[0], names[-1]):
        assert len((await store.claim(wanted(name))).claims) == 1


async def test_concurrent_claims_return_each_delivery_once(store: Store) -> None:
    for number in range(20):
        await ended(store, number, "greet")
    found = await asyncio.gather(*(store.claim(wanted(owner=f"o{n}", most=7)) for n in range(6)))
    ids = [claim.id for claims in found for claim in claims.claims]
    assert len(ids) == len(set(ids)) == 20


async def test_claim_returns_due_deliveries_of_a_handler_and_the_next_due_time(
    store: Store,
) -> None:
    await ended(store, 1, "greet", "other")
    await ended(store, 2, "greet", at=NOW + 100)

    found = await store.claim(wanted())
    assert [claim.event.prediction.id for claim in found.claims] == [pred(1)]
    assert found.next_due is not None
    assert found.next_due <= NOW + 100.001
    assert (await store.claim(wanted())).next_due == pytest.approx(NOW + 100, abs=0.001)
    assert (await store.claim(wanted("nobody"))).next_due is None
    assert len((await store.claim(wanted("other"))).claims) == 1
    assert (await store.claim(wanted("other"))).next_due is None
    assert await store.deliveries.pending() == {"greet": 1}


@pytest.mark.usefixtures("in_one_process")
async def test_delivery_with_the_earliest_due_time_is_claimed_first(store: Store) -> None:
    for number, at in ((1, NOW + 3), (2, NOW + 1), (3, NOW + 2)):
        await ended(store, number, "greet", at=at)
    order = [(await store.claim(wanted(most=1))).claims[0].id for _ in range(3)]
    assert order == [delivery_id(pred(number), "greet") for number in (2, 3, 1)]


@pytest.mark.parametrize(
    ("decision", "expected"),
    [
        (DONE, "done"),
        (Decision(state="skipped", reason="not mine"), "skipped"),
        (GIVEN_UP, "dead"),
        (AGAIN, "pending"),
    ],
)
async def test_settlement_ends_the_attempt_in_the_decided_state(
    store: Store, decision: Decision, expected: str
) -> None:
    claim = await claimed(store)
    assert await store.settle(settlement(claim, decision))

    [delivery] = (await store.deliveries.page(10)).data
    assert (delivery.state, delivery.attempts, delivery.reason) == (expected, 1, decision.reason)
    assert (delivery.due_at is None) == (expected != "pending")
    assert (delivery.ended_at is None) == (expected == "pending")
    [attempt] = delivery.history
    assert (attempt["number"], attempt["reason"]) == (1, decision.reason)
    assert attempt["started_at"].endswith("Z")


@pytest.mark.pooled
async def test_retry_is_claimed_after_its_delay_as_the_next_attempt(store: Store) -> None:
    claim = await claimed(store)
    await store.settle(settlement(claim, AGAIN))  # due at +21+30
    assert (await store.claim(wanted(now=NOW + 50))).claims == []
    [again] = (await store.claim(wanted(now=NOW + 51))).claims
    assert (again.attempt, again.number, again.id) == (2, 2, claim.id)
    await store.settle(settlement(again, GIVEN_UP, ended_at=NOW + 60))
    [delivery] = (await store.deliveries.page(10, state="dead")).data
    assert [attempt["number"] for attempt in delivery.history] == [1, 2]


async def test_claim_just_before_a_retry_is_due_returns_its_due_time(store: Store) -> None:
    claim = await claimed(store)
    await store.settle(settlement(claim, AGAIN))  # due at +21+30
    early = await store.claim(wanted(now=NOW + 51 - 0.0001))
    assert early.claims == []
    assert early.next_due == pytest.approx(NOW + 51, abs=0.1)


async def lose_lease(store: Store) -> None:
    assert [one.handler for one in await store.reclaim("other", NOW + 50)] == ["greet"]


async def lose_lease_to_another(store: Store) -> None:
    await lose_lease(store)
    await store.claim(wanted(owner="other", now=NOW + 60))


async def lose_and_claim_again(store: Store) -> None:
    await lose_lease(store)
    await store.claim(wanted(now=NOW + 60))


async def another_finishes(store: Store) -> None:
    await lose_lease(store)
    [claim] = (await store.claim(wanted(owner="other", now=NOW + 60))).claims
    await store.settle(settlement(claim, GIVEN_UP, owner="other"))


async def replayed_after_another_finished(store: Store) -> None:
    await another_finishes(store)
    await store.deliveries.replay(pred(1), greet_only, NOW + 70)


async def replayed_and_claimed_again(store: Store) -> None:
    await replayed_after_another_finished(store)
    await store.claim(wanted(now=NOW + 80))


async def given_back(store: Store) -> None:
    await store.release("me", NOW + 30)


async def given_back_and_claimed_again(store: Store) -> None:
    await given_back(store)
    await store.claim(wanted(now=NOW + 80))


@pytest.mark.parametrize(
    "meanwhile",
    [
        lose_lease,
        lose_lease_to_another,
        lose_and_claim_again,
        another_finishes,
        replayed_after_another_finished,
        replayed_and_claimed_again,
        given_back,
        given_back_and_claimed_again,
    ],
    ids=lambda step: step.__name__,
)
async def test_settlement_of_a_lost_claim_changes_nothing(engine: Engine, meanwhile: Any) -> None:
    claim = await claimed(engine.store)
    await meanwhile(engine.store)
    before = engine.dump()
    for decision in (DONE, AGAIN, GIVEN_UP):
        assert not await engine.store.settle(settlement(claim, decision))
        assert engine.dump() == before


async def test_late_settlement_leaves_a_newer_claim_of_the_same_process_valid(
    store: Store,
) -> None:
    late = await claimed(store)
    await lose_lease(store)
    [claim] = (await store.claim(wanted(now=NOW + 60, lease_until=NOW + 90))).claims
    assert not await store.settle(settlement(late))
    soon = Decision(state="pending", delay=5.0, reason="no luck")
    assert await store.settle(settlement(claim, soon, ended_at=NOW + 61))
    [again] = (await store.claim(wanted(now=NOW + 67))).claims
    assert again.number == 3


@pytest.mark.usefixtures("in_one_process")
async def test_settlement_of_a_previous_process_changes_nothing(engine: Engine) -> None:
    claim = await claimed(engine.store)
    await engine.store.recover("next", NOW + 30)
    before = engine.dump()
    assert not await engine.store.settle(settlement(claim))
    assert engine.dump() == before


@pytest.mark.parametrize("decision", [DONE, AGAIN, GIVEN_UP], ids=lambda d: d.state)
async def test_second_settlement_changes_nothing(engine: Engine, decision: Decision) -> None:
    claim = await claimed(engine.store)
    assert await engine.store.settle(settlement(claim, AGAIN))
    before = engine.dump()
    assert not await engine.store.settle(settlement(claim, decision))
    assert engine.dump() == before


async def test_concurrent_settlements_of_one_claim_settle_it_once(engine: Engine) -> None:
    claim = await claimed(engine.store)
    held = await asyncio.gather(*(engine.store.settle(settlement(claim)) for _ in range(5)))
    assert sorted(held) == [False, False, False, False, True]
    assert len(engine.rows("SELECT * FROM attempts")) == 1


@pytest.mark.parametrize(
    "stranger", [{"owner": "other"}, {"number": 7}, {"id": "dlv_none"}], ids=repr
)
async def test_settlement_with_another_owner_number_or_id_changes_nothing(
    engine: Engine, stranger: dict[str, Any]
) -> None:
    claim = await claimed(engine.store)
    before = engine.dump()
    assert not await engine.store.settle(settlement(claim, **stranger))
    assert engine.dump() == before


@pytest.mark.pooled
async def test_batch_of_settlements_settles_only_those_of_the_claims_owner(store: Store) -> None:
    for number in range(10):
        await ended(store, number, "greet")
    claims = (await store.claim(wanted())).claims
    owners = ["me" if number % 2 else "other" for number in range(10)]
    held = await asyncio.gather(
        *(
            store.settle(settlement(claim, owner=owner))
            for claim, owner in zip(claims, owners, strict=True)
        )
    )
    assert held == [owner == "me" for owner in owners]


@pytest.mark.pooled
async def test_released_claim_is_pending_again_and_no_attempt_counts(store: Store) -> None:
    await claimed(store)
    await store.release("other", NOW + 30)
    assert (await state(store))[0] == "running"
    await store.release("me", NOW + 30)
    assert (await state(store))[:2] == ("pending", 0)
    [claim] = (await store.claim(wanted(now=NOW + 30))).claims
    assert claim.attempt == 1


async def test_attempts_count_from_the_fourth_release_on(store: Store) -> None:
    await claimed(store)
    lost: list[LostAttempt] = []
    for stop in range(1, 6):
        lost += await store.release("me", NOW + 30 * stop)
        assert (await state(store))[:2] == ("pending", max(0, stop - 3))
        [claim] = (await store.claim(wanted(now=NOW + 30 * stop))).claims
        assert (claim.attempt, claim.number) == (max(0, stop - 3) + 1, stop + 1)
    assert [(one.delivery, one.attempt, one.reason) for one in lost] == [
        (GREET, spent, "a stop cut it short once more") for spent in (1, 2)
    ]
    [delivery] = (await store.deliveries.page(1, id=GREET)).data
    assert [(one.number, one.result) for one in delivery.history] == [(4, "lost"), (5, "lost")]


@pytest.mark.pooled
async def test_lease_renewed_by_its_owner_expires_at_the_new_time(store: Store) -> None:
    claim = await claimed(store)  # until +50
    store.renew("me", [claim.id], NOW + 100)
    store.renew("me", [], NOW + 1)
    store.renew("other", [claim.id], NOW + 1)
    assert await store.reclaim("other", NOW + 99) == []
    assert [one.handler for one in await store.reclaim("other", NOW + 100)] == ["greet"]
    assert (await state(store))[:2] == ("pending", 1)


async def test_process_reclaims_its_own_expired_claim_too(store: Store) -> None:
    await claimed(store)  # until +50
    assert await store.reclaim("me", NOW + 49) == []
    assert [one.handler for one in await store.reclaim("me", NOW + 50)] == ["greet"]


@pytest.mark.usefixtures("in_one_process")
async def test_delivery_of_a_dead_process_is_pending_again_and_the_attempt_counts(
    store: Store,
) -> None:
    await claimed(store)
    await store.recover("next", NOW + 21)
    assert await state(store) == ("pending", 1, "its process died")
    [claim] = (await store.claim(wanted(owner="next", now=NOW + 21))).claims
    assert (claim.attempt, claim.number) == (2, 2)


@pytest.mark.pooled
@pytest.mark.parametrize("by", ["reclaim", "recover"])
async def test_lost_attempt_is_recorded_and_returned_once(store: Store, by: str) -> None:
    await claimed(store)  # at +20, until +50
    told = await getattr(store, by)("next", NOW + 50)
    told += await getattr(store, by)("next", NOW + 50)
    reasons = {"its lease ran out", "its process died"}
    [lost] = told
    assert lost.reason in reasons
    assert msgspec.structs.replace(lost, reason="") == LostAttempt(
        delivery=GREET,
        handler="greet",
        prediction_id=pred(1),
        provider="fal",
        provider_id=None,
        channel="webhook",
        attempt=1,
        number=1,
        reason="",
        seconds=30.0,
    )
    [delivery] = (await store.deliveries.page(1, id=GREET)).data
    [attempt] = delivery.history
    assert (attempt["number"], attempt["result"], attempt["reason"]) == (1, "lost", lost.reason)
    assert attempt["ended_at"] == rfc3339(NOW + 50)
    assert attempt["started_at"] == rfc3339(NOW + 20)

    [claim] = (await store.claim(wanted(owner="next", now=NOW + 51, lease_until=NOW + 90))).claims
    await store.settle(settlement(claim, owner="next", ended_at=NOW + 52))
    [delivery] = (await store.deliveries.page(1, id=GREET)).data
    assert [attempt["result"] for attempt in delivery.history] == ["lost", "done"]


async def test_reclaim_ends_the_circuit_breaker_probe_of_the_lost_claim(store: Store) -> None:
    breakers = Breakers(store)
    for name in ("greet", "other"):
        await breakers.trip(name, NOW, NOW + 10, "down")
        assert await breakers.probe(name, NOW + 20, NOW + 9000)
    await claimed(store)
    await store.reclaim("next", NOW + 50)
    found = await breakers.all()
    assert (found["greet"].probe_until, found["other"].probe_until) == (None, NOW + 9000)


async def test_each_caller_in_a_batch_gets_its_own_result(store: Store) -> None:
    for number in (1, 2, 3):
        await ended(store, number, "greet")
    dead = {delivery_id(pred(number), "greet") for number in (1, 2)}
    for claim in (await store.claim(wanted())).claims:
        if claim.id in dead:
            await store.settle(settlement(claim, GIVEN_UP))
    numbers = (3, 9, 2, 1)
    retried = await asyncio.gather(
        *(
            store.deliveries.retry(delivery_id(pred(number), "greet"), NOW + 60)
            for number in numbers
        )
    )
    assert retried == [None, None, "greet", "greet"]
    replayed = await asyncio.gather(
        *(store.deliveries.replay(pred(number), greet_only, NOW + 60) for number in numbers)
    )
    assert [one.pending for one in replayed] == [0, None, 0, 0]


async def test_recovery_leaves_the_claims_of_its_own_process(store: Store) -> None:
    await claimed(store)
    await store.recover("me", NOW + 21)
    assert (await state(store))[0] == "running"


@pytest.mark.parametrize("decision", [DONE, Decision(state="skipped"), GIVEN_UP])
async def test_replay_begins_a_new_round_and_deletes_the_stored_steps(
    store: Store, decision: Decision
) -> None:
    claim = await claimed(store)
    await store.deliveries.remember(claim.id, "post", '"done"')
    await store.settle(settlement(claim, decision))
    replayed = await store.deliveries.replay(pred(1), greet_only, NOW + 30)

    assert (replayed.pending, replayed.handlers) == (1, ("greet",))
    assert await store.deliveries.recall(claim.id, "post") is None
    [again] = (await store.claim(wanted(now=NOW + 30))).claims
    assert (again.id, again.attempt, again.round, again.number) == (claim.id, 1, 1, 2)


@pytest.mark.parametrize("running", [False, True])
async def test_replay_leaves_a_pending_or_running_delivery_unchanged(
    engine: Engine, *, running: bool
) -> None:
    store = engine.store
    await ended(store, 1, "greet")
    if running:
        await store.claim(wanted())
    await store.deliveries.remember(GREET, "post", '"done"')
    before = engine.dump()
    assert (await store.deliveries.replay(pred(1), greet_only, NOW + 30)).pending == 0
    assert engine.dump() == before


async def test_replay_adds_a_delivery_for_a_new_handler(store: Store) -> None:
    claim = await claimed(store)
    await store.settle(settlement(claim))
    seen: list[tuple[str, str]] = []

    def match(known: CurrentState, event_type: str) -> Recipients:
        seen.append((known.id, event_type))
        return Recipients(("fresh",))

    assert (await store.deliveries.replay(pred(1), match, NOW + 30)).handlers == ("fresh",)
    assert seen == [(pred(1), "prediction.succeeded")]
    assert (await state(store))[0] == "done"


async def test_replay_of_an_unfinished_or_unknown_prediction_does_nothing(store: Store) -> None:
    await store.predictions.create(new(1))
    assert (await store.deliveries.replay(pred(1), greet_only, NOW)).pending is None
    assert (await store.deliveries.replay("pred_none", greet_only, NOW)).pending is None


@pytest.mark.parametrize("decision", [Decision(state="skipped"), GIVEN_UP])
async def test_manual_retry_resets_the_attempt_count_and_keeps_the_steps(
    store: Store, decision: Decision
) -> None:
    claim = await claimed(store)
    await store.deliveries.remember(claim.id, "post", '"done"')
    await store.settle(settlement(claim, decision))
    assert await store.deliveries.retry(claim.id, NOW + 30) == "greet"
    [again] = (await store.claim(wanted(now=NOW + 30))).claims
    assert (again.attempt, again.round) == (1, 0)
    assert await store.deliveries.recall(claim.id, "post") == '"done"'


async def test_manual_retry_makes_a_delayed_retry_due_at_once(store: Store) -> None:
    claim = await claimed(store)
    await store.settle(settlement(claim, AGAIN))
    assert await store.deliveries.retry(claim.id, NOW + 30) == "greet"
    [again] = (await store.claim(wanted(now=NOW + 30))).claims
    assert again.attempt == 2


async def test_manual_retry_of_a_running_done_or_unknown_delivery_does_nothing(
    engine: Engine,
) -> None:
    store = engine.store
    claim = await claimed(store)
    before = engine.dump()
    assert await store.deliveries.retry(claim.id, NOW + 30) is None
    assert engine.dump() == before
    await store.settle(settlement(claim))
    assert await store.deliveries.retry(claim.id, NOW + 30) is None
    assert await store.deliveries.retry("dlv_none", NOW + 30) is None


@pytest.mark.pooled
async def test_step_keeps_its_first_result(store: Store) -> None:
    claim = await claimed(store)
    assert await store.deliveries.recall(claim.id, "post") is None
    assert await store.deliveries.remember(claim.id, "post", "1") == "1"
    assert await store.deliveries.remember(claim.id, "post", "2") == "1"
    await store.deliveries.remember(claim.id, "", '"\\u0000"')
    assert await store.deliveries.recall(claim.id, "post") == "1"
    assert await store.deliveries.recall(claim.id, "") == '"\\u0000"'


PAGES: list[tuple[dict[str, Any], int]] = [
    ({}, 6),
    ({"state": "pending"}, 5),
    ({"state": "running"}, 1),
    ({"handler": "b"}, 3),
    ({"prediction": pred(1)}, 2),
    ({"prediction": pred(1), "handler": "b", "state": None}, 1),
    ({"id": delivery_id(pred(2), "a")}, 1),
    ({"id": "dlv_none"}, 0),
]


@pytest.mark.parametrize("limit", [1, 4, 50])
async def test_pages_of_deliveries_contain_each_match_once(store: Store, limit: int) -> None:
    for number in range(3):
        await ended(store, number, "a", "b")
    await store.claim(wanted("a", most=1))
    for given, found in PAGES:
        seen: list[str] = []
        cursor = None
        while True:
            page = await store.deliveries.page(limit, **given, cursor=cursor)
            seen += [delivery.id for delivery in page.data]
            cursor = page.next_cursor
            if cursor is None:
                break
        assert len(seen) == found, given
        assert seen == sorted(set(seen), reverse=True)


async def test_write_probe_keeps_one_row_with_the_latest_time(engine: Engine) -> None:
    await asyncio.gather(*(engine.store.try_write(NOW + n) for n in range(3)))
    await engine.store.try_write(NOW + 9)
    assert engine.rows("SELECT at FROM probe") == [(NOW + 9,)]


async def test_special_characters_in_a_reason_are_stored_unchanged(store: Store) -> None:
    reason = 'it\'s "quoted" \\ $[0] {\u2028} \U0001f600'
    claim = await claimed(store)
    await store.settle(settlement(claim, Decision(state="dead", reason=reason)))
    assert (await state(store))[2] == reason


async def test_two_predictions_end_in_one_batch_with_their_own_deliveries(
    engine: Engine,
) -> None:
    def accept_batches(batches: Sequence[Sequence[IncomingOutcome]]) -> Steps[list[None]]:
        for batch in batches:
            yield from accept(batch)
        return [None] * len(batches)

    for number in (1, 2):
        await engine.store.predictions.create(new(number))
    both = [arrival(1, handlers=("a",)), arrival(2, handlers=("b", "c"))]
    await engine.store.write(accept_batches, both)
    found = engine.rows("SELECT prediction_id, handler FROM deliveries ORDER BY handler")
    assert found == [(pred(1), "a"), (pred(2), "b"), (pred(2), "c")]
