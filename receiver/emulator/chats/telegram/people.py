"""People in Telegram, whose texts and presses are updates for the app, pushed or polled."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from receiver.emulator.chats.board import BOT, Button, Message, kind_of, numbered
from receiver.emulator.chats.calling import Exchange
from receiver.emulator.chats.forms import Given, Unreadable, Upload, read_json
from receiver.emulator.chats.people import People, Typed
from receiver.emulator.chats.telegram.api import Telegram
from receiver.emulator.chats.telegram.files import Problem
from receiver.emulator.chats.telegram.messages import to_json, units, user_of

WITHIN: Final = 60.0
"""Seconds after which Telegram closes a connection and retries."""
AGAIN: Final = (1, 5, 30, 60, 300)
_COMMAND = re.compile(r"/\w+(@\w+)?")
_PHOTOS: Final = {"image/png", "image/jpeg", "image/webp"}


@dataclass
class TelegramPeople(People):
    """People in Telegram's chats."""

    telegram: Telegram

    async def type(self, typed: Typed) -> Exchange | None:
        """Write a message; return None if nothing is pushed to the app."""
        return await self._write(typed, None)

    async def replies(self, text: str, person: str, place: str, to: Message) -> Exchange | None:
        """Write a text in reply to a message."""
        return await self._write(Typed(text, person, place), to)

    async def _write(self, typed: Typed, to: Message | None) -> Exchange | None:
        text, person = typed.text, typed.person
        telegram, place = self.telegram, self.place(typed.place, person)
        who, name = str(numbered(person)), str(telegram.scene.number())
        message = Message(name, place, who, text, thread=typed.thread, answers=to.id if to else "")
        message.raw = {"date": int(telegram.scene.now())}
        if command := _COMMAND.match(text):
            length = units(command[0])
            message.raw["entities"] = [{"type": "bot_command", "offset": 0, "length": length}]
        for filename, content in typed.files:
            kind = "photo" if kind_of(filename) in _PHOTOS else "document"
            message.raw["kind"] = kind
            message.files = [telegram.files.keep(kind, Upload(filename, "", content))]
        telegram.people.add(who)
        telegram.board.post(message)
        reaches_bot = command or (to is not None and to.author == BOT) or not telegram.privacy
        if place.startswith("-") and not reaches_bot:
            return None
        return await self.send_update({"message": to_json(message, to)})

    async def presses(self, message: Message, button: Button, person: str) -> Exchange | None:
        """Press a button under a message."""
        who, query_id = str(numbered(person)), str(9_000_000 + self.telegram.scene.number())
        self.telegram.queries[query_id] = self.telegram.scene.now()
        query = {"id": query_id, "from": user_of(who), "message": to_json(message)}
        instance = {"chat_instance": message.place}
        return await self.send_update(
            {"callback_query": {**query, **instance, "data": button.value}}
        )

    async def send_update(self, what: dict[str, Any]) -> Exchange | None:
        """Push an update, with retries in the background, or keep it for a poll."""
        telegram = self.telegram
        update = {"update_id": 700_000_000 + telegram.scene.number(), **what}
        hook = telegram.webhook
        if hook.allowed and not set(hook.allowed) & set(what):
            return None
        telegram.updates.append(update)
        telegram.news.set()
        if not hook.url:
            return None
        exchange = await self._push(update)
        if not exchange.is_ok and telegram.scene.scale is not None:
            telegram.scene.caller.start(self._retry(update))
        return exchange

    async def repeat(self, exchange: Exchange, _number: int = 1) -> Exchange:
        """Push the same update again."""
        return await self._push(msgspec.json.decode(exchange.body))

    def place(self, place: str, person: str) -> str:
        """Return the chat's id for a name: the person's own chat for D…, else a group."""
        if place.startswith("@") or place.lstrip("-").isdecimal():
            return place
        if place.startswith("D") or place == person:
            return str(numbered(person))
        return str(-abs(numbered(place)))

    async def _push(self, update: dict[str, Any]) -> Exchange:
        telegram, hook = self.telegram, self.telegram.webhook
        headers = {"content-type": "application/json"}
        if hook.secret:
            headers["x-telegram-bot-api-secret-token"] = hook.secret
        kind = next(name for name in update if name != "update_id")
        body = msgspec.json.encode(update)
        exchange = await telegram.scene.caller.call(kind, hook.url, headers, body, WITHIN)
        if exchange.is_ok:
            number = update["update_id"]
            telegram.updates = [one for one in telegram.updates if one["update_id"] != number]
            await self._do(exchange)
        else:
            hook.error_at = telegram.scene.now()
            hook.error = exchange.error or f"Wrong response from the webhook: {exchange.status}"
        return exchange

    async def _do(self, exchange: Exchange) -> None:
        """Run the method that a webhook's response may contain; its result is dropped."""
        try:
            call = read_json(exchange.answer) if exchange.answer else None
            if isinstance(call, dict) and isinstance(call.get("method"), str):
                await self.telegram.do(call["method"], Given(call, document=call))
        except (Unreadable, Problem) as error:
            self.telegram.webhook.error = str(error)

    async def _retry(self, update: dict[str, Any]) -> None:
        for seconds in AGAIN:
            await self.telegram.scene.wait(seconds)
            if not self.telegram.webhook.url or (await self._push(update)).is_ok:
                return
