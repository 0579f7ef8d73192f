"""The emulated Oxen: queue, event stream, sync calls and model schemas."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import httpx_sse
import pytest

from tests.emulator.conftest import Start
from tests.emulator.serving import KEYS, Emulated

WEBHOOK_NAMES = ["webhook_url", "webhook", "fal_webhook", "callbackUrl"]


@contextmanager
def listening(emulated: Emulated) -> Iterator[Iterator[httpx_sse.ServerSentEvent]]:
    with httpx_sse.connect_sse(
        emulated.http, "GET", "/oxen/api/events", headers=KEYS["oxen"]
    ) as source:
        assert source.response.status_code == 200
        yield source.iter_sse()


def ids(answer: httpx.Response) -> list[str]:
    return [row["generation_id"] for row in answer.json()["generations"]]


def listed(emulated: Emulated, **query: str) -> list[str]:
    return ids(emulated.call("oxen", "GET", "/api/ai/queue", params=query))


@pytest.mark.parametrize(("shape", "status"), [("new", "queued"), ("old", "processing")])
def test_submit_returns_one_row_for_each_generation(start: Start, shape: str, status: str) -> None:
    emulated = start(shape=shape)
    answer = emulated.oxen(num_generations=3)
    assert {row["status"] for row in answer.json()["generations"]} == {status}
    assert len(set(ids(answer))) == 3
    assert [row["billed"] for row in emulated.ledger()["predictions"]] == [1, 1, 1]
    urls = {emulated.finished("oxen", one)["result_url"] for one in ids(answer)}
    assert len(urls) == 3


@pytest.mark.parametrize(
    ("params", "status", "words"),
    [
        ({"num_generations": 5}, 400, "num_generations must be an integer between 1 and 4"),
        ({"num_generations": "2"}, 400, "num_generations must be an integer between 1 and 4"),
        ({"model": "no-such-model"}, 404, "Model not found: no-such-model"),
        ({"model": "text-only"}, 400, ":unsupported_media_type"),
        ({"model": None}, 404, "Model not found: "),
        ({"prompt": "[refuse]"}, 402, "Insufficient credits"),
    ],
)
def test_invalid_submit_is_rejected_and_not_billed(
    emulated: Emulated, params: dict[str, Any], status: int, words: str
) -> None:
    answer = emulated.oxen(**params)
    error = answer.json()
    assert (answer.status_code, error["error"]["title"]) == (status, words)
    assert (error["status"], error["status_message"]) == ("error", error["error"]["type"])
    assert emulated.ledger()["predictions"] == []
    assert emulated.ledger()["requests"]["oxen"]["rejected"] == 1


def test_malformed_json_submit_returns_404(emulated: Emulated) -> None:
    assert emulated.call("oxen", "POST", "/api/ai/queue", content=b"{").status_code == 404


@pytest.mark.parametrize("given", ["", "Key key-1", "Bearer", "Bearer stranger"])
def test_request_without_a_valid_bearer_key_returns_401(start: Start, given: str) -> None:
    emulated = start(api_keys=frozenset({"key-1"}))
    answer = emulated.http.get("/oxen/api/ai/queue", headers={"authorization": given})
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "unauthenticated")
    assert emulated.oxen().status_code == 200


def test_row_contains_timestamps_result_and_submitted_params(start: Start) -> None:
    emulated = start(generation=10_000)
    (waiting,) = ids(emulated.oxen())
    queued = emulated.poll("oxen", waiting).json()
    assert queued["status"] == "queued"
    assert [queued[name] for name in ("started_at", "completed_at", "result_url")] == [None] * 3
    (one,) = ids(emulated.oxen("[fast]", aspect_ratio="16:9", seed=7))
    row = emulated.finished("oxen", one)
    assert (row["model_name"], row["media_type"], row["error_message"]) == (
        "nano-banana",
        "image",
        None,
    )
    assert (row["aspect_ratio"], row["seed"]) == ("16:9", 7)
    assert row["enqueued_at"] <= row["started_at"] <= row["completed_at"]
    assert emulated.http.get(row["result_url"]).headers["content-type"] == "image/png"
    assert row["result_url"].startswith(emulated.url)


def test_old_shape_row_has_model_instead_of_model_name(start: Start) -> None:
    emulated = start(shape="old")
    row = emulated.finished("oxen", emulated.submit("oxen", "x"))
    assert row["model"] == "nano-banana"
    assert "model_name" not in row


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("[fail]", "failed to"), ("[moderated]", "policy"), ("[timeout]", "timed out"), ("", "empty")],
)
def test_failed_row_has_an_error_message(emulated: Emulated, prompt: str, words: str) -> None:
    row = emulated.finished("oxen", emulated.submit("oxen", prompt))
    assert (row["status"], row["result_url"]) == ("failed", None)
    assert words in row["error_message"]


@pytest.mark.parametrize("name", WEBHOOK_NAMES)
def test_webhook_parameter_makes_the_generation_fail(emulated: Emulated, name: str) -> None:
    (one,) = ids(emulated.oxen(**{name: "https://example.org"}))
    assert emulated.finished("oxen", one)["status"] == "failed"
    (violation,) = emulated.ledger()["violations"]
    assert (violation["rule"], violation["detail"]) == ("webhook_parameter", name)


def test_list_contains_open_rows_unless_filtered(emulated: Emulated) -> None:
    done = emulated.submit("oxen", "x")
    emulated.finished("oxen", done)
    never = emulated.submit("oxen", "[never]")
    emulated.submit("fal", "[never]")
    assert listed(emulated) == [never]
    assert listed(emulated, status="succeeded") == [done]
    assert listed(emulated, model="other") == []
    assert listed(emulated, media_type="video") == []


def test_row_of_another_account_returns_404(emulated: Emulated) -> None:
    one = emulated.submit("oxen", "x")
    headers = {"authorization": "Bearer key-2"}
    answer = emulated.call("oxen", "GET", f"/api/ai/queue/{one}", headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "resource_not_found")


def test_cancelled_row_is_kept_and_sends_no_event(emulated: Emulated) -> None:
    with listening(emulated) as events:
        one = emulated.submit("oxen", "[never]")
        answer = emulated.call("oxen", "DELETE", f"/api/ai/queue/{one}")
        assert answer.json() == {"status": "success", "generation_id": one}
        assert emulated.poll("oxen", one).json()["status"] == "cancelled"
        later = emulated.submit("oxen", "x")
        assert next(events).json()["generation_id"] == later


def test_cancel_of_a_finished_row_changes_nothing(emulated: Emulated) -> None:
    one = emulated.submit("oxen", "x")
    emulated.finished("oxen", one)
    assert emulated.call("oxen", "DELETE", f"/api/ai/queue/{one}").status_code == 200
    assert emulated.poll("oxen", one).json()["status"] == "succeeded"
    assert emulated.call("oxen", "DELETE", "/api/ai/queue/other").status_code == 404


def test_stream_events_distinguish_success_and_failure(emulated: Emulated) -> None:
    with listening(emulated) as events:
        one = emulated.submit("oxen", "x")
        good = next(events)
        bad_id = emulated.submit("oxen", "[fail]")
        bad = next(events)
    assert {good.event, bad.event} == {"media_generation_completed"}
    assert set(good.json()) == {"generation_id", "status", "media_type", "model", "url"}
    assert (good.json()["generation_id"], good.json()["status"]) == (one, "succeeded")
    assert "?expires=" in good.json()["url"]
    assert set(bad.json()) == {"generation_id", "status", "media_type", "error"}
    assert (bad.json()["generation_id"], bad.json()["status"]) == (bad_id, "failed")


def test_event_without_an_open_stream_is_lost(emulated: Emulated) -> None:
    missed = emulated.submit("oxen", "x")
    (attempt,) = emulated.attempts(missed, 1)
    assert attempt["error"] == "no stream is open"
    with listening(emulated) as events:
        seen = emulated.submit("oxen", "x")
        assert next(events).json()["generation_id"] == seen


def test_idle_stream_sends_keep_alive_comments(start: Start) -> None:
    emulated = start(keep_alive=0.01)
    with emulated.http.stream("GET", "/oxen/api/events", headers=KEYS["oxen"]) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert next(answer.iter_text()).startswith(": keep-alive\n\n")


def test_stream_contains_unrelated_events(start: Start) -> None:
    emulated = start(stray_events=1)
    with listening(emulated) as events:
        emulated.submit("oxen", "x")
        names = [next(events).event for _ in range(2)]
    assert names == ["deployment_updated", "media_generation_completed"]


@pytest.mark.parametrize("path", ["generate", "edit"])
def test_sync_call_waits_and_returns_a_url(emulated: Emulated, path: str) -> None:
    body = {"model": "nano-banana", "prompt": "x"}
    answer = emulated.call("oxen", "POST", f"/api/ai/images/{path}", json=body).json()
    assert answer["model"] == "nano-banana"
    assert emulated.http.get(answer["images"][0]["url"]).status_code == 200
    assert [row["status"] for row in emulated.ledger()["predictions"]] == ["succeeded"]


def test_sync_call_can_return_the_picture_as_base64(emulated: Emulated) -> None:
    body = {"model": "nano-banana", "prompt": "x", "response_format": "b64_json"}
    answer = emulated.call("oxen", "POST", "/api/ai/images/generate", json=body).json()
    assert base64.b64decode(answer["images"][0]["b64_json"]).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("prompt", "status", "words"), [("", 400, "Prompt cannot be empty"), ("[fail]", 500, "failed")]
)
def test_sync_call_error_has_a_message(
    emulated: Emulated, prompt: str, status: int, words: str
) -> None:
    body = {"model": "nano-banana", "prompt": prompt}
    answer = emulated.call("oxen", "POST", "/api/ai/images/generate", json=body)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_video_model_has_its_own_path_and_response_field(emulated: Emulated) -> None:
    path, body = "/api/ai/videos/generate", {"model": "veo-3-1", "prompt": "x"}
    answer = emulated.call("oxen", "POST", path, json=body).json()
    film = emulated.http.get(answer["videos"][0]["url"])
    assert (film.content[4:8], film.headers["content-type"]) == (b"ftyp", "video/mp4")
    for unfit in ({}, {"prompt": "x", "multi_prompt": ["x"]}):
        refused = emulated.call("oxen", "POST", path, json={"model": "veo-3-1", **unfit})
        assert refused.status_code == 422
    model = emulated.call("oxen", "GET", "/api/ai/models/veo-3-1").json()
    assert model["endpoint"] == "/videos/generate"
    body = {"model": "veo-3-1", "prompt": "x"}
    emulated.call("oxen", "POST", "/api/ai/images/generate", json=body)
    assert [each["rule"] for each in emulated.ledger()["violations"]] == ["video_as_image"]


@pytest.mark.parametrize(
    ("shape", "name"), [("new", "request_schema"), ("old", "json_request_schema")]
)
def test_model_response_contains_its_schema(start: Start, shape: str, name: str) -> None:
    emulated = start(shape=shape)
    one = emulated.call("oxen", "GET", "/api/ai/models/nano-banana").json()
    assert "prompt" in one[name]["properties"]
    assert emulated.call("oxen", "GET", "/api/ai/models/no-such-model").status_code == 404
