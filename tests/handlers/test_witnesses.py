"""Libraries for Slack, Telegram and Discord parse the orders, answers and posts as we do."""

from __future__ import annotations

import asyncio
import json
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any, Final, Literal
from urllib.parse import parse_qsl

import httpx
import pytest
from slack_bolt import Ack, App, BoltRequest
from slack_bolt.authorization import AuthorizeResult

from receiver.cli.chats import discord_commands
from receiver.emulator import pictures as drawn
from receiver.emulator.chats.board import Message, numbered
from receiver.emulator.chats.calling import Exchange
from receiver.emulator.chats.discord.interactions import BOT_USER
from receiver.emulator.chats.slack.people import SECRET
from receiver.emulator.chats.slack.people import signed as slack_signed
from receiver.settings import Settings
from receiver.testing import make_event
from receiver.testing.chat import CHATS, SETTINGS, Said
from tests.handlers.chat import PNG, keeping, parts_of
from tests.handlers.parts import Asked, built_in
from tests.handlers.talking import RECIPES, Kits, predictions, talking
from tests.journey.parts import eventually
from tests.receiving import ENV

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it imports audioop
    import discord
    from discord import app_commands

JSON: Final = {"content-type": "application/json"}
SECRET_HEADER: Final = "x-telegram-bot-api-secret-token"
ANY: Final = re.compile("")


@dataclass
class Sent:
    """The requests that handlers have sent to the platforms."""

    requests: list[httpx.Request] = field(default_factory=list)

    def calls(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield the method, path and fields of each request; a file is given by its name."""
        for request in self.requests:
            yield request.method, request.url.path, _fields(request)


def _fields(request: httpx.Request) -> dict[str, Any]:
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind == "application/json":
        return dict(json.loads(request.content))
    if kind == "application/x-www-form-urlencoded":
        return dict(parse_qsl(request.content.decode(), strict_parsing=True))
    if kind == "multipart/form-data":
        headers = {"content-type": request.headers["content-type"]}
        asked = Asked(request.method, request.url.path, headers, request.content)
        return {part.name: part.filename or part.content.decode() for part in parts_of(asked)}
    return {}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    found, send = Sent(), httpx.AsyncClient.send

    async def note(client: httpx.AsyncClient, request: httpx.Request, **more: Any) -> Any:
        if str(request.url).startswith(CHATS):
            await request.aread()
            found.requests.append(request)
        return await send(client, request, **more)

    monkeypatch.setattr(httpx.AsyncClient, "send", note)
    return found


def told(*said: Said) -> list[Exchange]:
    """Return the platforms' requests for these messages and presses, with the answers."""
    return [one.exchange for one in said if one.exchange]


# --- Slack ---


def bolt() -> App:
    """Return an app of Slack's framework that accepts the same requests as `slack-in`."""
    app = App(
        signing_secret=SETTINGS["SLACK_SIGNING_SECRET"],
        authorize=lambda **_: AuthorizeResult(enterprise_id=None, team_id="T01", bot_token="xoxb"),
        process_before_response=True,
    )

    def taken(ack: Ack) -> None:
        ack()

    app.command("/imagine")(taken)
    app.event("app_mention")(taken)
    app.event("message")(taken)
    app.action({"type": "block_actions", "action_id": ANY})(taken)
    return app


def test_slack_bolt_and_the_receiver_agree_on_every_request(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "slack_in")
    command = kit.says("/imagine a lighthouse")
    mention = kit.says("<@UBOT> a lighthouse", finish=False)
    direct = kit.says("a lighthouse", place="D", finish=False)
    press = kit.presses(command.replies[0], "Again", finish=False)
    challenge = b'{"type":"url_verification","token":"old","challenge":"3eZbrw1aBm2rZgRNFdxV"}'
    proof = slack_signed(SECRET, int(kit.clock()), challenge)
    set_up = Exchange("set-up", "", JSON | proof, challenge)
    witness = bolt()
    for exchange in [*told(command, mention, direct, press), set_up]:
        body, signature = exchange.body, exchange.headers["x-slack-signature"]
        stamp = exchange.headers["x-slack-request-timestamp"]
        old = slack_signed(SECRET, int(stamp) - 301, body)
        for more, content in (
            ({}, body),
            ({}, body + b" "),
            ({"x-slack-signature": signature[:-1] + "-"}, body),
            ({"x-slack-signature": signature.removeprefix("v0=")}, body),
            ({"x-slack-request-timestamp": str(int(stamp) + 1)}, body),
            (old, body),
            (slack_signed("another-secret", int(stamp), body), body),
        ):
            headers = {**exchange.headers, **more}
            ours = kit.calls("/in/slack", content, headers)
            theirs = witness.dispatch(BoltRequest(body=content.decode(), headers=dict(headers)))
            assert (exchange.kind, ours.status_code) == (exchange.kind, theirs.status)
            if exchange.kind == "set-up" and ours.is_success:
                assert ours.json() == json.loads(theirs.body)


# --- Telegram ---


def telegrams() -> tuple[ModuleType, ModuleType]:
    """Import aiogram late: it takes seconds, in every process that collects tests."""
    return import_module("aiogram.types"), import_module("aiogram.methods")


def made_by_the_library(**more: Any) -> bytes:
    types, _ = telegrams()
    message = types.Message(
        message_id=7,
        date=int(time.time()),
        chat=types.Chat(id=-numbered("C1"), type="supergroup"),
        from_user=types.User(id=numbered("U1"), is_bot=False, first_name="Ann"),
        **more,
    )
    update = types.Update(update_id=700, message=message)
    return str(update.model_dump_json(exclude_none=True, by_alias=True)).encode()


def as_method(name: str, fields: Mapping[str, Any]) -> Any:
    """Parse a call as aiogram's method of that name; an unknown field fails the test."""
    _, methods = telegrams()
    read = {
        name: json.loads(value) if isinstance(value, str) and value[:1] in {"{", "["} else value
        for name, value in fields.items()
    }
    method = getattr(methods, name[0].upper() + name[1:]).model_validate(read)
    assert not {name for name in method.model_extra if not name.startswith("file")}, (name, fields)
    return method


def test_aiogram_updates_are_ordered_and_aiogram_parses_the_calls_sent(
    receiver_kit: Kits, sent: Sent
) -> None:
    types, _ = telegrams()
    kit = talking(receiver_kit, "telegram_in")
    headers = JSON | {SECRET_HEADER: kit.chats.telegram.webhook.secret}
    entity = types.MessageEntity(type="bot_command", offset=0, length=8)
    body = made_by_the_library(text="/imagine a lighthouse", entities=[entity])
    answer = kit.calls("/in/telegram", body, headers)
    [prediction] = predictions(kit)
    assert prediction.order
    assert (prediction.order.person, prediction.order.place, prediction.input["prompt"]) == (
        f"telegram:{numbered('U1')}",
        f"telegram:{-numbered('C1')}",
        "a lighthouse",
    )
    kit.finish_all()
    # The same with requests of the emulated platform.
    said = kit.says("/imagine two towers", on="telegram", finish=False)
    promise = eventually(lambda: said.replies)[0]
    urls = [f"https://providers.test/files/{drawn.name_for(str(n))}" for n in range(2)]
    kit.finish_all(make_event("succeeded", output=urls))
    wrong = kit.says("/imagine", on="telegram")
    order = kit.says("/imagine a tower", on="telegram")
    reply = order.replies[0]
    larger = kit.presses(reply, "Larger", on="telegram")
    deletion = kit.presses(reply, "Delete", on="telegram")
    eventually(lambda: reply.is_deleted and promise.is_deleted)
    answers = [answer.content]
    for exchange in told(said, wrong, order, larger, deletion):
        types.Update.model_validate_json(exchange.body)
        answers.append(exchange.answer)
    answered = [as_method(found.pop("method"), found) for found in map(json.loads, answers)]
    assert {type(one).__name__ for one in answered} == {
        "SendChatAction",
        "SendMessage",
        "AnswerCallbackQuery",
    }
    calls = {
        path.rpartition("/")[2]: as_method(path.rpartition("/")[2], fields)
        for _, path, fields in sent.calls()
    }
    assert calls.keys() == {"sendMessage", "sendPhoto", "sendMediaGroup", "deleteMessage"}
    [row] = calls["sendPhoto"].reply_markup.inline_keyboard
    assert [button.text for button in row] == ["Again", "Delete"]


def test_flagged_picture_is_hidden_as_a_spoiler_in_telegram(receiver_kit: Kits, sent: Sent) -> None:
    kit = receiver_kit(keeping, built_in("telegram_in"), chats=True, settings=RECIPES)
    assert kit.says("/imagine a lighthouse", on="telegram").pictures
    photos = [fields for _, path, fields in sent.calls() if path.endswith("/sendPhoto")]
    assert {as_method("sendPhoto", fields).has_spoiler for fields in photos} == {True}


# --- Discord ---


Prompt = app_commands.Range[str, None, 2000]
Ratio = Literal["1:1", "16:9"]
Picture = discord.Attachment | None
MESSAGE: Final = {"id": "1", "type": 0, "embeds": [], "edited_timestamp": None, "pinned": False} | {
    "mention_everyone": False,
    "tts": False,
    "content": "",
}


def the_libraries_state() -> Any:
    client = discord.Client(intents=discord.Intents.none())
    state: Any = client._connection  # noqa: SLF001 - the only way without its gateway
    data: Any = BOT_USER
    state.user = discord.ClientUser(state=state, data=data)
    return state


async def understood(body: bytes) -> dict[str, Any]:
    """Run an interaction through a command of discord.py that equals the recipe's."""
    state, found = the_libraries_state(), dict[str, Any]()
    tree = app_commands.CommandTree(state._get_client())  # noqa: SLF001

    async def imagine(
        interaction: Any, prompt: Prompt, ratio: Ratio = "1:1", image: Picture = None
    ) -> None:
        found.update(prompt=prompt, ratio=ratio, image=image and image.url)
        found.update(person=interaction.user.id, place=interaction.channel_id)

    command: Any = app_commands.Command(
        name="imagine", description="A picture from words", callback=imagine
    )
    tree.add_command(command)
    interaction = discord.Interaction(data=json.loads(body), state=state)
    await tree._call(interaction)  # noqa: SLF001
    return found | {"command": command.to_dict(tree)}


def test_discord_library_parses_the_same_orders_and_the_answers(
    receiver_kit: Kits, sent: Sent
) -> None:
    kit = talking(receiver_kit, "discord_in")
    book = Settings.read({**ENV, **RECIPES}).recipes
    [command, _] = kit.chats.discord.commands[""] = discord_commands(book)
    said = kit.says("/imagine a lighthouse ratio:16:9", files={"a.png": PNG}, on="discord")
    direct = kit.says("/imagine a tower", place="D", on="discord")
    for exchange, prediction in zip(told(said, direct), predictions(kit), strict=True):
        theirs = asyncio.run(understood(exchange.body))
        assert prediction.order
        assert prediction.order.person
        ours = {
            "prompt": prediction.input["prompt"],
            "ratio": prediction.input["aspect_ratio"],
            "image": prediction.input.get("image_url"),
            "person": int(prediction.order.person.removeprefix("discord:")),
        }
        assert ours == {name: theirs[name] for name in ours}
        assert {name: theirs["command"][name] for name in ("name", "type", "description")} == {
            name: command[name] for name in ("name", "type", "description")
        }
        for one, other in zip(command["options"], theirs["command"]["options"], strict=True):
            known = {**one, "description": other["description"]}
            assert other == {"required": False, **known}
    shown = said.replies[0]
    press = kit.presses(shown, "Larger", on="discord")
    wrong = kit.says("/nothing", on="discord")
    asyncio.run(read_by_the_library(told(said, direct, press, wrong), sent, shown))


async def read_by_the_library(exchanges: list[Exchange], sent: Sent, shown: Message) -> None:
    """Let discord.py parse a press, our answers to Discord, and our posts."""
    state = the_libraries_state()
    *_, button, refused = exchanges
    pressed: Any = discord.Interaction(data=json.loads(button.body), state=state)
    ids = [child.custom_id for child in buttons_of(pressed.message)]
    assert (pressed.message.id, ids) == (int(shown.id), [one.value for one in shown.buttons])
    assert pressed.data["custom_id"] == ids[1]
    answers = [json.loads(each.answer) for each in exchanges]
    message = discord.InteractionResponseType.channel_message
    assert {discord.InteractionResponseType(each["type"]) for each in answers} == {message}
    refusal = as_message(state, json.loads(refused.answer)["data"])
    assert (refusal.flags.ephemeral, "no recipe" in refusal.content) == (True, True)
    [edit, *_] = [fields["payload_json"] for method, _, fields in sent.calls() if method == "PATCH"]
    result = as_message(state, json.loads(edit))
    assert [child.label for child in buttons_of(result)] == ["Again", "Larger", "Delete"]
    assert (result.embeds[0].description, result.embeds[0].image.url) == (
        "a lighthouse",
        f"attachment://{shown.files[0].name}",
    )


def as_message(state: Any, said: Mapping[str, Any]) -> discord.Message:
    """Parse our message with discord.py, without attachments: ours have only numbers."""
    channel: Any = discord.PartialMessageable(state=state, id=1)
    data: Any = {**MESSAGE, **said, "author": BOT_USER, "attachments": []}
    return discord.Message(state=state, channel=channel, data=data)


def buttons_of(message: discord.Message) -> list[Any]:
    return discord.ui.View.from_message(message).children
