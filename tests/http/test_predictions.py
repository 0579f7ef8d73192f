"""The /v1 routes of predictions, and health: answers, errors, keys, lists; no secret leaks."""

from __future__ import annotations

import asyncio
import codecs
import gzip
import itertools
import re
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from receiver import Dead, Event, on
from receiver.cli.client import Client
from receiver.settings import Settings
from tests.conftest import Disk, Logged, Start
from tests.patience import PATIENCE
from tests.receiving import (
    API_KEY,
    ENV,
    MODELS,
    OTHER_API_KEY,
    PICTURE,
    SECRETS,
    Json,
    Network,
    Station,
    breaks,
    eventually,
    hangs,
    reply,
    write,
)

pytestmark = pytest.mark.anyio

PREDICTION = {
    "cost",
    "id",
    "provider",
    "model",
    "status",
    "mode",
    "input",
    "metadata",
    "provider_id",
    "output",
    "error",
    "channel",
    "created_at",
    "submitted_at",
    "completed_at",
    "erased_at",
    "reply_to",
    "order",
}
ROUTES = [
    ("POST", "/v1/predictions"),
    ("GET", "/v1/predictions"),
    ("GET", "/v1/predictions/pred_1"),
    ("POST", "/v1/predictions/pred_1/cancel"),
    ("POST", "/v1/predictions/pred_1/replay"),
    ("POST", "/v1/predictions/pred_1/erase"),
    ("GET", "/v1/recipes"),
    ("POST", "/v1/recipes/imagine"),
    ("GET", "/v1/deliveries"),
    ("POST", "/v1/deliveries/dlv_1/retry"),
    ("GET", "/v1/discarded"),
    ("GET", "/v1/replays"),
    ("POST", "/v1/replays"),
    ("GET", "/v1/replays/rep_1"),
    ("POST", "/v1/replays/rep_1/start"),
    ("POST", "/v1/replays/rep_1/cancel"),
    ("GET", "/v1/models/oxen/nano-banana"),
    ("GET", "/v1/drain"),
    ("POST", "/v1/drain"),
]
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
GOOD: Json = {"provider": "eachlabs", "model": "nano-banana", "input": {"prompt": "a lighthouse"}}


def problem(answer: httpx.Response, status: int, kind: str, case: object = "") -> Json:
    """Check that an answer is a problem of this kind, and return it; `case` names the request."""
    assert (answer.status_code, answer.headers["content-type"]) == (
        status,
        "application/problem+json",
    ), (case, answer.text)
    said = dict(answer.json())
    assert said["type"] == f"urn:receiver:problem:{kind}", case
    assert said["status"] == status
    assert said.keys() >= {"type", "title", "status", "detail"}
    assert str(said.get("retry_after", "")) == answer.headers.get("retry-after", ""), case
    return said


# --- predictions ---


@pytest.mark.parametrize("provider", ["oxen", "eachlabs", "fal"])
async def test_submitted_prediction_has_all_documented_fields(start: Start, provider: str) -> None:
    async with start() as station:
        answer = await station.http.post(
            "/v1/predictions",
            json={
                "provider": provider,
                "model": MODELS[provider],
                "input": {"prompt": "größe \u2028 🦊", "n": [1, {"deep": None}]},
                "metadata": {"chat": "42"},
            },
        )
        found = answer.json()
        assert answer.status_code == 202
        assert answer.url.join(answer.headers["location"]).path == f"/v1/predictions/{found['id']}"
        assert found.keys() - {"parent_id", "depth"} == PREDICTION
        assert found == await station.read(found["id"])
        assert re.fullmatch(r"pred_[0-9a-f]{32}", found["id"])
        assert found["input"] == {"prompt": "größe \u2028 🦊", "n": [1, {"deep": None}]}
        assert {name: found[name] for name in ("provider", "status", "mode", "metadata")} == {
            "provider": provider,
            "status": "processing",
            "mode": "queue",
            "metadata": {"chat": "42"},
        }
        assert found["provider_id"] == station.network.sent[0].id
        assert TIME.fullmatch(found["created_at"])
        assert TIME.fullmatch(found["submitted_at"])
        ends = ("output", "error", "channel", "completed_at")
        assert [found[name] for name in ends] == [None] * 4


async def test_ended_prediction_has_an_output_or_an_error(start: Start) -> None:
    async with start() as station:
        for ok in (True, False):
            sent = await station.submitted("eachlabs", str(ok))
            await station.push(sent, ok=ok)
            found = await station.read(sent.prediction_id)
            assert TIME.fullmatch(found["completed_at"])
            if ok:
                assert (found["output"], found["error"]) == ([{"url": PICTURE}], None)
            else:
                error = {"code": "timeout", "message": "model timed out"}
                assert (found["output"], found["error"]) == (None, error)


async def test_unknown_id_or_path_returns_404(start: Start) -> None:
    async with start() as station:
        for path in ("pred_1", "%00", "é", "../x", "a" * 3000):
            problem(await station.http.get(f"/v1/predictions/{path}"), 404, "not-found")
        for path in ("/v1/predictions/pred_1/cancel", "/v1/predictions/pred_1/replay"):
            problem(await station.http.post(path), 404, "not-found")
        problem(await station.http.post("/v1/deliveries/dlv_1/retry"), 404, "not-found")
        problem(await station.http.get("/v2"), 404, "not-found")
        problem(await station.http.delete("/v1/predictions"), 405, "method-not-allowed")


HUGE = b'{"provider": "fal", "model": "a/b", "input": {"x": "' + b"x" * 5000 + b'"}}'
BAD_BODIES: list[tuple[bytes, int, str]] = [
    (b"", 400, "invalid-json"),
    (b"not json", 400, "invalid-json"),
    (b"\xff\xfe", 400, "invalid-json"),
    (b'{"provider": "fal", "model": "\xff", "input": {}}', 400, "invalid-json"),
    (b"[" * 2000, 422, "invalid-request"),
    (b'{"input":' * 400, 400, "invalid-json"),
    (HUGE, 413, "too-large"),
    (b"[]", 422, "invalid-request"),
    (b"null", 422, "invalid-request"),
    (b"{}", 422, "invalid-request"),
]
BAD_FIELDS: list[tuple[Json, int, str]] = [
    ({"provider": "nobody"}, 422, "unknown-provider"),
    ({"provider": 7}, 422, "invalid-request"),
    ({"model": ""}, 422, "invalid-request"),
    ({"model": "a\nb"}, 422, "invalid-request"),
    ({"model": "a/b\n"}, 422, "invalid-request"),
    ({"model": "a" * 301}, 422, "invalid-request"),
    ({"provider": "fal", "model": "a/../b"}, 422, "invalid-request"),
    ({"provider": "fal", "model": "/a"}, 422, "invalid-request"),
    ({"input": []}, 422, "invalid-request"),
    ({"input": "text"}, 422, "invalid-request"),
    ({"metadata": []}, 422, "invalid-request"),
    ({"mode": "fast"}, 422, "invalid-request"),
    ({"webhook_url": "https://elsewhere.test"}, 422, "invalid-request"),
    ({"provider": "oxen", "input": {"num_generations": 2}}, 422, "unsupported-input"),
    ({"provider": "oxen", "input": {"webhook_url": "https://x.test"}}, 422, "unsupported-input"),
]


async def test_malformed_or_oversized_body_returns_4xx(start: Start) -> None:
    async with start(RECEIVER_MAX_BODY_BYTES="4000") as station:
        for body, status, kind in BAD_BODIES:
            answer = await station.http.post(
                "/v1/predictions", content=body, headers={"content-type": "application/json"}
            )
            problem(answer, status, kind, body[:40])
            assert station.count("predictions") == 0, body[:40]


async def test_invalid_field_returns_422(start: Start) -> None:
    async with start() as station:
        for change, status, kind in BAD_FIELDS:
            answer = await station.http.post("/v1/predictions", json={**GOOD, **change})
            problem(answer, status, kind, change)
            assert station.count("predictions") == 0, change


ODD_VALUES = [
    "18446744073709551616",
    "-9223372036854775809",
    "1" + "0" * 300,
    "1e999",
    '"\\ud800"',
    '"\\u0000"',
    "[" * 70 + "]" * 70,
    "[" * 900 + "]" * 900,
]


async def test_unusual_json_value_is_passed_on_unchanged_or_rejected(
    start: Start, network: Network
) -> None:
    headers = {"content-type": "application/json"}
    async with start() as station:
        for value in ODD_VALUES:
            body = f'{{"provider": "eachlabs", "model": "m", "input": {{"odd": {value}}}}}'
            before = len(network.sent)
            answer = await station.http.post("/v1/predictions", content=body, headers=headers)
            assert answer.status_code in {202, 400, 422}, (value[:12], answer.text)
            if answer.status_code == 202:
                (sent,) = network.sent[before:]
                given = msgspec.json.decode(sent.request.content)["input"]
                assert given == answer.json()["input"], value[:12]
                assert given == msgspec.json.decode(body)["input"], value[:12]
            else:
                assert answer.headers["content-type"] == "application/problem+json", value[:12]


async def test_wrong_content_type_returns_415(start: Start) -> None:
    async with start() as station:
        for kind in (None, "text/plain", "application/x-www-form-urlencoded", ""):
            headers = {} if kind is None else {"content-type": kind}
            answer = await station.http.post("/v1/predictions", content=b"{}", headers=headers)
            problem(answer, 415, "unsupported-media-type", kind)


async def test_compressed_body_returns_415(start: Start) -> None:
    body = gzip.compress(b"{}")
    async with start() as station:
        for coding, path in itertools.product(
            ("gzip", "br, identity", "GZIP", "x" * 100), ("/v1/predictions", "/v1/replays")
        ):
            headers = {"content-type": "application/json", "content-encoding": coding}
            answer = await station.http.post(path, content=body, headers=headers)
            said = problem(answer, 415, "unsupported-media-type", (coding, path))
            assert "Content-Encoding" in said["detail"], (coding, path)


async def test_byte_order_mark_before_json_is_ignored(start: Start) -> None:
    headers = {"content-type": "application/json", "content-encoding": "identity"}
    async with start() as station:
        body = codecs.BOM_UTF8 + msgspec.json.encode(GOOD)
        answer = await station.http.post("/v1/predictions", content=body, headers=headers)
        assert answer.status_code == 202
        problem(
            await station.http.post("/v1/predictions", content=codecs.BOM_UTF8, headers=headers),
            400,
            "invalid-json",
        )


async def test_client_disconnect_during_the_body_logs_no_error(
    start: Start, logged: Logged
) -> None:
    async with start() as station:
        messages = [{"type": "http.request", "body": b"{", "more_body": True}]

        async def receive() -> dict[str, Any]:
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(_: Any) -> None: ...

        headers = [
            (b"authorization", f"Bearer {API_KEY}".encode()),
            (b"content-type", b"application/json"),
        ]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/predictions",
            "raw_path": b"/v1/predictions",
            "query_string": b"",
            "headers": headers,
            "scheme": "http",
        }
        await station.app(scope, receive, send)
    assert not [line for line in logged if line["log_level"] == "error"]


async def test_error_for_a_disabled_or_misspelled_provider_says_what_to_do(
    start: Start,
) -> None:
    async with start(EACHLABS_API_KEY=None) as station:
        for name, kind, words in (
            ("eachlabs", "provider-off", "set EACHLABS_API_KEY and start again"),
            ("eachlab", "unknown-provider", "(did you mean eachlabs?)"),
        ):
            answer = await station.http.post("/v1/predictions", json=GOOD | {"provider": name})
            assert words in problem(answer, 422, kind)["detail"]


# --- idempotency ---


async def test_same_idempotency_key_returns_the_same_prediction(
    start: Start, network: Network
) -> None:
    headers = {"idempotency-key": "key-1"}
    async with start() as station:
        first = await station.http.post("/v1/predictions", json=GOOD, headers=headers)
        spelt = dict(reversed(GOOD.items()))
        again = await station.http.post("/v1/predictions", json=spelt, headers=headers)
        assert (first.status_code, again.status_code) == (202, 202)
        assert first.json() == again.json()
        await station.push(network.sent[0])
        later = await station.http.post("/v1/predictions", json=GOOD, headers=headers)
        assert (later.status_code, later.json()["status"]) == (200, "succeeded")
    async with start() as station:
        restarted = await station.http.post("/v1/predictions", json=GOOD, headers=headers)
        assert restarted.json() == later.json()
    assert len(network.sent) == 1


async def test_same_idempotency_key_with_another_body_returns_409(start: Start) -> None:
    headers = {"idempotency-key": "key-1"}
    changes: list[Json] = [
        {"provider": "oxen"},
        {"model": "other"},
        {"input": {}},
        {"metadata": {"a": 1}},
        {"mode": "sync"},
    ]
    async with start() as station:
        first = await station.http.post("/v1/predictions", json=GOOD, headers=headers)
        for change in changes:
            body = {**GOOD, **change}
            other = await station.http.post("/v1/predictions", json=body, headers=headers)
            said = problem(other, 409, "idempotency-conflict", change)
            assert said["prediction_id"] == first.json()["id"]
            assert station.count("predictions") == 1, change


async def test_concurrent_requests_with_one_idempotency_key_submit_once(
    start: Start, network: Network
) -> None:
    headers = {"idempotency-key": "key-1"}
    async with start() as station:
        answers = await asyncio.gather(
            *(station.http.post("/v1/predictions", json=GOOD, headers=headers) for _ in range(20))
        )
        assert {answer.status_code for answer in answers} == {202}
        assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(network.sent) == 1


async def test_quoted_idempotency_key_equals_the_unquoted_one(start: Start) -> None:
    async with start() as station:
        for key, quoted in (
            ("k", '"k"'),
            ("k" * 255, f'"{"k" * 255}"'),
            ('say "no" to \\', r'"say \"no\" to \\"'),
            ("a b, c", '"a b, c"'),
        ):
            made = [
                await station.http.post(
                    "/v1/predictions",
                    json=GOOD,
                    headers=[("idempotency-key", one) for one in several],
                )
                for several in ([key], [quoted], [key, key], [quoted, quoted])
            ]
            assert {answer.status_code for answer in made} == {202}, key
            assert len({answer.json()["id"] for answer in made}) == 1, key


async def test_invalid_idempotency_key_returns_422(start: Start) -> None:
    async with start() as station:
        for key in (
            "",
            "k" * 256,
            "a\tb",
            '"',
            '""',
            '"k',
            '"k"x',
            '"k";a=1',
            r'"\k"',
            '"k\\"',
            f'"{"k" * 256}"',
            '"a", "b"',
        ):
            answer = await station.http.post(
                "/v1/predictions", json=GOOD, headers={"idempotency-key": key}
            )
            problem(answer, 422, "invalid-request", key)


# --- waiting ---


async def test_prefer_wait_waits_for_the_outcome(start: Start, network: Network) -> None:
    async with start() as station:
        waiting = asyncio.create_task(
            station.http.post("/v1/predictions", json=GOOD, headers={"prefer": "wait=30"})
        )
        (sent,) = await eventually(lambda: network.sent)
        reading = asyncio.create_task(
            station.http.get(
                f"/v1/predictions/{sent.prediction_id}", headers={"prefer": "foo, wait=30"}
            )
        )
        assert not (await asyncio.wait({waiting, reading}, timeout=0.05))[0]
        await station.push(sent)
        answer = await waiting
        assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
        assert answer.headers["preference-applied"] == "wait=30"
        assert (await reading).json() == answer.json()


async def test_prefer_wait_returns_202_at_its_timeout(start: Start) -> None:
    async with start() as station:
        answer = await station.http.post("/v1/predictions", json=GOOD, headers={"prefer": "wait=1"})
        assert (answer.status_code, answer.json()["status"]) == (202, "processing")
        assert answer.headers["preference-applied"] == "wait=1"


async def test_invalid_preference_is_ignored(start: Start) -> None:
    async with start() as station:
        for prefer in ("wait=x", "wait=-1", "wait=1.5", "wait=٣", "respond-async", ","):
            headers = [(b"prefer", prefer.encode())]
            answer = await station.http.post("/v1/predictions", json=GOOD, headers=headers)
            assert answer.status_code == 202, prefer
            assert "preference-applied" not in answer.headers, prefer


@pytest.mark.parametrize("prefer", ["wait=1", "respond-async", "foo, Respond-Async; a=b"])
async def test_sync_submit_returns_202_when_its_wait_ends(
    start: Start, network: Network, prefer: str
) -> None:
    leave = asyncio.Event()

    async def slowly(request: httpx.Request) -> httpx.Response:
        await leave.wait()
        return await network.by_emulator(request)

    network.script("eachlabs.run", slowly)
    async with start() as station:
        async with asyncio.timeout(PATIENCE):
            answer = await station.http.post(
                "/v1/predictions", json={**GOOD, "mode": "sync"}, headers={"prefer": prefer}
            )
        assert (answer.status_code, answer.json()["status"]) == (202, "submitting")
        waited = prefer if prefer == "wait=1" else None
        assert answer.headers.get("preference-applied") == waited
        leave.set()
        found = await station.until(answer.json()["id"], "succeeded")
        assert found["channel"] == "sync"


@pytest.mark.parametrize("mode", ["queue", "sync"])
@pytest.mark.usefixtures("stops_soon")
async def test_waiting_request_is_answered_at_shutdown(
    start: Start, network: Network, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr("receiver.http.body._LONGEST_WAIT", 2 * PATIENCE)
    network.always("eachlabs.run", hangs)
    network.always("eachlabs.submit", hangs)
    async with start() as station:
        waiting = asyncio.create_task(
            station.http.post(
                "/v1/predictions", json={**GOOD, "mode": mode}, headers={"prefer": "wait=120"}
            )
        )
        await eventually(lambda: network.count("eachlabs.submit") + network.count("eachlabs.run"))
        station.app.state.release()
        async with asyncio.timeout(PATIENCE):  # the caller would wait for twice as long
            answer = await waiting
        assert (answer.status_code, answer.json()["status"]) == (202, "submitting")


# --- lists ---


async def test_lists_are_newest_first_and_stable_under_inserts(start: Start) -> None:
    async with start() as station:
        made = [(await station.submit("fal", f"no {number}"))["id"] for number in range(7)]
        seen: list[str] = []
        cursor: str | None = ""
        while cursor is not None:
            path = f"/v1/predictions?limit=2{cursor and f'&cursor={cursor}'}"
            page = (await station.http.get(path)).json()
            assert page.keys() == {"data", "next_cursor"}
            assert all(one.keys() - {"parent_id", "depth"} == PREDICTION for one in page["data"])
            seen += [one["id"] for one in page["data"]]
            cursor = page["next_cursor"]
            await station.submit("fal", "meanwhile")
        assert seen == made[::-1]


async def test_prediction_list_applies_its_filters(start: Start) -> None:
    async with start() as station:
        for provider in ("oxen", "fal", "eachlabs"):
            await station.submit(provider, provider)
        await station.push(station.network.of("fal"))

        async def ids(query: str) -> list[str]:
            answer = await station.http.get(f"/v1/predictions?{query}")
            return [one["provider"] for one in answer.json()["data"]]

        assert await ids("") == ["eachlabs", "fal", "oxen"]
        assert await ids("status=succeeded") == ["fal"]
        assert await ids("status=processing&provider=oxen") == ["oxen"]
        assert await ids("model=fal-ai/*") == ["fal"]
        assert await ids("model=nano-*&provider=oxen&since=2020-01-01T00:00:00Z") == ["oxen"]
        assert await ids("since=2999-01-01T00:00:00%2B14:00") == []
        marked = await station.submit("fal", "marked", metadata={"n": 7, "kind": "a[vatar"})
        assert await ids("metadata.n=7&metadata.kind=a[[]*") == ["fal"]
        assert await ids("metadata.n=7&model=nano*") == []
        assert await ids(f"metadata.n=7&cursor={marked['id']}") == []
        assert await ids("metadata.=*") == []


UNFIT_QUERIES = [
    "status=done",
    "status=",
    "status=null",
    "provider=nobody",
    "page=2",
    "cursor=nonsense%00%ff",
    "limit=1&limit=2",
    "model=",
    f"model={'m' * 301}",
    "since=yesterday",
    "since=2026-01-31T12:00:00",
    "since=2026-01-31T12:00:00+00:00",  # an unencoded plus sign is a space
    "since=%00",
    f"metadata.a={'*' * 301}",
    "&".join(f"metadata.n{n}=*" for n in range(21)),
    "metadata.a=1&metadata.a=2",
    *(f"limit={n}" for n in ("0", "101", "x", "-1", "٣", "1e1", "0000000010000", "9" * 99)),
]


async def test_invalid_list_query_returns_422(start: Start) -> None:
    async with start() as station:
        for query in UNFIT_QUERIES:
            paths = ["/v1/predictions"]
            paths += ["/v1/deliveries"] * (not query.startswith(("status", "provider")))
            for path in paths:
                asked = f"{path}?{query}"
                problem(await station.http.get(asked), 422, "invalid-request", asked)


async def test_error_for_an_invalid_list_query_names_the_reason(start: Start) -> None:
    async with start() as station:
        for query, detail in (
            ("state=lost", "state must be one of dead, done, pending, running, skipped"),
            ("limit=0", "limit must be 1 to 100"),
            ("handler=%00", "handler must be like save"),
            ("prediction=pred_1", "prediction must be like pred_0199f3a6d2c1e45b7f1c9d3e8a260f4b"),
            ("page=2", "Object contains unknown field `page`"),
            ("state=dead&limit=1&limit=2", "limit is given twice"),
        ):
            answer = await station.http.get(f"/v1/deliveries?{query}")
            assert problem(answer, 422, "invalid-request", query)["detail"] == detail


# --- deliveries, replay ---


@on(name="tests.refuses")
async def refuses(_: Event) -> None:
    raise Dead("nothing to be done")


@on("succeeded", name="tests.works")
async def works(_: Event) -> None: ...


async def test_deliveries_are_listed_retried_and_replayed(start: Start) -> None:
    async with start(refuses, works) as station:
        sent = await station.submitted("eachlabs")
        path = f"/v1/predictions/{sent.prediction_id}/replay"
        problem(await station.http.post(path), 409, "not-ended")
        await station.push(sent)
        await _settled(station)
        page = (await station.http.get(f"/v1/deliveries?prediction={sent.prediction_id}")).json()
        found = {one["handler"]: one for one in page["data"]}
        dead = found["tests.refuses"]
        assert dead.keys() == {
            "id",
            "event_id",
            "prediction_id",
            "handler",
            "state",
            "model",
            "attempts",
            "round",
            "replay_id",
            "reason",
            "created_at",
            "due_at",
            "ended_at",
            "history",
        }
        assert (dead["state"], dead["reason"], dead["due_at"]) == (
            "dead",
            "nothing to be done",
            None,
        )
        assert [(one["number"], one["result"]) for one in dead["history"]] == [(1, "dead")]
        for query, handlers in (
            ("state=dead", ["tests.refuses"]),
            ("state=done", ["tests.works"]),
            ("handler=tests.works", ["tests.works"]),
            ("state=pending", []),
            ("limit=1", [page["data"][0]["handler"]]),
        ):
            some = (await station.http.get(f"/v1/deliveries?{query}")).json()
            assert [one["handler"] for one in some["data"]] == handlers

        answer = await station.http.post(f"/v1/deliveries/{dead['id']}/retry")
        assert (answer.status_code, answer.json()["id"]) == (202, dead["id"])
        await _settled(station, attempts=3)
        done = found["tests.works"]["id"]
        refused = await station.http.post(f"/v1/deliveries/{done}/retry")
        problem(refused, 409, "not-retryable")

        answer = await station.http.post(path)
        assert answer.status_code == 202
        assert answer.json()["pending"] == 2
        assert set(answer.json()["handlers"]) == {"tests.refuses", "tests.works"}
        await _settled(station, attempts=5)
        assert station.count("events") == 1


async def _settled(station: Station, attempts: int = 2) -> None:
    await eventually(lambda: station.count("attempts"), lambda count: count == attempts)


# --- models ---


async def test_model_details_come_unchanged_from_the_provider(
    start: Start, network: Network
) -> None:
    network.script("oxen.model", reply({"id": "flux", "request_schema": {}}))
    async with start() as station:
        answer = await station.http.get("/v1/models/oxen/black-forest/flux")
        assert answer.status_code == 200
        assert answer.json() == {"id": "flux", "request_schema": {}}
        answer = await station.http.get("/v1/models/eachlabs/nano-banana")
        assert answer.json()["request_schema"]["required"] == ["prompt"]
        answer = await station.http.get("/v1/models/fal/fal-ai/nano-banana/edit")
        assert answer.json()["models"][0]["endpoint_id"] == "fal-ai/nano-banana/edit"
        for model in ("eachlabs/no-such-model", "fal/fal-ai/no-such-model"):
            problem(await station.http.get(f"/v1/models/{model}"), 404, "no-model-details")
        problem(await station.http.get("/v1/models/nobody/x"), 422, "unknown-provider")
        problem(await station.http.get("/v1/models/oxen/a//b"), 422, "invalid-model")
        network.script(
            "oxen.model",
            reply({}, 404),
            reply({}, 500),
            reply(text="<html>"),
            breaks(httpx.ReadError),
        )
        for status, kind in (
            (404, "no-model-details"),
            (502, "provider-unavailable"),
            (502, "provider-unavailable"),
            (502, "provider-unavailable"),
        ):
            problem(await station.http.get("/v1/models/oxen/x"), status, kind)


# --- health ---


async def test_health_needs_no_key_and_readiness_fails_on_a_full_disk(
    start: Start, disk: Disk
) -> None:
    async with start() as station:
        for path, says in (
            ("/healthz", {"status": "ok"}),
            ("/readyz", {"status": "ok", "locked": []}),
        ):
            answer = await station.world.get(path)
            assert (answer.status_code, answer.json()) == (200, says)
        disk.full = True
        assert (await station.world.get("/healthz")).status_code == 200
        answer = await station.world.get("/readyz")
        assert problem(answer, 503, "unavailable")
        assert answer.headers["retry-after"] == "5"


# --- keys ---


BAD_KEYS = [
    None,
    b"",
    b"Bearer",
    b"Bearer ",
    b"Bearer wrong",
    b"Bearer " + API_KEY[:-1].encode(),
    b"Basic " + API_KEY.encode(),
    API_KEY.encode(),
    "Bearer schlüssel".encode(),
    b"Bearer \xff\xfe",
]


async def test_without_a_valid_key_every_route_returns_401(start: Start) -> None:
    async with start() as station:
        for given, (method, path) in itertools.product(BAD_KEYS, ROUTES):
            headers = {} if given is None else {b"authorization": given}
            answer = await station.world.request(method, path, headers=headers)
            problem(answer, 401, "unauthorized", (given, method, path))
            assert answer.headers["www-authenticate"] == "Bearer", (given, method, path)


async def test_every_configured_api_key_is_accepted(start: Start) -> None:
    async with start() as station:
        for spelt in (f"Bearer {API_KEY}", f"bearer  {OTHER_API_KEY} "):
            headers = {"authorization": spelt}
            assert (await station.world.get("/v1/predictions", headers=headers)).is_success


async def test_viewer_key_can_read_but_not_change_anything(start: Start) -> None:
    async with start(RECEIVER_VIEWER_KEYS="ops:the-key-of-one-who-looks") as station:
        headers = {"authorization": "Bearer the-key-of-one-who-looks"}
        for method, path in ROUTES:
            answer = await station.world.request(method, path, headers=headers)
            if method != "GET" or path == "/v1/drain":
                problem(answer, 403, "read-only")
            else:
                assert answer.status_code not in {401, 403}, path
        assert (await station.world.head("/v1/predictions", headers=headers)).is_success


async def test_without_configured_api_keys_every_request_returns_401(start: Start) -> None:
    async with start(RECEIVER_API_KEYS=None) as station:
        for given in (f"Bearer {API_KEY}", "Bearer ", "Bearer None", ""):
            answer = await station.world.get("/v1/predictions", headers={"authorization": given})
            problem(answer, 401, "unauthorized")


LOCAL = ("127.0.0.1", 4000)


@asynccontextmanager
async def nearby(station: Station, client: tuple[str, int]) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(station.app, client=client)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
        yield http


@pytest.mark.parametrize("dev", ["0", "1"])
async def test_client_address_never_replaces_an_api_key(start: Start, dev: str) -> None:
    known: list[dict[str, str]] = [
        {},
        {"host": "localhost:8000"},
        {"host": "localhost:8000", "true-client-ip": "203.0.113.9"},
        {"x-forwarded-for": "127.0.0.1"},
        {"authorization": "Bearer wrong"},
    ]
    async with start(RECEIVER_DEV=dev) as station:
        for client in (LOCAL, ("::1", 4000), ("203.0.113.9", 4000)):
            async with nearby(station, client) as http:
                for headers in known:
                    answer = await http.get("/v1/predictions", headers=headers)
                    assert answer.status_code == 401, (client, headers)


@pytest.mark.parametrize("secret", [None, ENV["RECEIVER_SECRET_KEY"], f"{'new' * 11},{'o' * 32}"])
async def test_development_commands_find_their_key_for_local_urls_only(
    start: Start, secret: str | None
) -> None:
    given = {"RECEIVER_DEV": "1", "RECEIVER_SECRET_KEY": secret, "RECEIVER_API_KEYS": None}
    async with start(**given) as station:
        env = {"RECEIVER_DATABASE_URL": f"sqlite:///{station.database}"}
        env |= {"RECEIVER_SECRET_KEY": secret} if secret else {}
        sent: list[httpx.Request] = []

        def seen(request: httpx.Request) -> httpx.Response:
            sent.append(request)
            return httpx.Response(200, json={})

        for url, has_key in (
            ("http://127.0.0.1:8000", True),
            ("http://localhost:8000/", True),
            ("https://hooks.test", False),
        ):
            client = Client({**env, "RECEIVER_URL": url}, httpx.MockTransport(seen))
            client.fetch("predictions")
            client.close()
            key = sent[-1].headers.get("authorization")
            assert (key is not None) == has_key
            answer = await station.world.get(
                "/v1/predictions", headers={"authorization": key or ""}
            )
            assert answer.status_code == (200 if has_key else 401)
    async with start(**{**given, "RECEIVER_DEV": None, "RECEIVER_SECRET_KEY": "k" * 32}) as station:
        key = sent[0].headers["authorization"]
        answer = await station.world.get("/v1/predictions", headers={"authorization": key})
        assert answer.status_code == 401


# --- behind a path prefix ---


def stripped(app: ASGIApp) -> ASGIApp:
    """Remove a path prefix as a proxy does, without telling the app."""

    async def strip(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "path": scope["path"].removeprefix("/art")}, receive, send)

    return strip


@pytest.mark.parametrize(
    "put",
    [lambda app: Starlette(routes=[Mount("/art", app)]), stripped],
    ids=["mounted", "proxied"],
)
async def test_urls_are_correct_under_a_path_prefix(
    start: Start, put: Callable[[ASGIApp], ASGIApp], network: Network
) -> None:
    public = "https://hooks.test/art"
    async with start(RECEIVER_PUBLIC_URL=public) as station:
        transport = httpx.ASGITransport(put(station.app))
        key = {"authorization": f"Bearer {API_KEY}"}
        async with httpx.AsyncClient(transport=transport, base_url=public, headers=key) as http:
            made = await http.post("/v1/predictions", json=GOOD)
            one = f"/v1/predictions/{made.json()['id']}"
            canceled = await http.post(f"{one}/cancel")
            counted = await http.post("/v1/replays", json={"handler": "save"})
            replay = f"/v1/replays/{counted.json()['id']}"
            for answer, path in ((made, one), (canceled, one), (counted, replay)):
                assert str(answer.url.join(answer.headers["location"])) == public + path
            described = await http.get("/openapi.json")
            [server] = described.json()["servers"]
            assert str(described.url.join(server["url"])).rstrip("/") == public
            [sent] = network.sent
            assert sent.hook.startswith(f"{public}/webhooks/eachlabs/")
            letter = write(network, sent)
            called = await http.post(sent.hook, content=letter.body, headers=letter.headers)  # type: ignore[arg-type] # bytes and text may mix
            assert called.status_code == 200


# --- secrets ---


async def test_no_secret_is_in_any_answer_or_log_line(
    start: Start, network: Network, logged: Logged
) -> None:
    network.script("fal.submit", reply({"detail": "no"}, 401), breaks(httpx.ReadError))
    network.script("eachlabs.submit", network.by_emulator, breaks(httpx.ConnectError))
    network.script("oxen.submit", network.by_emulator, reply({"error": {"title": "no"}}, 429))
    network.script("oxen.model", breaks(httpx.ConnectTimeout))
    network.script("eachlabs.cancel", breaks(httpx.ReadError))
    answers: list[httpx.Response] = []

    async def keep(answer: httpx.Response) -> None:
        await answer.aread()
        answers.append(answer)

    async with start(refuses, RECEIVER_POLL_AFTER="0.02") as station:
        for client in (station.http, station.world):
            client.event_hooks["response"].append(keep)
        for provider in ("eachlabs", "oxen", "fal"):
            for prompt in ("one", "two", "three"):
                await station.submit(provider, f"{provider} {prompt}")
        sent = network.of("eachlabs one")
        await station.http.post(f"/v1/predictions/{sent.prediction_id}/cancel")
        await station.push(sent)
        await station.push(sent, ok=False)
        await station.world.post(sent.path, content=b"{}", headers={"x-webhook-secret": "wrong"})
        for method, path in ROUTES:
            await station.http.request(method, path)
            await station.world.request(method, path)
        await eventually(lambda: station.rows("SELECT 1 FROM deliveries WHERE state = 'dead'"))
    secrets = [*SECRETS, sent.token, sent.secret, *ENV["RECEIVER_API_KEYS"].split(",")]
    said = "".join(answer.text + repr(answer.headers) for answer in answers)
    for line in logged:
        error = line.get("exc_info")
        said += repr(line)
        if isinstance(error, BaseException):
            said += "".join(traceback.format_exception(error))
    assert len(answers) > 20
    assert not [secret for secret in secrets if secret in said]


def test_settings_do_not_show_their_secrets() -> None:
    shown = repr(Settings.read(ENV))
    assert not [secret for secret in SECRETS if secret in shown]


async def test_oversized_metadata_returns_422(start: Start) -> None:
    async with start() as station:
        body = {"provider": "fal", "model": "fal-ai/x", "input": {}}
        large = {**body, "metadata": {"a": "x" * 262_200}}
        answer = await station.http.post("/v1/predictions", json=large)
        assert (answer.status_code, "metadata" in answer.json()["detail"]) == (422, True)
        small = {**body, "metadata": {"a": "x" * 262_000}}
        assert (await station.http.post("/v1/predictions", json=small)).is_success
