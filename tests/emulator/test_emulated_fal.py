"""The emulated fal.ai: queue, direct calls, platform API and signed callbacks."""

import base64
import json
import time
from ipaddress import ip_network
from typing import Any

import httpx
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from receiver.emulator.fal import app_of
from receiver.emulator.keys import signed_text
from receiver.providers.fal import read_meta
from tests.emulator.conftest import Start
from tests.emulator.serving import KEYS, Emulated, Mail, Mailbox, eventually

VECTOR_BODY = (
    b'{"error": null, "gateway_request_id": "req-0001", "payload": {"images": '
    b'[{"url": "https://cdn.example/a.png"}], "description": "ok"}, '
    b'"request_id": "req-0001", "status": "OK"}'
)
VECTOR_SIGNATURE = (
    "340f963d239c3631e4c17624f446ff32ded4d4f6f877866874da5e85f5460e85"
    "80c55cd54b97bf99547542e50b47f75e8053a81b99e521bd0d51ff4bf1d7b009"
)


def published(emulated: Emulated) -> list[str]:
    answer = emulated.http.get("/fal/.well-known/jwks.json").json()
    return [key["x"] for key in answer["keys"]]


def verified(mail: Mail, keys: list[str]) -> list[bool]:
    """Return for each published key whether it made the signature."""
    header = {name: mail.headers[f"x-fal-webhook-{name}"] for name in ("request-id", "user-id")}
    at = int(mail.headers["x-fal-webhook-timestamp"])
    text = signed_text(header["request-id"], header["user-id"], at, mail.body)
    signature = bytes.fromhex(mail.headers["x-fal-webhook-signature"])
    return [_matches(key, signature, text) for key in keys]


def _matches(key: str, signature: bytes, text: bytes) -> bool:
    raw = base64.urlsafe_b64decode(key.rstrip("=") + "=")
    try:
        Ed25519PublicKey.from_public_bytes(raw).verify(signature, text)
    except InvalidSignature:
        return False
    return True


def get(emulated: Emulated, url: str) -> httpx.Response:
    return emulated.http.get(url, headers=KEYS["fal"])


def test_finished_requests_are_listed_in_pages_by_cursor(emulated: Emulated) -> None:
    emulated.submit("fal", "[never]")
    made = [emulated.submit("fal", "[fast]") for _ in range(3)]
    for one in made:
        emulated.finished("fal", one)
    path = "/v1/models/requests/by-endpoint?endpoint_id=fal-ai/nano-banana&limit=2"
    first = emulated.call("fal", "GET", path).json()
    second = emulated.call("fal", "GET", f"{path}&cursor={first['next_cursor']}").json()
    listed = [*first["items"], *second["items"]]
    assert {item["request_id"] for item in listed} == set(made)
    assert (first["has_more"], second["next_cursor"]) == (True, None)
    assert listed[0]["json_input"] == {"prompt": "[fast]"}
    refused = emulated.http.get("/fal" + path)
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authorization_error")
    later = emulated.call("fal", "GET", path + "&start=2100-01-01T00:00:00Z").json()
    assert later["items"] == []


def test_model_schema_is_served_without_a_key(emulated: Emulated) -> None:
    [model] = emulated.http.get("/fal/v1/models?endpoint_id=fal-ai/flux/dev").json()["models"]
    assert (model["endpoint_id"], model["openapi"]["openapi"]) == ("fal-ai/flux/dev", "3.0.4")
    refused = emulated.http.get("/fal/v1/models?endpoint_id=fal-ai/no-such-model")
    assert (refused.status_code, refused.json()["error"]["type"]) == (404, "not_found")


def test_meta_lists_the_ip_ranges_of_callbacks(emulated: Emulated) -> None:
    answer = emulated.http.get("/fal/v1/meta").json()
    assert read_meta(json.dumps(answer).encode()) == [ip_network("127.0.0.0/8"), ip_network("::1")]


def test_signature_matches_the_known_vector() -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    text = signed_text("req-0001", "user-42", 1767225600, VECTOR_BODY)
    assert key.sign(text).hex() == VECTOR_SIGNATURE


@pytest.mark.parametrize(
    ("model", "app"),
    [
        ("fal-ai/flux/dev/image", "fal-ai/flux"),
        ("workflows/me/flow/x", "workflows/me/flow"),
        ("comfy/me/graph", "comfy/me/graph"),
        ("12345-my-app", "12345/my-app"),
        ("alone", ""),
        ("workflows/me", ""),
    ],
)
def test_app_name_is_read_from_the_model_path(model: str, app: str) -> None:
    assert app_of(model) == app


@pytest.mark.parametrize("app", ["fal-ai/flux/dev", "workflows/me/flow/x"])
def test_submit_returns_urls_without_the_model_subpath(emulated: Emulated, app: str) -> None:
    handle = emulated.fal("x", app=app).json()
    base = f"{emulated.url}/fal/queue/{app.rpartition('/')[0]}/requests/{handle['request_id']}"
    assert handle["status"] == "IN_QUEUE"
    assert handle["gateway_request_id"] == handle["request_id"]
    assert handle["response_url"] == base
    assert (handle["status_url"], handle["cancel_url"]) == (base + "/status", base + "/cancel")
    assert get(emulated, handle["status_url"]).status_code in {200, 202}


def test_old_shape_response_url_ends_with_response(start: Start) -> None:
    handle = start(shape="old").fal().json()
    assert handle["response_url"].endswith("/response")


def test_returned_urls_have_the_host_of_the_request(emulated: Emulated) -> None:
    headers = {"host": "fal.test:81"}
    answer = emulated.call("fal", "POST", "/queue/a/b", json={"prompt": "x"}, headers=headers)
    assert answer.json()["status_url"].startswith("http://fal.test:81/fal/queue/a/b/requests/")


def test_unfinished_request_returns_202_for_status_and_400_for_result(start: Start) -> None:
    emulated = start(generation=10_000)
    handle = emulated.fal().json()
    first = get(emulated, handle["status_url"])
    assert (first.status_code, first.json()["status"]) == (202, "IN_QUEUE")
    assert first.json()["queue_position"] == 0
    early = get(emulated, handle["response_url"])
    assert (early.status_code, early.json()["detail"]) == (400, "Request is still in progress")
    done = emulated.finished("fal", emulated.submit("fal", "[fast]"))
    assert done["logs"] is None
    assert set(done["metrics"]) == {"inference_time"}
    assert "error" not in done


def test_status_contains_logs_if_requested(emulated: Emulated) -> None:
    handle = emulated.fal().json()
    emulated.finished("fal", handle["request_id"])
    for wish in ("1", "true"):
        logs = get(emulated, handle["status_url"] + f"?logs={wish}").json()["logs"]
        assert set(logs[0]) == {"message", "level", "source", "timestamp"}


def test_result_is_served_under_both_paths(emulated: Emulated) -> None:
    handle = emulated.fal().json()
    emulated.finished("fal", handle["request_id"])
    result = get(emulated, handle["response_url"])
    assert get(emulated, handle["response_url"] + "/response").json() == result.json()
    assert result.headers["x-fal-request-id"] == handle["request_id"]
    (image,) = result.json()["images"]
    assert emulated.http.get(image["url"]).headers["content-type"] == image["content_type"]


@pytest.mark.parametrize(
    ("prompt", "code", "kind"),
    [
        ("[fail]", 500, "downstream_service_error"),
        ("[moderated]", 422, "content_policy_violation"),
        ("[timeout]", 504, "generation_timeout"),
        ("", 422, "value_error.missing"),
    ],
)
def test_failed_request_has_status_completed_and_an_error_type(
    emulated: Emulated, prompt: str, code: int, kind: str
) -> None:
    handle = emulated.fal(prompt).json()
    status = emulated.finished("fal", handle["request_id"])
    assert (status["status"], status["error_type"]) == ("COMPLETED", kind)
    assert status["error"] == f"Invalid status code: {code}"
    result = get(emulated, handle["response_url"])
    assert (result.status_code, result.json()["detail"][0]["type"]) == (code, kind)
    assert result.headers["x-fal-needs-retry"] == "0"


def test_cancel_ends_an_open_request_and_a_second_cancel_returns_400(emulated: Emulated) -> None:
    handle = emulated.fal("[never]").json()
    answers = [emulated.http.put(handle["cancel_url"], headers=KEYS["fal"]) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 400]
    words = [answer.json()["status"] for answer in answers]
    assert words == ["CANCELLATION_REQUESTED", "ALREADY_COMPLETED"]
    status = get(emulated, handle["status_url"]).json()
    assert (status["status"], status["error_type"]) == ("COMPLETED", "client_cancelled")
    result = get(emulated, handle["response_url"])
    assert result.status_code == 499
    assert isinstance(result.json()["detail"], str)


def test_old_shape_cancel_returns_a_boolean(start: Start) -> None:
    emulated = start(shape="old")
    handle = emulated.fal("[never]").json()
    answers = [emulated.http.put(handle["cancel_url"], headers=KEYS["fal"]) for _ in range(2)]
    assert [answer.json() for answer in answers] == [{"success": True}, {"success": False}]


def test_request_id_of_another_app_returns_404(emulated: Emulated) -> None:
    handle = emulated.fal().json()
    other = handle["status_url"].replace("nano-banana", "other")
    answer = get(emulated, other)
    assert (answer.status_code, answer.json()) == (404, {"status": "NOT_FOUND"})


@pytest.mark.parametrize("given", ["", "Bearer key-1", "Key"])
def test_authorization_without_the_key_scheme_returns_401(emulated: Emulated, given: str) -> None:
    headers = {"authorization": given}
    answer = emulated.call("fal", "POST", "/queue/a/b", json={}, headers=headers)
    assert answer.status_code == 401
    rules = [entry["rule"] for entry in emulated.ledger()["violations"]]
    assert rules == (["bearer"] if given.startswith("Bearer") else [])


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/queue/alone", {}, 404),
        ("/queue/fal-ai/no-such-model", {}, 404),
        ("/queue/a/b", [], 400),
        ("/queue/a/b?fal_webhook=ftp://x", {}, 400),
        ("/queue/a/b", {"prompt": "[refuse]"}, 403),
        ("/run/a/b", {"prompt": "[refuse]"}, 403),
    ],
)
def test_rejected_submit_is_not_billed(emulated: Emulated, path: str, body: Any, code: int) -> None:
    answer = emulated.call("fal", "POST", path, json=body)
    assert answer.status_code == code
    assert answer.headers["x-fal-error-type"] == answer.json()["error_type"]
    assert emulated.ledger()["predictions"] == []


def test_request_cancelled_while_running_sends_no_callback(
    emulated: Emulated, mailbox: Mailbox
) -> None:
    handle = emulated.fal("[never]", webhook=mailbox.url).json()
    eventually(
        lambda: get(emulated, handle["status_url"]).json(),
        lambda state: state["status"] == "IN_PROGRESS",
    )
    emulated.http.put(handle["cancel_url"], headers=KEYS["fal"])
    later = emulated.submit("fal", "x", mailbox.url)
    assert mailbox.one().json["request_id"] == later
    assert emulated.row(handle["request_id"])["status"] == "cancelled"


def test_direct_call_waits_for_the_result(emulated: Emulated) -> None:
    answer = emulated.call("fal", "POST", "/run/fal-ai/nano-banana", json={"prompt": "x"})
    assert answer.json()["images"]
    (row,) = emulated.ledger()["predictions"]
    assert answer.headers["x-fal-request-id"] == row["id"]
    failed = emulated.call("fal", "POST", "/run/a/b", json={"prompt": "[moderated]"})
    assert failed.status_code == 422


def test_sync_mode_returns_data_uris_and_text_output_has_no_images(emulated: Emulated) -> None:
    body = {"prompt": "x", "sync_mode": True, "num_images": 2}
    images = emulated.call("fal", "POST", "/run/a/b", json=body).json()["images"]
    assert [image["url"][:15] for image in images] == ["data:image/png;"] * 2
    words = emulated.call("fal", "POST", "/run/a/b", json={"prompt": "[text]"}).json()
    assert (words["images"], bool(words["description"])) == ([], True)


@pytest.mark.parametrize("shape", ["new", "old"])
def test_success_callback_is_signed_over_its_body(
    start: Start, mailbox: Mailbox, shape: str
) -> None:
    emulated = start(shape=shape)
    began = int(time.time())
    one = emulated.submit("fal", "x", mailbox.url)
    mail = mailbox.one()
    assert mail.body == json.dumps(mail.json, sort_keys=True).encode()
    assert (mail.json["request_id"], mail.json["gateway_request_id"]) == (one, one)
    assert (mail.json["status"], "error" in mail.json) == ("OK", shape == "new")
    assert mail.json["payload"]["images"]
    assert mail.headers["x-fal-webhook-request-id"] == one
    assert began <= int(mail.headers["x-fal-webhook-timestamp"]) <= time.time()
    keys = published(emulated)
    assert len(keys) == 3
    assert all(key.endswith("=") == (shape == "old") for key in keys)
    assert verified(mail, keys) == [False, False, True]


def test_failure_callback_contains_the_error_detail(emulated: Emulated, mailbox: Mailbox) -> None:
    emulated.submit("fal", "[moderated]", mailbox.url)
    body = mailbox.one().json
    assert (body["status"], body["error"]) == ("ERROR", "Invalid status code: 422")
    assert body["payload"]["detail"][0]["type"] == "content_policy_violation"


def test_mixed_shapes_vary_gateway_ids_and_error_fields(start: Start, mailbox: Mailbox) -> None:
    emulated = start(shape="mixed", seed=1)
    for _ in range(40):
        emulated.submit("fal", "x", mailbox.url)
    bodies = [mail.json for mail in mailbox.take(40)]
    assert {body["request_id"] == body["gateway_request_id"] for body in bodies} == {True, False}
    assert {"error" in body for body in bodies} == {True, False}


def test_rejected_callback_is_retried_and_every_attempt_is_signed(
    emulated: Emulated, mailbox: Mailbox
) -> None:
    mailbox.statuses = [503, 500, 404, 429, 200]
    one = emulated.submit("fal", "x", mailbox.url)
    mails = mailbox.take(5)
    assert len({mail.body for mail in mails}) == 1
    keys = published(emulated)
    assert all(verified(mail, keys)[-1] for mail in mails)
    codes = [attempt["status_code"] for attempt in emulated.attempts(one, 5)]
    assert codes == [503, 500, 404, 429, 200]
