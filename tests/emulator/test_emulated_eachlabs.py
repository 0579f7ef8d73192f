import json
from typing import Any

import pytest

from tests.emulator.conftest import Start
from tests.emulator.serving import KEYS, Emulated, Mailbox, eventually

PATHS = ["/v1/prediction", "/v1/prediction/"]
BODY = {"model": "nano-banana", "input": {"prompt": "x"}}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("headers", [{"authorization": "Bearer k"}, {"x-api-key": "k"}])
def test_both_paths_and_both_headers_create_at_once(
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
def test_a_refused_create_makes_no_prediction(
    emulated: Emulated, change: dict[str, Any], status: int
) -> None:
    answer = emulated.call("eachlabs", "POST", "/v1/prediction", json=BODY | change)
    assert answer.status_code == answer.json()["status"] == status
    assert isinstance(answer.json()["error"], str)
    assert emulated.ledger()["predictions"] == []


def test_the_seed_wants_a_version_and_words_errors_otherwise(start: Start) -> None:
    emulated = start(shape="old")
    answer = emulated.call("eachlabs", "POST", "/v1/prediction", json=BODY)
    assert (answer.status_code, answer.json()["status"]) == (400, "error")
    assert set(answer.json()) == {"status", "message", "details"}


def test_strangers_are_turned_away(emulated: Emulated) -> None:
    assert emulated.http.get("/eachlabs/v1/prediction/x").status_code == 401


def test_more_than_the_allowed_in_flight_is_refused_and_noted(start: Start) -> None:
    emulated = start(eachlabs_in_flight=2)
    first = emulated.submit("eachlabs", "[never]")
    emulated.submit("eachlabs", "[never]")
    refused = emulated.eachlabs("x")
    assert (refused.status_code, refused.json()["error"]) == (429, "too many requests")
    assert [entry["rule"] for entry in emulated.ledger()["violations"]] == ["in_flight"]
    emulated.call("eachlabs", "POST", f"/v1/prediction/{first}/cancel")
    assert emulated.eachlabs("x").status_code == 200


def test_who_asks_a_full_account_again_is_shut_out_for_longer(start: Start) -> None:
    now = [0.0]
    emulated = start(eachlabs_in_flight=1, eachlabs_shut=60, clock=lambda: now[0])
    one = emulated.submit("eachlabs", "[never]")
    assert emulated.eachlabs().status_code == 429
    emulated.call("eachlabs", "POST", f"/v1/prediction/{one}/cancel")
    for now[0] in (30, 80):
        assert emulated.eachlabs().status_code == 429
    now[0] = 140
    assert emulated.eachlabs().status_code == 200


def test_a_model_is_described(emulated: Emulated) -> None:
    found = emulated.call("eachlabs", "GET", "/v1/models/nano-banana").json()
    assert (found["slug"], found["cost"]["currency"]) == ("nano-banana", "USD")
    assert emulated.call("eachlabs", "GET", "/v1/models/no-such-model").status_code == 404


def test_more_than_the_allowed_requests_are_refused_and_noted(start: Start) -> None:
    now = [0.0]
    emulated = start(eachlabs_per_minute=3, clock=lambda: now[0])
    codes = [emulated.poll("eachlabs", "x").status_code for _ in range(4)]
    assert codes == [404, 404, 404, 429]
    assert [entry["rule"] for entry in emulated.ledger()["violations"]] == ["per_minute"]
    headers = {"authorization": "", "x-api-key": "key-2"}
    assert emulated.call("eachlabs", "GET", "/v1/prediction/x", headers=headers).status_code == 404
    now[0] = 60
    assert emulated.poll("eachlabs", "x").status_code == 404


def test_a_new_poll_has_everything(start: Start) -> None:
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


def test_a_new_failed_poll_has_an_envelope(emulated: Emulated) -> None:
    state = emulated.finished("eachlabs", emulated.submit("eachlabs", "[moderated]"))
    assert state["status"] == "error"
    assert state["output"]["classification"] == {"category": "content_moderation"}
    assert state["output"]["error_message"]


def test_a_seed_poll_is_short(start: Start) -> None:
    emulated = start(shape="old")
    slow = emulated.submit("eachlabs", "[never]")
    assert set(emulated.poll("eachlabs", slow).json()) == {"status", "predictionID", "message"}
    state = emulated.finished("eachlabs", emulated.submit("eachlabs", "x"))
    assert set(state) == {"status", "predictionID", "output", "metrics"}
    assert state["output"].startswith("http")
    failed = emulated.finished("eachlabs", emulated.submit("eachlabs", "[timeout]"))
    assert (failed["status"], failed["output"]) == ("error", "")


def test_cancel_is_silent_and_final(emulated: Emulated, mailbox: Mailbox) -> None:
    one = emulated.submit("eachlabs", "[never]", mailbox.url)
    answer = emulated.call("eachlabs", "POST", f"/v1/prediction/{one}/cancel").json()
    assert (answer["status"], answer["predictionID"]) == ("cancelled", one)
    assert emulated.poll("eachlabs", one).json()["status"] == "cancelled"
    assert emulated.call("eachlabs", "POST", f"/v1/prediction/{one}/cancel").status_code == 409
    later = emulated.submit("eachlabs", "x", mailbox.url)
    assert mailbox.one().json["exec_id"] == later


@pytest.mark.parametrize(("shape", "flow"), [("new", None), ("old", "")])
def test_a_callback_of_success(start: Start, mailbox: Mailbox, shape: str, flow: object) -> None:
    one = start(shape=shape).submit("eachlabs", "x", mailbox.url)
    mail = mailbox.one()
    body = mail.json
    output = body.pop("output")
    assert body == {"exec_id": one, "flow_id": flow, "status": "succeeded", "error": ""}
    assert isinstance(output, dict if shape == "new" else str)
    assert "x-webhook-secret" not in mail.headers


def test_a_callback_of_failure_hides_its_reason_in_the_output(
    emulated: Emulated, mailbox: Mailbox
) -> None:
    emulated.submit("eachlabs", "[timeout]", mailbox.url)
    body = mailbox.one().json
    assert (body["status"], body["error"]) == ("failed", "")
    assert body["output"] == [{"id": "", "status": "", "output": "", "error": "model timed out"}]


def test_a_seed_callback_of_failure_says_it_at_the_top(start: Start, mailbox: Mailbox) -> None:
    start(shape="old").submit("eachlabs", "[timeout]", mailbox.url)
    body = mailbox.one().json
    assert (body["error"], body["output"], body["flow_id"]) == ("model timed out", "", "")


def test_the_secret_travels_as_it_is(emulated: Emulated, mailbox: Mailbox) -> None:
    emulated.eachlabs("x", webhook_url=mailbox.url, webhook_secret="s3cret=+/")
    assert mailbox.one().headers["x-webhook-secret"] == "s3cret=+/"


def test_three_attempts_then_silence(emulated: Emulated, mailbox: Mailbox) -> None:
    mailbox.statuses = [500, 404, 302]
    one = emulated.submit("eachlabs", "x", mailbox.url)
    bodies = {mail.body for mail in mailbox.take(3)}
    assert len(bodies) == 1
    codes = [attempt["status_code"] for attempt in emulated.attempts(one, 3)]
    assert codes == [500, 404, 302]


def test_an_accepted_callback_is_not_repeated(emulated: Emulated, mailbox: Mailbox) -> None:
    mailbox.statuses = [503, 204]
    one = emulated.submit("eachlabs", "x", mailbox.url)
    mailbox.take(2)
    assert [one["status_code"] for one in emulated.attempts(one, 2)] == [503, 204]


def test_nobody_there_is_an_attempt_too(emulated: Emulated) -> None:
    one = emulated.submit("eachlabs", "x", "http://127.0.0.1:1/")
    attempts = emulated.attempts(one, 3)
    assert all("Error" in attempt["error"] for attempt in attempts)


def test_mixed_shapes_show_every_form(start: Start, mailbox: Mailbox) -> None:
    emulated = start(shape="mixed", seed=1, eachlabs_in_flight=None)
    for _ in range(60):
        emulated.submit("eachlabs", "x", mailbox.url)
    bodies = [mail.json for mail in mailbox.take(60)]
    assert {type(body["output"]) for body in bodies} == {str, list, dict}
    assert {"exec_id" in body for body in bodies} == {True, False}


def test_several_pictures_are_a_list_and_words_are_words(
    emulated: Emulated, mailbox: Mailbox
) -> None:
    several = {"prompt": "x", "num_images": "3"}
    emulated.eachlabs(input=several, webhook_url=mailbox.url)
    assert len(set(mailbox.one().json["output"])) == 3
    emulated.submit("eachlabs", "[text]", mailbox.url)
    assert mailbox.one().json["output"] == "Output URL"


@pytest.mark.parametrize(("prompt", "status"), [("x", "success"), ("[fail]", "failed")])
def test_the_sync_call_waits(emulated: Emulated, prompt: str, status: str) -> None:
    body = {"model": "m", "input": {"prompt": prompt}}
    answer = emulated.call("eachlabs", "POST", "/v1/prediction/run", json=body).json()
    assert (answer["status"], bool(answer["error"])) == (status, status == "failed")


def test_the_delivery_log_remembers(emulated: Emulated, mailbox: Mailbox) -> None:
    mailbox.statuses = [500]
    one = emulated.submit("eachlabs", "x", mailbox.url)
    emulated.submit("eachlabs", "without a callback")
    emulated.attempts(one, 2)
    log = emulated.call("eachlabs", "GET", "/v1/webhooks?limit=5").json()
    assert (log["limit"], log["offset"]) == (5, 0)
    assert [row["execution_id"] for row in log["webhooks"]] == [one]
    assert json.loads(log["webhooks"][0]["request"]) == mailbox.one().json


def test_the_delivery_log_lists_nothing_before_its_time(
    emulated: Emulated, mailbox: Mailbox
) -> None:
    emulated.submit("eachlabs", "[never]", mailbox.url)
    assert emulated.call("eachlabs", "GET", "/v1/webhooks").json()["webhooks"] == []


def test_a_secret_with_a_line_break_reaches_nobody(emulated: Emulated, mailbox: Mailbox) -> None:
    answer = emulated.eachlabs("x", webhook_url=mailbox.url, webhook_secret="a\r\nx-other: b")
    one = answer.json()["predictionID"]
    attempts = eventually(lambda: emulated.row(one)["callback_attempts"], bool)
    assert "Illegal header" in attempts[0]["error"]
