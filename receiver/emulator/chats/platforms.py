"""Slack, Discord and Telegram on loopback: as strict as documented, with expiring tokens.

Control, under `/_emulator/chat`:

    GET  /{platform}          messages shown: `?place=&person=`, `?after=VERSION&wait=SECONDS`
    POST /{platform}/say      {"text", "person", "place", "thread"?}: a person types
    POST /{platform}/press    {"message", "button" (its number), "person", "place"}
    PUT  /tokens              {"discord": 10015, "slack": true}: refuse them from now on
    POST /clock               {"seconds": 960}: move the platforms' clock forward
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.emulator import wire
from receiver.emulator.chats.board import Board, Message, Platform, numbered
from receiver.emulator.chats.calling import Exchange
from receiver.emulator.chats.discord import api as discord
from receiver.emulator.chats.discord.interactions import APPLICATION
from receiver.emulator.chats.discord.people import DiscordPeople
from receiver.emulator.chats.forms import Unreadable, read_json
from receiver.emulator.chats.people import People
from receiver.emulator.chats.scene import Scene
from receiver.emulator.chats.slack import api as slack
from receiver.emulator.chats.slack.people import SECRET, SlackPeople
from receiver.emulator.chats.telegram import api as telegram
from receiver.emulator.chats.telegram.people import TelegramPeople

_LONGEST_WAIT: Final = 30.0
_BAD_REQUEST: Final = (Unreadable, LookupError, TypeError, ValueError)


class Chats:
    """The three platforms, and the people in them."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.slack = slack.Slack(scene)
        self.discord = discord.Discord(scene)
        self.telegram = telegram.Telegram(scene)
        self.people: dict[Platform, People] = {
            "slack": SlackPeople(self.slack),
            "discord": DiscordPeople(self.discord),
            "telegram": TelegramPeople(self.telegram),
        }
        boards = (self.slack.board, self.discord.board, self.telegram.board)
        self.boards: dict[Platform, Board] = {board.platform: board for board in boards}

    def routes(self) -> list[Route]:
        return [*self.slack.routes(), *self.discord.routes(), *self.telegram.routes()]

    def place(self, platform: Platform, place: str, person: str) -> str:
        """Return the platform's id of a place."""
        return self.people[platform].place(place, person)

    def kill_tokens(self, dead: dict[str, Any]) -> None:
        """Make tokens expire early; those that are not named become valid again."""
        code = dead.get("discord")
        self.discord.dead = int(code) if code else None
        self.slack.are_urls_dead = bool(dead.get("slack"))

    # --- control ---

    def control(self) -> list[Route]:
        at = "/_emulator/chat"
        table: list[tuple[str, str, Callable[[Request, Any], Awaitable[Any]]]] = [
            ("POST", "/{platform}/say", self._say),
            ("POST", "/{platform}/press", self._press),
            ("PUT", "/tokens", self._tokens),
            ("POST", "/clock", self._clock),
        ]
        made = [_controlled(method, at + path, work) for method, path, work in table]
        file = Route(at + "/{platform}/files/{id}", self._file, methods=["GET"])
        return [Route(at + "/{platform}", self._shown, methods=["GET"]), file, *made]

    async def _shown(self, request: Request) -> Response:
        platform, query = request.path_params["platform"], request.query_params
        board = self.boards.get(platform)
        if board is None:
            return wire.answer({"error": f"{platform} is not a platform"}, 404)
        person, place = query.get("person", ""), query.get("place", "")
        if wait := query.get("wait", ""):
            after = int(query.get("after", "0")) if query.get("after", "0").isdecimal() else 0
            seconds = min(float(wait) if wait.isdecimal() else 0, _LONGEST_WAIT)
            await board.until_after(after, seconds)
        if place:
            place = self.place(platform, place, person)
        who = self.name(platform, person)
        shown = [self._row(platform, message) for message in board.shown(place, who)]
        signs = [list(sign) for sign in board.signs]
        view = {"version": board.version, "you": who, "messages": shown, "signs": signs}
        return wire.answer(view)

    def _row(self, platform: Platform, message: Message) -> dict[str, Any]:
        """Return a message with URLs that show its files to any client."""
        row = message.row()
        for file in row["files"]:
            where = f"{self.scene.own}/_emulator/chat/{platform}/files/{file['id']}"
            file["view"] = where if file["size"] else ""
        return row

    async def _file(self, request: Request) -> Response:
        board = self.boards.get(request.path_params["platform"])
        for message in board.messages if board else ():
            for file in message.files:
                if file.content and file.id == request.path_params["id"]:
                    return Response(file.content, media_type=file.content_type)
        return Response(status_code=404)

    def name(self, platform: Platform, person: str) -> str:
        """Return the platform's id of a person."""
        return person if platform == "slack" or not person else str(numbered(person))

    async def _say(self, request: Request, body: Any) -> Any:
        people = self.people[request.path_params["platform"]]
        place = str(body.get("place", "C1"))
        person = str(body.get("person", "U1"))
        text, thread = str(body["text"]), str(body.get("thread", ""))
        return await self._exchange_of(people.says(text, person, place, thread=thread))

    async def _press(self, request: Request, body: Any) -> Any:
        platform = request.path_params["platform"]
        person = str(body.get("person", "U1"))
        place = self.place(platform, str(body.get("place", "C1")), person)
        message = self.boards[platform].find(place, str(body["message"]))
        if message is None or not 0 <= int(body["button"]) < len(message.buttons):
            raise KeyError("there is no such button")
        button = message.buttons[int(body["button"])]
        return await self._exchange_of(self.people[platform].presses(message, button, person))

    async def _exchange_of(self, work: Coroutine[Any, Any, Exchange | None]) -> dict[str, Any]:
        """Return the exchange with the app, if any, and whether anything is for the bot at all.

        `waits`: it is an update of Telegram's that no client polls for.
        """
        telegram = self.telegram
        before = telegram.updates[-1:]
        exchange = await work
        is_kept = exchange is None and telegram.updates[-1:] != before
        return {
            "exchange": exchange and exchange.row(),
            "is_for_bot": exchange is not None or is_kept,
            "waits": is_kept and telegram.poller is None,
        }

    async def _tokens(self, _request: Request, body: Any) -> Any:
        self.kill_tokens(dict(body))
        return {}

    async def _clock(self, _request: Request, body: Any) -> Any:
        self.scene.move(float(body["seconds"]))
        return {"now": self.scene.now()}


def _controlled(method: str, path: str, work: Callable[[Request, Any], Awaitable[Any]]) -> Route:
    async def endpoint(request: Request) -> Response:
        try:
            body = read_json(await request.body() or b"{}")
            if not isinstance(body, dict):
                raise TypeError("the body is no object")
            return wire.answer(await work(request, body))
        except _BAD_REQUEST as error:
            return wire.answer({"error": f"{type(error).__name__}: {error}"}, 400)

    return Route(path, endpoint, methods=[method])


def environment(base: str) -> dict[str, str]:
    """Return the environment that connects an app to the emulated platforms, in a channel C1."""
    return {
        "SLACK_CHANNEL": "C1",
        "DISCORD_CHANNEL": str(numbered("C1")),
        "TELEGRAM_CHAT": str(-numbered("C1")),
        "SLACK_URL": f"{base}/slack/api",
        "SLACK_SIGNING_SECRET": SECRET,
        "SLACK_TOKEN": slack.TOKEN,
        "DISCORD_URL": f"{base}/discord/api/v10",
        "DISCORD_PUBLIC_KEY": discord.PUBLIC_KEY,
        "DISCORD_APPLICATION": APPLICATION,
        "DISCORD_TOKEN": discord.TOKEN,
        "TELEGRAM_URL": f"{base}/telegram",
        "TELEGRAM_TOKEN": telegram.TOKEN,
    }
