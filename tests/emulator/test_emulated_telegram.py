"""The emulated Telegram works with aiogram, which also parses the updates that it sends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from starlette.responses import Response

from receiver.emulator import Rule
from receiver.emulator.chats.board import numbered
from receiver.emulator.chats.telegram.api import TOKEN
from receiver.emulator.chats.telegram.people import TelegramPeople
from receiver.emulator.pictures import draw, name_for
from tests.emulator.chatting import OWN, Inside, Outside, outside, said
from tests.emulator.serving import eventually

if TYPE_CHECKING:
    from aiogram import Bot

pytestmark = pytest.mark.anyio

PNG = draw(name_for("a lighthouse")) or b""
GROUP, PERSON = -numbered("C1"), numbered("U1")
SECRET = "dEkebUdxKbk0jLzO83SYP4B3XOnPNhiqj0bRLqx82_Q"
API = f"{OWN}/telegram/bot{TOKEN}"


def types() -> ModuleType:
    """Import the types late: the import takes seconds in every process that collects tests."""
    return import_module("aiogram.types")


def errors() -> ModuleType:
    return import_module("aiogram.exceptions")


def keys(text: str = "Again", data: str = "again:tok") -> Any:
    button = types().InlineKeyboardButton(text=text, callback_data=data)
    return types().InlineKeyboardMarkup(inline_keyboard=[[button]])


@pytest.fixture(scope="module")
def platform() -> Iterator[Outside]:
    with outside() as found:
        yield found


@pytest.fixture
def here(platform: Outside) -> Outside:
    telegram = platform.chats.telegram
    telegram.board.messages.clear()
    telegram.updates.clear()
    telegram.webhook = type(telegram.webhook)()
    platform.app.told.clear()
    platform.app.answers[:] = [Response()]
    return platform


@asynccontextmanager
async def aiogram(here: Outside, token: str = TOKEN) -> AsyncIterator[Bot]:
    from aiogram import Bot  # noqa: PLC0415 - see `types`
    from aiogram.client.session.aiohttp import AiohttpSession  # noqa: PLC0415
    from aiogram.client.telegram import TelegramAPIServer  # noqa: PLC0415

    session = AiohttpSession(api=TelegramAPIServer.from_base(f"{here.url}/telegram"))
    async with Bot(token, session=session) as bot:
        yield bot


def people(inside: Inside) -> TelegramPeople:
    found = inside.chats.people["telegram"]
    assert isinstance(found, TelegramPeople)
    return found


def picture(name: str = "a.png") -> Any:
    return types().BufferedInputFile(PNG, name)


async def test_aiogram_sends_edits_and_deletes_messages(here: Outside) -> None:
    board = here.chats.telegram.board
    async with aiogram(here) as bot:
        assert (await bot.get_me()).username == "imagine_bot"
        await bot.send_chat_action(GROUP, "upload_photo")
        sent = await bot.send_message(GROUP, "on it", reply_markup=keys())
        answers = types().ReplyParameters(message_id=sent.message_id)
        photo = await bot.send_photo(GROUP, picture(), caption="done", reply_parameters=answers)
        assert photo.reply_to_message
        await bot.edit_message_text("waiting", chat_id=GROUP, message_id=sent.message_id)
        with pytest.raises(errors().TelegramBadRequest, match="message is not modified"):
            await bot.edit_message_text("waiting", chat_id=GROUP, message_id=sent.message_id)
        shown = board.shown(str(GROUP))
        assert [(m.text, m.edits, len(m.pictures)) for m in shown] == [
            ("waiting", 1, 0),
            ("done", 0, 1),
        ]
        assert (shown[0].buttons, shown[1].answers) == ([], str(sent.message_id))
        media = types().InputMediaPhoto(media=picture("b.png"), caption="both")
        await bot.delete_message(GROUP, photo.message_id)
        group = await bot.send_media_group(GROUP, [media, types().InputMediaPhoto(media=picture())])
        assert len({message.media_group_id for message in group}) == 1
        assert [m.text for m in board.shown(str(GROUP))] == ["waiting", "both", ""]
        film = await bot.send_video(GROUP, "https://files.example/a.mp4")
        paper = await bot.send_document(GROUP, types().BufferedInputFile(b"%PDF-1.7", "a.pdf"))
        assert film.video
        assert paper.document
        assert paper.document.mime_type == "application/pdf"
        got = await bot.get_file(group[0].photo[0].file_id if group[0].photo else "")
        assert got.file_path
        content = await bot.download_file(got.file_path)
        assert content
        assert content.read() == PNG
    assert (str(GROUP), "upload_photo") in board.signs


REFUSED: dict[str, Callable[[Bot], Coroutine[Any, Any, Any]]] = {
    "chat not found": lambda bot: bot.send_message(4711, "a"),
    "message text is empty": lambda bot: bot.send_message(GROUP, " "),
    "message is too long": lambda bot: bot.send_message(GROUP, "\N{PILE OF POO}" * 2049),
    "message caption is too long": lambda bot: bot.send_photo(GROUP, picture(), caption="a" * 1025),
    "BUTTON_DATA_INVALID": lambda bot: bot.send_message(
        GROUP,
        "a",
        reply_markup=keys("a", "é" * 33),
    ),
    "message to be replied not found": lambda bot: bot.send_message(
        GROUP, "a", reply_parameters=types().ReplyParameters(message_id=4711)
    ),
    "message to edit not found": lambda bot: bot.edit_message_text(
        "a", chat_id=GROUP, message_id=4711
    ),
    "message to delete not found": lambda bot: bot.delete_message(GROUP, 4711),
    "IMAGE_PROCESS_FAILED": lambda bot: bot.send_photo(
        GROUP, types().BufferedInputFile(b"a", "a.png")
    ),
    "PHOTO_INVALID_DIMENSIONS": lambda bot: bot.send_photo(
        GROUP, types().BufferedInputFile(PNG[:16] + b"\0\0\x30\0" * 2 + PNG[24:], "a.png")
    ),
    "file must be non-empty": lambda bot: bot.send_document(
        GROUP, types().BufferedInputFile(b"", "a")
    ),
    "wrong file identifier": lambda bot: bot.send_photo(GROUP, "nonsense"),
    "query is too old": lambda bot: bot.answer_callback_query("4711"),
    "wrong file_id": lambda bot: bot.get_file("4711"),
    "An HTTPS URL must be provided": lambda bot: bot.set_webhook("http://x.example/in/telegram"),
    "only on ports 80, 88, 443 or 8443": lambda bot: bot.set_webhook("https://x.example:8000/"),
    "secret token contains": lambda bot: bot.set_webhook("https://x.example/", secret_token="a b"),
    "BOT_COMMAND_INVALID": lambda bot: bot.set_my_commands(
        [types().BotCommand(command="Imagine", description="a")]
    ),
}


async def test_invalid_call_fails_with_the_documented_error_message(here: Outside) -> None:
    async with aiogram(here) as bot:
        for words, call in REFUSED.items():
            with pytest.raises(errors().TelegramBadRequest, match=words):
                await call(bot)
    assert here.chats.telegram.board.messages == []


async def test_invalid_token_block_and_rate_limit_are_reported(here: Outside) -> None:
    async with aiogram(here, "1:stranger") as bot:
        with pytest.raises(errors().TelegramUnauthorizedError):
            await bot.get_me()
    async with aiogram(here) as bot:
        here.chats.telegram.blocked = {str(GROUP)}
        with pytest.raises(errors().TelegramForbiddenError, match="bot was blocked by the user"):
            await bot.send_message(GROUP, "a")
        here.chats.telegram.blocked = set()
        rule = Rule(fault="limit_call", provider="telegram", times=1, retry_after=9)
        here.chats.scene.faults.replace([rule])
        with pytest.raises(errors().TelegramRetryAfter) as limited:
            await bot.send_message(GROUP, "a")
        assert limited.value.retry_after == 9


async def test_failed_webhook_update_is_redelivered_with_the_secret_token(
    here: Outside,
) -> None:
    app = here.app
    async with aiogram(here) as bot:
        url = here.chats.scene.receiver + "/in/telegram"
        await bot.set_webhook(url, secret_token=SECRET, allowed_updates=["message"])
        app.answers[:] = [Response(status_code=503), Response()]
        say = "/imagine a lighthouse \N{PILE OF POO}"
        assert (await asyncio.to_thread(here.say, "telegram", say))["status"] == 503
        told = await asyncio.to_thread(
            eventually, lambda: list(app.told), lambda found: len(found) == 2
        )
        assert {one.headers["x-telegram-bot-api-secret-token"] for one in told} == {SECRET}
        update = types().Update.model_validate(told[1].json)
        assert update.message
        assert update.message.text == say
        assert update.message.entities
        assert update.message.entities[0].extract_from(say) == "/imagine"
        info = await bot.get_webhook_info()
        assert (info.url, info.last_error_message) == (url, "Wrong response from the webhook: 503")
        eventually(lambda: here.chats.telegram.updates, lambda found: not found)
        with pytest.raises(errors().TelegramConflictError, match="webhook is active"):
            await bot.get_updates()
        await bot.delete_webhook()


async def test_second_get_updates_ends_the_first_and_offset_confirms_updates(here: Outside) -> None:
    async with aiogram(here) as bot:
        first = asyncio.create_task(bot.get_updates(timeout=30))
        await asyncio.to_thread(eventually, lambda: here.chats.telegram.poller, bool)
        second = asyncio.create_task(bot.get_updates(timeout=30))
        with pytest.raises(errors().TelegramConflictError, match="terminated by other getUpdates"):
            await first
        assert await asyncio.to_thread(here.say, "telegram", "/imagine a", place="D") is None
        [update] = await second
        assert update.message
        assert (update.message.chat.id, update.message.chat.type) == (PERSON, "private")
        [again] = await bot.get_updates()
        assert again.update_id == update.update_id
        assert await bot.get_updates(offset=update.update_id + 1) == []
        await bot.send_message(PERSON, "there", reply_markup=keys())
        view = await asyncio.to_thread(here.do, "GET", "/telegram?place=D&person=U1")
        shown = view["messages"][-1]
        press = {"message": shown["id"], "button": 0, "place": "D"}
        await asyncio.to_thread(here.do, "POST", "/telegram/press", press)
        [pressed] = await bot.get_updates()
        assert pressed.callback_query
        assert pressed.callback_query.data == "again:tok"
        await bot.answer_callback_query(pressed.callback_query.id, "on it")
    assert here.chats.telegram.answers[-1]["text"] == "on it"


async def test_commands_are_set_and_read(here: Outside) -> None:
    async with aiogram(here) as bot:
        await bot.set_my_commands([types().BotCommand(command="imagine", description="a picture")])
        assert [command.command for command in await bot.get_my_commands()] == ["imagine"]


async def test_privacy_mode_bot_gets_only_commands_and_replies_in_a_group() -> None:
    inside = Inside()
    here, told = people(inside), inside.chats.telegram.updates
    await here.says("@imagine_bot hello", "U1", "C1")
    assert told == []
    await here.says("/imagine@OtherBot a", "U1", "C1")
    body = {"chat_id": GROUP, "text": "done"}
    await inside.http.post(f"{API}/sendMessage", json=body)
    await here.replies("more", "U1", "C1", inside.chats.telegram.board.messages[-1])
    await here.says("", "U1", "D", files=(("a.png", PNG),))
    command, reply, photo = (update["message"] for update in told)
    assert command["text"] == "/imagine@OtherBot a"
    assert reply["reply_to_message"]["text"] == "done"
    assert photo["photo"][0]["file_size"] == len(PNG)


async def test_webhook_response_may_contain_a_method_call() -> None:
    inside = Inside(said({"method": "sendMessage", "chat_id": GROUP, "text": "typing"}))
    await inside.http.post(f"{API}/setWebhook", json={"url": "https://receiver.test/in/telegram"})
    await people(inside).says("/imagine a", "U1", "C1")
    assert inside.chats.telegram.board.shown()[-1].text == "typing"
    assert inside.chats.telegram.updates == []


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff"])
async def test_malformed_request_body_is_rejected(body: bytes) -> None:
    inside, headers = Inside(), {"content-type": "application/json"}
    for method, status in {"sendMessage": 400, "nonsense": 404 if body == b"[1]" else 400}.items():
        answer = await inside.http.post(f"{API}/{method}", content=body, headers=headers)
        assert (answer.status_code, answer.json()["ok"]) == (status, False)
    assert (await inside.http.get(f"{OWN}/telegram/file/bot1:x/a/b")).status_code == 404
