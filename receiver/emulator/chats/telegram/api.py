"""Telegram's Bot API, with its error messages.

Every group (negative id) exists; a private chat exists once its person has written. A file sent by
URL is not fetched: only its URL is stored. Like a local Bot API server, it accepts a webhook at
plain http, but only on this machine.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.emulator import wire
from receiver.emulator.chats import forms
from receiver.emulator.chats.board import BOT, Board, Message
from receiver.emulator.chats.forms import Given, Unreadable
from receiver.emulator.chats.scene import Scene
from receiver.emulator.chats.telegram.files import KINDS, Files, Problem, bad
from receiver.emulator.chats.telegram.messages import BOT_USER, check_text, keyboard, to_json
from receiver.emulator.chats.telegram.set_up import Webhook, read_commands, read_webhook

TOKEN: Final = "123456:emulated-token-of-a-bot"  # noqa: S105 - valid only in the emulator
LONGEST, LONGEST_CAPTION = 4096, 1024
MOST_IN_GROUP, LEAST_IN_GROUP = 10, 2
QUERY_LIVES: Final = 900.0
_ACTIONS: Final = {
    *("typing", "upload_photo", "record_video", "upload_video", "record_voice", "upload_voice"),
    *("upload_document", "choose_sticker", "find_location"),
}


@dataclass
class Telegram:
    """The API under `/telegram`; the module `people` calls the app."""

    scene: Scene
    board: Board = field(default_factory=lambda: Board("telegram"))
    files: Files = field(default_factory=Files)
    webhook: Webhook = field(default_factory=Webhook)
    updates: list[dict[str, Any]] = field(default_factory=list)
    """Updates that are not delivered yet."""
    people: set[str] = field(default_factory=set)
    """Ids of the people who have written."""
    blocked: set[str] = field(default_factory=set)
    """Chats in which the bot is blocked."""
    queries: dict[str, float] = field(default_factory=dict)
    """Times at which buttons were pressed, by id of the callback query."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """The answers to callback queries."""
    commands: list[dict[str, Any]] = field(default_factory=list)
    privacy: bool = True
    """Whether the bot gets only commands and replies in groups."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    poller: object = None
    """The call of `getUpdates` that waits now."""

    def routes(self) -> list[Route]:
        api, both = "/telegram/bot{token}/{method}", ("GET", "POST")
        return [
            self.scene.route("telegram", api, self._called, _limited, methods=both),
            Route("/telegram/file/bot{token}/{path:path}", self._download),
        ]

    # --- handling of every call ---

    async def _called(self, request: Request) -> Response:
        try:
            if request.path_params["token"] != TOKEN:
                raise Problem(401, "Unauthorized")  # noqa: TRY301 - one way out for all refusals
            if int(request.headers.get("content-length", 0)) > Files.LARGEST:
                raise Problem(413, "Request Entity Too Large")  # noqa: TRY301
            given = await forms.read(request)
            return wire.answer(
                {"ok": True, "result": await self.do(request.path_params["method"], given)}
            )
        except Unreadable as error:
            return bad(f"can't parse {error} JSON object").response()
        except Problem as problem:
            return problem.response()
        except forms.WRONG_SHAPE as error:
            return bad(f"wrong arguments: {error}").response()

    async def do(self, method: str, given: Given) -> Any:
        """Run a method and return its result; raise Problem or Unreadable."""
        if method.lower() == "getupdates":
            return await self._get_updates(given)
        work = self._methods.get(method.lower())
        if work is None:
            raise Problem(404, "Not Found")
        return work(given)

    @cached_property
    def _methods(self) -> dict[str, Callable[[Given], Any]]:
        return {
            **{f"send{kind}": partial(self._send_file, kind) for kind in KINDS},
            "getme": self._me,
            "sendmessage": self._send_message,
            "sendmediagroup": self._send_group,
            "sendchataction": self._act,
            "editmessagetext": self._edit_text,
            "deletemessage": self._delete,
            "answercallbackquery": self._answer_query,
            "getfile": lambda given: self.files.file_info(given.text("file_id")),
            "setmycommands": self._set_commands,
            "getmycommands": lambda _: self.commands,
            "setwebhook": lambda given: self._use_webhook(read_webhook(given), given),
            "deletewebhook": lambda given: self._use_webhook(Webhook(), given),
            "getwebhookinfo": self._webhook_info,
        }

    def _chat(self, given: Given) -> str:
        chat = given.text("chat_id")
        if not chat:
            raise bad("chat_id is empty")
        if chat in self.blocked:
            raise Problem(403, "Forbidden: bot was blocked by the user")
        if not chat.startswith(("-", "@")) and chat not in self.people:
            raise bad("chat not found")
        if not re.fullmatch(r"-?\d{1,20}|@\w{4,64}", chat):
            raise bad("chat not found")
        return chat

    # --- messages ---

    def _new(self, given: Given, by: str, **more: Any) -> Message:
        """Return a new message, not posted yet; raise Problem."""
        chat, reply = self._chat(given), given.value("reply_parameters") or {}
        answers = str(reply.get("message_id", "")) or given.text("reply_to_message_id")
        lenient = reply.get("allow_sending_without_reply") or given.flag(
            "allow_sending_without_reply"
        )
        if answers and self.board.find(chat, answers) is None:
            if not lenient:
                raise bad("message to be replied not found")
            answers = ""
        buttons = keyboard(given.value("reply_markup"))
        name, thread = str(self.scene.number()), given.text("message_thread_id")
        more = {"answers": answers, "buttons": buttons, "thread": thread, **more}
        return Message(name, chat, BOT, by=by, raw={"date": int(self.scene.now())}, **more)

    def _send_message(self, given: Given) -> Any:
        text = check_text(given, "text", LONGEST, "message")
        return self._to_json(self.board.post(self._new(given, "sendMessage", text=text)))

    def _send_file(self, kind: str, given: Given) -> Any:
        caption = _caption(given)
        message = self._new(given, f"send{kind.capitalize()}", text=caption)
        message.files = [self.files.take(kind, given.args.get(kind), given.files, kind)]
        message.raw["kind"] = kind
        return self._to_json(self.board.post(message))

    def _send_group(self, given: Given) -> Any:
        media = given.value("media")
        if not isinstance(media, list) or not LEAST_IN_GROUP <= len(media) <= MOST_IN_GROUP:
            raise bad("group send failed: an album has 2 to 10 items")
        album = f"album-{self.scene.number()}"
        made = [self._of_group(one, given, album) for one in media]
        return [self._to_json(self.board.post(message)) for message in made]

    def _of_group(self, one: Any, given: Given, album: str) -> Message:
        """Return the message of an item of `media`, not posted yet; raise Problem."""
        kind = one.get("type") if isinstance(one, dict) else None
        if kind not in KINDS:
            raise bad(f"can't parse InputMedia: {kind} is no type")
        caption = _caption(Given(one))
        file = self.files.take(kind, one.get("media"), given.files, "")
        message = self._new(given, "sendMediaGroup", text=caption, files=[file], album=album)
        message.raw["kind"] = kind
        return message

    def _edit_text(self, given: Given) -> Any:
        message = self.board.find(self._chat(given), given.text("message_id"))
        if message is None:
            raise bad("message to edit not found")
        if message.author != BOT:
            raise bad("message can't be edited")
        if message.files:
            raise bad("there is no text in the message to edit")
        text = check_text(given, "text", LONGEST, "message")
        buttons = keyboard(given.value("reply_markup"))
        if (message.text, message.buttons) == (text, buttons):
            raise bad(
                "message is not modified: specified new message content and reply markup are "
                "exactly the same as a current content and reply markup of the message"
            )
        return self._to_json(self.board.edit(message, text=text, buttons=buttons))

    def _delete(self, given: Given) -> bool:
        message = self.board.find(self._chat(given), given.text("message_id"))
        if message is None:
            raise bad("message to delete not found")
        self.board.delete(message)
        return True

    def _act(self, given: Given) -> bool:
        chat, action = self._chat(given), given.text("action")
        if action not in _ACTIONS:
            raise bad("wrong parameter action in request")
        self.board.sign(chat, action)
        return True

    def _answer_query(self, given: Given) -> bool:
        name, text = given.text("callback_query_id"), given.text("text")
        made_at = self.queries.get(name)
        if made_at is None or self.scene.now() - made_at > QUERY_LIVES:
            raise bad("query is too old and response timeout expired or query ID is invalid")
        if len(text) > 200:  # noqa: PLR2004 - the documents' own
            raise bad("MESSAGE_TOO_LONG")
        self.answers.append({"id": name, "text": text, "show_alert": given.flag("show_alert")})
        self.board.change()
        return True

    def _to_json(self, message: Message) -> dict[str, Any]:
        replied_to = self.board.find(message.place, message.answers) if message.answers else None
        return to_json(message, replied_to)

    # --- the bot itself ---

    def _me(self, _given: Given) -> dict[str, Any]:
        can = {"can_join_groups": True, "can_read_all_group_messages": not self.privacy}
        return {**BOT_USER, **can, "supports_inline_queries": False}

    def _set_commands(self, given: Given) -> bool:
        self.commands = read_commands(given.value("commands"))
        return True

    # --- updates ---

    def _use_webhook(self, hook: Webhook, given: Given) -> bool:
        self.webhook = hook
        if given.flag("drop_pending_updates"):
            self.updates.clear()
        self.news.set()
        return True

    def _webhook_info(self, _given: Given) -> dict[str, Any]:
        hook = self.webhook
        info = {"url": hook.url, "has_custom_certificate": False, "max_connections": 40}
        info["pending_update_count"] = len(self.updates)
        if hook.allowed:
            info["allowed_updates"] = list(hook.allowed)
        if hook.error:
            info |= {"last_error_message": hook.error, "last_error_date": int(hook.error_at)}
        return info

    async def _get_updates(self, given: Given) -> list[dict[str, Any]]:
        """Wait for updates; an offset confirms those before it, a second call ends the first."""
        if self.webhook.url:
            raise Problem(
                409,
                "Conflict: can't use getUpdates method while webhook is active; "
                "use deleteWebhook to delete the webhook first",
            )
        me = self.poller = object()
        self.news.set()
        offset, allowed = given.text("offset"), given.value("allowed_updates") or ()
        if offset.isdecimal():
            self.updates = [one for one in self.updates if one["update_id"] >= int(offset)]
        seconds = given.text("timeout")
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(float(seconds) if seconds.isdecimal() else 0):
                    while not self._allowed(allowed):
                        self.news.clear()
                        await self.news.wait()
                        self._check_only(me)
            return self._allowed(allowed)
        finally:
            if self.poller is me:
                self.poller = None

    def _check_only(self, poller: object) -> None:
        if self.poller is not poller:
            raise Problem(
                409,
                "Conflict: terminated by other getUpdates request; "
                "make sure that only one bot instance is running",
            )

    def _allowed(self, kinds: Any) -> list[dict[str, Any]]:
        return [one for one in self.updates if not kinds or set(kinds) & set(one)][:100]

    # --- files ---

    async def _download(self, request: Request) -> Response:
        file = self.files.kept.get(request.path_params["path"].partition("/")[2])
        if request.path_params["token"] != TOKEN or file is None:
            return Problem(404, "Not Found").response()
        return Response(file.content, media_type="application/octet-stream")


def _caption(given: Given) -> str:
    return check_text(given, "caption", LONGEST_CAPTION, "message caption", least=0)


def _limited(seconds: int) -> Response:
    return Problem(429, f"Too Many Requests: retry after {seconds}", retry_after=seconds).response()
