"""The API for plugin routes, `Door`, and private content that only handlers see."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from receiver import Call, Context, Dead, Door, Event, Problem, Reply, Retry, on, route
from tests.conftest import Logged, Start
from tests.http.test_plugins import call, order, prove, shop
from tests.http.test_recipes import RECIPES, written
from tests.patience import PATIENCE
from tests.receiving import Clock, Network, Station, eventually, write

pytestmark = pytest.mark.anyio

PRIVATE = {"url": "https://shop.example/answers/5fd1", "token": "sealing-wax"}


SUBMITS: dict[str, tuple[dict[str, Any], int, str]] = {
    "provider": ({"provider": "unknown"}, 422, "unknown-provider"),
    "model": ({"model": "a b"}, 422, "invalid-request"),
    "a set": ({"input": {"prompt": {1, 2}}}, 202, ""),
    "an object": ({"input": {"prompt": object()}}, 422, "invalid-request"),
    "metadata": ({"metadata": {"a": "x" * 300_000}}, 422, "invalid-request"),
    "reply_to": ({"reply_to": "https://evil.example/"}, 403, "reply-to-refused"),
    "private": ({"private": {"a": "x" * 17_000}}, 422, "invalid-request"),
}


async def test_invalid_plugin_submit_is_rejected_like_an_api_submit(start: Start) -> None:
    wanted = {"provider": "fal", "model": "fal-ai/nano-banana", "input": {}}

    @route("submits", proof=prove)
    async def submits(call: Call, door: Door) -> Reply:
        given, _, _ = SUBMITS[call.body.decode()]
        return Reply.text((await door.submit(**(wanted | given))).id, 202)

    async with start(submits) as station:
        for name, (_, status, kind) in SUBMITS.items():
            answer = await call(station, name.encode(), "/in/submits")
            assert answer.status_code == status, (name, answer.text)
            assert kind in answer.text, name


DEEP: dict[str, Any] = {}
_inside = DEEP
for _ in range(3000):
    _inside["a"] = _inside = {}

MALFORMED: dict[str, dict[str, Any]] = {
    "half a character": {"options": {"prompt": "\ud800"}},
    "a person of half one": {"person": "\ud800"},
    "a long person": {"person": "x" * 300},
    "a person of no text": {"person": {"id": 1}},
    "a place of half one": {"place": "club/\ud800"},
    "a long place": {"place": "club/" + "x" * 300},
    "options that are none": {"options": ["prompt"]},
    "no options": {"options": None},
    "metadata that are none": {"metadata": [1]},
    "metadata without end": {"metadata": DEEP},
    "large metadata": {"metadata": {"a": "x" * 300_000}},
    "metadata made large by the recipe": {"options": {"prompt": "x" * 300_000}},
    "a recipe that is no name": {"recipe": [1]},
    "no key": {"key": None},
    "an empty key": {"key": ""},
    "a key of no text": {"key": {}},
}


async def test_malformed_plugin_order_returns_422_and_submits_nothing(
    start: Start, tmp_path: Path
) -> None:
    """A signed call can still contain anything, and a missing key must not become a key."""
    recipes = written(tmp_path / "recipes.toml", RECIPES.replace('"picture" }', '"{prompt}" }'))
    good = {"recipe": "imagine", "options": {"prompt": "a"}, "key": 1, "person": "ada"}
    arguments: dict[str, Any] = {}

    @route("orders", proof=prove)
    async def orders(_: Call, door: Door) -> Reply:
        made = await door.order(**arguments)
        return Reply.json(msgspec.structs.asdict(made)["metadata"])

    async with start(orders, RECEIVER_RECIPES=str(recipes)) as station:
        for name, change in MALFORMED.items():
            arguments = {**good, "place": "club/1", **change}
            answer = await call(station, b"", "/in/orders")
            assert answer.status_code == 422, (name, answer.text)
            assert "invalid-request" in answer.text, name
        arguments = {**good, "place": "club/1", "reply_to": "https://evil.example/"}
        assert (await call(station, b"", "/in/orders")).status_code == 403
        assert station.count("predictions") == 0
        text = "{prompt} {0} {count.__class__} {{x}} \0"
        arguments = {**good, "place": "club/1", "options": {"prompt": text}}
        assert (await call(station, b"", "/in/orders")).json() == {"kind": text}


async def test_api_client_cannot_take_the_key_of_a_plugins_submit(start: Start) -> None:
    @route("submits", proof=prove)
    async def submits(_: Call, door: Door) -> Reply:
        made = await door.submit("fal", "fal-ai/nano-banana", {"prompt": "theirs"}, key="42")
        return Reply.text(str(made.input))

    body = {"provider": "fal", "model": "fal-ai/nano-banana", "input": {"prompt": "mine"}}
    async with start(submits) as station:
        for key in ("in/submits/42", '"in/submits/42"'):
            taken = await station.http.post(
                "/v1/predictions", json=body, headers={"idempotency-key": key}
            )
            assert taken.status_code == 422, taken.text
            assert "those of plugins' routes" in taken.json()["detail"]
        assert (await call(station, b"", "/in/submits")).text == "{'prompt': 'theirs'}"


# --- other methods of a door ---


async def test_door_reads_cancels_sends_http_requests_and_runs_work_later(
    start: Start, logged: Logged
) -> None:
    done = asyncio.Event()
    requests: list[httpx.Request] = []

    class Others(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            requests.append(request)
            return httpx.Response(200)

    @route("more", proof=prove)
    async def more(call: Call, door: Door) -> Reply:
        async def typing() -> None:
            await door.http.post("https://chat.example/typing")
            done.set()

        async def failing() -> None:
            raise ValueError("what may be lost")

        assert door.later(typing())
        assert door.later(failing())
        with pytest.raises(TypeError, match="later takes a coroutine"):
            door.later(failing)  # type: ignore[arg-type] # the function, not its coroutine
        with pytest.raises(Problem, match="at most 262144 bytes"):
            await door.annotate(call.json()["of"], self="x" * 262_144)
        door.log.info("asked")
        name = call.json()["of"]
        assert await door.prediction("pred_\0") is None
        found = await door.prediction(name)
        assert found is not None
        return Reply.json([found.status, (await door.cancel(name)).status])

    @route("cancels", proof=prove)
    async def cancels(_: Call, door: Door) -> Reply:
        return Reply.json(await door.cancel("pred_\0"))

    async with start(more, shop, cancels, others=Others(), FAL_MAX_IN_FLIGHT="1") as station:
        made = [(await call(station, order(number))).json()["id"] for number in (1, 2)][-1]
        answer = await call(station, json.dumps({"of": made}).encode(), "/in/more")
        assert answer.json() == ["queued", "canceled"]
        none = await call(station, b"", "/in/cancels")
        assert (none.status_code, "not-found" in none.text) == (404, True)
        again = await call(station, json.dumps({"of": made}).encode(), "/in/more")
        assert again.json() == ["canceled", "canceled"]
        async with asyncio.timeout(PATIENCE):
            await done.wait()
    assert requests[0].url.host == "chat.example"
    lines = [line for line in logged if line.get("via") == "in/more"]
    assert "asked" in {line["event"] for line in lines}
    assert [line["task"] for line in logged if line["event"] == "task.failed"][:1] == ["in/more"]


async def test_door_later_drops_work_over_its_limit(
    start: Start, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    monkeypatch.setattr("receiver.http.door.MOST_LATER", 1)

    @route("busy", proof=prove)
    async def busy(_: Call, door: Door) -> Reply:
        return Reply.json([door.later(asyncio.Event().wait()) for _ in range(2)])

    async with start(busy) as station:
        assert (await call(station, b"", "/in/busy")).json() == [True, False]
    assert "later.dropped" in {line["event"] for line in logged}


# --- private content ---


@pytest.mark.both_engines
async def test_private_content_reaches_only_handlers_and_is_deleted_after_them(
    start: Start, network: Network, logged: Logged
) -> None:
    seen: list[dict[str, Any]] = []
    let_go = asyncio.Event()

    @on("*", name="first")
    async def first(_: Event, ctx: Context) -> None:
        seen.append(ctx.private)

    @on("*", name="second")
    async def second(event: Event, ctx: Context) -> None:
        await let_go.wait()
        seen.append(ctx.private)
        assert PRIVATE["token"] not in repr(event)

    async with start(shop, first, second) as station:
        made = (await call(station, order(private=PRIVATE))).json()["id"]
        await eventually(lambda: len(network.sent) == 1)
        pages = await texts(station, made)
        await station.post(write(network, network.sent[0]))
        await eventually(lambda: seen == [PRIVATE])
        assert station.one("SELECT private FROM predictions")
        assert PRIVATE["token"] not in str(station.rows("SELECT * FROM predictions"))
        let_go.set()
        await eventually(lambda: station.one("SELECT private FROM predictions"), _is_none)
        pages += await texts(station, made)
        await station.http.post(f"/v1/predictions/{made}/replay")
        await eventually(lambda: seen == [PRIVATE, PRIVATE, {}, {}])
    assert PRIVATE["token"] not in pages + str(logged)


def _is_none(found: object) -> bool:
    return found is None


async def texts(station: Station, made: str) -> str:
    """Return all answers of the API about a prediction, as one text."""
    paths = (
        f"predictions/{made}",
        "predictions",
        "events",
        f"predictions/{made}/explain",
        "deliveries",
    )
    return "".join([(await station.http.get(f"/v1/{path}")).text for path in paths])


async def test_private_content_is_redacted_from_handler_errors(
    start: Start, network: Network, logged: Logged
) -> None:
    """The error of `raise_for_status` contains the URL, which is a secret here."""

    @on("*", retry=Retry(attempts=2, base=0))
    async def answers(_: Event, ctx: Context) -> None:
        if ctx.attempt == 2:
            # The stored reason ends after 500 characters, here after the host's name.
            raise Dead(f"{'x' * 480}{ctx.private['in'][0]['url']}")
        answer = httpx.Response(404, request=httpx.Request("POST", ctx.private["in"][0]["url"]))
        try:
            answer.raise_for_status()
        finally:
            ctx.private.clear()

    async with start(shop, answers) as station:
        made = (await call(station, order(private={"in": [PRIVATE]}))).json()["id"]
        await eventually(lambda: len(network.sent) == 1)
        await station.post(write(network, network.sent[0]))
        await eventually(lambda: station.rows("SELECT 1 FROM deliveries WHERE state = 'dead'"))
        pages = await texts(station, made)
    assert "404 Not Found' for url '…'" in str(logged)
    assert f"{'x' * 480}…" in pages
    assert "shop.example" not in pages + str(logged)
    errors = "".join(str(line.get("exc_info")) for line in logged)
    assert "shop.example" not in errors


async def test_private_content_is_deleted_if_no_handler_matches(
    start: Start, network: Network
) -> None:
    clock = Clock()
    async with start(shop, clock=clock) as station:
        await call(station, order(private=PRIVATE))
        await eventually(lambda: len(network.sent) == 1)
        assert station.one("SELECT private FROM predictions") is not None
        await station.post(write(network, network.sent[0]))
    async with start(shop, clock=clock) as station:
        await eventually(lambda: station.one("SELECT private FROM predictions"), _is_none)
