"""The request log: one line for each request, with its ids and without secrets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route

from receiver import Dead, Event, on
from receiver.http.problems import ERROR_HANDLERS
from receiver.http.request_log import Requests
from receiver.observability.events import Telemetry
from tests.conftest import Logged, Start
from tests.patience import PATIENCE
from tests.receiving import (
    SECRETS,
    STRANGER,
    Json,
    Network,
    Sent,
    Station,
    eventually,
    reply,
    write,
)

pytestmark = pytest.mark.anyio

HOOK: Final = "/webhooks/{provider}/{token}"


def told(logged: Logged, event: str = "request.handled") -> list[dict[str, Any]]:
    return [dict(line) for line in logged if line["event"] == event]


def only(logged: Logged, answer: httpx.Response) -> dict[str, Any]:
    """Return the log line of an answer, without the fields that vary."""
    [line] = [line for line in told(logged) if line["request"] == answer.headers["x-request-id"]]
    assert line.pop("status") == answer.status_code
    assert line.pop("sent") == len(answer.content)
    assert line.pop("bytes") == len(answer.request.content)
    assert 0 <= line.pop("seconds") < PATIENCE
    assert line.pop("client") == STRANGER[0]
    assert line.pop("method") == answer.request.method
    assert line.pop("request").startswith("req_")
    assert line.pop("event") == "request.handled"
    return line


async def test_callback_is_logged_as_one_line_with_its_verdict(
    start: Start, logged: Logged
) -> None:
    async with start() as station:
        sent = await station.submitted("eachlabs")
        prediction = sent.prediction_id
        answer = await station.push(sent)
        again = await station.push(sent)
        forged = write(station.network, sent)
        forged.headers = [("x-webhook-secret", "not-the-secret")]
        refused = await station.post(forged)
        made_up = await station.world.post("/webhooks/fal/made-up-by-me", content=b"{}")
        unknown = await station.world.post("/webhooks/made-up-by-me/x", content=b"{}")
        large = await station.world.post(sent.path, content=b"x" * 5_000_000)
    about = {"route": HOOK, "provider": "eachlabs", "prediction": prediction}
    event = f"evt_{prediction[5:]}"
    # At debug level, as the line `outcome.taken` says the same.
    accepted = {**about, "verdict": "accepted", "event_id": event, "log_level": "debug"}
    accepted |= {"channel": "webhook", "provider_id": sent.id}
    assert only(logged, answer) == accepted
    assert only(logged, again) == {**accepted, "verdict": "duplicate", "event_id": None}
    rejected = {"route": HOOK, "verdict": "rejected", "log_level": "warning"}
    assert only(logged, refused) == {**about, **rejected, "reason": "bad_secret"}
    stranger = {**rejected, "prediction": None}
    assert only(logged, made_up) == {**stranger, "provider": "fal", "reason": "bad_token"}
    assert only(logged, unknown) == {
        **stranger,
        "provider": "unknown",
        "reason": "unknown_provider",
    }
    [line] = [line for line in told(logged) if line["status"] == large.status_code == 413]
    assert (line["reason"], line["prediction"]) == ("too_large", prediction)
    assert sent.token not in repr(logged)
    assert "made-up-by-me" not in repr(logged)
    assert not [secret for secret in (*SECRETS, sent.secret) if secret in repr(logged)]


async def test_lost_attempt_of_a_dead_process_is_logged_by_the_next(
    start: Start, logged: Logged
) -> None:
    @on("succeeded", name="tries")
    async def tries(_: Event) -> None: ...

    async with start(tries, dispatch=False) as station:
        sent = await station.submitted("eachlabs")
        await station.push(sent)
        station.edit(
            "UPDATE deliveries SET state = 'running', owner = 'the dead', lease_until = 1, "
            f"due_at = NULL, attempts = 1, claims = 1, claimed_at = {station.clock() - 7}"
        )
    async with start(tries) as station:
        await eventually(lambda: len(told(logged, "handler.attempt")) == 2)
        page = (await station.http.get("/metrics")).text
    lost, done = told(logged, "handler.attempt")
    assert 7 <= lost.pop("seconds") < 7 + PATIENCE
    assert lost.pop("delivery") == done["delivery"]
    assert lost == {
        "event": "handler.attempt",
        "log_level": "warning",
        "handler": "tries",
        "event_id": done["event_id"],
        "prediction": sent.prediction_id,
        "provider": "eachlabs",
        "provider_id": sent.id,
        "channel": "webhook",
        "attempt": 1,
        "result": "lost",
        "state": "pending",
        "reason": "its process died",
    }
    assert (done["attempt"], done["result"]) == (2, "done")
    assert 'receiver_handler_attempts_total{handler="tries",result="lost"} 1.0' in page


async def test_log_lines_of_a_prediction_have_its_id(start: Start, logged: Logged) -> None:
    @on("succeeded", name="tries")
    async def tries(_: Event) -> None:
        raise Dead("no")

    async with start(tries) as station:
        sent = await station.submitted("eachlabs")
        pushed = await station.push(sent)
        await eventually(lambda: told(logged, "handler.attempt"))
    prediction, provider_id = sent.prediction_id, sent.id
    event = f"evt_{prediction[5:]}"
    [outcome] = told(logged, "outcome.taken")
    assert 0 <= outcome.pop("seconds") < PATIENCE
    assert outcome.pop("request") == pushed.headers["x-request-id"]
    assert outcome.pop("client") == STRANGER[0]
    assert outcome.pop("bytes") == len(pushed.request.content)
    assert outcome == {
        "event": "outcome.taken",
        "model": "nano-banana",
        "log_level": "info",
        "provider": "eachlabs",
        "provider_id": provider_id,
        "prediction": prediction,
        "channel": "webhook",
        "outcome": "succeeded",
        "verdict": "accepted",
        "reason": "succeeded",
        "status": "succeeded",
        "event_id": event,
    }
    [attempt] = told(logged, "handler.attempt")
    assert 0 <= attempt.pop("seconds") < PATIENCE
    assert attempt.pop("delivery").startswith(f"dlv_{prediction[5:]}")
    assert attempt == {
        "event": "handler.attempt",
        "log_level": "warning",
        "handler": "tries",
        "event_id": event,
        "prediction": prediction,
        "provider": "eachlabs",
        "model": "nano-banana",
        "provider_id": provider_id,
        "channel": "webhook",
        "attempt": 1,
        "result": "dead",
        "state": "dead",
        "reason": "no",
        "retry_in": None,
        "exc_info": None,
    }
    submit, callback = told(logged)
    assert (submit["route"], submit["status"]) == ("/v1/predictions", 202)
    assert submit["prediction"] == callback["prediction"] == prediction


async def test_api_requests_are_logged_with_route_and_id(
    start: Start, network: Network, logged: Logged
) -> None:
    network.script("oxen.model", reply({}, 429, retry_after="7"))
    async with start() as station:
        sent = await station.submitted("eachlabs")
        one = f"/v1/predictions/{sent.prediction_id}"
        about = {"route": "/v1/predictions/{id}", "log_level": "info"}
        known = {**about, "prediction": sent.prediction_id}
        assert only(logged, await station.http.get(one)) == known
        refused = await station.world.get(one)
        assert (refused.status_code, only(logged, refused)) == (401, known)
        missing = await station.http.get("/v1/predictions/pred_0")
        assert missing.status_code == 404
        assert only(logged, missing) == {**about, "prediction": "pred_0"}
        odd = await station.http.get("/v1/predictions/%0Aevent=x")
        assert only(logged, odd) == about
        replay = await station.http.post(f"/v1/predictions/{sent.prediction_id}/replay")
        assert only(logged, replay)["route"] == "/v1/predictions/{id}/replay"
        delivery = await station.http.post("/v1/deliveries/dlv_12/retry")
        assert only(logged, delivery)["delivery"] == "dlv_12"
        nowhere = await station.http.get("/no/such/place")
        assert only(logged, nowhere) == {"route": "unmatched", "log_level": "info"}
        wrong = await station.http.delete("/v1/predictions")
        assert wrong.status_code == 405
        assert only(logged, wrong)["route"] == "/v1/predictions"
        await station.http.get("/v1/models/oxen/nano-banana")
        busy = await station.http.get("/v1/models/oxen/nano-banana")
        assert busy.status_code == 429
        assert only(logged, busy)["route"] == "/v1/models/{provider}/{model:path}"
    assert not [secret for secret in SECRETS if secret in repr(logged)]


async def test_health_and_metrics_requests_are_logged_at_debug_level(
    start: Start, logged: Logged
) -> None:
    async with start() as station:
        for path in ("/healthz", "/readyz", "/metrics"):
            line = only(logged, await station.world.get(path))
            assert line == {"route": path, "log_level": "debug"}
        wrong = await station.world.post("/metrics")
        assert only(logged, wrong) == {"route": "/metrics", "log_level": "info"}


async def faulty(_: Request) -> Response:
    raise ValueError("a fault of ours")


async def stream(request: Request) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"
        if request.query_params:
            raise ConnectionError("the store went away")
        await asyncio.Event().wait()

    return StreamingResponse(pieces())


@pytest.fixture
def app() -> Starlette:
    routes = [Route("/faulty/{id}", faulty), Route("/stream", stream)]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Requests, Telemetry(), routes)],
        exception_handlers=ERROR_HANDLERS,
    )


async def test_unexpected_exception_returns_500_and_is_logged_with_the_request_id(
    app: Starlette, logged: Logged
) -> None:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=STRANGER)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/faulty/evt_1")
    assert answer.status_code == 500
    assert answer.headers["connection"] == "close"  # as the server closes it
    [line] = told(logged)
    assert line["request"] == answer.headers["x-request-id"]
    assert (line["status"], line["route"], line["event_id"]) == (500, "/faulty/{id}", "evt_1")
    assert line["log_level"] == "warning"
    [fault] = told(logged, "request.failed")
    assert fault["request"] == line["request"]
    assert isinstance(fault["exc_info"], ValueError)


async def converse(app: Starlette, query: bytes, *, leaves: bool) -> list[Json]:
    """Request the stream as a server does; the client may disconnect after the first chunk."""
    said: list[Json] = []
    first = asyncio.Event()
    scope: Json = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "path": "/stream",
        "query_string": query,
        "headers": [],
        "client": None,
        "extensions": None,
    }

    async def receive() -> Json:
        await first.wait()
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        said.append(message)
        if message.get("body"):
            first.set()

    await app(scope, receive, send)
    return said


async def test_stream_whose_client_disconnects_is_logged_as_ended_early(
    app: Starlette, logged: Logged
) -> None:
    said = await converse(app, b"", leaves=True)
    assert said[0]["status"] == 200
    [line] = told(logged)
    assert (line["status"], line["ended"], line["sent"]) == (200, "early", 3)
    assert line["client"] == "unknown"


async def test_stream_that_raises_an_error_is_logged_as_ended_early(
    app: Starlette, logged: Logged
) -> None:
    with pytest.raises((ConnectionError, ExceptionGroup)):
        await converse(app, b"breaks", leaves=False)
    [line] = told(logged)
    assert (line["status"], line["ended"], line["sent"]) == (200, "early", 3)


async def test_disconnect_during_a_callback_is_logged_as_499(start: Start, logged: Logged) -> None:
    async with start() as station:
        sent = await station.submitted("eachlabs")
        logged.clear()
        await leave(station, sent)
    [line] = told(logged)
    assert (line["status"], line["reason"], line["bytes"]) == (499, "disconnected", 4)
    assert line["prediction"] == sent.prediction_id


async def test_callback_token_is_not_in_the_access_log(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "uvicorn.access")
    async with start() as station:
        sent = await station.submitted("eachlabs")
        config = uvicorn.Config(
            Starlette(routes=[Mount("/art", station.app)]), port=0, lifespan="off", log_config=None
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server._serve())  # noqa: SLF001 - without its signals
        await eventually(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        letter = write(station.network, sent)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/art") as http:
            paths = (sent.path, sent.path, f"{sent.path}/", f"{sent.path}?x=1")
            for method, path in zip(("POST", "GET", "POST", "POST"), paths, strict=True):
                await http.request(method, path, content=letter.body, headers=letter.headers)  # type: ignore[arg-type] # bytes and text may mix
        server.should_exit = True
        await serving
    lines = [record.getMessage() for record in caplog.records if record.name == "uvicorn.access"]
    assert len(lines) == 4
    assert all('/art/webhooks/eachlabs/... HTTP/1.1"' in line for line in (*lines[:2],))
    assert sent.token not in caplog.text


async def leave(station: Station, sent: Sent) -> None:
    """Send half a callback, and disconnect."""
    messages: list[Json] = [
        {"type": "http.request", "body": b"half", "more_body": True},
        {"type": "http.disconnect"},
    ]
    scope: Json = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": sent.path,
        "query_string": b"",
        "headers": [],
        "client": STRANGER,
    }

    async def receive() -> Json:
        return messages.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError(message)

    await station.app(scope, receive, send)
