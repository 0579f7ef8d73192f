"""`forward` sends events that the libraries of Standard Webhooks and CloudEvents can read."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, Final, Literal

import jsonschema_rs
import msgspec
import pytest
from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.bindings import http as cloudevents
from standardwebhooks import Webhook, WebhookVerificationError

from receiver.testing import Kit, make_event
from tests.handlers.parts import OK, Asked, Server, built_in, serving, waits
from tests.openapi import made

SECRET: Final = "whsec_" + base64.b64encode(b"a secret of some thirty-two bytes").decode()
OTHER: Final = "whsec_" + base64.b64encode(b"its successor is as long as it is").decode()
DOCUMENT: Final = msgspec.to_builtins(made())
A: Final = "https://cdn.example/a.png"

Forward = Callable[..., Kit]
Ends = Literal["succeeded", "failed", "canceled"]


@pytest.fixture
def forward(receiver_kit: Callable[..., Kit], monkeypatch: pytest.MonkeyPatch) -> Forward:
    """Return a function that runs the handler; settings are named without FORWARD_."""

    def start(url: str, attempts: int = 10, base: str = "2", **settings: str) -> Kit:
        for name, value in {"URL": url, "SECRET": SECRET, **settings}.items():
            monkeypatch.setenv(f"FORWARD_{name}", value)
        policy = {"RECEIVER_RETRY_ATTEMPTS": str(attempts), "RECEIVER_RETRY_BASE": base}
        return receiver_kit(built_in("forward"), online=True, settings=policy)

    return start


def verify(asked: Asked, secret: str = SECRET) -> Any:
    """Check a signature with the official library, and return the message."""
    return Webhook(secret).verify(asked.body, asked.headers)


def test_event_is_sent_once_with_a_standard_webhooks_signature(forward: Forward) -> None:
    with serving(OK) as server:
        delivered = forward(server.url).deliver(make_event(output=[A]), times=2)
    assert delivered.delivery.state == "done"
    [asked] = server.asked
    assert (asked.method, asked.path) == ("POST", "/hook")
    assert asked.headers["content-type"] == "application/json"
    message = verify(asked)
    assert message["type"] == "prediction.succeeded"
    assert message["data"]["event_id"] == delivered.delivery.event_id
    assert message["data"]["channel"] == "webhook"
    assert message["data"]["prediction"]["id"] == delivered.prediction_id
    assert message["data"]["prediction"]["output"] == [{"url": A}]
    assert datetime.fromisoformat(message["timestamp"]).tzinfo is not None
    assert b"gateway_request_id" not in asked.body  # the provider's own payload may be large
    with pytest.raises(WebhookVerificationError):
        verify(asked, OTHER)
    with pytest.raises(WebhookVerificationError):
        verify(Asked(asked.method, asked.path, asked.headers, asked.body + b" "))


def test_webhook_id_is_the_same_for_retries_and_new_for_a_replay(
    forward: Forward,
) -> None:
    with serving((500, {}, b"oh"), (302, {"location": "/elsewhere"}, b""), OK) as server:
        kit = forward(server.url)
        delivered = kit.deliver(make_event())
        kit.exhaust(delivered)
        reasons = [attempt["reason"] for attempt in delivered.delivery.history]
        assert reasons == ["HTTP 500: oh", "HTTP 302", ""]
        kit.replay(delivered)
    ids = [asked.headers["webhook-id"] for asked in server.asked]
    key = delivered.delivery.id
    assert ids == [key] * 3 + [f"{key}.1"]
    for asked in server.asked:
        verify(asked)


def test_crash_after_the_handler_ran_sends_the_same_id_again(forward: Forward) -> None:
    with serving(OK) as server:
        delivered = forward(server.url).crash_after_run(make_event())
    assert [asked.headers["webhook-id"] for asked in server.asked] == [delivered.delivery.id] * 2


def test_event_is_signed_with_every_secret_during_rotation(forward: Forward) -> None:
    with serving(OK) as server:
        forward(server.url, SECRET=f"{SECRET}  {OTHER}").deliver(make_event())
    for secret in (SECRET, OTHER):
        verify(server.asked[0], secret)


@pytest.mark.parametrize("mode", ["standard", "cloudevents", "cloudevents-binary"])
@pytest.mark.parametrize("ends", ["succeeded", "failed", "canceled"])
def test_requests_match_the_openapi_document(forward: Forward, mode: str, ends: Ends) -> None:
    with serving(OK) as server:
        forward(server.url, FORMAT=mode).deliver(make_event(ends))
    [asked] = server.asked
    said = DOCUMENT["webhooks"][f"prediction.{ends}"]["post"]
    names = {name for name in asked.headers if name.startswith(("webhook-", "ce-"))}
    given = {one["name"]: one for one in said["parameters"]}
    assert names <= given.keys()
    assert {name for name, one in given.items() if one["required"]} <= names
    for name in names:
        validate(given[name]["schema"], asked.headers[name])
    # The fields identify the form: no two forms have the same fields.
    form = said["requestBody"]["content"][asked.headers["content-type"]]["schema"]
    forms = form.get("anyOf", [form])
    body = json.loads(asked.body)
    [fitting] = [one for one in forms if body.keys() == fields(one)]
    validate(fitting, body)
    data = body.get("data", body)
    assert data.keys() == fields({"$ref": "#/components/schemas/EventData"})
    assert data["prediction"]["status"] == ends


def validate(schema: dict[str, Any], value: Any) -> None:
    whole = {**schema, "components": DOCUMENT["components"]}
    jsonschema_rs.Draft202012Validator(whole, validate_formats=True).validate(value)


def fields(schema: dict[str, str]) -> set[str]:
    """Return the fields of a schema in the document; all of them are required."""
    found = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    assert set(found["required"]) == set(found["properties"])
    return set(found["properties"])


# --- CloudEvents ---


def read(server: Server) -> BaseCloudEvent:
    """Read the only request, of any mode, with the CloudEvents SDK."""
    [asked] = server.asked
    return cloudevents.from_http_event(cloudevents.HTTPMessage(asked.headers, asked.body))


@pytest.mark.parametrize("mode", ["cloudevents", "cloudevents-binary"])
@pytest.mark.parametrize("secret", [SECRET, ""])
def test_cloudevents_sdk_reads_the_events(forward: Forward, mode: str, secret: str) -> None:
    source = "https://receiver.example/Käufer ü%22"
    with serving(OK) as server:
        kit = forward(server.url, FORMAT=mode, SOURCE=source, SECRET=secret)
        delivered = kit.deliver(make_event(output=[A], metadata={"name": "Zoë"}))
    event = read(server)
    assert event.get_specversion() == "1.0"
    assert event.get_id() == delivered.delivery.id
    assert event.get_type() == "prediction.succeeded"
    assert event.get_source() == source
    assert event.get_subject() == delivered.prediction_id
    assert event.get_time() is not None
    assert event.get_datacontenttype() == "application/json"
    data: Any = event.get_data()
    assert data["prediction"]["output"] == [{"url": A}]
    assert data["prediction"]["metadata"] == {"name": "Zoë"}
    if secret:
        verify(server.asked[0])
    else:
        assert "webhook-signature" not in server.asked[0].headers


def test_structured_and_binary_mode_differ_in_where_attributes_are(forward: Forward) -> None:
    with serving(OK) as server:
        for mode in ("cloudevents", "cloudevents-binary"):
            forward(server.url, FORMAT=mode).deliver(make_event())
    structured, binary = server.asked
    assert structured.headers["content-type"] == "application/cloudevents+json"
    assert not [name for name in structured.headers if name.startswith("ce-")]
    assert binary.headers["content-type"] == "application/json"
    assert binary.headers["ce-source"] == "urn:prediction-receiver"
    assert b"specversion" not in binary.body


# --- answers ---


def test_410_ends_dead_without_a_retry(forward: Forward) -> None:
    with serving((410, {}, b"")) as server:
        delivered = forward(server.url).deliver(make_event())
    assert (delivered.delivery.state, delivered.delivery.reason) == ("dead", "HTTP 410")
    assert len(server.asked) == 1


def in_two_hours() -> str:
    return format_datetime(datetime.now(UTC) + timedelta(hours=2), usegmt=True)


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("after", ["7200", in_two_hours])
def test_retry_waits_for_the_retry_after_header(
    forward: Forward, status: int, after: str | Callable[[], str]
) -> None:
    header = after if isinstance(after, str) else after()
    with serving((status, {"retry-after": header}, b""), OK) as server:
        kit = forward(server.url)
        delivered = kit.deliver(make_event())
        assert 7100 < waits(delivered) <= 7201
        kit.move(7000)
        assert delivered.delivery.state == "pending"
        kit.move(202)
        assert (delivered.delivery.state, len(server.asked)) == ("done", 2)


@pytest.mark.parametrize(
    "header",
    ["", "soon", "-5", "nan", "inf", "0", "Thu, 99 Foo 2020", "Thu, 01 Jan 2026 00:00:00 GMT"],
)
def test_invalid_retry_after_falls_back_to_the_backoff_of_the_policy(
    forward: Forward, header: str
) -> None:
    """The base of 1e-9 seconds makes the policy's retries due at once."""
    with serving((503, {"retry-after": header}, b"")) as server:
        delivered = forward(server.url, attempts=3, base="1e-9").deliver(make_event())
    assert (delivered.delivery.state, delivered.delivery.attempts) == ("dead", 3)
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [301, 400, 404, 500])
def test_301_400_404_and_500_are_retried(forward: Forward, status: int) -> None:
    with serving((status, {}, b""), OK) as server:
        kit = forward(server.url)
        delivered = kit.deliver(make_event())
        kit.exhaust(delivered)
    assert (delivered.delivery.state, delivered.delivery.attempts) == ("done", 2)


def test_refused_connection_is_retried(forward: Forward) -> None:
    kit = forward("http://127.0.0.1:1/hook", attempts=2)
    delivered = kit.deliver(make_event())
    kit.exhaust(delivered)
    assert (delivered.delivery.state, delivered.delivery.attempts) == ("dead", 2)
