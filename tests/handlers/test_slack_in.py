"""`slack-in` takes orders in Slack: signatures, duplicates, deadlines, answers and buttons."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from slack_sdk.signature import SignatureVerifier

from receiver import Call, Unproved
from receiver.deliveries.importing import load
from receiver.emulator import Rule
from receiver.emulator.chats.slack.people import SECRET, SlackPeople, signed
from receiver.testing import make_event
from tests.conftest import Disk, Start
from tests.handlers.parts import built_in
from tests.handlers.talking import (
    PNG,
    RECIPES,
    Kits,
    accounts,
    call,
    four_times,
    nowhere,
    predictions,
    rejected,
    spoilt,
    talking,
)
from tests.journey.parts import eventually
from tests.receiving import eventually as eventually_there
from tests.receiving import hangs

FORM: Final = {"content-type": "application/x-www-form-urlencoded"}
JSON: Final = {"content-type": "application/json"}
AT: Final = 1_700_000_000
COMMAND: Final = (
    b"team_id=T01&channel_id=C01&user_id=U01&command=%2Fimagine&text=a+lighthouse+%E2%9C%A8"
    b"&response_url=https%3A%2F%2Fhooks.slack.com%2Fcommands%2FT01%2F1%2Fabc&trigger_id=1.2.3"
    b"&api_app_id=A01"
)
SET_UP: Final = (
    b'{"type":"url_verification","token":"old",'
    b'"challenge":"3eZbrw1aBm2rZgRNFdxV2595E9CY3gmdALWMmHkvFXO7tYXAYM8P"}'
)
MENTION: Final = (
    b'{"type":"event_callback","event_id":"Ev01","event_time":1700000000,"team_id":"T01",'
    b'"api_app_id":"A01","event":{"type":"app_mention","user":"U01","text":"<@UBOT> a lighthouse",'
    b'"ts":"1700000000.000100","channel":"C01","event_ts":"1700000000.000100"}}'
)
BUTTON: Final = (
    b"payload=%7B%22type%22%3A%22block_actions%22%2C%22user%22%3A%7B%22id%22%3A%22U01%22%7D%2C%22"
    b"actions%22%3A%5B%7B%22action_id%22%3A%22again%22%2C%22value%22%3A%22tok%22%7D%5D%7D"
)
VECTORS: Final = {
    "command": (FORM, COMMAND, "1e9f036bfc4715bffb1e63404dc543848f715a104b23daadfc4de33242cc8725"),
    "set-up": (JSON, SET_UP, "26eab390de7fa1da68b714612c93df8029c48c3ea98543b568e271f584388f23"),
    "mention": (JSON, MENTION, "6735e4d550c8640449f3881f6083fa952d7ac99aeb1e813216b75d065348a4d2"),
    "button": (FORM, BUTTON, "4210699d56a621630083a1e318e06cc1817074ff40e2a0c9567493e9eca79bfb"),
    "empty": (FORM, b"", "a5b43b014ed473febe5f6cc6ec6d9feed6b12bd87f831b83d37733c38cf4c51c"),
}
PUBLIC: Final = "8f742231b10e8888abcd99yyyzzz85a5"
"""The secret of the example in Slack's documentation."""


def proof(stamp: str, signature: str) -> dict[str, str]:
    return {"x-slack-request-timestamp": stamp, "x-slack-signature": signature}


@pytest.fixture
def slack(monkeypatch: pytest.MonkeyPatch) -> str:
    accounts(monkeypatch, SLACK_SIGNING_SECRET=f"{SECRET}, {PUBLIC}")
    return built_in("slack_in")


# --- proofs ---


@pytest.mark.anyio
async def test_only_requests_signed_by_slack_are_accepted(start: Start, slack: str) -> None:
    async with start(slack, clock=lambda: float(AT), others=nowhere(), **RECIPES) as station:
        for name, (kind, body, signature) in VECTORS.items():
            good = kind | proof(str(AT), f"v0={signature}")
            assert (await call(station, "/in/slack", body, good)).status_code == 200, name
            for bad in (
                kind,
                good | {"x-slack-signature": f"v0={signature[:-1]}{'0' * (signature[-1] != '0')}x"},
                good | {"x-slack-signature": f"v0={signature.upper()}"},
                good | {"x-slack-signature": signature},
                good | {"x-slack-request-timestamp": str(AT + 1)},
                good | {"x-slack-request-timestamp": "soon"},
                good | {"x-slack-request-timestamp": f" {AT}"},
            ):
                assert (await call(station, "/in/slack", body, bad)).status_code == 401, name
            assert (await call(station, "/in/slack", body + b"\n", good)).status_code == 401
        answer = await call(
            station,
            "/in/slack",
            SET_UP,
            JSON | proof(str(AT), f"v0={VECTORS['set-up'][2]}"),
        )
        assert answer.json() == {"challenge": json.loads(SET_UP)["challenge"]}
        assert station.count("predictions") == 0  # the recipes do not allow U01


def test_signature_check_agrees_with_the_slack_sdk(slack: str) -> None:
    prove = load([slack]).routes["slack"].proof

    class Clock:
        def now(self) -> float:
            return AT

    witness = SignatureVerifier(SECRET, Clock())  # type: ignore[arg-type] # it has now()

    @given(
        some.text(max_size=60),
        some.sampled_from([0, 1, 299, 300, 301, -300, -301, 10_000]),
        some.sampled_from(["", "v0=", "flip", "secret", "body"]),
    )
    def agree(text: str, off: int, harm: str) -> None:
        body, stamp = text.encode(), str(AT + off)
        secret = "another-secret" if harm == "secret" else SECRET
        base = f"v0:{stamp}:".encode() + body + (b" " if harm == "body" else b"")
        signature = "v0=" + hmac.new(secret.encode(), base, hashlib.sha256).hexdigest()
        signature = {"": signature, "v0=": signature[3:], "flip": signature[:-1] + "-"}.get(
            harm, signature
        )
        try:
            prove(Call(body=body, headers=proof(stamp, signature), at=AT))
            ours = True
        except Unproved:
            ours = False
        assert ours == witness.is_valid(body, stamp, signature)

    agree()
    public = b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow"
    stamp = "1531420618"
    signature = hmac.new(PUBLIC.encode(), b"v0:1531420618:" + public, hashlib.sha256).hexdigest()
    prove(Call(body=public, headers=proof(stamp, f"v0={signature}"), at=1531420618))


def test_random_requests_order_nothing_and_unsigned_ones_get_401(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "slack_in")

    @settings(max_examples=20)
    @given(
        some.binary(max_size=200) | some.sampled_from([COMMAND, MENTION, BUTTON]),
        some.sampled_from([FORM, JSON, {"content-type": "text/plain"}, {}]),
        some.booleans(),
        some.text(some.characters(codec="latin-1", exclude_characters="\r\n\0"), max_size=80),
    )
    def say(body: bytes, kind: dict[str, str], is_signed: bool, noise: str) -> None:
        at = int(kit.clock())
        proved = signed(SECRET, at, body) if is_signed else {}
        headers = {**kind, **proved} if is_signed else proof(noise.strip() or "1", noise.strip())
        encoded = {name: value.encode("latin-1") for name, value in (kind | headers).items()}
        answer = kit.calls("/in/slack", body, encoded)  # type: ignore[arg-type] # bytes are accepted
        assert answer.status_code in ({200, 400} if is_signed else {401})

    say()
    assert kit.calls("/in/slack", b"", proof("soon", "v0=0")).status_code == 401
    assert predictions(kit) == []
    reasons = eventually(lambda: set(rejected(kit)), lambda found: "bad_timestamp" in found)
    assert reasons <= {"bad_timestamp", "bad_signature", "not-allowed"}


@pytest.mark.anyio
async def test_malformed_signed_requests_cause_no_500(start: Start, slack: str) -> None:
    press = json.loads(dict(parse_qsl(BUTTON.decode()))["payload"]) | {
        "team": {"id": "T01"},
        "channel": {"id": "C01"},
        "container": {"message_ts": "1700000000.000100"},
        "response_url": "https://hooks.slack.com/x",
    }
    said = [
        *((JSON, json.dumps(one)) for one in spoilt(json.loads(MENTION))),
        *((FORM, urlencode(one)) for one in spoilt(dict(parse_qsl(COMMAND.decode())))),
        *((FORM, urlencode({"payload": json.dumps(one)})) for one in spoilt(press)),
    ]
    async with start(slack, clock=lambda: float(AT), others=nowhere(), **RECIPES) as station:
        for kind, text in said:
            body = text.replace("U01", "U1").encode()
            answer = await call(station, "/in/slack", body, kind | signed(SECRET, AT, body))
            assert answer.status_code < 500, text[:300]


# --- orders ---


def test_command_is_acknowledged_at_once_and_its_picture_follows(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "slack_in")
    said = kit.says("/imagine a lighthouse & <b> --ratio 16:9")
    [told] = said.ephemerals
    assert (told.text, [one.label for one in told.buttons]) == ("On it.", ["Cancel"])
    reply = said.reply
    assert reply.text.startswith("<@U1> a lighthouse &amp; &lt;b&gt;")
    assert (len(reply.pictures), reply.place, reply.thread) == (1, "C1", "")
    assert [one.label for one in reply.buttons] == ["Again", "Larger", "Delete"]
    [prediction] = predictions(kit)
    assert prediction.input == {"prompt": "a lighthouse & <b>", "aspect_ratio": "16:9"}
    assert prediction.order
    assert (prediction.order.person, prediction.order.place) == ("slack:T01/U1", "slack:T01/C1")
    assert "response" not in json.dumps(prediction.metadata)


def test_mention_is_answered_in_a_thread_and_a_direct_message_in_place(
    receiver_kit: Kits,
) -> None:
    kit = talking(receiver_kit, "slack_in")
    people = kit.chats.people["slack"]
    assert isinstance(people, SlackPeople)
    people.is_double = True  # Slack sends a mention as two events
    mention = kit.says("please <@UBOT> a lighthouse for <@U2>")
    asked = next(one for one in kit.chats.slack.board.messages if one.author == "U1")
    assert mention.reply.thread == asked.id
    assert [one.only_for for one in mention.ephemerals] == ["U1"]
    direct = kit.says("imagine a tower", place="D")
    assert (direct.reply.place, direct.reply.thread) == ("D1", "")
    found = [one.input["prompt"] for one in predictions(kit)]
    assert found == ["please a lighthouse for <@U2>", "a tower"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("/imagine a --ratio 5:9", "Ratio must be one of 1:1, 16:9. This would be right"),
        ("/imagine", "Prompt is missing"),
        ("/imagine help", "A picture from words"),
        ("/pictures help", "imagine  A picture from words"),
    ],
)
def test_help_and_rejected_orders_are_visible_to_the_requester_only(
    receiver_kit: Kits, words: str, told: str
) -> None:
    kit = talking(receiver_kit, "slack_in")
    said = kit.says(words)
    [message] = said.messages
    assert (message.only_for, message.text.startswith(told)) == ("U1", True), message
    assert predictions(kit) == []


def test_order_without_permission_or_over_the_limit_is_rejected(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "slack_in")
    [refused] = kit.says("/imagine a lighthouse", person="U9").messages
    assert (refused.only_for, "may not order here" in refused.text) == ("U9", True)
    for number in range(5):
        assert kit.says(f"/imagine {number}").replies
    [over] = kit.says("/imagine one more").messages
    assert (over.only_for, "5" in over.text) == ("U1", True)
    assert len(predictions(kit)) == 5
    assert set(rejected(kit)) == {"not-allowed", "over-limit"}


OTHERS: Final[list[dict[str, Any]]] = [
    {"bot_id": "B9"},
    {"app_id": "A9"},
    {"subtype": "bot_message"},
    {"subtype": "message_changed"},
    {"user": "USLACKBOT"},
    {"type": "message", "channel_type": "channel"},
    {"type": "reaction_added", "channel": {"id": "C1"}},
]


@pytest.mark.parametrize("more", OTHERS, ids=str)
def test_events_from_bots_or_not_for_the_bot_are_ignored(
    receiver_kit: Kits, more: dict[str, Any]
) -> None:
    kit = talking(receiver_kit, "slack_in")
    event = {"type": "app_mention", "user": "U1", "text": "<@UBOT> a tower", "channel": "C1"}
    body = {"type": "event_callback", "team_id": "T01"}
    content = json.dumps({**body, "event": {**event, "ts": "1700000000.000100", **more}}).encode()
    answer = kit.calls("/in/slack", content, JSON | signed(SECRET, int(kit.clock()), content))
    assert (answer.status_code, answer.content, predictions(kit)) == (200, b"", [])


def test_requests_that_need_no_action_get_an_empty_200(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "slack_in")
    for kind, body in (
        (FORM, b"ssl_check=1&token=old"),
        (JSON, b'{"type":"app_rate_limited","minute_rate_limited":1}'),
        (FORM, urlencode({"payload": '{"type":"view_closed","user":{"id":"U1"}}'}).encode()),
    ):
        answer = kit.calls("/in/slack", body, kind | signed(SECRET, int(kit.clock()), body))
        assert (answer.status_code, answer.content) == (200, b"")


# --- duplicates, delays, faults ---


@pytest.mark.anyio
@pytest.mark.both_engines
async def test_duplicate_requests_order_once(start: Start, slack: str) -> None:
    now = [float(AT)]
    async with start(slack, clock=lambda: now[0], others=nowhere(), **RECIPES) as station:
        for seconds in (0, 90_000):
            now[0] = AT + seconds
            for kind, body in ((FORM, COMMAND), (JSON, MENTION)):
                said = body.replace(b"U01", b"U1")
                headers = kind | signed(SECRET, int(now[0]), said)
                assert await four_times(station, "/in/slack", said, headers) == [200] * 4
        assert (station.count("predictions"), station.count("orders")) == (2, 2)


@pytest.mark.anyio
@pytest.mark.usefixtures("stops_soon")
async def test_command_is_answered_while_the_provider_hangs(
    start: Start, network: Any, slack: str
) -> None:
    network.always("fal.submit", hangs)
    async with start(slack, others=nowhere(), **RECIPES) as station:
        body = COMMAND.replace(b"U01", b"U1")
        headers = FORM | signed(SECRET, int(station.clock()), body)
        answer = await call(station, "/in/slack", body, headers)
        assert answer.json()["text"] == "On it."
        assert station.one("SELECT count(*) FROM predictions") == 1


@pytest.mark.anyio
@pytest.mark.both_engines
@pytest.mark.usefixtures("stops_soon")
async def test_queued_order_is_answered_with_its_queue_position(
    start: Start, network: Any, slack: str
) -> None:
    network.always("fal.submit", hangs)
    env = {**RECIPES, "FAL_MAX_IN_FLIGHT": "1"}
    async with start(slack, others=nowhere(), **env) as station:
        told = []
        for number in range(4):
            body = COMMAND.replace(b"U01", b"U1").replace(b"1.2.3", b"1.2.%d" % number)
            headers = FORM | signed(SECRET, int(station.clock()), body)
            told.append((await call(station, "/in/slack", body, headers)).json()["text"])
            if not number:
                await eventually_there(lambda: network.count("fal.submit"))
        expected = ["On it.", "On it.", *(f"On it: number {n} in the queue." for n in (2, 3))]
        assert told == expected


@pytest.mark.anyio
async def test_event_gets_503_on_a_full_disk_and_its_retries_order_once(
    start: Start, disk: Disk, slack: str
) -> None:
    chats = nowhere()
    async with start(slack, others=chats, **RECIPES) as station:
        body = MENTION.replace(b"U01", b"U1")
        disk.full = True
        headers = JSON | signed(SECRET, int(station.clock()), body)
        assert (await call(station, "/in/slack", body, headers)).status_code == 503
        disk.full = False
        again = {"x-slack-retry-num": "1", "x-slack-retry-reason": "http_error"}
        assert await four_times(station, "/in/slack", body, headers | again) == [200] * 4
        assert station.count("predictions") == 1
        await eventually_there(lambda: chats.chats.slack.board.messages)
        assert [one.text for one in chats.chats.slack.board.messages] == ["On it."]


@pytest.mark.parametrize("fault", ["lose_answer", "drop_call", "fail_call", "limit_call"])
def test_picture_appears_once_if_its_post_fails_or_loses_the_answer(
    receiver_kit: Kits, fault: Any
) -> None:
    kit = talking(receiver_kit, "slack_in")
    rule = Rule(fault=fault, provider="slack", match="files.completeUploadExternal", times=1)
    kit.chats.scene.faults.replace([rule])
    said = kit.says("/imagine a lighthouse")
    kit.move(3600)
    assert len(said.reply.pictures) == 1


def test_failure_replaces_the_acknowledgement_of_the_requester(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "slack_in")
    said = kit.says("/imagine a lighthouse", finish=False)
    kit.finish_all(make_event("failed", error=("content_policy", "unsafe")))
    [told] = said.messages
    assert (told.only_for, "rules do not allow" in told.text, told.edits) == ("U1", True, 1)
    assert [one.label for one in told.buttons] == ["Again"]


@pytest.mark.parametrize("minutes", [16, 31])
def test_failure_is_posted_by_the_bot_after_the_response_url_expired(
    receiver_kit: Kits, minutes: int
) -> None:
    kit = talking(receiver_kit, "slack_in")
    said = kit.says("/imagine a lighthouse", finish=False)
    kit.clock.move(minutes * 60)
    kit.finish_all(make_event("failed", error=("timeout", "slow")))
    assert {one.only_for for one in said.messages} == {"U1"}
    last = said.messages[-1]
    assert "took too long" in last.text
    assert last.by == ("response" if minutes == 16 else "chat.postEphemeral")


@pytest.mark.parametrize("url", ["https://hooks.slack.com/a\0b", "https://hooks.slack.com/ü"])
def test_failure_is_posted_by_the_bot_if_the_response_url_is_malformed(
    receiver_kit: Kits, url: str
) -> None:
    kit = talking(receiver_kit, "slack_in")
    body = urlencode(dict(parse_qsl(COMMAND.decode())) | {"user_id": "U1", "response_url": url})
    headers = FORM | signed(SECRET, int(kit.clock()), body.encode())
    assert kit.calls("/in/slack", body.encode(), headers).status_code == 200
    kit.finish_all(make_event("failed", error=("timeout", "slow")))
    told = kit.chats.slack.board.messages[-1]
    assert (told.by, "took too long" in told.text) == ("chat.postEphemeral", True)


@pytest.mark.parametrize("minutes", [0, 31])
def test_picture_is_linked_or_sent_directly_if_the_bot_is_not_a_member(
    receiver_kit: Kits, minutes: int
) -> None:
    kit = talking(receiver_kit, "slack_in")
    kit.chats.slack.outside.add("C1")
    said = kit.says("/imagine a lighthouse", finish=False)
    kit.clock.move(minutes * 60)
    kit.finish_all()
    reply = said.reply
    if minutes:
        assert (reply.place, len(reply.pictures)) == ("D1", 1)
    else:
        assert (reply.place, reply.by) == ("C1", "response_url")
        assert "https://providers.test/files/" in reply.text


# --- pictures and buttons ---


def test_attached_picture_becomes_the_image_option(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "slack_in")
    said = kit.says("<@UBOT> like this", files={"a.png": PNG})
    assert len(said.reply.pictures) == 1
    [prediction] = predictions(kit)
    head, _, content = prediction.input["image_url"].partition(",")
    assert (head, base64.b64decode(content)) == ("data:image/png;base64", PNG)
    [refused] = kit.says("<@UBOT> like that", files={"a.png": b"#!/bin/sh"}).messages
    assert (refused.only_for, "not a PNG" in refused.text) == ("U1", True)


def test_attached_picture_is_saved_if_save_public_url_is_set(
    receiver_kit: Kits, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SAVE_URL", str(tmp_path))
    monkeypatch.setenv("SAVE_PUBLIC_URL", "https://kept.example/art/")
    kit = receiver_kit(built_in("save"), built_in("slack_in"), chats=True, settings=RECIPES)
    said = kit.says("<@UBOT> like this", files={"a.png": PNG})
    assert len(said.reply.pictures) == 1
    name = f"asked/{hashlib.sha256(PNG).hexdigest()}.png"
    assert predictions(kit)[0].input["image_url"] == f"https://kept.example/art/{name}"
    assert (tmp_path / name).read_bytes() == PNG


def test_buttons_work_for_allowed_people_but_delete_only_for_the_requester(
    receiver_kit: Kits,
) -> None:
    kit = talking(receiver_kit, "slack_in")
    reply = kit.says("/imagine a lighthouse").reply
    larger = kit.presses(reply, "Larger", person="U2").reply
    again = kit.presses(reply, "Again", person="U1").reply
    [first, second, third] = predictions(kit)
    assert second.input == {"image_url": (first.output or [])[0].url}
    assert (third.input, third.order and third.order.recipe) == (first.input, "imagine")
    assert second.order
    assert second.order.person == "slack:T01/U2"
    assert [one.label for one in larger.buttons] == ["Again", "Delete"]
    [refused] = kit.presses(reply, "Again", person="U9").messages
    assert (refused.only_for, "may not" in refused.text) == ("U9", True)
    [refused] = kit.presses(reply, "Delete", person="U2").messages
    assert (refused.only_for, "only who asked" in refused.text.lower()) == ("U2", True)
    kit.presses(reply, "Delete", person="U1")
    eventually(lambda: reply.is_deleted)
    assert not again.is_deleted


def test_failure_after_a_button_press_keeps_the_original_picture(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "slack_in")
    reply = kit.says("/imagine a lighthouse").reply
    said = kit.presses(reply, "Again", finish=False)
    kit.finish_all(make_event("failed", error=("timeout", "slow")))
    assert (len(reply.pictures), reply.edits) == (1, 0)
    assert "took too long" in said.ephemerals[-1].text


def test_linked_picture_can_be_deleted(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "slack_in")
    kit.chats.slack.outside.add("C1")
    reply = kit.says("/imagine a lighthouse").reply
    kit.presses(reply, "Delete")
    eventually(lambda: reply.is_deleted)


@pytest.mark.parametrize("person", ["U1", "U2", "U7"])
def test_only_the_requester_and_admins_can_cancel(
    receiver_kit: Kits, monkeypatch: pytest.MonkeyPatch, person: str
) -> None:
    monkeypatch.setenv("SLACK_ADMINS", "U7, U8")
    kit = talking(receiver_kit, "slack_in")
    said = kit.says("/imagine a lighthouse", finish=False)
    pressed = kit.presses(said.ephemerals[0], "Cancel", person=person, finish=False)
    if person == "U2":
        eventually(
            lambda: [one.text for one in pressed.messages],
            lambda told: told and "Only" in told[0],
        )
        kit.finish_all()
        assert said.reply.pictures
    else:
        eventually(lambda: predictions(kit)[0].status, lambda status: status == "canceled")
        kit.finish_all()
        assert [one.text for one in said.messages] == ["Canceled."]


def test_forged_button_does_nothing(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "slack_in")
    reply = kit.says("/imagine a lighthouse").reply
    value = reply.buttons[0].value
    for forged in ("tok", value[:-1] + ("A" if value[-1] != "A" else "B"), "d" + value[1:], ""):
        pressed = {
            "type": "block_actions",
            "user": {"id": "U1"},
            "team": {"id": "T01"},
            "channel": {"id": "C1"},
            "actions": [{"value": forged}],
            "container": {"message_ts": reply.id},
            "trigger_id": "9.9.9",
        }
        body = urlencode({"payload": json.dumps(pressed)}).encode()
        headers = FORM | signed(SECRET, int(kit.clock()), body)
        assert kit.calls("/in/slack", body, headers).status_code == 200
    assert len(predictions(kit)) == 1
    assert not reply.is_deleted


def test_slack_order_is_not_posted_again_by_the_slack_handler(
    receiver_kit: Callable[..., Any],
) -> None:
    kit = receiver_kit(built_in("slack"), built_in("slack_in"), chats=True, settings=RECIPES)
    assert len(kit.says("/imagine a lighthouse").replies) == 1
    kit.deliver(make_event("succeeded", output=["https://providers.test/files/x"]))
    assert len([one for one in kit.chats.slack.board.messages if not one.only_for]) == 2
