"""Every secret can be rotated while callbacks come in: both keys are accepted, then the old goes.

The README describes the steps for operators.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from itertools import pairwise
from typing import Final

import pytest

from receiver.model.errors import Unproved
from receiver.predictions.tokens import Tokens
from tests.conftest import Start
from tests.postgres import Database
from tests.receiving import API_KEY, ENV, PUSHING, Network, Station, receiving

pytestmark = pytest.mark.anyio

OLD: Final = ENV["RECEIVER_SECRET_KEY"]
NEW: Final = "a-key-that-is-newer-than-all-the-others"
ORDER: Final = (OLD, f"{OLD},{NEW}", f"{NEW},{OLD}", NEW)
"""The successive values of RECEIVER_SECRET_KEY if several processes share the callbacks."""


@pytest.mark.parametrize("provider", PUSHING)
async def test_secret_key_is_rotated_over_two_restarts(
    start: Start, network: Network, provider: str
) -> None:
    async with start() as station:
        kept, dropped = [await station.submitted(provider, name) for name in ("kept", "dropped")]
    async with start(RECEIVER_SECRET_KEY=f"{NEW},{OLD}") as station:
        assert (await station.push(kept)).json() == {"status": "accepted"}
        late = await station.submitted(provider, "late")
        assert Tokens([NEW]).open_callback(provider, late.token) == late.prediction_id
        assert late.secret in {"", Tokens([NEW]).webhook_secrets(late.prediction_id)[0].decode()}
    station.edit("UPDATE predictions SET due_at = 1 WHERE due_at IS NOT NULL")
    network.always(f"{provider}.poll", network.ends)
    async with start(RECEIVER_SECRET_KEY=NEW) as station:
        assert (await station.push(dropped)).status_code == 401
        found = await station.until(dropped.prediction_id, "succeeded")
        assert found["channel"] == "poll"
        assert (await station.push(late)).status_code == 200
        assert (await station.until(late.prediction_id, "succeeded"))["id"] == late.prediction_id
        assert station.count("events") == 3


def opens(signs: str, reads: str) -> bool:
    """Return whether a process with the keys `reads` accepts callbacks made with `signs`."""
    signing, reading = Tokens(signs.split(",")), Tokens(reads.split(","))
    secret = signing.webhook_secrets("pred_1")[0]
    try:
        reading.open_callback("fal", signing.callback("fal", "pred_1"))
    except Unproved:
        return False
    return secret in reading.webhook_secrets("pred_1")


def test_consecutive_rotation_steps_accept_each_others_callbacks() -> None:
    for one, other in pairwise(ORDER):
        # Predictions of the old key end before the last step.
        assert opens(one, other) or other == NEW
        assert opens(other, one)


def test_skipped_rotation_step_rejects_callbacks() -> None:
    assert not opens(f"{NEW},{OLD}", OLD)


async def test_rolling_rotation_of_two_servers_rejects_no_callback(
    database: Database, network: Network
) -> None:
    """One server restarts at a time; each receives the callbacks of the other's submits."""

    async with AsyncExitStack() as stack:
        servers: list[Station] = []
        ends: list[AsyncExitStack] = []

        async def begin(number: int, keys: str) -> None:
            end = await stack.enter_async_context(AsyncExitStack())
            context = receiving(database, network, RECEIVER_SECRET_KEY=keys)
            servers[number:number] = [await end.enter_async_context(context)]
            ends[number:number] = [end]

        async def cross(step: str) -> None:
            for number, provider in enumerate(PUSHING):
                sent = await servers[number % 2].submitted(provider, f"{step} {provider}")
                answer = await servers[1 - number % 2].push(sent)
                assert answer.json() == {"status": "accepted"}, (step, provider)

        for number in (0, 1):
            await begin(number, ORDER[0])
        for keys in ORDER[1:]:
            for number in (0, 1):
                await ends.pop(number).aclose()
                servers.pop(number)
                await begin(number, keys)
                await cross(f"{keys} {number}")
        assert servers[0].count("events") == 2 * len(PUSHING) * (len(ORDER) - 1)


@pytest.mark.usefixtures("on_sqlite")
async def test_api_key_is_rotated_over_two_restarts(start: Start) -> None:
    new = {"authorization": "Bearer the-newer-api-key"}
    async with start(RECEIVER_API_KEYS=f"the-newer-api-key,{API_KEY}") as station:
        assert (await station.http.get("/v1/predictions")).status_code == 200
        assert (await station.http.get("/v1/predictions", headers=new)).status_code == 200
    async with start(RECEIVER_API_KEYS="the-newer-api-key") as station:
        assert (await station.http.get("/v1/predictions")).status_code == 401
        assert (await station.http.get("/v1/predictions", headers=new)).status_code == 200


@pytest.mark.usefixtures("on_sqlite")
async def test_provider_key_is_rotated_while_predictions_are_running(
    start: Start, network: Network
) -> None:
    async with start() as station:
        pushed, polled = [await station.submitted("fal", name) for name in ("pushed", "polled")]
    station.edit(f"UPDATE predictions SET due_at = 1 WHERE id = '{polled.prediction_id}'")
    network.always("fal.poll", network.ends)
    async with start(FAL_KEY="the-newer-fal-key") as station:
        assert (await station.push(pushed)).json() == {"status": "accepted"}
        assert (await station.until(polled.prediction_id, "succeeded"))["channel"] == "poll"
    [poll] = [request for kind, request in network.calls if kind == "fal.poll"]
    assert poll.headers["authorization"] == "Key the-newer-fal-key"
