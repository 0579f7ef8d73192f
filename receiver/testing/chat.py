"""Emulated chats in a test: signed messages to the receiver, and the messages people see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import httpx

from receiver.emulator import chat_settings_for, pictures
from receiver.emulator.chats.board import BOT, Board, Button, File, Message
from receiver.emulator.chats.calling import Exchange
from receiver.emulator.chats.telegram.set_up import Webhook
from receiver.emulator.inprocess import EmulatedChats
from receiver.model.sealing import Seals

CHATS: Final = "https://chats.test"
SETTINGS: Final = chat_settings_for(CHATS)
_UPDATES: Final = ("message", "callback_query")


@dataclass(frozen=True)
class Said:
    """The result of a message in a chat, read again at each access."""

    board: Board
    exchange: Exchange | None
    """The request to the receiver and its answer; None: none was sent."""
    person: str
    since: int

    @property
    def messages(self) -> list[Message]:
        """The messages of others posted since, as shown now to this person or to all."""
        new = self.board.messages[self.since :]
        return [one for one in new if one.author != self.person and one.is_for(self.person)]

    @property
    def ephemerals(self) -> list[Message]:
        """The messages that only this person sees."""
        return [one for one in self.messages if one.only_for]

    @property
    def replies(self) -> list[Message]:
        """The bot's messages that all can see."""
        return [one for one in self.messages if one.author == BOT and not one.only_for]

    @property
    def pictures(self) -> list[File]:
        return [picture for message in self.messages for picture in message.pictures]

    @property
    def reply(self) -> Message:
        """The only reply; ValueError, which lists all messages, unless there is exactly one."""
        __tracebackhide__ = True
        if len(replies := self.replies) == 1:
            return replies[0]
        raise ValueError(f"{len(replies)} replies among {self.messages}")


class ChatEdge(httpx.AsyncBaseTransport):
    """A transport to the emulated chats, to providers' pictures, and else to the test's own."""

    def __init__(self, chats: EmulatedChats, others: httpx.AsyncBaseTransport) -> None:
        self._chats, self._others = chats, others

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if str(request.url).startswith(CHATS):
            return await self._chats.handle_async_request(request)
        picture = pictures.draw(request.url.path.rpartition("/")[2])
        if picture is not None:
            return httpx.Response(200, headers={"content-type": "image/png"}, content=picture)
        return await self._others.handle_async_request(request)


def emulated_chats(receiver: str, secret_key: str, now: Callable[[], float]) -> EmulatedChats:
    """Return emulated platforms for a receiver; Telegram's webhook is set already."""
    chats = EmulatedChats(receiver, CHATS, now)
    secret = telegram_secret(secret_key)
    chats.chats.telegram.webhook = Webhook(f"{receiver}/in/telegram", secret, _UPDATES)
    return chats


def telegram_secret(secret_key: str) -> str:
    """Return the secret of Telegram's webhook, which is derived from the receiver's secret key."""
    return Seals([secret_key]).secrets("telegram-webhook")[0]


def button_of(message: Message, label: str) -> Button:
    """Return the button with this label; raise ValueError if there is none."""
    found = [button for button in message.buttons if button.label == label]
    if not found:
        raise ValueError(f"no button {label!r} in {[one.label for one in message.buttons]}")
    return found[0]
