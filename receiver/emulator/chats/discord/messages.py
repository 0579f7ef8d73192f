"""Discord's documented limits of messages and commands, and its JSON of a message."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta
from starlette.responses import Response

from receiver.emulator import wire
from receiver.emulator.chats.board import BOT, Button, File, Message
from receiver.emulator.chats.discord.interactions import BOT_USER, EPOCH

LONGEST_EMBEDS: Final = 6000
LONGEST_COMMAND: Final = 8000
_LINK: Final = 5
"""The style of a button with a URL."""


class Problem(Exception):
    """An error that ends a call with its status and code."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def response(self) -> Response:
        return wire.answer({"message": str(self), "code": self.code}, self.status)


def invalid(words: str) -> Problem:
    return Problem(400, 50035, f"Invalid Form Body: {words}")


class _Button(msgspec.Struct):
    """The only component, beside rows, that the emulator knows."""

    type: Literal[2]
    label: Annotated[str, Meta(max_length=80)] | None = None
    style: int = 1
    custom_id: Annotated[str, Meta(max_length=100)] | None = None
    url: str | None = None

    def __post_init__(self) -> None:
        is_link = self.style == _LINK
        if is_link != bool(self.url) or is_link == bool(self.custom_id):
            raise ValueError(f"a button has a custom_id, or a url where style is {_LINK}")


class _Row(msgspec.Struct):
    type: Literal[1]
    components: Annotated[list[_Button], Meta(min_length=1, max_length=5)]


class _Embed(msgspec.Struct):
    title: Annotated[str, Meta(max_length=256)] | None = None
    description: Annotated[str, Meta(max_length=4096)] | None = None


class _Body(msgspec.Struct):
    """The limits of a message."""

    content: Annotated[str, Meta(max_length=2000)] | None = None
    embeds: Annotated[list[_Embed], Meta(max_length=10)] | None = None
    attachments: Annotated[list[Any], Meta(max_length=10)] | None = None
    components: Annotated[list[_Row], Meta(max_length=5)] | None = None

    def __post_init__(self) -> None:
        embedded = (text for one in self.embeds or [] for text in (one.title, one.description))
        if sum(len(text or "") for text in embedded) > LONGEST_EMBEDS:
            raise ValueError(f"Embed size exceeds maximum size of {LONGEST_EMBEDS}")
        names = [one.custom_id for one in self.buttons() if one.custom_id]
        if len(set(names)) < len(names):
            raise ValueError("Component custom id cannot be duplicated")

    def buttons(self) -> list[_Button]:
        return [one for row in self.components or [] for one in row.components]


def read_message(given: dict[str, Any], *, has_files: bool) -> list[Button]:
    """Return the buttons of a message; raise Problem if it breaks a documented limit."""
    body = _converted(given, _Body)
    if not (body.content or body.embeds or body.components or has_files):
        raise Problem(400, 50006, "Cannot send an empty message")
    return [
        Button(one.label or "", one.custom_id or "", url=one.url or "") for one in body.buttons()
    ]


class _Named(msgspec.Struct):
    name: Annotated[str, Meta(pattern=r"^[-_'\w]{1,32}\Z")]
    description: Annotated[str, Meta(min_length=1, max_length=100)]

    def __post_init__(self) -> None:
        if self.name != self.name.lower():
            raise ValueError("Command name is invalid")


class _Option(_Named):
    required: bool = False
    choices: Annotated[list[Any], Meta(max_length=25)] | None = None


class _Command(_Named):
    """The limits of a command."""

    options: Annotated[list[_Option], Meta(max_length=25)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        required = [option.required for option in self.options or []]
        if required != sorted(required, reverse=True):
            raise ValueError("Required options must be placed before non-required options")


def read_commands(given: Any) -> list[dict[str, Any]]:
    """Return the commands if they are valid; raise Problem otherwise."""
    commands = _converted(given, Annotated[list[_Command], Meta(max_length=100)])
    if len({command.name for command in commands}) < len(commands):
        raise invalid("Application command names must be unique")
    if any(sum(map(len, _texts(command))) > LONGEST_COMMAND for command in given):
        raise invalid(f"Command exceeds maximum size ({LONGEST_COMMAND})")
    return list(given)


def _converted(given: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise invalid(str(error)) from None


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
