"""Discord's interactions, which are answered by their tokens, and the ids of the bot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from receiver.emulator.chats.board import Message, numbered
from receiver.emulator.chats.forms import Given, Unreadable

APPLICATION: Final = "1000000000000000001"
EPOCH: Final = 1_420_070_400_000
"""The milliseconds from which ids count."""
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
    """A command or a press that may be answered by its token."""

    id: str
    token: str
    place: str
    person: str
    made_at: float
    source: Message | None = None
    """The message whose button it was."""
    is_answered: bool = False
    is_ephemeral: bool = False
    original: Message | None = None
    """What `@original` is."""


def body_of(given: Given) -> dict[str, Any]:
    """Return the JSON of a call, which may be a part of a form."""
    found = given.document
    if "payload_json" in given.args:
        found = given.value("payload_json")
    if not isinstance(found, dict):
        raise Unreadable("payload_json")
    return found
