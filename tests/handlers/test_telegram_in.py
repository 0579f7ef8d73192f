"""`telegram-in` takes orders in Telegram, by webhook or by polling."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from receiver.emulator import Rule
from receiver.emulator import pictures as drawn
from receiver.emulator.chats.board import Message, numbered
from receiver.emulator.chats.telegram.api import TOKEN
from receiver.emulator.chats.telegram.people import TelegramPeople
from receiver.testing import Kit, make_event
from receiver.testing.chat import telegram_secret
from tests.conftest import Disk, Start
from tests.handlers.parts import built_in
from tests.handlers.talking import (
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
from tests.receiving import ENV, hangs
from tests.receiving import eventually as eventually_there

DRAWN: Final = drawn.draw(drawn.name_for("a tower")) or b""
JSON: Final = {"content-type": "application/json"}
AT: Final = 1_700_000_000
COMMAND: Final[dict[str, Any]] = {
    "update_id": 700,
    "message": {
        "message_id": 7,
        "date": AT,
        "chat": {"id": -100123, "type": "supergroup"},
        "from": {"id": 4711, "is_bot": False, "first_name": "Ann"},
        "text": "/imagine a lighthouse ✨",
        "entities": [{"type": "bot_command", "offset": 0, "length": 8}],
    },
}


def secret(key: str = ENV["RECEIVER_SECRET_KEY"]) -> dict[str, str]:
    return JSON | {"x-telegram-bot-api-secret-token": telegram_secret(key)}


def update(**more: Any) -> bytes:
    return json.dumps({**COMMAND, "message": {**COMMAND["message"], **more}}).encode()


@pytest.fixture
def telegram(monkeypatch: pytest.MonkeyPatch) -> str:
    accounts(monkeypatch)
    return built_in("telegram_in")


# --- proofs ---


@pytest.mark.anyio
async def test_only_updates_with_the_secret_are_accepted(start: Start, telegram: str) -> None:
    async with start(telegram, others=nowhere(), **RECIPES) as station:
        for bad in (
            JSON,
            secret("another-key-of-thirty-two-characters"),
            JSON | {"x-telegram-bot-api-secret-token": ""},
            JSON | {"x-telegram-bot-api-secret-token": secret()[next(reversed(secret()))] + "0"},
        ):
            assert (await call(station, "/in/telegram", update(), bad)).status_code == 401
        assert station.count("predictions") == 0
        answer = await call(station, "/in/telegram", update(), secret())
        assert answer.json()["method"] == "sendChatAction"
        assert station.one("SELECT ordered FROM predictions").count("telegram:4711") == 1


def test_random_bytes_get_400_with_the_secret_and_401_without(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "telegram_in")
    good = kit.chats.telegram.webhook.secret

    @settings(max_examples=20)
    @given(some.binary(max_size=60), some.booleans(), some.text("ab0-_", max_size=70))
    def say(body: bytes, is_proved: bool, noise: str) -> None:
        headers = {"x-telegram-bot-api-secret-token": good if is_proved else noise}
        answer = kit.calls("/in/telegram", body, headers)
        assert answer.status_code == (400 if is_proved else 401)

    say()
    assert set(rejected(kit)) <= {"bad_secret"}


@pytest.mark.anyio
async def test_malformed_updates_with_the_secret_cause_no_500(start: Start, telegram: str) -> None:
    message = COMMAND["message"]
    pressed = {"id": "1", "from": message["from"], "message": message, "data": "a"}
    said = [*spoilt(COMMAND), *spoilt({"update_id": 1, "callback_query": pressed})]
    async with start(telegram, others=nowhere(), **RECIPES) as station:
        for one in said:
            answer = await call(station, "/in/telegram", json.dumps(one).encode(), secret())
            assert answer.status_code < 500, str(one)[:300]


# --- orders ---


def test_command_is_answered_with_its_picture(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "telegram_in")
    said = kit.says("/imagine a lighthouse", on="telegram", finish=False)
    promise = eventually(lambda: said.replies)[0]
    eventually(lambda: predictions(kit)[0].metadata.get("telegram_acknowledgement"))
    assert (promise.text, [one.label for one in promise.buttons]) == ("On it.", ["Cancel"])
    kit.finish_all()
    reply = said.reply
    assert (len(reply.pictures), promise.is_deleted) == (1, True)
    asked = next(one for one in kit.chats.telegram.board.messages if one.author == said.person)
    assert reply.answers == asked.id
    assert [one.label for one in reply.buttons] == ["Again", "Larger", "Delete"]
    assert all(len(one.value.encode()) <= 64 for one in [*reply.buttons, *promise.buttons])


@pytest.mark.parametrize(
    "words", ["imagine a tower", "a tower", "/imagine@imagine_bot a tower", "/imagine\na tower"]
)
def test_private_chat_needs_no_command(receiver_kit: Kits, words: str) -> None:
    kit = talking(receiver_kit, "telegram_in")
    assert pictures(kit.says(words, place="D", on="telegram").replies)
    assert predictions(kit)[0].input["prompt"] == "a tower"


def test_help_and_rejected_orders_are_answered_with_a_reply(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "telegram_in")
    assert "A picture from words" in kit.says("/start", place="D", on="telegram").reply.text
    assert "What to draw" in kit.says("/help imagine", place="D", on="telegram").reply.text
    assert "Ratio must be" in kit.says("/imagine a --ratio 5:9", on="telegram").reply.text
    assert "no recipe 'imagin'" in kit.says("/imagin a", place="D", on="telegram").reply.text
    assert predictions(kit) == []


@pytest.mark.parametrize(
    "more",
    [
        {"from": {"id": 1, "is_bot": True}},
        {"from": None},
        {"via_bot": {"id": 1}},
        {
            "text": "/imagine@OtherBot x",
            "entities": [{**COMMAND["message"]["entities"][0], "length": 17}],
        },
        {"text": "/weather Berlin"},
        {"text": "/start"},
        {"text": "a lighthouse", "entities": []},
    ],
    ids=str,
)
def test_messages_from_bots_or_not_for_the_bot_are_ignored(
    receiver_kit: Kits, more: dict[str, Any]
) -> None:
    kit = talking(receiver_kit, "telegram_in")
    headers = JSON | {"x-telegram-bot-api-secret-token": kit.chats.telegram.webhook.secret}
    answer = kit.calls("/in/telegram", update(**more), headers)
    assert (answer.status_code, answer.content, predictions(kit)) == (200, b"", [])
    edited = json.dumps({"update_id": 1, "edited_message": COMMAND["message"]}).encode()
    assert kit.calls("/in/telegram", edited, headers).content == b""
    assert predictions(kit) == []


# --- duplicates, delays, faults ---


@pytest.mark.anyio
@pytest.mark.both_engines
async def test_duplicate_updates_order_once(start: Start, telegram: str) -> None:
    now, others = [float(AT)], nowhere()
    async with start(telegram, clock=lambda: now[0], others=others, **RECIPES) as station:
        for seconds in (0, 90_000):
            now[0] = AT + seconds
            found = await four_times(station, "/in/telegram", update(), secret())
            assert found == [200] * 4
        assert (station.count("predictions"), station.count("orders")) == (1, 1)
    promises = [one.text for one in others.chats.telegram.board.messages if "On it" in one.text]
    assert promises == ["On it."]


@pytest.mark.anyio
async def test_update_older_than_the_recipe_allows_is_not_ordered(
    start: Start, telegram: str, tmp_path: Any
) -> None:
    recipes = tmp_path / "recipes.toml"
    with open(RECIPES["RECEIVER_RECIPES"]) as file:  # noqa: PTH123, ASYNC230 - a short file
        recipes.write_text(file.read().replace("[imagine]\n", "[imagine]\nlatest = 600\n"))
    env = {**RECIPES, "RECEIVER_RECIPES": str(recipes)}
    async with start(telegram, clock=lambda: AT + 601.0, others=nowhere(), **env) as station:
        answer = await call(station, "/in/telegram", update(), secret())
        assert "too old" in answer.json()["text"]
        assert station.count("predictions") == 0


@pytest.mark.anyio
@pytest.mark.usefixtures("stops_soon")
async def test_update_gets_503_on_a_full_disk_and_200_while_the_provider_hangs(
    start: Start, network: Any, disk: Disk, telegram: str
) -> None:
    network.always("fal.submit", hangs)
    async with start(telegram, others=nowhere(), **RECIPES) as station:
        disk.full = True
        assert (await call(station, "/in/telegram", update(), secret())).status_code == 503
        disk.full = False
        assert (await call(station, "/in/telegram", update(), secret())).status_code == 200
        assert station.count("predictions") == 1


@pytest.mark.anyio
async def test_polled_updates_are_confirmed_only_after_commit(
    start: Start, monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    accounts(monkeypatch, TELEGRAM_POLL="1")
    chats = nowhere()
    people = chats.chats.people["telegram"]
    assert isinstance(people, TelegramPeople)
    async with start(built_in("telegram_in"), others=chats, **RECIPES) as station:
        disk.full = True
        assert await people.says("/imagine a lighthouse", "U1", "C1") is None
        await eventually_there(lambda: bool(station.problems) or chats.chats.telegram.updates)
        disk.full = False
        await eventually_there(lambda: station.count("predictions") == 1)
        await eventually_there(lambda: chats.chats.telegram.updates == [])
        await people.says("/help", "U1", "D1")
        board = chats.chats.telegram.board
        await eventually_there(lambda: [m for m in board.messages if "A picture" in m.text])


def pictures(messages: list[Message]) -> list[Message]:
    return [one for one in messages if one.pictures]


@pytest.mark.parametrize("fault", ["drop_call", "fail_call", "limit_call"])
def test_picture_appears_once_if_its_post_fails(receiver_kit: Kits, fault: Any) -> None:
    kit = talking(receiver_kit, "telegram_in")
    rule = Rule(fault=fault, provider="telegram", match="sendPhoto", times=1)
    kit.chats.scene.faults.replace([rule])
    said = kit.says("/imagine a lighthouse", on="telegram")
    kit.move(3600)
    assert len(pictures(said.replies)) == 1


def test_several_pictures_form_an_album_below_a_text_with_buttons(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "telegram_in")
    said = kit.says("/imagine two towers", on="telegram", finish=False)
    eventually(lambda: predictions(kit)[0].metadata.get("telegram_acknowledgement"))
    urls = [f"https://providers.test/files/{drawn.name_for(str(n))}" for n in range(2)]
    kit.finish_all(make_event("succeeded", output=urls))
    text, *album = said.replies
    assert [one.label for one in text.buttons] == ["Again", "Larger", "Delete"]
    assert ("two towers" in text.text, len({one.album for one in album})) == (True, 1)
    assert [len(one.pictures) for one in album] == [1, 1]


@pytest.mark.parametrize("place", ["C1", "D"])
@pytest.mark.parametrize("minutes", [16, 31])
def test_failure_is_sent_to_the_requester(receiver_kit: Kits, place: str, minutes: int) -> None:
    kit = talking(receiver_kit, "telegram_in")
    said = kit.says("/imagine a lighthouse", place=place, on="telegram", finish=False)
    eventually(lambda: predictions(kit)[0].metadata.get("telegram_acknowledgement"))
    kit.clock.move(minutes * 60)
    kit.finish_all(make_event("failed", error=("content_policy", "unsafe")))
    [told] = said.replies
    assert ("rules do not allow" in told.text, told.place) == (True, str(numbered("U1")))
    assert kit.presses(told, "Again").pictures


def test_picture_is_sent_directly_if_the_bot_may_not_post_in_the_chat(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "telegram_in")
    said = kit.says("/imagine a lighthouse", on="telegram", finish=False)
    kit.chats.telegram.blocked.add(kit.chats.place("telegram", "C1", "U1"))
    kit.finish_all()
    assert [one.place for one in pictures(said.replies)] == [str(numbered("U1"))]


# --- pictures and buttons ---


def test_picture_that_is_replied_to_becomes_the_image_option(
    receiver_kit: Kits,
) -> None:
    kit = talking(receiver_kit, "telegram_in")
    first = kit.says("/imagine a lighthouse", place="D", files={"a.png": DRAWN}, on="telegram")
    people = kit.chats.people["telegram"]
    assert isinstance(people, TelegramPeople)
    [shown] = pictures(first.replies)
    kit.do(people.replies("at night", "U1", "D1", shown))
    kit.finish_all()
    found = [one.input["image_url"].partition(",")[0] for one in predictions(kit)]
    assert found == ["data:image/png;base64"] * 2
    assert TOKEN not in msgspec.json.encode([one.input for one in predictions(kit)]).decode()


def press(kit: Kit, reply: Message, label: str, person: str = "U1") -> list[Message]:
    return pictures(kit.presses(reply, label, person=person, on="telegram").replies)


def test_buttons_work_for_others_but_delete_only_for_the_requester(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "telegram_in")
    [reply] = pictures(kit.says("/imagine a lighthouse", on="telegram").replies)
    [larger] = press(kit, reply, "Larger", "U2")
    assert [one.label for one in larger.buttons] == ["Again", "Delete"]
    assert len(press(kit, reply, "Again")) == 1
    [first, second, third] = predictions(kit)
    assert second.input == {"image_url": (first.output or [])[0].url}
    assert third.input == first.input
    answers = kit.chats.telegram.answers
    assert len(answers) == 2
    press(kit, reply, "Delete", "U2")
    assert (answers[-1]["show_alert"], reply.is_deleted) == (True, False)
    press(kit, reply, "Delete")
    eventually(lambda: reply.is_deleted)


def test_requester_can_cancel(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "telegram_in")
    said = kit.says("/imagine a lighthouse", on="telegram", finish=False)
    promise = eventually(lambda: said.replies)[0]
    eventually(lambda: predictions(kit)[0].metadata.get("telegram_acknowledgement"))
    kit.presses(promise, "Cancel", on="telegram", finish=False)
    eventually(lambda: predictions(kit)[0].status, lambda status: status == "canceled")
    kit.finish_all()
    assert [one.text for one in said.replies] == ["Canceled."]
