"""Routes of plugins, `/in/{name}`: verification, limits, and plugins that fail."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import socket
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from receiver import Call, Door, Reply, Unproved, create_app, route
from receiver.model.errors import KeysUnavailable, Problem
from receiver.settings import Settings
from tests.clocks import LoopClock
from tests.conftest import Disk, Logged, Start
from tests.http.test_server import HOST, port_of, post, running, served, talk, whole
from tests.patience import PATIENCE
from tests.receiving import ENV, Clock, Network, Station, eventually, hangs

pytestmark = pytest.mark.anyio

KEY = b"the-shop's-own-secret"
PRIVATE = {"url": "https://shop.example/answers/5fd1", "token": "sealing-wax"}


def sign(body: bytes) -> str:
    return hmac.digest(KEY, body, sha256).hex()


def prove(call: Call) -> None:
    if not hmac.compare_digest(call.header("X-Shop-Signature").encode(), sign(call.body).encode()):
        raise Unproved("bad_signature")


@route("shop", proof=prove, longest=2000)
async def shop(call: Call, door: Door) -> Reply:
    order = call.json()
    prediction = await door.submit(
        "fal",
        "fal-ai/nano-banana",
        {"prompt": order["prompt"]},
        key=order["id"],
        metadata={"kind": "order"},
        private=order.get("private"),
    )
    return Reply.json({"id": prediction.id, "status": prediction.status}, 202)


def order(number: int = 1, **more: Any) -> bytes:
    return json.dumps({"id": f"order-{number}", "prompt": "a lighthouse", **more}).encode()


async def call(station: Station, body: bytes, path: str = "/in/shop", **headers: str) -> Any:
    signed = {"x-shop-signature": sign(body), **headers}
    return await station.world.post(path, content=body, headers=signed)


async def discarded(station: Station) -> set[tuple[str, str]]:
    """Return route and reason of the rejected calls that are written so far."""
    found = await station.http.get("/v1/discarded?kind=rejected")
    return {(item["provider"], item["reason"]) for item in found.json()["data"]}


# --- accepted calls ---


@pytest.mark.both_engines
@pytest.mark.usefixtures("stops_soon")
async def test_verified_call_is_stored_before_the_answer_and_submitted_after(
    start: Start, network: Network
) -> None:
    """The provider never answers the submit, but the caller gets an answer."""
    network.script("fal.submit", hangs)
    async with start(shop) as station:
        answer = await call(station, order())
        assert answer.status_code == 202, answer.text
        assert station.count("predictions") == 1
        await eventually(lambda: network.count("fal.submit"))
        found = await station.read(answer.json()["id"])
        assert found["status"] == "submitting"
        assert found["metadata"] == {"kind": "order"}


@pytest.mark.both_engines
async def test_repeated_calls_with_one_key_submit_once_even_days_later(
    start: Start, network: Network
) -> None:
    clock = Clock()
    async with start(shop, clock=clock) as station:
        answers = await asyncio.gather(*(call(station, order()) for _ in range(5)))
        # The key decides, even if the input differs.
        answers.append(await call(station, order(prompt="another")))
        assert {answer.status_code for answer in answers} == {202}
        assert len({answer.json()["id"] for answer in answers}) == 1
        (sent,) = await eventually(lambda: network.sent)
        await station.push(sent)
    clock.ahead = 2 * 86400
    async with start(shop, clock=clock) as station:
        again = await call(station, order())
        assert again.json()["id"] == answers[0].json()["id"]
        assert station.count("predictions") == 1
    assert network.count("fal.submit") == 1


async def test_queued_submit_survives_a_restart(start: Start, network: Network) -> None:
    async with start(shop, FAL_MAX_IN_FLIGHT="1") as station:
        for number in (1, 2):
            assert (await call(station, order(number))).status_code == 202
    async with start(shop) as station:
        await eventually(lambda: network.count("fal.submit") == 2)
        assert station.count("predictions") == 2


async def test_route_gets_the_whole_call_that_its_proof_verified(start: Start) -> None:
    seen: list[Call] = []

    @route("echo", proof=seen.append, methods=("GET", "PUT"), rest=True)
    async def echo(call: Call, _: Door) -> Reply:
        seen.append(call)
        return Reply.text("héllo", headers={"X-Seen": call.rest})

    async with start(echo) as station:
        answer = await station.world.put(
            "/in/echo/a/b?x=1&y=%20", content=b"\xff", headers=[("X-A", "1"), ("x-a", "2")]
        )
        bare = await station.world.get("/in/echo")
    first, second = seen[:2]
    assert first is second
    assert (first.method, first.rest, first.body) == ("PUT", "a/b", b"\xff")
    assert first.query == {"x": "1", "y": " "}
    assert (first.header("X-A"), first.header("X-B")) == ("1, 2", "")
    assert first.client == "203.0.113.9"
    assert (answer.text, answer.headers["x-seen"]) == ("héllo", "a/b")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert (bare.status_code, seen[-1].rest) == (200, "")


async def test_framing_headers_of_a_plugin_are_replaced(start: Start) -> None:
    framing = {"Content-Length": "7", "Transfer-Encoding": "chunked", "X-A": "1"}

    @route("framed", proof=lambda _: None, methods=["GET"])
    async def framed(call: Call, _: Door) -> Reply:
        return Reply(int(call.query["status"]), b"0123456789", framing)

    async with (
        start(framed) as station,
        served(station) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as real,
    ):
        for status, body in ((200, b"0123456789"), (204, b""), (302, b"0123456789")):
            answer = await real.get("/in/framed", params={"status": status})
            assert (answer.status_code, answer.content) == (status, body)
            assert answer.headers["x-a"] == "1"


async def test_proof_can_be_async_and_use_the_door(start: Start) -> None:
    async def secret(call: Call, door: Door) -> None:
        if call.header("x-secret") not in door.secrets("shop"):
            raise Unproved("bad_secret")

    @route("opens", proof=secret)
    async def opens(_: Call, door: Door) -> Reply:
        signed = door.sign("again", "button")
        return Reply.json([door.open(signed, "button", 60), len(door.secrets("shop"))])

    async with start(opens) as station:
        assert (await station.world.post("/in/opens")).status_code == 401
    keys = f"a-newer-secret-key-of-this-receiver-yet,{ENV['RECEIVER_SECRET_KEY']}"
    made = hmac.digest(ENV["RECEIVER_SECRET_KEY"].encode(), b"shop", sha256)
    before = base64.urlsafe_b64encode(made).rstrip(b"=")
    async with start(opens, RECEIVER_SECRET_KEY=keys) as station:
        answer = await station.world.post("/in/opens", headers={"x-secret": before.decode()})
        assert answer.json() == ["again", 2]


# --- rejected calls ---


async def test_unverified_call_returns_401_without_the_reason(start: Start, logged: Logged) -> None:
    async with start(shop) as station:
        bad = [
            await station.world.post("/in/shop", content=order()),
            await call(station, order(), **{"x-shop-signature": sign(order(2))}),
            await station.world.post(
                "/in/shop", content=order(), headers=[("x-shop-signature", sign(order()))] * 2
            ),
        ]
        for answer in bad:
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"]
            assert answer.json()["detail"] == "this call could not be proved"
        assert station.count("predictions") == 0
        await eventually(
            lambda: discarded(station), lambda found: ("/in/shop", "bad_signature") in found
        )
        metrics = (await station.world.get("/metrics")).text
    assert 'reason="bad_signature"} 3' in metrics
    lines = [line for line in logged if line.get("reason") == "bad_signature"]
    assert [line["plugin"] for line in lines] == ["shop"] * 3
    assert "lighthouse" not in str(logged)


class Wordless:
    """An object whose `str` raises SystemExit."""

    def __repr__(self) -> str:
        return "wordless"

    def __str__(self) -> str:
        raise SystemExit(3)


PROOF_ERRORS: list[BaseException] = [
    Unproved("what it said: 'a lighthouse'"),
    Unproved(),
    Unproved(["no", "word"]),  # type: ignore[arg-type]
    Unproved(Wordless()),  # type: ignore[arg-type]
    Problem(422, "a lighthouse", "what `call.json()` raises"),
    KeyError("x"),
    ValueError("not hex"),
    ZeroDivisionError(),
    SystemExit(3),
    asyncio.CancelledError(),
]


async def test_call_is_rejected_if_its_proof_raises_any_error(start: Start, logged: Logged) -> None:
    def fails(call: Call) -> None:
        raise PROOF_ERRORS[int(call.query["error"])]

    @route("failing", proof=fails)
    async def failing(_: Call, __: Door) -> Reply:
        raise AssertionError

    async with start(failing) as station:
        for number, error in enumerate(PROOF_ERRORS):
            answer = await station.world.post(f"/in/failing?error={number}", content=b"x")
            assert answer.status_code == 401, repr(error)
            assert (await station.world.get("/healthz")).is_success
    assert "a lighthouse" not in str(logged)


async def test_call_is_rejected_if_its_proof_returns_a_value(start: Start, logged: Logged) -> None:
    """The value may have been meant as a refusal."""

    @route("answering", proof=lambda call: bool(call.body))  # type: ignore[arg-type, return-value] # as some will write it
    async def answering(_: Call, __: Door) -> Reply:
        raise AssertionError

    async with start(answering) as station:
        for body in (b"", b"yes"):
            assert (await station.world.post("/in/answering", content=body)).status_code == 401
    assert [line["plugin"] for line in logged if line["event"] == "route.failed"] == [
        "answering"
    ] * 2


async def test_call_returns_503_if_its_proof_has_no_keys_yet(start: Start) -> None:
    def prove(_: Call) -> None:
        raise KeysUnavailable

    @route("waiting", proof=prove)
    async def waiting(_: Call, __: Door) -> Reply:
        raise AssertionError

    async with start(waiting) as station:
        answer = await station.world.post("/in/waiting")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


async def test_unknown_plugin_path_returns_404_and_wrong_method_405(start: Start) -> None:
    async with start(shop) as station:
        for path in ("/in/none", "/in/shop/more", "/in/shop/", "/in/", "/in", "/in/%00"):
            assert (await station.world.post(path, content=b"")).status_code == 404, path
        answer = await station.world.get("/in/shop")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


async def test_failed_calls_are_rate_limited_but_verified_calls_are_not(start: Start) -> None:
    async with start(shop, RECEIVER_LIMIT_UNPROVED_PER_MINUTE="3") as station:
        statuses = [(await station.world.post("/in/shop")).status_code for _ in range(5)]
        assert statuses == [401, 401, 401, 429, 429]
        assert (await call(station, order())).status_code == 202


async def test_oversized_plugin_body_returns_413(start: Start) -> None:
    async with start(shop) as station:
        assert (await call(station, order(note="x" * 2000))).status_code == 413
        async with served(station) as port:
            head = b"POST /in/shop HTTP/1.1\r\n" + HOST
            for body, status in (
                (b"content-length: 2001\r\n\r\n", b"413"),
                (b"transfer-encoding: chunked\r\n\r\n7d1\r\n" + b"x" * 2001 + b"\r\n", b"413"),
            ):
                assert await status_of(port, head + body) == status
        assert station.count("predictions") == 0


async def status_of(port: int, text: bytes) -> bytes:
    """Send bytes, and return the status of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(text)
    async with asyncio.timeout(PATIENCE):
        line = await reader.readline()
    writer.close()
    return line.split()[1]


async def test_slow_plugin_body_returns_408(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("receiver.http.body._GRACE", 0.05)
    async with start(shop) as station, served(station) as port:
        text = b"POST /in/shop HTTP/1.1\r\n" + HOST + b"content-length: 50\r\n\r\n{"
        assert await status_of(port, text) == b"408"


async def test_disconnect_during_a_plugin_body_is_counted_as_rejected_and_rate_limited(
    start: Start,
) -> None:
    limit = {"RECEIVER_LIMIT_UNPROVED_PER_MINUTE": "1"}
    async with start(shop, **limit) as station, served(station) as port:
        head = b"POST /in/shop HTTP/1.1\r\n" + HOST
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head + b"content-length: 50\r\n\r\n{")
        await eventually(
            lambda: discarded(station), lambda found: ("/in/shop", "disconnected") in found
        )
        # It has used up the client's only failure of this minute.
        assert await status_of(port, head + b"content-length: 0\r\n\r\n") == b"429"


def unsigned_requests() -> st.SearchStrategy[dict[str, Any]]:
    """Generate unsigned requests; some have a body that the plugin could read."""
    text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
    names = ("x-shop-signature", "content-type", "content-encoding", "cookie", "x-%")
    return st.fixed_dictionaries(
        {
            "method": st.sampled_from(["POST"] * 5 + ["GET", "PUT", "DELETE", "PATCH", "HEAD"]),
            "url": st.sampled_from(
                ["/in/shop"] * 3 + ["/in/shop?a=%ff&=b", "/in/shop/x", "/in/%00"]
            ),
            "headers": st.dictionaries(st.sampled_from(names), text),
            "content": st.one_of(st.binary(max_size=2500), st.just(order()), st.just(b"[" * 2000)),
        }
    )


async def test_random_unsigned_requests_are_rejected_and_store_nothing(start: Start) -> None:
    loop = asyncio.get_running_loop()
    async with start(shop, RECEIVER_LIMIT_UNPROVED_PER_MINUTE="none") as station:

        @hypothesis(max_examples=75)
        @given(unsigned_requests())
        def check(request: dict[str, Any]) -> None:
            sending = station.world.request(**request)
            answer = asyncio.run_coroutine_threadsafe(sending, loop).result(PATIENCE)
            assert answer.status_code in {401, 404, 405, 413}

        await asyncio.to_thread(check)
        assert station.count("predictions") == 0


# --- unavailable store, failing plugins ---


async def test_call_returns_503_without_the_store_and_a_retry_succeeds(
    start: Start, disk: Disk, network: Network
) -> None:
    async with start(shop) as station:
        disk.full = True
        answer = await call(station, order())
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["type"] == "urn:receiver:problem:unavailable"
        disk.full = False
        assert (await call(station, order())).status_code == 202
        await eventually(lambda: network.count("fal.submit") == 1)


async def test_slow_route_returns_503_and_a_retry_finds_the_prediction(
    start: Start, network: Network
) -> None:
    loop_clock = LoopClock()
    waits = [True, False]

    @route("slow", proof=prove, timeout=20)
    async def slow(_: Call, door: Door) -> Reply:
        prediction = await door.submit("fal", "fal-ai/nano-banana", {"prompt": "a"}, key="1")
        while waits.pop(0):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                break  # it ignores the cancellation
        return Reply.json(prediction.id)

    async with start(slow) as station:
        calling = asyncio.create_task(call(station, order(), "/in/slow"))
        await eventually(lambda: network.sent)
        await eventually(lambda: len(waits) == 1)
        loop_clock.ahead += 20
        late = await calling
        assert (late.status_code, late.headers["retry-after"]) == (503, "5")
        assert late.json()["type"] == "urn:receiver:problem:route-too-slow"
        again = await call(station, order(), "/in/slow")
        assert again.status_code == 200
        assert station.one("SELECT id FROM predictions") == again.json()
    assert network.count("fal.submit") == 1


async def test_call_in_progress_at_shutdown_returns_503(
    start: Start, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    monkeypatch.setattr("receiver.http.plugins._GRACE", 0.01)
    begun = asyncio.Event()

    @route("long", proof=prove, timeout=60)
    async def long(_: Call, __: Door) -> Reply:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with start(long) as station, running(station) as server:
        signed = b"x-shop-signature: %s\r\n" % sign(b"{}").encode()
        talking = asyncio.create_task(talk(port_of(server), whole(post("/in/long", signed), b"{}")))
        await begun.wait()
        server.should_exit = True
        assert (await talking).startswith(b"HTTP/1.1 503 ")
    assert "Exception in ASGI application" not in str(logged)


class Unprintable(BaseException):
    """An error that is no Exception, and whose `str` raises."""

    def __str__(self) -> str:
        raise RuntimeError


def fail(error: BaseException) -> NoReturn:
    raise error


def changed() -> Reply:
    """Add an invalid header to an answer that was checked already."""
    reply = Reply.json({})
    reply.headers["X-A"] = "1\r\nX-B: 2"  # type: ignore[index]
    return reply


class Unchecked(Reply):
    def __post_init__(self) -> None: ...


BAD_REPLIES: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "a text": lambda: "ok",
    "no status": lambda: Reply(99),
    "a text as body": lambda: Reply(200, "ok"),  # type: ignore[arg-type]
    "two headers in one": lambda: Reply(200, b"", {"X-A": "1\r\nX-B: 2"}),
    "no header": lambda: Reply(200, b"", {"a b": "1"}),
    "two headers, later": changed,
    "an answer of its own": lambda: Unchecked("x", "y"),  # type: ignore[arg-type]
    "a problem without words": lambda: fail(Problem(422, None, None)),  # type: ignore[arg-type]
    "a problem that cannot be written": lambda: fail(Problem(422, "x", "\ud800")),
    "no JSON": lambda: Reply.json(object()),
    "an error": lambda: 1 / 0,
    "an exit": lambda: sys.exit(3),
    "what is no Exception": lambda: fail(Unprintable()),
}


async def test_failing_plugin_returns_500_and_only_the_log_has_the_reason(
    start: Start, logged: Logged
) -> None:
    @route("bad", proof=prove)
    async def bad(call: Call, _: Door) -> Any:
        return BAD_REPLIES[call.body.decode()]()

    async with start(bad) as station:
        for number, name in enumerate(BAD_REPLIES, 1):
            found = await call(station, name.encode(), "/in/bad")
            assert found.status_code == 500, name
            assert found.json()["type"] == "urn:receiver:problem:route-failed"
            assert (await station.world.get("/healthz")).is_success
            failed = [line["plugin"] for line in logged if line["event"] == "route.failed"]
            assert failed == ["bad"] * number, name


BAD_BODIES = {
    b"{": (400, "invalid-json"),
    b"[" * 1900: (400, "invalid-json"),
    order(prompt="x" * 10).replace(b"xxx", b"\xff"): (400, "invalid-json"),
    b'{"id": "1"}': (500, "route-failed"),
}


async def test_verified_malformed_json_returns_400_and_a_missing_field_500(start: Start) -> None:
    async with start(shop) as station:
        for body, expected in BAD_BODIES.items():
            answer = await call(station, body)
            assert (answer.status_code, answer.json()["type"].rpartition(":")[2]) == expected, body


async def test_plugin_routes_return_503_before_startup(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/receiver.db"
    app = create_app(Settings.read({**ENV, "RECEIVER_DATABASE_URL": url}), [shop])
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="https://hooks.test") as world:
        for path in ("/in/shop", "/in/shop/more"):
            for method in ("GET", "POST"):
                assert (await world.request(method, path)).status_code == 503
