"""Discord's interactions, which are answered with their tokens, and the bot's ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from receiver.emulator.chats.board import Message, numbered
from receiver.emulator.chats.forms import Given, Unreadable

APPLICATION: Final = "1000000000000000001"
EPOCH: Final = 1_420_070_400_000
"""The Unix time in milliseconds from which ids count."""
BOT_USER: Final = {
    "id": APPLICATION,
    "username": "imagine",
    "discriminator": "0",
    "avatar": None,
    "bot": True,
}


def dm_of(person: str) -> str:
    """Return the id of the conversation between the bot and a person."""
    return str(numbered(person) + 7)


@dataclass
class Interaction:
    """A command or a press of a button, answered with its token."""

    id: str
    token: str
    place: str
    person: str
    made_at: float
    source: Message | None = None
    """The message of the pressed button."""
    is_answered: bool = False
    original: Message | None = None
    """The message called `@original`."""


def body_of(given: Given) -> dict[str, Any]:
    """Return the JSON object of a call, from the body or a form's `payload_json`."""
    found = given.document
    if "payload_json" in given.args:
        found = given.value("payload_json")
    if not isinstance(found, dict):
        raise Unreadable("payload_json")
    return found
