"""Discord's documented limits of messages and commands, and its JSON of a message."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

from starlette.responses import Response

from receiver.emulator import wire
from receiver.emulator.chats.board import BOT, Button, File, Message
from receiver.emulator.chats.discord.interactions import BOT_USER, EPOCH

LONGEST: Final = {"content": 2000, "title": 256, "description": 4096, "embeds": 6000}
MOST: Final = 10
"""Maximum of embeds in a message, and of attachments."""
_NAME = re.compile(r"[-_'\w]{1,32}")
_BUTTON, _ROW, _LINK = 2, 1, 5
_LABEL, _CUSTOM_ID, _IN_ROW, _COMMANDS, _OPTIONS = 80, 100, 5, 100, 25


class Problem(Exception):
    """An error that ends a call with its status and code."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def response(self) -> Response:
        return wire.answer({"message": str(self), "code": self.code}, self.status)


def invalid(where: str, words: str) -> Problem:
    return Problem(400, 50035, f"Invalid Form Body: {where}: {words}")


def read_message(body: dict[str, Any], *, has_files: bool) -> None:
    """Raise Problem if a message breaks a documented limit."""
    content, embeds = body.get("content") or "", body.get("embeds") or []
    if not isinstance(content, str) or len(content) > LONGEST["content"]:
        raise invalid("content", f"Must be {LONGEST['content']} or fewer in length.")
    if not isinstance(embeds, list) or len(embeds) > MOST:
        raise invalid("embeds", f"Must be {MOST} or fewer in length.")
    _check_embeds(embeds)
    attachments = body.get("attachments") or []
    if not isinstance(attachments, list) or len(attachments) > MOST:
        raise invalid("attachments", f"Must be {MOST} or fewer in length.")
    _check_components(body.get("components") or [])
    if not (content or embeds or has_files or body.get("components")):
        raise Problem(400, 50006, "Cannot send an empty message")


def _check_embeds(embeds: list[Any]) -> None:
    length = 0
    for embed in embeds:
        if not isinstance(embed, dict):
            raise invalid("embeds", "Only dictionaries may be used in a DictType")
        for part in ("title", "description"):
            text = str(embed.get(part) or "")
            length += len(text)
            if len(text) > LONGEST[part]:
                raise invalid(f"embeds.{part}", f"Must be {LONGEST[part]} or fewer in length.")
    if length > LONGEST["embeds"]:
        raise invalid("embeds", f"Embed size exceeds maximum size of {LONGEST['embeds']}")


def _check_components(rows: Any) -> None:
    if not isinstance(rows, list) or len(rows) > _IN_ROW:
        raise invalid("components", f"Must be {_IN_ROW} or fewer in length.")
    for row in rows:
        inside = (
            row.get("components") if isinstance(row, dict) and row.get("type") == _ROW else None
        )
        if not isinstance(inside, list) or not 0 < len(inside) <= _IN_ROW:
            raise invalid("components", "a row (type 1) has 1 to 5 components")
        for one in inside:
            _check_button(one)
    names = [button.value for button in buttons_of({"components": rows}) if button.value]
    if len(set(names)) < len(names):
        raise invalid("components", "Component custom id cannot be duplicated")


def _check_button(one: Any) -> None:
    if not isinstance(one, dict) or one.get("type") != _BUTTON:
        raise invalid("components", "the emulator knows buttons (type 2) only")
    if len(str(one.get("label") or "")) > _LABEL:
        raise invalid("label", f"Must be {_LABEL} or fewer in length.")
    name, is_link = str(one.get("custom_id") or ""), one.get("style") == _LINK
    if is_link != bool(one.get("url")) or is_link == bool(name) or len(name) > _CUSTOM_ID:
        raise invalid("custom_id", f"1 to {_CUSTOM_ID} characters, or a url where style is 5")


def buttons_of(body: dict[str, Any]) -> list[Button]:
    """Return the buttons of a message, row after row."""
    return [
        Button(
            str(one.get("label") or ""), str(one.get("custom_id") or ""), url=one.get("url") or ""
        )
        for row in body.get("components") or []
        for one in row["components"]
    ]


def read_commands(given: Any) -> list[dict[str, Any]]:
    """Return the commands if they are valid; raise Problem otherwise."""
    if not isinstance(given, list) or len(given) > _COMMANDS:
        raise invalid("commands", f"a list of {_COMMANDS} or fewer")
    names = [command.get("name") for command in given if isinstance(command, dict)]
    if len(names) < len(given) or len(set(names)) < len(names):
        raise invalid("name", "Application command names must be unique")
    for command in given:
        _check_named(command, "command")
        for option in _options(command):
            _check_named(option, "option")
        if sum(map(len, _texts(command))) > 8000:  # noqa: PLR2004 - the limit of one command
            raise invalid("command", "Command exceeds maximum size (8000)")
    return given


def _options(command: dict[str, Any]) -> list[dict[str, Any]]:
    options = command.get("options") or []
    if len(options) > _OPTIONS or any(len(o.get("choices") or []) > _OPTIONS for o in options):
        raise invalid("options", f"{_OPTIONS} options, and {_OPTIONS} choices of each, at most")
    required = [bool(option.get("required")) for option in options]
    if required != sorted(required, reverse=True):
        raise invalid("options", "Required options must be placed before non-required options")
    return list(options)


def _check_named(one: dict[str, Any], what: str) -> None:
    name, about = str(one.get("name") or ""), str(one.get("description") or "")
    if not _NAME.fullmatch(name) or name != name.lower():
        raise invalid(f"{what}.name", "Command name is invalid")
    if not 0 < len(about) <= 100:  # noqa: PLR2004 - the documented limit
        raise invalid(f"{what}.description", "Must be between 1 and 100 in length.")


def _texts(value: Any) -> Iterator[str]:
    """Return the texts that count towards a command's size."""
    for name in ("name", "description", "value"):
        if isinstance(value.get(name), str):
            yield value[name]
    for inside in (*(value.get("options") or []), *(value.get("choices") or [])):
        yield from _texts(inside)


def to_json(message: Message) -> dict[str, Any]:
    """Return a message as Discord writes it."""
    made = datetime.fromtimestamp(((int(message.id) >> 22) + EPOCH) / 1000, UTC).isoformat()
    author: dict[str, Any] = {
        "id": message.author,
        "username": message.author,
        "discriminator": "0",
    }
    author |= {"avatar": None, "bot": False}
    answers = {"message_id": message.answers, "channel_id": message.place}
    return {
        "id": message.id,
        "channel_id": message.place,
        "type": 0,
        "author": BOT_USER if message.author == BOT else author,
        "timestamp": made,
        "edited_timestamp": made if message.edits else None,
        "attachments": [attachment_json(file) for file in message.files],
        "content": "",
        "embeds": [],
        "components": [],
        "flags": 0,
        **message.raw,
        "tts": False,
        "pinned": False,
        "mention_everyone": False,
        "mentions": [],
        "mention_roles": [],
        **({"message_reference": answers} if message.answers else {}),
    }


def attachment_json(file: File) -> dict[str, Any]:
    where = {"url": file.url, "proxy_url": file.url, "content_type": file.content_type}
    return {"id": file.id, "filename": file.name, "size": len(file.content), **where}
