"""Fault injection in the emulator: each fault changes callbacks, streams, submits or polls."""

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import httpcore
import httpx
import httpx_sse
import pytest

from receiver.emulator import FAULTS, create_emulator
from tests.emulator.conftest import Start
from tests.emulator.serving import FAST, KEYS, Emulated, Mailbox, eventually
from tests.emulator.test_emulated_fal import published, verified
from tests.emulator.test_emulated_oxen import listening
from tests.patience import PATIENCE

PROVIDERS = ["oxen", "eachlabs", "fal"]
CALLERS = ["eachlabs", "fal"]
ID_NAMES = {"eachlabs": "exec_id", "fal": "request_id"}
LONG = 20 * PATIENCE
"""Seconds that no test waits."""


def told(mailbox: Mailbox, provider: str, count: int = 1) -> list[str]:
    return [mail.json[ID_NAMES[provider]] for mail in mailbox.take(count)]


def test_fault_rules_are_set_read_and_deleted(emulated: Emulated) -> None:
    rule = {"fault": "break_poll", "provider": "fal", "match": "x", "times": 2, "answer": "garbage"}
    assert emulated.break_with(rule).json() == [rule]
    assert emulated.http.get("/_emulator/faults").json() == [rule]
    assert emulated.http.delete("/_emulator/faults").status_code == 204
    assert emulated.http.get("/_emulator/faults").json() == []


def test_single_fault_rule_needs_no_list(emulated: Emulated) -> None:
    rule = {"fault": "lose_event"}
    assert emulated.http.put("/_emulator/faults", json=rule).json() == [rule]
    assert emulated.http.put("/_emulator/faults", json={"rules": [rule]}).json() == [rule]


@pytest.mark.parametrize(
    "body", [b"{", b'[{"fault": "other"}]', b'[{"fault": "lose_event", "x": 1}]']
)
def test_malformed_fault_rule_returns_400(emulated: Emulated, body: bytes) -> None:
    assert emulated.http.put("/_emulator/faults", content=body).status_code == 400


@pytest.mark.parametrize(
    "rule",
    [{"provider": "fal"}, {"match": "windmill"}, {"probability": 0}, {"times": 0}],
)
def test_fault_rule_that_does_not_match_has_no_effect(
    emulated: Emulated, rule: dict[str, Any]
) -> None:
    emulated.break_with({"fault": "refuse_submit", **rule})
    assert emulated.eachlabs("a lighthouse").status_code == 200


def test_fault_rule_ends_after_its_number_of_times(emulated: Emulated) -> None:
    emulated.break_with({"fault": "refuse_submit", "times": 2})
    assert [emulated.fal().status_code for _ in range(3)] == [503, 503, 200]


@pytest.mark.parametrize("provider", CALLERS)
def test_lost_callback_is_recorded_but_not_sent(
    emulated: Emulated, mailbox: Mailbox, provider: str
) -> None:
    emulated.break_with({"fault": "lose_callback", "times": 1})
    lost = emulated.submit(provider, "x", mailbox.url)
    assert emulated.attempts(lost, 1)[0]["error"] == "lost"
    kept = emulated.submit(provider, "x", mailbox.url)
    assert told(mailbox, provider) == [kept]


def test_prompt_can_request_a_fault(emulated: Emulated, mailbox: Mailbox) -> None:
    lost = emulated.submit("fal", "[lose_callback]", mailbox.url)
    assert emulated.attempts(lost, 1)[0]["error"] == "lost"


@pytest.mark.parametrize("provider", CALLERS)
def test_repeat_fault_sends_duplicate_callbacks(
    emulated: Emulated, mailbox: Mailbox, provider: str
) -> None:
    emulated.break_with({"fault": "repeat_callback", "copies": 4})
    one = emulated.submit(provider, "x", mailbox.url)
    assert told(mailbox, provider, 4) == [one] * 4
    assert len(emulated.attempts(one, 4)) == 4


@pytest.mark.parametrize("provider", CALLERS)
def test_delay_fault_sends_the_callback_late(
    emulated: Emulated, mailbox: Mailbox, provider: str
) -> None:
    emulated.break_with({"fault": "delay_callback", "seconds": 0.2})
    one = emulated.submit(provider, "x", mailbox.url)
    assert mailbox.one().at >= emulated.row(one)["completed_at"] + 0.2


@pytest.mark.parametrize("provider", CALLERS)
def test_reorder_fault_swaps_two_callbacks(
    emulated: Emulated, mailbox: Mailbox, provider: str
) -> None:
    emulated.break_with({"fault": "reorder_callbacks", "times": 1, "seconds": 60})
    first = emulated.submit(provider, "x", mailbox.url)
    emulated.finished(provider, first)
    second = emulated.submit(provider, "x", mailbox.url)
    assert told(mailbox, provider, 2) == [second, first]


def test_reordered_callback_without_a_successor_is_sent_after_the_delay(
    emulated: Emulated, mailbox: Mailbox
) -> None:
    emulated.break_with({"fault": "reorder_callbacks", "seconds": 0.05})
    one = emulated.submit("fal", "x", mailbox.url)
    assert told(mailbox, "fal") == [one]


@pytest.mark.parametrize("provider", CALLERS)
def test_early_callback_arrives_before_the_submit_response(
    start: Start, mailbox: Mailbox, provider: str
) -> None:
    emulated = start(generation=LONG)
    emulated.break_with({"fault": "early_callback", "seconds": PATIENCE})
    one = emulated.submit(provider, "x", mailbox.url)
    assert mailbox.mails.qsize() == 1
    assert told(mailbox, provider) == [one]


def test_submit_response_waits_only_briefly_for_an_early_callback(emulated: Emulated) -> None:
    emulated.break_with({"fault": "early_callback", "seconds": 0.05})
    assert emulated.fal("x").status_code == 200


def test_early_callback_fault_applies_to_stream_events(start: Start) -> None:
    emulated = start(generation=LONG)
    emulated.break_with({"fault": "early_callback"})
    with listening(emulated) as events:
        one = emulated.submit("oxen", "x")
        assert next(events).json()["generation_id"] == one


@pytest.mark.parametrize("provider", PROVIDERS)
def test_refuse_submit_fault_returns_429_and_bills_nothing(
    emulated: Emulated, provider: str
) -> None:
    emulated.break_with({"fault": "refuse_submit", "status": 429, "retry_after": 7})
    call = {"oxen": emulated.oxen, "eachlabs": emulated.eachlabs, "fal": emulated.fal}[provider]
    answer = call("x")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert emulated.ledger()["predictions"] == []
    assert emulated.ledger()["requests"][provider] == {
        "submits": 0,
        "polls": 0,
        "cancels": 0,
        "rejected": 1,
    }


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("fault", "billed"), [("drop_submit", 0), ("stall_submit", 1)])
def test_dropped_or_stalled_submit_closes_the_connection_without_response(
    emulated: Emulated, mailbox: Mailbox, provider: str, fault: str, billed: int
) -> None:
    emulated.break_with({"fault": fault, "times": 1})
    with pytest.raises(httpx.RemoteProtocolError):
        emulated.submit(provider, "x", mailbox.url)
    assert sum(row["billed"] for row in emulated.ledger()["predictions"]) == billed
    if billed and provider in CALLERS:
        assert told(mailbox, provider) == [emulated.ledger()["predictions"][0]["id"]]


def test_stalled_submit_gets_no_answer_but_creates_a_prediction(emulated: Emulated) -> None:
    emulated.break_with({"fault": "stall_submit", "seconds": LONG})
    head = "POST /fal/queue/a/b HTTP/1.1\r\nhost: x\r\nauthorization: Key key-1\r\n"
    address = ("127.0.0.1", emulated.http.base_url.port)
    with socket.create_connection(address, PATIENCE) as connection:
        connection.sendall(f'{head}content-length: 15\r\n\r\n{{"prompt": "x"}}'.encode())
        eventually(lambda: emulated.ledger()["predictions"], lambda rows: len(rows) == 1)
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(1)


def test_stalled_sync_call_creates_a_prediction(emulated: Emulated) -> None:
    emulated.break_with({"fault": "stall_submit"})
    with pytest.raises(httpx.RemoteProtocolError):
        emulated.call("fal", "POST", "/run/a/b", json={"prompt": "x"})
    assert len(emulated.ledger()["predictions"]) == 1


def test_hang_up_without_a_socket_raises_connection_reset() -> None:
    async def dropped() -> None:
        transport = httpx.ASGITransport(create_emulator(FAST))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"prompt": "[drop_submit]"}
            await client.post("/fal/queue/a/b", json=body, headers=KEYS["fal"])

    with pytest.raises(ConnectionResetError):
        asyncio.run(dropped())


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("answer", "status"), [("error", 500), ("missing", 404), ("garbage", 200)])
def test_broken_poll_returns_an_error_once(
    emulated: Emulated, provider: str, answer: str, status: int
) -> None:
    emulated.break_with({"fault": "break_poll", "answer": answer, "times": 1})
    one = emulated.submit(provider, "x")
    broken = emulated.poll(provider, one)
    assert broken.status_code == status
    assert (answer == "garbage") == (b"{" not in broken.content)
    assert emulated.poll(provider, one).json()["status"] in {
        "queued",
        "processing",
        "succeeded",
        "created",
        "success",
        "IN_QUEUE",
        "IN_PROGRESS",
        "COMPLETED",
    }


def test_rotated_key_signs_the_next_callback(emulated: Emulated, mailbox: Mailbox) -> None:
    before = published(emulated)
    assert emulated.break_with({"fault": "rotate_keys"}).json() == []
    after = published(emulated)
    assert after[:2] == before[:2]
    emulated.submit("fal", "x", mailbox.url)
    mail = mailbox.one()
    assert (any(verified(mail, before)), any(verified(mail, after))) == (False, True)


def test_broken_jwks_returns_500_once(emulated: Emulated) -> None:
    emulated.break_with({"fault": "break_jwks", "times": 1})
    assert emulated.http.get("/fal/.well-known/jwks.json").status_code == 500
    assert published(emulated)


def test_wrong_signature_fault_sends_a_wrong_secret(emulated: Emulated, mailbox: Mailbox) -> None:
    emulated.break_with({"fault": "wrong_signature"})
    emulated.eachlabs("x", webhook_url=mailbox.url, webhook_secret="abc")
    assert mailbox.one().headers["x-webhook-secret"] == "cba"


@pytest.mark.parametrize(("rule", "age"), [({}, 600), ({"seconds": 301}, 301)])
def test_stale_timestamp_has_a_valid_signature(
    emulated: Emulated, mailbox: Mailbox, rule: dict[str, Any], age: int
) -> None:
    emulated.break_with({"fault": "stale_timestamp", **rule})
    began = int(time.time())
    emulated.submit("fal", "x", mailbox.url)
    mail = mailbox.one()
    assert began <= int(mail.headers["x-fal-webhook-timestamp"]) + age <= time.time()
    assert any(verified(mail, published(emulated)))


def test_null_payload_callback_has_an_error_but_the_result_is_served(
    emulated: Emulated, mailbox: Mailbox
) -> None:
    emulated.break_with({"fault": "null_payload"})
    one = emulated.submit("fal", "x", mailbox.url)
    body = mailbox.one().json
    assert (body["status"], body["payload"], bool(body["payload_error"])) == ("OK", None, True)
    url = f"/queue/fal-ai/nano-banana/requests/{one}"
    assert emulated.call("fal", "GET", url).json()["images"]


def test_large_output_fault_enlarges_the_picture(emulated: Emulated, mailbox: Mailbox) -> None:
    emulated.break_with({"fault": "large_output", "size": 1_000_000})
    emulated.submit("fal", "x", mailbox.url)
    (image,) = mailbox.one().json["payload"]["images"]
    assert image["url"].startswith("data:image/png;base64,")
    assert len(image["url"]) > 1_000_000


@pytest.mark.parametrize("prompt", [None, "[cut_stream]"])
def test_cut_stream_breaks_the_connection_and_can_be_reopened(
    emulated: Emulated, prompt: str | None
) -> None:
    with listening(emulated) as events:
        if prompt:
            emulated.submit("oxen", prompt)
        else:
            emulated.break_with({"fault": "cut_stream"})
        with pytest.raises(httpx.RemoteProtocolError):
            next(events)
    with listening(emulated) as events:
        one = emulated.submit("oxen", "x")
        assert next(events).json()["generation_id"] == one


def test_lost_event_is_not_sent_to_an_open_stream(emulated: Emulated) -> None:
    emulated.break_with({"fault": "lose_event", "times": 1})
    with listening(emulated) as events:
        lost = emulated.submit("oxen", "x")
        emulated.attempts(lost, 1)
        seen = emulated.submit("oxen", "x")
        assert next(events).json()["generation_id"] == seen
    assert emulated.poll("oxen", lost).json()["status"] == "succeeded"


def test_silenced_stream_stays_open_without_events(start: Start) -> None:
    emulated = start(keep_alive=0.01)
    emulated.break_with({"fault": "silence_stream"})
    with emulated.http.stream("GET", "/oxen/api/events", headers=KEYS["oxen"]) as answer:
        one = emulated.submit("oxen", "x")
        emulated.attempts(one, 1)
        with pytest.raises(httpcore.ReadTimeout):  # without the fault, a comment each 10 ms
            answer.extensions["network_stream"].read(1, timeout=0.2)
    assert emulated.attempts(one, 1)[0]["error"] == "no stream is open"
    emulated.http.delete("/_emulator/faults")
    with emulated.http.stream("GET", "/oxen/api/events", headers=KEYS["oxen"]) as answer:
        assert next(answer.iter_bytes()).startswith(b": keep-alive")


def test_repeat_fault_applies_to_stream_events(emulated: Emulated) -> None:
    with httpx_sse.connect_sse(
        emulated.http, "GET", "/oxen/api/events", headers=KEYS["oxen"]
    ) as source:
        events = source.iter_sse()
        emulated.break_with({"fault": "repeat_callback", "copies": 2, "times": 1})
        one = emulated.submit("oxen", "x")
        assert [next(events).json()["generation_id"] for _ in range(2)] == [one, one]


def test_reorder_fault_swaps_two_stream_events(emulated: Emulated) -> None:
    emulated.break_with({"fault": "reorder_callbacks", "times": 1, "seconds": LONG})
    with listening(emulated) as events:
        first = emulated.submit("oxen", "x")
        emulated.finished("oxen", first)
        second = emulated.submit("oxen", "x")
        assert [next(events).json()["generation_id"] for _ in range(2)] == [second, first]


def test_locked_account_rejects_submits_and_answers_polls(emulated: Emulated) -> None:
    one = emulated.submit("fal", "[never]")
    emulated.break_with({"fault": "lock_account", "times": 1})
    refused = emulated.fal()
    assert refused.status_code == 403
    assert refused.json()["detail"].startswith("User is locked. Reason: Exhausted balance.")
    assert emulated.poll("fal", one).status_code == 202
    assert emulated.fal().status_code == 200


def test_reserved_money_rejects_a_concurrent_submit_with_402(emulated: Emulated) -> None:
    emulated.break_with({"fault": "reserve_money"})
    one = emulated.submit("eachlabs", "[never]")
    refused = emulated.eachlabs()
    assert (refused.status_code, refused.json()["error"]) == (402, "payment required")
    emulated.call("eachlabs", "POST", f"/v1/prediction/{one}/cancel")
    assert emulated.eachlabs().status_code == 200


def test_success_callback_may_arrive_after_a_cancel(emulated: Emulated, mailbox: Mailbox) -> None:
    emulated.break_with({"fault": "late_success"})
    one = emulated.submit("eachlabs", "[never]", mailbox.url)
    emulated.call("eachlabs", "POST", f"/v1/prediction/{one}/cancel")
    assert mailbox.one().json["status"] == "succeeded"
    assert emulated.poll("eachlabs", one).json()["status"] == "cancelled"


def test_every_fault_has_a_test() -> None:
    tests = Path(__file__).parents[1]
    files = [*tests.glob("emulator/test_*.py"), *tests.glob("handlers/test_*_in.py")]
    text = "".join(file.read_text("utf-8") for file in files)
    assert [fault for fault in FAULTS if f'"{fault}"' not in text] == []


def test_client_disconnect_during_a_request_raises_nothing() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/fal/queue/fal-ai/nano-banana",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in KEYS["fal"].items()],
        "scheme": "http",
    }
    asyncio.run(create_emulator(FAST)(scope, receive, send))
    assert sent[0]["status"] == 400
