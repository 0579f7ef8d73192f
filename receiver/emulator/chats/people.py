"""The people of a chat platform, whose texts and presses are sent to the app."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from receiver.emulator.chats.board import Button, Message
from receiver.emulator.chats.calling import Exchange


@dataclass(frozen=True)
class Typed:
    """A text that a person types, with its place and files."""

    text: str
    person: str
    place: str
    thread: str = ""
    files: tuple[tuple[str, bytes], ...] = ()
    """Names and contents of the attached files."""


class People(ABC):
    """The people of a platform, who talk to the app."""

    async def says(
        self,
        text: str,
        person: str,
        place: str,
        *,
        thread: str = "",
        files: tuple[tuple[str, bytes], ...] = (),
    ) -> Exchange | None:
        """Type a text; return the exchange with the app, or None if nothing is sent."""
        return await self.type(Typed(text, person, place, thread, files))

    @abstractmethod
    async def type(self, typed: Typed) -> Exchange | None: ...

    @abstractmethod
    async def presses(self, message: Message, button: Button, person: str) -> Exchange | None:
        """Press a button under a message."""

    @abstractmethod
    async def repeat(self, exchange: Exchange, number: int = 1, /) -> Exchange:
        """Send the same request again."""

    @abstractmethod
    def place(self, place: str, person: str) -> str:
        """Return the platform's id of a place."""
