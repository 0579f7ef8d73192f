"""The receiver on AWS Lambda: request formats, drain events, freezing, and killed invocations."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from receiver.emulator import create_emulator, settings_for
from receiver.http.selfstarting import SelfStarting
from receiver.model.errors import SettingsError, StoreUnusable
from tests.emulator.serving import FAST, serve
from tests.journey.parts import eventually
from tests.loopback import free_port
from tests.patience import PATIENCE
from tests.platforms.emulated_lambda import (
    CLIENT,
    SHAPES,
    Failed,
    Json,
    Killed,
    Lambda,
    Request,
    body_of,
    headers_of,
    in_front_of,
)
from tests.postgres import Database
from tests.receiving import API_KEY, ENV

KEY = ("authorization", f"Bearer {API_KEY}")
SCHEDULES: list[Json] = [
    {"source": "aws.scheduler", "detail-type": "Scheduled Event", "detail": {}},
    {"Records": [{"eventSource": "aws:sqs", "body": "{}", "messageId": "1"}]},
    {"Records": [{"EventSource": "aws:sns", "Sns": {"Message": "wake"}}]},
    {"receiver": "drain"},
]


class Function:
    """The function with a database and providers, and a client of its API."""

    def __init__(self, stack: ExitStack, folder: Path, database: Database, **more: str) -> None:
        providers = stack.enter_context(serve(create_emulator(FAST)))
        port = free_port()
        self.book = folder / "book"
        self.log = folder / "log"
        self.database = database
        env = {
            **ENV,
            **settings_for(f"http://127.0.0.1:{providers}"),
            "RECEIVER_DATABASE_URL": database.url,
            "RECEIVER_PUBLIC_URL": f"http://127.0.0.1:{port}",
            "RECEIVER_HANDLERS": str(Path(__file__).with_name("witness.py")),
            "WITNESS_BOOK": str(self.book),
            **more,
        }
        self.function = Lambda("receiver.aws.handler", env, self.log)
        stack.callback(self.function.close)
        url = stack.enter_context(in_front_of(self.function, port))
        self.http = stack.enter_context(
            httpx.Client(base_url=url, headers=[KEY], timeout=PATIENCE, trust_env=False)
        )

    def submit(self, prompt: str) -> str:
        body = {"provider": "fal", "model": "a/b", "input": {"prompt": prompt}}
        answer = self.http.post("/v1/predictions", json=body)
        assert answer.status_code in {200, 202}, answer.text
        return str(answer.json()["id"])

    def noted(self) -> Counter[str]:
        return Counter(self.book.read_text().split() if self.book.exists() else ())


@pytest.fixture
def function(tmp_path: Path, database: Database) -> Iterator[Function]:
    with ExitStack() as stack:
        yield Function(stack, tmp_path, database)


def test_each_outcome_is_handled_once_despite_freezing_and_a_kill(
    function: Function,
) -> None:
    pictures = [f"picture-{number}" for number in range(8)]
    killed = 0
    hung = function.book.with_suffix(".hung")
    function.function.is_stuck = lambda: not function.function.killed and hung.exists()

    def drain() -> Counter[str]:
        nonlocal killed
        with suppress(Killed):
            done = function.function.invoke(SCHEDULES[0])
            assert done.keys() >= {"deliveries", "submits", "polls", "more"}
        if function.function.killed > killed:  # in this drain, or during a request
            killed = function.function.killed
            # A killed process loses its claims only by an old heartbeat and lease: make them old.
            function.database.execute(
                "UPDATE receiver.pgqueuer SET heartbeat = NOW() - interval '31 seconds'",
                "UPDATE receiver.deliveries SET lease_until = lease_until - 60",
            )
        return function.noted()

    for picture in pictures:
        function.submit(picture)
    eventually(drain, lambda noted: noted.keys() >= set(pictures))
    # A handler whose delivery is not settled at the kill runs again, so this one runs alone.
    function.submit("hang")
    eventually(drain, lambda noted: "hang" in noted)
    assert (killed, function.function.environments) == (1, 2)
    assert function.noted() == Counter([*pictures, "hang"])
    listed = function.http.get("/v1/predictions", params={"limit": 50}).json()["data"]
    assert {each["status"] for each in listed} == {"succeeded"}
    counted = function.database.rows("SELECT count(*) FROM events")
    assert counted == [(len(pictures) + 1,)]
    text = function.log.read_text()
    assert "Traceback" not in text
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert sum(line["event"] == "receiver.started" for line in lines) == 2
    assert {line["client"] for line in lines if line["event"] == "request.handled"} == {CLIENT}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_event_format_gives_the_app_the_same_request(shape: str, module: ModuleType) -> None:
    headers = [("cookie", "a=1; b=2"), ("X-One", "1"), ("authorization", "Bearer ä")]
    target = "/v1/models/fal/a%20b?metadata.a%20b=c%26d&x=1&x=&y=%2B"
    scope = module.scope_of(SHAPES[shape](Request("GET", target, headers)))
    assert scope["path"].removeprefix(scope["root_path"]) == "/v1/models/fal/a b"
    assert scope["raw_path"].endswith(b"/v1/models/fal/a%20b")
    told = [("metadata.a b", "c&d"), ("x", "1"), ("x", ""), ("y", "+")]
    if shape == "balanced":  # this format has only the last of several values
        told.remove(("x", "1"))
    assert parse_qsl(scope["query_string"].decode(), keep_blank_values=True) == told
    assert scope["method"] == "GET"
    assert scope["scheme"] == "https"
    assert {("cookie", "a=1; b=2"), ("x-one", "1"), ("authorization", "Bearer ä")} <= {
        (name.decode(), value.decode()) for name, value in scope["headers"]
    }


def test_root_path_of_a_stage_is_answered(handler: Any) -> None:
    for path in ("/", ""):
        event = SHAPES["staged"](Request("GET", path, []))
        assert event["rawPath"] == f"/prod{path}"
        assert handler(event, Time(30))["statusCode"] == 200


def test_binary_bodies_and_cookies_are_encoded_for_each_event_format(module: ModuleType) -> None:
    picture = b"\x89PNG\r\n"

    async def view(_: Any) -> StreamingResponse:
        answer = StreamingResponse(iter([picture[:3], picture[3:]]))
        answer.set_cookie("a", "1")
        answer.set_cookie("b", "2")
        return answer

    function = module.Function(SelfStarting(Starlette(routes=[Route("/", view)])))
    for write in SHAPES.values():
        answer = function(write(Request("GET", "/", [])), Time(30))
        assert answer["isBase64Encoded"]
        assert body_of(answer) == picture
        cookies = ",".join(value for name, value in headers_of(answer) if name == "set-cookie")
        assert re.findall(r"(a=1|b=2);", cookies) == ["a=1", "b=2"]
    function.close()


@pytest.mark.parametrize("shape", SHAPES)
def test_api_requests_work_in_each_event_format(shape: str, handler: Any) -> None:
    write = SHAPES[shape]

    def ask(method: str, target: str, *headers: tuple[str, str], body: bytes = b"") -> Json:
        request = Request(method, target, [KEY, *headers], body, binary=target == "/v1/replays")
        answer: Json = json.loads(json.dumps(handler(write(request), Time(30))))
        return answer

    for _ in range(4):
        assert ask("GET", "/ready")["statusCode"] == 200
    body = {"provider": "fal", "model": "a/b", "input": {"prompt": "ü"}, "metadata": {"a b": "c&d"}}
    made = ask(
        *("POST", "/v1/predictions"),
        ("content-type", "application/json"),
        body=json.dumps(body, ensure_ascii=False).encode(),
    )
    assert made["statusCode"] == 202
    assert json.loads(made["body"])["input"] == {"prompt": "ü"}
    listed = ask("GET", "/v1/predictions?limit=1&provider=fal")
    assert [one["id"] for one in json.loads(listed["body"])["data"]] == [
        json.loads(made["body"])["id"]
    ]
    refused = ask("POST", "/webhooks/fal/pred_x.y", body=b"{}")
    assert (refused["statusCode"], refused["isBase64Encoded"]) == (401, False)
    assert dict(headers_of(refused))["content-type"] == "application/problem+json"
    assert ask("GET", "/v1/predictions?limit=x")["statusCode"] == 422
    assert ask("GET", "/nowhere")["statusCode"] == 404
    replay = ask(
        "POST", "/v1/replays", ("content-type", "application/json"), body=b'{"provider": "fal"}'
    )
    assert replay["statusCode"] == 201
    assert ask("HEAD", "/health")["body"] == ""
    document = ask("GET", "/openapi.json")
    again = ask("GET", "/openapi.json", ("if-none-match", dict(headers_of(document))["etag"]))
    assert (again["statusCode"], body_of(again)) == (304, b"")
    assert ("statusDescription" in made) == shape.startswith("balanced")
    assert ("multiValueHeaders" in made) == (shape in {"first", "balanced_many"})


class Time:
    """The context of an invocation: its remaining time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def get_remaining_time_in_millis(self) -> int:
        return int(self._seconds * 1000)


@pytest.fixture
def module(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """Import `receiver.aws` again, as a new environment does."""
    unreachable = settings_for("http://127.0.0.1:1")
    for name, value in {**ENV, **unreachable, "RECEIVER_DATABASE_URL": database.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("receiver.aws", None)
    found = import_module("receiver.aws")
    yield found
    found.handler.close()  # as the hook before a snapshot does
    del sys.modules["receiver.aws"]


@pytest.fixture
def handler(module: ModuleType) -> Any:
    return module.handler


def test_event_that_is_not_a_request_runs_a_drain(handler: Any) -> None:
    others: list[object] = [{}, [], "wake", None, {"httpMethod": 1, "path": "/"}]
    for event in [*SCHEDULES, *others]:
        done = handler(event, Time(30))
        assert (done["deliveries"], done["more"]) == (0, False)


def test_waiting_submit_and_stream_are_answered_before_the_invocation_ends(
    handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It waits half a second, and has the rest for its answer.
    monkeypatch.setattr("receiver.http.routes.predictions._BEFORE_CUT_OFF", PATIENCE - 0.5)
    ready = SHAPES["second"](Request("GET", "/ready", []))
    assert handler(ready, Time(30))["statusCode"] == 200
    content = [KEY, ("content-type", "application/json")]
    body = b'{"provider": "fal", "model": "a/b", "input": {"prompt": "x"}}'
    submit = Request("POST", "/v1/predictions", [*content, ("prefer", "wait=60")], body)
    answer = handler(SHAPES["second"](submit), Time(PATIENCE))
    assert (answer["statusCode"], json.loads(answer["body"])["status"]) == (202, "queued")
    stream = Request("GET", "/v1/events/stream", [KEY, ("last-event-id", "0")])
    for seconds in (1.5, 5, 20):  # the first is enough, unless the machine is slow
        answer = handler(SHAPES["first"](stream), Time(seconds))
        if "event: stream.open" in answer["body"]:
            break
    assert answer["statusCode"] == 200
    assert "event: stream.open" in answer["body"]


def test_hanging_request_returns_503_before_the_invocation_ends(module: ModuleType) -> None:
    async def hangs(_: Any) -> Any:
        await asyncio.sleep(PATIENCE)

    function = module.Function(SelfStarting(Starlette(routes=[Route("/", hangs)])))
    answer = function(SHAPES["second"](Request("GET", "/", [])), Time(1))
    assert answer["statusCode"] == 503
    assert json.loads(answer["body"])["type"] == "urn:receiver:problem:unavailable"
    function.close()


def test_unreachable_database_returns_503_fails_the_drain_and_then_recovers(
    handler: Any, database: Database
) -> None:
    ready = SHAPES["second"](Request("GET", "/ready", []))
    callback = SHAPES["second"](Request("POST", "/webhooks/fal/pred_x.y", [], b"{}"))
    with database.refusing():
        assert handler(callback, Time(30))["statusCode"] == 503
        with pytest.raises(StoreUnusable, match="not currently accepting connections"):
            handler({"receiver": "drain"}, Time(30))
    assert handler(ready, Time(30))["statusCode"] == 200


def test_function_restarts_after_the_snapshot_hook(module: ModuleType) -> None:
    ready = SHAPES["second"](Request("GET", "/ready", []))
    for _ in range(2):
        assert module.handler(ready, Time(30))["statusCode"] == 200
        module.handler.close()


def test_function_starts_after_a_snapshot_restore(tmp_path: Path, database: Database) -> None:
    with ExitStack() as stack:
        snapped = {"AWS_LAMBDA_INITIALIZATION_TYPE": "snap-start"}
        function = Function(stack, tmp_path, database, **snapped)
        assert function.http.get("/ready").status_code == 200
        assert function.function.restored == 1


def test_invalid_settings_fail_the_init_phase_and_are_all_reported(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECEIVER_SECRET_KEY", "short")
    monkeypatch.setenv("RECEIVER_TRUSTED_PROXIES", "nobody")
    for name, what in (("receiver.aws", "handler"), ("receiver.asgi", "app")):
        sys.modules.pop(name, None)
        with pytest.raises(SettingsError, match="RECEIVER_TRUSTED_PROXIES") as raised:
            getattr(import_module(name), what)
        assert len(raised.value.problems) == 2
    with ExitStack() as stack:
        function = Function(stack, tmp_path, database, RECEIVER_SECRET_KEY="short")
        with pytest.raises(Failed, match="RECEIVER_SECRET_KEY"):
            function.function.invoke({})
