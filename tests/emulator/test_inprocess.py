"""The emulator without a socket: predictions end and events are sent only when a test says so."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import msgspec
import pytest

from receiver.emulator import Rule, settings_for
from receiver.emulator.endings import Ending
from receiver.emulator.inprocess import BY_HAND, EmulatedProviders
from tests.emulator.serving import KEYS

pytestmark = pytest.mark.anyio

URLS = settings_for("https://providers.test")
OXEN, EACHLABS = URLS["OXEN_BASE_URL"], URLS["EACHLABS_BASE_URL"] + "/v1/prediction"
FAL = URLS["FAL_QUEUE_URL"] + "/fal-ai/nano-banana"
SUBMITS: dict[str, tuple[str, dict[str, Any]]] = {
    "oxen": (OXEN + "/api/ai/queue", {"model": "m", "prompt": "a"}),
    "eachlabs": (EACHLABS, {"model": "m", "version": "1", "input": {"prompt": "a"}}),
    "fal": (FAL, {"prompt": "a"}),
}
POLLS = {
    "oxen": OXEN + "/api/ai/queue/oxen-1",
    "eachlabs": EACHLABS + "/eachlabs-1",
    "fal": FAL + "/requests/fal-1",
}


async def submit(providers: EmulatedProviders, provider: str) -> httpx.Response:
    url, body = SUBMITS[provider]
    async with httpx.AsyncClient(transport=providers) as client:
        return await client.post(url, json=body, headers=KEYS[provider])


async def poll(providers: EmulatedProviders, provider: str) -> str:
    async with httpx.AsyncClient(transport=providers) as client:
        return (await client.get(POLLS[provider], headers=KEYS[provider])).text


@pytest.mark.parametrize("provider", POLLS)
async def test_prediction_ends_only_by_hand_with_the_given_output(provider: str) -> None:
    providers = EmulatedProviders(lambda: 1000.0)
    assert f"{provider}-1" in (await submit(providers, provider)).text
    [taken] = providers.predictions
    assert providers.find(taken.id) is taken
    assert (taken.state, taken.submitted_at) == ("running", 1000.0)
    assert "x.example" not in await poll(providers, provider)
    providers.end(taken, Ending(output=({"url": "https://x.example/1"},)))
    assert "https://x.example/1" in await poll(providers, provider)
    assert taken.callback_attempts == []


@pytest.mark.parametrize("provider", POLLS)
async def test_failure_has_the_given_message(provider: str) -> None:
    providers = EmulatedProviders()
    await submit(providers, provider)
    providers.end(providers.predictions[0], Ending("model", "the lamp is out"))
    assert "the lamp is out" in await poll(providers, provider)


@pytest.mark.parametrize("provider", POLLS)
async def test_rejection_has_the_given_message_and_dropped_submit_no_response(
    provider: str,
) -> None:
    providers = EmulatedProviders()
    refusal = Rule(fault="refuse_submit", times=1, status=400, reason="no lamp here")
    providers.faults.replace([refusal])
    refused = await submit(providers, provider)
    assert (refused.status_code, "no lamp here" in refused.text) == (400, True)
    providers.faults.replace([Rule(fault="drop_submit")])
    with pytest.raises(httpx.ReadError):
        await submit(providers, provider)
    assert providers.predictions == []


async def test_callback_is_built_without_ending_the_prediction() -> None:
    providers = EmulatedProviders(lambda: 1000.0)
    await submit(providers, "fal")
    [taken] = providers.predictions
    words = msgspec.json.decode(providers.callback(taken, Ending(output="a lamp")))
    assert (words["status"], words["payload"]) == ("OK", "a lamp")
    assert b'"ERROR"' in providers.callback(taken, Ending("moderated", "no"))
    assert taken.state == "running"
    proofs = (providers.headers(taken, b"{}", at) for at in (None, 7.0))
    assert [proof["x-fal-webhook-timestamp"] for proof in proofs] == ["1000", "7"]


async def test_stream_sends_broadcast_events_until_it_is_cut_or_ended() -> None:
    providers = EmulatedProviders()
    await submit(providers, "oxen")
    [taken] = providers.predictions
    async with httpx.AsyncClient(transport=providers, headers=KEYS["oxen"]) as client:
        async with client.stream("GET", OXEN + "/api/events") as answer:
            [stream] = providers.streams
            providers.end(taken)
            providers.broadcast(taken)
            assert stream.unread
            chunks = answer.aiter_bytes()
            assert b'"oxen-1"' in await anext(chunks)
            providers.faults.replace([Rule(fault="cut_stream")])
            with pytest.raises(httpx.ReadError):
                await anext(chunks)
        async with client.stream("GET", OXEN + "/api/events") as answer:
            [stream] = providers.streams
            stream.end()
            assert [chunk async for chunk in answer.aiter_bytes()] in ([], [b""])
    await asyncio.sleep(0)
    assert not providers.streams


async def test_one_account_may_have_several_keys() -> None:
    options = msgspec.structs.replace(BY_HAND, one_account=True)
    for providers, status in (
        (EmulatedProviders(options=options), 200),
        (EmulatedProviders(), 404),
    ):
        await submit(providers, "eachlabs")
        async with httpx.AsyncClient(transport=providers) as client:
            answer = await client.get(POLLS["eachlabs"], headers={"x-api-key": "another"})
        assert answer.status_code == status


def test_unknown_call_raises_lookup_error() -> None:
    providers = EmulatedProviders()
    assert providers.kind(httpx.Request("POST", FAL)) == "fal.submit"
    with pytest.raises(LookupError, match="no provider has DELETE"):
        providers.kind(httpx.Request("DELETE", FAL))
