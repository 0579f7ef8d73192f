"""The kit's emulated chats: people talk to handlers, and a test sees what the platform shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

import httpx
import msgspec
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from receiver import Context, Event, on
from receiver.emulator import pictures
from receiver.emulator.chats.board import Platform, numbered
from receiver.testing import Kit, make_event
from receiver.testing.chat import CHATS, telegram_secret
from tests.handlers.parts import built_in

Kits = Callable[..., Kit]
KEY = {"authorization": "Bearer api-key-of-a-test"}


AGAIN = {
    "type": "button",
    "text": {"type": "plain_text", "text": "Again"},
    "action_id": "again",
    "value": "a signed token",
}


class Bot:
    """An app in front of a receiver: submits each Slack command and answers with a button."""

    def __init__(self, kit: Kit) -> None:
        receiver = kit.chats.scene.caller.given
        assert receiver is not None
        self.receiver = receiver
        kit.chats.scene.caller.given = httpx.AsyncClient(transport=httpx.ASGITransport(self))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        form = dict(parse_qsl((await Request(scope, receive).body()).decode()))
        pressed = msgspec.json.decode(form.get("payload", "{}"))
        prompt = form.get("text") or pressed["actions"][0]["value"]
        body = {"provider": "fal", "model": "fal-ai/x", "input": {"prompt": prompt}}
        key = form.get("trigger_id") or pressed["trigger_id"]
        headers = {**KEY, "idempotency-key": key}
        answer = await self.receiver.post("/v1/predictions", json=body, headers=headers)
        words = {"type": "section", "text": {"type": "mrkdwn", "text": f"{answer.status_code}"}}
        said = {"blocks": [words, {"type": "actions", "elements": [AGAIN]}]}
        content = msgspec.json.encode(said)
        await Response(content, media_type="application/json")(scope, receive, send)


@pytest.mark.parametrize("platform", ["slack", "discord", "telegram"])
def test_built_in_handler_posts_a_picture_to_the_emulated_platform(
    receiver_kit: Kits, platform: Platform
) -> None:
    kit = receiver_kit(built_in(platform), chats=True)
    drawn = f"https://providers.test/files/{pictures.name_for('a lighthouse')}"
    kit.deliver(make_event("succeeded", output=[drawn]))
    place = kit.chats.place(platform, "C1", "U1")
    [message] = kit.chats.boards[platform].shown(place)
    assert "a lighthouse" in message.text
    assert [picture.content[:4] for picture in message.pictures] == [b"\x89PNG"]


def test_chat_command_gets_its_picture_as_the_only_reply(receiver_kit: Kits) -> None:
    kit = receiver_kit(built_in("slack"), chats=True)
    Bot(kit)
    said = kit.says("/imagine a lighthouse", person="U1", place="C1", on="slack")
    assert [message.text for message in said.ephemerals] == ["202"]
    assert len(said.reply.pictures) == 1
    assert said.pictures == said.reply.pictures
    assert said.pictures[0].content.startswith(b"\x89PNG")
    again = kit.repeat(said, times=3)
    assert (again.replies, again.messages) == ([], [])
    with pytest.raises(ValueError, match="0 replies"):
        _ = again.reply


def test_chat_command_can_be_left_unfinished_and_ended_later(receiver_kit: Kits) -> None:
    kit = receiver_kit(built_in("slack"), chats=True)
    Bot(kit)
    said = kit.says("/imagine a lighthouse", finish=False)
    assert said.replies == []
    kit.finish_all(make_event("failed", error=("provider_error", "no luck")))
    assert said.reply.pictures == []
    assert "no luck" in said.reply.text


@on("succeeded", name="kit/child")
async def child(event: Event, ctx: Context) -> None:
    if event.prediction.parent_id is None:
        await ctx.submit("oxen", "m", {"prompt": "another"})


def test_pressed_button_runs_all_predictions_that_follow(receiver_kit: Kits) -> None:
    kit = receiver_kit(child, chats=True)
    Bot(kit)
    [message] = kit.says("/imagine a lighthouse").ephemerals
    kit.presses(message, "Again", person="U2")
    with pytest.raises(ValueError, match="no button 'Delete'"):
        kit.presses(message, "Delete")
    found = kit.get("/v1/predictions", dict[str, Any])["data"]
    assert [(one["provider"], one["status"]) for one in found] == [
        ("oxen", "succeeded"),
        ("fal", "succeeded"),
    ] * 2


def test_chat_command_fails_if_the_receiver_has_no_route_for_it(receiver_kit: Kits) -> None:
    kit = receiver_kit(chats=True)
    with pytest.raises(AssertionError, match=r"https://receiver.test/in/slack was answered 404"):
        kit.says("/imagine a lighthouse")
    with pytest.raises(AssertionError, match="/in/telegram was answered 404"):
        kit.says("/imagine a lighthouse", on="telegram")
    assert kit.chats.telegram.updates


def test_chats_require_chats_true_and_cannot_be_online(receiver_kit: Kits) -> None:
    with pytest.raises(ValueError, match="chats=True"):
        receiver_kit().says("/imagine a lighthouse")
    with pytest.raises(ValueError, match="emulated"):
        Kit(chats=True, online=True)


def test_telegram_secret_is_derived_from_the_secret_key() -> None:
    assert telegram_secret("k" * 32) == "dEkebUdxKbk0jLzO83SYP4B3XOnPNhiqj0bRLqx82_Q"
    assert numbered("12") == 12
    assert CHATS.startswith("https://")
