"""Telegram's checks of texts and keyboards, and its JSON of a message."""

from __future__ import annotations

from typing import Any, Final

from receiver.emulator.chats.board import BOT, Button, File, Message
from receiver.emulator.chats.forms import Given
from receiver.emulator.chats.telegram.files import bad

NAME: Final = "imagine_bot"
BOT_USER: Final = {"id": 123456, "is_bot": True, "first_name": "Imagine", "username": NAME}
_MODES: Final = {"", "html", "markdown", "markdownv2"}
_MOST_DATA: Final = 64


def units(text: str) -> int:
    """Return the length as Telegram counts it, in UTF-16 code units."""
    return len(text.encode("utf-16-le")) // 2


def check_text(given: Given, name: str, longest: int, what: str, least: int = 1) -> str:
    """Return a text argument if it is valid; raise Problem otherwise."""
    text = given.text(name)
    if given.text("parse_mode").lower() not in _MODES:
        raise bad("unsupported parse_mode")
    if units(text) > longest:
        raise bad(f"{what} is too long")
    if len(text.strip()) < least:
        raise bad(f"{what} text is empty")
    return text


def keyboard(markup: Any) -> list[Button]:
    """Return the buttons of an inline keyboard, row after row; raise Problem."""
    rows = markup.get("inline_keyboard", []) if isinstance(markup, dict) else []
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise bad("field inline_keyboard of the InlineKeyboardMarkup should be an Array of Arrays")
    return [_button(one) for row in rows for one in row]


def _button(one: Any) -> Button:
    label = one.get("text") if isinstance(one, dict) else None
    if not label:
        raise bad("can't parse inline keyboard button: Text is empty")
    data, url = one.get("callback_data") or "", one.get("url") or ""
    if bool(data) == bool(url):
        raise bad("can't parse inline keyboard button: Text buttons are unallowed in it")
    if len(data.encode()) > _MOST_DATA:
        raise bad("BUTTON_DATA_INVALID")
    return Button(label, data, url=url)


def chat_of(place: str) -> dict[str, Any]:
    """Return Telegram's JSON of a chat; groups have negative ids."""
    if place.startswith("@"):
        return {"id": -100_0000, "type": "channel", "title": place, "username": place[1:]}
    if place.startswith("-"):
        return {"id": int(place), "type": "supergroup", "title": f"group {place}"}
    return {"id": int(place), "type": "private", "first_name": f"Person {place}"}


def user_of(person: str) -> dict[str, Any]:
    user = {"id": int(person), "is_bot": False, "first_name": f"Person {person}"}
    return {**user, "username": f"person_{person}", "language_code": "en"}


def to_json(message: Message, replied_to: Message | None = None) -> dict[str, Any]:
    """Return Telegram's JSON of a message."""
    result: dict[str, Any] = {
        "message_id": int(message.id),
        "date": message.raw["date"],
        "chat": chat_of(message.place),
        "from": BOT_USER if message.author == BOT else user_of(message.author),
    }
    if message.files:
        kind = message.raw.get("kind", "document")
        result |= {kind: _file_json(kind, message.files[0])}
    if message.text:
        result["caption" if message.files else "text"] = message.text
        if entities := message.raw.get("entities"):
            result["caption_entities" if message.files else "entities"] = entities
    if message.album:
        result["media_group_id"] = message.album
    if message.thread:
        result["message_thread_id"] = int(message.thread)
    if replied_to is not None:
        result["reply_to_message"] = to_json(replied_to)
    if message.buttons:
        result["reply_markup"] = {
            "inline_keyboard": [[_button_json(one) for one in message.buttons]]
        }
    return result


def _button_json(one: Button) -> dict[str, str]:
    return {"text": one.label, **({"url": one.url} if one.url else {"callback_data": one.value})}


def _file_json(kind: str, file: File) -> Any:
    about = {"file_id": file.id, "file_unique_id": f"u{file.id}", "file_size": len(file.content)}
    sized = {"width": 256, "height": 256}
    if kind == "photo":
        return [{**about, **sized}]
    named = {"file_name": file.name, "mime_type": file.content_type}
    more = sized if kind in {"video", "animation"} else {}
    return {**about, **named, **more, **({} if kind == "document" else {"duration": 1})}
