"""The emulated Eachlabs: predictions, limits, callbacks in both shapes, and the delivery log."""

import json
from typing import Any

import pytest

from tests.emulator.conftest import Start
from tests.emulator.serving import KEYS, Emulated, Mailbox, eventually

PATHS = ["/v1/prediction", "/v1/prediction/"]
BODY = {"model": "nano-banana", "input": {"prompt": "x"}}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("headers", [{"authorization": "Bearer k"}, {"x-api-key": "k"}])
def test_create_accepts_both_paths_and_both_key_headers(
    emulated: Emulated, path: str, headers: dict[str, str]
) -> None:
    answer = emulated.http.post("/eachlabs" + path, json=BODY, headers=headers)
    assert answer.status_code == 200
    created = answer.json()
    assert (created.pop("status"), set(created)) == ("success", {"message", "predictionID"})


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": ""}, 422),
        ({"input": None}, 422),
        ({"input": "x"}, 400),
        ({"model": "no-such-model"}, 404),
        ({"input": {"prompt": "[refuse]"}}, 402),
    ],
)
def test_rejected_create_makes_no_prediction(
    emulated: Emulated, change: dict[str, Any], status: int
) -> None:
    answer = emulated.call("eachlabs", "POST", "/v1/prediction", json=BODY | change)
    assert answer.status_code == answer.json()["status"] == status
    assert isinstance(answer.json()["error"], str)
    assert emulated.ledger()["predictions"] == []


def test_old_shape_requires_a_version_and_has_its_own_error_fields(start: Start) -> None:
    emulated = start(shape="old")
    answer = emulated.call("eachlabs", "POST", "/v1/prediction", json=BODY)
    assert (answer.status_code, answer.json()["status"]) == (400, "error")
    assert set(answer.json()) == {"status", "message", "details"}


def test_request_without_a_key_returns_401(emulated: Emulated) -> None:
    assert emulated.http.get("/eachlabs/v1/prediction/x").status_code == 401


def test_in_flight_limit_returns_429_and_records_a_violation(start: Start) -> None:
    emulated = start(eachlabs_in_flight=2)
    first = emulated.submit("eachlabs", "[never]")
    emulated.submit("eachlabs", "[never]")
    refused = emulated.eachlabs("x")
    assert (refused.status_code, refused.json()["error"]) == (429, "too many requests")
    assert [entry["rule"] for entry in emulated.ledger()["violations"]] == ["in_flight"]
    emulated.call("eachlabs", "POST", f"/v1/prediction/{first}/cancel")
    assert emulated.eachlabs("x").status_code == 200


def test_submit_during_a_lockout_extends_the_lockout(start: Start) -> None:
    now = [0.0]
    emulated = start(eachlabs_in_flight=1, eachlabs_shut=60, clock=lambda: now[0])
    one = emulated.submit("eachlabs", "[never]")
    assert emulated.eachlabs().status_code == 429
    emulated.call("eachlabs", "POST", f"/v1/prediction/{one}/cancel")
    for now[0] in (30, 80):
        assert emulated.eachlabs().status_code == 429
    now[0] = 140
    assert emulated.eachlabs().status_code == 200


def test_model_description_is_served_and_unknown_model_returns_404(emulated: Emulated) -> None:
    found = emulated.call("eachlabs", "GET", "/v1/models/nano-banana").json()
    assert (found["slug"], found["cost"]["currency"]) == ("nano-banana", "USD")
    assert emulated.call("eachlabs", "GET", "/v1/models/no-such-model").status_code == 404


def test_rate_limit_returns_429_and_records_a_violation(start: Start) -> None:
    now = [0.0]
    emulated = start(eachlabs_per_minute=3, clock=lambda: now[0])
    codes = [emulated.poll("eachlabs", "x").status_code for _ in range(4)]
    assert codes == [404, 404, 404, 429]
    assert [entry["rule"] for entry in emulated.ledger()["violations"]] == ["per_minute"]
    headers = {"authorization": "", "x-api-key": "key-2"}
    assert emulated.call("eachlabs", "GET", "/v1/prediction/x", headers=headers).status_code == 404
    now[0] = 60
    assert emulated.poll("eachlabs", "x").status_code == 404


def test_new_shape_poll_contains_all_fields(start: Start) -> None:
    emulated = start(generation=60)
    never = emulated.submit("eachlabs", "[never]")
    statuses = [emulated.poll("eachlabs", never).json()["status"] for _ in range(2)]
    assert statuses == ["created", "starting"]
    one = emulated.submit("eachlabs", "[fast]")
    state = emulated.finished("eachlabs", one)
    assert set(state) == {"id", "input", "status", "output", "logs", "metrics", "urls"}
    assert (state["id"], state["status"], state["input"]) == (one, "success", {"prompt": "[fast]"})
    assert emulated.http.get(state["output"]["url"]).status_code == 200
    assert emulated.http.get(state["urls"]["get"], headers=KEYS["eachlabs"]).json()["id"] == one


def test_new_shape_failed_poll_has_an_error_envelope(emulated: Emulated) -> None:
    state = emulated.finished("eachlabs", emulated.submit("eachlabs", "[moderated]"))
    assert state["status"] == "error"
    assert state["output"]["classification"] == {"category": "content_moderation"}
    assert state["output"]["error_message"]


def test_old_shape_poll_contains_few_fields(start: Start) -> None:
    emulated = start(shape="old")
    slow = emulated.submit("eachlabs", "[never]")
    assert set(emulated.poll("eachlabs", slow).json()) == {"status", "predictionID", "message"}
    state = emulated.finished("eachlabs", emulated.submit("eachlabs", "x"))
    assert set(state) == {"status", "predictionID", "output", "metrics"}
    assert state["output"].startswith("http")
    failed = emulated.finished("eachlabs", emulated.submit("eachlabs", "[timeout]"))
    assert (failed["status"], failed["output"]) == ("error", "")


def test_cancel_is_final_and_sends_no_callback(emulated: Emulated, mailbox: Mailbox) -> None:
    one = emulated.submit("eachlabs", "[never]", mailbox.url)
    answer = emulated.call("eachlabs", "POST", f"/v1/prediction/{one}/cancel").json()
    assert (answer["status"], answer["predictionID"]) == ("cancelled", one)
    assert emulated.poll("eachlabs", one).json()["status"] == "cancelled"
    assert emulated.call("eachlabs", "POST", f"/v1/prediction/{one}/cancel").status_code == 409
    later = emulated.submit("eachlabs", "x", mailbox.url)
    assert mailbox.one().json["exec_id"] == later


@pytest.mark.parametrize(("shape", "flow"), [("new", None), ("old", "")])
def test_success_callback_has_the_fields_of_its_shape(
    start: Start, mailbox: Mailbox, shape: str, flow: object
) -> None:
    one = start(shape=shape).submit("eachlabs", "x", mailbox.url)
    mail = mailbox.one()
    body = mail.json
    output = body.pop("output")
    assert body == {"exec_id": one, "flow_id": flow, "status": "succeeded", "error": ""}
    assert isinstance(output, dict if shape == "new" else str)
    assert "x-webhook-secret" not in mail.headers


def test_new_shape_failure_callback_has_the_reason_in_its_output(
    emulated: Emulated, mailbox: Mailbox
) -> None:
    emulated.submit("eachlabs", "[timeout]", mailbox.url)
    body = mailbox.one().json
    assert (body["status"], body["error"]) == ("failed", "")
    assert body["output"] == [{"id": "", "status": "", "output": "", "error": "model timed out"}]


def test_old_shape_failure_callback_has_the_reason_at_the_top_level(
    start: Start, mailbox: Mailbox
) -> None:
    start(shape="old").submit("eachlabs", "[timeout]", mailbox.url)
    body = mailbox.one().json
    assert (body["error"], body["output"], body["flow_id"]) == ("model timed out", "", "")


def test_webhook_secret_is_sent_unchanged(emulated: Emulated, mailbox: Mailbox) -> None:
    emulated.eachlabs("x", webhook_url=mailbox.url, webhook_secret="s3cret=+/")
    assert mailbox.one().headers["x-webhook-secret"] == "s3cret=+/"


def test_callback_is_attempted_three_times(emulated: Emulated, mailbox: Mailbox) -> None:
    mailbox.statuses = [500, 404, 302]
    one = emulated.submit("eachlabs", "x", mailbox.url)
    bodies = {mail.body for mail in mailbox.take(3)}
    assert len(bodies) == 1
    codes = [attempt["status_code"] for attempt in emulated.attempts(one, 3)]
    assert codes == [500, 404, 302]


def test_refused_connection_is_recorded_as_an_attempt(emulated: Emulated) -> None:
    one = emulated.submit("eachlabs", "x", "http://127.0.0.1:1/")
    attempts = emulated.attempts(one, 3)
    assert all("Error" in attempt["error"] for attempt in attempts)


def test_mixed_shapes_vary_the_output_and_id_fields_of_callbacks(
    start: Start, mailbox: Mailbox
) -> None:
    emulated = start(shape="mixed", seed=1, eachlabs_in_flight=None)
    for _ in range(60):
        emulated.submit("eachlabs", "x", mailbox.url)
    bodies = [mail.json for mail in mailbox.take(60)]
    assert {type(body["output"]) for body in bodies} == {str, list, dict}
    assert {"exec_id" in body for body in bodies} == {True, False}


def test_several_pictures_are_a_list_and_text_output_is_a_string(
    emulated: Emulated, mailbox: Mailbox
) -> None:
    several = {"prompt": "x", "num_images": "3"}
    emulated.eachlabs(input=several, webhook_url=mailbox.url)
    assert len(set(mailbox.one().json["output"])) == 3
    emulated.submit("eachlabs", "[text]", mailbox.url)
    assert mailbox.one().json["output"] == "Output URL"


@pytest.mark.parametrize(("prompt", "status"), [("x", "success"), ("[fail]", "failed")])
def test_sync_call_waits_for_the_result(emulated: Emulated, prompt: str, status: str) -> None:
    body = {"model": "m", "input": {"prompt": prompt}}
    answer = emulated.call("eachlabs", "POST", "/v1/prediction/run", json=body).json()
    assert (answer["status"], bool(answer["error"])) == (status, status == "failed")


def test_delivery_log_contains_sent_callbacks(emulated: Emulated, mailbox: Mailbox) -> None:
    mailbox.statuses = [500]
    one = emulated.submit("eachlabs", "x", mailbox.url)
    emulated.submit("eachlabs", "without a callback")
    emulated.attempts(one, 2)
    log = emulated.call("eachlabs", "GET", "/v1/webhooks?limit=5").json()
    assert (log["limit"], log["offset"]) == (5, 0)
    assert [row["execution_id"] for row in log["webhooks"]] == [one]
    assert json.loads(log["webhooks"][0]["request"]) == mailbox.one().json


def test_delivery_log_omits_unfinished_predictions(emulated: Emulated, mailbox: Mailbox) -> None:
    emulated.submit("eachlabs", "[never]", mailbox.url)
    assert emulated.call("eachlabs", "GET", "/v1/webhooks").json()["webhooks"] == []


def test_secret_with_a_line_break_is_never_sent(emulated: Emulated, mailbox: Mailbox) -> None:
    answer = emulated.eachlabs("x", webhook_url=mailbox.url, webhook_secret="a\r\nx-other: b")
    one = answer.json()["predictionID"]
    attempts = eventually(lambda: emulated.row(one)["callback_attempts"], bool)
    assert "Illegal header" in attempts[0]["error"]
