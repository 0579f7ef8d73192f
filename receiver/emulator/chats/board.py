"""The messages of an emulated chat platform: files, buttons, edits, deletions, visibility."""

from __future__ import annotations

import asyncio
import hashlib
import mimetypes
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Platform = Literal["slack", "discord", "telegram"]

BOT = "bot"
"""The author of the bot's messages."""


@dataclass(frozen=True, slots=True)
class File:
    """A file in a message; its content is empty if only its URL is known."""

    id: str
    name: str
    content_type: str
    content: bytes
    url: str

    def row(self) -> dict[str, Any]:
        shown = {"name": self.name, "content_type": self.content_type, "url": self.url}
        return {"id": self.id, "size": len(self.content), **shown}


@dataclass(frozen=True, slots=True)
class Button:
    """A button under a message."""

    label: str
    value: str
    """The value that the app receives when it is pressed."""
    action: str = ""
    """Slack's `action_id`."""
    url: str = ""
    """The URL of a link button; a press of it sends nothing to the app."""


@dataclass(slots=True, eq=False)
class Message:
    """One message as it is shown now."""

    id: str
    place: str
    author: str
    """A person, `bot`, or the platform itself."""
    text: str = ""
    files: list[File] = field(default_factory=list)
    buttons: list[Button] = field(default_factory=list)
    only_for: str = ""
    """The only person who sees it; empty: all people in the place."""
    thread: str = ""
    """The message whose thread it is in."""
    answers: str = ""
    """The message that it replies to."""
    album: str = ""
    """Messages with the same album are shown together."""
    is_waiting: bool = False
    """Whether it is a placeholder for an answer."""
    by: str = ""
    """The call that posted it."""
    edits: int = 0
    is_deleted: bool = False
    raw: dict[str, Any] = field(default_factory=dict)
    """Fields that the platform keeps for its JSON of the message."""

    @property
    def pictures(self) -> list[File]:
        return [file for file in self.files if file.content_type.startswith("image/")]

    def is_for(self, person: str) -> bool:
        """Return whether a person sees it; for `""`, whether it is not deleted."""
        return not self.is_deleted and self.only_for in {"", person or self.only_for}

    def row(self) -> dict[str, Any]:
        names = ("id", "place", "author", "text", "only_for", "thread", "answers", "album", "by")
        states = ("is_waiting", "edits", "is_deleted")
        row = {name: getattr(self, name) for name in (*names, *states)}
        files, buttons = [f.row() for f in self.files], list(map(asdict, self.buttons))
        return row | {"files": files, "buttons": buttons}


class Board:
    """All messages of a platform, in order of posting."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.messages: list[Message] = []
        self.signs: list[tuple[str, str]] = []
        """Signs of activity, such as typing: (place, kind)."""
        self.version = 0
        """Number of changes so far."""
        self._changed = asyncio.Event()

    def post(self, message: Message) -> Message:
        self.messages.append(message)
        self.change()
        return message

    def edit(self, message: Message, **new: Any) -> Message:
        """Change what a message shows, and count it as edited."""
        for name, value in new.items():
            setattr(message, name, value)
        message.edits += 1
        self.change()
        return message

    def delete(self, message: Message) -> None:
        message.is_deleted = True
        self.change()

    def sign(self, place: str, kind: str) -> None:
        self.signs.append((place, kind))
        self.change()

    def find(self, place: str, message_id: str) -> Message | None:
        """Return a message that is not deleted; None if there is none."""
        for message in reversed(self.messages):
            if (message.place, message.id) == (place, message_id) and not message.is_deleted:
                return message
        return None

    def shown(self, place: str = "", person: str = "") -> list[Message]:
        """Return the messages shown now, in one place or all, to one person or to any."""
        here = [message for message in self.messages if place in {"", message.place}]
        return [message for message in here if message.is_for(person)]

    def change(self) -> None:
        self.version += 1
        self._changed.set()  # wakes all who wait now
        self._changed.clear()

    async def until_after(self, version: int, seconds: float) -> None:
        """Wait for a change after `version`, for `seconds` at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.version <= version:
                    await self._changed.wait()


def numbered(name: str) -> int:
    """Return a fixed number for a name; the same number if the name is digits."""
    if name.lstrip("-").isdecimal():
        return int(name)
    return 1_000_000 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


def kind_of(name: str, given: str = "") -> str:
    """Return the given content type of a file, or guess it by the name if none is given."""
    if given and given != "application/octet-stream":
        return given
    return mimetypes.guess_type(name, strict=False)[0] or "application/octet-stream"
