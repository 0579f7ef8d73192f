"""The client: all operations, retries, errors, the event stream, waiting, signatures and files."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import httpx
import jsonschema_rs
import msgspec
import pytest
from standardwebhooks import Webhook

import receiver
from receiver.client import AsyncReceiver, ClientError, Message, Receiver, file, verify
from receiver.client.declared import operation, stream
from receiver.client.operations import Operations
from receiver.model.answers import Change, Gap, Page, Selection
from receiver.model.values import Announcement, Prediction
from receiver.testing import Kit, make_event
from tests.handlers.parts import OK, built_in, serving
from tests.loopback import free_port
from tests.openapi import FOLDER

MADE: Final = json.loads((FOLDER / "openapi.json").read_text())
URL: Final = "https://hooks.test/art"
ID: Final = "pred_0199f3a6d2c1e45b7f1c9d3e8a260f4b"
SECRET: Final = "whsec_" + base64.b64encode(b"a secret of some thirty-two bytes").decode()

# --- every operation ---

CALLS: Final[dict[str, Callable[[Any], Any]]] = {
    "postPredictions": lambda c: c.submit(
        "fal", "fal-ai/x", {"prompt": "a"}, metadata={"a": 1}, wait=5
    ),
    "getPredictions": lambda c: c.list(
        status="failed",
        provider="fal",
        model="fal-ai/*",
        metadata={"a": "*"},
        since=datetime.now(UTC),
        limit=5,
        cursor=ID,
    ),
    "getPredictionsId": lambda c: c.get(ID, wait=5),
    "postPredictionsIdCancel": lambda c: c.cancel(ID),
    "postPredictionsIdReplay": lambda c: c.replay(ID),
    "postPredictionsIdErase": lambda c: c.erase(ID),
    "getPredictionsIdExplain": lambda c: c.explain(ID, type="failed"),
    "getModelsProviderModel": lambda c: c.model("oxen", "a/b"),
    "getDeliveries": lambda c: c.deliveries(
        state="dead", handler="save", prediction=ID, limit=5, cursor=f"dlv_{'0' * 40}"
    ),
    "postDeliveriesIdRetry": lambda c: c.retry(f"dlv_{'0' * 40}"),
    "postDrain": lambda c: c.drain(seconds=100),
    "getDrain": lambda c: c.drain(seconds=100, method="GET"),
    "getEvents": lambda c: c.list_events(
        type=["failed", "canceled"], provider=["fal"], metadata={"a": "1"}, limit=5, cursor="7"
    ),
    "getEventsStream": lambda c: c.changes(
        7,
        type="queued",
        provider=["fal", "oxen"],
        prediction=ID,
        metadata={"a": "1"},
        deliveries=True,
    ),
    "getRecipes": lambda c: c.recipes(),
    "postRecipesName": lambda c: c.order(
        "imagine", {"prompt": "a"}, person="a", place="b", metadata={"a": 1}, key="k", wait=5
    ),
    "getHandlers": lambda c: c.handlers(),
    "postHandlersNamePause": lambda c: c.pause("a:b/c"),
    "postHandlersNameResume": lambda c: c.resume("save"),
    "postReplays": lambda c: c.count_replay(Selection(handler="save", metadata={"a": "*"})),
    "getReplays": lambda c: c.replays(limit=5, cursor=f"rep_{'0' * 32}"),
    "getReplaysId": lambda c: c.get_replay(f"rep_{'0' * 32}"),
    "postReplaysIdStart": lambda c: c.start_replay(f"rep_{'0' * 32}"),
    "postReplaysIdCancel": lambda c: c.cancel_replay(f"rep_{'0' * 32}"),
    "getDiscarded": lambda c: c.discarded(
        kind="late", provider="fal", prediction=ID, limit=5, cursor="1_"
    ),
    "getCosts": lambda c: c.costs(
        since=date(2026, 1, 1), until=date(2026, 2, 1), by=["day", "provider"]
    ),
    "getHealthz": lambda c: c.alive(),
    "getReadyz": lambda c: c.ready(),
    "getMetrics": lambda c: c.metrics(),
    "get": lambda c: c.about(),
    "getOpenapiJson": lambda c: c.openapi(),
    "getDocs": lambda c: c.docs(),
}
ROWS: Final = {
    row["operationId"]: (method.upper(), path, row)
    for path, methods in MADE["paths"].items()
    for method, row in methods.items()
    if row["tags"] != ["Callbacks"]  # called by providers and `receiver doctor`
    # The client has no methods for the routes of schedulers, platforms and plugins either.
    and not path.startswith(("/wake/", "/in/"))
    and path not in {"/health", "/ready"}
}


class Wire:
    """A transport with prepared answers that records requests and sleeps; for both clients."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self._answers = iter(answers)
        self.asked: list[httpx.Request] = []
        self.waits: list[float] = []
        self.transport = httpx.MockTransport(self._answer)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def blocking(self, patience: float = 60.0) -> Receiver:
        return Receiver(
            URL, "key", patience=patience, transport=self.transport, sleep=self.waits.append
        )

    def run(self, call: Callable[[Any], Any], *, awaited: bool, patience: float = 60.0) -> Any:
        """Make a call with the async or the blocking client; of a stream take one message."""
        if not awaited:
            with self.blocking(patience) as client:
                found = call(client)
                return next(found) if hasattr(found, "__next__") else found

        async def sleep(seconds: float) -> None:
            self.waits.append(seconds)

        async def run() -> Any:
            async with AsyncReceiver(
                URL, "key", patience=patience, transport=self.transport, sleep=sleep
            ) as client:
                found = call(client)
                return await (anext(found) if hasattr(found, "__anext__") else found)

        return asyncio.run(run())


def example(row: Any, like: str = "2") -> httpx.Response:
    """Return the example of an answer in the OpenAPI document, by default of a successful one."""
    status, said = next((s, a) for s, a in row["responses"].items() if s.startswith(like))
    kind, content = next(iter(said["content"].items()))
    values = [one["value"] for one in content.get("examples", {}).values()]
    value = values[0] if values else {"data": [], "next_cursor": None}
    body = value if isinstance(value, str) else json.dumps(value)
    return httpx.Response(int(status), content=body.encode(), headers={"content-type": kind})


@pytest.mark.parametrize("awaited", [False, True])
def test_every_api_operation_has_a_client_method(*, awaited: bool) -> None:
    assert ROWS.keys() == CALLS.keys()
    for name in ROWS:
        asks_as_is_described(name, awaited=awaited)


def asks_as_is_described(name: str, *, awaited: bool) -> None:
    method, path, row = ROWS[name]
    wire = Wire(example(row))
    found = wire.run(CALLS[name], awaited=awaited)
    [asked] = wire.asked
    template = re.sub(r"\\{\w+\\}", "[^/]+", re.escape(f"/art{path}"))
    assert asked.method == method
    assert re.fullmatch(template, asked.url.raw_path.decode().partition("?")[0])
    described = {(one["in"], one["name"]) for one in row["parameters"]}
    for given in asked.url.params:
        assert ("query", given) in described or given.startswith("metadata.")
    for header in ("Idempotency-Key", "Prefer", "Last-Event-ID"):
        assert header not in asked.headers or ("header", header) in described
    assert asked.headers["authorization"] == "Bearer key"
    if "requestBody" in row:
        schema = row["requestBody"]["content"]["application/json"]["schema"]
        whole = {**schema, "components": MADE["components"]}
        assert jsonschema_rs.Draft202012Validator(whole).is_valid(json.loads(asked.content))
    else:
        assert not asked.content
    assert isinstance(found, msgspec.Struct | dict | str)


WAITED: Final = ["queued", "submitting", "processing", "succeeded"]


def test_wait_reports_each_status_including_earlier_ones() -> None:
    ended = {**MADE_ONE.json(), "status": "succeeded"}
    wire = Wire(
        httpx.Response(200, headers={"last-event-id": "7"}),
        live(
            said(7, kind="stream.open", data={"at": 7}),
            *(change(place, status) for place, status in enumerate(WAITED[:2], 8)),
        ),
        answer(200, MADE_ONE.json()),
        live(
            said(9, kind="stream.open", data={"at": 9}),
            change(10, "processing"),
            said(11, kind="stream.gap", data={"after": 10, "until": 11}),
        ),
        answer(200, ended),
    )
    heard: list[str] = []
    client = wire.blocking()
    assert client.wait(ID, after=client.place(), changed=heard.append).status == "succeeded"
    assert heard == WAITED
    places = [request.headers.get("last-event-id") for request in wire.asked]
    assert (wire.asked[0].method, places) == ("HEAD", [None, "7", None, "9", None])


def test_wait_without_a_stream_polls_and_reports_each_status() -> None:
    seen = [answer(200, {**MADE_ONE.json(), "status": s}) for s in WAITED[2:]]
    wire = Wire(problem(404, "not-found"), httpx.Response(404), seen[0], *seen)
    heard: list[str] = []
    client = wire.blocking(0)
    with pytest.raises(ClientError):
        client.place()
    assert client.wait(ID, changed=heard.append).status == "succeeded"
    assert heard == WAITED[2:]
    assert [one.headers.get("prefer") for one in wire.asked[2:]] == ["wait=1"] * 3


def change(place: int, status: str) -> bytes:
    moved = {"id": ID, "provider": "fal", "model": "x", "status": status, "metadata": {}}
    kind = f"prediction.{status}"
    data = {"type": kind, "time": "2026-01-02T03:04:05Z", "prediction": moved}
    return said(place, kind=kind, data=data)


def test_every_client_method_is_tested_and_documented() -> None:
    names = {name for name, one in vars(Operations).items() if isinstance(one, operation | stream)}
    used = {name for call in CALLS.values() for name in call.__code__.co_names}
    assert names - used == {
        "wait",
        "events",
        "place",
        "call",
    }  # they use the routes of other methods
    assert {name for name in dir(Receiver) if not name.startswith("_")} == {
        name for name in dir(AsyncReceiver) if not name.startswith("_")
    }
    assert all(vars(Operations)[name].__doc__ for name in names)


def test_answers_have_types() -> None:
    listed = Wire(example(ROWS["getPredictions"][2])).blocking().list()
    assert isinstance(listed, Page)
    assert isinstance(listed.data[0], Prediction)
    assert isinstance(listed.data[0].created_at, datetime)


# --- retries ---

MADE_ONE: Final = example(ROWS["postPredictions"][2], "202")


def answer(status: int, body: object = None, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json={} if body is None else body, headers=named)


def problem(status: int, kind: str, **headers: str) -> httpx.Response:
    body = {"type": f"urn:receiver:problem:{kind}", "detail": f"it is {kind}", "status": status}
    return answer(status, body, **headers)


def submit(client: Any) -> Any:
    return client.submit("fal", "fal-ai/x", {"prompt": "a"})


@pytest.mark.parametrize("awaited", [False, True])
def test_lost_answer_is_retried_with_the_same_idempotency_key(awaited: bool) -> None:
    wire = Wire(
        httpx.ReadError("cut"), httpx.ReadTimeout("slow"), httpx.Response(502, text="<html>"),
        answer(504, {"message": "timed out"}), answer(502, {"type": "https://proxy.test/502"}),
        httpx.Response(200, json=MADE_ONE.json()),
    )  # fmt: skip
    assert wire.run(submit, awaited=awaited).id == ID
    keys = {request.headers["idempotency-key"] for request in wire.asked}
    assert (len(keys), len(wire.asked), wire.waits) == (1, 6, [0.5, 1.0, 2.0, 4.0, 8.0])
    again = Wire(httpx.Response(200, json=MADE_ONE.json()))
    again.run(submit, awaited=awaited)
    assert again.asked[0].headers["idempotency-key"] not in keys


@pytest.mark.parametrize("awaited", [False, True])
@pytest.mark.parametrize("kind", ["rate-limited", "unavailable", "html"])
def test_429_or_503_is_retried_after_its_retry_after_seconds(awaited: bool, kind: str) -> None:
    def refused() -> httpx.Response:
        if kind == "html":
            return httpx.Response(503, text="<html>busy", headers={"retry-after": "7"})
        return problem(429 if kind == "rate-limited" else 503, kind, retry_after="7")

    wire = Wire(refused(), answer(200, MADE_ONE.json()))
    assert wire.run(lambda client: client.cancel(ID), awaited=awaited).id == ID
    assert wire.waits == [7]
    wire = Wire(refused())
    with pytest.raises(ClientError) as raised:
        wire.run(submit, awaited=awaited, patience=6.9)
    assert (raised.value.status, raised.value.retry_after) == (refused().status_code, 7)
    assert wire.waits == []


def test_502_of_the_receiver_itself_is_not_retried() -> None:
    wire = Wire(problem(502, "provider-unavailable", retry_after="9" * 5000))
    with pytest.raises(ClientError, match="it is provider-unavailable") as raised:
        submit(wire.blocking())
    assert (raised.value.type, raised.value.retry_after) == ("provider-unavailable", None)


@pytest.mark.parametrize("is_cut", [False, True])
def test_replay_that_may_have_been_done_is_not_retried(is_cut: bool) -> None:
    wire = Wire(httpx.ReadError("cut") if is_cut else httpx.Response(502, text="<html>"))
    with pytest.raises(ClientError) as raised:
        wire.blocking().replay(ID)
    assert raised.value.type == ("unreachable" if is_cut else "no-receiver")
    assert wire.waits == []


def test_request_that_was_never_sent_is_retried() -> None:
    wire = Wire(httpx.ConnectError("nobody"), answer(200, {"pending": 1, "handlers": ["save"]}))
    assert wire.blocking().replay(ID).pending == 1


def test_retries_end_when_patience_is_used_up() -> None:
    wire = Wire(*[httpx.ConnectError("nobody")] * 9)
    with pytest.raises(ClientError, match=r"no receiver answers at https://hooks.test/art \(nobo"):
        wire.blocking(20.0).alive()
    assert wire.waits == [0.5, 1.0, 2.0, 4.0, 8.0]


# --- errors ---


def test_error_has_the_type_status_and_detail_of_the_problem() -> None:
    body = {
        "type": "urn:receiver:problem:idempotency-conflict",
        "detail": "this Idempotency-Key was used for another request",
        "prediction_id": ID,
    }
    with pytest.raises(receiver.ClientError) as raised:
        submit(Wire(answer(409, body)).blocking())
    error = raised.value
    assert (error.type, error.status, error.prediction_id) == ("idempotency-conflict", 409, ID)
    assert str(error) == error.detail == body["detail"]


NOT_OURS: Final[list[tuple[int, bytes, dict[str, str], str, str]]] = [
    (200, b"<html>", {}, "no-receiver", "is not a receiver"),
    (200, b"", {}, "no-receiver", "is not a receiver"),
    (200, b'"\xff"', {}, "no-receiver", "is not a receiver"),
    (200, b"[1]", {}, "no-receiver", "is not a receiver"),
    (200, b'{"id": 1}', {}, "no-receiver", "another version"),
    (200, b"[" * 10_000, {}, "no-receiver", "is not a receiver"),
    (200, b"no", {"content-encoding": "gzip"}, "unreachable", "no receiver answers"),
    (302, b"", {"location": "https://x.test/"}, "no-receiver", "redirects to https://x.test/"),
    (404, b"nothing", {}, "no-receiver", "HTTP 404"),
    (404, b"[" * 10_000, {}, "no-receiver", "HTTP 404"),
    (404, b'["a"]', {}, "http-error", "a"),
    (500, b'{"detail": null}', {}, "http-error", "None"),
]


@pytest.mark.parametrize(("status", "content", "headers", "kind", "words"), NOT_OURS)
@pytest.mark.parametrize("awaited", [False, True])
def test_unexpected_answer_raises_a_client_error(
    status: int, content: bytes, headers: dict[str, str], kind: str, words: str, awaited: bool
) -> None:
    wire = Wire(httpx.Response(status, headers=headers, stream=Parts(content)))
    with pytest.raises(ClientError, match=re.escape(words)) as raised:
        wire.run(lambda client: client.get(ID), awaited=awaited, patience=0)
    assert raised.value.type == kind


@pytest.mark.parametrize(
    "url", ["", "hooks.test", "ftp://x", "https://", "http://a:b", "http://xn--a"]
)
def test_invalid_url_or_key_is_rejected(url: str) -> None:
    for client in (Receiver, AsyncReceiver):
        with pytest.raises(ClientError) as raised:
            client(url, "key")
        assert raised.value.type == "unfit"
        with pytest.raises(ClientError, match="the key must be"):
            client(URL, "k\u00e9y")


UNFIT: Final[dict[str, Callable[[Any], Any]]] = {
    "an empty key": lambda c: c.submit("fal", "m", {}, key=""),
    "a key of two lines": lambda c: c.submit("fal", "m", {}, key="a\nb"),
    "a key that no header takes": lambda c: c.order("imagine", {}, key="\u00fc"),
    "half a character": lambda c: c.submit("fal", "m", {"prompt": "\ud800"}),
    "an object": lambda c: c.submit("fal", "m", {"prompt": object()}),
    "a header": lambda c: c.call("GET", "/v1/handlers", headers={"Prefer": "a\nb"}),
    "a header in Unicode": lambda c: c.call("GET", "/v1/handlers", headers={"Prefer": "\u0663"}),
    "half a character in a query": lambda c: c.list(model="\ud800"),
    "an endless path": lambda c: c.get("a" * 70_000),
    "the URL of another server": lambda c: c.call("GET", "http://evil.test/v1/handlers"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unsendable_request_is_rejected_before_it_is_sent(name: str) -> None:
    """An empty key is not replaced by a new one, as each repeat would then be paid for."""
    with (
        serving((200, {}, b"{}")) as server,
        Receiver(server.url, "key") as client,
        pytest.raises(ClientError) as raised,
    ):
        UNFIT[name](client)
    assert raised.value.type == "unfit"
    assert not server.asked


def test_api_key_is_never_in_an_error() -> None:
    with serving((200, {}, b"{}")) as server:
        client = Receiver(server.url, headers={"Authorization": "Bearer hush "})
        for call in (client.alive, lambda: next(client.events())):
            with pytest.raises(ClientError) as raised:
                call()
            assert raised.value.type == "unfit"
            assert "hush" not in str(raised.value)


def test_loopback_requests_bypass_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{free_port()}")
    with serving((200, {}, b'{"status": "ok"}')) as server:
        address = server.url.removesuffix("/hook")
        assert Receiver(address, patience=0).alive().status == "ok"
        by_name = address.replace("127.0.0.1", "localhost")
        assert Receiver(by_name, patience=0).alive().status == "ok"
    with pytest.raises(ClientError) as raised:
        Receiver("http://hooks.test", patience=0).alive()
    assert raised.value.type == "unreachable"
    assert Receiver.submit.__doc__
    assert Receiver(URL).submit.__doc__ == Receiver.submit.__doc__


# --- the stream ---


def said(*places: int, kind: str = "prediction.queued", data: object = None) -> bytes:
    body = json.dumps({"n": 1} if data is None else data)
    frames = (f"id: {n}\nevent: {kind}\ndata: {body}\n\n" for n in places)
    return "".join(frames).encode()


class Parts(httpx.AsyncByteStream, httpx.SyncByteStream):
    def __init__(self, *parts: bytes | Exception) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[bytes]:
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            yield part

    async def __aiter__(self) -> Any:
        for part in self:
            yield part


def live(*parts: bytes | Exception, **headers: str) -> httpx.Response:
    return httpx.Response(200, headers=headers, stream=Parts(*parts))


def followed(wire: Wire, *, awaited: bool, after: int | None = None) -> list[Message]:
    """Follow the stream until the wire has no more answers."""
    heard: list[Message] = []

    async def sleep(seconds: float) -> None:
        wire.waits.append(seconds)

    async def follow() -> None:
        client = AsyncReceiver(URL, "key", transport=wire.transport, sleep=sleep)
        async for message in client.events(after):
            heard.append(message)  # noqa: PERF401 - keeps those before an error

    with suppress(RuntimeError):  # raised by a generator when the answers run out
        if awaited:
            asyncio.run(follow())
        else:
            for message in wire.blocking().events(after):
                heard.append(message)  # noqa: PERF402 - likewise
    return heard


@pytest.mark.parametrize("awaited", [False, True])
def test_stream_reconnects_and_resumes_after_every_loss(awaited: bool) -> None:
    first = said(41)
    piece = said(2, data={"text": "a\u2028b\x85 c"})
    wire = Wire(
        live(b": live\n", said(40, kind="stream.open"), first[:9], first[9:], httpx.ReadError("x")),
        problem(503, "too-many-readers", retry_after="30"),
        httpx.Response(502, text="<html>"),
        live(*(piece[at : at + 1] for at in range(len(piece))), httpx.ReadTimeout("silence")),
        problem(429, "rate-limited"),
        live(said(3, kind="stream.gap", data={"after": 2, "until": 3}).replace(b"\n", b"\r\n")),
    )  # fmt: skip
    heard = followed(wire, awaited=awaited)
    assert [message.seq for message in heard] == [41, 2, 3]
    assert heard[2].content == Gap(after=2, until=3)
    assert wire.waits == [0.5, 30, 2.0, 0.5, 1.0, 0.5]
    places = [request.headers.get("last-event-id") for request in wire.asked]
    assert places == [None, "41", "41", "41", "2", "2", "3"]
    assert wire.asked[0].url.params["type"] == "succeeded,failed,canceled"


@pytest.mark.parametrize("status", [308, 401, 404, 422])
@pytest.mark.parametrize("awaited", [False, True])
def test_rejected_request_ends_the_stream(status: int, awaited: bool) -> None:
    wire = Wire(problem(status, "no"))
    with pytest.raises(ClientError, match="it is no"):
        wire.run(lambda client: client.events(7), awaited=awaited)
    assert wire.asked[0].headers["last-event-id"] == "7"


def test_stream_messages_have_types() -> None:
    event = {"id": "evt_1", "type": "prediction.succeeded", "time": "2026-01-31T12:00:00Z",
             "channel": "webhook", "prediction": MADE_ONE.json()}  # fmt: skip
    change = {"type": "prediction.queued", "time": "2026-01-31T12:00:00Z",
              "prediction": {"id": ID, "provider": "fal", "model": "x", "status": "queued",
                             "metadata": {}}}  # fmt: skip
    wire = Wire(
        live(said(1, data=change), said(2, kind="prediction.succeeded", data=event), said(3))
    )
    first, second, third = followed(wire, awaited=False)
    assert isinstance(first.content, Change)
    assert isinstance(second.content, Announcement)
    with pytest.raises(ClientError):
        third.content  # noqa: B018 - reading it is the test


# --- waiting ---

ENDED: Final = {"status": "succeeded", "output": []}


class Quiet(httpx.SyncByteStream):
    """A stream with a keep-alive and nothing else each three seconds, by its own clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def __iter__(self) -> Iterator[bytes]:
        for _ in range(100):
            self.now += 3
            yield b": still here\n"


@pytest.mark.parametrize("awaited", [False, True])
def test_wait_polls_repeatedly_if_there_is_no_stream(awaited: bool) -> None:
    ended = {**MADE_ONE.json(), **ENDED}
    wire = Wire(
        problem(503, "too-many-readers"),
        answer(200, MADE_ONE.json()),
        httpx.ReadTimeout("slow"),
        answer(200, ended),
    )
    assert wire.run(lambda client: client.wait(ID), awaited=awaited).status == "succeeded"
    assert [request.headers.get("prefer") for request in wire.asked] == [None, *["wait=20"] * 3]


def test_wait_reads_a_prediction_that_ended_before_it_listened() -> None:
    ended = {**MADE_ONE.json(), **ENDED}
    wire = Wire(live(said(4, kind="stream.open")), answer(200, ended))
    assert wire.blocking().wait(ID).status == "succeeded"
    assert wire.asked[0].url.params["prediction"] == ID


def test_wait_reconnects_after_its_stream_is_lost() -> None:
    ended = {**MADE_ONE.json(), "status": "canceled", "error": {"code": "canceled", "message": ""}}
    wire = Wire(
        live(said(4, kind="stream.open"), said(5, kind="stream.gap", data={"after": 1, "until": 2}),
             httpx.ReadError("cut")),
        *(answer(200, MADE_ONE.json()) for _ in range(3)),
        live(said(4, kind="stream.open"), said(5, kind="stream.gap", data={"after": 4, "until": 5}),
             httpx.ReadError("cut")),
        answer(200, ended),
    )  # fmt: skip
    assert wire.blocking().wait(ID).status == "canceled"


def test_wait_listens_to_the_stream_and_polls_in_its_last_twenty_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiet = Quiet()
    clock = SimpleNamespace(monotonic=lambda: quiet.now)
    monkeypatch.setattr("receiver.client.operations.time", clock)
    wire = Wire(httpx.Response(200, stream=quiet), answer(200, {**MADE_ONE.json(), **ENDED}))
    assert wire.blocking().wait(ID, seconds=31).status == "succeeded"
    assert quiet.now == 12
    assert [request.headers.get("prefer") for request in wire.asked] == [None, "wait=19"]


def test_call_sends_any_request_unchanged() -> None:
    wire = Wire(answer(200, {"a": [1]}))
    assert wire.blocking().call("POST", "/v1/x?y=1", {"b": 2}, {"x-y": "z"}) == {"a": [1]}
    [asked] = wire.asked
    assert (asked.url.query, asked.content, asked.headers["x-y"]) == (b"y=1", b'{"b":2}', "z")


def test_wait_of_zero_seconds_polls_once() -> None:
    wire = Wire(answer(200, MADE_ONE.json()))
    assert wire.blocking().wait(ID, seconds=0).status == "processing"
    assert wire.asked[0].headers["prefer"] == "wait=1"


# --- signatures ---


def test_signature_of_the_forward_handler_is_verified(
    receiver_kit: Callable[..., Kit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARD_SECRET", SECRET)
    with serving(OK) as server:
        monkeypatch.setenv("FORWARD_URL", server.url)
        delivered = receiver_kit(built_in("forward"), online=True).deliver(make_event())
    [asked] = server.asked
    event = verify(SECRET, asked.headers, asked.body)
    assert event.id == delivered.delivery.event_id
    assert (event.type, event.prediction.id) == ("prediction.succeeded", delivered.prediction_id)
    upper = {name.upper(): value for name, value in asked.headers.items()}
    assert Receiver.verify(f"{other()} v1,{SECRET}", upper, asked.body) == event
    at = float(asked.headers["webhook-timestamp"])
    for late in (at + 301, at - 301):
        with pytest.raises(ClientError, match="too long ago"):
            verify(SECRET, asked.headers, asked.body, clock=partial(float, late))
    with pytest.raises(ClientError, match="another secret"):
        verify(other(), asked.headers, asked.body)
    with pytest.raises(ClientError, match="another body"):
        verify(SECRET, asked.headers, asked.body + b" ")


def other() -> str:
    return "whsec_" + base64.b64encode(b"its successor is as long as it is").decode()


@pytest.mark.parametrize(
    "changed",
    [
        {"webhook-id": ""},
        {"webhook-timestamp": "soon"},
        {"webhook-timestamp": "9" * 400},
        {"webhook-timestamp": "\u0663"},
        {"webhook-signature": ""},
        {"webhook-signature": "v1a,abc"},
        {"webhook-signature": "v1,\u00fc \udcff"},
        {"webhook-signature": "v1," + "A" * 44},
    ],
)
def test_forged_or_malformed_signature_is_unverified(changed: dict[str, str]) -> None:
    now = datetime.now().astimezone()
    for body in (b"", b"{}", b"\xff", b"[" * 10_000):
        good = {
            "webhook-id": "dlv_1",
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(SECRET).sign("dlv_1", now, body.decode("latin-1")),
        }
        for headers in ({}, good, {**good, **changed}):
            with pytest.raises(ClientError) as raised:
                verify(SECRET, headers, body)
            assert raised.value.type == "unverified", body[:9]


@pytest.mark.parametrize("secret", ["", " ", "whsec_", "whsec_a*b", "short"])
def test_invalid_signing_secret_is_rejected(secret: str) -> None:
    headers = {"webhook-id": "a", "webhook-timestamp": "1", "webhook-signature": "v1,a"}
    with pytest.raises(ClientError, match="secret"):
        verify(secret, headers, b"{}")


# --- files ---


def test_file_becomes_a_data_uri(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG")
    assert file(picture) == "data:image/png;base64,iVBORw=="
    assert file(str(picture), "image/x") == "data:image/x;base64,iVBORw=="
    for name, kind in (
        *(("a.webp", "image/webp"), ("a.b.JPEG", "image/jpeg"), ("a.jxl", "image/jxl")),
        *(("a.flac", "audio/flac"), ("a.ogg", "audio/ogg"), ("a.m4a", "audio/mp4")),
        *(("a.mkv", "video/x-matroska"), ("a.ts", "video/mp2t"), ("a.glb", "model/gltf-binary")),
    ):  # no machine's own table of types has all of them
        picture = picture.rename(tmp_path / name)
        assert file(picture).startswith(f"data:{kind};")
    (tmp_path / "big.png").write_bytes(bytes(3_000_001))
    for name, words in (
        ("big.png", "larger than 3,000,000 bytes: put it where"),
        ("none.png", "cannot be read"),
        ("a\0.png", "cannot be read"),
        ("", "its name shows no type"),
        ("a.what", "its name shows no type"),
        ("png", "its name shows no type"),
    ):
        with pytest.raises(ClientError, match=words):
            file(tmp_path / name)
    with pytest.raises(ClientError, match="cannot be read"):
        file(tmp_path, "image/png")


# --- imports ---


def test_client_imports_only_httpx_msgspec_and_the_model() -> None:
    code = """
import sys
import receiver
assert not {"httpx", "msgspec"} & sys.modules.keys()
from receiver.client import AsyncReceiver, Receiver
AsyncReceiver("http://127.0.0.1:1", "key")
Receiver("http://127.0.0.1:1", "key").close()
print(*sorted(name for name in sys.modules if name.startswith("receiver.")))
print(*({"starlette", "structlog", "typer", "standardwebhooks", "httpx_sse", "cryptography",
         "prometheus_client", "opentelemetry", "uvicorn"} & sys.modules.keys()))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    ours, others = ran.split("\n")[:2]
    assert {name.split(".")[1] for name in ours.split()} == {"client", "model"}
    assert others == ""
