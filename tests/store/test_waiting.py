"""Deliveries that wait for other handlers, and annotations of predictions by handlers."""

import asyncio
from typing import Any, Final

import pytest

from receiver.model.answers import Delivery
from receiver.model.ids import delivery_id
from receiver.model.retry import DONE, Decision
from receiver.model.values import Recipients, Stored
from receiver.store.facade import Store
from receiver.store.predictions import Annotation
from tests.store.parts import (
    AGAIN,
    GIVEN_UP,
    NOW,
    Engine,
    Postgres,
    ended,
    new,
    pred,
    settlement,
    wanted,
)

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

DAY: Final = 86400.0
POST_AFTER_SAVE: Final = {"post": ("save",)}
KEPT: Final = Stored(url="s3://kept/a.png", sha256="ab" * 32, size=7, content_type="image/png")


async def claims(store: Store, handler: str, at: float = NOW + 20) -> list[str]:
    found = await store.claim(wanted(handler, now=at))
    return [claim.id for claim in found.claims]


async def ends(store: Store, handler: str, decision: Decision = DONE, at: float = NOW + 30) -> None:
    [claim] = (await store.claim(wanted(handler, now=NOW + 20))).claims
    assert await store.settle(settlement(claim, decision, ended_at=at))


async def delivery(store: Store, handler: str) -> Delivery:
    [found] = (await store.deliveries.page(1, id=delivery_id(pred(1), handler))).data
    assert isinstance(found, Delivery)
    return found


@pytest.mark.parametrize("end", [DONE, GIVEN_UP, Decision(state="skipped", reason="not mine")])
async def test_delivery_waits_until_the_other_handler_has_ended_in_any_state(
    store: Store, end: Decision
) -> None:
    await ended(store, 1, "save", "post", "log", after=POST_AFTER_SAVE)

    assert await claims(store, "post") == []
    assert (await delivery(store, "post")).reason == "waits for save"
    assert await claims(store, "log") == [delivery_id(pred(1), "log")]  # it does not wait
    await ends(store, "save", end)
    assert await claims(store, "post", NOW + 30) == [delivery_id(pred(1), "post")]


async def test_retry_of_the_other_handler_does_not_end_the_wait(store: Store) -> None:
    await ended(store, 1, "save", "post", after=POST_AFTER_SAVE)
    await ends(store, "save", AGAIN)
    assert await claims(store, "post", NOW + 1000) == []


async def test_delivery_waits_only_for_handlers_of_its_own_event(store: Store) -> None:
    await ended(store, 1, "save", "post", after=POST_AFTER_SAVE)
    await ended(store, 2, "save", "post", after=POST_AFTER_SAVE)
    [first, _] = (await store.claim(wanted("save", now=NOW + 20))).claims
    await store.settle(settlement(first, DONE, ended_at=NOW + 21))
    assert await claims(store, "post", NOW + 30) == [delivery_id(first.event.prediction.id, "post")]


async def test_delivery_waits_for_the_last_of_several_handlers(store: Store) -> None:
    await ended(store, 1, "a", "b", "post", after={"post": ("a", "b")})
    await ends(store, "a")
    assert await claims(store, "post", NOW + 40) == []
    await ends(store, "b")
    assert len(await claims(store, "post", NOW + 40)) == 1


@pytest.mark.pooled
async def test_concurrent_settlements_release_the_waiting_delivery(store: Store) -> None:
    for number in range(8):
        await ended(store, number, "a", "b", "post", after={"post": ("a", "b")})
    both = [await store.claim(wanted(name, now=NOW + 20)) for name in ("a", "b")]
    await asyncio.gather(
        *(
            store.settle(settlement(claim, DONE, ended_at=NOW + 30))
            for found in both
            for claim in found.claims
        )
    )
    assert len(await claims(store, "post", NOW + 40)) == 8


async def test_chain_of_handlers_runs_in_order(store: Store) -> None:
    after = {"caption": ("save",), "post": ("caption",)}
    await ended(store, 1, "save", "caption", "post", after=after)
    for handler, follower in (("save", "caption"), ("caption", "post")):
        assert await claims(store, follower, NOW + 40) == []
        [claim] = (await store.claim(wanted(handler, now=NOW + 40))).claims
        await store.settle(settlement(claim, DONE, ended_at=NOW + 40))
    assert len(await claims(store, "post", NOW + 50)) == 1


async def test_delivery_waits_for_at_most_a_day(store: Store, engine: Engine) -> None:
    await ended(store, 1, "save", "post", after=POST_AFTER_SAVE)
    [[due]] = engine.rows("SELECT due_at FROM deliveries WHERE handler = 'post'")
    assert due == NOW + 10 + DAY
    await store.reclaim("o", NOW + 10 + DAY + 120)  # creates a missing job
    assert len(await claims(store, "post", NOW + 10 + DAY + 121)) == 1


async def test_replayed_delivery_waits_again(store: Store) -> None:
    await ended(store, 1, "save", "post", after=POST_AFTER_SAVE)
    await ends(store, "save")
    [claim] = (await store.claim(wanted("post", now=NOW + 40))).claims
    await store.settle(settlement(claim, DONE, ended_at=NOW + 41))

    both = Recipients(("post", "save"), POST_AFTER_SAVE)
    replayed = await store.deliveries.replay(pred(1), lambda *_: both, NOW + 50)
    assert (replayed.pending, sorted(replayed.handlers)) == (2, ["post", "save"])
    assert await claims(store, "post", NOW + 60) == []
    [claim] = (await store.claim(wanted("save", now=NOW + 60))).claims
    await store.settle(settlement(claim, DONE, ended_at=NOW + 61))
    assert len(await claims(store, "post", NOW + 70)) == 1


async def test_manual_retry_ends_the_wait(store: Store) -> None:
    await ended(store, 1, "save", "post", after=POST_AFTER_SAVE)
    assert await store.deliveries.retry(delivery_id(pred(1), "post"), NOW + 15) == "post"
    [claim] = (await store.claim(wanted("post", now=NOW + 20))).claims
    await store.settle(settlement(claim, AGAIN, ended_at=NOW + 21))
    await ends(store, "save")  # must not make the retry due earlier
    assert await claims(store, "post", NOW + 40) == []


async def test_stored_outputs_are_in_the_prediction_and_in_later_claims(store: Store) -> None:
    await ended(store, 1, "save", "post", after=POST_AFTER_SAVE)
    await store.deliveries.annotate(Annotation(prediction_id=pred(1), stored={0: KEPT}))
    await store.deliveries.annotate(
        Annotation(prediction_id=pred(1), stored={7: KEPT}, metadata={"flagged": "x"})
    )
    await ends(store, "save")

    [claim] = (await store.claim(wanted("post", now=NOW + 40))).claims
    prediction = claim.event.prediction
    assert prediction == await store.predictions.get(pred(1))
    assert prediction.output is not None
    assert [output.stored for output in prediction.output] == [KEPT]
    assert prediction.metadata["flagged"] == "x"


async def test_concurrent_annotations_are_all_kept(store: Store) -> None:
    await ended(store, 1, "save")
    await asyncio.gather(
        *(
            store.deliveries.annotate(
                Annotation(prediction_id=pred(1), metadata={f"n{number}": number})
            )
            for number in range(20)
        )
    )
    found = await store.predictions.get(pred(1))
    assert found is not None
    assert {f"n{number}" for number in range(20)} <= found.metadata.keys()


async def test_annotation_of_a_missing_output_or_prediction_is_ignored(
    store: Store,
) -> None:
    await store.predictions.create(new(1))
    await store.deliveries.annotate(
        Annotation(prediction_id=pred(1), stored={0: KEPT}, metadata={"a": 1})
    )
    await store.deliveries.annotate(Annotation(prediction_id="pred_none", stored={0: KEPT}))
    found = await store.predictions.get(pred(1))
    assert found is not None
    assert (found.output, found.metadata["a"]) == (None, 1)


async def test_depth_is_the_number_of_known_ancestors(store: Store) -> None:
    parents: tuple[Any, ...] = (None, pred(1), pred(2), "pred_forgotten")
    for number, parent in enumerate(parents, 1):
        await store.predictions.create(new(number, parent_id=parent))
    found = [await store.predictions.get(pred(number)) for number in range(1, 5)]
    assert [prediction and prediction.depth for prediction in found] == [0, 1, 2, 0]


async def test_note_is_stored_with_its_attempt(store: Store) -> None:
    await ended(store, 1, "greet")
    [claim] = (await store.claim(wanted())).claims
    await store.settle(settlement(claim, DONE, note="exit 0: ünïcode"))
    assert [attempt["note"] for attempt in (await delivery(store, "greet")).history] == [
        "exit 0: ünïcode"
    ]


@pytest.mark.usefixtures("on_postgres")
async def test_delivery_that_waits_for_an_ended_one_is_released(engine: Postgres) -> None:
    """A replay may make a delivery wait just as the one that it waits for is settled.

    SQLite has one writer, so that this cannot happen there.
    """
    store = engine.store
    await ended(store, 1, "save", "post", after=POST_AFTER_SAVE)
    engine.database.execute(
        "UPDATE receiver.deliveries SET state = 'done', due_at = NULL, ended_at = 1"
        " WHERE handler = 'save'"
    )
    assert await claims(store, "post") == []
    await store.reclaim("me", NOW + 20)
    assert await claims(store, "post", NOW + 30) == [delivery_id(pred(1), "post")]
