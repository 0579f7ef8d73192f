"""Discord's API for bots: interaction tokens, messages by the bot, commands.

Every channel whose id is digits exists. A token is valid for three seconds, and once it is answered
for fifteen minutes; while `dead` is set, every token is refused with this code.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.emulator import wire
from receiver.emulator.chats import forms
from receiver.emulator.chats.board import BOT, Board, File, Message, kind_of
from receiver.emulator.chats.discord.interactions import (
    APPLICATION,
    BOT_USER,
    EPOCH,
    Interaction,
    body_of,
    dm_of,
)
from receiver.emulator.chats.discord.messages import (
    Problem,
    read_commands,
    read_message,
    to_json,
)
from receiver.emulator.chats.forms import Given, Unreadable
from receiver.emulator.chats.scene import WITHIN, Scene

TOKEN: Final = "emulated.bot.token"  # noqa: S105 - valid only in the emulator
KEY: Final = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC_KEY: Final = KEY.public_key().public_bytes_raw().hex()
LIVES: Final = 900.0
MOST_BYTES: Final = 25_000_000
FILE_LIVES: Final = 86_400
_EPHEMERAL: Final = 64
_MESSAGE, _THINKING, _LATER_EDIT, _EDIT = 4, 5, 6, 7
"""Types of answers to an interaction; the last two only after a press of a button."""
_AGENT: Final = "DiscordBot ("

Work = Callable[[Request, Given], Any]
"""A call; its result is JSON, a message, or None for HTTP 204."""


@dataclass
class Discord:
    """The API under `/discord/api/v10`; the module `people` calls the app."""

    scene: Scene
    board: Board = field(default_factory=lambda: Board("discord"))
    dead: int | None = None
    """10015 or 50027: the code with which every token is refused, whatever its age."""
    closed: set[str] = field(default_factory=set)
    """Channels that the bot cannot see, and people to whom it cannot write."""
    commands: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Commands by guild; global ones are under ""."""
    interactions: dict[str, Interaction] = field(default_factory=dict)
    """Interactions by token."""
    files: dict[str, tuple[File, float]] = field(default_factory=dict)
    nonces: dict[tuple[str, str], Message] = field(default_factory=dict)

    def routes(self) -> list[Route]:
        hook, one = "/webhooks/{app}/{token}", "/channels/{channel}/messages"
        table: list[tuple[str, str, str, Work]] = [
            ("POST", "callback", "/interactions/{id}/{token}/callback", self._callback),
            ("POST", "followup", hook, self._follow_up),
            ("GET", "webhook.get", hook + "/messages/{message}", self._webhook_message),
            ("PATCH", "webhook.edit", hook + "/messages/{message}", self._edit_by_webhook),
            ("DELETE", "webhook.delete", hook + "/messages/{message}", self._delete_by_webhook),
            ("POST", "messages.post", one, self._bot(self._post)),
            ("PATCH", "messages.edit", one + "/{message}", self._bot(self._edit)),
            ("DELETE", "messages.delete", one + "/{message}", self._bot(self._delete)),
            ("POST", "dm", "/users/@me/channels", self._bot(self._dm)),
            ("GET", "me", "/users/@me", self._bot(self._me)),
        ]
        for where in (
            "/applications/{app}/commands",
            "/applications/{app}/guilds/{guild}/commands",
        ):
            table.append(("GET", "commands.get", where, self._bot(self._get_commands)))
            table.append(("PUT", "commands.put", where, self._bot(self._put_commands)))
        routes = [self._route(*row) for row in table]
        return [*routes, Route("/discord/cdn/{id}/{name}", self._file)]

    def snowflake(self) -> str:
        """Return a unique id that begins with the time."""
        milliseconds = int(self.scene.now() * 1000) - EPOCH
        return str(milliseconds << 22 | self.scene.number() & 0x3FFFFF)

    # --- handling of every call ---

    def _route(self, method: str, name: str, path: str, work: Work) -> Route:
        async def called(request: Request) -> Response:
            try:
                return await self._called(request, work)
            except Unreadable:
                return Problem(400, 50109, "The request body contains invalid JSON.").response()
            except Problem as problem:
                return problem.response()
            except forms.WRONG_SHAPE as error:
                return Problem(400, 50035, f"Invalid Form Body: {error}").response()

        at = f"/discord/api/v10{path}"
        return self.scene.route("discord", at, called, _limited, name, [method])

    async def _called(self, request: Request, work: Work) -> Response:
        if not request.headers.get("user-agent"):
            raise Problem(403, 40333, "internal network error")
        if int(request.headers.get("content-length", 0)) > MOST_BYTES:
            raise Problem(413, 40005, "Request entity too large")
        found = work(request, await forms.read(request))
        shown = to_json(found) if isinstance(found, Message) else found
        response = Response(status_code=204) if shown is None else wire.answer(shown)
        limits = {"limit": "5", "remaining": "4", "reset-after": "1.000", "bucket": "emulated"}
        response.headers.update({f"x-ratelimit-{name}": value for name, value in limits.items()})
        response.headers["x-ratelimit-reset"] = f"{time.time() + 1:.3f}"
        return response

    def _bot(self, work: Work) -> Work:
        def known(request: Request, given: Given) -> Any:
            if wire.credential(request, "Bot") != TOKEN:
                raise Problem(401, 0, "401: Unauthorized")
            # Only with the bot's token: with an interaction's, discord.py sends aiohttp's header.
            if not request.headers["user-agent"].startswith(_AGENT):
                raise Problem(403, 40333, "internal network error")
            if request.path_params.get("app", APPLICATION) != APPLICATION:
                raise Problem(403, 20012, "You are not authorized to perform this action")
            if request.path_params.get("channel") in self.closed:
                raise Problem(403, 50001, "Missing Access")
            return work(request, given)

        return known

    # --- interactions ---

    def interaction(self, request: Request, *, is_first: bool = False) -> Interaction:
        """Return the interaction of a valid token; raise Problem otherwise."""
        interaction = self.interactions.get(request.path_params["token"])
        if interaction is None or request.path_params.get("app", APPLICATION) != APPLICATION:
            raise Problem(404, 10015, "Unknown Webhook")
        age = self.scene.now() - interaction.made_at
        if self.dead == 10015 or (not is_first and not interaction.is_answered):  # noqa: PLR2004 - its own code
            raise Problem(404, 10015, "Unknown Webhook")
        if self.dead is not None or age > LIVES:
            raise Problem(401, 50027, "Invalid Webhook Token")
        if is_first and age > WITHIN:
            raise Problem(404, 10062, "Unknown interaction")
        return interaction

    def _callback(self, request: Request, given: Given) -> dict[str, Any] | None:
        interaction = self.interaction(request, is_first=True)
        if interaction.is_answered:
            raise Problem(400, 40060, "Interaction has already been acknowledged.")
        body = body_of(given)
        self.answer(interaction, body, given)
        if request.query_params.get("with_response") != "true":
            return None
        message = {"message": to_json(interaction.original)} if interaction.original else {}
        return {"interaction": {"id": interaction.id, "type": 2}, "resource": message}

    def answer(self, interaction: Interaction, body: Any, given: Given | None = None) -> None:
        """Show the first answer, from the HTTP response or the callback call; raise Problem."""
        kind = body.get("type") if isinstance(body, dict) else None
        data = body.get("data") or {} if isinstance(body, dict) else {}
        edits = kind in {_LATER_EDIT, _EDIT}
        if kind not in {_MESSAGE, _THINKING} and not (edits and interaction.source is not None):
            raise Problem(400, 50035, "Invalid Form Body")
        given = given or Given(data)
        person = _reader(interaction, data)
        if kind == _EDIT:
            self._update(interaction.source, data, given)  # type: ignore[arg-type]
        if edits:
            interaction.original = interaction.source
        elif kind == _THINKING:
            message = Message(self.snowflake(), interaction.place, BOT, by="response")
            message.only_for, message.is_waiting = person, True
            interaction.original = self.board.post(message)
        else:
            interaction.original = self._create(interaction.place, data, given, "response", person)
        interaction.is_answered = True

    def _follow_up(self, request: Request, given: Given) -> Message:
        interaction = self.interaction(request)
        body = body_of(given)
        if interaction.original is not None and interaction.original.is_waiting:
            return self._update(interaction.original, body, given)
        person = _reader(interaction, body)
        return self._create(interaction.place, body, given, "followup", person)

    def _webhook_message(self, request: Request, _given: Given | None = None) -> Message:
        interaction, name = self.interaction(request), request.path_params["message"]
        message = interaction.original
        if name != "@original":
            message = self.board.find(interaction.place, name)
        if message is None or message.is_deleted:
            raise Problem(404, 10008, "Unknown Message")
        return message

    def _edit_by_webhook(self, request: Request, given: Given) -> Message:
        return self._update(self._webhook_message(request), body_of(given), given)

    def _delete_by_webhook(self, request: Request, _given: Given) -> None:
        self.board.delete(self._webhook_message(request))

    # --- messages ---

    def _create(
        self, place: str, body: dict[str, Any], given: Given, by: str, only_for: str = ""
    ) -> Message:
        """Post a message from a body; raise Problem if it is invalid."""
        message = Message(self.snowflake(), place, BOT, by=by, only_for=only_for)
        reference = body.get("message_reference") or {}
        message.answers = str(reference.get("message_id", ""))
        is_needed = reference.get("fail_if_not_exists", True)
        if message.answers and is_needed and self.board.find(place, message.answers) is None:
            raise Problem(400, 50035, "Invalid Form Body: REPLIES_UNKNOWN_MESSAGE")
        self._fill(message, body, given)
        return self.board.post(message)

    def _update(self, message: Message, body: dict[str, Any], given: Given) -> Message:
        self._fill(message, {**message.raw, **body}, given, is_edit="attachments" in body)
        return self.board.edit(message, is_waiting=False)

    def _fill(
        self, message: Message, body: dict[str, Any], given: Given, *, is_edit: bool = False
    ) -> None:
        """Fill a message from a body; an edit with `attachments` keeps only the files it lists."""
        listed = {
            str(one.get("id")) for one in body.get("attachments") or [] if isinstance(one, dict)
        }
        kept = [file for file in message.files if not is_edit or file.id in listed]
        new = [self._store_file(name, upload) for name, upload in given.files.items()]
        message.buttons = read_message(body, has_files=bool(kept or new))
        fields = ("content", "embeds", "components", "flags")
        message.raw = {name: body[name] for name in fields if name in body}
        message.files = [*kept, *new]
        embedded = [
            one.get(part) for one in body.get("embeds") or [] for part in ("title", "description")
        ]
        message.text = "\n".join(filter(None, [body.get("content"), *embedded]))

    def _store_file(self, field_name: str, upload: forms.Upload) -> File:
        """Store a file as Discord's CDN does, under a URL that expires."""
        file_id = self.snowflake()
        expires = int(self.scene.now()) + FILE_LIVES
        url = f"{self.scene.own}/discord/cdn/{file_id}/{upload.name}?ex={expires:x}"
        kind = kind_of(upload.name, upload.content_type)
        if not field_name.startswith("files["):
            raise Problem(400, 50035, "Invalid Form Body: files are named files[n]")
        file = File(file_id, upload.name, kind, upload.content, url)
        self.files[file_id] = file, expires
        return file

    def attach(self, name: str, content: bytes) -> File:
        """Store a file that a person attaches."""
        return self._store_file("files[0]", forms.Upload(name, "", content))

    async def _file(self, request: Request) -> Response:
        file, expires = self.files.get(request.path_params["id"], (None, 0))
        if file is None or self.scene.now() > expires:
            return Response("This content is no longer available.", 404)
        return Response(file.content, media_type=file.content_type)

    # --- calls with the bot's token ---

    def _post(self, request: Request, given: Given) -> Message:
        place, body = request.path_params["channel"], body_of(given)
        if not place.isdecimal():
            raise Problem(404, 10003, "Unknown Channel")
        nonce = (place, str(body.get("nonce", "")))
        if body.get("enforce_nonce") and nonce in self.nonces:
            return self.nonces[nonce]
        self.nonces[nonce] = self._create(place, body, given, "messages.post")
        return self.nonces[nonce]

    def _visible_message(self, request: Request) -> Message:
        """Return a message that is visible to all; raise Problem otherwise."""
        names = request.path_params
        message = self.board.find(names["channel"], names["message"])
        if message is None or message.only_for:
            raise Problem(404, 10008, "Unknown Message")
        return message

    def _edit(self, request: Request, given: Given) -> Message:
        message = self._visible_message(request)
        if message.author != BOT:
            raise Problem(403, 50005, "Cannot edit a message authored by another user")
        return self._update(message, body_of(given), given)

    def _delete(self, request: Request, _given: Given) -> None:
        self.board.delete(self._visible_message(request))

    def _dm(self, _request: Request, given: Given) -> dict[str, Any]:
        person = given.text("recipient_id")
        if not person.isdecimal():
            raise Problem(400, 50033, "Invalid Recipient(s)")
        if person in self.closed:
            raise Problem(403, 50007, "Cannot send messages to this user")
        user = {
            "id": person,
            "username": f"user{person[-4:]}",
            "discriminator": "0",
            "avatar": None,
        }
        return {"id": dm_of(person), "type": 1, "recipients": [user]}

    def _me(self, _request: Request, _given: Given) -> dict[str, Any]:
        return {**BOT_USER, "flags": 0, "verified": True, "mfa_enabled": False}

    def _get_commands(self, request: Request, _given: Given) -> list[dict[str, Any]]:
        return self.commands.get(request.path_params.get("guild", ""), [])

    def _put_commands(self, request: Request, given: Given) -> list[dict[str, Any]]:
        guild = request.path_params.get("guild", "")
        shared = {"application_id": APPLICATION, "version": self.snowflake()}
        if guild:
            shared["guild_id"] = guild
        found = read_commands(given.document)
        self.commands[guild] = [{"id": self.snowflake(), "type": 1, **shared, **c} for c in found]
        return self.commands[guild]


def _reader(interaction: Interaction, body: dict[str, Any]) -> str:
    """Return the only person who sees a message: if it is ephemeral, the one who is answered."""
    return interaction.person if body.get("flags", 0) & _EPHEMERAL else ""


def _limited(seconds: int) -> Response:
    body = {"message": "You are being rate limited.", "retry_after": seconds, "global": False}
    return wire.answer(body, 429, {"retry-after": str(seconds), "x-ratelimit-scope": "user"})
