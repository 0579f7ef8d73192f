"""Requests to providers: submits, retries, ambiguous submits, polls, deadlines, cancels, limits."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import msgspec
import pytest
import uvicorn
from starlette.applications import Starlette

from receiver import create_app
from receiver.emulator import Options, create_emulator, settings_for
from receiver.emulator.ledger import Attempt
from receiver.model.requests import SubmitRequest
from receiver.model.states import TERMINAL
from receiver.model.values import Status
from receiver.predictions.poller import Poller
from receiver.predictions.service import fingerprint
from receiver.predictions.submitter import Sending, TakenOverError
from receiver.providers.adapter import Stopping
from receiver.settings import Settings
from receiver.store.predictions import PredictionStore, SendMark, SubmitBatch, SubmitBudget
from tests.conftest import Disk, Start
from tests.patience import PATIENCE
from tests.providers.samples import blocks
from tests.receiving import (
    API_KEY,
    ENV,
    MODELS,
    PICTURE,
    PUSHING,
    Clock,
    Json,
    Network,
    Sent,
    Station,
    breaks,
    eventually,
    hangs,
    named_in,
    reply,
)

pytestmark = pytest.mark.anyio

ALL = list(MODELS)
ADAPTERS = Settings.read(ENV).adapters()
WAITING = {name: where for name in ALL if (where := blocks(ADAPTERS[name], MODELS[name]))}
"""Providers with blocking submits, and whether these use the same URL (`here`) or another."""
STOPPING = [name for name in ALL if isinstance(ADAPTERS[name], Stopping)]


def blocking(provider: str) -> str:
    return f"{provider}.{'submit' if WAITING[provider] == 'here' else 'run'}"


SOON = {"RECEIVER_POLL_AFTER": "0.02"}
TOO_LONG = 3601.0
"""Seconds, just beyond the deadline of a prediction."""


# --- the submit ---


async def test_submit_request_has_each_providers_headers_and_body(
    start: Start, network: Network
) -> None:
    async with start() as station:
        for provider in ALL:
            await station.submit(provider, provider)
    oxen, eachlabs, fal, replicate = (
        network.of(provider).request for provider in ("oxen", "eachlabs", "fal", "replicate")
    )
    assert oxen.headers["authorization"] == "Bearer the-oxen-key"
    assert json.loads(oxen.content) == {"model": "nano-banana", "prompt": "oxen"}
    assert eachlabs.headers["authorization"] == "Bearer the-eachlabs-key"
    assert eachlabs.headers["x-api-key"] == "the-eachlabs-key"
    body = json.loads(eachlabs.content)
    assert body.pop("webhook_url").startswith("https://hooks.test/webhooks/eachlabs/pred_")
    assert len(body.pop("webhook_secret")) >= 32
    assert body == {"model": "nano-banana", "version": "0.0.1", "input": {"prompt": "eachlabs"}}
    assert fal.headers["authorization"] == "Key the-fal-key"
    assert fal.url.path == "/fal/queue/fal-ai/nano-banana"
    assert fal.url.params["fal_webhook"].startswith("https://hooks.test/webhooks/fal/pred_")
    assert json.loads(fal.content) == {"prompt": "fal"}
    assert replicate.headers["authorization"] == "Bearer the-replicate-key"
    assert replicate.url.path == "/replicate/v1/models/google/nano-banana/predictions"
    body = json.loads(replicate.content)
    assert body.pop("webhook").startswith("https://hooks.test/webhooks/replicate/pred_")
    assert body == {"input": {"prompt": "replicate"}, "webhook_events_filter": ["completed"]}


async def test_prediction_is_stored_as_submitting_before_the_submit_is_sent(
    start: Start, network: Network
) -> None:
    seen: list[Any] = []

    async def look(request: httpx.Request) -> httpx.Response:
        seen.extend(station.rows("SELECT status, submits, due_at IS NOT NULL FROM predictions"))
        return await network.by_emulator(request)

    network.script("eachlabs.submit", look)
    async with start() as station:
        await station.submit()
    assert seen == [("submitting", 1, 1)]


async def test_submit_body_is_sent_only_after_the_send_mark() -> None:
    bodies: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        bodies.append(await reader.read(65536))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    marked: list[bool] = []

    async def mark() -> bool:
        marked.append(True)
        assert not any(b"the prompt" in body for body in bodies)
        return len(marked) > 1

    async with httpx.AsyncClient() as client:
        request = client.build_request(
            "POST", f"http://127.0.0.1:{port}/", json={"prompt": "the prompt"}
        )
        for taken in (False, True):
            sending = Sending(request, mark)
            with pytest.raises((TakenOverError, httpx.TransportError)):
                await client.send(sending.request)
            assert sending.begun is taken
            assert sending.request.headers["content-length"] == request.headers["content-length"]
            assert "transfer-encoding" not in sending.request.headers
    server.close()
    await server.wait_closed()


REFUSALS = [
    (
        "eachlabs",
        {"status": 402, "error": "payment required", "details": "x"},
        402,
        "payment required",
    ),
    (
        "eachlabs",
        {"status": "error", "message": "no", "details": "such model"},
        404,
        "no; such model",
    ),
    (
        "fal",
        {"detail": [{"loc": ["body", "prompt"], "msg": "field required"}]},
        422,
        "field required",
    ),
    ("fal", {"detail": "the balance is used up"}, 403, "the balance is used up"),
    (
        "oxen",
        {"error": {"type": "t", "title": "Insufficient credits"}},
        402,
        "Insufficient credits",
    ),
    ("oxen", {"error": {"message": "Prompt cannot be empty"}}, 400, "Prompt cannot be empty"),
    ("fal", None, 307, "HTTP 307"),
]


@pytest.mark.parametrize("mode", ["queue", "sync"])
async def test_rejected_submit_fails_with_the_providers_message(
    start: Start, network: Network, mode: str
) -> None:
    async with start() as station:
        for number, (provider, body, status, words) in enumerate(REFUSALS, 1):
            call = f"{provider}.{'submit' if mode == 'queue' else 'run'}"
            before = network.count(call)
            network.script(call, reply(body, status, location="https://elsewhere.test"))
            found = await station.submit(provider, words, mode=mode)
            assert (found["status"], found["error"]["code"]) == ("failed", "rejected"), words
            assert words in found["error"]["message"]
            assert station.count("events") == number, words
            assert network.count(call) == before + 1, words


async def test_rejection_that_is_not_json_reaches_the_handlers(
    start: Start, network: Network
) -> None:
    network.script("eachlabs.submit", reply(None, 404, text="<html>\xff not here"))
    async with start(*_watchers()) as station:
        found = await station.submit()
        assert found["error"]["code"] == "rejected"
        await eventually(lambda: station.rows("SELECT 1 FROM deliveries WHERE state = 'done'"))
        await station.push(await station.submitted("eachlabs", "the next"), ok=False)
        await eventually(
            lambda: station.rows("SELECT 1 FROM deliveries WHERE state = 'done'"),
            lambda rows: len(rows) == 2,
        )


def _watchers() -> Sequence[Any]:
    from receiver import Event, on  # noqa: PLC0415 - registered once per test

    @on("failed", name="watcher")
    async def watch(event: Event) -> None:
        assert event.raw is not None

    return [watch]


POSTPONING = [
    reply({}, 429, retry_after="0"),
    reply({}, 503, retry_after="0"),
    reply({"error": "busy"}, 500),
    reply(text="<html>bad gateway", status=502),
    breaks(httpx.ConnectError),
    breaks(httpx.ConnectTimeout),
    breaks(httpx.PoolTimeout),
]


@pytest.mark.parametrize("trouble", POSTPONING)
async def test_submit_is_retried_after_429_5xx_or_a_connection_error(
    start: Start, network: Network, trouble: Any
) -> None:
    network.script("eachlabs.submit", trouble)
    async with start() as station:
        prediction = await station.submit()
        assert prediction["status"] in {"queued", "submitting", "processing"}
        found = await station.until(prediction["id"], "processing")
        assert found["provider_id"] == "eachlabs-1"
        assert station.one("SELECT submits FROM predictions") == 2


async def test_429_with_retry_after_pauses_all_submits_to_the_provider(
    start: Start, network: Network
) -> None:
    clock = Clock()
    network.script("fal.submit", reply({}, 429, retry_after="100"))
    async with start(clock=clock) as station:
        first = await station.submit("fal", "first")
        assert first["status"] == "queued"
        assert (await station.submit("fal", "second"))["status"] == "queued"
        assert network.count("fal.submit") == 1
        clock.ahead = 50
        assert (await station.submit("fal", "third"))["status"] == "queued"
        assert network.count("fal.submit") == 1
        clock.ahead = 101
        await station.submit("fal", "fourth")
        await eventually(lambda: len(network.sent) == 4)
    assert {sent.prompt for sent in network.sent} == {"first", "second", "third", "fourth"}


@pytest.mark.both_engines
@pytest.mark.parametrize("status", [429, 503])
async def test_postponed_submit_expires_at_its_deadline_while_none_can_be_sent(
    start: Start, network: Network, status: int
) -> None:
    clock = Clock()
    wait = "80000" if status == 429 else "100"
    network.script("eachlabs.submit", reply({"error": "busy"}, status, retry_after=wait))
    async with start(clock=clock, EACHLABS_MAX_IN_FLIGHT="1") as station:
        prediction = await station.submit()
        if status == 503:  # a 503 does not pause the provider, so fill the limit in flight
            await station.submitted("eachlabs", "another")
            station.edit("UPDATE predictions SET deadline_at = NULL WHERE status = 'processing'")
        clock.ahead = TOO_LONG
        await station.http.post("/v1/drain")
        found = await station.until(prediction["id"], "failed")
        assert found["error"]["message"] == "every submit was put off; last: busy"
        assert (found["error"]["code"], found["cost"]["amount"]) == ("expired", 0)
    assert network.count("eachlabs.submit") == 1 + len(network.sent)


async def test_submit_answered_503_until_its_deadline_expires(
    start: Start, network: Network
) -> None:
    network.always("eachlabs.submit", reply({}, 503))
    async with start() as station:
        prediction = await station.submit()
        await station.until(prediction["id"], "queued")
        station.clock.ahead = TOO_LONG
        found = await station.until(prediction["id"], "failed")
        assert found["error"]["code"] == "expired"
        assert station.count("events") == 1


@pytest.mark.both_engines
async def test_submit_is_not_sent_if_the_store_answers_after_its_latest_time(
    start: Start, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = PredictionStore.mark_sent

    async def mark_slowly(self: PredictionStore, given: SendMark) -> bool:
        station.clock.ahead = TOO_LONG
        return await mark(self, given)

    monkeypatch.setattr(PredictionStore, "mark_sent", mark_slowly)
    async with start() as station:
        prediction = await station.submit()
        found = await station.until(prediction["id"], "failed")
        assert (found["error"]["code"], found["cost"]["amount"]) == ("expired", 0)
        assert station.one("SELECT submitted_at FROM predictions") is None
    assert network.sent == []


# --- ambiguous submits ---


async def _submit_ambiguously(station: Station, provider: str, *, taken: bool = True) -> str:
    """Submit, but lose the answer, so that the submit is ambiguous; `taken`: it was accepted."""

    async def silent(request: httpx.Request) -> httpx.Response:
        if taken:
            await station.network.by_emulator(request)
        raise httpx.ReadError("gone", request=request)

    station.network.script(f"{provider}.submit", silent)
    found = await station.submit(provider)
    # It may already have been found by a search, so its status does not show it.
    metrics = (await station.world.get("/metrics")).text
    result = f'{{provider="{provider}",result="unconfirmed"}}'
    assert f"receiver_submits_total{result} 1.0" in metrics
    return str(found["id"])


@pytest.mark.parametrize("provider", PUSHING)
async def test_callback_resolves_an_ambiguous_submit(
    start: Start, network: Network, provider: str
) -> None:
    async with start() as station:
        prediction_id = await _submit_ambiguously(station, provider)
        assert (await station.push(network.sent[0])).json() == {"status": "accepted"}
        found = await station.read(prediction_id)
        assert (found["status"], found["provider_id"]) == ("succeeded", network.sent[0].id)


@pytest.mark.parametrize("provider", ALL)
async def test_unresolved_ambiguous_submit_fails_as_unconfirmed_at_its_deadline(
    start: Start, network: Network, provider: str
) -> None:
    async with start(**SOON) as station:
        prediction_id = await _submit_ambiguously(station, provider, taken=False)
        station.clock.ahead = TOO_LONG
        found = await station.until(prediction_id, "failed")
        assert (found["error"]["code"], found["channel"]) == ("unconfirmed", None)
        assert station.count("events") == 1
    assert network.count(f"{provider}.submit") == 1


@pytest.mark.parametrize("provider", ALL)
async def test_2xx_without_id_is_an_ambiguous_submit(
    start: Start, network: Network, provider: str
) -> None:
    answers = {
        "nothing": reply({}),
        "page": reply(text="<html>"),
        "empty": reply(text=""),
        "list": reply([1]),
        "created": reply({"status": "ok"}, 201),
    }
    network.script(f"{provider}.submit", *answers.values())
    async with start(**{f"{provider.upper()}_MAX_IN_FLIGHT": "none"}) as station:
        found = {name: (await station.submit(provider, name))["status"] for name in answers}
    assert found == dict.fromkeys(answers, "unconfirmed")


async def test_ambiguous_oxen_submit_is_found_in_the_list_of_generations(
    start: Start, network: Network
) -> None:
    def row(number: int, **change: Any) -> Json:
        base = {
            "generation_id": f"gen-{number}",
            "model_name": "nano-banana",
            "prompt": "a lighthouse",
            "status": "processing",
            "enqueued_at": int(time.time()),
        }
        return {**base, **change}

    rows = [
        row(1, prompt="another"),
        row(2, model_name="other"),
        row(3, enqueued_at=int(time.time()) - 5000),
        row(4, enqueued_at="x"),
        {},
        row(5, generation_id="oxen-1"),
    ]
    network.always("oxen.list", reply({"generations": [*rows, 7]}))
    async with start(**SOON) as station:
        prediction_id = await _submit_ambiguously(station, "oxen")
        found = await station.until(prediction_id, "processing")
        assert found["provider_id"] == "oxen-1"
        network.end_and_broadcast(network.sent[0])
        await station.until(prediction_id, "succeeded")
    assert network.count("oxen.submit") == 1


@pytest.mark.parametrize("provider", ["eachlabs", "fal"])
async def test_ambiguous_submit_is_found_by_search_if_its_callback_was_lost(
    start: Start, network: Network, provider: str
) -> None:
    async with start(**SOON) as station:
        known = await station.submitted(provider)  # the same input, but another prediction
        network.emulator.end(known.prediction)
        _called(known)
        prediction_id = await _submit_ambiguously(station, provider)
        lost = network.sent[-1]
        await eventually(lambda: network.count(_SEARCHES[provider]))
        assert (await station.read(prediction_id))["status"] == "unconfirmed"  # it is still running
        network.emulator.end(lost.prediction)
        _called(lost)
        found = await station.until(prediction_id, "succeeded")
        assert (found["provider_id"], found["channel"]) == (lost.id, "poll")
        assert station.count("events") == 2
    assert network.count(f"{provider}.submit") == 2


_SEARCHES = {"eachlabs": "eachlabs.webhooks", "fal": "fal.requests"}


def _called(sent: Sent) -> None:
    """Record at the emulator that the callback was sent, but lost."""
    sent.prediction.record_attempt(Attempt(time.time(), error="lost"))


async def test_search_accepts_only_a_callback_url_with_a_valid_token(
    start: Start, network: Network
) -> None:
    async with start(**SOON) as station:
        other = await station.submitted("eachlabs", "another")
        prediction_id = await _submit_ambiguously(station, "eachlabs", taken=False)
        token = other.token
        urls = [
            f"https://hooks.test/webhooks/eachlabs/{prediction_id}",
            f"https://hooks.test/webhooks/eachlabs/{prediction_id}.",
            f"https://hooks.test/webhooks/eachlabs/{prediction_id}.{token.partition('.')[2]}",
            f"https://hooks.test/webhooks/eachlabs/{token}",
            prediction_id,
            "",
        ]
        rows = [
            {"execution_id": f"not-ours-{at}", "url": url, "created_at": "2100-01-01T00:00:00Z"}
            for at, url in enumerate(urls)
        ]
        network.always("eachlabs.webhooks", reply({"webhooks": rows, "limit": 100, "offset": 0}))
        await eventually(lambda: network.count("eachlabs.webhooks") >= 3)
        assert (await station.read(prediction_id))["status"] == "unconfirmed"
        polled = [request.url.path for kind, request in network.calls if kind == "eachlabs.poll"]
        assert not any("not-ours" in path for path in polled)


async def test_search_for_an_ambiguous_submit_reads_at_most_six_pages(
    start: Start, network: Network
) -> None:
    async def endless(request: httpx.Request) -> httpx.Response:
        offset = int(request.url.params["offset"])
        rows = [{"execution_id": f"exec-{offset}", "url": "https://others.test/hook"}]
        return reply({"webhooks": rows, "limit": 1, "offset": offset})(request)  # type: ignore[return-value] # it answers at once

    network.always("eachlabs.webhooks", endless)
    async with start() as station:
        await _submit_ambiguously(station, "eachlabs", taken=False)
        station.clock.ahead = 60.0
        await station.http.post("/v1/drain?seconds=1")
        await eventually(lambda: station.one("SELECT polls FROM predictions"))
        asked = [
            request.url.params["offset"]
            for kind, request in network.calls
            if kind == "eachlabs.webhooks"
        ]
        assert asked[:6] == ["0", "1", "2", "3", "4", "5"]
        assert set(asked) == set(asked[:6])


@pytest.mark.parametrize("provider", ["eachlabs", "fal"])
async def test_submit_stays_unconfirmed_until_its_deadline_if_the_search_gets_403(
    start: Start, network: Network, provider: str
) -> None:
    refusal = {"error": {"type": "authorization_error", "message": "the key may not list"}}
    network.always(_SEARCHES[provider], reply(refusal, 403))
    async with start(**SOON) as station:
        prediction_id = await _submit_ambiguously(station, provider)
        await eventually(lambda: network.count(_SEARCHES[provider]) >= 2)
        station.clock.ahead = TOO_LONG
        found = await station.until(prediction_id, "failed")
        assert found["error"]["code"] == "unconfirmed"
        assert "the key may not list" in found["error"]["message"]
        assert station.count("events") == 1


async def test_success_callback_after_a_cancel_is_discarded_as_late(
    start: Start,
) -> None:
    async with start() as station:
        sent = await station.submitted("eachlabs")
        answer = await station.http.post(f"/v1/predictions/{sent.prediction_id}/cancel")
        assert answer.json()["status"] == "canceled"
        assert (await station.push(sent)).json() == {"status": "duplicate"}
        [late] = (await station.http.get("/v1/discarded?kind=late")).json()["data"]
        assert late["prediction_id"] == sent.prediction_id
        assert (await station.read(sent.prediction_id))["status"] == "canceled"
        assert station.rows("SELECT type FROM events") == [("prediction.canceled",)]


async def test_failure_marked_as_retryable_is_not_submitted_again(
    start: Start, network: Network
) -> None:
    async with start() as station:
        sent = await station.submitted("eachlabs")
        envelope = {"error_message": "Worker lost", "error_code": "WORKER_LOST", "retryable": True}
        body = {"exec_id": sent.id, "flow_id": None, "status": "failed", "output": envelope}
        await station.push(sent, body=json.dumps(body).encode())
        found = await station.read(sent.prediction_id)
        assert (found["status"], found["error"]["message"]) == ("failed", "Worker lost")
        await station.http.post("/v1/drain?seconds=1")
    assert network.count("eachlabs.submit") == 1


@pytest.mark.parametrize(
    ("model", "path"),
    [("veo-3-1", "/oxen/api/ai/videos/generate"), ("nano-banana", "/oxen/api/ai/images/edit")],
)
async def test_blocking_oxen_submit_uses_the_endpoint_of_its_model(
    start: Start, network: Network, model: str, path: str
) -> None:
    network.script("oxen.model", reply({}, 503), breaks(httpx.ReadError))
    async with start() as station:
        given = {"prompt": "waves", "response_format": "b64_json"}
        answer = await station.submit("oxen", model=model, mode="sync", input=given)
        station.clock.ahead = 60.0
        found = await station.until(answer["id"], "succeeded")
        kind = "video/mp4" if "videos" in path else "image/png"
        assert found["output"][0]["url"].startswith(f"data:{kind};base64,")
    assert [request.url.path for kind, request in network.calls if kind == "oxen.run"] == [path]
    assert network.count("oxen.model") == 3


@pytest.mark.usefixtures("stops_soon")
@pytest.mark.both_engines
async def test_submit_interrupted_during_the_model_lookup_is_sent_after_a_restart(
    start: Start, network: Network
) -> None:
    network.script("oxen.model", hangs)
    async with start() as station:
        waiting = asyncio.create_task(station.submit("oxen", mode="sync"))
        await eventually(lambda: network.count("oxen.model") == 1)
    await asyncio.gather(waiting, return_exceptions=True)
    assert network.count("oxen.run") == 0
    async with start() as station:
        await station.until(station.one("SELECT id FROM predictions"), "succeeded")
    assert network.count("oxen.run") == 1


@pytest.mark.both_engines
@pytest.mark.parametrize(
    ("asked", "left"), [("oxen.model", Status.QUEUED), ("oxen.run", Status.UNCONFIRMED)]
)
async def test_submit_interrupted_by_shutdown_is_due_at_once(
    start: Start, network: Network, asked: str, left: Status
) -> None:
    network.script(asked, hangs)
    async with start() as station:
        waiting = asyncio.create_task(station.submit("oxen", mode="sync"))
        await eventually(lambda: network.count(asked) == 1)
    await asyncio.gather(waiting, return_exceptions=True)
    [(status, due_at)] = station.rows("SELECT status, due_at FROM predictions")
    assert (status, due_at <= station.clock()) == (left, True)


async def test_sync_submit_of_a_model_without_blocking_endpoint_is_rejected_unsent(
    start: Start, network: Network
) -> None:
    network.script("oxen.model", reply({"id": "new-model", "endpoint": "/worlds/generate"}))
    async with start() as station:
        found = await station.submit("oxen", model="new-model", mode="sync")
        assert (found["status"], found["error"]["code"]) == ("failed", "rejected")
        assert "leave out the mode `sync`" in found["error"]["message"]
    assert network.count("oxen.run") == 0


async def test_ambiguous_submit_is_never_matched_to_another_predictions_id(
    start: Start, network: Network
) -> None:
    known = {
        "generation_id": "oxen-1",
        "model_name": "nano-banana",
        "prompt": "a lighthouse",
        "status": "processing",
        "enqueued_at": int(time.time()),
    }
    network.always("oxen.list", reply({"generations": [known]}))
    async with start(**SOON) as station:
        first = await station.submit("oxen")
        assert first["provider_id"] == "oxen-1"
        prediction_id = await _submit_ambiguously(station, "oxen", taken=False)
        await eventually(lambda: network.count("oxen.list") >= 4)
        assert (await station.read(prediction_id))["status"] == "unconfirmed"


# --- polls ---


@pytest.mark.parametrize("provider", ALL)
async def test_due_predictions_are_polled_with_backoff_until_they_end(
    start: Start, network: Network, provider: str
) -> None:
    times: list[float] = []

    async def note(request: httpx.Request) -> httpx.Response:
        times.append(time.monotonic())
        return await (network.by_emulator if len(times) < 6 else network.ends)(request)

    network.always(f"{provider}.poll", note)
    async with start(**SOON) as station:
        prediction = await station.submit(provider)
        found = await station.until(prediction["id"], "succeeded")
        assert (found["channel"], found["output"]) == ("poll", [{"url": PICTURE}])
    gaps = [after - before for before, after in pairwise(times)]
    assert gaps[-1] > 0.02 * 2**3 * 0.9
    assert len(times) == 6


TROUBLES = {
    "fault": reply({}, 500),
    "missing": reply({}, 404),
    "moved": reply({}, 302, location="https://elsewhere.test"),
    "page": reply(text="<html>"),
    "deep": reply(text="[" * 5000),
    "number": reply({"status": 7}),
    "cut": breaks(httpx.ReadError),
    "away": breaks(httpx.ConnectError),
}


@pytest.mark.parametrize("provider", ALL)
async def test_poll_without_a_usable_answer_is_retried(
    start: Start, network: Network, provider: str
) -> None:
    polls: Counter[str] = Counter()

    async def answer(request: httpx.Request) -> httpx.Response:
        """Answer twice with the fault named by the prediction's prompt, then with its end."""
        [name] = [sent.prompt for sent in network.sent if sent.id in named_in(request)]
        polls[name] += 1
        if polls[name] > 2:
            return await network.ends(request)
        troubled = TROUBLES[name](request)
        assert isinstance(troubled, httpx.Response)
        return troubled

    network.always(f"{provider}.poll", answer)
    async with start(**SOON, **{f"{provider.upper()}_MAX_IN_FLIGHT": "none"}) as station:
        made = [await station.submit(provider, name) for name in TROUBLES]
        for prediction in made:
            await station.until(prediction["id"], "succeeded")
    assert polls == dict.fromkeys(TROUBLES, 3)


async def test_poll_answered_429_waits_for_retry_after(start: Start, network: Network) -> None:
    clock = Clock()
    network.script("fal.poll", reply({}, 429, retry_after="50"), network.ends)
    async with start(**SOON, clock=clock) as station:
        began = clock()
        prediction = await station.submit("fal")
        await eventually(lambda: station.one("SELECT polls FROM predictions"))
        assert station.one("SELECT due_at FROM predictions") >= began + 50
        assert network.count("fal.poll") == 1
        assert (await station.read(prediction["id"]))["status"] == "processing"


async def test_expiry_waits_a_minute_for_a_poll_if_the_provider_is_paused_by_429(
    start: Start, network: Network
) -> None:
    clock = Clock()
    network.always("fal.poll", reply({}, 429, retry_after="80000"))
    async with start(**SOON, clock=clock) as station:
        prediction = await station.submit("fal")
        await eventually(lambda: network.count("fal.poll"))
        clock.ahead = TOO_LONG
        await station.http.post("/v1/drain")
        since = "SELECT due_at - deadline_at FROM predictions"
        await eventually(lambda: station.one(since), lambda seconds: 0 < seconds <= 60)
        clock.ahead = TOO_LONG + 61
        await station.http.post("/v1/drain")
        found = await station.until(prediction["id"], "failed")
        assert (found["error"]["code"], network.count("fal.poll")) == ("expired", 1)


@pytest.mark.parametrize("provider", ALL)
async def test_prediction_that_never_ends_expires_at_its_deadline(
    start: Start, network: Network, provider: str
) -> None:
    async with start(**SOON) as station:
        sent = await station.submitted(provider)
        await eventually(lambda: network.count(f"{provider}.poll"))
        station.clock.ahead = TOO_LONG
        found = await eventually(
            lambda: station.rows("SELECT status, error_code, channel FROM predictions"),
            lambda rows: rows[0][0] == "failed",
        )
        assert found == [("failed", "expired", None)]
        if sent.hook:
            late = await station.push(sent, at=station.clock())
            assert late.json() == {"status": "duplicate"}
        assert station.rows("SELECT type FROM events") == [("prediction.failed",)]


async def test_poll_interrupted_by_a_stop_is_repeated_at_the_next_start(
    start: Start, network: Network
) -> None:
    network.script("fal.poll", hangs)
    async with start(**SOON) as station:
        prediction = await station.submit("fal")
        await eventually(lambda: network.count("fal.poll") == 1)
    network.always("fal.poll", network.ends)
    async with start() as station:
        found = await station.until(prediction["id"], "succeeded")
        assert found["channel"] == "poll"


async def test_new_prediction_is_polled_in_time_by_an_idle_poller(
    start: Start, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    start_due_polls = Poller.start_due_polls

    async def look(poller: Poller) -> float:
        looks.append(await start_due_polls(poller))
        return looks[-1]

    # So that no poll comes by itself.
    monkeypatch.setattr("receiver.predictions.poller.LONGEST_NAP", 3600.0)
    monkeypatch.setattr(Poller, "start_due_polls", look)
    network.always("fal.poll", network.ends)
    async with start(**SOON) as station:
        await eventually(lambda: looks)
        assert looks[-1] == 3600.0
        prediction = await station.submit("fal")
        await station.until(prediction["id"], "succeeded")


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.test/x",
        "http://providers.test/x",
        "https://providers.test:444/x",
        "https://providers.test.evil.test",
        "file:///etc/passwd",
        "https://[",
        7,
        None,
    ],
)
async def test_fal_key_is_never_sent_to_urls_on_unknown_hosts(
    start: Start, network: Network, url: object
) -> None:
    links = dict.fromkeys(("status_url", "response_url", "cancel_url"), url)

    async def led_astray(request: httpx.Request) -> httpx.Response:
        answer = await network.by_emulator(request)
        return httpx.Response(200, json={**answer.json(), **links})

    network.script("fal.submit", led_astray)
    network.always("fal.poll", network.ends)
    async with start(**SOON) as station:
        prediction = await station.submit("fal", model="fal-ai/flux/dev")
        await station.until(prediction["id"], "succeeded")
    paths = [request.url.path for kind, request in network.calls if kind == "fal.poll"]
    assert paths == ["/fal/queue/fal-ai/flux/requests/fal-1/status"]


async def test_eachlabs_confirm_takes_the_outcome_from_a_poll_not_the_callback(
    start: Start, network: Network
) -> None:
    network.always(
        "eachlabs.poll", reply({"id": "eachlabs-1", "status": "error", "output": {"error": "no"}})
    )
    async with start(EACHLABS_CONFIRM="1") as station:
        sent = await station.submitted("eachlabs")
        assert (await station.push(sent, ok=True)).json() == {"status": "accepted"}
        found = await station.until(sent.prediction_id, "failed")
        assert (found["channel"], found["error"]["message"]) == ("poll", "no")


# --- cancel ---


async def _cancel(station: Station, prediction_id: str) -> httpx.Response:
    return await station.http.post(f"/v1/predictions/{prediction_id}/cancel")


@pytest.mark.parametrize("provider", STOPPING)
@pytest.mark.parametrize("forgotten", [False, True])
async def test_processing_prediction_is_canceled_at_its_provider(
    start: Start, network: Network, provider: str, forgotten: bool
) -> None:
    poll = f"{provider}.poll"
    if forgotten:
        network.always(poll, reply({}, 404))
    async with start() as station:
        prediction = await station.submit(provider)
        answer = await _cancel(station, prediction["id"])
        assert (answer.status_code, answer.json()["status"]) == (200, "canceled")
        assert answer.json()["error"]["code"] == "canceled"
        assert (await _cancel(station, prediction["id"])).json() == answer.json()
        assert station.rows("SELECT type FROM events") == [("prediction.canceled",)]
    assert network.count(f"{provider}.cancel") == 1


@pytest.mark.parametrize("provider", [each for each in ALL if each not in STOPPING])
async def test_cancel_returns_409_if_the_provider_has_no_cancel(
    start: Start, network: Network, provider: str
) -> None:
    async with start() as station:
        prediction = await station.submit(provider)
        answer = await _cancel(station, prediction["id"])
        assert answer.status_code == 409
        assert answer.json()["type"] == "urn:receiver:problem:cannot-cancel"
        assert (await station.push(network.sent[0])).json() == {"status": "accepted"}
        assert (await station.read(prediction["id"]))["status"] == "succeeded"


async def test_queued_prediction_is_canceled_without_a_provider_request(
    start: Start, network: Network
) -> None:
    async with start(EACHLABS_MAX_IN_FLIGHT="1") as station:
        await station.submit(prompt="first")
        waiting = await station.submit(prompt="second")
        assert waiting["status"] == "queued"
        answer = await _cancel(station, waiting["id"])
        assert (answer.status_code, answer.json()["status"]) == (200, "canceled")
        await station.push(network.of("first"))
        assert len(network.sent) == 1


@pytest.mark.parametrize(
    ("provider", "mode", "is_lost"),
    [
        ("eachlabs", "queue", False),
        ("replicate", "queue", False),
        ("replicate", "sync", False),
        ("replicate", "queue", True),
    ],
)
async def test_cancel_during_the_submit_is_sent_once_the_provider_id_is_known(
    start: Start, network: Network, provider: str, mode: str, is_lost: bool
) -> None:
    answering = asyncio.Event()

    async def slowly(request: httpx.Request) -> httpx.Response:
        await answering.wait()
        request.headers.pop("prefer", None)  # so that a blocking call is answered before the end
        response = await network.by_emulator(request)
        if is_lost:
            raise httpx.ReadError("gone", request=request)
        return response

    network.script(f"{provider}.submit", slowly)
    async with start(**SOON) as station:
        submitting = asyncio.create_task(station.submit(provider, mode=mode))
        await eventually(lambda: network.count(f"{provider}.submit"))
        prediction_id = station.one("SELECT id FROM predictions")
        answer = await _cancel(station, prediction_id)
        assert (answer.status_code, answer.json()["status"]) == (202, "submitting")
        answering.set()
        await submitting
        await station.until(prediction_id, "canceled")
    assert network.count(f"{provider}.cancel") == 1


async def test_cancel_that_fails_returns_a_problem_with_the_reason(
    start: Start, network: Network
) -> None:
    async with start() as station:
        prediction_id = await _submit_ambiguously(station, "fal")
        assert (await _cancel(station, prediction_id)).json()["type"].endswith(":unconfirmed")
        sent = await station.submitted("eachlabs", "ended")
        await station.push(sent)
        ended = await _cancel(station, sent.prediction_id)
        assert (ended.status_code, ended.json()["type"]) == (
            409,
            "urn:receiver:problem:already-ended",
        )
        sent = await station.submitted("eachlabs", "silent")
        network.script("eachlabs.cancel", breaks(httpx.ReadError))
        silent = await _cancel(station, sent.prediction_id)
        assert (silent.status_code, silent.json()["type"]) == (
            502,
            "urn:receiver:problem:provider-unavailable",
        )
        assert (await station.read(sent.prediction_id))["status"] == "processing"


async def test_cancel_after_the_end_at_the_provider_returns_the_outcome(
    start: Start, network: Network
) -> None:
    network.script("eachlabs.cancel", reply({"error": "finished"}, 409))
    network.always("eachlabs.poll", network.ends)
    async with start() as station:
        prediction = await station.submit()
        answer = await _cancel(station, prediction["id"])
        assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")


# --- the blocking endpoints ---


@pytest.mark.parametrize("provider", WAITING)
async def test_sync_mode_uses_the_blocking_endpoint(
    start: Start, network: Network, provider: str
) -> None:
    async with start() as station:
        answer = await station.http.post(
            "/v1/predictions",
            json={
                "provider": provider,
                "model": MODELS[provider],
                "input": {"prompt": "x"},
                "mode": "sync",
            },
        )
        found = answer.json()
        assert (answer.status_code, found["status"]) == (200, "succeeded")
        assert (found["mode"], found["channel"]) == ("sync", "sync")
        (output,) = found["output"]
        if provider == "openrouter":  # its blocking answer contains the picture itself
            assert output["url"].startswith("data:image/png;base64,")
        else:
            assert output["url"] == PICTURE
    kinds = {kind for kind, _ in network.calls if kind.startswith(f"{provider}.")}
    assert network.count(blocking(provider)) == 1
    assert (f"{provider}.submit" in kinds) == (WAITING[provider] == "here")


@pytest.mark.parametrize("provider", WAITING)
async def test_broken_blocking_call_is_an_ambiguous_submit(
    start: Start, network: Network, provider: str
) -> None:
    network.script(blocking(provider), breaks(httpx.ReadError))
    async with start(**SOON) as station:
        waiting = asyncio.create_task(station.submit(provider, mode="sync"))
        await eventually(
            lambda: station.rows("SELECT 1 FROM predictions WHERE status = 'unconfirmed'")
        )
        station.clock.ahead = TOO_LONG
        found = await waiting
        assert found["error"]["code"] == "unconfirmed"
    assert network.count(blocking(provider)) == 1


@pytest.mark.parametrize("provider", [each for each in WAITING if each != "fal"])
async def test_blocking_call_with_a_5xx_fails_without_a_retry(
    start: Start, network: Network, provider: str
) -> None:
    network.script(blocking(provider), reply({"error": "out of memory"}, 502, retry_after="0"))
    async with start() as station:
        found = await station.submit(provider, mode="sync")
        assert found["status"] == "failed"
        assert found["error"] == {"code": "provider_error", "message": "out of memory"}
        assert found["cost"] is None  # it may be billed
    assert network.count(blocking(provider)) == 1


# --- limits ---


async def test_submits_over_the_in_flight_limit_are_queued_in_order(
    start: Start, network: Network
) -> None:
    async with start(EACHLABS_MAX_IN_FLIGHT="2") as station:
        for number in range(6):
            await station.submit(prompt=f"{number}")
        for ended in range(4):
            await eventually(lambda: len(network.sent) == ended + 2)  # noqa: B023 - read at once
            await station.push(network.sent[ended])
        await eventually(lambda: len(network.sent) == 6)
    assert [sent.prompt for sent in network.sent] == [f"{number}" for number in range(6)]


async def test_rate_limit_per_minute_holds_across_a_restart(start: Start, network: Network) -> None:
    clock = Clock()
    env = {"EACHLABS_REQUESTS_PER_MINUTE": "3", "EACHLABS_MAX_IN_FLIGHT": "none"}
    async with start(clock=clock, **env) as station:
        for number in range(5):
            await station.submit(prompt=f"{number}")
        await eventually(lambda: len(network.sent) == 3)
        for sent in network.sent:
            await station.push(sent)  # so that no poll counts in the next minute
    async with start(clock=clock, **env) as station:
        assert (await station.submit(prompt="5"))["status"] == "queued"
        assert len(network.sent) == 3
        clock.ahead = 61
        await station.submit(prompt="6")
        await eventually(lambda: len(network.sent) >= 6)
        assert station.rows("SELECT count(*) FROM predictions WHERE status = 'queued'") == [(1,)]
    assert [sent.prompt for sent in network.sent] == [f"{number}" for number in range(6)]


async def test_blocking_submits_are_sent_within_the_rate_limit_per_minute(
    start: Start, network: Network
) -> None:
    clock = Clock()
    async with start(clock=clock, OXEN_REQUESTS_PER_MINUTE="2") as station:
        for number in range(4):
            await station.submit(
                "oxen", f"{number}", mode="sync", headers={"Prefer": "respond-async"}
            )
        for minute in (1, 2):
            done = "SELECT count(*) FROM predictions WHERE status = 'succeeded'"
            await eventually(lambda: station.one(done), lambda count: count == 2 * minute)  # noqa: B023 - read at once
            assert network.count("oxen.run") == 2 * minute
            clock.ahead += 61
            await station.http.post("/v1/drain")


async def test_concurrent_submit_calls_all_return_after_the_providers_answer(
    start: Start, network: Network
) -> None:
    async with start(EACHLABS_REQUESTS_PER_MINUTE="50") as station:
        for wave in range(3):
            made = await asyncio.gather(*(station.submit(prompt=f"{wave} {n}") for n in range(3)))
            assert [one["status"] for one in made] == ["processing"] * 3
        assert len(network.sent) == 9


async def test_full_disk_does_not_block_a_caller_whose_prediction_is_stored(
    start: Start, network: Network, disk: Disk
) -> None:
    def answered_when_full(request: httpx.Request) -> Any:
        disk.full = True
        return reply({}, 503)(request)

    network.script("fal.submit", answered_when_full)
    async with start() as station, asyncio.timeout(PATIENCE):
        made = await station.submit("fal")
        assert (made["status"], disk.full) == ("submitting", True)
        disk.full = False
        await station.until(made["id"], "processing")
        assert network.count("fal.submit") == 2


async def test_concurrent_submits_are_begun_in_a_few_batches(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_begin, begins = asyncio.Event(), 0
    begin = PredictionStore.begin_submits

    async def held(store: PredictionStore, wish: SubmitBudget) -> SubmitBatch:
        nonlocal begins
        begins += wish.provider == "eachlabs"
        await may_begin.wait()
        return await begin(store, wish)

    monkeypatch.setattr(PredictionStore, "begin_submits", held)
    async with start(EACHLABS_MAX_IN_FLIGHT="none", EACHLABS_REQUESTS_PER_MINUTE="none") as station:
        submits = [asyncio.create_task(station.submit(prompt=f"{number}")) for number in range(40)]
        await eventually(lambda: station.count("predictions") == 40)
        may_begin.set()
        await asyncio.gather(*submits)
    assert begins < 10


# --- against the emulator, over real sockets ---


@dataclass
class Live:
    """A receiver and the emulated providers, each on its own port."""

    http: httpx.AsyncClient
    emulator: str

    async def submit(self, provider: str, prompt: str) -> Json:
        body = {"provider": provider, "model": MODELS[provider], "input": {"prompt": prompt}}
        return dict((await self.http.post("/v1/predictions", json=body)).json())

    async def ended(self, prediction_id: str) -> Json:
        return await eventually(
            lambda: self._read(prediction_id), lambda found: found["status"] in TERMINAL
        )

    async def _read(self, prediction_id: str) -> Json:
        path = f"/v1/predictions/{prediction_id}"
        answer = await self.http.get(path, headers={"prefer": "wait=10"})
        return dict(answer.json())

    async def ledger(self) -> Json:
        async with httpx.AsyncClient() as http:
            return dict((await http.get(f"{self.emulator}/_emulator/ledger")).json())


@asynccontextmanager
async def served(listener: socket.socket, app: Starlette) -> AsyncIterator[None]:
    config = uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve([listener]))  # noqa: SLF001 - without its signals
    await eventually(lambda: server.started)
    try:
        yield
    finally:
        getattr(app.state, "release", lambda: None)()
        server.should_exit = True
        await serving


@asynccontextmanager
async def living(folder: Path, options: Options, **env: str | None) -> AsyncIterator[Live]:
    async with AsyncExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        emulator, url = (f"http://127.0.0.1:{one.getsockname()[1]}" for one in sockets)
        given = {
            **ENV,
            **settings_for(emulator),
            "RECEIVER_PUBLIC_URL": url,
            "RECEIVER_DATABASE_URL": f"sqlite:///{folder}/receiver.db",
            **env,
        }
        settings = Settings.read({name: text for name, text in given.items() if text is not None})
        app = await anyio.to_thread.run_sync(create_app, settings, [])
        await stack.enter_async_context(served(sockets[0], create_emulator(options)))
        await stack.enter_async_context(served(sockets[1], app))
        key = {"authorization": f"Bearer {API_KEY}"}
        http = httpx.AsyncClient(base_url=url, headers=key, timeout=PATIENCE)
        yield Live(await stack.enter_async_context(http), emulator)


FAST = Options(generation=0.05, stray_events=0.2, shape="mixed", time_scale=0.01)


@pytest.mark.parametrize("url", ["with", "without"])
async def test_all_predictions_succeed_with_and_without_a_public_url(
    tmp_path: Path, url: str
) -> None:
    env: dict[str, str | None] = {"RECEIVER_PUBLIC_URL": None} if url == "without" else {}
    async with living(tmp_path, FAST, RECEIVER_POLL_AFTER="0.3", **env) as live:
        prompts = [(provider, f"{provider} {n}") for provider in ALL for n in range(4)]
        made = await asyncio.gather(*(live.submit(*one) for one in prompts))
        ends = await asyncio.gather(*(live.ended(one["id"]) for one in made))
        assert [end["status"] for end in ends] == ["succeeded"] * len(prompts)
        channels = {(end["provider"], end["channel"]) for end in ends}
        if url == "without":
            assert channels <= {("oxen", "sse"), *((name, "poll") for name in ALL)}
        ledger = await live.ledger()
        assert ledger["violations"] == []
        assert len(ledger["predictions"]) == len(prompts)


async def test_eachlabs_limits_are_never_exceeded(tmp_path: Path) -> None:
    options = msgspec.structs.replace(FAST, eachlabs_in_flight=3, eachlabs_per_minute=25)
    async with living(
        tmp_path,
        options,
        EACHLABS_MAX_IN_FLIGHT="3",
        EACHLABS_REQUESTS_PER_MINUTE="25",
    ) as live:
        made = [await live.submit("eachlabs", f"no {number}") for number in range(20)]
        ends = await asyncio.gather(*(live.ended(one["id"]) for one in made))
        assert [end["status"] for end in ends] == ["succeeded"] * 20
        ledger = await live.ledger()
        assert ledger["violations"] == []
        assert [row["prompt"] for row in ledger["predictions"]] == [f"no {n}" for n in range(20)]


# --- races and edge cases ---


async def test_cancelled_caller_leaves_no_stored_prediction_unsent(
    start: Start, network: Network
) -> None:
    async with start() as station:
        for turns in range(40):
            caller = asyncio.create_task(station.submit("fal", f"picture {turns}"))
            for _ in range(turns):
                await asyncio.sleep(0)
            caller.cancel()
            await asyncio.gather(caller, return_exceptions=True)
        await station.submit("fal", "the last")
        await eventually(
            lambda: not station.rows("SELECT 1 FROM predictions WHERE status <> 'processing'")
        )
        assert network.count("fal.submit") == station.count("predictions")


async def test_503_with_retry_after_0_still_gets_a_backoff(start: Start, network: Network) -> None:
    network.always("fal.submit", reply({"detail": "busy"}, 503, retry_after="0"))
    async with start() as station:
        before = station.clock()
        await station.submit("fal")
        assert station.one("SELECT due_at FROM predictions") >= before + 0.5


async def test_502_is_not_retried_if_a_callback_shows_the_submit_was_taken(
    start: Start, network: Network
) -> None:
    async def taken_all_the_same(request: httpx.Request) -> httpx.Response:
        await network.by_emulator(request)
        return httpx.Response(502)

    network.script("eachlabs.submit", taken_all_the_same)
    network.always("eachlabs.poll", network.ends)
    async with start(EACHLABS_CONFIRM="1") as station:
        sent = await station.submitted("eachlabs")
        assert (await station.push(sent)).status_code == 200
        assert (await station.until(sent.prediction_id, "succeeded"))["channel"] == "poll"
    assert network.count("eachlabs.submit") == 1


@pytest.mark.both_engines
async def test_cost_in_a_submit_answer_is_kept_if_the_callback_came_first(
    start: Start, network: Network
) -> None:
    async with start() as station:

        async def called_back_first(request: httpx.Request) -> httpx.Response:
            answer = await network.by_emulator(request)
            assert (await station.push(network.sent[-1])).json() == {"status": "accepted"}
            return answer

        network.script("bfl.submit", called_back_first)
        found = [await station.submit("bfl", prompt) for prompt in ("first", "second")]
        await station.push(network.of("second"))
        await eventually(
            lambda: station.rows("SELECT cost, cost_source FROM predictions"),
            lambda rows: len(set(rows)) == 1 and rows[0][1] == "provider",
        )
        total = (await station.http.get("/v1/costs")).json()["total"]
        cost = (await station.read(found[0]["id"]))["cost"]["amount"]
        assert (total["amount"], total["unknown"]) == (pytest.approx(2 * cost), 0)


async def test_cancel_during_a_postponed_submit_prevents_the_retry(
    start: Start, network: Network
) -> None:
    answering = asyncio.Event()

    async def refuses_in_the_end(_: httpx.Request) -> httpx.Response:
        await answering.wait()
        return httpx.Response(503)

    network.script("fal.submit", refuses_in_the_end)
    async with start() as station:
        submitting = asyncio.create_task(station.submit("fal"))
        await eventually(lambda: network.count("fal.submit"))
        prediction_id = station.one("SELECT id FROM predictions")
        assert (await _cancel(station, prediction_id)).status_code == 202
        answering.set()
        await submitting
        found = await station.until(prediction_id, "canceled")
        assert found["error"]["code"] == "canceled"
    assert network.count("fal.submit") == 1


async def test_blocking_call_answered_as_processing_is_polled(
    start: Start, network: Network
) -> None:
    network.script("eachlabs.run", reply({"predictionID": "each-7", "status": "processing"}))
    ended = {"id": "each-7", "status": "success", "output": PICTURE}
    network.always("eachlabs.poll", reply(ended))
    async with start(**SOON) as station:
        found = await station.submit("eachlabs", mode="sync", headers={"Prefer": "respond-async"})
        found = await station.until(found["id"], "succeeded")
        assert (found["provider_id"], found["channel"]) == ("each-7", "poll")


async def test_blocking_call_answered_as_processing_without_id_is_unconfirmed(
    start: Start, network: Network
) -> None:
    network.script("eachlabs.run", reply({"status": "processing"}))
    async with start() as station:
        found = await station.submit("eachlabs", mode="sync", headers={"Prefer": "respond-async"})
        await station.until(found["id"], "unconfirmed")


async def test_submit_answered_with_another_predictions_id_is_unconfirmed(
    start: Start, network: Network
) -> None:
    network.always("fal.submit", reply({"request_id": "req-same"}))
    async with start() as station:
        first = await station.submit("fal", "one")
        second = await station.submit("fal", "two")
        assert (first["status"], second["status"]) == ("processing", "unconfirmed")


def test_submit_fingerprint_is_the_same_in_every_release() -> None:
    plain = SubmitRequest(provider="fal", model="m", input={"b": 1, "a": [2]}, metadata={"z": 1})
    to_reply = SubmitRequest(
        provider="fal", model="m", input={}, mode="sync", reply_to="https://bot.example"
    )
    assert fingerprint(plain) == (
        "3a8527ca9dc31936d3b65e4e8ec615a45f828ab41d51c99a2dc23827fef2da3e"
    )
    assert fingerprint(to_reply) == (
        "83551793c314fc8653246466bd9b5eab5aa6dd32c91b87f8ad90299479bf0fc2"
    )
