"""Orders as plugins place them: by a typed command, by a button, and too late."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from receiver.model.errors import Problem
from receiver.model.requests import OrderRequest
from receiver.model.tasks import Wakeups
from receiver.model.values import Outcome, Output, Prediction, Recipients
from receiver.observability.events import Telemetry
from receiver.observability.runtime import Runtime
from receiver.predictions.commands import Command, parse
from receiver.predictions.facade import Predictions
from receiver.settings import Settings
from receiver.store.opening import store_maker
from tests.predictions.test_recipes import EXAMPLE
from tests.receiving import ENV, Clock, Network, eventually, hangs, reply

pytestmark = pytest.mark.anyio

ADA = OrderRequest(person="slack:U01", place="slack:T01/C01", via="slack")
PICTURE = "https://cdn.test/a.png"


def imagine(options: dict[str, Any], **given: Any) -> OrderRequest:
    return replace(ADA, recipe="imagine", options=options, **given)


def asked(command: Command, **given: Any) -> OrderRequest:
    return replace(ADA, recipe=command.recipe, options=command.options, **given)


@pytest.fixture
async def predictions(tmp_path: Path, network: Network) -> AsyncIterator[Predictions]:
    async with running(tmp_path, network, Clock()) as found:
        yield found


@asynccontextmanager
async def running(folder: Path, network: Network, clock: Clock) -> AsyncIterator[Predictions]:
    """Run orders and submits, without a server and without background loops."""
    file = folder / "recipes.toml"
    file.write_text(EXAMPLE)
    url = f"sqlite:///{folder / 'receiver.db'}"
    more = {"RECEIVER_DATABASE_URL": url, "RECEIVER_RECIPES": str(file)}
    settings = Settings.read(ENV | more)
    wakeups = Wakeups()
    runtime = Runtime(
        single_process=True, clock=clock, monotonic=clock, telemetry=Telemetry(), wakeups=wakeups
    )
    store = store_maker(settings)(lambda _: None, lambda _: None, wakeups)
    made = Predictions(settings, store, lambda *_: Recipients(), runtime, network)
    await store.start()
    async with made.running(outbound=False):
        yield made
    await made.close()
    await store.stop()


async def ended(predictions: Predictions, prediction: Prediction) -> None:
    outcome = Outcome(kind="succeeded", output=[Output(url=PICTURE)])
    await predictions.inbox.answer("fal", prediction.id, "poll", outcome, b"{}")


@pytest.mark.usefixtures("stops_soon")
async def test_typed_command_is_ordered_and_submitted_without_background_loops(
    predictions: Predictions, network: Network
) -> None:
    network.script("fal.submit", hangs)  # an order waits only for its commit
    command = parse(predictions.orders.book, "/imagine “a fox” —ratio 16:9")
    made = await predictions.orders.order(asked(command, key="t:1"))
    assert made.status in {"queued", "submitting"}
    assert made.input == {"prompt": "a fox", "aspect_ratio": "16:9", "num_images": 1}
    await eventually(lambda: network.count("fal.submit") == 1)
    # the same idempotency key by another plugin is another order
    other = await predictions.orders.order(asked(command, key="t:1", via="telegram"))
    assert other.id != made.id


async def test_button_press_is_an_order_of_the_person_who_presses(predictions: Predictions) -> None:
    orders = predictions.orders
    bob = replace(ADA, person="slack:U02")
    first = await orders.order(imagine({"prompt": "a fox", "count": 2}, key="1"))
    again = await orders.press(first.id, "Again", replace(bob, key="press-1"))
    assert again.input == first.input
    assert again.order is not None
    assert (again.id != first.id, again.order.person) == (True, "slack:U02")
    with pytest.raises(Problem, match="no picture of it, or not yet") as early:
        await orders.press(first.id, "Larger", replace(bob, key="press-2"))
    assert (early.value.status, early.value.type) == (409, "not-ended")
    await ended(predictions, first)
    larger = await orders.press(first.id, "Larger", replace(bob, key="press-2"))
    assert larger.input == {"image_url": PICTURE}
    assert (await orders.press(first.id, "Larger", replace(bob, key="press-2"))).id == larger.id
    with pytest.raises(Problem, match="imagine has no button 'Smaller'"):
        await orders.press(first.id, "Smaller", replace(bob, key="press-3"))
    with pytest.raises(Problem, match="no such order"):
        await orders.press("pred_0", "Again", replace(bob, key="press-4"))
    with pytest.raises(Problem, match="may not order"):
        await orders.press(first.id, "Again", OrderRequest(person="eve", place="bar"))


async def test_order_that_arrives_too_late_is_rejected(tmp_path: Path, network: Network) -> None:
    clock = Clock()
    async with running(tmp_path, network, clock) as predictions:
        orders = predictions.orders
        with pytest.raises(Problem) as refused:
            await orders.order(imagine({"prompt": "x"}, key="1", at=clock() - 601))
        assert (refused.value.status, refused.value.type) == (409, "too-late")
        made = await orders.order(imagine({"prompt": "x"}, key="2", at=clock() - 599))
        assert made.status in {"queued", "submitting"}


async def test_order_expires_while_the_provider_is_paused_by_429(
    tmp_path: Path, network: Network
) -> None:
    clock = Clock()
    network.script("fal.submit", reply(status=429, retry_after="3000"))
    async with running(tmp_path, network, clock) as predictions:
        first = await predictions.orders.order(imagine({"prompt": "x"}, key="1"))
        submitter = predictions.service.submitter("fal")
        await eventually(lambda: network.count("fal.submit") == 1)
        await submitter.under_way.wait()
        clock.ahead += 601
        await submitter.begin()
        found = await predictions.service.read(first.id)
        assert found.error is not None
        assert (found.status, found.error.code) == ("failed", "expired")
        assert network.count("fal.submit") == 1
