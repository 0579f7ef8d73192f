"""The cost poller: requests the cost of an ended prediction until it is known, or gives up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from msgspec.structs import replace

from receiver.model.ids import new_id
from receiver.model.requests import SubmitRequest
from receiver.model.values import Outcome, Output, Ticket
from receiver.predictions.facade import Predictions
from receiver.providers.adapter import Billing
from receiver.settings import Settings
from tests.predictions.test_orders import PICTURE, running
from tests.receiving import ENV, Clock, Network, breaks, reply

pytestmark = pytest.mark.anyio

DAYS = 200_000.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def predictions(tmp_path: Path, network: Network, clock: Clock) -> AsyncIterator[Predictions]:
    async with running(tmp_path, network, clock) as found:
        yield found


async def ended(
    predictions: Predictions, provider: str = "eachlabs", model: str = "nano-banana"
) -> str:
    request = SubmitRequest(provider=provider, model=model, input={"prompt": "x"})
    prediction = await predictions.service.submit(request)
    outcome = Outcome(kind="succeeded", output=[Output(url=PICTURE)])
    await predictions.inbox.answer(provider, prediction.id, "webhook", outcome, b"{}")
    return prediction.id


async def test_cost_is_requested_again_until_it_is_known(
    predictions: Predictions, network: Network, clock: Clock
) -> None:
    name = await ended(predictions)
    assert await predictions.bills.ask() is None
    assert network.count("eachlabs.poll") == 0  # it is too early
    network.script("eachlabs.poll", breaks(httpx.ReadError), reply({"status": "success"}))
    for times in (1, 2, 3):
        clock.ahead += DAYS
        await predictions.bills.ask()
        assert network.count("eachlabs.poll") == times
    # The third request reaches the emulated provider, which has no cost before the end.
    assert (await predictions.service.read(name)).cost is None
    [sent] = network.emulator.predictions
    network.emulator.end(sent)
    clock.ahead += DAYS
    await predictions.bills.ask()
    cost = (await predictions.service.read(name)).cost
    assert cost is not None
    assert (cost.amount, cost.source) == (0.039, "provider")
    clock.ahead += DAYS
    await predictions.bills.ask()
    assert network.count("eachlabs.poll") == 4


async def test_cost_is_requested_seven_times_at_most(
    predictions: Predictions, network: Network, clock: Clock
) -> None:
    name = await ended(predictions)
    network.always("eachlabs.poll", reply({"error": "try later"}, 500))
    for _ in range(20):
        clock.ahead += DAYS
        await predictions.bills.ask()
    assert network.count("eachlabs.poll") == 7
    assert (await predictions.service.read(name)).cost is None


async def test_cost_request_during_a_429_pause_is_not_counted_as_a_try(
    predictions: Predictions, network: Network, clock: Clock
) -> None:
    await ended(predictions)
    network.script("eachlabs.poll", reply({}, 429, retry_after="3600"))
    for _ in range(9):
        clock.ahead += 1000.0
        await predictions.bills.ask()
    assert network.count("eachlabs.poll") == 3  # rounds during the pause are no tries


async def test_unit_price_is_cached_and_units_are_requested_only_with_a_price(
    predictions: Predictions, network: Network, clock: Clock
) -> None:
    names = [await ended(predictions, "fal", "fal-ai/nano-banana") for _ in range(3)]
    network.script("fal.price", reply({"error": "try later"}, 500))
    clock.ahead += 70.0
    await predictions.bills.ask()
    assert (network.count("fal.price"), network.count("fal.result")) == (1, 0)
    for sent in network.emulator.predictions:
        network.emulator.end(sent)
    clock.ahead += 70.0
    await predictions.bills.ask()
    assert (network.count("fal.price"), network.count("fal.result")) == (2, 3)
    for name in names:
        cost = (await predictions.service.read(name)).cost
        assert cost is not None
        assert (cost.amount, cost.source) == (0.039, "computed")


async def test_result_without_units_is_not_requested_again(
    predictions: Predictions, network: Network, clock: Clock
) -> None:
    name = await ended(predictions, "fal", "fal-ai/nano-banana")
    network.always("fal.result", reply({"images": []}))
    for _ in range(3):
        clock.ahead += DAYS
        await predictions.bills.ask()
    assert network.count("fal.result") == 1
    assert (await predictions.service.read(name)).cost is None


def test_fal_bill_starts_before_the_oldest_request_within_80_days() -> None:
    """Fal searches 90 days at most, so an older prediction does not move the start back further."""
    day, now = 86400.0, 1_767_225_600.0
    unsent = Ticket(id=new_id("pred", now), model="m", mode="queue", input={}, provider_id="r1")
    sent = replace(unsent, submitted_at=now + day, provider_id="r2")
    old = replace(unsent, id=new_id("pred", now - 100 * day), provider_id="r3")
    fal = Settings.read(ENV | {"FAL_ADMIN_KEY": "the-admin-key"}).adapters()["fal"]
    assert isinstance(fal, Billing)
    starts = [fal.bill(each).url.params["start"] for each in ([unsent, sent], [sent, old])]
    assert starts == ["2025-12-31T00:00:00Z", "2025-10-14T00:00:00Z"]
