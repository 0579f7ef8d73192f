"""People in Slack, whose texts and presses are sent to the app as signed requests."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from html import escape
from typing import Any, Final
from urllib.parse import urlencode

import msgspec

from receiver.emulator.chats.board import Button, File, Message
from receiver.emulator.chats.calling import Exchange
from receiver.emulator.chats.forms import FORM, Unreadable, read_json
from receiver.emulator.chats.people import People, Typed
from receiver.emulator.chats.slack.api import APP, TEAM, ResponseUrl, Slack
from receiver.emulator.chats.slack.blocks import Problem
from receiver.emulator.chats.slack.messages import BOT_USER, file_json

SECRET: Final = "0123456789abcdef0123456789abcdef"  # noqa: S105 - valid only in the emulator
AGAIN: Final = (0, 60, 300)
"""Seconds before each retry of an event."""
_JSON: Final = "application/json"
_OLD_TOKEN: Final = "deprecated"  # noqa: S105 - Slack still sends one; it proves nothing


@dataclass
class SlackPeople(People):
    """People in Slack's channels."""

    slack: Slack
    secret: str = SECRET
    is_double: bool = False
    """Whether the app also subscribes to `message.channels`: a mention is then sent twice."""

    async def type(self, typed: Typed) -> Exchange | None:
        text, person, place = typed.text, typed.person, self.place(typed.place, typed.person)
        if text.startswith("/"):
            return await self._command(text, person, place)
        ts = self.slack.ts()
        files = [self._store_file(name, content) for name, content in typed.files]
        message = Message(ts, place, person, text, files=files, thread=typed.thread)
        message.raw = {"text": escape(text, quote=False).replace(f"&lt;@{BOT_USER}&gt;", _MENTION)}
        self.slack.board.post(message)
        if place.startswith("D"):
            return await self._event(message, "message", channel_type="im")
        if _MENTION not in text:
            return None
        if self.is_double:
            await self._event(message, "message", channel_type="channel")
        return await self._event(message, "app_mention")

    async def presses(self, message: Message, button: Button, person: str) -> Exchange:
        """Press a button under a message."""
        url = ResponseUrl(message.place, person, message.thread, self.slack.scene.now(), message)
        container = {"type": "message", "message_ts": message.id, "channel_id": message.place}
        if message.thread:
            container |= {"thread_ts": message.thread}
        action = {"type": "button", "action_id": button.action, "block_id": "b1"}
        label = {"type": "plain_text", "text": button.label}
        payload = {
            "type": "block_actions",
            "user": {"id": person, "username": person.lower(), "team_id": TEAM},
            "api_app_id": APP,
            "token": _OLD_TOKEN,
            "container": {**container, "is_ephemeral": bool(message.only_for)},
            "trigger_id": self._trigger(),
            "team": {"id": TEAM, "domain": "emulated"},
            "channel": {"id": message.place, "name": message.place.lower()},
            "message": {"type": "message", "ts": message.id, **message.raw},
            "response_url": self.slack.response_url(self.slack.scene.own, url),
            "actions": [{**action, "value": button.value, "text": label}],
        }
        form = urlencode({"payload": msgspec.json.encode(payload).decode()})
        return await self.send("button", form.encode(), FORM)

    async def sets_up(self) -> bool:
        """Send a challenge, as Slack does for a new URL; return whether the app returns it."""
        challenge = "3eZbrw1aBm2rZgRNFdxV"
        body = {"type": "url_verification", "token": _OLD_TOKEN, "challenge": challenge}
        exchange = await self.send("set-up", msgspec.json.encode(body), _JSON)
        answers = (challenge.encode(), msgspec.json.encode({"challenge": challenge}))
        return exchange.status == 200 and exchange.answer.replace(b" ", b"") in answers  # noqa: PLR2004 - HTTP's own

    async def send(
        self, kind: str, body: bytes, content_type: str, more: dict[str, str] | None = None
    ) -> Exchange:
        """Sign a body with the current time, and send it."""
        headers = {"content-type": content_type, "user-agent": "Slackbot 1.0"}
        headers |= signed(self.secret, int(self.slack.scene.now()), body) | (more or {})
        return await self.slack.scene.call(kind, "slack", headers, body)

    async def repeat(self, exchange: Exchange, number: int = 1) -> Exchange:
        """Send the same request again; an event is marked as a retry of Slack's."""
        reason = "http_timeout" if exchange.error == "timeout" else "http_error"
        again = {"x-slack-retry-num": str(number), "x-slack-retry-reason": reason}
        is_event = exchange.headers["content-type"] == _JSON
        more = again if is_event else {}
        return await self.send(exchange.kind, exchange.body, exchange.headers["content-type"], more)

    def place(self, place: str, person: str) -> str:
        """Return the channel's id for a name; D is the person's conversation with the bot."""
        return "D" + person[1:] if place == "D" else place

    async def _command(self, text: str, person: str, place: str) -> Exchange:
        command, _, rest = text.partition(" ")
        url = ResponseUrl(place, person, "", self.slack.scene.now())
        form = {
            "token": _OLD_TOKEN,
            "team_id": TEAM,
            "team_domain": "emulated",
            "channel_id": place,
            "channel_name": "directmessage" if place.startswith("D") else place.lower(),
            "user_id": person,
            "user_name": person.lower(),
            "command": command,
            "text": escape(rest, quote=False),
            "api_app_id": APP,
            "is_enterprise_install": "false",
            "response_url": self.slack.response_url(self.slack.scene.own, url),
            "trigger_id": self._trigger(),
        }
        exchange = await self.send("command", urlencode(form).encode(), FORM)
        self._show(exchange, url, command)
        return exchange

    def _show(self, exchange: Exchange, url: ResponseUrl, command: str) -> None:
        """Show the answer to a command, if it has one, or that the command failed."""
        try:
            body = _read_response(exchange)
            if body is not None:
                self.slack.answer(url, body, "response")
        except (Problem, Unreadable) as error:
            words = f'{command} failed with the error "{error}"'
            message = Message(self.slack.ts(), url.place, "slack", words, only_for=url.person)
            self.slack.board.post(message)

    async def _event(self, typed: Message, kind: str, **more: str) -> Exchange:
        event: dict[str, Any] = {
            "type": kind,
            "user": typed.author,
            "text": typed.raw["text"],
            "ts": typed.id,
            "channel": typed.place,
            "event_ts": typed.id,
            **more,
        }
        if typed.thread:
            event["thread_ts"] = typed.thread
        if typed.files:
            event |= {"files": [file_json(file) for file in typed.files], "subtype": "file_share"}
        return await self.send_event(event)

    async def send_event(self, event: dict[str, Any]) -> Exchange:
        """Send the app an event, and retry in the background if that fails."""
        body = {
            "token": _OLD_TOKEN,
            "team_id": TEAM,
            "api_app_id": APP,
            "type": "event_callback",
            "event_id": f"Ev{self.slack.scene.number():06d}",
            "event_time": int(self.slack.scene.now()),
            "event": event,
        }
        kind = f"event {event['type']}"
        exchange = await self.send(kind, msgspec.json.encode(body), _JSON)
        if not exchange.is_ok and self.slack.scene.scale is not None:
            self.slack.scene.caller.start(self._retry(exchange))
        return exchange

    async def _retry(self, exchange: Exchange) -> None:
        for number, seconds in enumerate(AGAIN, 1):
            await self.slack.scene.wait(seconds)
            if (await self.repeat(exchange, number)).is_ok:
                return

    def _store_file(self, name: str, content: bytes) -> File:
        file_id = f"F{self.slack.scene.number():06d}"
        return self.slack.keep(self.slack.scene.own, file_id, name, content)

    def _trigger(self) -> str:
        return f"{self.slack.scene.number()}.2.abc"


def _read_response(exchange: Exchange) -> Any:
    """Return the answer to a command, None if it is empty; raise Problem or Unreadable."""
    if exchange.error == "timeout":
        raise Problem("operation_timeout")
    if exchange.status != 200:  # noqa: PLR2004 - Slack takes no other
        raise Problem("http_service_error")
    if exchange.answer_type == _JSON:
        return read_json(exchange.answer)
    text = exchange.answer.decode(errors="replace")
    return {"text": text} if text else None


_MENTION: Final = f"<@{BOT_USER}>"


def signed(secret: str, at: int, body: bytes) -> dict[str, str]:
    """Return the two headers that prove a body."""
    proof = hmac.new(secret.encode(), b"v0:%d:%b" % (at, body), hashlib.sha256).hexdigest()
    return {"x-slack-request-timestamp": str(at), "x-slack-signature": f"v0={proof}"}
