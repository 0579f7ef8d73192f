"""The emulated Slack works with Slack's SDK, whose verifier accepts the requests that it sends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest
from slack_sdk import WebClient
from slack_sdk.errors import SlackApiError
from slack_sdk.signature import Clock, SignatureVerifier
from slack_sdk.webhook import WebhookClient
from starlette.responses import Response

from receiver.emulator import Rule
from receiver.emulator.chats.slack.api import TOKEN
from receiver.emulator.chats.slack.people import SECRET, SlackPeople, signed
from receiver.emulator.pictures import draw, name_for
from tests import loopback
from tests.emulator.chatting import Inside, Outside, Told, outside, said
from tests.emulator.serving import eventually

pytestmark = pytest.mark.anyio
PNG = draw(name_for("a lighthouse")) or b""
BUTTONS: list[dict[str, Any]] = [
    {"type": "section", "text": {"type": "mrkdwn", "text": "done"}},
    {
        "type": "actions",
        "elements": [
            {
                "type": "button",
                "text": {"type": "plain_text", "text": "Again"},
                "action_id": "again",
                "value": "tok",
            }
        ],
    },
]
VECTORS = {
    b"team_id=T01&channel_id=C01&user_id=U01&command=%2Fimagine&text=a+lighthouse+%E2%9C%A8&"
    b"response_url=https%3A%2F%2Fhooks.slack.com%2Fcommands%2FT01%2F1%2Fabc&trigger_id=1.2.3&"
    b"api_app_id=A01": "1e9f036bfc4715bffb1e63404dc543848f715a104b23daadfc4de33242cc8725",
    b'{"type":"url_verification","token":"old","challenge":"3eZbrw1aBm2rZgRNFdxV2595E9CY3gmdALWMm'
    b'HkvFXO7tYXAYM8P"}': "26eab390de7fa1da68b714612c93df8029c48c3ea98543b568e271f584388f23",
    b"": "a5b43b014ed473febe5f6cc6ec6d9feed6b12bd87f831b83d37733c38cf4c51c",
}


@pytest.fixture(scope="module")
def slack() -> Iterator[Outside]:
    with outside() as found:
        yield found


@pytest.fixture
def client(slack: Outside) -> WebClient:
    slack.chats.slack.board.messages.clear()
    slack.app.told.clear()
    slack.app.answers[:] = [Response()]
    return WebClient(TOKEN, base_url=f"{slack.url}/slack/api/")


def people(inside: Inside) -> SlackPeople:
    found = inside.chats.people["slack"]
    assert isinstance(found, SlackPeople)
    return found


class _At(Clock):
    def __init__(self, at: float) -> None:
        self._at = at

    def now(self) -> float:
        return self._at


def verify(told: Told, at: float) -> None:
    """Check a request with Slack's own signature verifier, which Bolt uses."""
    assert SignatureVerifier(SECRET, _At(at)).is_valid_request(told.body, told.headers)


@pytest.mark.parametrize("body", VECTORS)
def test_signature_matches_the_known_vectors(body: bytes) -> None:
    headers = signed(SECRET, 1_700_000_000, body)
    assert headers["x-slack-signature"] == f"v0={VECTORS[body]}"


def test_sdk_posts_edits_and_deletes_messages(slack: Outside, client: WebClient) -> None:
    board = slack.chats.slack.board
    me: Any = client.auth_test()
    assert (me["user_id"], "chat:write" in me.headers["x-oauth-scopes"]) == ("UBOT", True)
    posted = client.chat_postMessage(channel="C1", text="on it", thread_ts="1700000000.000100")
    ts = str(posted["ts"])
    client.chat_update(channel="C1", ts=ts, text="done", blocks=BUTTONS)
    [message] = board.shown("C1")
    assert (message.text, message.thread, message.edits) == ("done", "1700000000.000100", 1)
    assert [(b.label, b.action, b.value) for b in message.buttons] == [("Again", "again", "tok")]
    client.chat_postEphemeral(channel="C1", user="U1", text="only you")
    assert [m.only_for for m in board.shown("C1", "U1")] == ["", "U1"]
    assert len(board.shown("C1", "U2")) == 1
    client.chat_delete(channel="C1", ts=ts)
    assert [m.text for m in board.shown("C1", "U1")] == ["only you"]
    opened: Any = client.conversations_open(users="U1")
    assert opened["channel"]["id"] == "D1"


def test_sdk_uploads_a_file_and_its_download_requires_the_token(
    slack: Outside, client: WebClient
) -> None:
    client.files_upload_v2(channel="C1", filename="a.png", content=PNG, initial_comment="here")
    [message] = slack.chats.slack.board.shown("C1")
    assert (message.text, [file.content for file in message.pictures]) == ("here", [PNG])
    found: Any = client.files_info(file=message.files[0].id)
    url = found["file"]["url_private_download"]
    assert loopback.get(url).status_code == 302
    assert loopback.get(url, headers={"authorization": f"Bearer {TOKEN}"}).content == PNG


ERRORS: dict[str, tuple[str, dict[str, Any]]] = {
    "channel_not_found": ("chat.postMessage", {"channel": "general", "text": "a"}),
    "no_text": ("chat.postMessage", {"channel": "C1"}),
    "invalid_arguments": ("chat.postMessage", {"text": "a"}),
    "msg_too_long": ("chat.postMessage", {"channel": "C1", "text": "a" * 40_001}),
    "invalid_blocks": ("chat.postMessage", {"channel": "C1", "blocks": [{"type": "magic"}]}),
    "message_not_found": ("chat.update", {"channel": "C1", "ts": "1.0", "text": "a"}),
    "unknown_method": ("chat.shout", {}),
    "not_in_channel": ("chat.postMessage", {"channel": "COUT", "text": "a"}),
    "file_not_found": ("files.completeUploadExternal", {"files": [{"id": "F9"}]}),
    "user_not_found": ("conversations.open", {"users": "nobody"}),
}


@pytest.mark.parametrize("error", ERRORS)
def test_invalid_call_returns_the_documented_error(
    slack: Outside, client: WebClient, error: str
) -> None:
    slack.chats.slack.outside = {"COUT"}
    method, args = ERRORS[error]
    with pytest.raises(SlackApiError) as refused:
        client.api_call(method, json=args)
    assert refused.value.response["error"] == error
    assert slack.chats.slack.board.messages == []


def test_invalid_token_missing_scope_and_rate_limit_are_reported(
    slack: Outside, client: WebClient
) -> None:
    with pytest.raises(SlackApiError, match="invalid_auth"):
        WebClient("xoxb-other", base_url=client.base_url).auth_test()
    slack.chats.slack.scopes = "commands"
    try:
        with pytest.raises(SlackApiError, match="missing_scope") as refused:
            client.chat_postMessage(channel="C1", text="a")
    finally:
        del slack.chats.slack.scopes
    assert refused.value.response["needed"] == "chat:write"
    rule = {"fault": "limit_call", "match": "chat.", "times": 1, "retry_after": 30}
    loopback.request("PUT", f"{slack.url}/_emulator/faults", json=[rule]).raise_for_status()
    with pytest.raises(SlackApiError, match="ratelimited") as limited:
        client.chat_postMessage(channel="C1", text="a")
    assert limited.value.response.headers["retry-after"] == "30"
    client.chat_postMessage(channel="C1", text="a")


async def test_lost_response_keeps_the_message_but_a_dropped_call_does_not() -> None:
    inside = Inside()
    faults: list[Any] = ["lose_answer", "drop_call"]
    for fault in faults:
        inside.chats.scene.faults.replace([Rule(fault=fault)])
        with pytest.raises(httpx.ReadError):
            await inside.http.post(
                "https://chats.test/slack/api/chat.postMessage",
                data={"channel": "C1", "text": "a"},
                headers={"authorization": f"Bearer {TOKEN}"},
            )
    assert [message.text for message in inside.chats.slack.board.shown("C1")] == ["a"]


def test_response_url_works_five_times_within_thirty_minutes(
    slack: Outside, client: WebClient
) -> None:
    assert client.token
    slack.app.answers[:] = [said({"text": "on it"})]
    urls = []
    for _ in range(2):
        assert slack.say("slack", "/imagine a lighthouse &")["status"] == 200
        told = slack.app.told[-1]
        verify(told, time.time())
        form = {name: value[0] for name, value in parse_qs(told.body.decode()).items()}
        assert (form["command"], form["text"]) == ("/imagine", "a lighthouse &amp;")
        urls.append(form["response_url"])
    first, second = map(WebhookClient, urls)
    answers = [first.send(text="better", replace_original=True) for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [404]
    assert "used_url" in answers[-1].body
    shown = slack.chats.slack.board.shown("C1", "U1")
    assert [(m.text, m.edits, m.only_for) for m in shown] == [
        ("better", 5, "U1"),
        ("on it", 0, "U1"),
    ]
    slack.do("POST", "/clock", {"seconds": 31 * 60})
    assert "expired_url" in second.send(text="late").body
    slack.do("POST", "/clock", {"seconds": -31 * 60})
    slack.do("PUT", "/tokens", {"slack": True})
    assert second.send(text="dead").status_code == 404
    slack.do("PUT", "/tokens", {})
    assert second.send(text="there", response_type="in_channel").status_code == 200
    assert slack.chats.slack.board.shown("C1", "U2")[-1].text == "there"


async def test_events_button_presses_and_url_verification_are_signed() -> None:
    inside = Inside()
    here, app = people(inside), inside.app
    assert await here.says("just talk", "U1", "C1") is None
    await here.says("<@UBOT> a lighthouse", "U1", "C1", thread="1700000000.000001")
    await here.says("a lighthouse", "U1", "D1", files=(("a.png", PNG),))
    mention, direct = (told.json["event"] for told in app.told)
    assert (mention["type"], mention["text"]) == ("app_mention", "<@UBOT> a lighthouse")
    assert mention["thread_ts"] == "1700000000.000001"
    assert (direct["channel_type"], direct["files"][0]["mimetype"]) == ("im", "image/png")
    message = inside.chats.slack.board.messages[0]
    message.raw = {"text": "t"}
    [button] = await _posted(inside)
    board = inside.chats.slack.board
    await here.presses(board.messages[-1], button, "U2")
    payload = httpx.Response(200, content=parse_qs(app.told[-1].body.decode())["payload"][0]).json()
    assert (payload["type"], payload["user"]["id"]) == ("block_actions", "U2")
    assert payload["actions"][0]["value"] == "tok"
    app.judge = lambda told: said({"challenge": told.json["challenge"]})
    assert await here.sets_up()
    app.judge = lambda _: None
    assert not await here.sets_up()
    for told in app.told:
        verify(told, 1_700_000_000)


async def _posted(inside: Inside) -> list[Any]:
    await inside.http.post(
        "https://chats.test/slack/api/chat.postMessage",
        json={"channel": "C1", "text": "done", "blocks": BUTTONS},
        headers={"authorization": f"Bearer {TOKEN}"},
    )
    return inside.chats.slack.board.messages[-1].buttons


async def test_mention_is_delivered_twice_if_both_events_are_subscribed() -> None:
    inside = Inside()
    people(inside).is_double = True
    await people(inside).says("<@UBOT> a lighthouse", "U1", "C1")
    first, second = (told.json for told in inside.app.told)
    assert first["event_id"] != second["event_id"]
    assert first["event"]["ts"] == second["event"]["ts"]


def test_failed_event_is_redelivered_with_retry_headers(slack: Outside, client: WebClient) -> None:
    assert client.token
    slack.app.answers[:] = [Response(status_code=503), Response(status_code=500), Response()]
    assert slack.say("slack", "a lighthouse", place="D")["status"] == 503
    told = eventually(lambda: list(slack.app.told), lambda found: len(found) == 3)
    assert [one.headers.get("x-slack-retry-num") for one in told] == [None, "1", "2"]
    assert told[1].headers["x-slack-retry-reason"] == "http_error"
    assert len({one.body for one in told}) == 1


async def test_command_error_or_timeout_is_shown_only_to_its_user() -> None:
    inside = Inside(Response(status_code=500))
    board = inside.chats.slack.board
    await people(inside).says("/imagine a", "U1", "C1")
    assert 'failed with the error "http_service_error"' in board.shown("C1", "U1")[-1].text

    async def sleeps(*_: Any) -> None:
        await asyncio.Event().wait()

    inside.transport.calls(httpx.AsyncClient(transport=httpx.ASGITransport(sleeps)))
    inside.chats.scene.within = 0.01
    exchange = await people(inside).says("/imagine a", "U1", "C1")
    assert exchange
    assert exchange.error == "timeout"
    assert "operation_timeout" in board.shown("C1", "U1")[-1].text
    assert board.shown("C1", "U2") == []
