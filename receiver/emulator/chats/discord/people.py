"""People in Discord, whose commands and presses are sent to the app as signed interactions."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from receiver.emulator.chats.board import Button, File, Message, numbered
from receiver.emulator.chats.calling import Exchange
from receiver.emulator.chats.discord.api import KEY, Discord
from receiver.emulator.chats.discord.interactions import APPLICATION, Interaction, dm_of
from receiver.emulator.chats.discord.messages import Problem, attachment_json, to_json
from receiver.emulator.chats.forms import Unreadable, read_json
from receiver.emulator.chats.people import People, Typed

GUILD: Final = "290926798626357999"
_TEXT, _ATTACHMENT = 3, 11
_READ: Final[dict[int, Callable[[str], Any]]] = {
    4: int,
    5: lambda text: text.lower() in {"true", "1", "yes"},
    10: float,
}
"""Parsers of option values by the option's type; other types are text."""
_NAMED = re.compile(r"--([\w-]+)|([\w-]+)[:=](.+)")
_PING = b'{"type":1}'
_CHANNELS: Final[dict[bool, dict[str, Any]]] = {
    True: {"type": 1, "flags": 0, "last_message_id": None},
    False: {
        "type": 0,
        "flags": 0,
        "guild_id": GUILD,
        "name": "general",
        "nsfw": False,
        "parent_id": None,
        "permissions": "2147483647",
        "position": 0,
        "topic": None,
    },
}
"""The fields of a channel; under True, those of a direct conversation."""
_USER: Final = {"discriminator": "0", "global_name": None, "avatar": None}
_MEMBER: Final = {
    "permissions": "2147483647",
    "avatar": None,
    "nick": None,
    "joined_at": "2023-11-14T22:13:20+00:00",
    "premium_since": None,
    "flags": 0,
    "deaf": False,
    "mute": False,
    "pending": False,
}


@dataclass
class DiscordPeople(People):
    """People in Discord's channels."""

    discord: Discord
    roles: dict[str, list[str]] = field(default_factory=dict)

    async def type(self, typed: Typed) -> Exchange | None:
        """Send a command to the app; if the text is no command, only post it and return None."""
        text, place = typed.text, self.place(typed.thread or typed.place, typed.person)
        person = str(numbered(typed.person))
        if not text.startswith("/"):
            self.discord.board.post(Message(self.discord.snowflake(), place, person, text))
            return None
        name, _, rest = text[1:].partition(" ")
        attached = [self.discord.attach(*file) for file in typed.files]
        options = self._options(name, rest, attached)
        data: dict[str, Any] = {"id": str(numbered(name)), "name": name, "type": 1}
        if attached:
            resolved = {file.id: attachment_json(file) for file in attached}
            data["resolved"] = {"attachments": resolved}
        return await self._interact(2, {**data, "options": options}, person, place)

    async def presses(self, message: Message, button: Button, person: str) -> Exchange:
        """Press a button under a message."""
        data = {"component_type": 2, "custom_id": button.value}
        return await self._interact(3, data, str(numbered(person)), message.place, message)

    async def sets_up(self) -> bool:
        """Send a PING, and one with a bad signature, as Discord does to check a new URL."""
        good = await self.send("set-up", _PING)
        bad = await self.send("set-up", _PING, {"x-signature-ed25519": "0" * 128})
        is_pong = good.status == 200 and good.answer_type == "application/json"  # noqa: PLR2004 - HTTP's own
        is_pong = is_pong and good.answer.replace(b" ", b"") == _PING
        return is_pong and bad.status == 401  # noqa: PLR2004 - HTTP's own

    async def send(self, kind: str, body: bytes, more: dict[str, str] | None = None) -> Exchange:
        """Sign a body with the current time, and send it."""
        headers = {"content-type": "application/json", "user-agent": "Discord-Interactions/1.0"}
        headers |= signed(int(self.discord.scene.now()), body) | (more or {})
        return await self.discord.scene.call(kind, "discord", headers, body)

    async def repeat(self, exchange: Exchange, _number: int = 1) -> Exchange:
        """Send the same interaction again, which Discord itself never does."""
        return await self.send(exchange.kind, exchange.body)

    def place(self, place: str, person: str) -> str:
        """Return the channel's id for a name; D… is the person's conversation with the bot."""
        return dm_of(person) if place.startswith("D") else str(numbered(place))

    async def _interact(
        self,
        kind: int,
        data: dict[str, Any],
        person: str,
        place: str,
        source: Message | None = None,
    ) -> Exchange:
        discord, interaction_id = self.discord, self.discord.snowflake()
        token = hashlib.sha256(interaction_id.encode()).hexdigest()
        interaction = Interaction(interaction_id, token, place, person, discord.scene.now(), source)
        discord.interactions[token] = interaction
        user = {"id": person, "username": f"user{person[-4:]}", **_USER}
        roles = {"roles": self.roles.get(person, []), **_MEMBER}
        is_dm = place == dm_of(person)
        body = {
            "id": interaction_id,
            "application_id": APPLICATION,
            "type": kind,
            "token": token,
            "version": 1,
            "data": data,
            "channel_id": place,
            "channel": {"id": place, **_CHANNELS[is_dm]},
            "context": 1 if is_dm else 0,
            "locale": "en-US",
            "attachment_size_limit": 10_485_760,
            "entitlements": [],
            **({"user": user} if is_dm else {"guild_id": GUILD, "member": {"user": user, **roles}}),
            **({"message": to_json(source)} if source is not None else {}),
        }
        exchange = await self.send(
            "command" if source is None else "button", msgspec.json.encode(body)
        )
        self._show(exchange, interaction)
        return exchange

    def _show(self, exchange: Exchange, interaction: Interaction) -> None:
        """Show the response, or an error if it was late or invalid."""
        try:
            if not interaction.is_answered:
                self.discord.answer(interaction, _read_response(exchange))
        except (Unreadable, Problem):
            words = "The application did not respond"
            message = Message(self.discord.snowflake(), interaction.place, "discord", words)
            message.only_for = interaction.person
            self.discord.board.post(message)

    def _options(self, name: str, text: str, attached: list[File]) -> list[dict[str, Any]]:
        """Return the typed values of a command's registered options, or of a single `prompt`."""
        known = {option["name"]: option for option in self._registered(name)}
        known = known or {"prompt": {"name": "prompt", "type": _TEXT}}
        given, words = _fields(text, known)
        files = iter(attached)
        for option in known.values():
            if option["type"] == _ATTACHMENT and (file := next(files, None)) is not None:
                given[option["name"]] = file.id
        first = next(
            (o for o in known.values() if o["type"] == _TEXT and o["name"] not in given), None
        )
        if words and first is not None:
            given[first["name"]] = " ".join(words)
        return [
            {"name": name, "type": option["type"], "value": _value(option, given[name])}
            for name, option in known.items()
            if name in given
        ]

    def _registered(self, name: str) -> list[dict[str, Any]]:
        """Return the options of a command; the guild's command precedes a global one."""
        commands = [*self.discord.commands.get(GUILD, []), *self.discord.commands.get("", [])]
        found = next((command for command in commands if command["name"] == name), {})
        return list(found.get("options") or [])


def _read_response(exchange: Exchange) -> Any:
    if exchange.status != 200 or exchange.answer_type != "application/json":  # noqa: PLR2004 - HTTP's own
        raise Unreadable(exchange.error)
    return read_json(exchange.answer)


def _fields(text: str, known: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Separate `--ratio 16:9`, `ratio:16:9` and `ratio=16:9` from the other words."""
    try:
        pieces = iter(shlex.split(text))
    except ValueError:  # an unclosed quote
        pieces = iter(text.split())
    given: dict[str, str] = {}
    words: list[str] = []
    for piece in pieces:
        match = _NAMED.fullmatch(piece)
        name = (match[1] or match[2]) if match else ""
        if match is None or name not in known:
            words.append(piece)
        else:
            given[name] = match[3] or next(pieces, "")
    return given, words


def _value(option: dict[str, Any], text: str) -> Any:
    try:
        return _READ.get(option["type"], str)(text)
    except ValueError:
        raise Problem(400, 50035, f"{option['name']}: {text} is no value for it") from None


def signed(at: int, body: bytes) -> dict[str, str]:
    """Return the two headers that prove a body."""
    proof = KEY.sign(b"%d%b" % (at, body)).hex()
    return {"x-signature-timestamp": str(at), "x-signature-ed25519": proof}
